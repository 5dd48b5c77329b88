"""``W + left @ right`` of a weight or a whole stack of weights, where the update has to be in the weight: sums as exact as a merge's.

    W [n, rows, columns]     left [n, rows, r]     right [n, r, columns]

The sum is taken in float32 (or wider) and rounded once. Of 16-bit weights a block at a time is widened, never the stack. Whatever multiplies with
the sum keeps it for backward, a second copy of every adapted weight; `forgotten` keeps W and the factors, and backward forms the sum again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ELEMENTS_AT_ONCE = {"cpu": 2**18}  # of a 16-bit stack, in float32: what a processor's cache holds
ELEMENTS_ELSEWHERE = 2**24
Blocks = Iterator[tuple[slice, Iterator[slice]]]


def add_product(W: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum in W's dtype, whatever autocast says. left and right may be of another; both get their gradients in their own.

    >>> add_product(torch.ones(1, 2, 2), torch.ones(1, 2, 1), torch.full((1, 1, 2), 3.0)).tolist()
    [[[4.0, 4.0], [4.0, 4.0]]]
    """
    wide = torch.promote_types(torch.promote_types(W.dtype, left.dtype), torch.float32)
    if W.dtype != wide and not torch.compiler.is_compiling():
        result: Tensor = _RoundedSum.apply(W, left, right)
        return result
    with _without_autocast(W):
        return torch.baddbmm(W.to(wide), left.to(wide), right.to(wide)).to(W.dtype)


def _without_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def _blocks(stack: Tensor) -> Blocks:
    """Whole matrices, several where they are small; a large one in blocks of rows."""
    n, rows, columns = stack.shape
    limit = ELEMENTS_AT_ONCE.get(stack.device.type, ELEMENTS_ELSEWHERE)
    together, step = max(1, limit // (rows * columns)), max(1, limit // columns)
    for start in range(0, n, together):
        yield slice(start, start + together), (slice(row, row + step) for row in range(0, rows, step))


class _RoundedSum(torch.autograd.Function):
    """W + left @ right, a block at a time in a wider dtype than W's. It keeps left and right, and not W."""

    @staticmethod
    def forward(W: Tensor, left: Tensor, right: Tensor) -> Tensor:
        total, wide = torch.empty_like(W), torch.promote_types(left.dtype, torch.float32)
        for some, blocks in _blocks(W):
            for rows in blocks:
                total[some, rows] = W[some, rows].to(wide, copy=True).baddbmm_(left[some, rows].to(wide), right[some].to(wide))
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (left, right), grad = ctx.saved_tensors, grads[0]
        wide, of_left, of_right = torch.promote_types(left.dtype, torch.float32), [], []
        with _without_autocast(grad):
            for some, blocks in _blocks(grad):
                lefts, rights = [], []
                for rows in blocks:
                    block = grad[some, rows].to(wide)
                    lefts.append(block @ right[some].to(wide).mT)
                    rights.append(left[some, rows].to(wide).mT @ block)
                of_left.append(torch.cat(lefts, 1))
                of_right.append(sum(rights[1:], rights[0]))
        return grad, torch.cat(of_left).to(left.dtype), torch.cat(of_right).to(right.dtype)


class _Stack(Tensor):
    """A stack whose matrices, taken one at a time, get their gradients in one piece. Each indexing by itself would fill a whole stack with zeros."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # to all else it is a Tensor, and gives Tensors
    matrices: tuple[Tensor, ...]

    def __getitem__(self, index: Any) -> Tensor:
        number = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point())
        if not number or isinstance(index, bool) or getattr(index, "dtype", None) == torch.bool:
            return super().__getitem__(index)
        return self.matrices[int(index)]


def read_one_by_one(total: Tensor) -> Tensor:
    """The same tensor, for a loop over experts."""
    if total.ndim != 3 or not total.requires_grad or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return total
    stack = total.as_subclass(_Stack)
    stack.matrices = total.unbind(0)
    return stack


# Backward without a kept sum --------------------------------------------------------------------------------------------------


class WeightSum(NamedTuple):
    """A sum, and what it was made of: total = W + left @ right, all [n, ., .]."""

    total: Tensor
    W: Tensor
    left: Tensor
    right: Tensor

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in (self.W, self.left, self.right))

    def without_total(self) -> WeightSum:
        """For keeping: no sum, no history."""
        return WeightSum(self.total.new_empty(0), self.W.detach(), self.left.detach(), self.right.detach())


@dataclass(frozen=True)
class _Again:
    """A view of a sum that was saved for backward: which of its elements, and how to form them again."""

    of: WeightSum
    versions: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self) -> Tensor:
        """Only the matrices of the stack that the view looks at are formed."""
        if self.versions != self.of.versions:
            raise RuntimeError("a weight or its adapter has been modified by an inplace operation since the forward pass that is differentiated")
        each = self.of.W.shape[1] * self.of.W.shape[2]
        end = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)) + 1
        some = slice(self.offset // each, -(-end // each))
        with torch.no_grad():
            total = add_product(self.of.W[some], self.of.left[some], self.of.right[some])
        return total.as_strided(self.size, self.stride, self.offset - some.start * each)


def forgotten(sums: Sequence[WeightSum]) -> contextlib.AbstractContextManager[Any]:
    """Inside the block nothing that is saved for backward keeps one of these sums, or a view of one.

    Without effect where nothing is saved, and where somebody else decides what is: under compile, checkpointing, torch.func.
    """
    wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if not wanted or not sums or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return contextlib.nullcontext()
    kept = {_storage(made.total): (made.total.dtype, made.without_total()) for made in sums if made.total.is_contiguous()}
    kept.pop(None, None)

    def pack(tensor: Tensor) -> Any:
        dtype, of = kept.get(_storage(tensor), (None, None))
        if of is None or tensor.dtype != dtype or not tensor.numel():
            return tensor, tensor._version
        return _Again(of, of.versions, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, _Again):
            return saved()
        tensor, version = saved
        if tensor._version != version:  # autograd checks this itself where nobody stands between
            raise RuntimeError("one of the variables needed for gradient computation has been modified by an inplace operation")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _storage(tensor: Tensor) -> int | None:
    """Where a tensor's numbers are; None where it has none of its own (meta, sparse, subclasses)."""
    plain = type(tensor) in (Tensor, nn.Parameter, _Stack) and tensor.layout == torch.strided
    return (tensor.untyped_storage().data_ptr() or None) if plain else None
