"""Attention with dropout on its weights, or with a bias per pair of positions: the encoders' `sdpa` and `eager` functions.

PyTorch's fused kernel for the CPU knows neither dropout nor a bias that trains; then scaled_dot_product_attention is the sum of its parts, in
float32. On CUDA a bias keeps FlashAttention out, and the memory-efficient kernel runs. Sources: aten/src/ATen/native/transformers/attention.cpp
(_scaled_dot_product_attention_math), cuda/attention.cu and cuda/attention_backward.cu of PyTorch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import operations as ops
from ..precision import INDEX_BYTES, LOGSUMEXP_BYTES
from ..tape import Sized
from .attention import in_parts
from .base import Model

EFFICIENT_ROWS = 32  # the memory-efficient kernel's log-sum-exp is padded to a multiple of so many queries


@dataclass(frozen=True)
class Extras:
    """What a family's attention has beside q, k and v: [1, a, Tq, Tk] added to the scores, in eager attention a mask [B, 1, Tq, Tk], too.

    in_order: k and v come out of a cache, head by head, as the batched product wants them.
    """

    bias: Sized | None = None
    mask: Sized | None = None
    in_order: bool = False


def attend(model: Model, q: Sized, k: Sized, v: Sized, extras: Extras | None = None) -> tuple[Sized, Sized | None]:
    """q: [B, Tq, a * hd], k and v: [B, Tk, a * hd]. Returns the mixed values and, in eager attention, the weights."""
    extras = extras or Extras()
    core = eager if model.request.attention == "eager" else sdpa
    if model.request.gradient_checkpointing == "attention":
        given, without = [] if extras.bias is None else [extras.bias], replace(extras, bias=None)

        def again(q: Sized, k: Sized, v: Sized, *bias: Sized) -> Sized:
            return core(model, q, k, v, replace(without, bias=bias[0]) if bias else without)[0]

        return model.tape.checkpoint(again, q, k, v, *given), None
    return core(model, q, k, v, extras)


def eager(model: Model, q: Sized, k: Sized, v: Sized, extras: Extras) -> tuple[Sized, Sized | None]:
    """Scores, scaled, with bias and mask, softmax in their own dtype, dropout: a x Tq x Tk per row each time."""
    tape, autocast = model.tape, model.autocast
    q, k, v = (ops.cast(tape, tensor, autocast or tensor.itemsize) for tensor in (q, k, v))
    s = _scores(model, q, k, extras)
    s = ops.elementwise(tape, "attention scaling", s)
    s = _biased(model, s, extras.bias)
    if extras.mask is not None:
        numel, itemsize = s.numel, max(s.itemsize, extras.mask.itemsize)
        s = tape.record("attention mask", [s], lambda: tape.new(numel, itemsize), passes=True)
    s = ops.softmax(tape, "attention softmax", ops.cast(tape, s, 4) if autocast and tape.device == "cuda" else s)
    s = weights = dropped(model, s)
    mixed = ops.matmul(tape, "attention", ops.cast(tape, s, autocast or s.itemsize), _laid_out(model, v, extras.in_order), q.numel)
    del s
    return ops.copy(tape, "attention", mixed), weights


def sdpa(model: Model, q: Sized, k: Sized, v: Sized, extras: Extras) -> tuple[Sized, Sized | None]:
    """scaled_dot_product_attention, by the kernel that PyTorch chooses for it."""
    tape, rows, bias = model.tape, model.arch.heads * q.numel // model.arch.query_width, extras.bias
    if model.autocast is not None:
        q, k, v = (ops.cast(tape, tensor, model.autocast) for tensor in (q, k, v))
        bias = None if bias is None else ops.cast(tape, bias, model.autocast)
    if tape.device == "cpu" and (attention_dropout(model) or (bias is not None and bias.needs_grad)):
        return math_path(model, q, k, v, replace(extras, bias=bias)), None
    if tape.device == "cuda" and bias is not None:
        return memory_efficient(model, q, k, v, bias), None
    return ops.scaled_dot_product_attention(tape, q, k, v, rows, mask=bias), None


def math_path(model: Model, q: Sized, k: Sized, v: Sized, extras: Extras) -> Sized:
    """The sum of its parts, with the bias added to the scores."""

    def weights(s: Sized) -> Sized:
        s = ops.softmax(model.tape, "attention softmax", s)
        return dropped(model, s)

    def scores(q: Sized, k: Sized) -> Sized:
        return _biased(model, _scores(model, q, k, extras), extras.bias)

    def mix(s: Sized, v: Sized) -> Sized:
        return ops.matmul(model.tape, "attention", s, _laid_out(model, v, extras.in_order), q.numel)

    return in_parts(model.tape, q, k, v, scores, weights, mix)


def memory_efficient(model: Model, q: Sized, k: Sized, v: Sized, bias: Sized) -> Sized:
    """The kernel keeps what it is given, its result, a float32 per padded query and the random state; its backward sums q's gradient in
    float32, and makes the gradient of a bias for every row of the batch."""
    tape, batch = model.tape, model.request.batch_size
    queries = q.numel // (batch * model.arch.query_width)
    padded = batch * model.arch.heads * -(-queries // EFFICIENT_ROWS) * EFFICIENT_ROWS * LOGSUMEXP_BYTES
    scratch = 4 * q.numel + padded + (bias.nbytes * batch if bias.needs_grad else 0)

    def keeps(y: Sized) -> list[Sized]:
        return [q, k, v, bias, y, tape.new(padded + 2 * INDEX_BYTES, 1)]

    return tape.record("attention", [q, k, v, bias], lambda: tape.new(q.numel, q.itemsize), keeps_after=keeps, scratch=scratch)


def _scores(model: Model, q: Sized, k: Sized, extras: Extras) -> Sized:
    """[B, a, Tq, Tk]."""
    width, batch = model.arch.query_width, model.request.batch_size
    numel = model.arch.heads * (q.numel // width) * (k.numel // width // batch)
    return ops.matmul(model.tape, "attention scores", _laid_out(model, q), _laid_out(model, k, extras.in_order), numel)


def _biased(model: Model, s: Sized, bias: Sized | None) -> Sized:
    return s if bias is None else ops.add(model.tape, "attention bias", s, expanded(model, bias, s.numel))


def attention_dropout(model: Model) -> float:
    return model.arch.attention_dropout if model.request.trains else 0.0


def dropped(model: Model, weights: Sized) -> Sized:
    return ops.dropout(model.tape, weights) if attention_dropout(model) else weights


def expanded(model: Model, x: Sized, numel: int) -> Sized:
    """x broadcast to `numel` elements, as a view."""
    return model.tape.record("expand", [x], lambda: Sized(numel, x.itemsize, x.storage))


def _laid_out(model: Model, x: Sized, in_order: bool = False) -> Sized:
    """The batched product wants [B * a, T, hd]: a view of one row, a copy of several."""
    return x if in_order or model.request.batch_size == 1 else ops.copy(model.tape, "attention", x)
