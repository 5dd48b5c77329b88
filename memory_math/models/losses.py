"""From the last hidden states to a number: what each way of computing the loss of the next token makes and keeps.

V words, T positions; bytes per position and word in brackets.

cross_entropy   ForCausalLMLoss of transformers from 4.45 on: logits [2], in float32 [4], log-softmax [4, kept]; backward makes two more [4 + 4]
hf_legacy       before 4.45: logits in float32 [4] stay with the model's output, a shifted copy of them [4], log-softmax [4, kept]
chunked         logits [2, kept], and float32 for an eighth of the positions at a time, computed again in backward: torchtune's
                CEWithChunkedOutputLoss with its eight chunks, compiled as torchtune does
mean            logits.mean(), for measurements: logits [2], nothing kept
none            no logits: the mean of the hidden states
"""

from __future__ import annotations

from collections.abc import Callable

from .. import operations as ops
from ..tape import Sized
from .base import Model

CHUNKS = 8


def token_loss(model: Model, hidden: Sized, labels: Sized) -> Sized:
    """The loss that the request names, from hidden [B, T, H]; hidden must not be held elsewhere by the caller's caller."""
    if model.request.loss == "none":
        return mean(model, hidden)
    logits = ops.linear(model.tape, hidden, model.head, model.weights.get("lm_head.bias"), autocast=model.autocast, part="logits")
    del hidden
    return LOSSES[model.request.loss](model, logits, labels)


def cross_entropy(model: Model, logits: Sized, labels: Sized) -> Sized:
    """Float32 logits of every position, and the labels shifted by one in a new tensor."""
    full = ops.cast(model.tape, logits, 4, part="logits")
    return ops.cross_entropy(model.tape, full, _shifted(model, labels))


def hf_legacy(model: Model, logits: Sized, labels: Sized) -> Sized:
    tape = model.tape
    full = ops.cast(tape, logits, 4, part="logits")
    del logits
    rows = labels.numel - model.request.batch_size
    words = full.numel // labels.numel
    shifted = tape.record("shift", [full], lambda: tape.new(rows * words, 4, "logits"))
    loss = ops.cross_entropy(tape, shifted, tape.new(rows, labels.itemsize, "other"))
    del full, shifted
    return loss


def chunked(model: Model, logits: Sized, labels: Sized) -> Sized:
    """Every chunk keeps its 16-bit logits; float32 copies exist for one chunk at a time, forward and backward."""
    tape, share = model.tape, -(-logits.numel // CHUNKS)
    busy = 2 * 4 * share  # float32 logits and their log-softmax
    return tape.record("loss", [logits], lambda: tape.new(1, 4), keeps=[logits, _shifted(model, labels)], busy=busy, scratch=busy)


def mean(model: Model, x: Sized, _: Sized | None = None) -> Sized:
    return model.tape.record("loss", [x], lambda: model.tape.new(1, x.itemsize))


def _shifted(model: Model, labels: Sized) -> Sized:
    return model.tape.new(labels.numel, labels.itemsize, "other")


LOSSES: dict[str, Callable[[Model, Sized, Sized], Sized]] = {"cross_entropy": cross_entropy, "hf_legacy": hf_legacy, "chunked": chunked, "mean": mean}
