"""GPUs by name: the bytes on the box, the bytes a process can use, how fast they multiply and read, what an hour has cost.

nominal_bytes counts as vendors do, 80 GB = 80e9. usable_bytes is the memory in GiB less the CUDA context, which PyTorch's allocator
never sees. Data-centre cards are the SXM variants where there are several.
Sources of the speeds: NVIDIA's data sheets (V100, T4, A100, L4, L40S, H100, H200, DGX B200) and white papers (GA102: RTX 3090 and A6000;
Ada: RTX 4090). They are streaming multiprocessors x products per clock x boost clock, which a test multiplies out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from .errors import MemoryMathError

GIB, MIB = 2**30, 2**20
# smallest, usual, largest: A100, PyTorch 2.1, kernels loaded lazily (the default) and eagerly; source: Stas Bekman, ml-engineering
CONTEXT_BYTES = (int(0.47 * GIB), int(0.47 * GIB), int(0.92 * GIB))
# PyTorch's workspace per handle and stream: 2 x 4096 KiB + 8 x 16 KiB, on Hopper 32 MiB (aten/src/ATen/cuda/CublasHandlePool.cpp)
CUBLAS_BYTES, CUBLAS_HOPPER_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024, 32 * MIB


@dataclass(frozen=True)
class Price:
    """Dollars for one GPU for one hour, on demand, when it was read (year-month[-day]), and where."""

    dollars_per_hour: float
    date: str
    source: str


LECTURE = Price(2.50, "2024", 'lecture 10.5 of 15.773, "A simple cost estimate (at $2.5/ GPU-hr)"')
_COLLECTED = "github.com/datareceipts/data-receipts, 109-gpu-pricing"
_RUNPOD = "RunPod pods, www.runpod.io/pricing"
_OPENRELAY = "openrelay.inc/gpu-pricing-calculator"


@dataclass(frozen=True)
class GPU:
    """memory_gib: what the driver has for processes, 2**30 bytes each; cards that keep a part for error correction have less.

    flops_per_second: dense 16-bit matrix products that accumulate in 32 bits, without sparsity (half of many headline figures).
    sixteen_bit: the format that is for, "bf16", or "fp16" on cards without bf16 (Volta, Turing). bandwidth_bytes_per_second: of the
    card's memory. cublas_workspace_bytes: what PyTorch allocates with the first matrix product. prices: those found with a date and a
    source, oldest first; empty where there is none. They are examples: prices differ several times between sellers, and change.
    """

    name: str
    nominal_bytes: int
    memory_gib: float
    flops_per_second: float
    sixteen_bit: str
    bandwidth_bytes_per_second: float
    cublas_workspace_bytes: int = CUBLAS_BYTES
    prices: tuple[Price, ...] = ()

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_gib * GIB) - CONTEXT_BYTES[1]

    @property
    def price(self) -> Price | None:
        """The newest price with a source; None where there is none."""
        return self.prices[-1] if self.prices else None

    @property
    def flops_per_byte(self) -> float:
        """Operations per byte read at which memory stops being the limit: below it a kernel waits for memory (the roofline's ridge)."""
        return self.flops_per_second / self.bandwidth_bytes_per_second


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40GB", 40_000_000_000, 40, 312e12, "bf16", 1555e9, prices=(
            Price(2.7447, "2026-11-09", f"AWS p4d.24xlarge / 8, us-east-1 ({_COLLECTED})"),)),
        GPU("A100-80GB", 80_000_000_000, 80, 312e12, "bf16", 2039e9, prices=(
            LECTURE, Price(3.4309, "2026-11-09", f"AWS p4de.24xlarge / 8, us-east-1 ({_COLLECTED})"),)),
        GPU("H100-80GB", 80_000_000_000, 80, 989.4e12, "bf16", 3.35e12, CUBLAS_HOPPER_BYTES, (
            LECTURE, Price(6.88, "2026-11-09", f"AWS p5.48xlarge / 8, us-east-1 ({_COLLECTED})"),)),
        GPU("H200", 141_000_000_000, 143_771 / 1024, 989.4e12, "bf16", 4.8e12, CUBLAS_HOPPER_BYTES, (Price(4.59, "2026-10-07", _RUNPOD),)),
        GPU("B200", 180_000_000_000, 183_359 / 1024, 2250e12, "bf16", 8e12, CUBLAS_HOPPER_BYTES, (Price(6.79, "2026-10-07", _RUNPOD),)),
        GPU("A10G", 24_000_000_000, 23_028 / 1024, 70e12, "bf16", 600e9, prices=(
            Price(1.006, "2026-06-17", "AWS g5.xlarge, us-east-1 (factualminds.com/blog/amazon-ec2-on-demand-pricing-instance-families-2026)"),)),
        GPU("L4", 24_000_000_000, 22.5, 121e12, "bf16", 300e9),
        GPU("L40S", 48_000_000_000, 46_068 / 1024, 362.05e12, "bf16", 864e9),
        GPU("RTX-A6000", 48_000_000_000, 49_140 / 1024, 154.8e12, "bf16", 768e9),
        GPU("RTX-3090", 24_000_000_000, 24, 71e12, "bf16", 936e9, prices=(Price(0.18, "2026-09-20", _OPENRELAY),)),
        GPU("RTX-4090", 24_000_000_000, 24, 165.2e12, "bf16", 1008e9, prices=(Price(0.29, "2026-09-20", _OPENRELAY),)),
        GPU("T4", 16_000_000_000, 15, 65e12, "fp16", 320e9, prices=(
            Price(0.526, "2023-11", "AWS g4dn.xlarge (gist.github.com/archae0pteryx/b3c1580dab2059083e862a9a679936ad)"),)),
        GPU("V100-16GB", 16_000_000_000, 16, 125e12, "fp16", 900e9),
        GPU("V100-32GB", 32_000_000_000, 32, 125e12, "fp16", 900e9),
    )
}  # fmt: skip
VENDOR_WORDS = {"nvidia", "tesla", "geforce", "rtx", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e"}


SXM = {"v100", "a100", "h100", "h200", "b200"}  # of which there are PCIe cards, too


def gpu_of(name: str | GPU) -> GPU:
    """The GPU called `name`; capitals, hyphens and the vendor's words do not matter, so torch.cuda.get_device_name() will do.

    Raises MemoryMathError for an unknown name, for one that several share ("A100"), with the choices, and for the PCIe card of a name whose SXM card,
    which is faster, is known here.

    >>> gpu_of("a100-80gb").nominal_bytes
    80000000000
    >>> gpu_of("NVIDIA GeForce RTX 4090").name, gpu_of("H100").name
    ('RTX-4090', 'H100-80GB')
    """
    if isinstance(name, GPU):
        return name
    asked = _words(str(name))
    found = [gpu for known, gpu in GPUS.items() if asked and _words(known)[: len(asked)] == asked]
    if len(found) == 1:
        return found[0]
    if found:
        raise MemoryMathError(f"gpu={name!r}: there are several: {' or '.join(gpu.name for gpu in found)}")
    if "pcie" in asked and (cards := [gpu.name for known, gpu in GPUS.items() if _words(known)[:1] == asked[:1] and asked[0] in SXM]):
        raise MemoryMathError(f"gpu={name!r}: a PCIe card is slower than the SXM card whose speed is known here; its memory is that of "
                              f"{' or '.join(cards)}: give that name where only memory is asked for")  # fmt: skip
    by_name = {known.lower(): gpu for known, gpu in GPUS.items()}
    near = get_close_matches(str(name).lower(), by_name, n=1)
    hint = f" (did you mean {by_name[near[0]].name!r}?)" if near else ""
    raise MemoryMathError(f"gpu={name!r}: expected one of {', '.join(GPUS)}{hint}")


def _words(name: str) -> list[str]:
    """The words that tell one card from another: "NVIDIA A100-SXM4-80GB" is ["a100", "80"]."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in VENDOR_WORDS]
    return [re.sub(r"^(\d+)gb?$", r"\1", re.sub(r"^rtx(?=.)", "", word)) for word in words]


def table() -> str:
    """Every GPU with its numbers, one a line, as fixed-width text."""
    lines = [f"{'GPU':<11}{'nominal GB':>11}{'usable GiB':>12}{'16-bit TFLOP/s':>16}{'GB/s':>7}{'$/hour':>9}  when and where"]
    for gpu in GPUS.values():
        speed = f"{gpu.flops_per_second / 1e12:,.0f} {gpu.sixteen_bit}"
        sizes = f"{gpu.name:<11}{gpu.nominal_bytes / 1e9:>11.0f}{gpu.usable_bytes / GIB:>12.2f}{speed:>16}"
        cost = f"{gpu.price.dollars_per_hour:>9.2f}  {gpu.price.date}, {gpu.price.source}" if gpu.price else f"{'-':>9}"
        lines.append(f"{sizes}{gpu.bandwidth_bytes_per_second / 1e9:>7,.0f}{cost}")
    return "\n".join(lines)
