"""Tensors that fully_shard divided among processes, and their pieces; of any other tensor the piece is the whole.

Such a tensor is a DTensor: its shape and its sums are the whole's, what this process stores is some of its rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..wrapping import gathered, is_divided


def piece(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_divided(tensor) else tensor


def for_file(tensor: Tensor, first: bool) -> Tensor:
    """All of a tensor for process 0 to write, and nothing for the others, who have to ask as well where it is divided."""
    if not is_divided(tensor):
        return tensor
    everything = gathered(tensor.detach())
    return everything.cpu() if first else everything.new_empty(0)


def divided_like(like: Any, values: Tensor) -> Tensor:
    """values, which every process has whole, divided as `like` is, on its device."""
    values = values.to(like.device)
    if not is_divided(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def joined_like(like: Any, own: Tensor) -> Tensor:
    """The tensor whose pieces are each process's `own`, divided as `like` is, on its device."""
    own = own.to(like.device)
    if not is_divided(like):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def some_numbers(tensor: Tensor) -> list[float]:
    """About 64 of a tensor's numbers, the same ones every time: enough to tell two models apart, without reading either."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 64)].tolist()
