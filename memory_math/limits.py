"""What a footprint is held against: the usable bytes of a GPU by name, or a number of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import hardware
from .errors import MemoryMathError

if TYPE_CHECKING:
    from .footprint import Footprint


def limit_of(gpu: str | int | hardware.GPU) -> tuple[str, int]:
    """What a limit is called, and its bytes: those a process can use of this GPU, or the given bytes themselves.

    Predictions are the same for all GPUs, with cuBLAS's two workspaces as most have them; what they are larger on this one is taken off here.
    """
    if isinstance(gpu, (str, hardware.GPU)):
        card = hardware.gpu_of(gpu)
        return card.name, card.usable_bytes - 2 * (card.cublas_workspace_bytes - hardware.CUBLAS_BYTES)
    if isinstance(gpu, bool) or not isinstance(gpu, int) or gpu < 1:
        raise MemoryMathError(f"gpu={gpu!r}: expected the name of a GPU, such as 'T4', or a whole number of bytes")
    return "the limit", gpu


def verdict(footprint: Footprint, gpu: str | int | hardware.GPU) -> str:
    """"yes", "no", or "tight": what is allocated fits, what torch is expected to reserve for it does not."""
    _, nbytes = limit_of(gpu)
    if footprint.total > nbytes:
        return "no"
    return "tight" if reserved_fits(footprint, nbytes) == "no" else "yes"


def reserved_fits(footprint: Footprint, limit_bytes: int) -> str:
    """Whether what torch reserves is within the limit: "certain" (the interval's upper end is, and nothing of the request is unchecked), "likely"
    (its estimate is), "no".

    On a CPU nothing is reserved: "certain" or "no" by the total.
    """
    if footprint.reserved is None:
        return "certain" if footprint.total <= limit_bytes else "no"
    certain = footprint.reserved.high <= limit_bytes and not footprint.outside
    return "certain" if certain else "likely" if footprint.reserved.estimate <= limit_bytes else "no"
