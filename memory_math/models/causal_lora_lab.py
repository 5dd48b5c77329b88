"""What this project's own language models do around their decoder, call by call: lora_lab/models/causal.py and losses.py on the tape.

The loss makes its gradients while it has the logits, a chunk of labelled positions at a time. Rows are of one length, without padding.
"""

from __future__ import annotations

import abc

from .. import operations as ops
from ..operations import Weight
from ..tape import Sized
from .attention_lora_lab import attention_mask
from .base import Model
from .prompts_lora_lab import BlockPast, Prompted

CHUNK_BYTES = 32 * 2**20  # lora_lab.models.losses.CHUNK_BYTES, held equal by a test


class CausalLM(Prompted):
    """CausalLM.forward with labels; a family writes down `decode`."""

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        pasts, whole = self.pasts(), self.with_virtual_labels(labels)
        embedded, mask, positions = self.embed(ids), attention_mask(self), self.ids(self.sequence)
        hidden = self.decode(embedded, positions, mask, pasts)
        self.ledger.enter("loss")
        return next_token_loss(self, hidden, whole)  # until here forward holds on to all of these names

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        pasts = self.pasts(cache)
        embedded, mask, positions = self.embed(ids), attention_mask(self), self.ids(self.sequence)
        return self.decode(embedded, positions, mask, pasts)

    def embed(self, ids: Sized) -> Sized:
        embedded = ops.embedding(self.tape, ids, self.weights[self.embedding_path])
        return self.source(embedded) if self.request.method == "frozen" else self.with_rows(embedded)

    def with_virtual_labels(self, labels: Sized) -> Sized:
        """-100 for the virtual tokens, beside the caller's."""
        return labels if self.tokens == self.text_tokens else self.ids(self.tokens)

    @abc.abstractmethod
    def decode(self, x: Sized, positions: Sized, mask: Sized | None, pasts: list[BlockPast]) -> Sized:
        """Decoder.forward: x [B, T, H] through every block, each with its past, and the last norm. mask: see `attention_mask`."""


def next_token_loss(model: Model, hidden: Sized, labels: Sized) -> Sized:
    """The labelled positions of all but the last; backward of the selection makes [B, T - 1, H], and that of the slice then [B, T, H]."""
    positions = model.tokens - model.request.batch_size
    return labelled_loss(model, hidden, labels, positions, sliced=True)


def labelled_loss(model: Model, hidden: Sized, labels: Sized, positions: int, sliced: bool = False, bias: Weight | None = None) -> Sized:
    """labelled_loss: the labelled ones of `positions` picked out, then `LinearCrossEntropy`."""
    tape, count, width = model.tape, model.request.label_tokens, model.arch.hidden
    chosen, labels = tape.new(positions, 1, "other"), tape.new(count, labels.itemsize, "other")
    scratch = positions * width * hidden.itemsize if sliced else 0
    selected = tape.record("loss positions", [hidden], lambda: tape.new(count * width, hidden.itemsize), keeps=[chosen], scratch=scratch)
    return linear_cross_entropy(model, selected, count, bias)


def linear_cross_entropy(model: Model, hidden: Sized, count: int, bias: Weight | None = None) -> Sized:
    """LinearCrossEntropy: keeps d loss / d hidden, and d loss / d weight and bias where the head trains; logits live for one chunk.

    backward multiplies all by the gradient of the loss, into new tensors.
    """
    tape, head = model.tape, model.head
    inputs: list[Sized] = [hidden, head, *([] if bias is None else [bias])]
    kept: list[Sized] = []

    def forward() -> Sized:
        if hidden.needs_grad:
            kept.append(tape.new(hidden.numel, hidden.itemsize))
        kept.extend(tape.new(weight.numel, weight.itemsize, "gradients") for weight in inputs[1:] if weight.needs_grad)
        _chunks(model, hidden, count)
        return tape.new(1, 4)

    return tape.record("loss", inputs, forward, keeps_after=lambda _: kept)


def _chunks(model: Model, hidden: Sized, count: int) -> None:
    """The loop over chunks: float32 logits beside their 16-bit origin or their 16-bit slope, one chunk at a time."""
    tape, head, V = model.tape, model.head, model.arch.vocabulary
    itemsize = model.autocast or head.itemsize
    operand = ops.cast(tape, Sized(head.numel, head.itemsize, head.storage), itemsize, part="workspace")
    rows_of = ops.cast(tape, Sized(hidden.numel, hidden.itemsize, hidden.storage), itemsize, part="workspace")
    for rows in chunk_rows(count, V):
        narrow = tape.new(rows * V, itemsize, "logits")
        logits = ops.cast(tape, narrow, 4, part="logits")
        del narrow
        slope = ops.cast(tape, logits, itemsize, part="logits")
        del logits
        tape.new(rows * model.arch.hidden, itemsize)  # slope @ weight
        if head.needs_grad:
            tape.new(head.numel, itemsize, "workspace")  # slope.T @ hidden
        del slope
    del operand, rows_of


def chunk_rows(count: int, vocabulary: int) -> list[int]:
    """Positions per chunk: as many as have their float32 logits in CHUNK_BYTES, and the rest."""
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [rows] * (count // rows) + [count % rows] * (count % rows > 0)
