"""transformers' normalisations on the tape: RMSNorm as Llama, Qwen and T5 write it, Gemma's, and PyTorch's LayerNorm."""

from __future__ import annotations

from .. import operations as ops
from ..tape import Sized
from .base import Model


def rms_norm(model: Model, x: Sized, path: str) -> Sized:
    """LlamaRMSNorm: ``weight * (x * rsqrt(mean(x^2) + eps))``, in float32 up to the weight.

    x: any number of vectors as long as the weight. Compiled it is one kernel that keeps its input and a number per vector.
    """
    if model.request.compile:
        return _fused(model, x, path)
    tape, weight, itemsize = model.tape, model.weights[path], x.itemsize
    x = _normalised(model, x, path, x.numel // weight.numel)
    return ops.multiply(tape, path, weight, ops.cast(tape, x, itemsize))


def gemma_norm(model: Model, x: Sized, path: str) -> Sized:
    """GemmaRMSNorm: ``(x * rsqrt(mean(x^2) + eps)) * (1 + weight)`` in float32, cast at the end."""
    if model.request.compile:
        return _fused(model, x, path)
    tape, weight, itemsize = model.tape, model.weights[path], x.itemsize
    x = _normalised(model, x, path, x.numel // weight.numel)
    one_more = ops.elementwise(tape, path, ops.cast(tape, weight, 4))
    return ops.cast(tape, ops.multiply(tape, path, one_more, x), itemsize)


def _normalised(model: Model, x: Sized, path: str, vectors: int) -> Sized:
    """``x * rsqrt(mean(x^2) + eps)`` in float32."""
    tape, full = model.tape, ops.cast(model.tape, x, 4)
    squares = ops.elementwise(tape, path, full, keeps=[full], scratch=2 * full.nbytes)
    mean = ops.mean(tape, path, squares, vectors)
    del squares
    factor = tape.record(path, [mean], lambda: tape.new(vectors, 4), keeps_after=lambda y: [y])
    return ops.multiply(tape, path, x if model.habits.norm_keeps_input else full, factor)


def _fused(model: Model, x: Sized, path: str) -> Sized:
    weight, vectors = model.weights[path], x.numel // model.weights[path].numel

    def keeps(y: Sized) -> list[Sized]:
        return [x, model.tape.new(vectors, 4)]

    return model.tape.record(path, [x, weight], lambda: model.tape.new(x.numel, x.itemsize), keeps_after=keeps)


def layer_norm(model: Model, x: Sized, path: str) -> Sized:
    """nn.LayerNorm: keeps its input, and a mean and a deviation per vector in float32 (on the CPU in 16 bit where input and weight are both).

    Autocast on CUDA runs it in float32.
    """
    tape = model.tape
    inputs = [x, *(model.weights[name] for name in (path, f"{path}.bias") if name in model.weights)]
    if model.autocast is not None and tape.device == "cuda":
        inputs = [ops.cast(tape, tensor, 4) for tensor in inputs]
    wide = inputs[0]
    same = tape.device == "cpu" and all(tensor.itemsize == wide.itemsize for tensor in inputs)
    statistics = 2 * (wide.itemsize if same else 4) * (x.numel // model.arch.hidden)

    def keeps(y: Sized) -> list[Sized]:
        return [wide, tape.new(statistics, 1)]

    return tape.record(path, inputs, lambda: tape.new(wide.numel, wide.itemsize), keeps_after=keeps)
