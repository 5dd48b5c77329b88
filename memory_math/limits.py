"""What a footprint is held against: the usable bytes of a GPU by name, or a number of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import hardware
from .errors import MemoryMathError

if TYPE_CHECKING:
    from .footprint import Footprint


def limit_of(gpu: str | int) -> tuple[str, int]:
    """What a limit is called, and its bytes: those a process can use of the GPU of this name, or the given bytes themselves."""
    if isinstance(gpu, str):
        return hardware.gpu_of(gpu).name, hardware.gpu_of(gpu).usable_bytes
    if isinstance(gpu, bool) or not isinstance(gpu, int) or gpu < 1:
        raise MemoryMathError(f"gpu={gpu!r}: expected the name of a GPU, such as 'T4', or a whole number of bytes")
    return "the limit", gpu


def reserved_fits(footprint: Footprint, limit_bytes: int) -> str:
    """Whether what torch reserves is within the limit: "certain" (the interval's upper end is), "likely" (its estimate is), "no".

    On a CPU nothing is reserved: "certain" or "no" by the total.
    """
    if footprint.reserved is None:
        return "certain" if footprint.total <= limit_bytes else "no"
    return "certain" if footprint.reserved.high <= limit_bytes else "likely" if footprint.reserved.estimate <= limit_bytes else "no"
