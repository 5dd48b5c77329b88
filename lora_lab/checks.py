"""Numbers from callers and files, checked before anything is made of them; those of an adapter, each with its error."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .errors import LoraLabError, did_you_mean
from .initialization import INITIALISATIONS

LARGEST = 2**31 - 1  # of a size
LARGEST_SCALING = torch.finfo(torch.float32).max
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that can be computed in: 8-bit ones are for storing


def is_number(value: Any) -> bool:
    """A finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_size(value: Any) -> bool:
    """A whole number from 1 to LARGEST."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def are_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers that can be computed in, none of them NaN or infinity."""
    return tensor.dtype in FLOATS and bool(torch.isfinite(tensor).all())


def check_rank(rank: Any, name: str = "rank") -> int:
    if not is_size(rank):
        raise LoraLabError(f"{name}={rank!r}: expected a whole number of at least 1, at most {LARGEST:,} (8 is a good start)")
    return rank


def check_alpha(alpha: Any, name: str = "alpha") -> None:
    if alpha is not None and not (is_number(alpha) and abs(alpha) <= LARGEST_SCALING):
        raise LoraLabError(f"{name}={alpha!r}: expected a finite number that float32 can hold (alpha = rank gives a scaling of 1)")


def check_dtype(dtype: Any) -> None:
    """Of an adapter: None, or one that can be trained in."""
    if dtype is not None and dtype not in FLOATS:
        raise LoraLabError(f"dtype={dtype!r}: expected None, torch.float32, torch.float64, torch.bfloat16 or torch.float16")


def check_numbers(rank: Any, alpha: Any, dropout: Any, init: Any) -> None:
    """Raise LoraLabError for the first of an adapter's numbers that makes no sense."""
    check_rank(rank)
    check_alpha(alpha)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise LoraLabError(f"dropout={dropout!r}: expected 0 <= dropout < 1")
    if not isinstance(init, str) or init not in INITIALISATIONS:
        raise LoraLabError(f"init={init!r}: expected one of {', '.join(INITIALISATIONS)}{did_you_mean(init, INITIALISATIONS)}")
