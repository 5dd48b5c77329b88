"""What this project's own T5, FLAN-T5 and mT5 keep, call by call: lora_lab/models/t5.py and seq2seq.py on the tape.

The encoder reads `sequence_length` tokens, the decoder writes `target_length`. Each stack makes one bias of positions, which all its blocks add to
their scores; where it trains (and where weights are dropped out) the CPU has no fused attention for it.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.t5 import T5
from ..operations import Weight
from ..request import Request
from ..tape import Ledger, Sized
from .activations import keeps_result
from .attention_lora_lab import Scores, attend
from .causal_lora_lab import labelled_loss
from .layers_lora_lab import dropped, gated, lora_linear, rms_norm
from .prompts_lora_lab import BlockPast, Prompted

BUCKET_BYTES = 45  # per pair of positions, while their buckets are computed: five tensors of int64, one of float32, and a truth value


class LoraLabT5(Prompted):
    """T5ForConditionalGeneration in training mode, with labels; T5EncoderModel."""

    arch: T5
    embedding_path = "shared"

    def __init__(self, request: Request, ledger: Ledger) -> None:
        super().__init__(request, ledger)
        _check(request, self.arch)

    def _weight(self, name: str, rows: int, columns: int, quantized: bool) -> Weight:
        """`quantize` leaves wo as it is, and where the rest is float16 it is stored in float32."""
        last = name.endswith(".wo.weight")
        if not last or not self.half_precision:
            return super()._weight(name, rows, columns, quantized and not last)
        leaf = self.request.leaf() if self.request.method == "full" else None
        return Weight(self.ledger, name, rows, columns, 4, leaf, self.request.parallel.weight_shards)

    @property
    def half_precision(self) -> bool:
        return self.request.precision.name == "fp16-mixed"

    def batch(self) -> tuple[Sized, Sized]:
        """ids [B, S], labels [B, T of the decoder]."""
        ids, _ = super().batch()
        return ids, self.ids(self.request.batch_size * self.request.target_length)

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        """Seq2SeqLM.forward: both inputs are embedded before the encoder runs."""
        shifted, prefix = self.ids(labels.numel), self.prefix()
        table, source = self.prefix_table(prefix, copied=False), self.with_rows(self.embed(ids))
        if table is None:
            target = self.embed(shifted)
            encoded = self.encode(source, None)
        else:  # the encoder reads before the model is called
            encoded = self.encode(source, table)
            del source, prefix
            target = self.embed(shifted)
        self.hold(encoded)
        pasts = self.pasts_in("decoder", target, table)
        del table
        hidden = self.decode(target, encoded, pasts)
        self.ledger.enter("loss")
        return labelled_loss(self, hidden, labels, labels.numel)

    def generation_pass(self) -> None:
        """The whole input through the encoder, and the first token of the decoder, which leaves keys and values of both attentions."""
        self.tape = self._tape()
        cache, prefix = list[Sized](), self.prefix()
        table, source = self.prefix_table(prefix, copied=False), self.with_rows(self.embed(self.ids(self.text_tokens)))
        x = self.encode(source, table)
        del source, prefix
        if self.arch.task == "ForConditionalGeneration":
            first = self.embed(self.ids(self.request.batch_size))
            pasts = self.pasts_in("decoder", first, table, cache)
            del table
            x = self.decode(first, x, pasts)
            self.ledger.enter("logits")
            ops.linear(self.tape, x, self.head, part="logits")

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        """The encoder's."""
        embedded = self.with_rows(self.embed(ids))
        return self.encode(embedded, self.prefix_table(self.prefix(), copied=False))

    def embed(self, ids: Sized) -> Sized:
        embedded = ops.embedding(self.tape, ids, self.weights["shared"])
        return self.source(embedded) if self.request.method == "frozen" else embedded

    @property
    def blocks(self) -> int:
        return self.arch.layers + self.arch.decoder_layers

    def pasts_in(self, stack: str, x: Sized, table: Sized | None, cache: list[Sized] | None = None) -> list[BlockPast]:
        """The stack's own layers of the prefix, whose slice has a gradient as large as all of it. table: of both stacks, or None."""
        blocks = self.arch.layers if stack == "encoder" else self.arch.decoder_layers
        if table is None:
            return self.pasts_of(blocks, None, 0, cache)
        count = table.numel // self.blocks * blocks
        own = self.tape.record("prefix", [table], lambda: Sized(count, table.itemsize, table.storage))
        return self.pasts_of(blocks, own, self.length(x), cache)

    def length(self, x: Sized) -> int:
        return x.numel // self.arch.hidden // self.request.batch_size

    def encode(self, x: Sized, table: Sized | None) -> Sized:
        return Stack(self, "encoder", self.pasts_in("encoder", x, table)).forward(x)

    def decode(self, x: Sized, encoded: Sized, pasts: list[BlockPast]) -> Sized:
        hidden = Stack(self, "decoder", pasts).forward(x, encoded)
        return ops.elementwise(self.tape, "scale", hidden) if self.arch.scaled_head else hidden

    def norm(self, x: Sized, path: str) -> Sized:
        """T5LayerNorm: its weight's dtype where that has 16 bit."""
        itemsize = self.weights[path].itemsize
        return rms_norm(self, x, path, 2 if itemsize == 2 else None)


