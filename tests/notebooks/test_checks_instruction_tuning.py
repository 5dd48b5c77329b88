"""The checks of notebook 07: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import random
import statistics

import torch
from check_tools import each_gets_its_own

from course.checks import instruction_tuning as check
from lora_lab import data
from lora_lab.data.templates import ALPACA

PAIRED = ", paired with an input that provides further context"


def prompt(paired=PAIRED, heading="### Input:\n", end="\n", always=False, gap="\n\n", ask="### Response:"):
    """Alpaca's prompt, with one thing or another done wrongly."""

    def alpaca_prompt(instruction, given):
        block = f"{heading}{given}{gap}" if given or always else ""
        first = f"Below is an instruction that describes a task{paired if given else ''}. Write a response that appropriately completes the request."
        return f"{first}\n\n### Instruction:\n{instruction}{gap}{block}{ask}{end}"

    return alpaca_prompt


def test_alpaca_prompt():
    each_gets_its_own(
        check.alpaca_prompt,
        right=[prompt(), prompt(end=""),
               lambda q, i: ALPACA.format(instruction=q, input=f"### Input:\n{i}\n\n" if i else "", paired=PAIRED if i else "")],
        wrong={
            "its heading stays away": prompt(always=True),
            "the first line says so": prompt(paired=""),
            "does not speak of one": lambda q, i: prompt()(q, i or "x").replace("### Input:\nx\n\n", ""),
            "a heading of its own": prompt(heading=""),
            "blanks or line breaks are not": prompt(gap="\n"),
            "one ends in a line break and one does not": lambda q, i: prompt(end="\n" if i else "")(q, i),
            "the f before the string": lambda q, i: "Below is an instruction.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
            "behind which the model writes is missing": prompt(ask="### Answer:"),
            "the instruction is not in the text": lambda q, i: prompt()("Name a colour.", i),
            "the input is not in the text": lambda q, i: prompt()(q, "Grass." if i else ""),
            "behind it the model writes": lambda q, i: "### Response:\n" + prompt(ask="", end="")(q, i),
            "letter by letter": lambda q, i: prompt()(q, i).replace("appropriately ", ""),
            "return the text": lambda q, i: [prompt()(q, i)],
        },
    )


def test_labelled():
    def ids(p, a, e):
        return [*p, *a, e]

    each_gets_its_own(
        check.labelled,
        right=[lambda p, a, e: (ids(p, a, e), [-100] * len(p) + [*a, e]),
               lambda p, a, e: [torch.tensor(ids(p, a, e)), torch.tensor([-100] * len(p) + [*a, e])]],
        wrong={
            "everything is learned": lambda p, a, e: (ids(p, a, e), ids(p, a, e)),
            "the end token is missing": lambda p, a, e: (p + a, [-100] * len(p) + a),
            "never learns to stop": lambda p, a, e: (ids(p, a, e), [-100] * len(p) + [*a, -100]),
            "no label for the end token": lambda p, a, e: (ids(p, a, e), [-100] * len(p) + a),
            "0 is a token like any other": lambda p, a, e: (ids(p, a, e), [0] * len(p) + [*a, e]),
            "-1 is no label": lambda p, a, e: (ids(p, a, e), [-1] * len(p) + [*a, e]),
            "shifted already": lambda p, a, e: (ids(p, a, e), [-100] * (len(p) - 1) + [*a, e, -100]),
            "one fewer than the input_ids": lambda p, a, e: (ids(p, a, e), [-100] * (len(p) - 1) + [*a, e]),
            "and the end with it": lambda p, a, e: (ids(p, a, e), p + [-100] * len(a) + [e]),
            "the prompt is learned and the answer is not: the other way round": lambda p, a, e: (ids(p, a, e), p + [-100] * (len(a) + 1)),
            "nothing is learned": lambda p, a, e: (ids(p, a, e), [-100] * 8),
            "each other's place": lambda p, a, e: ([-100] * len(p) + [*a, e], ids(p, a, e)),
            "return two lists": lambda p, a, e: ids(p, a, e),
        },
    )  # fmt: skip


def changes(before, after):
    return [new - old for old, new in zip(before, after, strict=True)]


def gaining(mean=statistics.mean, error=lambda d: statistics.stdev(d) / len(d) ** 0.5):
    return lambda before, after: (mean(changes(before, after)), error(changes(before, after)))


