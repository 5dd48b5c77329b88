"""What this project's own Llama keeps, call by call: lora_lab/models/blocks.py, llama.py, losses.py and lora_lab/layers.py on the tape.

RMSNorm and SwiGLU are autograd Functions that keep their inputs alone, and the loss makes its gradients while it has the logits. Every
function here mirrors one there; ``busy`` and ``scratch`` count the local tensors of its forward and its backward. Rows are taken to be
of one length, so that attention needs no mask.
"""

from __future__ import annotations

from .. import operations as ops
from ..tape import Sized, Tape
from .base import Adapter, Model, cached

CHUNK_BYTES = 32 * 2**20  # lora_lab.models.losses.CHUNK_BYTES, held equal by a test
ROWS_AT_ONCE = 2**22  # lora_lab.variants.ROWS_AT_ONCE, as well


class LoraLabLlama(Model):
    """LlamaForCausalLM in training mode, with labels."""

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        embedded = ops.embedding(self.tape, ids, self.weights["model.embed_tokens"])
        hidden = self.blocks(embedded)  # forward holds on to both names until it returns
        self.ledger.enter("loss")
        return self.next_token_loss(hidden, labels)

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        embedded = ops.embedding(self.tape, ids, self.weights["model.embed_tokens"])
        return self.blocks(embedded, cache)

    def blocks(self, x: Sized, cache: list[Sized] | None = None) -> Sized:
        """LlamaModel: x [B, T, H] through every block and the last norm."""
        x = self.source(x) if self.request.method == "frozen" else x
        rotary = self.tape.new(self.sequence * self.arch.head_dim, 4, "other")  # cos and sin of half a head each, float32
        for layer in range(self.arch.layers):
            block = Block(self, f"model.layers.{layer}", rotary, cache)
            x = self.run_block(layer, block.forward, x)
        return rms_norm(self, x, "model.norm")

    def next_token_loss(self, hidden: Sized, labels: Sized) -> Sized:
        """The labelled positions picked out, then `LinearCrossEntropy`."""
        tape, count = self.tape, self.request.label_tokens
        positions, row = self.tokens - self.request.batch_size, self.arch.hidden * hidden.itemsize
        chosen, labels = tape.new(positions, 1, "other"), tape.new(count, labels.itemsize, "other")
        selected = tape.record(  # backward of the selection makes [B, T - 1, H], backward of the slice then [B, T, H]
            "loss positions", [hidden], lambda: tape.new(count * self.arch.hidden, hidden.itemsize), keeps=[chosen], scratch=positions * row
        )
        return linear_cross_entropy(self, selected, count)


class Block:
    """LlamaDecoderLayer with its Attention and GatedMLP."""

    def __init__(self, model: LoraLabLlama, path: str, rotary: Sized, cache: list[Sized] | None) -> None:
        self.model, self.tape, self.path, self.rotary, self.cache = model, model.tape, path, rotary, cache

    def forward(self, x: Sized) -> Sized:
        x = ops.add(self.tape, "residual", x, self.attention(rms_norm(self.model, x, f"{self.path}.input_layernorm")))
        return ops.add(self.tape, "residual", x, self.mlp(rms_norm(self.model, x, f"{self.path}.post_attention_layernorm")))

    def attention(self, x: Sized) -> Sized:
        q, k, v = (lora_linear(self.model, x, f"{self.path}.self_attn.{name}_proj") for name in "qkv")
        angles = ops.cast(self.tape, self.rotary, q.itemsize)
        q, k = rotate(self.tape, q, angles), rotate(self.tape, k, angles)
        if self.cache is not None:
            self.cache += [cached(k), cached(v)]
        y = ops.scaled_dot_product_attention(self.tape, q, k, v, self.model.tokens * self.model.arch.heads)
        return lora_linear(self.model, y, f"{self.path}.self_attn.o_proj")

    def mlp(self, x: Sized) -> Sized:
        gate, up = (lora_linear(self.model, x, f"{self.path}.mlp.{name}_proj") for name in ("gate", "up"))
        product = swiglu(self.tape, gate, up)
        del gate, up
        return lora_linear(self.model, product, f"{self.path}.mlp.down_proj")


def rms_norm(model: Model, x: Sized, path: str) -> Sized:
    """RMSNormFunction: keeps x (and the weight, which is there anyway).

    forward: x in float32 and its square or its normalised copy. backward: normalised, the gradient in float32, g = grad * weight,
    and two steps of ``inverse_rms * (g - normalised * mean)``.
    """
    weight, itemsize = model.weights[path], model.autocast or x.itemsize
    full = 4 * x.numel
    widened = full if x.itemsize < 4 else 0
    scratch = 3 * full + (0 if itemsize == 4 else full) + (full - x.nbytes)
    return model.tape.record(
        path, [x, weight], lambda: model.tape.new(x.numel, itemsize), keeps_after=lambda y: [x], busy=full + widened, scratch=scratch
    )


