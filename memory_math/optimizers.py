"""What optimizers keep per parameter, and what one step needs on top while it runs (torch.optim of PyTorch 2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import MemoryMathError

STEP_COUNTER_BYTES = 4  # Adam counts its steps in one float32 per parameter tensor


@dataclass(frozen=True)
class Optimizer:
    """copies: tensors kept per parameter, as large and of the same dtype. counts_steps: whether it keeps a step count per tensor.

    foreach_copies: temporaries as large as all parameters in a foreach step. loop_copies: temporaries as large as one tensor at a time
    (Adam's are sqrt(v), and in the loop its quotient by the bias correction).
    """

    copies: int
    counts_steps: bool
    foreach_copies: int
    loop_copies: int


OPTIMIZERS = {
    "sgd": Optimizer(copies=0, counts_steps=False, foreach_copies=0, loop_copies=0),
    "momentum": Optimizer(copies=1, counts_steps=False, foreach_copies=0, loop_copies=0),
    "adam": Optimizer(copies=2, counts_steps=True, foreach_copies=1, loop_copies=2),
    "adamw": Optimizer(copies=2, counts_steps=True, foreach_copies=1, loop_copies=2),
}
IMPLEMENTATIONS = ("fused", "foreach", "for-loop")


def optimizer_of(name: str) -> Optimizer:
    """The optimizer called `name`."""
    if name not in OPTIMIZERS:
        raise MemoryMathError(f"optimizer={name!r} is not modelled yet; supported now: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def state_bytes(name: str, tensors: Sequence[tuple[int, int]]) -> int:
    """Bytes of state for parameter tensors given as (elements, bytes per element).

    >>> state_bytes("adamw", [(1000, 4)])
    8004
    """
    optimizer = optimizer_of(name)
    counters = STEP_COUNTER_BYTES * len(tensors) * optimizer.counts_steps
    return counters + optimizer.copies * sum(numel * itemsize for numel, itemsize in tensors)


def step_bytes(name: str, implementation: str, tensors: Sequence[tuple[int, int]]) -> int:
    """Bytes that exist only while the step runs.

    fused: one kernel, none. foreach: PyTorch's default on CUDA; works on all tensors at once, so its temporaries are as large as the model.
    for-loop: the default on the CPU; one tensor after another. Weight decay of "sgd", "momentum" and "adam" is taken as 0.
    """
    optimizer, sizes = optimizer_of(name), [numel * itemsize for numel, itemsize in tensors]
    if implementation == "fused":
        return 0
    if implementation == "foreach":
        return optimizer.foreach_copies * sum(sizes)
    return optimizer.loop_copies * max(sizes, default=0)
