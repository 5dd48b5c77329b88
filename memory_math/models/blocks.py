"""What the older decoders share on the tape: dropout, one matrix for q, k and v, and attention with or without a kernel of its own.

PyTorch has no fused kernel on the CPU where the weights are dropped out, and none anywhere where keys have fewer heads than queries and
`enable_gqa` is not asked for; then scaled_dot_product_attention is the sum of its parts, in float32. Sources: torch/nn/functional.py,
aten/src/ATen/native/transformers/attention.cpp (_scaled_dot_product_attention_math) and sdp_utils_cpp.h of PyTorch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import operations as ops
from ..tape import Sized, Tape
from .attention_dropout import expanded, memory_efficient
from .base import Model, cached
from .peft_layers import with_prompt


def dropout(model: Model, x: Sized, share: float) -> Sized:
    """nn.Dropout: nothing at all without training or where the share is 0."""
    return ops.dropout(model.tape, x) if share and model.request.trains else x


def split(tape: Tape, fused: Sized, *numels: int) -> list[Sized]:
    """Views of one tensor; backward waits for the gradients of all of them and lays them side by side in a new one."""
    waiting = fused.nbytes - numels[0] * fused.itemsize
    whole = tape.record("split", [fused], lambda: Sized(fused.numel, fused.itemsize, fused.storage), scratch=waiting)
    return [Sized(numel, whole.itemsize, whole.storage, whole.node) for numel in numels]


def causal_mask(model: Model, x: Sized, in_numbers: bool) -> Sized:
    """Who sees whom, [B, 1, T, T] in x's dtype as eager attention adds it, or a true or false for each pair of one row."""
    pairs = model.tokens * model.sequence
    return model.tape.new(pairs, x.itemsize, "other") if in_numbers else model.tape.new(pairs // model.request.batch_size, 1, "other")


def embed(model: Model, ids: Sized) -> Sized:
    """The words' vectors, with a prompt before them, which PEFT's forward holds until the end of the model's."""
    x = with_prompt(model, model.needed(ops.embedding(model.tape, ids, model.weights[model.embedding_path])))
    if model.prompt is not None:
        model.hold(x)
    return x


def plus_positions(model: Model, embedded: Sized, positions: Sized) -> Sized:
    """[B, T, H] + [1, T, H]."""
    return ops.add(model.tape, "positions", embedded, expanded(model, positions, embedded.numel))


def into_cache(model: Model, k: Sized, v: Sized, cache: list[Sized] | None) -> tuple[Sized, Sized]:
    """DynamicCache.update: keys and values are copied into tensors that stay; nothing happens where there is no cache."""
    if cache is None:
        return k, v
    k, v = cached(ops.copy(model.tape, "cache", k)), cached(ops.copy(model.tape, "cache", v))
    cache += [k, v]
    return k, v


@dataclass(frozen=True)
class Softmax:
    """How a family's eager attention takes its softmax.

    taken_in, cast_to: bytes per element; None is the scores' own dtype, which autocast on CUDA turns into float32. in_order: q and k lie head by head already, as the product takes them. in_place: scores are scaled
    where they are.
    """

    taken_in: int | None
    cast_to: int
    in_order: bool = False
    in_place: bool = False


def attend(
    model: Model, q: Sized, k: Sized, v: Sized, mask: Sized | None, softmax: Softmax, share: float = 0.0
) -> tuple[Sized, Sized | None]:  # fmt: skip
    """The mixed values [B, T, a * hd], and the weights where eager attention returns them. mask: see `causal_mask`."""

    def core(q: Sized, k: Sized, v: Sized) -> tuple[Sized, Sized | None]:
        if model.request.attention != "eager":
            return sdpa(model, q, k, v, mask, share), None
        assert mask is not None
        return eager(model, q, k, v, mask, softmax, share)

    if model.request.gradient_checkpointing == "attention":
        return model.tape.checkpoint(lambda *tensors: core(*tensors)[0], q, k, v), None
    return core(q, k, v)


def sdpa(model: Model, q: Sized, k: Sized, v: Sized, mask: Sized | None, share: float) -> Sized:
    """scaled_dot_product_attention with `share` of the weights dropped out, by the kernel that PyTorch chooses for it."""
    tape, rows = model.tape, model.tokens * model.arch.heads
    if model.autocast is not None:
        q, k, v = (ops.cast(tape, tensor, model.autocast) for tensor in (q, k, v))
    if mask is not None and mask.itemsize != q.itemsize:
        mask = tape.new(mask.numel, q.itemsize)  # true and false become numbers
    if not model.request.trains:
        share = 0.0
    if model.request.attention != "flash" and (k.numel < q.numel or (tape.device == "cpu" and share)):
        return in_parts(model, q, k, v, share)
    if tape.device == "cuda" and mask is not None:
        return memory_efficient(model, q, k, v, mask)
    return ops.scaled_dot_product_attention(tape, q, k, v, rows, mask=mask)


def in_parts(model: Model, q: Sized, k: Sized, v: Sized, share: float) -> Sized:
    """_scaled_dot_product_attention_math: 16-bit inputs in float32, q and k each times the root of the scale."""
    tape, itemsize = model.tape, q.itemsize
    wide_q, wide_k, wide_v = (ops.cast(tape, tensor, 4) for tensor in (q, k, v))
    scaled = ops.elementwise(tape, "attention scaling", wide_q)
    s = _scores(model, scaled, ops.elementwise(tape, "attention scaling", wide_k), autocast=None)
    inside = tape.inside_kernel(s.numel * (s.itemsize + 1))
    s = tape.record("attention softmax", [s], lambda: tape.new(s.numel, s.itemsize), keeps_after=lambda y: [y], busy=inside)
    s = dropout(model, s, share)
    returned = ops.cast(tape, s, itemsize)
    mixed = ops.cast(tape, _mixed(model, s, wide_v, autocast=None), itemsize)
    del s, returned, scaled, wide_q, wide_k, wide_v
    return ops.copy(tape, "attention", mixed)


def eager(model: Model, q: Sized, k: Sized, v: Sized, mask: Sized, softmax: Softmax, share: float = 0.0) -> tuple[Sized, Sized]:
    """Scores, scaled, masked, their softmax, dropout: a x T x T per row each time."""
    tape = model.tape
    s = _scores(model, q, k, model.autocast, softmax.in_order)
    s = _view(tape, "attention scaling", s) if softmax.in_place else ops.elementwise(tape, "attention scaling", s)
    s = tape.record("attention mask", [s], lambda: tape.new(s.numel, max(s.itemsize, mask.itemsize)), passes=True)
    own = 4 if model.autocast and tape.device == "cuda" else s.itemsize
    s = ops.softmax(tape, "attention softmax", ops.cast(tape, s, softmax.taken_in or own))
    s = ops.cast(tape, s, softmax.cast_to)
    s = dropout(model, s, share)
    return ops.copy(tape, "attention", _mixed(model, s, v, model.autocast)), s


def _view(tape: Tape, name: str, x: Sized) -> Sized:
    """Done in place."""
    return tape.record(name, [x], lambda: Sized(x.numel, x.itemsize, x.storage))


def _scores(model: Model, q: Sized, k: Sized, autocast: int | None, in_order: bool = False) -> Sized:
    q, k = (ops.cast(model.tape, tensor, autocast or tensor.itemsize) for tensor in (q, k))
    q, k = (tensor if in_order else _laid_out(model, tensor, q.numel) for tensor in (q, k))
    return ops.matmul(model.tape, "attention scores", q, k, model.tokens * model.arch.heads * model.sequence)


def _mixed(model: Model, weights: Sized, v: Sized, autocast: int | None) -> Sized:
    numel = model.tokens * model.arch.query_width
    weights, v = (ops.cast(model.tape, tensor, autocast or tensor.itemsize) for tensor in (weights, v))
    return ops.matmul(model.tape, "attention", weights, _laid_out(model, v, numel), numel)


def _laid_out(model: Model, x: Sized, numel: int) -> Sized:
    """The batched product wants [B * a, T, hd]: a view of one row, a copy of several; one head of k or v serves all of q's."""
    return expanded(model, x, numel) if model.request.batch_size == 1 else ops.copy(model.tape, "attention", x, numel)