def swiglu(tape: Tape, gate: Sized, up: Sized) -> Sized:
    """SwiGLUFunction: keeps gate and up; silu(gate) is made again in backward."""
    size, kept = gate.nbytes, [gate, up]

    def product() -> Sized:
        return tape.new(gate.numel, gate.itemsize)

    return tape.record("silu(gate) * up", kept, product, keeps_after=lambda y: kept, busy=size, scratch=size)


def rotate(tape: Tape, x: Sized, angles: Sized) -> Sized:
    """rotate: products of halves; only cos and sin are kept."""
    return tape.record("rotary", [x], lambda: tape.new(x.numel, x.itemsize), keeps=[angles], busy=x.nbytes, scratch=x.nbytes)


def lora_linear(model: Model, x: Sized, path: str) -> Sized:
    """LoRA.forward: ``W x + B (scaling * A x)``, with the small A and B cast to x's dtype."""
    tape = model.tape
    x = remember_selection(model, x) if path in model.adapters else x
    y = ops.linear(tape, x, model.weights[path], model.weights.get(f"{path}.bias"), model.autocast)
    if path not in model.adapters:
        return y
    adapter = model.adapters[path]
    update = dora_update(model, x, y, path, adapter) if adapter.magnitude else lora_update(model, x, adapter)
    return ops.add(tape, path, y, update)


def lora_update(model: Model, x: Sized, adapter: Adapter) -> Sized:
    """``B (scaling * A x)``, with dropout the Function that keeps bits."""
    tape, A, B = model.tape, adapter.A, adapter.B
    A_copy, B_copy = ops.cast(tape, A, x.itemsize), ops.cast(tape, B, x.itemsize)
    if model.request.dropout:
        return dropped_update(tape, x, A_copy, B_copy, x.numel // A.columns * B.rows)
    low = ops.elementwise(tape, "scaling", ops.linear(tape, x, A, copy=A_copy))
    return ops.linear(tape, low, B, copy=B_copy)


def dora_update(model: Model, x: Sized, y: Sized, path: str, adapter: Adapter) -> Sized:
    """DoRA.update: ``(m / norm - 1) * (y - bias) + (m / norm) * lora_update``; the norm is a constant, taken in blocks of W's rows."""
    tape, weight, magnitude = model.tape, model.weights[path], adapter.magnitude
    assert magnitude is not None
    whole = weight.dequantized if isinstance(weight, ops.QuantizedWeight) else 0
    tape.record(f"{path}.norm", [], lambda: tape.new(weight.rows, 4), busy=whole + 3 * 4 * min(weight.numel, ROWS_AT_ONCE))
    ratio = tape.record("magnitude", [magnitude], lambda: tape.new(weight.rows, 4), keeps_after=lambda _: [tape.new(weight.rows, 4)])
    frozen = ops.elementwise(tape, "dora", y) if f"{path}.bias" in model.weights else y
    less_one = ops.cast(tape, ops.elementwise(tape, "magnitude", ratio), y.itemsize)
    rest = ops.multiply(tape, "dora", less_one, frozen)
    update = ops.multiply(tape, "dora", ops.cast(tape, ratio, y.itemsize), lora_update(model, x, adapter))
    return ops.add(tape, "dora", rest, update)


def dropped_update(tape: Tape, x: Sized, A: Sized, B: Sized, numel: int) -> Sized:
    """lora_lab.dropout: keeps x, A, B and a bit per element of x; the dropped x exists inside, forward and backward."""

    def keeps(y: Sized) -> list[Sized]:
        return [x, A, B, tape.new(-(-x.numel // 8), 1)]

    inside = 2 * x.nbytes + 2 * x.numel  # the dropped x beside the grown one, the mask as bytes
    return tape.record("dropout", [x, A, B], lambda: tape.new(numel, x.itemsize), keeps_after=keeps, busy=inside, scratch=inside + x.nbytes)


def remember_selection(model: Model, x: Sized) -> Sized:
    """Under checkpointing a LoRA layer keeps one int64 that says which adapters its forward had."""
    if not model.tape.inside_checkpoint:
        return x
    return model.tape.record("selection", [x], lambda: x, keeps_after=lambda _: [model.tape.new(1, 8, "other")], passes=True)


def linear_cross_entropy(model: Model, hidden: Sized, count: int) -> Sized:
    """LinearCrossEntropy: keeps d loss / d hidden, and d loss / d weight where the head trains; logits live for one chunk.

    backward multiplies both by the gradient of the loss, into new tensors.
    """
    tape, head = model.tape, model.head
    kept: list[Sized] = []

    def forward() -> Sized:
        if hidden.needs_grad:
            kept.append(tape.new(hidden.numel, hidden.itemsize))
        if head.needs_grad:
            kept.append(tape.new(head.numel, head.itemsize, "gradients"))
        _chunks(model, hidden, count)
        return tape.new(1, 4)

    return tape.record("loss", [hidden, head], forward, keeps_after=lambda _: kept)


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
