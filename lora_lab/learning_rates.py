"""LoRA+: B learns faster than A, for which an optimizer takes groups of parameters."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .errors import LoraLabError

FAST = (".lora_B.", ".lora_B_bias.")


def parameter_groups(model: nn.Module, learning_rate: float, ratio: float = 16.0, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """What trains, in groups for a torch optimizer: every B at ratio * learning_rate, all else at learning_rate.

    ratio: of the two rates, well above 1; the paper finds 16 to do well for its models. Without weight decay on vectors.
    Raises LoraLabError where nothing trains, and for rates that are not above 0.
    Source: Hayou et al. 2024 (arXiv:2402.12354), section 4.

    >>> from lora_lab import inject
    >>> groups = parameter_groups(inject(nn.Sequential(nn.Linear(4, 4))), 1e-4)
    >>> [(group["lr"], len(group["params"])) for group in groups]
    [(0.0001, 1), (0.0016, 1)]
    """
    for name, value in (("learning_rate", learning_rate), ("ratio", ratio)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise LoraLabError(f"{name}={value!r}: expected a number above 0")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((learns_fast(name), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise LoraLabError(f"nothing in this {type(model).__name__} trains: inject first, or load(..., trainable=True)")
    return [
        {"params": params, "lr": learning_rate * (ratio if fast else 1.0), "weight_decay": weight_decay if matrix else 0.0}
        for (fast, matrix), params in groups.items()
    ]


def learns_fast(name: str) -> bool:
    """Whether a parameter of this name is a B."""
    return any(part in f".{name}" for part in FAST)
