"""LoRA layers that read the same input, q, k and v or gate and up, in one go: a third fewer passes over it and over its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .adapted_linear import adapted_linears, is_simple
from .autocast import is_eager
from .layers import LoRALinear
from .selection import remember_selection


def together(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """What each of the layers makes of x, in a step of training; None where one of them has to be called by itself."""
    if len(layers) < 2 or not torch.is_grad_enabled() or not is_eager():
        return None
    ours = [layer for layer in layers if type(layer) is LoRALinear and is_called_plainly(layer)]
    pairs = [pair for layer in ours if (pair := layer.lora_only_pair()) is not None and layer.lora_active == ours[0].lora_active]
    if len(pairs) < len(layers) or not all(is_simple(x, layer.weight, layer.bias, A) for layer, (A, _, _) in zip(ours, pairs, strict=True)):
        return None
    x = remember_selection(x, ours[0].lora_active)
    parts = [(layer.weight, layer.bias, layer._remembered(A, x), B) for layer, (A, B, _) in zip(ours, pairs, strict=True)]
    return adapted_linears(x, parts, [scaling for _, _, scaling in pairs])


def is_called_plainly(layer: nn.Module) -> bool:
    """Whether calling the layer is calling the forward of its class: no hook, no forward put on the instance."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks or _has_any_global_hook()
    return not (hooks or "forward" in vars(layer))
