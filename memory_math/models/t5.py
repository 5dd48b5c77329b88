"""What transformers' T5 keeps, call by call: `modeling_t5.py` of transformers 5.23 on the tape; 1.0, gated 1.1 and FLAN, mT5.

The encoder reads `sequence_length` tokens, the decoder writes `target_length`. The first block of a stack makes the position bias that all its
blocks add to their scores; cross attention adds zeros, which want a gradient under checkpointing. Training without checkpointing fills the
cache of keys and values, too, as use_cache is True unless it is turned off. In fp16 the last matrix of the MLP is kept in float32.
Prefix tuning puts its keys and values before those of the decoder's self-attention, and of no other.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.t5 import T5
from ..operations import QuantizedWeight, Weight
from ..request import Request
from ..tape import Leaf, Ledger, Sized
from .activations import activate, power
from .attention_dropout import Extras, attend
from .base import Model, cached
from .labelled_loss import labelled_loss
from .peft_layers import LayerPrefix, linear

BUCKET_BYTES = {False: 49, True: 41}  # per pair of positions, while their buckets are computed: int64 in six tensors, one less for the past alone


class TransformersT5(Model):
    """T5ForConditionalGeneration with labels, or T5EncoderModel."""

    arch: T5

    def __init__(self, request: Request, ledger: Ledger) -> None:
        _check(request)
        super().__init__(request, ledger)
        self.caches = not request.trains or request.gradient_checkpointing in (False, "attention")

    def _weight(self, name: str, rows: int, columns: int, quantized: bool) -> Weight:
        """_keep_in_fp32_modules: from_pretrained leaves `wo` in float32 when the rest is float16, and quantises it in no case."""
        weight = super()._weight(name, rows, columns, quantized and not name.endswith(".wo.weight"))
        if not name.endswith(".wo.weight") or not self.half_precision or weight.itemsize != 2:
            return weight
        return Weight(self.ledger, name, rows, columns, 4, weight.leaf, self.request.parallel.weight_shards)

    @property
    def half_precision(self) -> bool:
        return self.request.precision.name.startswith("fp16")

    def _prompt(self) -> Weight | None:
        """PEFT makes a prompt for each of the two stacks, and uses the encoder's (P-tuning apart, num_transformer_submodules is 2)."""
        if self.request.method != "prompt":
            return super()._prompt()
        return self.trainable("prompt_encoder", 2 * self.request.num_virtual_tokens, self.arch.hidden)

    def batch(self) -> tuple[Sized, Sized]:
        """ids [B, T], labels [B, T of the decoder]."""
        ids, _ = super().batch()
        return ids, self.ids(self.request.batch_size * self.request.target_length)

    def loss(self, ids: Sized, labels: Sized) -> Sized:
        prefix = Prefix(self) if self.request.method == "prefix" else None
        encoded = self.hidden_states(ids)
        self.hold(encoded)
        if self.arch.task != "EncoderModel":
            encoded = self.decode(self.ids(labels.numel), encoded, prefix)  # the labels, shifted right
        del prefix
        self.ledger.enter("loss")
        return labelled_loss(self, encoded, self.logits, labels)

    def generation_pass(self) -> None:
        """The whole input through the encoder, and the first token of the decoder, which leaves keys and values of both attentions."""
        self.tape = self._tape()
        x = self.hidden_states(self.ids(self.tokens))
        if self.arch.decoder_layers:
            x = self.decode(self.ids(self.request.batch_size), x)
        self.ledger.enter("logits")
        if self.arch.task == "ForConditionalGeneration":
            self.logits(x)
        self.held.clear()

    def hidden_states(self, ids: Sized, cache: list[Sized] | None = None) -> Sized:
        """The encoder's."""
        embedded = self.with_prompt(self.needed(self.embed(ids)))
        return Stack(self, "encoder", self.arch.layers).forward(embedded)

    def decode(self, ids: Sized, encoded: Sized, prefix: Prefix | None = None) -> Sized:
        return Stack(self, "decoder", self.arch.decoder_layers, prefix).forward(self.needed(self.embed(ids)), encoded)

    def embed(self, ids: Sized) -> Sized:
        return ops.embedding(self.tape, ids, self.weights["shared"])

    def with_prompt(self, embedded: Sized) -> Sized:
        """PeftModelForSeq2SeqLM.forward: both prompts are looked up, the first P vectors are laid before the encoder's."""
        if self.prompt is None or self.request.method != "prompt":
            return embedded
        tape, prompt, batch = self.tape, self.prompt, self.request.batch_size
        indices = self.ids(prompt.rows)
        vectors = tape.record("prompt_encoder", [prompt], lambda: tape.new(batch * prompt.numel, prompt.itemsize), keeps=[indices])
        vectors = ops.cast(tape, vectors, embedded.itemsize)
        first = tape.record("prompt", [vectors], lambda: Sized(vectors.numel // 2, vectors.itemsize, vectors.storage))
        x = tape.record("prompt", [first, embedded], lambda: tape.new(first.numel + embedded.numel, embedded.itemsize))
        self.hold(x, vectors)
        return x

    def logits(self, hidden: Sized) -> Sized:
        if self.arch.scaled_head:
            hidden = ops.elementwise(self.tape, "scale", hidden)
        head = self.weights["shared" if self.arch.tied else "lm_head"]
        return ops.linear(self.tape, hidden, head, autocast=self.autocast, part="logits")

    def norm(self, x: Sized, path: str) -> Sized:
        """T5LayerNorm: the variance in float32; x times its root's inverse, cast where the weight is of 16 bit, times the weight."""
        tape, weight = self.tape, self.weights[path]
        vectors = x.numel // weight.numel
        squares = power(tape, path, ops.cast(tape, x, 4))
        mean = tape.record(path, [squares], lambda: tape.new(vectors, 4))
        del squares
        factor = tape.record(path, [mean], lambda: tape.new(vectors, 4), keeps_after=lambda y: [y])
        x = ops.multiply(tape, path, x, factor)
        return ops.multiply(tape, path, weight, ops.cast(tape, x, 2) if weight.itemsize == 2 else x)

    def dropped(self, x: Sized) -> Sized:
        return ops.dropout(self.tape, x) if self.arch.dropout and self.request.trains else x

    def clamped(self, x: Sized) -> Sized:
        """float16 is kept from running over, between two numbers that are tensors."""
        if not self.half_precision or x.itemsize != 2:
            return x
        return ops.elementwise(self.tape, "clamp", x, keeps=[x], busy=x.numel)


class Prefix:
    """PeftModel.get_prompt for an encoder-decoder: the vectors [B, P, 2 * L * kv] in the model's dtype, laid end to end with themselves, and cut into
    keys and values of the decoder's blocks and of a cross attention, which makes its own instead."""

    def __init__(self, model: TransformersT5) -> None:
        assert model.prompt is not None
        tape, prompt, batch, stored = model.tape, model.prompt, model.request.batch_size, model.activation_itemsize
        indices = model.ids(2 * prompt.rows)  # as many as two prompts have, of which the first half is looked up
        vectors = tape.record("prompt_encoder", [prompt], lambda: tape.new(batch * prompt.numel, prompt.itemsize), keeps=[indices])
        vectors = ops.cast(tape, vectors, stored)
        twice = tape.record("prefix", [vectors, vectors], lambda: tape.new(2 * vectors.numel, stored))
        self.layers = [LayerPrefix(model, twice, None, parts=4 * model.arch.layers) for _ in range(model.arch.layers)]


class Stack:
    """T5Stack."""

    def __init__(self, model: TransformersT5, name: str, layers: int, prefix: Prefix | None = None) -> None:
        self.model, self.name, self.layers, self.decodes, self.prefix = model, name, layers, name == "decoder", prefix

    def forward(self, embedded: Sized, encoded: Sized | None = None) -> Sized:
        model, shared = self.model, Shared(encoded=encoded, mask=self.causal_mask(embedded))
        x = model.dropped(embedded)
        for layer in range(self.layers):
            x = Block(model, f"{self.name}.block.{layer}", shared, self.prefix.layers[layer] if self.prefix else None).run(layer, x)
        return model.dropped(model.norm(x, f"{self.name}.final_layer_norm"))

    def causal_mask(self, embedded: Sized) -> Sized | None:
        """[B, 1, T, P + T]: numbers for eager attention; for sdpa, where there is a prefix, yes and no, stored for one row."""
        request, tape, tokens = self.model.request, self.model.tape, embedded.numel // self.model.arch.hidden
        pairs = tokens * (request.prefix + tokens // request.batch_size)
        if not self.decodes or (request.attention != "eager" and self.prefix is None):
            return None
        if request.attention == "eager":
            return tape.new(pairs, embedded.itemsize, "other")
        return Sized(pairs, 1, tape.new(pairs // request.batch_size, 1, "other").storage)


class Shared:
    """What every block of a stack is given beside its input, and may leave for the next."""

    NAMES = ("mask", "bias", "encoded", "zeros")

    def __init__(self, **tensors: Sized | None) -> None:
        self.mask, self.bias, self.encoded, self.zeros = (tensors.get(name) for name in self.NAMES)

    def given(self) -> dict[str, Sized]:
        return {name: tensor for name in self.NAMES if (tensor := getattr(self, name)) is not None}


class Block:
    """T5Block."""

    def __init__(self, model: TransformersT5, path: str, shared: Shared, prefix: LayerPrefix | None = None) -> None:
        self.model, self.tape, self.path, self.decodes, self.prefix = model, model.tape, path, path.startswith("decoder"), prefix
        self.shared: Shared | None = shared

    def run(self, number: int, x: Sized) -> Sized:
        """Checkpointed, everything that is given is kept; and the biases that the first run leaves are the next block's."""
        assert self.shared is not None
        names, tensors = list(self.shared.given()), list(self.shared.given().values())
        return self.model.run_block(number, lambda x, *given: self.forward(x, Shared(**dict(zip(names, given, strict=True)))), x, *tensors)

    def forward(self, x: Sized, given: Shared) -> Sized:
        x = self.model.clamped(self.attention_layer(x, f"{self.path}.layer.0", "SelfAttention", None, given))
        if given.encoded is not None:
            x = self.model.clamped(self.attention_layer(x, f"{self.path}.layer.1", "EncDecAttention", given.encoded, given))
        x = self.model.clamped(self.feed_forward(x))
        if self.shared is not None:
            self.shared.bias, self.shared.zeros, self.shared = given.bias, given.zeros, None
        return x

    def attention_layer(self, x: Sized, path: str, name: str, encoded: Sized | None, given: Shared) -> Sized:
        """T5LayerSelfAttention, T5LayerCrossAttention."""
        normed = self.model.norm(x, f"{path}.layer_norm")
        y, weights = self.attention(f"{path}.{name}", normed, encoded or normed, given)
        x = ops.add(self.tape, "residual", x, self.model.dropped(y))
        del weights, normed
        return x

    def attention(self, path: str, x: Sized, source: Sized, given: Shared) -> tuple[Sized, Sized | None]:
        """T5Attention, over its own input or over another source; the first of a stack makes the bias."""
        q, k, v, cached = self.projected(path, x, source)
        if source is not x:
            given.zeros = given.zeros or self.zeros(q, k)
            mixed, weights = attend(self.model, q, k, v, Extras(given.zeros, in_order=cached))
        else:
            length = x.numel // self.model.arch.hidden // self.model.request.batch_size
            pairs = length * (length + (self.model.request.prefix if self.prefix else 0))
            given.bias = given.bias or self.position_bias(f"{path}.relative_attention_bias", pairs)
            causal = pairs if self.decodes and length > 1 else 0
            mixed, weights = attend(self.model, q, k, v, Extras(self.added(given.bias, causal, given.mask), given.mask, cached))
        mixed = linear(self.model, mixed, f"{path}.o")
        del q, k, v
        return mixed, weights

    def projected(self, path: str, x: Sized, source: Sized) -> tuple[Sized, Sized, Sized, bool]:
        """q of x, k and v of the source; and whether these come out of the cache, into which DynamicCache.update has copied them."""
        q = linear(self.model, x, f"{path}.q")
        k, v = (linear(self.model, source, f"{path}.{name}") for name in "kv")
        if not self.model.caches or not self.decodes:
            return q, k, v, False
        if self.prefix is not None and source is x:
            k, v, _ = self.prefix.before(k, v)
        else:
            k, v = (ops.copy(self.tape, "cache", tensor) for tensor in (k, v))
        self.model.hold(*(tensor if self.model.request.trains else cached(tensor) for tensor in (k, v)))
        return q, k, v, True

    def position_bias(self, path: str, pairs: int) -> Sized:
        """compute_bias, [1, a, T, P + T]: the buckets are kept where their vectors train."""
        tape, table = self.tape, self.model.weights[path]
        tape.new(BUCKET_BYTES[self.decodes] * pairs, 1)
        return ops.embedding(tape, self.model.ids(pairs), table)

    def added(self, bias: Sized, causal: int, mask: Sized | None) -> Sized:
        """create_position_bias_mask: the kernel takes a bias that is laid out in order, and where it is causal for itself, the future blotted out;
        under a mask it is one for every row."""
        if self.model.request.attention == "eager":
            return bias
        if mask is not None:
            return self.tape.new(self.model.request.batch_size * bias.numel, bias.itemsize)
        if causal:
            bias = ops.elementwise(self.tape, "position bias", bias, keeps=[self.tape.new(causal, 1)])
        return ops.copy(self.tape, "position bias", bias)

    def zeros(self, q: Sized, k: Sized) -> Sized:
        """The bias of cross attention, [1, a, Tq, Tk]; gradient checkpointing makes it require a gradient."""
        width, batch = self.model.arch.query_width, self.model.request.batch_size
        zeros = self.tape.new(self.model.arch.heads * (q.numel // width // batch) * (k.numel // width // batch), q.itemsize)
        zeros.node = None if self.model.caches else Leaf()
        return zeros

    def feed_forward(self, x: Sized) -> Sized:
        """T5LayerFF."""
        path = f"{self.path}.layer.{2 if self.decodes else 1}"
        normed = self.model.norm(x, f"{path}.layer_norm")
        y = self.model.dropped(self.dense(normed, f"{path}.DenseReluDense"))
        del normed
        return ops.add(self.tape, "residual", x, y)

    def dense(self, x: Sized, path: str) -> Sized:
        """T5DenseActDense, T5DenseGatedActDense."""
        arch, wo = self.model.arch, self.model.weights[f"{path}.wo"]
        y = activate(self.tape, arch.activation, linear(self.model, x, f"{path}.{'wi_0' if arch.gated else 'wi'}"))
        factors = [y, linear(self.model, x, f"{path}.wi_1")] if arch.gated else []
        if factors:
            y = ops.multiply(self.tape, "gate * up", *factors)
        y = self.model.dropped(y)
        if not isinstance(wo, QuantizedWeight):
            y = ops.cast(self.tape, y, wo.itemsize)
        y = linear(self.model, y, f"{path}.wo")
        del factors
        return y


def _check(request: Request) -> None:
    """What T5 has no use for, or what is not written here."""
    name = request.architecture.name
    if request.method == "prefix":
        _check_prefix(request)
    if request.attention == "flash":
        raise MemoryMathError(f"attention='flash' with {name}: a position bias is something that kernel cannot add; use 'sdpa'")
    if request.compile:
        raise MemoryMathError(f"compile=True is not modelled for {name}: leave it at False")
    if request.trains and request.loss != "none" and request.architecture.task == "EncoderModel":
        raise MemoryMathError(f"{name} is an encoder alone, which has no loss: use method='inference' or loss='none'")


def _check_prefix(request: Request) -> None:
    """PEFT's prefix is of the encoder's blocks, and as wide as d_model."""
    arch = request.architecture
    assert isinstance(arch, T5)
    width = arch.query_width * request.parallel.tensor_parallel
    if arch.task != "ForConditionalGeneration" or arch.decoder_layers != arch.layers or width != arch.hidden:
        raise MemoryMathError(
            f"method='prefix' with {arch.name}: PEFT 0.21 has that for two stacks of one height, here {arch.layers} and "
            f"{arch.decoder_layers} blocks, with heads that are together as wide as d_model, here {width} and {arch.hidden}: use 'prompt' or 'lora'"
        )
