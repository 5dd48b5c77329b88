"""The checks of notebook 05: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import math

import torch
from check_tools import each_gets_its_own, said

from course.checks import sentiment_analysis as check
from lora_lab.training.evaluation import auc


def test_standard_error():
    each_gets_its_own(
        check.standard_error,
        right=[lambda p, n: math.sqrt(p * (1 - p) / n), lambda p, n: math.sqrt(p * (1 - p) / (n - 1))],
        wrong={
            "the variance of one answer": lambda p, n: p * (1 - p),
            "the deviation of one answer": lambda p, n: math.sqrt(p * (1 - p)),
            "the root is missing": lambda p, n: p * (1 - p) / n,
            "not p:": lambda p, n: math.sqrt(p / n),
            "belong under the root": lambda p, n: math.sqrt(p * (1 - p)) / n,
            "without p (1 - p)": lambda p, n: 1 / math.sqrt(n),
            "95 % interval": lambda p, n: 1.96 * math.sqrt(p * (1 - p) / n),
            "in per cent": lambda p, n: 100 * math.sqrt(p * (1 - p) / n),
            "use the arguments": lambda p, n: 0.02,
            "it says 0.1": lambda p, n: 0.1,
            "ValueError": lambda p, n: math.sqrt(p * (p - 1) / n),
        },
    )


def pairs(win=1.0, tie=0.5, over=None, swap=False):
    def share(margins, labels):
        ones, zeros = margins[labels == 1][:, None], margins[labels == 0][None]
        ones, zeros = (zeros.T, ones.T) if swap else (ones, zeros)
        won = (win * (ones > zeros) + tie * (ones == zeros)).sum()
        return won / (over(len(labels)) if over else ones.numel() * zeros.numel())

    return share


def by_ranks(margins, labels):
    """The sum of the positive ones' ranks, where equal margins do not share theirs."""
    ranks = torch.empty(len(margins))
    ranks[margins.argsort(stable=True)] = torch.arange(1.0, len(margins) + 1)
    ones = int(labels.sum())
    return (ranks[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones))


def test_auc():
    each_gets_its_own(
        check.auc,
        right=[pairs(), lambda margins, labels: auc(margins, labels.tolist())],
        wrong={
            "is the accuracy": lambda margins, labels: ((margins > 0).long() == labels).float().mean(),
            "you leave them out": pairs(tie=0.0),
            "count them as won": pairs(tie=1.0),
            "the other way round": pairs(swap=True),
            "only pairs of a positive": pairs(over=lambda n: n * n),
            "divide by how many": pairs(over=lambda n: 1),
            "it says 0.5000": lambda margins, labels: 0.5,
            "the shape": lambda margins, labels: torch.zeros(0).reshape(3, 4),
        },
    )


def test_ranks_that_equal_margins_do_not_share_are_no_auc():
    """Ties must not cancel: of each the positive one stands first."""
    assert "you leave them out" in said(check.auc, by_ranks)


def test_calibrated():
    each_gets_its_own(
        check.calibrated,
        right=[lambda s, b: s - b, lambda s, b: (s - b).softmax(-1), lambda s, b: s.exp() / b.exp(), lambda s, b: s.double() - b.double()],
        wrong={
            "is what it was": lambda s, b: s,
            "twice as large": lambda s, b: s + b,
            "mean of these rows": lambda s, b: s - s.mean(0),
            "logarithms are divided": lambda s, b: s / b,
            "an answer for each row": lambda s, b: (s - b).argmax(-1),
            "others than scores - blank": lambda s, b: s - 2 * b,
            "RuntimeError": lambda s, b: s - b[:, None].T.repeat(5, 1),
        },
    )


def test_verbalized():
    each_gets_its_own(
        check.verbalized,
        right=[lambda p, a: (p + a, [-100] * len(p) + a), lambda p, a: (torch.tensor(p + a), torch.tensor([-100] * len(p) + a))],
        wrong={
            "the model reads both": lambda p, a: (p, a),
            "all of the text is learned": lambda p, a: (p + a, p + a),
            "the other way round": lambda p, a: (p + a, p + [-100] * len(a)),
            "nothing is learned": lambda p, a: (p + a, [-100] * len(p + a)),
            "the labels are the answer alone": lambda p, a: (p + a, a),
            "0 is a word": lambda p, a: (p + a, [0] * len(p) + a),
            "moved by one already": lambda p, a: (p + a, [-100] * (len(p) - 1) + a + [-100]),
            "these are": lambda p, a: (p + a, [-1] * len(p) + a),
            "two lists": lambda p, a: p + a,
        },
    )


def test_break_even():
    each_gets_its_own(
        check.break_even,
        right=[lambda t, few, tuned: math.ceil(t / (few - tuned))],
        wrong={
            "for nothing": lambda t, few, tuned: t / few,
            "in the time of the tuning": lambda t, few, tuned: t / tuned,
            "not yet 100": lambda t, few, tuned: int(t / (few - tuned)),
            "a third of a request": lambda t, few, tuned: t / (few - tuned),
            "upside down": lambda t, few, tuned: (few - tuned) / t,
            "the wrong way round": lambda t, few, tuned: math.ceil(t / (tuned - few)),
            "are added": lambda t, few, tuned: t / (few + tuned),
            "math.ceil, not + 1": lambda t, few, tuned: int(t / (few - tuned)) + 1,
            "use the arguments": lambda t, few, tuned: 334,
            "ZeroDivisionError": lambda t, few, tuned: t / (few - few),
        },
    )
