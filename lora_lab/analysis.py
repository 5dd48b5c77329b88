"""Counting: what trains, what does not, and where it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .parameters.layer import parameter_path
from .quantization import quantized_layers
from .targets import lora_layers
from .wrapping import on_base


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, a tied one counted once. base + adapter == total."""

    trainable: int
    adapter: int
    base: int

    @property
    def total(self) -> int:
        return self.base + self.adapter

    @property
    def trainable_percent(self) -> float:
        return 100.0 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({self.trainable_percent:.2f} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable, adapter and base parameters of a model; a quantised weight counts as what its codes stand for.

    >>> print(count_parameters(nn.Linear(512, 64, bias=False)))
    32,768 of 32,768 parameters are trainable (100.00 %)
    """
    adapter = {id(p) for layer in lora_layers(model).values() for name in layer.lora_variant for p in layer.lora_parameters(name).values()}
    codes = {id(layer.weight_codes): layer.matrix_shape for layer in quantized_layers(model).values()}
    in_codes = sum(rows * columns for rows, columns in codes.values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_adapters = sum(p.numel() for p in model.parameters() if id(p) in adapter)
    return ParameterCount(trainable, in_adapters, sum(p.numel() for p in model.parameters()) - in_adapters + in_codes)


@on_base
def summary(model: nn.Module) -> str:
    """A table of the adapted layers: name, how many, shapes of A and B, adapters, parameters; then the totals."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for path, layer in lora_layers(model).items():
        for name in layer.lora_variant:
            tensors = layer.lora_parameters(name)
            for shapes, last in _shapes(tensors):
                state = ("active" if name in layer.lora_active else "off") + (", trains" if last.requires_grad else ", frozen")
                key = parameter_path(path).rpartition(".")[2], name, *shapes, f"{layer.lora_scaling[name]:g}", state
                groups.setdefault(key, []).append(sum(p.numel() for p in tensors.values()))
    rows: list[tuple[str, ...]] = [("layer", "adapter", "A [r, in]", "B [out, r]", "scaling", "state", "layers", "parameters")]
    rows += [(*key, str(len(counts)), f"{sum(counts):,}") for key, counts in groups.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*(lines if groups else ["no LoRA layers"]), str(count_parameters(model))])


def _shapes(tensors: dict[str, nn.Parameter]) -> list[tuple[tuple[str, str], nn.Parameter]]:
    """What the table says of a layer's pair or of its token rows, and the tensor that tells whether it trains; a tied head has nothing."""
    if "lora_tokens" in tensors:
        return [((f"rows {list(tensors['lora_tokens'].shape)}", ""), tensors["lora_tokens"])]
    return [((f"A {list(tensors['lora_A'].shape)}", f"B {list(tensors['lora_B'].shape)}"), tensors["lora_B"])] if "lora_B" in tensors else []
