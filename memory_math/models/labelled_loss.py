"""The loss of a model whose labels stand beside its logits, unshifted: ``CrossEntropyLoss()(logits, labels)`` in the dtype of the logits.

So do BERT's heads and T5; under autocast the loss is taken in float32. Of the losses of the next token (losses.py) "mean" and "none" say the
same here, "hf_legacy" is the same as "cross_entropy", as nothing was ever upcast, and "chunked" is none of these models'.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import operations as ops
from ..errors import MemoryMathError
from ..tape import Sized
from .base import Model
from .losses import mean


def labelled_loss(model: Model, hidden: Sized, logits_of: Callable[[Sized], Sized], labels: Sized) -> Sized:
    """hidden: [B, T, H], held by the caller. logits_of: the head. labels: as many as rows of the logits."""
    if model.request.loss == "chunked":
        raise MemoryMathError(f"loss='chunked' with {model.arch.name}: chunks are for a model of the next token; use 'cross_entropy'")
    if model.request.loss == "none":
        return mean(model, hidden)
    logits = logits_of(hidden)
    model.hold(logits)
    if model.request.loss == "mean":
        return model.tape.record("loss", [logits], lambda: model.tape.new(1, logits.itemsize))
    return ops.cross_entropy(model.tape, ops.cast(model.tape, logits, 4 if model.autocast else logits.itemsize, part="logits"), labels)
