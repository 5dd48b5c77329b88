"""What both ways of writing Llama down share: the weights and adapters of a request, laid out in the ledger."""

from __future__ import annotations

import abc

from .. import operations as ops
from ..operations import Weight
from ..precision import ADAPTER_BYTES
from ..request import Request
from ..tape import Ledger, Node, Sized, Tape, keep


def cached(tensor: Sized) -> Sized:
    """A key or a value that stays for the tokens to come: booked as an activation."""
    keep(tensor.storage)
    return tensor


class Model(abc.ABC):
    """The weights of `request`; `loss` and `prefill` run its forward pass on a tape.

    weights: by module path. adapters: path -> (lora_A [r, in], lora_B [out, r]). autocast: bytes per element that matrix products
    are cast to, None outside mixed precision.
    """

    def __init__(self, request: Request, ledger: Ledger) -> None:
        self.request, self.arch, self.ledger = request, request.architecture, ledger
        self.tokens, self.sequence = request.tokens, request.sequence_length
        self.autocast = request.precision.compute if request.precision.mixed and request.trains else None
        self.weights = self._weights()
        self.adapters = self._adapters()
        self.tape = Tape(ledger, request.device)

    def _weights(self) -> dict[str, Weight]:
        full, precision = self.request.method == "full", self.request.precision
        itemsize = precision.trained if full else precision.frozen
        tensors = self.arch.parameter_tensors()
        return {name.removesuffix(".weight"): Weight(self.ledger, name, rows, columns, itemsize, full) for name, rows, columns in tensors}

    def _adapters(self) -> dict[str, tuple[Weight, Weight]]:
        rank = self.request.rank

        def pair(path: str, inputs: int, outputs: int) -> tuple[Weight, Weight]:
            A = Weight(self.ledger, f"{path}.lora_A", rank, inputs, ADAPTER_BYTES, True)
            return A, Weight(self.ledger, f"{path}.lora_B", outputs, rank, ADAPTER_BYTES, True)

        return {path: pair(path, linear.inputs, linear.outputs) for path, linear in self.request.adapted.items()}

    @property
    def head(self) -> Weight:
        return self.weights["model.embed_tokens" if self.arch.tied else "lm_head"]

    @property
    def trained(self) -> list[Weight]:
        """Every tensor that has a gradient and optimizer states."""
        everything = [*self.weights.values(), *(weight for pair in self.adapters.values() for weight in pair)]
        return [weight for weight in everything if weight.leaf is not None]

    def training_pass(self) -> Sized:
        """A forward pass on a fresh tape, up to the loss."""
        self.tape = Tape(self.ledger, self.request.device)
        ids, labels = self._batch(), self._batch()
        loss = self.loss(ids, labels)
        self.tape.weight_copies.clear()
        return loss

    def generation_pass(self) -> None:
        """The prompt of every row at once, without gradients: keys and values of all blocks stay, logits are made for the last position."""
        self.tape = Tape(self.ledger, self.request.device)
        ids, cache = self._batch(), list[Sized]()
        hidden = self.hidden_states(ids, cache)
        self.ledger.enter("logits")
        last = self.tape.new(self.request.batch_size * self.arch.hidden, hidden.itemsize)
        del hidden
        ops.linear(self.tape, last, self.head, part="logits")

    def _batch(self) -> Sized:
        return self.tape.new(self.tokens, 8, "other")

    def source(self, x: Sized) -> Sized:
        """x as something that needs a gradient although no weight below it does (enable_input_require_grads)."""
        return x if x.needs_grad else Sized(x.numel, x.itemsize, x.storage, Node(0, "input", [], False, 0))

    @abc.abstractmethod
    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        """ids: [B, T]. Returns the normalised hidden states [B, T, H]; `cache` collects the keys and values."""

    @abc.abstractmethod
    def loss(self, ids: Sized, labels: Sized) -> Sized:
        """ids, labels: [B, T]. Returns the scalar loss."""
