"""What prompt_tuning_lab puts before this project's own models, call by call: rows among the embeddings, keys and values in every block.

All rows of a batch read one prompt, and gradients wait where autograd makes them wait: those of all blocks' keys and values lie there until the
last of them has come, as a prefix is one tensor. The base is in eval mode, so it drops nothing (`Request.drops`).
Sources: prompt_tuning_lab/insertion.py and layout.py; prefix_insertion.py; lora_lab/models/cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import operations as ops
from ..operations import Weight
from ..request import Request
from ..tape import Ledger, Sized
from .base import Model, cached
from .prompt_networks import Network


@dataclass
class BlockPast:
    """LayerCache: what one block finds before the text's own keys and values, and where it leaves both.

    prefix: a key and a value for each virtual token of every row, or None. cache: None where there is none. What both became takes their place; a
    checkpointed block leaves the prefix where it is, to find it again.
    """

    model: Model
    prefix: tuple[Sized, Sized] | None
    cache: list[Sized] | None

    def append(self, k: Sized, v: Sized) -> tuple[Sized, Sized]:
        """What attention works with."""
        if self.prefix is not None:
            k, v = (self._joined(before, own) for before, own in zip(self.prefix, (k, v), strict=True))
            self.prefix = self.prefix if self.model.tape.inside_checkpoint else None
        self.leave(k, v)
        return k, v

    def leave(self, *tensors: Sized) -> None:
        """In the cache; a checkpointed block forks it, and what it adds goes with the fork."""
        if self.cache is not None and self.model.tape.inside_checkpoint:
            self.model.tape.within.extend(tensors)
        elif self.cache is not None:
            self.cache.extend(cached(tensor) for tensor in tensors)

    def _joined(self, before: Sized, own: Sized) -> Sized:
        """With gradients torch.cat, whose backward hands out views; without a buffer that has doubled at least."""
        tape, numel = self.model.tape, before.numel + own.numel
        if self.model.request.trains:
            return tape.record("prefix", [before, own], lambda: tape.new(numel, own.itemsize), passes=True)
        return Sized(numel, own.itemsize, tape.new(max(2 * before.numel, numel), own.itemsize).storage)


class Prompted(Model):
    """A model of lora_lab, with or without a prompt before its texts."""

    def __init__(self, request: Request, ledger: Ledger) -> None:
        super().__init__(request, ledger)
        self.network = self._network()
        count = self.prompt_numbers
        self.start = self.tape.new(count, request.adapter_itemsize, "other") if count else None  # it remembers how it began

    @property
    def blocks(self) -> int:
        """Those with self-attention."""
        return self.arch.layers

    @property
    def text_tokens(self) -> int:
        return self.request.batch_size * self.request.sequence_length

    @property
    def numbers_per_token(self) -> int:
        """What is inserted for a virtual token: a row, or a key and a value for each block."""
        return {None: 0, "prompt": self.arch.hidden, "prefix": 2 * self.blocks * self.arch.kv_width}[self.request.virtual]

    @property
    def prompt_numbers(self) -> int:
        return self.request.num_virtual_tokens * self.numbers_per_token

    def _prompt(self) -> Weight | None:
        """SoftPrompt [P, H]; Prefix [L, 2, P, kv, hd]; nothing where a network makes them."""
        arch, tokens = self.arch, self.request.num_virtual_tokens
        if self.request.virtual is None or self.request.network is not None:
            return None
        if self.request.virtual == "prefix":
            return self.trainable("prefix", arch.kv_heads, arch.head_dim, matrices=2 * self.blocks * tokens)
        return self.trainable("prompt", tokens, arch.hidden)

    def _network(self) -> Network | None:
        if (kind := self.request.network) is None:
            return None
        return Network(self, kind, self.arch.kv_width if kind == "mlp" else self.arch.hidden, self.numbers_per_token)

    @property
    def before_text(self) -> list[Weight]:
        return super().before_text if self.network is None else self.network.weights

    def inserted(self) -> Sized:
        """Prompt.forward: the trained numbers themselves, or what the network makes."""
        if self.network is not None:
            return self.network.forward()
        assert self.prompt is not None
        return self.prompt

    def with_rows(self, embedded: Sized) -> Sized:
        """insert_prompts, all rows with one prompt in front: [B, P + T, H]. F.pad copies even where there is nothing to pad."""
        if self.request.virtual != "prompt":
            return embedded
        tape, batch = self.tape, self.request.batch_size
        rows = ops.cast(tape, ops.copy(tape, "prompt", self.inserted()), embedded.itemsize)
        of_all = Sized(batch * rows.numel, rows.itemsize, rows.storage)
        of_all = tape.record("prompt", [rows], lambda: of_all, passes=batch == 1)
        return tape.record("prompt", [of_all, embedded], lambda: tape.new(of_all.numel + embedded.numel, embedded.itemsize), passes=True)

    def pasts(self, cache: list[Sized] | None = None) -> list[BlockPast]:
        """insert_prefixes, of all blocks."""
        return self.pasts_of(self.blocks, self.prefix_table(self.prefix(), copied=True), self.sequence, cache)

    def prefix(self) -> Sized | None:
        """Prefix.forward."""
        return self.inserted() if self.request.virtual == "prefix" else None

    def prefix_table(self, prefix: Sized | None, copied: bool) -> Sized | None:
        """The prefix in the dtype that products have. copied: its gradient comes turned, and is laid out anew as the weight lies."""
        if prefix is None:
            return None
        table: Sized = self.tape.record("prefix", [prefix], lambda: Sized(prefix.numel, prefix.itemsize, prefix.storage)) if copied else prefix
        return ops.cast(self.tape, table, self.autocast or self.request.weight_itemsize)

    def pasts_of(self, blocks: int, table: Sized | None, length: int, cache: list[Sized] | None) -> list[BlockPast]:
        """Block.pairs: views of the table, in which every row of the batch is the same. length: of the text that these blocks read.

        Without a cache that is to stay each has one that lives as long as what is returned.
        """
        if table is None:
            return [BlockPast(self, None, cache)] * blocks
        tape, batch = self.tape, self.request.batch_size
        one = table.numel // blocks * batch  # keys and values of one block
        states = tape.record("prefix", [table], lambda: Sized(blocks * one, table.itemsize, table.storage), passes=batch == 1)
        waiting = (blocks - 1) * one * table.itemsize
        whole = tape.record("prefix", [states], lambda: Sized(one, table.itemsize, table.storage), scratch=waiting)
        joined = (one // 2 + batch * length * self.arch.kv_width) * table.itemsize  # the gradient of v, beside that of k
        return [BlockPast(self, self._pair(whole, joined), [] if cache is None else cache) for _ in range(blocks)]

    def _pair(self, whole: Sized, joined: int) -> tuple[Sized, Sized]:
        tape = self.tape
        pair = tape.record("prefix", [whole], lambda: Sized(whole.numel, whole.itemsize, whole.storage), scratch=joined)
        k, v = (tape.record("prefix", [pair], lambda: Sized(pair.numel // 2, pair.itemsize, pair.storage), passes=True) for _ in "kv")
        return k, v
