"""GPUs by name: the bytes on the box, and the bytes a process can use.

nominal_bytes counts as vendors do, 80 GB = 80e9. usable_bytes is the memory in GiB less the CUDA context, which PyTorch's allocator
never sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from .errors import MemoryMathError

GIB = 2**30
# smallest, usual, largest: A100, PyTorch 2.1, kernels loaded lazily (the default) and eagerly; source: Stas Bekman, ml-engineering
CONTEXT_BYTES = (int(0.47 * GIB), int(0.47 * GIB), int(0.92 * GIB))


@dataclass(frozen=True)
class GPU:
    """memory_gib: what the driver has for processes, 2**30 bytes each; cards that keep a part for error correction have less."""

    name: str
    nominal_bytes: int
    memory_gib: float

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_gib * GIB) - CONTEXT_BYTES[1]


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40GB", 40_000_000_000, 40),
        GPU("A100-80GB", 80_000_000_000, 80),
        GPU("H100-80GB", 80_000_000_000, 80),
        GPU("RTX-4090", 24_000_000_000, 24),
        GPU("T4", 16_000_000_000, 15),
        GPU("L4", 24_000_000_000, 22.5),
        GPU("V100-16GB", 16_000_000_000, 16),
        GPU("V100-32GB", 32_000_000_000, 32),
    )
}


def gpu_of(name: str) -> GPU:
    """The GPU called `name`; capitals do not matter.

    >>> gpu_of("a100-80gb").nominal_bytes
    80000000000
    """
    by_name = {known.lower(): gpu for known, gpu in GPUS.items()}
    if str(name).lower() in by_name:
        return by_name[str(name).lower()]
    near = get_close_matches(str(name).lower(), by_name, n=1)
    hint = f" (did you mean {by_name[near[0]].name!r}?)" if near else ""
    raise MemoryMathError(f"gpu={name!r}: expected one of {', '.join(GPUS)}{hint}")
