"""Bytes of frozen weights in four and eight bits.

NF4 keeps a code of 4 bits per weight and the largest absolute value of every block of 64 in float32: 4 + 32/64 = 4.5 bits. Double
quantisation stores those in 8 bits with one float32 per 256 of them, after subtracting their mean (one float32 a tensor): 4 + 8/64 +
32/(64 * 256) = 4.127 bits. int8 keeps a byte per weight and one float32 per row.
Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3; Dettmers et al. 2022 (arXiv:2208.07339), section 2.
"""

from __future__ import annotations

from .errors import MemoryMathError

QUANTIZATIONS = ("none", "nf4", "nf4-dq", "int8")
BLOCK, SECOND_BLOCK = 64, 256  # weights per scale, scales per second scale
CODEBOOK_BYTES = 16 * 4  # bitsandbytes keeps the 16 levels with every tensor,
SECOND_CODEBOOK_BYTES = 256 * 4  # and the 256 levels of the second code


def quantized_bytes(quantization: str, rows: int, columns: int, codebooks: bool = True) -> int:
    """Bytes of one [rows, columns] weight. codebooks: every tensor has its own, as in bitsandbytes.

    >>> round(quantized_bytes("nf4-dq", 4096, 4096) * 8 / 4096**2, 2)
    4.13
    """
    weights = rows * columns
    if quantization == "int8":
        return weights + 4 * rows
    if quantization not in ("nf4", "nf4-dq"):
        raise MemoryMathError(f"quantization={quantization!r}: expected one of {', '.join(QUANTIZATIONS)}")
    blocks = -(-weights // BLOCK)
    codes = -(-weights // 2)
    tables = (CODEBOOK_BYTES + (0 if quantization == "nf4" else SECOND_CODEBOOK_BYTES)) * codebooks
    return codes + tables + (4 * blocks if quantization == "nf4" else blocks + 4 * -(-blocks // SECOND_BLOCK) + 4)


def dequantized_bytes(quantization: str, weights: int, itemsize: int) -> int:
    """Bytes of the matrix a product is computed with, alive for that product: under double quantisation its scales in float32, too.

    >>> dequantized_bytes("nf4", 64, 2)
    128
    """
    return weights * itemsize + (4 * -(-weights // BLOCK) if quantization == "nf4-dq" else 0)
