"""From the last hidden states to a number: what each way of computing the loss of the next token makes and keeps.

V words, T positions; bytes per position and word in brackets.

cross_entropy   ForCausalLMLoss of transformers from 4.45 on: logits [2], in float32 [4], log-softmax [4, kept]; backward makes two more [4 + 4]
hf_legacy       before 4.45: logits in float32 [4] stay with the model's output, a shifted copy of them [4], log-softmax [4, kept]
chunked         logits in eight parts [2, kept]; float32 ones, their log-softmax and gradients for one part at a time, made again in
                backward: torchtune's CEWithChunkedOutputLoss, compiled as torchtune does
mean            logits.mean(), for measurements: logits [2], nothing kept
none            no logits: the mean of the hidden states
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .. import operations as ops
from ..tape import Sized
from .base import Model

CHUNKS = 8


def token_loss(model: Model, hidden: Sized, labels: Sized) -> Sized:
    """The loss that the request names, from hidden [B, T, H]; hidden must not be held elsewhere by the caller's caller."""
    if model.request.loss == "none":
        return mean(model, hidden)
    return LOSSES[model.request.loss](model, hidden, labels)


def _logits(model: Model, hidden: Sized) -> Sized:
    return ops.linear(model.tape, hidden, model.head, model.weights.get("lm_head.bias"), autocast=model.autocast, part="logits")


def cross_entropy(model: Model, hidden: Sized, labels: Sized) -> Sized:
    """Float32 logits of every position, and the labels shifted by one in a new tensor."""
    logits = _logits(model, hidden)
    del hidden
    model.hold(logits)
    full = ops.cast(model.tape, logits, 4, part="logits")
    return ops.cross_entropy(model.tape, full, _shifted(model, labels))


def hf_legacy(model: Model, hidden: Sized, labels: Sized) -> Sized:
    """Float32 logits, and once more without the last position."""
    tape, full = model.tape, _returned(model, _logits(model, hidden))
    del hidden
    rows, itemsize = labels.numel - model.request.batch_size, full.itemsize
    numel = rows * (full.numel // labels.numel)
    shifted = tape.record("shift", [full], lambda: tape.new(numel, itemsize, "logits"))
    return ops.cross_entropy(tape, shifted, tape.new(rows, labels.itemsize, "other"))


def chunked(model: Model, hidden: Sized, labels: Sized) -> Sized:
    """A chunk keeps its 16-bit logits; float32 ones exist for one chunk at a time, forward and backward, and so do gradients of logits."""
    tape, labels = model.tape, _shifted(model, labels)
    width, count = model.arch.hidden, hidden.numel // model.arch.hidden
    share = -(-count // CHUNKS)
    total: list[Sized] = []
    for first in range(0, count, share):
        size = min(share, count - first) * width
        rows = tape.record("chunk", [hidden], partial(Sized, size, hidden.itemsize, hidden.storage))
        logits = _logits(model, rows)
        model.hold(logits)
        busy = 2 * 4 * logits.numel  # float32 logits and their log-softmax
        total.append(tape.record("loss", [logits], lambda: tape.new(1, 4), keeps=[logits, labels], busy=busy, scratch=busy))
    return tape.record("loss", total, lambda: tape.new(1, 4), passes=True)


def mean_logits(model: Model, hidden: Sized, _: Sized) -> Sized:
    return mean(model, _returned(model, _logits(model, hidden)))


def mean(model: Model, x: Sized) -> Sized:
    return model.tape.record("loss", [x], lambda: model.tape.new(1, x.itemsize))


def _returned(model: Model, logits: Sized) -> Sized:
    """The logits that the model returns, which its output holds: from 4.31 until 4.45 in float32."""
    before = model.request.versions.before
    widened = model.request.loss == "hf_legacy" or before("transformers", "4.45")
    if widened and not before("transformers", "4.31"):
        logits = ops.cast(model.tape, logits, 4, part="logits")
    model.hold(logits)
    return logits


def _shifted(model: Model, labels: Sized) -> Sized:
    """The labels, padded by one and cut by one in front: a view of one padded row, a copy of several."""
    padded = labels.numel + 1 if model.request.batch_size == 1 else labels.numel
    return model.tape.new(padded, labels.itemsize, "other")


LOSSES: dict[str, Callable[[Model, Sized, Sized], Sized]] = {
    "cross_entropy": cross_entropy,
    "hf_legacy": hf_legacy,
    "chunked": chunked,
    "mean": mean_logits,
}
