"""Attention with dropout on its weights, or with a bias per pair of positions: the encoders' `sdpa` and `eager` functions.

PyTorch's fused kernel for the CPU knows neither dropout nor a bias that trains; then scaled_dot_product_attention is the sum of its parts, in
float32. On CUDA a bias keeps FlashAttention out, and the memory-efficient kernel runs. Sources: aten/src/ATen/native/transformers/attention.cpp
(_scaled_dot_product_attention_math), cuda/attention.cu and cuda/attention_backward.cu of PyTorch 2.13.
"""

from __future__ import annotations

from .. import operations as ops
from ..precision import INDEX_BYTES, LOGSUMEXP_BYTES
from ..tape import Sized
from .base import Model

EFFICIENT_ROWS = 32  # the memory-efficient kernel's log-sum-exp is padded to a multiple of so many queries


def attend(model: Model, q: Sized, k: Sized, v: Sized, bias: Sized | None = None) -> tuple[Sized, Sized | None]:
    """q: [B, Tq, a * hd], k and v: [B, Tk, a * hd], bias: [1, a, Tq, Tk]. Returns the mixed values and, where they are returned, the weights."""
    core = eager if model.request.attention == "eager" else sdpa
    if model.request.gradient_checkpointing == "attention":
        inputs = [q, k, v, *([] if bias is None else [bias])]
        return model.tape.checkpoint(lambda *tensors: core(model, *tensors)[0], *inputs), None
    return core(model, q, k, v, bias)


def eager(model: Model, q: Sized, k: Sized, v: Sized, bias: Sized | None = None) -> tuple[Sized, Sized | None]:
    """Scores, scaled, softmax in their own dtype, dropout; a x Tq x Tk per row, four times and the mask."""
    tape, autocast = model.tape, model.autocast
    q, k, v = (ops.cast(tape, tensor, autocast or tensor.itemsize) for tensor in (q, k, v))
    s = ops.matmul(tape, "attention scores", *_laid_out(model, q, k), scores(model, q, k))
    s = ops.elementwise(tape, "attention scaling", s)
    if bias is not None:
        s = ops.add(tape, "attention bias", s, expanded(model, bias, s.numel))
    s = ops.softmax(tape, "attention softmax", ops.cast(tape, s, 4) if autocast and tape.device == "cuda" else s)
    s = weights = dropped(model, s)
    mixed = ops.matmul(tape, "attention", ops.cast(tape, s, autocast or s.itemsize), *_laid_out(model, v), q.numel)
    del s
    return ops.copy(tape, "attention", mixed), weights


def sdpa(model: Model, q: Sized, k: Sized, v: Sized, bias: Sized | None = None) -> tuple[Sized, Sized | None]:
    """scaled_dot_product_attention, by the kernel that PyTorch chooses for it."""
    tape, rows = model.tape, model.arch.heads * q.numel // model.arch.query_width
    if model.autocast is not None:
        q, k, v = (ops.cast(tape, tensor, model.autocast) for tensor in (q, k, v))
        bias = None if bias is None else ops.cast(tape, bias, model.autocast)
    if tape.device == "cpu" and (attention_dropout(model) or (bias is not None and bias.needs_grad)):
        return in_parts(model, q, k, v, bias), None
    if tape.device == "cuda" and bias is not None:
        return memory_efficient(model, q, k, v, bias), None
    return ops.scaled_dot_product_attention(tape, q, k, v, rows, mask=bias), None


def in_parts(model: Model, q: Sized, k: Sized, v: Sized, bias: Sized | None) -> Sized:
    """_scaled_dot_product_attention_math: 16-bit inputs in float32, q and k each times the root of the scale."""
    tape, itemsize = model.tape, q.itemsize
    wide_q, wide_k, wide_v = (ops.cast(tape, tensor, 4) for tensor in (q, k, v))
    scaled = ops.elementwise(tape, "attention scaling", wide_q)
    s = ops.matmul(tape, "attention scores", *_laid_out(model, scaled, ops.elementwise(tape, "attention scaling", wide_k)), scores(model, q, k))
    if bias is not None:
        s = ops.add(tape, "attention bias", s, expanded(model, bias, s.numel))
    s = ops.softmax(tape, "attention softmax", s)
    s = dropped(model, s)
    returned = ops.cast(tape, s, itemsize)
    mixed = ops.cast(tape, ops.matmul(tape, "attention", s, *_laid_out(model, wide_v), q.numel), itemsize)
    del s, returned, scaled, wide_q, wide_k, wide_v
    return ops.copy(tape, "attention", mixed)


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


def scores(model: Model, q: Sized, k: Sized) -> int:
    """B * a * Tq * Tk."""
    width = model.arch.query_width
    return model.arch.heads * (q.numel // width) * (k.numel // width // model.request.batch_size)


def attention_dropout(model: Model) -> float:
    return model.arch.attention_dropout if model.request.trains else 0.0


def dropped(model: Model, weights: Sized) -> Sized:
    return ops.dropout(model.tape, weights) if attention_dropout(model) else weights


def expanded(model: Model, x: Sized, numel: int) -> Sized:
    """x broadcast to `numel` elements, as a view."""
    return model.tape.record("expand", [x], lambda: Sized(numel, x.itemsize, x.storage))


def _laid_out(model: Model, *tensors: Sized) -> list[Sized]:
    """The batched product wants [B * a, T, hd]: a view of one row, a copy of several."""
    return list(tensors) if model.request.batch_size == 1 else [ops.copy(model.tape, "attention", tensor) for tensor in tensors]
