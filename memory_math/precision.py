"""What each precision word means in bytes.

The same words hold everywhere in the project:

    fp32        everything 32 bit
    bf16        weights, gradients, optimizer states and activations 16 bit
    fp16        the same bytes as bf16 (whether weights learn in pure fp16 is another question: with Adam they do not)
    bf16-mixed  weights that train are 32-bit masters, computed with in 16 bit (autocast); weights that do not train are stored in 16 bit
    fp16-mixed  the same bytes as bf16-mixed (the loss scale is one number)

LoRA adapters are 32 bit in all of them: a small update is lost in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import MemoryMathError

ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "fp32": 4, "fp16": 2, "bf16": 2}
ADAPTER_BYTES = 4
LOGSUMEXP_BYTES = 4  # attention kernels keep their row sums in float32 whatever the inputs
INDEX_BYTES = 8  # token ids and labels are int64


@dataclass(frozen=True)
class Precision:
    """Bytes per element. trained, frozen: weights that do or do not train. compute: what the matrix products work in.

    mixed: trained weights are cast from `trained` to `compute` on the way (autocast).
    """

    name: str
    trained: int
    frozen: int
    compute: int
    mixed: bool


PRECISIONS = {
    "fp32": Precision("fp32", trained=4, frozen=4, compute=4, mixed=False),
    "bf16": Precision("bf16", trained=2, frozen=2, compute=2, mixed=False),
    "fp16": Precision("fp16", trained=2, frozen=2, compute=2, mixed=False),
    "bf16-mixed": Precision("bf16-mixed", trained=4, frozen=2, compute=2, mixed=True),
    "fp16-mixed": Precision("fp16-mixed", trained=4, frozen=2, compute=2, mixed=True),
}


def precision_of(name: str) -> Precision:
    """The precision called `name`.

    >>> precision_of("bf16-mixed").trained
    4
    """
    if not isinstance(name, str) or name not in PRECISIONS:
        raise MemoryMathError(f"precision={name!r}: expected one of {', '.join(PRECISIONS)} (8 and 4 bit are a quantization)")
    return PRECISIONS[name]


def itemsize_of(keyword: str, dtype: object) -> int:
    """Bytes per element of "float32", "bf16", torch.bfloat16 and so on; `keyword` is what it was given as."""
    name = str(dtype).removeprefix("torch.")
    if name not in ITEMSIZES:
        raise MemoryMathError(f"{keyword}={dtype!r}: expected one of {', '.join(ITEMSIZES)}, or torch's of these names")
    return ITEMSIZES[name]
