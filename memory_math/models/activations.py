"""Activation functions of an MLP on the tape, by transformers' names (activations.py): what each makes and keeps."""

from __future__ import annotations

from collections.abc import Callable

from .. import operations as ops
from ..errors import MemoryMathError
from ..tape import Sized, Tape
from ..targets import near


def activate(tape: Tape, name: str, x: Sized, autocast: int | None = None) -> Sized:
    """ACT2FN[name](x). Autocast on CUDA raises to a power in float32. Raises MemoryMathError for a function that is not modelled."""
    if name not in ACTIVATIONS:
        raise MemoryMathError(f"activation={name!r} is not modelled; modelled now: {', '.join(ACTIVATIONS)}{near(name, ACTIVATIONS)}")
    if name == "gelu_new" and autocast is not None and tape.device == "cuda":
        return gelu_new(tape, x, ops.cast(tape, x, 4))
    return ACTIVATIONS[name](tape, x)


def keeps_input(tape: Tape, x: Sized) -> Sized:
    """gelu, its fused tanh approximation, silu: one kernel, whose backward starts from the input."""
    return ops.elementwise(tape, "activation", x, keeps=[x])


def keeps_result(tape: Tape, x: Sized) -> Sized:
    """relu, tanh."""
    return tape.record("activation", [x], lambda: tape.new(x.numel, x.itemsize), keeps_after=lambda y: [y])


def gelu_new(tape: Tape, x: Sized, base: Sized | None = None) -> Sized:
    """``0.5 * x * (1 + tanh(c * (x + 0.044715 * x^3)))`` in eight operations: x, tanh and the two factors of the product are kept.

    base: a wider x to raise to the third power, which makes all that comes after as wide.
    """
    half = ops.elementwise(tape, "activation", x)
    inner = power(tape, "activation", base or x)
    inner = ops.elementwise(tape, "activation", inner)
    inner = ops.add(tape, "activation", x, inner)
    inner = ops.elementwise(tape, "activation", inner)
    inner = keeps_result(tape, inner)
    inner = ops.elementwise(tape, "activation", inner)
    return ops.multiply(tape, "activation", half, inner)


def power(tape: Tape, name: str, x: Sized) -> Sized:
    """x^n: its base is kept; backward makes a lower power of it, and the product with n."""
    return ops.elementwise(tape, name, x, keeps=[x], scratch=2 * x.nbytes)


ACTIVATIONS: dict[str, Callable[[Tape, Sized], Sized]] = {
    "gelu": keeps_input, "gelu_pytorch_tanh": keeps_input, "silu": keeps_input, "swish": keeps_input,
    "relu": keeps_result, "tanh": keeps_result, "gelu_new": gelu_new,
}  # fmt: skip
