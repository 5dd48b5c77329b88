"""What the model families share: norms, rotary positions, attention, the gated MLP, the key-value cache.

Shapes: B batch, T positions of this call, S positions including the cache, H hidden, N heads, D head dimension.
RMSNorm and SwiGLU are autograd Functions that keep only their inputs: plain PyTorch keeps three to four times as much, and in a
transformer that, not LoRA, is most of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the label of a position that is not learned

# Norm -----------------------------------------------------------------------------------------------------------------------


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x), 1 / rms(x)), in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse_rms, inverse_rms


class RMSNormFunction(torch.autograd.Function):
    """``weight * x / sqrt(mean(x**2) + eps)``; keeps x and weight (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) * _normalised(x, eps)[0].to(dtype)

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
        return RMSNormFunction.apply(x, self.weight, self.eps, compute_dtype(x))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype matrix products of x run in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


# Gated MLP ------------------------------------------------------------------------------------------------------------------


class SwiGLUFunction(torch.autograd.Function):
    """``silu(gate) * up``; keeps gate and up (Shazeer 2020, arXiv:2002.05202, equation 6)."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

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


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``: [..., H] -> [..., H]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, **factory)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x)))


# Attention ------------------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x: [B, T, N, D].  cos, sin: [B or 1, T, 1, D/2].

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4; the pairing by halves is GPT-NeoX's and Llama's on the hub.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245) and rotary positions.

    x: [B, T, H].  rotary: (cos, sin), each [B or 1, T, 1, D/2].  mask: bool [B, 1, T, S], True where a query may look; None is causal.
    """

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.head_dim, self.groups = head_dim, heads // kv_heads
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias, **factory)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias, **factory)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, layer_cache: LayerCache | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))  # [B, T, N, D]
        cos, sin = (angle.to(q.dtype) for angle in rotary)
        q, k, v = (heads.transpose(1, 2) for heads in (rotate(q, cos, sin), rotate(k, cos, sin), v))  # [B, N, T, D], nothing moved
        causal = mask is None and (layer_cache is None or layer_cache.length == 0)  # else it is one token, which may look at all
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.groups > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def attention_mask(padding: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Tensor | None:
    """Who may look at whom: [B or 1, 1, T, S], or None where plain causality says it all.

    padding: [B, S], 1 for text and 0 for padding, on either side; None for no padding.  A padded position looks at itself at
    least, so that no row of the softmax is empty (an empty one is NaN, and NaN spreads).
    """
    total = past + length
    if padding is not None and not torch.compiler.is_compiling() and bool(padding.all()):
        padding = None
    if padding is None and (past == 0 or length == 1):
        return None
    query, key = torch.arange(past, total, device=device)[:, None], torch.arange(total, device=device)[None, :]
    causal = (key <= query)[None, None]
    return causal if padding is None else (causal & padding.bool()[:, None, None, :]) | (key == query)[None, None]


def padding_cannot_matter(padding: Tensor | None, labels: Tensor) -> bool:
    """True where padding stands on the right and has no labels: causal attention keeps text from seeing it, so no mask is needed.

    padding, labels: [B, T]. A mask would cost a [B, 1, T, T] tensor and, on most devices, the fastest attention kernel.
    """
    if padding is None or padding.shape != labels.shape or torch.compiler.is_compiling():
        return False
    on_the_right = (padding[:, 1:] <= padding[:, :-1]).all()
    return bool(on_the_right & (labels[padding == 0] == IGNORE).all())


# Key-value cache ------------------------------------------------------------------------------------------------------------


class LayerCache:
    """Keys and values of one layer, [B, N, S, D] each, in buffers that double when full (so a token costs no copy of the past)."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values
        self.length = 0 if keys is None else keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add T positions; returns all S so far. With gradients it concatenates, without it writes in place."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys = self._write(self.keys, keys, start)
        self.values = self._write(self.values, values, start)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _write(self, buffer: Tensor | None, new: Tensor, start: int) -> Tensor:
        if buffer is None:
            return new
        if torch.is_grad_enabled():
            return torch.cat((buffer[:, :, :start], new), dim=2)
        if buffer.shape[2] < self.length:
            grown = new.new_empty(*buffer.shape[:2], max(2 * start, self.length), buffer.shape[3])
            grown[:, :, :start] = buffer[:, :, :start]
            buffer = grown
        buffer[:, :, start : self.length] = new
        return buffer

    def fork(self) -> LayerCache:
        """Another cache that starts with what is here so far; appending to it leaves this one alone."""
        if self.keys is None or self.values is None:
            return LayerCache()
        return LayerCache(self.keys[:, :, : self.length], self.values[:, :, : self.length])

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (a bool [B] or indices)."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class KVCache:
    """One `LayerCache` per layer. Iterating gives (keys, values) pairs; such pairs also make one."""

    def __init__(self, layers: int | Any) -> None:
        self.layers = [LayerCache() for _ in range(layers)] if isinstance(layers, int) else [LayerCache(*pair[:2]) for pair in layers]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def keep(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keep(rows)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for layer in self.layers:
            assert layer.keys is not None and layer.values is not None
            yield layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]
