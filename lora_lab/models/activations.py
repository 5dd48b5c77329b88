"""The activations that configs name, by transformers' names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LoraLabError, did_you_mean
from ..rematerialize import rematerializable

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)`` (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


_tanh_gelu = functools.partial(F.gelu, approximate="tanh")  # GPT-2's; the names differ in how they were once written down
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu, "gelu_python": F.gelu, "gelu_new": _tanh_gelu, "gelu_fast": _tanh_gelu, "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": quick_gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "mish": F.mish, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip


KEEP_THEIR_INPUT = (F.gelu, _tanh_gelu, F.silu, F.mish)  # for backward; the others keep their result


def activated(activation: Activation, x: Tensor) -> Tensor:
    """``activation(x)``, which need not be kept as the input of what comes next where x is kept in any case."""
    return rematerializable(activation(x), activation, x) if activation in KEEP_THEIR_INPUT else activation(x)


def check_activation(name: Any, field: str) -> str:
    """The name of an activation. Raises LoraLabError, naming the config's field, for one that is not here.

    >>> check_activation("relu", "hidden_act")
    'relu'
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise LoraLabError(f"{field}={name!r} in config.json: expected one of {', '.join(ACTIVATIONS)}{did_you_mean(name, ACTIVATIONS)}")
    return name
