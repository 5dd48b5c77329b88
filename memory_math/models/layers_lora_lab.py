"""The parts that this project's own models are made of, call by call: lora_lab/models/blocks.py, activations.py and lora_lab's LoRA layers.

RMSNorm and the gated activations are autograd Functions that keep their inputs alone; LayerNorm and linear layers are PyTorch's. Every function
here mirrors one there; ``busy`` and ``scratch`` count the local tensors of its forward and its backward.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import operations as ops
from ..errors import MemoryMathError
from ..operations import Weight
from ..tape import Sized, Tape
from ..targets import near
from .activations import keeps_input, keeps_result
from .base import Adapter, Model

ELEMENTS_AT_ONCE = 2**22  # lora_lab.delta.ELEMENTS_AT_ONCE, held equal by a test


# Norms, activations, rotary positions ---------------------------------------------------------------------------------------------


def rms_norm(model: Model, x: Sized, path: str, itemsize: int | None = None) -> Sized:
    """RMSNormFunction: keeps x (and the weight, which is there anyway). itemsize: of the result, where it is not that of products of x.

    forward: x in float32 and its square or its normalised copy. backward: normalised, the gradient in float32, g = grad * weight,
    and two steps of ``inverse_rms * (g - normalised * mean)``.
    """
    weight, itemsize = model.weights[path], itemsize or model.autocast or x.itemsize
    full = 4 * x.numel
    widened = full if x.itemsize < 4 else 0
    scratch = 3 * full + (0 if itemsize == 4 else full) + (full - x.nbytes)
    return model.tape.record(
        path, [x, weight], lambda: model.tape.new(x.numel, itemsize), keeps_after=lambda y: [x], busy=full + widened, scratch=scratch
    )


def gated(tape: Tape, name: str, gate: Sized, up: Sized) -> Sized:
    """SwiGLUFunction, GEGLUFunction: keeps gate and up; the activation of gate is made again in backward."""
    size, kept = gate.nbytes, [gate, up]

    def product() -> Sized:
        return tape.new(gate.numel, gate.itemsize)

    return rematerializable(tape, tape.record(f"{name}(gate) * up", kept, product, keeps_after=lambda y: kept, busy=size, scratch=size), kept)


def rematerializable(tape: Tape, x: Sized, sources: list[Sized]) -> Sized:
    """lora_lab.rematerialize: x can be made from its sources again, which are kept in any case; where what is kept moves to the host, it is not."""
    x.sources = sources if x.needs_grad and tape.offload is None else []
    return x


def quick_gelu(tape: Tape, x: Sized) -> Sized:
    """``x * sigmoid(1.702 x)``: the sigmoid, and both factors of the product."""
    return ops.multiply(tape, "activation", x, keeps_result(tape, ops.elementwise(tape, "activation", x)))


def keeps_and_remakes(tape: Tape, x: Sized) -> Sized:
    """An activation whose backward starts from its input, from which a LoRA layer behind it makes its own again."""
    return rematerializable(tape, keeps_input(tape, x), [x])


ACTIVATIONS: dict[str, Callable[[Tape, Sized], Sized]] = {
    **dict.fromkeys(("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu", "swish", "mish"), keeps_and_remakes),
    **dict.fromkeys(("relu", "tanh", "sigmoid"), keeps_result), "quick_gelu": quick_gelu,
}  # fmt: skip


def activate(model: Model, x: Sized) -> Sized:
    """lora_lab.models.activations.ACTIVATIONS: each one kernel of PyTorch's but quick_gelu. Raises MemoryMathError for another."""
    name = model.arch.activation
    if name not in ACTIVATIONS:
        raise MemoryMathError(f"activation={name!r} is none of lora_lab's: {', '.join(ACTIVATIONS)}{near(name, ACTIVATIONS)}")
    return ACTIVATIONS[name](model.tape, x)


