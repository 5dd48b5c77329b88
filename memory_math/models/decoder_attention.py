"""Attention as GPT-2, OPT, GPT-NeoX and Falcon call it: with a mask or none, dropout on its weights, and with or without a kernel of its own.

PyTorch has no fused kernel on the CPU where weights are dropped out, and none anywhere where keys have fewer heads than queries and
`enable_gqa` is not asked for; then scaled_dot_product_attention is the sum of its parts, in float32. Sources: aten/src/ATen/native/
transformers/attention.cpp (_scaled_dot_product_attention_math) and sdp_utils_cpp.h (check_batch_size_and_num_heads_dense) of PyTorch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import operations as ops
from ..tape import Sized
from .attention import in_parts
from .attention_dropout import expanded, memory_efficient
from .blocks import Decoder, view


@dataclass(frozen=True)
class Habits:
    """How a family runs attention. dropout: the share of the weights. taken_in, cast_to: bytes per element of eager attention's softmax, and
    of its result; None is the scores' own dtype, which autocast on CUDA makes float32. in_order: those of "qkv" that lie head by head, as
    the batched product takes them. in_place: scores are scaled where they are, and live until the softmax is there.
    """

    cast_to: int
    taken_in: int | None = None
    dropout: float = 0.0
    in_order: str = ""
    in_place: bool = False


def attend(model: Decoder, q: Sized, k: Sized, v: Sized, mask: Sized | None, habits: Habits) -> tuple[Sized, Sized | None]:
    """q: [B, T, a * hd], k and v: [B, P + T, kv * hd], mask: see `Decoder.causal_mask`. Returns the mixed values and eager attention's weights."""

    def core(q: Sized, k: Sized, v: Sized) -> tuple[Sized, Sized | None]:
        if model.request.attention != "eager":
            return sdpa(model, q, k, v, mask, habits), None
        assert mask is not None
        return eager(model, q, k, v, mask, habits)

    if model.request.gradient_checkpointing == "attention":
        return model.tape.checkpoint(lambda *tensors: core(*tensors)[0], q, k, v), None
    return core(q, k, v)


def sdpa(model: Decoder, q: Sized, k: Sized, v: Sized, mask: Sized | None, habits: Habits) -> Sized:
    """scaled_dot_product_attention, by the kernel that PyTorch chooses for it; its result lies as q does, and o_proj wants token after token."""
    tape, rows = model.tape, model.tokens * model.arch.heads
    if model.autocast is not None:
        q, k, v = (ops.cast(tape, tensor, model.autocast) for tensor in (q, k, v))
    if mask is not None and mask.itemsize != q.itemsize:
        mask = tape.new(mask.numel, q.itemsize)  # yes and no become numbers
    dropped = habits.dropout > 0 and model.request.trains
    if model.request.attention != "flash" and (k.numel < q.numel or (tape.device == "cpu" and dropped)):
        return math_path(model, q, k, v, habits)
    if tape.device == "cuda" and mask is not None:
        return memory_efficient(model, q, k, v, mask)
    y = ops.scaled_dot_product_attention(tape, q, k, v, rows, mask=mask)
    return ops.copy(tape, "attention", y) if "q" in habits.in_order else y


def math_path(model: Decoder, q: Sized, k: Sized, v: Sized, habits: Habits) -> Sized:
    """The sum of its parts."""
    order = habits.in_order
    return in_parts(
        model.tape, q, k, v, lambda q, k: scores(model, q, k, order), lambda s: model.dropout(_safe_softmax(model, s), habits.dropout),
        lambda s, v: mix(model, s, v, order),
    )  # fmt: skip


def _safe_softmax(model: Decoder, s: Sized) -> Sized:
    """A softmax that also looks for rows in which nothing is seen, and writes zeros there."""
    tape, inside = model.tape, model.tape.inside_kernel(s.numel * (s.itemsize + 1))
    return tape.record("attention softmax", [s], lambda: tape.new(s.numel, s.itemsize), keeps_after=lambda y: [y], busy=inside)


def eager(model: Decoder, q: Sized, k: Sized, v: Sized, mask: Sized, habits: Habits) -> tuple[Sized, Sized]:
    """Scores, scaled, masked, their softmax, dropout: a * T * (P + T) per row each time."""
    tape = model.tape
    s = scores(model, q, k, habits.in_order, model.autocast)
    s = view(tape, "attention scaling", s) if habits.in_place else ops.elementwise(tape, "attention scaling", s)
    unmasked = s if habits.in_place else None
    s = masked(model, s, mask)
    own = 4 if model.autocast and tape.device == "cuda" else s.itemsize
    s = ops.softmax(tape, "attention softmax", ops.cast(tape, s, habits.taken_in or own))
    s = ops.cast(tape, s, habits.cast_to)
    del unmasked
    s = model.dropout(s, habits.dropout)
    return ops.copy(tape, "attention", mix(model, s, v, habits.in_order, model.autocast)), s


def masked(model: Decoder, s: Sized, mask: Sized) -> Sized:
    """s + mask, in the wider of the two dtypes."""
    return model.tape.record("attention mask", [s], lambda: model.tape.new(s.numel, max(s.itemsize, mask.itemsize)), passes=True)


def scores(model: Decoder, q: Sized, k: Sized, in_order: str = "", autocast: int | None = None) -> Sized:
    """Every query with every key: [B, a, T, P + T]."""
    length = model.request.prefix + model.sequence
    q, k = (ops.cast(model.tape, tensor, autocast or tensor.itemsize) for tensor in (q, k))
    q = _laid_out(model, q, q.numel, "q" in in_order)
    k = _laid_out(model, k, q.numel // model.sequence * length, "k" in in_order)
    return ops.matmul(model.tape, "attention scores", q, k, model.tokens * model.arch.heads * length)


def mix(model: Decoder, weights: Sized, v: Sized, in_order: str = "", autocast: int | None = None) -> Sized:
    """The values, weighted: [B, a, T, hd]."""
    numel, length = model.tokens * model.arch.query_width, model.request.prefix + model.sequence
    weights, v = (ops.cast(model.tape, tensor, autocast or tensor.itemsize) for tensor in (weights, v))
    v = _laid_out(model, v, numel // model.sequence * length, "v" in in_order)
    return ops.matmul(model.tape, "attention", weights, v, numel)


def _laid_out(model: Decoder, x: Sized, numel: int, in_order: bool) -> Sized:
    """The batched product wants [B * a, T, hd]: a view of one row, a copy of several; one head of k or v serves all of q's."""
    if model.request.batch_size == 1:
        return expanded(model, x, numel)
    return x if in_order and x.numel == numel else ops.copy(model.tape, "attention", x, numel)
