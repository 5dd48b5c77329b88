"""The exercises of notebook 08, choices and claims."""

from __future__ import annotations

from typing import Any

from . import NotYet, check, equal, expect, number, refuse, result

# 1 and 2: what is cheaper, for so many requests and so many customers -------------------------------------------------------------


@check
def cheapest(answer: Any) -> str:
    """answer(options, requests) -> the name of the option that costs least. options: name -> (dollars once, dollars for each request)."""
    options = {"few-shot": (0.0, 0.004), "LoRA": (40.0, 0.001), "our own model": (4e6, 0.0002)}
    found = {requests: result(answer, dict(options), requests) for requests in (100, 100_000, 10**11)}
    if not all(isinstance(name, str) and name in options for name in found.values()):
        raise NotYet(f"expected the name of an option, one of {', '.join(options)}; for 100 requests it says {found[100]!r:.60}")
    expect(found != dict.fromkeys(found, "few-shot"), "that is the cheapest to begin with: each request costs, too")
    expect(found != dict.fromkeys(found, "our own model"), "that is the cheapest for each request: what is paid once counts, too")
    expect(found[10**11] != "few-shot" or found[100] != "our own model", "that is the dearest: take the least of the totals")
    for requests, right in ((100, "few-shot"), (100_000, "LoRA"), (10**11, "our own model")):
        expect(found[requests] == right, f"for {requests:,} requests it is {right}, not {found[requests]}: dollars once + requests × each")
    return "there is no best option, only a best one for so many requests."


@check
def bytes_for_customers(answer: Any) -> str:
    """answer(customers, model_bytes, task_bytes) -> (bytes with a full copy for each, bytes with one model and a file for each)."""
    value = result(answer, 1000, 14e9, 40e6)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise NotYet("expected two numbers: return with_copies, with_files")
    copies, files = number(value[0], "the first number"), number(value[1], "the second number")
    expect(not equal(copies, 5.4e10) or not equal(files, 1.4e13), "the two are in each other's place: return with_copies, with_files")
    expect(equal(copies, 1.4e13), f"a full copy for each of 1,000 customers: 1,000 × 14 GB, and here it says {copies / 1e9:,.4g} GB")
    refuse(files, {
        4e10: "the files are right, but they are nothing without the model: one copy of it is needed",
        1000 * 14.04e9: "the model is needed once: all customers share it",
        14.04e9: "that is one customer: each of them has a file",
        1.4e13 - 4e10: "that is what is saved: what is asked is what is needed",
    })  # fmt: skip
    expect(equal(files, 5.4e10), f"one model of 14 GB and 1,000 files of 40 MB, and here it says {files / 1e9:,.4g} GB")
    return "54 GB instead of 14,000: that is why one frozen model and a small file for each task is how many customers are served."


# 3: what examples in the prompt take ----------------------------------------------------------------------------------------------


@check
def cache_bytes(answer: Any) -> str:
    """answer(layers, heads, kv_heads, head_size, tokens) -> bytes of keys and values in 16 bit."""
    count = number(result(answer, 80, 64, 8, 128, 4096), "your bytes for Llama-2-70B and 4,096 tokens")
    right = 2 * 80 * 8 * 128 * 4096 * 2
    refuse(count, {
        right / 2: "half of it is missing: keys *and* values, of 2 bytes each number",
        right / 4: "that counts keys alone, and numbers instead of bytes: twice for keys and values, and 2 bytes each",
        right * 8: "that takes 64 heads: queries are not kept, and the 8 heads of keys and values serve eight heads of queries each",
        right * 4: "that is four times too much: 2 × layers × kv_heads × head_size × tokens numbers, of 2 bytes each",
        right / 80: "that is one layer: each of 80 keeps its own",
        right / 4096: "that is one token: each of them is kept",
        right / 128: "each head keeps a vector of head_size numbers for each token, not one number",
        right / 8: "that is one head: there are kv_heads of them",
        right * 2: "that is twice too much: in 16 bit a number is 2 bytes, not 4",
        right * 16: "that takes 64 heads and 4 bytes: keys and values have 8 heads, and 2 bytes each number in 16 bit",
        2 * 80 * 8 * 128 * 4096**2 * 2: "the cache grows with the tokens, not with their square: what grows so is the work of attention",
    })  # fmt: skip
    expect(count == right, f"for 80 layers, 64 heads, 8 of keys and values, of 128, and 4,096 tokens it says {count:,.0f}: "
                           "2 × layers × kv_heads × head_size × tokens numbers, of 2 bytes")  # fmt: skip
    other = number(result(answer, 30, 9, 3, 64, 10), "your bytes for SmolLM2 and 10 tokens")
    expect(other == 230_400, f"right for Llama-2-70B, but for SmolLM2 (30, 9, 3, 64) and 10 tokens it says {other:,.0f}: use the arguments")
    return "1.25 GiB for one request that fills the window of Llama-2-70B, 320 KiB a token. With 64 heads of keys it would be eight times that."


# 4: the ledger's rule -------------------------------------------------------------------------------------------------------------

STATEMENTS = (  # stated, computed, does it round to that?, what is wrong where it is judged otherwise
    ("5261", 5260.94, True, "5260.94 rounds to 5261"),
    ("85.9", 85.9375, True, "one decimal is stated, so the number is rounded to one decimal"),
    ("64", 65.5, False, "65.5 rounds to 66 (or 65): near is not right. This is the slide's 8096 × 8096"),
    ("4.50", 4.51, False, "two decimals are stated, 4.50, and 4.51 is another number with two decimals"),
    ("4.5", 4.51, True, "one decimal is stated, and 4.51 rounds to 4.5"),
    ("420", 415.3, True, "a 0 at the end of a whole number need not be a digit: 420 may be rounded to tens, and 415.3 rounds to that"),
    ("4000000", 3_538_944.0, True, "none of the six 0 need be a digit: 4000000 may be rounded to millions, and 3.5 million rounds to that"),
    ("420", 413.9, False, "413.9 rounds to 410 in tens: no 420"),
    ("-2", 1.9, False, "the sign is another one"),
    ("20480", 20480.0, True, "equal is right, too"),
)


@check
def rounds_to(answer: Any) -> str:
    """answer(stated, computed) -> whether the number rounds to the digits that are written."""
    for stated, computed, right, words in STATEMENTS:
        said = result(answer, stated, computed)
        expect(type(said).__name__ in ("bool", "bool_"), f"expected True or False, and rounds_to({stated!r}, {computed}) is {said!r:.40}")
        if bool(said) != right:
            raise NotYet(f"rounds_to({stated!r}, {computed}) should be {right}: {words}")
    return "the digits that are written say how exact a claim is. memory_math.claims() judges by the same rule, from exact to wrong."
