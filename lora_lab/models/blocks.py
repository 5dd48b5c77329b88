"""What the model families share beside attention: RMSNorm, the gated MLP, rotary positions.

RMSNorm and SwiGLU are autograd Functions that keep only their inputs: plain PyTorch keeps three to four times as much, and in a
transformer that, not LoRA, is most of the memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import few_rows
from ..autocast import autocast_dtype
from ..functions import applied
from ..layers import LoRALinear
from ..rematerialize import rematerializable
from ..together import is_called_plainly, together

IGNORE = -100  # the label of a position that is not learned


# Linear layers of a few rows ------------------------------------------------------------------------------------------------


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` of a linear layer, for the few rows of a step of generation as few_rows.py makes it."""
    return project_all(x, layer)[0]


def project_all(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of the layers makes of x. Whether x is few rows is asked once, and adapters of one dtype share their cast of it."""
    if not few_rows.are_few(x):
        return together(x, layers) or [layer(x) for layer in layers]
    casts = {x.dtype: x}
    return [_of_few(layer, x, casts) for layer in layers]


def _of_few(layer: nn.Module, x: Tensor, casts: dict[torch.dtype, Tensor]) -> Tensor:
    """casts: x by dtype, as far as it was needed."""
    if not (isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, LoRALinear) and is_called_plainly(layer) and few_rows.suits(layer.weight, x)):
        return layer(x)
    if not isinstance(layer, LoRALinear):
        return few_rows.product(x, layer.weight, layer.bias)
    if (pair := layer.lora_only_pair()) is None:
        return layer(x)
    A, B, scaling = pair
    if A.dtype not in casts:
        casts[A.dtype] = x.to(A.dtype)
    return few_rows.adapted(x, layer.weight, layer.bias, A, B, scaling, casts[A.dtype])


def is_plain(layer: nn.Module) -> bool:
    """True where `layer(x)` is x @ weight.T + bias and nothing else: no subclass, no hook, no forward put on the instance."""
    return type(layer) is nn.Linear and is_called_plainly(layer)


# Norm -----------------------------------------------------------------------------------------------------------------------


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x), 1 / rms(x)), in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse_rms, inverse_rms


class RMSNormFunction(torch.autograd.Function):
    """``weight * x / sqrt(mean(x**2) + eps)``; keeps x and weight (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) * F.rms_norm(x, weight.shape, eps=eps).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        normalised, inverse_rms = _normalised(x, ctx.eps)
        grad = grad.to(normalised.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            g = grad * weight.to(grad.dtype)
            grad_x = (inverse_rms * (g - normalised * (g * normalised).mean(-1, keepdim=True))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalised).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, None


class RMSNorm(nn.Module):
    """x: [..., H] -> [..., H]. Under autocast the result is 16 bit, so that q, k and v share one cast instead of making three."""

    def __init__(self, hidden_size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size, **factory)), eps

    def forward(self, x: Tensor) -> Tensor:
        return applied(RMSNormFunction, x, self.weight, self.eps, compute_dtype(x))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of x run in: autocast's where it is on."""
    return (x.dtype != torch.float64 and autocast_dtype(x)) or x.dtype


# Gated MLP ------------------------------------------------------------------------------------------------------------------


class _GateFunction(torch.autograd.Function):
    """``activation(gate) * up``; keeps gate and up."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


def gated(function: type[_GateFunction], gate: Tensor, up: Tensor) -> Tensor:
    """``function`` of gate and up, which need not be kept as the input of what comes next: the two are kept already."""
    return rematerializable(applied(function, gate, up), function.forward, gate, up)


class SwiGLUFunction(_GateFunction):
    """``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        needs_gate, needs_up = ctx.needs_input_grad
        grad_gate = _silu_backward(grad * up, gate) if needs_gate else None
        return grad_gate, grad * F.silu(gate) if needs_up else None


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """``grad * silu'(x)``: one kernel, or written out where it is itself to be differentiated (the kernel has no derivative)."""
    if not torch.is_grad_enabled():
        slope: Tensor = torch.ops.aten.silu_backward(grad, x)
        return slope
    gate = x.sigmoid()
    return grad * gate * (1 + x * (1 - gate))


class GEGLUFunction(_GateFunction):
    """``gelu(gate) * up``, the tanh kind of gelu (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        needs_gate, needs_up = ctx.needs_input_grad
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh") if needs_gate else None
        return grad_gate, grad * F.gelu(gate, approximate="tanh") if needs_up else None


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``: [..., H] -> [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, **factory)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.down_proj, gated(SwiGLUFunction, *project_all(x, self.gate_proj, self.up_proj)))


# Rotary positions -----------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x: [B, T, N, D].  cos, sin: [B or 1, T, 1, D/2].

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4; the pairing by halves is GPT-NeoX's and Llama's on the hub.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
