"""A matrix in four or eight bits, and back. Functions of tensors; `quantization` makes layers of them.

    kind     for each weight                  and to scale it                                                 bits a weight
    nf4      4 bits, two weights to a byte    the largest |weight| of every block of 64, in float32           4 + 32/64 = 4.5
    nf4-dq   the same                         that in 8 bits, and a float32 for every 256 of them             4 + 8/64 + 32/(64 * 256) = 4.127
    int8     8 bits                           the largest |weight| of every row, in float32                   8 + 32/columns

Blocks run over the flattened matrix, so they may cross its rows; the last may be shorter. NF4's 16 levels are quantiles of the normal
distribution: a trained matrix falls about equally often on each. Double quantisation ("dq") codes the scales, less their mean, once more.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E; Dettmers et al. 2022, arXiv:2208.07339, section 2.

Codes, scales and matrices are bitsandbytes' to the last bit, with one exception: for the 8-bit code of a scale its CPU build (not its CUDA
one) looks in a table of 65,536 places, and takes the second nearest of 256 levels about once in 700. Here it is the nearest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK, SECOND_BLOCK = 64, 256  # weights to a scale, scales to a second scale
TINY = 1e-38  # divides a block of zeros

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

PARTS = {
    "nf4": ("weight_codes", "weight_absmax"),
    "nf4-dq": ("weight_codes", "weight_absmax_codes", "weight_absmax_absmax", "weight_absmax_mean"),
    "int8": ("weight_codes", "weight_row_absmax"),
}


def encode(matrix: Tensor, kind: str) -> tuple[Tensor, ...]:
    """The tensors that stand for a matrix, in the order of ``PARTS[kind]``.

    matrix: [rows, columns], any float.  Codes: uint8 [ceil(rows * columns / 2)], the first weight in a byte's high half; int8 [rows, columns].
    Scales: float32 [blocks] or [rows]; with double quantisation uint8 [blocks], float32 [ceil(blocks / 256)] and a mean, float32 [].

    >>> codes, absmax = encode(torch.tensor([[-2.0, 0.0, 1.0, 2.0]]), "nf4")
    >>> [f"{byte:02x}" for byte in codes.tolist()], absmax.tolist()
    (['07', 'cf'], [2.0])
    """
    if kind == "int8":
        return _encode_int8(matrix)
    codes, absmax = _encode_blocks(matrix.reshape(-1), BLOCK, NF4)
    codes = pad(codes, (0, codes.numel() % 2), value=NF4.index(0.0))
    packed = codes[::2] << 4 | codes[1::2]
    if kind == "nf4":
        return packed, absmax
    mean = absmax.mean()
    return packed, *_encode_blocks(absmax - mean, SECOND_BLOCK, DYNAMIC), mean


def decode(kind: str, parts: Sequence[Tensor], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix that `encode` stored: [rows, columns], computed in float32 and rounded to `dtype`.

    >>> decode("nf4", encode(torch.tensor([[-2.0, 0.0, 1.0, 2.0]]), "nf4"), 1, 4, torch.float32)
    tensor([[-2.0000,  0.0000,  0.8814,  2.0000]])
    """
    if kind == "int8":
        return _decode_int8(parts[0], parts[1], dtype)
    codes, *scales = parts
    absmax = scales[0] if kind == "nf4" else _decode_scales(*scales)
    return _decode_nf4(codes, absmax, rows * columns, dtype).view(rows, columns)


# Four bits ----------------------------------------------------------------------------------------------------------------


def _encode_blocks(values: Tensor, block: int, levels: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The number of the level nearest to each value over the largest |value| of its block: uint8 [n], float32 [blocks]."""
    level = torch.tensor(levels, device=values.device)
    between = (level[:-1] + level[1:]) / 2
    codes, absmaxes = [], []
    for chunk in values.split(_chunk(values)):
        blocks = pad(chunk.float(), (0, -chunk.numel() % block)).view(-1, block)
        absmax = blocks.abs().amax(1)
        scaled = blocks * (1 / absmax.clamp(min=TINY))[:, None]
        codes.append(torch.bucketize(scaled, between, out_int32=True).to(torch.uint8).view(-1)[: chunk.numel()])
        absmaxes.append(absmax)
    return torch.cat(codes), torch.cat(absmaxes)


def _decode_nf4(codes: Tensor, absmax: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """[numel]. A byte is looked up whole, among the 256 pairs of levels: half as many look-ups as weights, and no bits to part."""
    pairs, chunk = _table("pairs", codes), _chunk(codes)
    result = torch.empty(numel, device=codes.device, dtype=dtype)
    for start in range(0, numel, chunk):
        part = result[start : start + chunk]
        values = pairs.index_select(0, codes[start // 2 : (start + chunk) // 2].int()).view(-1)
        part.copy_(_times(values, absmax[start // BLOCK : (start + chunk) // BLOCK], BLOCK)[: part.numel()])
    return result


def _decode_scales(codes: Tensor, absmax: Tensor, mean: Tensor) -> Tensor:
    return _times(_table("dynamic", codes).index_select(0, codes.int()), absmax, SECOND_BLOCK) + mean


def _times(values: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Every block of values times its scale."""
    if values.numel() % block:
        return values * absmax.repeat_interleave(block)[: values.numel()]
    return (values.view(-1, block) * absmax[:, None]).view(-1)


# Eight bits ---------------------------------------------------------------------------------------------------------------


def _encode_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    codes, absmaxes = [], []
    for rows in matrix.split(max(1, _chunk(matrix) // matrix.shape[1])):
        absmax = rows.float().abs().amax(1)
        codes.append((rows * (127 / absmax.clamp(min=100 * TINY))[:, None]).round().to(torch.int8))
        absmaxes.append(absmax)
    return torch.cat(codes), torch.cat(absmaxes)


def _decode_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(codes.shape, device=codes.device, dtype=dtype)
    step = max(1, _chunk(codes) // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        result[part] = codes[part] * absmax[part, None] * (1 / 127)
    return result


# The tables ---------------------------------------------------------------------------------------------------------------


def _dynamic_levels() -> tuple[float, ...]:
    """The 256 levels of an 8-bit float whose exponent takes as many bits as it needs: dense near 0, 1.0 the largest.

    Seven decades; decade i has 2**i levels of either sign, in the middle of equal steps from 0.1 to 1; and 0 and 1.
    Source: Dettmers 2015, arXiv:1511.04561, section 3.2; the float32 arithmetic is bitsandbytes', so that the levels are.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        levels += middles.tolist() + (-middles).tolist()
    return tuple(sorted(levels))


DYNAMIC = _dynamic_levels()
_TABLES = {"pairs": tuple((high, low) for high in NF4 for low in NF4), "dynamic": DYNAMIC}


def _table(name: str, like: Tensor) -> Tensor:
    """A table on the device of `like`: one for all layers, made once, so that nothing is copied to a GPU in a forward pass."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # a fake tensor's table must not stay
        return torch.tensor(_TABLES[name], device=like.device)
    return _kept_table(name, like.device)


@functools.cache
def _kept_table(name: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_TABLES[name], device=device)


def _chunk(tensor: Tensor) -> int:
    """How many weights to take at a time: what a processor's cache holds, more where each step is a kernel to start."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return 2**62
    return 2**17 if tensor.device.type == "cpu" else 2**24
