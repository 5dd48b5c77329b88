"""What GPT-2, OPT, GPT-NeoX and Falcon share on the tape: the frame of a language model, and the small parts of a block."""

from __future__ import annotations

from typing import ClassVar

from .. import operations as ops
from ..errors import MemoryMathError
from ..request import Request
from ..tape import Ledger, Sized, Tape
from .attention_dropout import expanded
from .base import Model, cached
from .losses import token_loss
from .peft_layers import prefix_of, with_prompt, with_virtual_labels


class Decoder(Model):
    """A language model with labels; a family writes down `hidden_states`. takes_prefix: whether PEFT's prefixes fit its keys and values."""

    takes_prefix: ClassVar[bool] = True

    def __init__(self, request: Request, ledger: Ledger) -> None:
        arch = request.architecture
        if arch.task != "ForCausalLM":
            raise MemoryMathError(f"{arch.name} as {arch.task} is not modelled: of {arch.family}, only ForCausalLM is")
        if request.compile:
            raise MemoryMathError(f"compile=True is not modelled for {arch.name}: leave it at False")
        if request.method == "prefix" and not self.takes_prefix:
            raise MemoryMathError(f"method='prefix' is not modelled for {arch.name}, whose keys PEFT 0.21 cannot prefix: use 'prompt' or 'lora'")
        super().__init__(request, ledger)

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        hidden = self.hidden_states(ids)
        self.ledger.enter("loss")
        return token_loss(self, hidden, with_virtual_labels(self, labels))

    def embed(self, ids: Sized) -> Sized:
        """The words' vectors, with a prompt before them, which PEFT's forward holds until the end of the model's."""
        x = with_prompt(self, self.needed(ops.embedding(self.tape, ids, self.weights[self.embedding_path])))
        if self.request.method == "prompt":
            self.hold(x)
        return x

    def dropout(self, x: Sized, share: float) -> Sized:
        """nn.Dropout: nothing at all without training or where the share is 0."""
        return ops.dropout(self.tape, x) if share and self.request.trains else x

    def causal_mask(self, x: Sized, always: bool = False) -> Sized | None:
        """Who sees whom, [B, 1, T, P + T]: numbers in x's dtype for eager attention; for sdpa, where a prefix needs it or `always`, yes and no,
        stored for one row."""
        pairs = self.sequence * (self.request.prefix + self.sequence)
        if self.request.attention == "eager":
            return self.tape.new(self.request.batch_size * pairs, x.itemsize, "other")
        if self.request.attention == "flash" or not (always or self.request.prefix):
            return None
        return Sized(self.request.batch_size * pairs, 1, self.tape.new(pairs, 1, "other").storage)


class Past:
    """DynamicCache: keys and values of all blocks, in tensors of their own, for the tokens to come or behind a prefix."""

    def __init__(self, model: Model, cache: list[Sized] | None) -> None:
        self.model, self.cache, self.prefix = model, cache, prefix_of(model)

    @property
    def in_order(self) -> str:
        """Keys and values in a cache lie head by head."""
        return "" if self.prefix is None and self.cache is None else "kv"

    def update(self, layer: int, k: Sized, v: Sized) -> tuple[Sized, Sized]:
        """What attention works with; k and v themselves where there is no cache."""
        tape = self.model.tape
        if self.prefix is not None:
            k, v, _ = self.prefix.layers[layer].before(k, v)
            self.model.hold(k, v)
        elif self.cache is not None:
            k, v = cached(ops.copy(tape, "cache", k)), cached(ops.copy(tape, "cache", v))
            self.cache += [k, v]
        return k, v


def view(tape: Tape, name: str, x: Sized, numel: int | None = None) -> Sized:
    """The same storage, or `numel` elements of it; backward makes a gradient for all of x."""
    return tape.record(name, [x], lambda: Sized(numel or x.numel, x.itemsize, x.storage))


def split(tape: Tape, fused: Sized, *numels: int) -> list[Sized]:
    """Views of one tensor; backward waits for the gradients of all of them and lays them side by side in a new one."""
    waiting = fused.nbytes - numels[0] * fused.itemsize
    whole = tape.record("split", [fused], lambda: Sized(fused.numel, fused.itemsize, fused.storage), scratch=waiting)
    return [Sized(numel, whole.itemsize, whole.storage, whole.node) for numel in numels]


def rotary(tape: Tape, x: Sized, table: Sized) -> Sized:
    """``x * cos + rotate_half(x) * sin``, in the wider of the two dtypes; `table` holds cos and sin, and is all that is kept."""

    def times(x: Sized) -> Sized:
        return tape.record("rotary", [x], lambda: tape.new(x.numel, max(x.itemsize, table.itemsize)), keeps=[table])

    straight = times(x)
    turned = ops.elementwise(tape, "rotary", x, busy=x.nbytes // 2, scratch=x.nbytes)
    return ops.add(tape, "rotary", straight, times(turned))


def plus_positions(model: Model, embedded: Sized, positions: Sized) -> Sized:
    """[B, T, H] + [1, T, H]."""
    return ops.add(model.tape, "positions", embedded, expanded(model, positions, embedded.numel))