def rotate(tape: Tape, x: Sized, angles: Sized) -> Sized:
    """rotate, rotate_part: products of halves; only cos and sin are kept."""
    return tape.record("rotary", [x], lambda: tape.new(x.numel, x.itemsize), keeps=[angles], busy=x.nbytes, scratch=x.nbytes)


def dropped(model: Model, x: Sized, share: float) -> Sized:
    """nn.Dropout: nothing at all in eval mode or where the share is 0."""
    return ops.dropout(model.tape, x) if share and model.request.drops else x


# LoRA ---------------------------------------------------------------------------------------------------------------------------


def lora_linear(model: Model, x: Sized, path: str) -> Sized:
    """LoRA.forward: ``W x + B (scaling * A x)``, with the small A and B cast to x's dtype; a plain layer without an adapter."""
    adapter = model.adapters.get(path)
    if adapter is None:
        return model.linear(x, path)
    x = remember_selection(model, x)
    if adds_in_place(model, x, path, adapter):
        return in_place(model, x, path, adapter)
    y = model.linear(x, path)
    update = dora_update(model, x, y, path, adapter) if adapter.magnitude else lora_update(model, x, adapter)
    update = update if x.needs_grad else remember_selection(model, update)
    return ops.add(model.tape, path, y, ops.cast(model.tape, update, y.itemsize))


def lora_linears(model: Model, x: Sized, paths: list[str]) -> list[Sized]:
    """lora_lab.together: layers of one x, which remember the selection once where all of them add in place."""
    adapters = [model.adapters.get(path) for path in paths]
    if not all(adapter and adds_in_place(model, x, path, adapter) for path, adapter in zip(paths, adapters, strict=True)):
        return [lora_linear(model, x, path) for path in paths]
    x = remember_selection(model, x)
    return [in_place(model, x, path, adapter) for path, adapter in zip(paths, adapters, strict=True) if adapter]


def in_place(model: Model, x: Sized, path: str, adapter: Adapter) -> Sized:
    y = adapted_linear(model, x, adapter, path)
    return y if x.needs_grad else remember_selection(model, y)


def adds_in_place(model: Model, x: Sized, path: str, adapter: Adapter) -> bool:
    """lora_lab.adapted_linear.is_simple, of a plain adapter on an nn.Linear."""
    weights = [weight for name in (path, f"{path}.bias") if (weight := model.weights.get(name)) is not None]
    simple = all(not weight.needs_grad and not isinstance(weight, ops.QuantizedWeight) for weight in weights) and adapter.magnitude is None
    one_dtype = weights[0].itemsize == x.itemsize and model.autocast in (None, x.itemsize)
    return simple and one_dtype and model.linear_layers and not model.request.dropout


def adapted_linear(model: Model, x: Sized, adapter: Adapter, path: str) -> Sized:
    """lora_lab.adapted_linear: keeps x (or what it is made from again), A, B and A x; the small products are added into the large ones."""
    tape, sources = model.tape, x.sources
    A, B = (ops.cast(tape, weight, x.itemsize) for weight in (adapter.A, adapter.B))
    rows = x.numel // adapter.A.columns
    low = rows * adapter.A.rows
    made_again = x.nbytes * len(sources)  # x, and of a gate its activation beside it; gone before the gradient of x is made
    scratch = low * x.itemsize + max(0, made_again - x.nbytes * x.needs_grad)

    def keeps(y: Sized) -> list[Sized]:
        return [A, B, tape.new(low, x.itemsize), *(sources or [x])]

    def result() -> Sized:
        return tape.new(rows * adapter.B.rows, x.itemsize)

    return tape.record(path, [x, A, B], result, keeps_after=keeps, busy=2 * low * x.itemsize, scratch=scratch)