class Stack:
    """T5Stack. pasts: of its blocks."""

    def __init__(self, model: LoraLabT5, name: str, pasts: list[BlockPast]) -> None:
        self.model, self.tape, self.name, self.pasts, self.decodes = model, model.tape, name, pasts, name == "decoder"
        self.first = model.arch.layers if self.decodes else 0  # checkpointing counts the blocks of both

    def forward(self, x: Sized, encoded: Sized | None = None) -> Sized:
        model, mask = self.model, self.position_bias(x)
        x = dropped(model, x, model.arch.dropout)
        for layer, past in enumerate(self.pasts):
            block, given = Block(model, f"{self.name}.block.{layer}.layer", past), [mask, *([] if encoded is None else [encoded])]
            x = model.run_block(self.first + layer, block.forward, x, *given)
        return dropped(model, model.norm(x, f"{self.name}.final_layer_norm"), model.arch.dropout)

    def position_bias(self, x: Sized) -> Sized:
        """position_bias, [1, a, T, P + T]: a number for each distance, in a decoder -infinity for what comes later, where the truth values are
        kept."""
        model, tape = self.model, self.tape
        length = model.length(x)
        pairs = length * (length + model.request.prefix)
        buckets = tape.record("buckets", [], lambda: model.ids(pairs), busy=(BUCKET_BYTES - 8) * pairs)
        bias = ops.embedding(tape, buckets, model.weights[f"{self.name}.block.0.layer.0.SelfAttention.relative_attention_bias"])
        bias = ops.cast(tape, bias, model.autocast or x.itemsize)
        if not self.decodes or length == 1:
            return bias
        return ops.elementwise(tape, "position bias", bias, keeps=[tape.new(pairs, 1, "other")], busy=pairs)


class Block:
    """T5Block: its T5Layers, with T5Attention and T5MLP."""

    def __init__(self, model: LoraLabT5, path: str, past: BlockPast) -> None:
        self.model, self.tape, self.path, self.past = model, model.tape, path, past

    def forward(self, x: Sized, mask: Sized, encoded: Sized | None = None) -> Sized:
        x = self.added(x, self.attention("0.SelfAttention", self.norm(x, 0), mask))
        if encoded is not None:
            x = self.added(x, self.attention("1.EncDecAttention", self.norm(x, 1), None, encoded))
        last = 1 if encoded is None else 2
        return self.added(x, self.mlp(self.norm(x, last), f"{self.path}.{last}.DenseReluDense"))

    def norm(self, x: Sized, layer: int) -> Sized:
        return self.model.norm(x, f"{self.path}.{layer}.layer_norm")

    def added(self, x: Sized, y: Sized) -> Sized:
        """In float16 kept from running over."""
        x = ops.add(self.tape, "residual", x, dropped(self.model, y, self.model.arch.dropout))
        return ops.elementwise(self.tape, "clamp", x, keeps=[x]) if self.model.half_precision and x.itemsize == 2 else x

    def attention(self, name: str, x: Sized, mask: Sized | None, source: Sized | None = None) -> Sized:
        path, arch = f"{self.path}.{name}", self.model.arch
        k, v = (lora_linear(self.model, source or x, f"{path}.{part}") for part in "kv")
        if source is None:
            k, v = self.past.append(k, v)
        else:
            self.past.leave(k, v)
        q = lora_linear(self.model, x, f"{path}.q")
        y = attend(self.model, q, k, v, Scores(mask, causal=False, dropout=arch.attention_dropout))
        return lora_linear(self.model, y, f"{path}.o")

    def mlp(self, x: Sized, path: str) -> Sized:
        if self.model.arch.gated:
            gate, up = (lora_linear(self.model, x, f"{path}.{name}") for name in ("wi_0", "wi_1"))
            product = gated(self.tape, "gelu", gate, up)
            del gate, up
        else:
            product = keeps_result(self.tape, lora_linear(self.model, x, f"{path}.wi"))
        return self.out(dropped(self.model, product, self.model.arch.dropout), f"{path}.wo")

    def out(self, x: Sized, path: str) -> Sized:
        """Behind float16 in float32, outside autocast."""
        model, autocast = self.model, self.model.autocast
        if not model.half_precision:
            return lora_linear(model, x, path)
        x, model.autocast = ops.cast(self.tape, x, 4), None
        try:
            return lora_linear(model, x, path)
        finally:  # a recomputation may end in there
            model.autocast = autocast


def _check(request: Request, arch: T5) -> None:
    """What T5 has no use for, or what is not written here."""
    if request.precision.name == "fp16":
        raise MemoryMathError(f"precision='fp16' with {arch.name} is not modelled with implementation='lora_lab', which has 'fp16-mixed'")
    if arch.activation not in (("gelu_new", "silu") if arch.gated else ("relu",)):
        raise MemoryMathError(f"{arch.name}: activation={arch.activation!r} is not modelled with implementation='lora_lab': T5s have relu, or gates")
    if request.trains and arch.task == "EncoderModel":
        raise MemoryMathError(f"{arch.name} is an encoder alone, which has no loss: use method='inference'")
