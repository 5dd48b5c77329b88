"""LoRA in nn.MultiheadAttention, which multiplies with its weights itself: ``out_proj`` is never called, and PyTorch has faster paths that read
the weights directly. So W + delta stands in for the weight for the time of one call, and the call is PyTorch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraLabError
from .layers import LoRA
from .parameters.weight_override import replaceable, standing_in
from .selection import RowSelection, remember_selection


class LoRAOutputProjection(LoRA):
    """In front of the class of its out_proj, which is never called."""

    weight = replaceable("weight")


class LoRAMultihead(LoRA):
    """In front of nn.MultiheadAttention. lora_A[name] [r, width] and lora_B[name] [3 width, r] are those of the input projection."""

    in_proj_weight = replaceable("in_proj_weight")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As nn.MultiheadAttention.forward: (output, weights or None)."""
        for layer in self._layers():
            query = remember_selection(query, layer.lora_active)
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
        groups, before = rows.groups(query), [(layer, layer.lora_active) for layer in self._layers()]
        outputs, weights = [], []
        try:
            for name, places in groups.items():
                for layer, _ in before:
                    layer.lora_active = (name,) if name is not None and name in layer.lora_variant else ()
                own = [tensor.index_select(rows.dim, places) for tensor in (query, key, value)]
                padding = None if key_padding_mask is None else key_padding_mask.index_select(0, places)
                output, weight = self.forward(own[0], own[1], own[2], key_padding_mask=padding, **kwargs)
                outputs.append(output)
                weights.append(weight)
        finally:
            for layer, active in before:
                layer.lora_active = active
        order = torch.cat(list(groups.values())).argsort()
        together = remember_selection(torch.cat(outputs, rows.dim), rows).index_select(rows.dim, order)
        return together, None if weights[0] is None else torch.cat(weights).index_select(0, order)


@contextlib.contextmanager
def _weight_with_update(layer: Any) -> Iterator[None]:
    """The layer's weight is W + delta inside the block."""
    name = layer.lora_kind.weight
    if not layer.lora_active:
        yield
        return
    weight = layer._parameters[name]
    updates = [layer.lora_variant[adapter].delta(layer, adapter) for adapter in layer.lora_active]
    with standing_in(layer, {name: weight + remember_selection(sum(updates[1:], updates[0]), layer.lora_active).to(weight.dtype)}):
        yield


def mixin_of(base: type) -> type[LoRA]:
    """What goes in front of the class of an attention, or of its output projection."""
    return LoRAMultihead if issubclass(base, nn.MultiheadAttention) else LoRAOutputProjection