def test_gain():
    each_gets_its_own(
        check.gain,
        right=[gaining(), gaining(error=lambda d: statistics.pstdev(d) / len(d) ** 0.5)],
        wrong={
            "after minus before": gaining(mean=lambda d: -statistics.mean(d)),
            "how many questions more": gaining(mean=sum),
            "in per cent": gaining(mean=lambda d: 100 * statistics.mean(d)),
            "questions that changed": gaining(mean=lambda d: statistics.mean(map(abs, d))),
            "the gained ones alone": gaining(mean=lambda d: sum(each > 0 for each in d) / len(d)),
            "the share after: take the share before": lambda b, a: (sum(a) / len(a), 0.13),
            "standard deviation of one question": gaining(error=statistics.stdev),
            "not by 20": gaining(error=lambda d: statistics.stdev(d) / len(d)),
            "take its root": gaining(error=lambda d: statistics.variance(d) / len(d)),
            "two separate exams": lambda b, a: (0.15, sum(sum(x) / 20 * (1 - sum(x) / 20) / 20 for x in (b, a)) ** 0.5),
            "the error of the share after": lambda b, a: (0.15, (0.75 * 0.25 / 20) ** 0.5),
            "return two numbers": lambda b, a: sum(a) / len(a) - sum(b) / len(b),
        },
    )


def moved(order):
    """Answers moved by order(size, generator), the place of each row's giver."""

    def shuffled(rows, seed):
        givers = order(len(rows), random.Random(seed))
        return [{**row, "output": rows[giver]["output"]} for row, giver in zip(rows, givers, strict=True)]

    return shuffled


def derangement(size, generator):
    order = generator.sample(range(size), size)
    giver = dict(zip(order, order[1:] + order[:1], strict=True))
    return [giver[place] for place in range(size)]


def in_place(rows, seed):
    for row, output in zip(rows, [row["output"] for row in moved(derangement)(rows, seed)], strict=True):
        row["output"] = output
    return rows


def whole_rows(rows, seed):
    return random.Random(seed).sample(rows, len(rows))


def shuffles_the_list(rows, seed):
    random.Random(seed).shuffle(rows)


def draws(rows, seed):
    generator = random.Random(seed)
    return [{**row, "output": generator.choice([other["output"] for other in rows if other is not row])} for row in rows]


def test_shuffled():
    each_gets_its_own(
        check.shuffled,
        right=[moved(derangement), lambda rows, seed: moved(lambda size, _: [(place + 1 + seed) % size for place in range(size)])(rows, seed)],
        wrong={
            "kept their own answer": moved(lambda size, generator: generator.sample(range(size), size)),
            "the old rows were changed": in_place,
            "whole rows were shuffled": whole_rows,
            "returns nothing yet": shuffles_the_list,
            "an answer is there twice": draws,
            "each row still has its own": lambda rows, seed: [dict(row) for row in rows],
            "the inputs have moved": lambda rows, seed: [{**row, "input": ""} for row in moved(derangement)(rows, seed)],
            "the instructions have moved": lambda rows, seed: moved(derangement)(whole_rows(rows, seed), seed),
            "the same seed gives another": lambda rows, seed: moved(lambda size, _: derangement(size, random.Random()))(rows, seed),
            "every seed gives the same": lambda rows, seed: moved(derangement)(rows, 3),
            "none of the rows'": lambda rows, seed: [{**row, "output": row["output"][::-1]} for row in rows],
            "each keeps its place": lambda rows, seed: moved(derangement)(rows[:-1], seed),
        },
    )


def shares(power=lambda n, t, k: min(n, k) ** (1 / t), total=sum):
    def task_shares(sizes, temperature, maximum):
        powers = {task: power(size, temperature, maximum) for task, size in sizes.items()}
        return {task: value / total(powers.values()) for task, value in powers.items()}

    return task_shares


def of_the_lab(sizes, temperature, maximum):
    rows = {task: [{"input_ids": [1, 2]}] * size for task, size in sizes.items()}
    return data.mixture(rows, temperature=temperature, maximum=maximum).weights


def test_task_shares():
    each_gets_its_own(
        check.task_shares,
        right=[shares(), of_the_lab],
        wrong={
            "those are the powers": shares(total=lambda values: 1),
            "the power of T": shares(lambda n, t, k: min(n, k) ** t),
            "the limit does nothing": shares(lambda n, t, k: n ** (1 / t)),
            "all are equal": shares(lambda n, t, k: 1),
            "dividing by it does not, either": shares(lambda n, t, k: min(n, k) / t),
            "sum to 100": lambda sizes, t, k: {task: 100 * share for task, share in shares()(sizes, t, k).items()},
            "divide by the sum of the powers": lambda sizes, t, k: {task: min(n, k) ** (1 / t) / sum(sizes.values()) for task, n in sizes.items()},
            "right for temperature 2": lambda sizes, t, k: shares()(sizes, 2, 400),
            "a dict with the same tasks": lambda sizes, t, k: list(shares()(sizes, t, k).values()),
        },
    )
