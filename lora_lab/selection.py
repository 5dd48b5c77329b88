"""Which adapters a forward pass runs with: the same for every row of the batch, or another for each.

The selection belongs to the forward pass. Under gradient checkpointing the recompute has to see the selection of its forward: our own models
restore it, and where a foreign model runs again under another one, backward fails instead of giving wrong gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import saved_tensor_hooks
from .errors import LoraLabError
from .rematerialize import recipe_of, rematerializable


class RowSelection(tuple[str, ...]):
    """A selection that differs by row. As a tuple it is the adapters that occur; rows: one name (or None) per row; dim: where rows lie."""

    rows: tuple[str | None, ...]
    dim: int

    def __new__(cls, rows: Sequence[str | None], dim: int = 0) -> RowSelection:
        selection = super().__new__(cls, tuple(dict.fromkeys(name for name in rows if name is not None)))
        selection.rows, selection.dim = tuple(rows), dim
        return selection

    def __reduce__(self) -> Any:
        return RowSelection, (self.rows, self.dim)

    def indices(self, x: Tensor) -> dict[str, Tensor]:
        """Adapter -> the rows of x that are its own."""
        times = self.times(x)
        found: dict[str, list[int]] = {name: [] for name in self}
        for row, name in enumerate(self.rows):
            if name is not None:
                found[name] += range(row * times, (row + 1) * times)
        return {name: torch.tensor(rows, device=x.device) for name, rows in found.items()}

    def groups(self, x: Tensor) -> dict[str | None, Tensor]:
        """The same, and None -> the rows that have no adapter, where there are any."""
        found = self.indices(x)
        taken = torch.cat([*found.values(), torch.empty(0, dtype=torch.long, device=x.device)])
        rest = torch.ones(x.shape[self.dim], dtype=torch.bool, device=x.device).index_fill(0, taken, False).nonzero().flatten()
        groups: dict[str | None, Tensor] = {None: rest} if len(rest) else {}
        groups.update(found)
        return groups

    def times(self, x: Tensor) -> int:
        """Rows of x to a name: where x has k times as many rows as there are names, each name stands for k rows in succession."""
        size = x.shape[self.dim] if x.ndim > self.dim else 0
        if size == 0 or size % len(self.rows):
            where = f"a layer got an input of shape {list(x.shape)}: {size} rows in dimension {self.dim}"
            raise LoraLabError(f"per_sample with {len(self.rows)} names, but {where}")
        return size // len(self.rows)


def remember_selection(x: Tensor, active: tuple[str, ...]) -> Tensor:
    """Under (non-reentrant) checkpointing, make backward fail where the recompute ran with other adapters than the forward.

    Otherwise ``with disabled(model): loss = model(x).sum()`` followed by ``loss.backward()`` gives wrong gradients without a
    word. lora_lab's own models restore the selection for the recompute; a foreign model cannot, so it gets an error.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.requires_grad or saved_tensor_hooks() is None:
        return x
    checked = _SelectionCheck.apply(x, torch.tensor(stamp(active)), active)
    return checked if (recipe := recipe_of(x)) is None else rematerializable(checked, recipe.make, *recipe.sources)


def stamp(active: tuple[str, ...]) -> int:
    """A number that tells selections apart."""
    return hash((*active, getattr(active, "rows", None)))


class _SelectionCheck(torch.autograd.Function):
    """Identity. What it saves as a tensor is recomputed by checkpointing, what it keeps on ctx is not: backward compares."""

    @staticmethod
    def forward(x: Tensor, stamp: Tensor, active: tuple[str, ...]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mark, ctx.active = inputs
        ctx.save_for_backward(mark)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if int(ctx.saved_tensors[0]) != stamp(ctx.active):
            raise LoraLabError(
                f"gradient checkpointing recomputed a layer with other adapters than its forward pass had ({list(ctx.active)}): "
                "call backward() inside the same disabled(...), use(...) or per_sample(...) as the forward pass"
            )
        return grads[0], None, None
