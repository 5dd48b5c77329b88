"""What every model on the tape shares: the weights of a request in the ledger, what is trained on top of them, and one pass.

A family's file writes down its forward pass (`hidden_states`) and the loss where it is not the next token's; the bytes follow.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from .. import operations as ops
from ..operations import QuantizedWeight, Weight
from ..precision import INDEX_BYTES
from ..quantization import dequantized_bytes, quantized_bytes
from ..request import VIRTUAL, Request
from ..tape import Ledger, Node, Sized, Tape, keep
from ..versions import kept_inputs
from .transformers_versions import habits_of

WORTH_MOVING = 2**20  # lora_lab.training.memory_saving.WORTH_MOVING, held equal by a test


@dataclass(frozen=True)
class Adapter:
    """lora_A [r, in], lora_B [out, r], and DoRA's magnitude [out]."""

    A: Weight
    B: Weight
    magnitude: Weight | None = None

    @property
    def tensors(self) -> list[Weight]:
        return [weight for weight in (self.A, self.B, self.magnitude) if weight is not None]


def cached(tensor: Sized) -> Sized:
    """A key or a value that stays for the tokens to come: booked as an activation."""
    keep(tensor.storage)
    return tensor


class Model(abc.ABC):
    """The weights of `request`; `training_pass` and `generation_pass` run its forward pass on a tape.

    weights: by module path. adapters: by module path. prompt: the trained vectors of prompt or prefix tuning. autocast: bytes per element
    that matrix products are cast to, None outside mixed precision. tokens: positions of one micro-batch, virtual ones included.
    """

    embedding_path: ClassVar[str] = "model.embed_tokens"  # also the head's weight, where the two are tied
    linear_layers: ClassVar[bool] = True  # nn.Linear, not GPT-2's Conv1D

    def __init__(self, request: Request, ledger: Ledger) -> None:
        self.request, self.arch, self.ledger = request, request.architecture, ledger
        self.tokens, self.sequence = request.tokens, request.positions
        self.autocast, self.habits = request.autocast, habits_of(request.versions)
        self.held: list[Sized] = []  # what the model's output holds until the loss has been taken from it
        self.weights = self._weights()
        self.adapters = {path: self._adapter(path, linear.inputs, linear.outputs) for path, linear in request.adapted.items()}
        self.prompt = self._prompt()
        self.tape = self._tape()

    def _weights(self) -> dict[str, Weight]:
        quantized = {linear.name for linear in self.arch.linears()} if self.request.quantization != "none" else set()
        return {
            name.removesuffix(".weight"): self._weight(name, rows, columns, name.removesuffix(".weight") in quantized)
            for name, rows, columns in self.arch.parameter_tensors()
        }

    def _weight(self, name: str, rows: int, columns: int, quantized: bool) -> Weight:
        request, parallel = self.request, self.request.parallel
        if quantized:
            codebooks = request.implementation == "transformers"
            packed = quantized_bytes(request.quantization, rows, columns, codebooks) // parallel.weight_shards
            dense = dequantized_bytes(request.quantization, rows * columns, request.precision.compute)
            return QuantizedWeight(self.ledger, name, (rows, columns), request.precision.compute, packed, dense, request.keeps_quantized_input)
        leaf = request.leaf() if request.method == "full" else None
        return Weight(self.ledger, name, rows, columns, request.weight_itemsize, leaf, parallel.weight_shards)

    def trainable(self, name: str, rows: int, columns: int, matrices: int = 1) -> Weight:
        """A small tensor beside the frozen model; what trains, if anything does."""
        request, leaf = self.request, self.request.leaf() if self.request.trains else None
        return Weight(self.ledger, name, rows, columns, request.adapter_itemsize, leaf, request.parallel.weight_shards, matrices)

    def _adapter(self, path: str, inputs: int, outputs: int) -> Adapter:
        rank = self.request.rank
        A, B = self.trainable(f"{path}.lora_A", rank, inputs), self.trainable(f"{path}.lora_B", outputs, rank)
        return Adapter(A, B, self.trainable(f"{path}.lora_magnitude_vector", 1, outputs) if self.request.method == "dora" else None)

    def _prompt(self) -> Weight | None:
        """Prompt tuning: [P, H]; prefix tuning: a key and a value for every block, [P, 2 * L * kv]."""
        if self.request.method not in VIRTUAL:
            return None
        width = self.arch.hidden if self.request.method == "prompt" else 2 * self.arch.layers * self.arch.kv_width
        return self.trainable("prompt_encoder", self.request.num_virtual_tokens, width)

    def _tape(self) -> Tape:
        worth_moving = WORTH_MOVING if self.request.implementation == "lora_lab" else 0
        offload = worth_moving if self.request.offload_activations else None
        return Tape(self.ledger, self.request.device, offload, kept_inputs(self.request.versions))

    @property
    def activation_itemsize(self) -> int:
        """Bytes per element of the residual stream."""
        return self.request.weight_itemsize

    @property
    def head(self) -> Weight:
        return self.weights[self.embedding_path if self.arch.tied else "lm_head"]

    @property
    def trained(self) -> list[Weight]:
        """Every tensor that has a gradient and optimizer states."""
        adapters = [weight for adapter in self.adapters.values() for weight in adapter.tensors]
        return [weight for weight in (*self.weights.values(), *adapters, *self.before_text) if weight.leaf is not None]

    @property
    def before_text(self) -> list[Weight]:
        """What prompt or prefix tuning trains."""
        return [] if self.prompt is None else [self.prompt]

    def training_pass(self) -> Sized:
        """A forward pass on a fresh tape, up to the loss."""
        self.tape = self._tape()
        loss = self.loss(*self.batch())
        self.ledger.enter("after forward")
        self.tape.weight_copies.clear()
        self.held.clear()
        return loss

    def batch(self) -> tuple[Sized, Sized]:
        """ids and labels, [B, T] of int64."""
        return self.ids(self.request.batch_size * self.request.sequence_length), self.ids(self.request.batch_size * self.request.sequence_length)

    def ids(self, count: int) -> Sized:
        return self.tape.new(count, INDEX_BYTES, "other")

    def generation_pass(self) -> None:
        """The prompt of every row at once, without gradients: keys and values of all blocks stay, logits are made for the last position."""
        self.tape = self._tape()
        ids, cache = self.ids(self.request.batch_size * self.request.sequence_length), list[Sized]()
        hidden = self.hidden_states(ids, cache)
        self.ledger.enter("logits")
        last = self.tape.new(self.request.batch_size * self.head.columns, hidden.itemsize)
        del hidden
        ops.linear(self.tape, last, self.head, part="logits")

    def linear(self, x: Sized, path: str) -> Sized:
        """The linear layer at `path`, without what PEFT adds."""
        return ops.linear(self.tape, x, self.weights[path], self.weights.get(f"{path}.bias"), self.autocast)

    def run_block(self, number: int, forward: Callable[..., Sized], *inputs: Sized) -> Sized:
        """One block, checkpointed where the request says so."""
        return self.tape.checkpoint(forward, *inputs) if self.request.checkpoints(number) else forward(*inputs)

    def needed(self, x: Sized) -> Sized:
        """What the frozen embedding gives: checkpointing makes it need a gradient (enable_input_require_grads)."""
        frozen = self.request.method == "frozen" or (self.request.method != "full" and self.request.gradient_checkpointing)
        return self.source(x) if frozen else x

    def hold(self, *tensors: Sized) -> None:
        """The model's output refers to these."""
        self.held += tensors

    def source(self, x: Sized) -> Sized:
        """x as something that needs a gradient although no weight below it does (enable_input_require_grads)."""
        if x.needs_grad:
            return x
        end = Node(0, "input", [], False, 0)
        end.kept = [keep(x.storage)]  # autograd holds the tensor that it is to accumulate a gradient into
        return Sized(x.numel, x.itemsize, x.storage, end)

    @abc.abstractmethod
    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        """ids: [B, T]. Returns the normalised hidden states [B, T, H]; `cache` collects the keys and values."""

    @abc.abstractmethod
    def loss(self, ids: Sized, labels: Sized) -> Sized:
        """ids, labels: [B, T]. Returns the scalar loss."""
