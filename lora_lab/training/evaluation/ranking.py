"""How well scores put the positive rows above the negative ones, wherever the line between them is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import LoraLabError


def auc(scores: Sequence[float] | Any, labels: Sequence[int]) -> float:
    """The area under the ROC curve: how often a row of class 1 scores higher than one of class 0, ties counting half (Hanley & McNeil 1982).

    A bias towards one answer, which accuracy suffers from, does not change it. scores: [n], of class 1 against class 0.
    Raises LoraLabError for lists of different lengths, and where one of the classes has no row.

    >>> auc([2.0, 3.0, 1.0, 2.0], [0, 1, 0, 1])
    0.875
    """
    values, positive = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels) == 1
    if values.ndim != 1 or len(values) != len(positive) or not 0 < int(positive.sum()) < len(positive):
        raise LoraLabError(f"{len(values)} scores and {len(positive)} labels, {int(positive.sum())} of them 1: expected as many, and both classes")
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1).double() / 2)[place]  # of equal ones the mean
    ones, zeros = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))
