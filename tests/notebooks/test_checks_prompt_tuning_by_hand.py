"""The checks of notebook 04: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from check_tools import each_gets_its_own

from course.checks import prompt_tuning_by_hand as check


def test_prompt_numbers():
    each_gets_its_own(
        check.prompt_numbers,
        right=[lambda p, h: p * h, lambda p, h: torch.zeros(p, h).numel()],
        wrong={
            "one virtual token": lambda p, h: h,
            "counts vectors": lambda p, h: p,
            "5 times 4,096": lambda p, h: p + h,
            "as long as the vocabulary": lambda p, h: p * 32_128,
            "bytes in float32": lambda p, h: 4 * p * h,
            "24 layers": lambda p, h: 24 * p * h,
            "use the arguments": lambda p, h: 20_480,
            "it says 40,960": lambda p, h: 2 * p * h,
            "NameError": lambda p, h: p * width,  # noqa: F821
        },
    )


def test_prefix_numbers():
    each_gets_its_own(
        check.prefix_numbers,
        right=[lambda p, n, k, d: p * 2 * n * k * d],
        wrong={
            "the keys alone": lambda p, n, k, d: p * n * k * d,
            "one virtual token's share": lambda p, n, k, d: 2 * n * k * d,
            "one layer's share": lambda p, n, k, d: p * 2 * k * d,
            "one head in each layer": lambda p, n, k, d: p * 2 * n * d,
            "width of a head": lambda p, n, k, d: p * 2 * n * k,
            "nine heads of queries": lambda p, n, k, d: p * 2 * n * 9 * 64,
            "use the arguments": lambda p, n, k, d: 230_400,
            "it says 921,600": lambda p, n, k, d: 4 * p * 2 * n * k * d,
        },
    )


def inserting(front=-100, seen=1, behind=False, detach=False, short=()):
    def insert(prompt, embeds, mask, labels):
        rows = (prompt.detach() if detach else prompt).expand(len(embeds), -1, -1)
        extra = (len(embeds), len(prompt))
        whole = torch.cat([embeds, rows] if behind else [rows, embeds], 1)
        mask = mask if "mask" in short else torch.cat([mask.new_full(extra, seen), mask], 1)
        labels = labels if "labels" in short else torch.cat([labels.new_full(extra, front), labels], 1)
        return whole[:, len(prompt) :] if "embeds" in short else whole, mask, labels

    return insert


def test_insert():
    each_gets_its_own(
        check.insert,
        right=[inserting(), lambda *given: [*inserting()(*given)]],
        wrong={
            "stands behind the text": inserting(behind=True),
            "embeds is as long as it was": inserting(short="embeds"),
            "the mask is as long as the text": inserting(short="mask"),
            "zeros for the virtual tokens": inserting(seen=0),
            "1 for each virtual token": inserting(seen=5),
            "the labels are as long as the text": inserting(short="labels"),
            "the label 0": inserting(front=0),
            "the label 1": inserting(front=1),
            "-100 each": inserting(front=-1),
            "cut off from the gradient": inserting(detach=True),
            "are not the prompt's three": lambda prompt, *rest: inserting()(prompt.flip(0), *rest),
            "the text's own labels are changed": lambda p, e, m, labels: inserting()(p, e, m, labels.clamp(min=0)),
            "the text's own vectors are changed": lambda p, e, *rest: inserting()(p, 2 * e, *rest),
            "three tensors": lambda *given: inserting()(*given)[0],
            "RuntimeError": lambda p, e, m, labels: (torch.cat([p, e], 1), m, labels),
        },
    )


def rms(embedding):
    return embedding.square().mean().sqrt()


def test_learning_rate():
    each_gets_its_own(
        check.learning_rate,
        right=[lambda e, s: s * rms(e), lambda e, s: s * e.norm().item() / e.numel() ** 0.5],
        wrong={
            "for whatever model": lambda e, s: s,
            "the share is missing": lambda e, s: rms(e),
            "the root is missing": lambda e, s: s * e.square().mean(),
            "length of the whole table": lambda e, s: s * e.norm(),
            "length of a word's vector": lambda e, s: s * e.norm(dim=1).mean(),
            "absolute values": lambda e, s: s * e.abs().mean(),
            "cancel": lambda e, s: s * e.mean(),
            "standard deviation": lambda e, s: s * e.std(),
            "the share divides": lambda e, s: rms(e) / s,
            "the size divides": lambda e, s: s / rms(e),
            "it says 0.3": lambda e, s: 0.3,
        },
    )


def test_positions():
    each_gets_its_own(
        check.positions,
        right=[lambda mask: (mask.cumsum(1) - 1).clamp(min=0), lambda mask: mask.cumsum(1) - mask],
        wrong={
            "those are the columns": lambda mask: torch.arange(mask.shape[1]).expand(len(mask), -1),
            "the mask itself": lambda mask: mask,
            "begins at 0": lambda mask: mask.cumsum(1),
            "from the right": lambda mask: mask.sum(1, keepdim=True) - mask.cumsum(1),
            "negative positions": lambda mask: mask.cumsum(1) - 1,
            "0, 1, 2": lambda mask: mask.cumsum(0),
            "whole numbers": lambda mask: (mask.cumsum(1) - 1).clamp(min=0).float(),
            "the shape [5]": lambda mask: torch.arange(mask.shape[1]),
        },
    )


def majority(scores):
    votes = F.one_hot(scores.argmax(-1), scores.shape[-1]).sum(0)
    return scores.mean(0).masked_fill(votes < votes.amax(-1, keepdim=True), -torch.inf).argmax(-1)


def test_vote():
    each_gets_its_own(
        check.vote,
        right=[majority, lambda scores: majority(scores).tolist()],
        wrong={
            "the mean of the members' scores": lambda scores: scores.mean(0).argmax(-1),
            "you take the lowest class": lambda scores: scores.argmax(-1).mode(0).values,
            "the wrong dimension": lambda scores: scores.argmax(-1).mode(1).values,
            "the votes of each class": lambda scores: F.one_hot(scores.argmax(-1), 3).sum(0),
            "own answers": lambda scores: scores.argmax(-1),
            "the fewest": lambda scores: F.one_hot(scores.argmax(-1), 3).sum(0).argmin(-1),
            "it says [0, 0, 0, 0]": lambda scores: torch.zeros(4, dtype=torch.long),
        },
    )


def test_nearest():
    each_gets_its_own(
        check.nearest,
        right=[lambda row, e: F.cosine_similarity(row[None], e).argmax(), lambda row, e: int((F.normalize(e, dim=1) @ row).argmax())],
        wrong={
            "the cosine itself": lambda row, e: F.cosine_similarity(row[None], e).max(),
            "by distance": lambda row, e: (e - row).norm(dim=1).argmin(),
            "long words win": lambda row, e: (e @ row).argmax(),
            "opposite way": lambda row, e: F.cosine_similarity(row[None], e).argmin(),
            "right angles": lambda row, e: F.cosine_similarity(row[None], e).abs().argmin(),
            "it says 7": lambda row, e: 7,
        },
    )
