"""The exercises of notebook 05, sentiment analysis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_lab.training.evaluation import auc as area

from . import check, equal, expect, number, refuse, result, tensor

# 1: how sure ----------------------------------------------------------------------------------------------------------------------


@check
def standard_error(answer: Any) -> str:
    """answer(accuracy, rows) -> the standard error of an accuracy that was measured on so many rows."""
    error = number(result(answer, 0.8, 400), "your standard error of 0.8 on 400 rows")
    refuse(error, {
        0.16: "that is the variance of one answer: divide by the rows, and take the root",
        0.4: "that is the deviation of one answer: the mean of 400 is surer, by the root of 400",
        0.16 / 400: "the root is missing: that is the variance of the mean",
        math.sqrt(0.8 / 400): "under the root stands p (1 - p), not p: at p = 1 nothing varies any more",
        0.4 / 400: "the rows belong under the root: 400 rows are 20 times as sure as one, not 400 times",
        1 / math.sqrt(400): "that is 1 / sqrt(n), without p (1 - p): the error of a coin is half of that, of a sure thing none",
        1.96 * 0.02: "that is 1.96 standard errors, half of a 95 % interval: one was asked for",
        2.0: "that is in per cent: the accuracy came as a share, so give the error as one",
    })  # fmt: skip
    expect(equal(error, 0.02) or equal(error, 0.4 / 399**0.5), f"for 0.8 on 400 rows it says {error:.4g}: the root of p (1 - p) / n")
    other = number(result(answer, 0.5, 100), "your standard error of 0.5 on 100 rows")
    expect(equal(other, 0.05) or equal(other, 0.5 / 99**0.5), f"right for 0.8 on 400 rows, but for 0.5 on 100 it says {other:.4g}: use the arguments")
    return "0.02: of two methods that are measured on 400 rows each, 80 % and 82 % cannot be told apart. Two standard errors are what to look for."


# 2: ranking ----------------------------------------------------------------------------------------------------------------------


@check
def auc(answer: Any) -> str:
    """answer(margins, labels) -> the share of pairs of a positive and a negative text in which the positive one has the larger margin."""
    margins = torch.tensor([-1.0, -3.0, -2.0, -3.0, 0.5, -4.0, -2.0])
    labels = torch.tensor([1, 1, 1, 0, 1, 0, 0])  # of equal margins the positive one stands first: ranks that do not share differ from halves
    found = number(result(answer, margins, labels), "your AUC")
    ones, zeros = margins[labels == 1][:, None], margins[labels == 0][None]
    above, same, pairs = float((ones > zeros).sum()), float((ones == zeros).sum()), ones.numel() * zeros.numel()
    refuse(found, {
        float(((margins > 0).long() == labels).double().mean()): "that is the accuracy, the line drawn at 0: AUC draws no line, it compares texts",
        above / pairs: "pairs with equal margins count half: you leave them out of what is won",
        (above + same) / pairs: "pairs with equal margins count half: you count them as won",
        1 - (above + same / 2) / pairs: "that is how often the negative one is above: the other way round",
        (above + same / 2) / len(labels) ** 2: "divided by all pairs: only pairs of a positive and a negative text are compared",
        (above + same / 2) / (len(labels) * (len(labels) - 1) / 2): "divided by all pairs: only pairs of a positive and a negative text are compared",
        above + same / 2: "that is how many pairs are won: divide by how many there are",
    })  # fmt: skip
    expect(equal(found, area(margins, labels.tolist())), f"it says {found:.4f}; of {pairs} pairs {above:.0f} are won and {same:.0f} equal")
    return "no line is drawn, so a model that leans towards one word, and knows the difference, still scores high."


# 3: calibration ------------------------------------------------------------------------------------------------------------------


@check
def calibrated(answer: Any) -> str:
    """answer(scores, blank) -> scores without what an empty text gets. scores: log P [rows, 2].  blank: log P [2]."""
    scores, blank = torch.log(torch.rand(6, 2) * 0.2 + 0.01), torch.log(torch.tensor([0.02, 0.15]))
    found = result(answer, scores.clone(), blank.clone())
    answers = isinstance(found, Tensor) and tuple(found.shape) == (6,)
    expect(not answers, "that is an answer for each row: return the scores of both words, [rows, 2]")
    found = tensor(found, (6, 2), "the scores of 6 texts").double()
    margin, wanted = found[:, 1] - found[:, 0], (scores - blank)[:, 1] - (scores - blank)[:, 0]
    lean = float(blank[1] - blank[0])
    expect(not equal(margin, scores[:, 1] - scores[:, 0]), "the difference of the words is what it was: subtract from each its own blank score")
    expect(not equal(margin, scores[:, 1] - scores[:, 0] + lean), "added: that makes the lean twice as large. Subtract")
    own = (scores - scores.mean(0))[:, 1] - (scores - scores.mean(0))[:, 0]
    expect(not equal(margin, own), "that subtracts the mean of these rows: it works where half of them are positive, and a row's answer then depends "
                                   "on the others. The blank text is what to subtract")  # fmt: skip
    ratio = (scores / blank)[:, 1] - (scores / blank)[:, 0]
    expect(not equal(margin, ratio), "the logarithms are divided: dividing probabilities is subtracting logarithms")
    odds = found.clamp(min=1e-12).log()
    expect(equal(margin, wanted) or equal(odds[:, 1] - odds[:, 0], wanted), "the numbers are others than scores - blank")
    return "log P(word | text) - log P(word | nothing): how much the text speaks for the word, beyond what the words before it do by themselves."


# 4: what is learned ----------------------------------------------------------------------------------------------------------------


@check
def verbalized(answer: Any) -> str:
    """answer(prompt_ids, answer_ids) -> (input_ids, labels) of a row whose answer alone is learned."""
    prompt, word = [11, 12, 13, 14], [7, 8]
    found = result(answer, list(prompt), list(word))
    expect(isinstance(found, (tuple, list)) and len(found) == 2, "expected two lists: return input_ids, labels")
    ids, labels = (_plain(each) for each in found)
    expect(ids == [*prompt, *word], f"input_ids should be prompt and answer, {[*prompt, *word]}: the model reads both; this is {ids!r:.60}")
    expect(labels != ids, "all of the text is learned: then the few words of the answer drown in those of the review. -100 for the prompt")
    expect(labels != [*prompt, -100, -100], "the review is learned and the answer is not: the other way round")
    expect(labels != [-100] * 6, "nothing is learned: every label is -100")
    expect(labels != word, "the labels are the answer alone: they need one entry for each of the input_ids")
    expect(labels != [0, 0, 0, 0, *word], "0 is a word of the vocabulary: -100 is what the loss leaves out")
    expect(labels != [-100, -100, -100, *word, -100], "the labels are moved by one already: the model does that itself (what stands at a place is "
                                                      "compared with the prediction before it)")  # fmt: skip
    expect(labels == [-100] * 4 + word, f"the labels should be -100 for each token of the prompt and then the answer's own; these are {labels!r:.60}")
    return "classification as writing: the loss is -log P(the right word | the review), and nothing else."


def _plain(values: Any) -> Any:
    return values.tolist() if isinstance(values, Tensor) else list(values) if isinstance(values, (list, tuple)) else values


# 5: when tuning pays -----------------------------------------------------------------------------------------------------------------


@check
def break_even(answer: Any) -> str:
    """answer(tuning, few_shot, tuned) -> requests after which tuning has paid off, all in seconds."""
    requests = number(result(answer, 100.0, 0.5, 0.2), "your number of requests")
    refuse(requests, {
        200: "100 / 0.5 would be right if a tuned model answered for nothing: what is saved is 0.5 - 0.2 a request",
        500: "100 / 0.2 are requests that the tuned model answers in the time of the tuning: what is saved is 0.5 - 0.2 a request",
        333: "after 333 requests 99.9 seconds are saved, not yet 100: round up",
        100 / 0.3: "nearly: a third of a request is none, round up",
        0.3 / 100: "upside down: the tuning divided by what a request saves",
        -333: "the difference is the wrong way round: few_shot - tuned is what a request saves",
        100 / 0.7: "the two times are added: what is saved is their difference",
    }, relative=1e-5)  # fmt: skip
    expect(requests == 334, f"it says {requests:.6g} for a tuning of 100 s, 0.5 s a request with examples, 0.2 s without: 100 / (0.5 - 0.2)")
    other = number(result(answer, 60.0, 1.0, 0.5), "your number of requests for 60 s, 1 s and 0.5 s")
    expect(other != 121, "121 for 60 s, 1 s and 0.5 s: 120 divides evenly there, and rounding up adds nothing then (math.ceil, not + 1)")
    expect(other == 120, f"right for the first, but for 60 s, 1 s and 0.5 s it says {other:.6g}: use the arguments")
    return "every request with examples reads them again; a tuning is paid once. After so many requests it was the cheaper way."
