"""What measuring adds: watched by hooks on saved tensors, LoRA layers take themselves for checkpointed and keep which adapters they had."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_lab.selection import stamp


def stamp_bytes(forward: Callable[[], object], active: tuple[str, ...] = ("default",)) -> int:
    """Of the stamps among what autograd keeps of `forward`, in which these adapters are active."""
    stamps = []

    def pack(tensor: Tensor) -> Tensor:
        is_one = tensor.ndim == 0 and tensor.dtype == torch.int64 and int(tensor) == stamp(active)
        stamps.extend([tensor] if is_one else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.nbytes for tensor in stamps)
