"""Attention as this project's own models share it: lora_lab/models/attention.py, one scaled_dot_product_attention, on the tape.

Which kernel PyTorch takes decides what is kept. On the CPU the fused one knows neither dropout nor a bias that trains. On CUDA FlashAttention
knows no mask, and the memory-efficient kernel, which does, no grouped queries (sdp_utils.cpp, check_batch_size_and_num_heads_dense); what no
fused kernel takes is the sum of its parts, in float32, and keeps T x T scores. A mask of true and false becomes one of numbers for every call.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import operations as ops
from ..tape import Sized
from .attention import in_parts
from .attention_dropout import expanded, memory_efficient
from .base import Model


@dataclass(frozen=True)
class Scores:
    """What a family's attention has beside q, k and v.

    mask: true and false [T, T], or numbers to add to the scores [1, a, Tq, Tk]. causal: without a mask a position sees those before it only.
    dropout: the share of the weights. head_dim, kv_heads: where they are not the architecture's. in_order: q, k and v lie head by head, as
    the batched product takes them.
    """

    mask: Sized | None = None
    causal: bool = True
    dropout: float = 0.0
    head_dim: int | None = None
    kv_heads: int | None = None
    in_order: bool = False


@dataclass(frozen=True)
class Sizes:
    """queries: of the whole batch, a * B * Tq. keys: of one row, Tk. head_dim. grouped: heads share keys."""

    queries: int
    keys: int
    head_dim: int
    grouped: bool

    @classmethod
    def of(cls, model: Model, q: Sized, k: Sized, given: Scores) -> Sizes:
        kv_heads, head_dim = given.kv_heads or model.arch.kv_heads, given.head_dim or model.arch.head_dim
        keys = k.numel // (kv_heads * head_dim) // model.request.batch_size
        return cls(q.numel // head_dim, keys, head_dim, kv_heads < model.arch.heads)


def attend(model: Model, q: Sized, k: Sized, v: Sized, given: Scores) -> Sized:
    """attend: ``softmax(q k^T + mask) v``, [B, Tq, a * hd]. q: as large, k and v: [B, Tk, kv * hd]."""

    def core(q: Sized, k: Sized, v: Sized) -> Sized:
        return product(model, q, k, v, given)

    again = model.request.gradient_checkpointing == "attention"
    return model.tape.checkpoint(core, q, k, v) if again else core(q, k, v)


def product(model: Model, q: Sized, k: Sized, v: Sized, given: Scores) -> Sized:
    """_product: scaled_dot_product_attention, by the kernel that PyTorch chooses for it."""
    tape = model.tape
    if model.autocast is not None:
        q, k, v = (ops.cast(tape, tensor, model.autocast) for tensor in (q, k, v))
    mask, sizes = _numbers(model, given.mask, q.itemsize), Sizes.of(model, q, k, given)
    dropped = given.dropout > 0 and model.request.drops
    if not _fused(tape.device, sizes, mask, dropped):
        return by_hand(model, q, k, v, mask, given)
    if tape.device == "cuda" and mask is not None:
        return memory_efficient(model, q, k, v, mask)
    return ops.scaled_dot_product_attention(tape, q, k, v, sizes.queries, mask=mask)


def _fused(device: str, sizes: Sizes, mask: Sized | None, dropped: bool) -> bool:
    """Whether there is one kernel for it."""
    if device == "cuda":
        return mask is None or not sizes.grouped
    return not dropped and (mask is None or not mask.needs_grad)


def _numbers(model: Model, mask: Sized | None, itemsize: int) -> Sized | None:
    """The mask as the kernel takes it, of q's dtype; one of true and false is written out beside its opposite."""
    if mask is None or mask.itemsize == itemsize:
        return mask
    if mask.itemsize > 1:
        return ops.cast(model.tape, mask, itemsize)
    return model.tape.record("attention mask", [], lambda: model.tape.new(mask.numel, itemsize), busy=mask.numel)


def by_hand(model: Model, q: Sized, k: Sized, v: Sized, mask: Sized | None, given: Scores) -> Sized:
    """_scaled_dot_product_attention_math: the sum of its parts, in float32."""
    tape, sizes = model.tape, Sizes.of(model, q, k, given)
    width = model.request.batch_size * sizes.keys * model.arch.heads * sizes.head_dim  # of k and v, with a head for every head of q
    written = [tape.new(sizes.keys**2, 4)] if given.causal and mask is None else []

    def scores(q: Sized, k: Sized) -> Sized:
        q, k = _laid_out(model, q, q.numel, given), _laid_out(model, k, width, given)
        s = ops.matmul(tape, "attention scores", q, k, sizes.queries * sizes.keys)
        if mask is None or not mask.needs_grad:
            return s
        return tape.record("attention bias", [s, expanded(model, mask, s.numel)], lambda: Sized(s.numel, s.itemsize, s.storage), passes=True)

    def weights(s: Sized) -> Sized:
        inside = tape.inside_kernel(s.numel * (s.itemsize + 1))
        s = tape.record("attention softmax", [s], lambda: tape.new(s.numel, s.itemsize), keeps_after=lambda y: [y], busy=inside)
        return ops.dropout(tape, s) if given.dropout and model.request.drops else s

    y = in_parts(tape, q, k, v, scores, weights, lambda s, v: ops.matmul(tape, "attention", s, _laid_out(model, v, width, given), q.numel))
    del written
    return y


def _laid_out(model: Model, x: Sized, numel: int, given: Scores) -> Sized:
    """The batched product wants [B * a, T, hd]: a view of one row, a copy of several, or of heads that are fewer."""
    as_it_is = x.numel == numel and (given.in_order or model.request.batch_size == 1)
    return x if as_it_is else ops.copy(model.tape, "attention", x, numel)


def attention_mask(model: Model, window: int | None = None) -> Sized | None:
    """attention_mask of rows without padding: who is seen, [T, P + T] of true and false behind a prefix; None where plain causality says it all."""
    total = model.request.prefix + model.sequence
    pairs, cut = model.sequence * total, window is not None and total > window
    if not cut and (total == model.sequence or model.sequence == 1):
        return None
    return model.tape.record("attention mask", [], lambda: model.tape.new(pairs, 1, "other"), busy=0 if window is None else 2 * pairs)