def lora_update(model: Model, x: Sized, adapter: Adapter) -> Sized:
    """``B (scaling * A x)``, with dropout the Function that keeps bits."""
    tape, A, B = model.tape, ops.cast(model.tape, adapter.A, x.itemsize), ops.cast(model.tape, adapter.B, x.itemsize)
    if model.request.dropout:
        x, A, B = (ops.cast(tape, tensor, model.autocast or tensor.itemsize) for tensor in (x, A, B))
        return dropped_update(tape, x, A, B, x.numel // adapter.A.columns * adapter.B.rows)
    low = remaking_product(model, x, adapter.A, A) if x.sources and adapter.A.needs_grad else _product(model, x, adapter.A, A)
    low = ops.elementwise(tape, "scaling", low)
    return _product(model, low, adapter.B, B)


def remaking_product(model: Model, x: Sized, weight: Weight, matrix: Sized) -> Sized:
    """lora_lab.rematerialize.product: keeps A and x's sources, of which backward makes x again."""

    def result() -> Sized:
        return model.tape.new(x.numel // weight.columns * weight.rows, x.itemsize)

    busy = x.nbytes * (len(x.sources) - 1)  # the activation of gate beside the product
    return model.tape.record(weight.name, [x, matrix], result, keeps_after=lambda _: [matrix, *x.sources], scratch=x.nbytes + busy)


def _product(model: Model, x: Sized, weight: Weight, matrix: Sized) -> Sized:
    """x with a weight that has been cast to x's dtype; autocast casts both once more, of a weight that was none it keeps its copy."""
    if matrix is weight:
        return ops.linear(model.tape, x, weight, autocast=model.autocast)
    return ops.linear(model.tape, x, weight, autocast=model.autocast, copy=ops.cast(model.tape, matrix, model.autocast or matrix.itemsize))


def dora_update(model: Model, x: Sized, y: Sized, path: str, adapter: Adapter) -> Sized:
    """DoRA.update: ``(m / norm - 1) * (y - bias) + (m / norm) * lora_update``; the norm is a constant, taken in blocks of W's rows."""
    tape, weight, magnitude = model.tape, model.weights[path], adapter.magnitude
    assert magnitude is not None
    whole = weight.dequantized if isinstance(weight, ops.QuantizedWeight) else 0
    block = 4 * min(weight.numel, ELEMENTS_AT_ONCE)  # in float32, and its square
    tape.record(f"{path}.norm", [], lambda: tape.new(weight.rows, 4), busy=whole + block * (1 if weight.itemsize == 4 else 2))
    ratio = tape.record("magnitude", [magnitude], lambda: tape.new(weight.rows, 4), keeps_after=lambda _: [tape.new(weight.rows, 4)])
    frozen = ops.elementwise(tape, "dora", y) if f"{path}.bias" in model.weights else y
    less_one = ops.cast(tape, ops.elementwise(tape, "magnitude", ratio), y.itemsize)
    rest = ops.multiply(tape, "dora", less_one, frozen)
    ratio = ops.cast(tape, ratio, y.itemsize)
    update = ops.multiply(tape, "dora", ratio, ops.cast(tape, lora_update(model, x, adapter), y.itemsize))
    return ops.add(tape, "dora", rest, update)


def dropped_update(tape: Tape, x: Sized, A: Sized, B: Sized, numel: int) -> Sized:
    """lora_lab.dropout: keeps x, A, B and a bit per element of x; the dropped x exists inside, forward and backward."""

    def keeps(y: Sized) -> list[Sized]:
        return [x, A, B, tape.new(-(-x.numel // 8), 1)]

    inside = 2 * x.nbytes + x.numel  # the dropped x beside the grown one, the mask as bytes
    return tape.record(
        "dropout", [x, A, B], lambda: tape.new(numel, x.itemsize), keeps_after=keeps, busy=inside + x.numel, scratch=inside + x.nbytes
    )


def remember_selection(model: Model, x: Sized) -> Sized:
    """Under checkpointing a LoRA layer keeps one int64 that says which adapters its forward had."""
    if not model.tape.inside_checkpoint:
        return x
    return model.tape.record("selection", [x], lambda: x, keeps_after=lambda _: [model.tape.new(1, 8, "other")], passes=True)
