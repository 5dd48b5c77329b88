"""The exercises of notebook 04, prompt tuning by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import check, equal, expect, number, refuse, result, tensor

# 1 and 5: counting ----------------------------------------------------------------------------------------------------------------


@check
def prompt_numbers(answer: Any) -> str:
    """answer(virtual_tokens, width) -> how many numbers a soft prompt trains."""
    count = number(result(answer, 5, 4096), "your count for 5 virtual tokens of width 4,096")
    refuse(count, {
        4096: "4,096 is one virtual token: there are 5",
        5: "that counts vectors: each has as many numbers as the model is wide",
        5 + 4096: "a matrix of 5 rows and 4,096 columns has 5 times 4,096 numbers, not 5 more",
        5 * 32_128: "that is a row as long as the vocabulary: a virtual token is a vector among the embeddings, as wide as the model",
        4 * 5 * 4096: "81,920 are its bytes in float32: count the numbers",
        24 * 5 * 4096: "that is once for each of T5-XXL's 24 layers: a soft prompt stands before the first one only (a prefix is what goes into all)",
    })  # fmt: skip
    expect(count == 20_480, f"for 5 virtual tokens of width 4,096 it says {count:,.0f}: the prompt is a matrix [virtual tokens, width]")
    other = number(result(answer, 20, 576), "your count for 20 virtual tokens of width 576")
    expect(other == 11_520, f"right for 5 × 4,096, but for 20 virtual tokens of width 576 it says {other:,.0f}: use the arguments")
    return "virtual tokens × width, and nothing else: 20,480 for T5-XXL. Neither the layers nor the vocabulary have a part in it."


@check
def prefix_numbers(answer: Any) -> str:
    """answer(virtual_tokens, layers, kv_heads, head_dim) -> how many numbers a prefix trains."""
    count = number(result(answer, 20, 30, 3, 64), "your count for 20 virtual tokens in SmolLM2")
    refuse(count, {
        20 * 30 * 3 * 64: "115,200 are the keys alone (or the values): attention needs both",
        2 * 30 * 3 * 64: "11,520 is one virtual token's share (and, by chance, all of a soft prompt of 20): there are 20, in every layer",
        20 * 2 * 3 * 64: "7,680 is one layer's share: there are 30 layers, each with keys and values of its own",
        20 * 2 * 30 * 64: "that is one head in each layer: there are 3 of keys and values",
        20 * 2 * 30 * 3: "the width of a head is missing: each key and each value has head_dim numbers",
        20 * 2 * 30 * 576: "691,200 is as wide as the nine heads of queries: only three heads of keys and values are kept",
    })  # fmt: skip
    expect(count == 230_400, f"for 20 virtual tokens, 30 layers, 3 heads of 64 it says {count:,.0f}: a key and a value each token, layer and head")
    other = number(result(answer, 5, 12, 12, 64), "your count for 5 virtual tokens, 12 layers, 12 heads of 64")
    expect(other == 92_160, f"right for SmolLM2, but for 5 virtual tokens, 12 layers, 12 heads of 64 it says {other:,.0f}: use the arguments")
    return "P × 2 × L × N × D: a key and a value for each virtual token, layer and head. For SmolLM2 that is 20 times the soft prompt of that length."


# 2: what the model is called with -------------------------------------------------------------------------------------------------


@check
def insert(answer: Any) -> str:
    """answer(prompt, embeds, mask, labels) -> (embeds, mask, labels) with the prompt in front."""
    prompt, embeds = torch.randn(3, 5, requires_grad=True), torch.randn(2, 4, 5)
    mask, labels = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([[-100, 7, 8, 9], [-100, -100, 6, -100]])
    found = result(answer, prompt, embeds, mask, labels)
    expect(isinstance(found, (tuple, list)) and len(found) == 3, "expected three tensors: return embeds, mask, labels")
    whole, seen, learned = found
    expect(isinstance(whole, Tensor), "the first thing returned is no tensor: return embeds, mask, labels, in this order")
    _check_rows(whole, prompt, embeds)
    _check_mask(seen, mask)
    _check_labels(learned, labels)
    expect(whole.requires_grad, "the numbers are right, but the prompt is cut off from the gradient (.data or .detach()): it could never learn")
    return "one cat for each: vectors in front, ones in the mask, -100 in the labels. The model itself is not touched."


def _check_rows(whole: Tensor, prompt: Tensor, embeds: Tensor) -> None:
    front = prompt.detach().expand(2, -1, -1)
    expect(not equal(whole, torch.cat([embeds, front], 1)), "the prompt stands behind the text: there the text, which is read first, never sees it")
    expect(tuple(whole.shape) != tuple(embeds.shape), "embeds is as long as it was: the prompt is cut off again, or added to the text instead of put "
                                                      "before it")  # fmt: skip
    whole = tensor(whole, (2, 7, 5), "embeds, for 3 virtual tokens before 2 rows of 4,")
    expect(equal(whole[:, 3:], embeds), "the text's own vectors are changed: they stay, behind the prompt")
    expect(equal(whole[:, :3], front), "the first three vectors of each row are not the prompt's three: the same prompt for each row, in its order")


def _check_mask(seen: Any, mask: Tensor) -> None:
    as_it_was = isinstance(seen, Tensor) and tuple(seen.shape) == (2, 4)
    expect(not as_it_was, "the mask is as long as the text: it needs a number for each virtual token, too")
    seen = tensor(seen, (2, 7), "the mask").long()
    expect(bool(seen[:, :3].any()), "the mask has zeros for the virtual tokens: then no word looks at them, and the prompt does nothing")
    expect(bool((seen[:, :3] == 1).all()) and torch.equal(seen[:, 3:], mask), "the mask should be 1 for each virtual token, and then the text's own")


def _check_labels(learned: Any, labels: Tensor) -> None:
    expect(not (isinstance(learned, Tensor) and tuple(learned.shape) == (2, 4)), "the labels are as long as the text: virtual tokens need one each, "
                                                                                 "one that is not learned")  # fmt: skip
    learned = tensor(learned, (2, 7), "the labels").long()
    front = learned[:, :3]
    expect(not bool((front == 0).all()), "the virtual tokens have the label 0, and 0 is a word of the vocabulary: -100 is what the loss leaves out")
    expect(not bool((front == 1).all()), "the virtual tokens have the label 1, and 1 is a word of the vocabulary: -100 is what the loss leaves out")
    expect(bool((front == -100).all()), "the virtual tokens' labels should be -100 each: no word stands there that could be right")
    expect(torch.equal(learned[:, 3:], labels), "the text's own labels are changed: they stay, behind those of the prompt")


# 3: a rate is a distance ----------------------------------------------------------------------------------------------------------


DEVIATION = "that is the standard deviation, which leaves out how far the mean is from zero: the root of the mean of the squares was asked for"


@check
def learning_rate(answer: Any) -> str:
    """answer(embedding, share) -> share × the root mean square of the embedding's numbers."""
    embedding, share = torch.randn(50, 8) * 0.3 + 0.2, 0.1
    rate = number(result(answer, embedding, share), "your rate")
    rms = float(embedding.square().mean().sqrt())
    refuse(rate, {
        share: "that is the share itself, for whatever model: multiply it with the size of a word's numbers",
        rms: "that is the whole size of a number, in each step: the share is missing",
        share * float(embedding.square().mean()): "the root is missing: the mean of the squares is no size yet",
        share * float(embedding.square().sum().sqrt()): "that is the length of the whole table: mean, not sum, under the root",
        share * float(embedding.norm(dim=1).mean()): "that is the length of a word's vector; a step is told for each number: average over all",
        share * float(embedding.abs().mean()): "that is the mean of the absolute values: near, but the root of the mean of the squares was asked for",
        share * float(embedding.mean()): "that is the mean: positive and negative numbers cancel",
        share * float(embedding.std()): DEVIATION,
        share * float(embedding.std(correction=0)): DEVIATION,
        rms / share: "the share divides: a smaller share should give a smaller step",
        share / rms: "the size divides: larger words need larger steps",
    }, relative=1e-5)  # fmt: skip
    expect(equal(rate, share * rms), f"it says {rate:.4g} for words of size {rms:.4g} and a share of 0.1: the share times the size")
    return "a rate in units of a word. The same share suits models whose words differ in size a hundredfold; the same rate does not."


