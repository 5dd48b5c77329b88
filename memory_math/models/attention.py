"""The core of attention, from q, k and v to the mixed values, as transformers' `sdpa` and `eager` functions run it."""

from __future__ import annotations

from collections.abc import Callable

from .. import operations as ops
from ..tape import Sized, Tape
from .base import Model


def attend(model: Model, q: Sized, k: Sized, v: Sized, mask: Sized | None = None) -> Sized:
    """q: [B, T, q width], k and v: [B, P + T, kv width]. mask: [B, 1, T, P + T], where causality alone does not say who sees whom."""
    core = eager if model.request.attention == "eager" else fused
    if model.request.gradient_checkpointing == "attention":
        return model.tape.checkpoint(lambda q, k, v: core(model, q, k, v, mask), q, k, v)
    return core(model, q, k, v, mask)


def fused(model: Model, q: Sized, k: Sized, v: Sized, mask: Sized | None = None) -> Sized:
    """One kernel; a mask is written out in q's dtype for each call, and makes transformers repeat k and v to q's width."""
    tape, habits = model.tape, model.habits
    if k.numel < _repeated(model, q, k) and (mask is not None or habits.repeats):
        k, v = (ops.copy(tape, "attention", tensor, _repeated(model, q, tensor)) for tensor in (k, v))
    elif habits.lays_out and tape.device == "cuda":
        k, v = (ops.copy(tape, "attention", tensor) for tensor in (k, v))
    if habits.lays_out and tape.device == "cuda":
        q = ops.copy(tape, "attention", q)
    written = _written(model, mask, q.itemsize)
    y = ops.scaled_dot_product_attention(tape, q, k, v, model.tokens * model.arch.heads, model.autocast, mask=written)
    return ops.copy(tape, "attention", y) if habits.copies_output and tape.device == "cuda" else y


def in_parts(
    tape: Tape, q: Sized, k: Sized, v: Sized, scores: Callable[[Sized, Sized], Sized], weights: Callable[[Sized], Sized],
    mix: Callable[[Sized, Sized], Sized],
) -> Sized:  # fmt: skip
    """_scaled_dot_product_attention_math: 16-bit inputs in float32, q and k each times the root of the scale.

    scores: of q and k. weights: softmax and dropout of the scores. mix: of weights and v.
    """
    itemsize = q.itemsize
    wide_q, wide_k, wide_v = (ops.cast(tape, tensor, 4) for tensor in (q, k, v))
    scaled = ops.elementwise(tape, "attention scaling", wide_q)
    s = weights(scores(scaled, ops.elementwise(tape, "attention scaling", wide_k)))
    returned = ops.cast(tape, s, itemsize)
    mixed = ops.cast(tape, mix(s, wide_v), itemsize)
    del s, returned, scaled, wide_q, wide_k, wide_v
    return ops.copy(tape, "attention", mixed)


def _written(model: Model, mask: Sized | None, itemsize: int) -> Sized | None:
    """The mask as the kernel takes it: one of true and false becomes numbers of q's dtype, anew for each call."""
    if mask is None or (mask.itemsize == itemsize and not model.habits.mask_per_block):
        return mask
    return model.tape.new(mask.numel, itemsize)


def _repeated(model: Model, q: Sized, k: Sized) -> int:
    """Elements of k, one head of it for every head of q."""
    return k.numel * model.arch.query_width // model.arch.kv_width


def eager(model: Model, q: Sized, k: Sized, v: Sized, mask: Sized | None = None) -> Sized:
    """k and v are repeated to q's width, and q, k, v are laid out anew for the batched product; scores are s x s per head.

    The mask is added, softmax is taken in float32 and cast back.
    """
    tape, autocast = model.tape, model.autocast
    length = _repeated(model, q, k) // (q.numel // model.sequence)
    scores = model.tokens * length * model.arch.heads
    k, v = (ops.copy(tape, "attention", tensor, _repeated(model, q, tensor)) for tensor in (k, v))
    q = ops.copy(tape, "attention", q)
    s = ops.matmul(tape, "attention scores", q, k, scores, autocast)
    del q, k
    s = ops.elementwise(tape, "attention scaling", s)
    s = ops.elementwise(tape, "attention mask", s)
    if model.habits.bounded_scores:
        s = ops.elementwise(tape, "attention bound", s, keeps=[s])
    s = ops.softmax(tape, "attention softmax", ops.cast(tape, s, 4))
    s = ops.cast(tape, s, v.itemsize)
    attended = ops.matmul(tape, "attention", s, v, model.tokens * model.arch.query_width, autocast)
    del s, v
    return ops.copy(tape, "attention", attended)
