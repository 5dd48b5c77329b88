"""What PEFT 0.21 puts around a model, call by call: LoRA and DoRA on a linear layer, soft prompts before the first block.

Every function mirrors the forward of one PEFT class (peft/tuners/lora/layer.py, dora.py; peft_model.py).
"""

from __future__ import annotations

from .. import operations as ops
from ..operations import QuantizedWeight
from ..tape import Sized
from .base import Adapter, Model


def linear(model: Model, x: Sized, path: str) -> Sized:
    """nn.Linear, and where it is adapted what PEFT adds: x in the adapter's dtype, the update, the sum, and a cast back."""
    y = model.linear(x, path)
    if path not in model.adapters:
        return y
    adapter, itemsize = model.adapters[path], y.itemsize
    x = ops.cast(model.tape, x, adapter.A.itemsize)
    if adapter.magnitude is not None:
        update = dora(model, x, y, path, adapter)
    else:
        update = ops.elementwise(model.tape, "scaling", low_rank(model, dropped(model, x), adapter))
    y = ops.add(model.tape, path, y, update)
    del update
    return ops.cast(model.tape, y, itemsize)


def dropped(model: Model, x: Sized) -> Sized:
    return ops.dropout(model.tape, x) if model.request.dropout else x


def low_rank(model: Model, x: Sized, adapter: Adapter) -> Sized:
    """B A x."""
    low = ops.linear(model.tape, x, adapter.A, autocast=model.autocast)
    return ops.linear(model.tape, low, adapter.B, autocast=model.autocast)


def dora(model: Model, x: Sized, y: Sized, path: str, adapter: Adapter) -> Sized:
    """DoraLinearLayer: ``(m / ||W + s B A|| - 1) * W x + m / ||W + s B A|| * s * B A x``.

    x: [T, in] in the adapter's dtype. y: what the frozen layer made of x. With dropout W x is computed once more, from the dropped x.
    """
    tape, magnitude = model.tape, adapter.magnitude
    assert magnitude is not None
    held = _weight_norm(model, x, path, adapter)
    scale = tape.record("magnitude", [magnitude], lambda: tape.new(magnitude.numel, 4), keeps=[tape.new(magnitude.numel, 4)])
    if model.request.dropout:
        x = dropped(model, x)
        y = _frozen_again(model, x, path)
    update = low_rank(model, x, adapter)
    if not model.request.dropout and f"{path}.bias" in model.weights:
        y = ops.elementwise(tape, "dora", y)  # the bias is taken off again
    less_one = ops.elementwise(tape, "magnitude", scale)
    rest = ops.multiply(tape, "dora", less_one, y)
    update = ops.elementwise(tape, "scaling", ops.multiply(tape, "dora", scale, update))
    del held
    return ops.add(tape, "dora", rest, update)


def _weight_norm(model: Model, x: Sized, path: str, adapter: Adapter) -> list[Sized]:
    """||W + s B A||, of which nothing is kept for backward; returns what stays until the layer is done.

    The update is formed as B (A I) with an identity as wide as the input, in the dtype of the products, and like W brought to x's dtype.
    """
    tape, weight, compute = model.tape, model.weights[path], model.autocast or adapter.A.itemsize
    identity = tape.new(weight.columns**2, adapter.A.itemsize, "workspace")
    held = [ops.cast(tape, identity, compute, "workspace"), tape.new(weight.columns * model.request.rank, compute, "workspace")]
    update = tape.new(weight.numel, compute, "workspace")
    del identity
    held.append(ops.cast(tape, update, x.itemsize, "workspace"))
    del update
    if weight.itemsize != x.itemsize or isinstance(weight, QuantizedWeight):
        held.append(tape.new(weight.numel, x.itemsize, "workspace"))
    tape.record(f"{path}.norm", [], lambda: tape.new(weight.rows, x.itemsize), busy=2 * weight.numel * x.itemsize)
    return held


def _frozen_again(model: Model, x: Sized, path: str) -> Sized:
    """W x with the weight in x's dtype, both cast again by autocast; the weight is kept if x needs a gradient."""
    weight, tape = model.weights[path], model.tape
    copied = weight.itemsize != x.itemsize or isinstance(weight, QuantizedWeight)
    matrix = tape.new(weight.numel, x.itemsize) if copied else weight
    if model.autocast is not None:
        x, matrix = ops.cast(tape, x, model.autocast), ops.cast(tape, matrix, model.autocast)
    numel = x.numel // weight.columns * weight.rows
    return tape.record(f"{path} again", [x], lambda: tape.new(numel, x.itemsize), keeps=[matrix] * x.needs_grad)


def with_prompt(model: Model, embedded: Sized) -> Sized:
    """PeftModel.forward for prompt tuning: the task's vectors in the embeddings' dtype, laid before them: [B, P + T, H]."""
    if model.request.method != "prompt":
        return embedded
    tape, vectors = model.tape, ops.cast(model.tape, prompt_vectors(model), embedded.itemsize)
    numel = embedded.numel + vectors.numel
    return tape.record("prompt", [vectors, embedded], lambda: tape.new(numel, embedded.itemsize))


def prompt_vectors(model: Model) -> Sized:
    """The prompt encoder's embedding: the trained vectors, looked up by their number, for every row of the batch."""
    assert model.prompt is not None
    vectors, itemsize = model.request.batch_size * model.prompt.numel, model.prompt.itemsize
    indices = model.ids(model.prompt.rows)  # one row of numbers, expanded
    return model.tape.record("prompt_encoder", [model.prompt], lambda: model.tape.new(vectors, itemsize), keeps=[indices])


def with_virtual_labels(model: Model, labels: Sized) -> Sized:
    """Labels of -100 for the virtual tokens, before the others."""
    if model.request.method != "prompt":
        return labels
    return model.ids(labels.numel + model.request.batch_size * model.request.num_virtual_tokens)


class Prefix:
    """PEFT's prefix: keys and values of every block, [B, P, 2 * L * kv], in the model's dtype; and the mask that they make necessary in a decoder."""

    def __init__(self, model: Model, masked: bool) -> None:
        vectors = ops.cast(model.tape, prompt_vectors(model), model.activation_itemsize)
        mask = model.tape.new(model.tokens * (model.request.num_virtual_tokens + model.sequence), 1, "other") if masked else None
        self.layers = [LayerPrefix(model, vectors, mask, parts=2 * model.arch.layers) for _ in range(model.arch.layers)]


class LayerPrefix:
    """One block's keys and values, one of `parts` of the vectors each, copied into the cache of keys and values."""

    def __init__(self, model: Model, vectors: Sized, mask: Sized | None, parts: int) -> None:
        self.tape, self.mask, self.itemsize = model.tape, mask, vectors.itemsize
        numel = vectors.numel // parts
        self.pair = [self.tape.record("prefix", [vectors], lambda: self.tape.new(numel, self.itemsize)) for _ in "kv"]

    def before(self, k: Sized, v: Sized) -> tuple[Sized, Sized, Sized | None]:
        """The prefix's keys and values in front of the block's own, and the mask. The cache keeps the longer ones."""
        self.pair = [self._joined(mine, theirs) for mine, theirs in zip(self.pair, (k, v), strict=True)]
        return self.pair[0], self.pair[1], self.mask

    def _joined(self, mine: Sized, theirs: Sized) -> Sized:
        return self.tape.record("prefix", [mine, theirs], lambda: self.tape.new(mine.numel + theirs.numel, theirs.itemsize))


def prefix_of(model: Model, masked: bool = True) -> Prefix | None:
    return Prefix(model, masked) if model.request.method == "prefix" else None
