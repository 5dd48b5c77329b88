"""LoRA in nn.MultiheadAttention, which multiplies with its weights itself: ``out_proj`` is never called, and PyTorch has faster paths that read
the weights directly. So the update is added to the weight, W + delta, for the time of one call, and the call is PyTorch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import LoraLabError
from .layers import LoRA
from .selection import RowSelection


class LoRAMultihead(LoRA):
    """In front of nn.MultiheadAttention. lora_A[name] [r, width] and lora_B[name] [3 width, r] are those of the input projection."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As nn.MultiheadAttention.forward: (output, weights or None)."""
        rows = next((layer.lora_active for layer in self._layers() if isinstance(layer.lora_active, RowSelection)), None)
        if rows is not None:
            return self._row_by_row(rows, query, key, value, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            for layer in self._layers():
                stack.enter_context(_weight_with_update(layer))
            return super(LoRA, self).forward(query, key, value, *args, **kwargs)  # type: ignore[misc]

    def _layers(self) -> list[LoRA]:
        """The parts that have an adapter: the attention itself for its input projection, and out_proj."""
        out_proj = self._modules["out_proj"]  # type: ignore[attr-defined]
        return [self, *([out_proj] if isinstance(out_proj, LoRA) else [])]

    def _row_by_row(self, rows: RowSelection, *inputs: Any, key_padding_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The rows of each adapter in a call of their own, put back in order."""
        query, key, value, *args = inputs
        mask = kwargs.get("attn_mask")
        if args or query.ndim != 3 or (mask is not None and mask.ndim == 3):
            raise LoraLabError("per_sample in nn.MultiheadAttention: expected a batch, masks by name, and an attn_mask of two dimensions")
        groups, before = _groups(rows, query), [(layer, layer.lora_active) for layer in self._layers()]
        outputs, weights = [], []
        try:
            for name, places in groups.items():
                for layer, _ in before:
                    layer.lora_active = (name,) if name is not None and name in layer.lora_A else ()
                own = [tensor.index_select(rows.dim, places) for tensor in (query, key, value)]
                padding = None if key_padding_mask is None else key_padding_mask.index_select(0, places)
                output, weight = self.forward(own[0], own[1], own[2], key_padding_mask=padding, **kwargs)
                outputs.append(output)
                weights.append(weight)
        finally:
            for layer, active in before:
                layer.lora_active = active
        order = torch.cat(list(groups.values())).argsort()
        together = torch.cat(outputs, rows.dim).index_select(rows.dim, order)
        return together, None if weights[0] is None else torch.cat(weights).index_select(0, order)


def _groups(rows: RowSelection, x: Tensor) -> dict[str | None, Tensor]:
    """Name (or None) -> its rows."""
    found = rows.indices(x)
    taken = torch.cat([*found.values(), torch.empty(0, dtype=torch.long, device=x.device)])
    rest = torch.ones(x.shape[rows.dim], dtype=torch.bool, device=x.device).index_fill(0, taken, False).nonzero().flatten()
    groups: dict[str | None, Tensor] = {None: rest} if len(rest) else {}
    groups.update(found)
    return groups


@contextlib.contextmanager
def _weight_with_update(layer: Any) -> Iterator[None]:
    """``layer.weight`` is W + delta inside the block: an instance attribute goes before the parameter of that name."""
    name = layer.lora_kind.weight
    if not layer.lora_active:
        yield
        return
    weight = layer._parameters[name]
    updates = [layer.lora_variant[adapter].delta(layer, adapter) for adapter in layer.lora_active]
    layer.__dict__[name] = weight + sum(updates[1:], updates[0]).to(weight.dtype)
    try:
        yield
    finally:
        del layer.__dict__[name]
