"""The GPU table: names as people and drivers write them, speeds multiplied out from the chips, prices with a date and a source."""

from __future__ import annotations

import re

import pytest

from memory_math import MemoryMathError, hardware
from memory_math.hardware import GPUS, gpu_of

# streaming multiprocessors, 16-bit products with 32-bit sums per clock and multiprocessor, boost clock in MHz
# (white papers of Volta, Turing, GA100, GA102, Ada, Hopper; GeForce cards and the A10G run these sums at half of their chip's rate)
CHIPS = {
    "V100-16GB": (80, 512, 1530), "V100-32GB": (80, 512, 1530), "T4": (40, 512, 1590), "A100-40GB": (108, 1024, 1410),
    "A100-80GB": (108, 1024, 1410), "RTX-3090": (82, 256, 1695), "RTX-A6000": (84, 512, 1800), "A10G": (80, 256, 1710),
    "RTX-4090": (128, 256, 2520), "L4": (58, 512, 2040), "L40S": (142, 512, 2520), "H100-80GB": (132, 2048, 1830), "H200": (132, 2048, 1830),
    "B200": (148, 4096, 1860),
}  # fmt: skip


@pytest.mark.parametrize("name", GPUS)
def test_peak_is_multiprocessors_times_products_times_clock(name: str) -> None:
    """2 operations a product; NVIDIA rounds, and states 362 for the L40S's 366."""
    multiprocessors, products, megahertz = CHIPS[name]
    assert GPUS[name].flops_per_second == pytest.approx(2 * multiprocessors * products * megahertz * 1e6, rel=0.012)


@pytest.mark.parametrize("name", GPUS)
def test_usable_memory_is_near_the_nominal_and_never_all_the_driver_has(name: str) -> None:
    gpu = GPUS[name]
    assert gpu.usable_bytes == int(gpu.memory_gib * 2**30) - hardware.CONTEXT_BYTES[1]
    assert 0.92 < gpu.memory_gib * 2**30 / gpu.nominal_bytes < 1.08  # GB or GiB on the box, less what error correction takes
    assert gpu.sixteen_bit == ("fp16" if name[0] in "TV" else "bf16")  # bf16 came with Ampere


def test_contract_of_the_80_gb_cards() -> None:
    """80 GB on the box counts as 80e9; 80 GiB less the CUDA context is usable."""
    for name in ("A100-80GB", "H100-80GB"):
        assert (gpu_of(name).nominal_bytes, gpu_of(name).usable_bytes) == (80_000_000_000, 80 * 2**30 - hardware.CONTEXT_BYTES[1])


@pytest.mark.parametrize(("written", "name"), [
    ("a100-80gb", "A100-80GB"), ("A100 80G", "A100-80GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
    ("NVIDIA H100 80GB HBM3", "H100-80GB"), ("h100", "H100-80GB"), ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("rtx4090", "RTX-4090"),
    ("3090", "RTX-3090"), ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100-16GB"), ("NVIDIA RTX A6000", "RTX-A6000"), ("A6000", "RTX-A6000"),
    ("NVIDIA A10G", "A10G"), ("nvidia l40s", "L40S"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"), ("L4", "L4"),
])  # fmt: skip
def test_names_as_drivers_and_people_write_them(written: str, name: str) -> None:
    """The left ones are what torch.cuda.get_device_name() says of these cards, or what one types."""
    assert gpu_of(written).name == name
    assert gpu_of(GPUS[name]) is GPUS[name]


@pytest.mark.parametrize(("written", "words"), [
    ("A100", "A100-40GB or A100-80GB"), ("V100", "V100-16GB or V100-32GB"), ("H1000", "did you mean 'H100-80GB'"), ("A10", "expected one of"),
    ("L40", "expected one of"), ("NVIDIA", "expected one of"), ("", "expected one of"), ("H100 PCIe", "PCIe card is slower .* H100-80GB"),
    ("NVIDIA A100 80GB PCIe", "A100-40GB or A100-80GB: give that name where only memory"),
])  # fmt: skip
def test_ambiguous_and_unknown_names_are_refused_with_the_choices(written: str, words: str) -> None:
    """Guessing would be worse: an A100 has 40 or 80 GB, an H100 PCIe is not an SXM one, an A10 is not an A10G."""
    with pytest.raises(MemoryMathError, match=words):
        gpu_of(written)


def test_prices_have_a_date_and_a_source_and_the_newest_counts() -> None:
    priced = [gpu for gpu in GPUS.values() if gpu.prices]
    assert len(priced) >= 5
    for gpu in priced:
        dates = [price.date for price in gpu.prices]
        assert gpu.price is gpu.prices[-1] and dates == sorted(dates)
        assert all(re.fullmatch(r"20\d\d(-\d\d){0,2}", price.date) and price.source and price.dollars_per_hour > 0 for price in gpu.prices)
    assert gpu_of("L4").price is None
    assert hardware.LECTURE in gpu_of("A100-80GB").prices and hardware.LECTURE.dollars_per_hour == 2.5  # lecture B5


def test_cublas_workspace_is_pytorchs() -> None:
    """getChosenWorkspaceSize: ":4096:2:16:8" in KiB and pieces, 32 MiB on Hopper (and on Blackwell in recent versions)."""
    assert gpu_of("A100-80GB").cublas_workspace_bytes == gpu_of("L4").cublas_workspace_bytes == 8_519_680
    assert {name for name, gpu in GPUS.items() if gpu.cublas_workspace_bytes == 32 * 2**20} == {"H100-80GB", "H200", "B200"}


def test_ridge_point_of_the_roofline() -> None:
    """An A100-80GB does 312e12 / 2.039e12 = 153 operations in the time it reads one byte."""
    assert gpu_of("A100-80GB").flops_per_byte == pytest.approx(153, abs=0.1)


def test_table_has_a_line_for_every_card() -> None:
    lines = hardware.table().split("\n")
    assert [line.split()[0] for line in lines[1:]] == list(GPUS)
    assert any("2026-11-09" in line for line in lines) and "fp16" in lines[-1]