# 4: positions under padding -------------------------------------------------------------------------------------------------------


@check
def positions(answer: Any) -> str:
    """answer(mask) -> the position of each token, [B, T], counted from the row's first real one."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    found = tensor(result(answer, mask), (2 + 1, 5), "the positions of a mask [3, 5]")
    expect(not found.is_floating_point() and found.dtype != torch.bool, f"positions are whole numbers, these are {found.dtype}")
    columns = torch.arange(5).expand(3, -1)
    expect(not torch.equal(found, columns), "those are the columns: a row with padding in front would begin at 2, as if two words stood before it")
    expect(not torch.equal(found, mask), "that is the mask itself")
    real = mask.bool()
    expect(not torch.equal(found[real], mask.cumsum(1)[real]), "the first word has position 1: counting begins at 0")
    expect(not torch.equal(found[real], (mask.sum(1, keepdim=True) - mask.cumsum(1))[real]), "counted from the right: the first word is position 0")
    expect(torch.equal(found[real], (mask.cumsum(1) - 1)[real]), "the real tokens of each row should be 0, 1, 2, ..., wherever the row begins")
    expect(bool((found >= 0).all()), "right for the words, but padding has negative positions, and a table of positions has no row -1: clamp at 0")
    return "the number of real tokens before: padding takes no place, so a row reads the same alone and in a batch."


# 6: a vote ------------------------------------------------------------------------------------------------------------------------

VOTES = (  # four members for each row: log-probabilities come of these by softmax
    ((9.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 0.0)),  # three say 1, one is very sure of 0
    ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 3.0, 0.0)),  # two against two, and the surer ones say 1
    ((0.0, 0.0, 2.0), (0.0, 0.0, 2.0), (5.0, 0.0, 0.0), (0.0, 5.0, 0.0)),  # the most, though not more than half, say 2
    ((0.0, 2.0, 0.0), (4.0, 0.0, 0.0), (0.0, 2.0, 0.0), (4.0, 0.0, 0.0)),  # two against two, and the surer ones say 0
)


@check
def vote(answer: Any) -> str:
    """answer(scores) -> the class of each row by majority; scores: log-probabilities [members, rows, classes]."""
    scores = torch.tensor(VOTES).transpose(0, 1).log_softmax(-1)
    own = scores.argmax(-1)  # [4 members, 4 rows]
    found = result(answer, scores)
    found = torch.tensor(found) if isinstance(found, list) and len(found) == 4 and all(isinstance(each, int) for each in found) else found
    shape = tuple(found.shape) if isinstance(found, Tensor) else None
    expect(shape != (4, 3), "those are the votes of each class: return the class with the most")
    expect(shape != (4, 4), "those are the members' own answers: count them, row by row")
    found = tensor(found, (4,), "the answer for 4 rows")
    expect(not equal(found, scores.mean(0).argmax(-1)), "that is the mean of the members' scores: one that is sure outweighs three. Count heads")
    expect(not equal(found, own.mode(0).values), "right where there is a majority, but of equally many votes you take the lowest class: let the mean "
                                                 "of the scores decide those")  # fmt: skip
    expect(not equal(found, own.mode(1).values), "counted over the wrong dimension: the members are the first one")
    counts = F.one_hot(own, 3).sum(0)
    expect(not equal(found, counts.argmin(-1)), "that is the class with the fewest votes")
    expect(equal(found, torch.tensor([1, 1, 2, 0])), f"for rows that members answer {own.T.tolist()} it says {found.tolist()}: the class with the "
                                                     "most votes; of equally many, the one with the higher mean score")  # fmt: skip
    return "the majority, and of a draw the surer half. All members answer in one batch, on one frozen model."


# 7: reading ---------------------------------------------------------------------------------------------------------------------


@check
def nearest(answer: Any) -> str:
    """answer(row, embedding) -> the id of the word whose direction is nearest."""
    row = torch.tensor([4.0, 2.0, 0.0])
    embedding = torch.tensor([[3.5, 0.5, 1.5], [0.2, 0.1, 0.02], [40.0, -4.0, 30.0], [-4.0, -2.0, 0.0], [0.0, 0.0, 1.0]])
    cosines = F.cosine_similarity(row[None], embedding)
    found = number(result(answer, row, embedding), "the word's id")
    refuse(found, {
        float(cosines.max()): "that is the cosine itself: return the number of the row that has it (argmax)",
        int((embedding - row).norm(dim=1).argmin()): "that is the nearest by distance: prompts grow longer than words, and then the longest words "
                                                     "are the nearest, whatever they point at",
        int((embedding @ row).argmax()): "that is the largest product, which long words win: divide by the lengths",
        int(cosines.argmin()): "that points the opposite way: the largest cosine is the nearest",
        int(cosines.abs().argmin()): "that one is at right angles: the largest cosine is the nearest",
    })  # fmt: skip
    expect(found == 1, f"it says {found:.0f}: the row of the table with the largest cosine to the prompt's")
    return "by direction, not by distance: a trained vector may be many times as long as any word."


