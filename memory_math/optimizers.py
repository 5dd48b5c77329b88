"""What optimizers keep per parameter, and what one step needs on top while it runs (torch.optim of PyTorch 2.13; bitsandbytes' 8 bit).

States have the dtype of their parameter in torch.optim, and are 8 bit with a float32 per block of 256 in bitsandbytes, which leaves tensors of
fewer than 4,096 elements in 32 bit (Dettmers et al. 2021, arXiv:2110.02861, section 2; min_8bit_size). Adafactor keeps the sums of a
matrix's rows and of its columns instead of the matrix (Shazeer and Stern 2018, arXiv:1804.04235, section 3). Lion keeps one momentum
(Chen et al. 2023, arXiv:2302.06675, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .errors import MemoryMathError

STEP_COUNTER_BYTES = 4  # Adam counts its steps in one float32 per parameter tensor
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
CODES_8BIT = 2 * 256 * 4  # bitsandbytes' two codebooks, made for each tensor


@dataclass(frozen=True)
class Shape:
    """One trained tensor: [rows, columns] of itemsize bytes each, or so many matrices of these sizes; a vector has one row."""

    rows: int
    columns: int
    itemsize: int
    matrices: int = 1

    @property
    def numel(self) -> int:
        return self.matrices * self.rows * self.columns

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Optimizer:
    """state: bytes kept for one tensor.

    foreach_copies: temporaries as large as all parameters in a foreach step. loop_copies: temporaries as large as one tensor at a time
    (Adam's are sqrt(v), and in the loop its quotient by the bias correction).
    """

    state: Callable[[Shape], int]
    foreach_copies: int = 0
    loop_copies: int = 0


def _copies(count: int, counter: int = 0) -> Callable[[Shape], int]:
    return lambda tensor: count * tensor.nbytes + counter


def _adam_8bit(tensor: Shape) -> int:
    if tensor.numel < SMALLEST_8BIT:
        return 2 * 4 * tensor.numel
    return 2 * (tensor.numel + 4 * -(-tensor.numel // BLOCK_8BIT)) + CODES_8BIT


def _adafactor(tensor: Shape) -> int:
    """torch.optim.Adafactor: sums of rows and of columns for matrices, one number per element for vectors; the dtype is the gradient's."""
    vector = tensor.rows == tensor.matrices == 1
    sums = tensor.numel if vector else tensor.matrices * (tensor.rows + tensor.columns)
    return sums * tensor.itemsize + STEP_COUNTER_BYTES


OPTIMIZERS = {
    "sgd": Optimizer(_copies(0)),
    "momentum": Optimizer(_copies(1)),
    "adam": Optimizer(_copies(2, STEP_COUNTER_BYTES), foreach_copies=1, loop_copies=2),
    "adamw": Optimizer(_copies(2, STEP_COUNTER_BYTES), foreach_copies=1, loop_copies=2),
    "adamw8bit": Optimizer(_adam_8bit),
    "adafactor": Optimizer(_adafactor, foreach_copies=1, loop_copies=1),
    "lion": Optimizer(_copies(1), foreach_copies=1, loop_copies=1),  # lora_lab's own; torch.optim has none
}
IMPLEMENTATIONS = ("fused", "foreach", "for-loop", "rounded")
ROUNDING_BYTES = 22  # per number that lora_lab.training.rounding.round_stochastically brings from 32 to 16 bit, while it does


def optimizer_of(name: str) -> Optimizer:
    """The optimizer called `name`."""
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise MemoryMathError(f"optimizer={name!r} is not modelled; modelled now: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def state_sizes(name: str, tensors: Sequence[Shape], masters: bool = False) -> list[int]:
    """Bytes of state, tensor by tensor. masters: the tensors are 16-bit copies, with a float32 master and float32 states for each."""
    optimizer = optimizer_of(name)
    if not masters:
        return [optimizer.state(tensor) for tensor in tensors]
    return [optimizer.state(replace(tensor, itemsize=4)) + 4 * tensor.numel for tensor in tensors]


def state_bytes(name: str, tensors: Sequence[Shape], masters: bool = False) -> int:
    """Bytes of state in all.

    >>> state_bytes("adamw", [Shape(10, 100, 4)])
    8004
    >>> state_bytes("adafactor", [Shape(1000, 1000, 4)])
    8004
    """
    return sum(state_sizes(name, tensors, masters))


def step_sizes(name: str, implementation: str, tensors: Sequence[Shape]) -> list[int]:
    """Tensors that exist only while the step runs, in bytes.

    fused: one kernel, none. foreach: PyTorch's default on CUDA; works on all tensors at once, so its temporaries are as large as the model.
    for-loop: the default on the CPU; one tensor after another. rounded: lora_lab's step of 16-bit weights, one after another in 32 bit.
    Weight decay of "sgd", "momentum" and "adam" is taken as 0.
    """
    optimizer, sizes = optimizer_of(name), [tensor.nbytes for tensor in tensors]
    if implementation == "fused" or not sizes:
        return []
    if implementation == "rounded":
        return [max(rounded_bytes(name, tensor) for tensor in tensors)]
    if implementation == "foreach":
        return optimizer.foreach_copies * sizes
    copies = optimizer.loop_copies  # the last of a tensor's temporaries is let go of when the next tensor's last one is there
    at_once = [[before] * (copies > 0) + [size] * copies for before, size in zip([0, *sizes], sizes, strict=False)]
    return max(at_once, key=sum)


def rounded_bytes(name: str, tensor: Shape) -> int:
    """What exists only while lora_lab.training.rounding.RoundedStochastically steps one 16-bit weight.

    The weight, its gradient and its states in 32 bit, and the temporaries of rounding; Adam's first state is narrow already when the second is
    rounded. The step's own temporaries are smaller, and gone by then.

    >>> rounded_bytes("adamw", Shape(1000, 1000, 2)) // 1_000_000, rounded_bytes("sgd", Shape(1000, 1000, 2)) // 1_000_000
    (40, 30)
    """
    states = optimizer_of(name).state(tensor) // tensor.itemsize
    return (4 + 4 + ROUNDING_BYTES) * tensor.numel + 4 * states + 2 * max(states - tensor.numel, 0)
