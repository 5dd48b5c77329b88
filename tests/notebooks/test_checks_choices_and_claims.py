"""The checks of notebook 08: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
from check_tools import each_gets_its_own

import memory_math
from course.checks import choices_and_claims as check
from memory_math.ledger.rows import Written, judge


def cache(layers, heads, kv_heads, size, tokens):
    return 2 * layers * kv_heads * size * tokens * 2


def test_cache_bytes():
    each_gets_its_own(
        check.cache_bytes,
        right=[cache, lambda layers, heads, kv_heads, size, tokens: 4 * layers * kv_heads * size * tokens],
        wrong={
            "keys *and* values": lambda *s: cache(*s) // 2,
            "numbers instead of bytes": lambda *s: cache(*s) // 4,
            "queries are not kept": lambda layers, heads, kv_heads, size, tokens: cache(layers, heads, heads, size, tokens),
            "four times too much": lambda *s: 4 * cache(*s),
            "one layer": lambda *s: cache(*s) // s[0],
            "one token": lambda *s: cache(*s) // s[4],
            "one number": lambda *s: cache(*s) // s[3],
            "one head": lambda *s: cache(*s) // s[2],
            "not 4": lambda *s: 2 * cache(*s),
            "64 heads and 4 bytes": lambda layers, heads, kv_heads, size, tokens: 2 * cache(layers, heads, heads, size, tokens),
            "square": lambda *s: cache(*s) * s[4],
            "it says 7": lambda *s: 7,
            "use the arguments": lambda *s: 1_342_177_280,
        },
    )


def test_cache_bytes_is_what_memory_math_says():
    assert cache(80, 64, 8, 128, 4096) == memory_math.kv_cache_bytes("llama-2-70b", 4096)


def totals(options, requests):
    return {name: once + requests * each for name, (once, each) in options.items()}


def test_cheapest():
    def pick(key, best=min):
        return lambda options, requests: best(options, key=lambda name: key(options[name], requests))

    each_gets_its_own(
        check.cheapest,
        right=[lambda options, requests: min(totals(options, requests), key=totals(options, requests).get)],
        wrong={
            "to begin with": pick(lambda option, requests: option[0]),
            "for each request": pick(lambda option, requests: option[1]),
            "dearest": lambda options, requests: max(totals(options, requests), key=totals(options, requests).get),
            "name of an option": lambda options, requests: min(totals(options, requests).values()),
            "dollars once +": pick(lambda option, requests: option[0] + option[1] * requests / 1000),
            "TypeError": lambda options: "LoRA",
        },
    )


def rounding(stated, computed):
    written, value = Decimal(stated), Decimal(str(computed))
    if written == value:
        return True
    exponent = written.normalize().as_tuple().exponent if "." not in stated else written.as_tuple().exponent
    return value.quantize(Decimal(1).scaleb(exponent), ROUND_HALF_UP) == written


def test_rounds_to():
    each_gets_its_own(
        check.rounds_to,
        right=[rounding],
        wrong={
            "rounds to 5261": lambda stated, computed: float(stated) == computed,
            "one decimal is stated, so": lambda stated, computed: float(stated) == round(computed),
            "near is not right": lambda stated, computed: abs(float(stated) / computed - 1) < 0.05,
            "another number with two": lambda stated, computed: abs(float(stated) / computed - 1) < 0.01,
            "need not be a digit": lambda stated, computed: float(stated) == round(computed, len(stated.partition(".")[2])),
            "none of the six": lambda stated, computed: abs(float(stated) - computed) <= (10 if stated.endswith("0") else 1) / 2
            if "." not in stated else rounding(stated, computed),
            "no 420": lambda stated, computed: rounding(stated, computed) or (stated == "420" and computed > 410),
            "the sign": lambda stated, computed: rounding(stated, math.copysign(computed, float(stated))),
            "True or False": lambda stated, computed: "yes",
        },
    )


@pytest.mark.parametrize(("stated", "computed", "right", "_"), check.STATEMENTS)
def test_the_statements_are_judged_as_the_ledger_does(stated, computed, right, _):
    assert (judge(Written(stated), computed) in ("exact", "rounded")) is right


def test_bytes_for_customers():
    each_gets_its_own(
        check.bytes_for_customers,
        right=[lambda n, model, task: (n * model, model + n * task)],
        wrong={
            "each other's place": lambda n, model, task: (model + n * task, n * model),
            "nothing without the model": lambda n, model, task: (n * model, n * task),
            "needed once": lambda n, model, task: (n * model, n * (model + task)),
            "one customer": lambda n, model, task: (n * model, model + task),
            "what is saved": lambda n, model, task: (n * model, n * (model - task)),
            "a full copy for each": lambda n, model, task: (model, model + n * task),
            "two numbers": lambda n, model, task: model + n * task,
            "one model of 14 GB and": lambda n, model, task: (n * model, 2 * model),
        },
    )
