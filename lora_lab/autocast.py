"""What is at work around a computation beside autograd: autocast, asked in a way that every device answers, and what rewrites computations."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where x is; None where it is off, or where there is none (the meta device)."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) else None


def outside_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """For a block in which nothing is cast where x is."""
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def is_eager() -> bool:
    """Whether operations run one by one under autograd alone: compiling, tracing, torch.func and forward-mode derivatives want the plain ones."""
    rewritten = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    return not rewritten and forward_ad._current_level < 0


def saved_tensor_hooks() -> Any:
    """The innermost hooks on what autograd saves (checkpointing's, offloading's, somebody's); None where there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)
