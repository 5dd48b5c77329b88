"""The change of a weight that a LoRA pair stands for, ``W' = W + scaling * B A``, as a matrix and without making one."""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import outside_autocast
from .errors import LoraLabError

ELEMENTS_AT_ONCE = 2**22  # of a weight, that are in float32 at one time


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The dense update a LoRA pair stands for: ``scaling * B @ A``.

    lora_A: [r, in].  lora_B: [out, r].  Returns [out, in], in lora_A's dtype.
    Raises LoraLabError where the two disagree on r; both shapes are in the message.
    Source: Hu et al. 2021, section 4.1, equation 3.

    >>> lora_delta(torch.ones(2, 3), torch.ones(4, 2), scaling=0.5)[0, 0].item()
    1.0
    """
    if lora_A.shape[0] != lora_B.shape[1]:
        raise LoraLabError(f"lora_A is {list(lora_A.shape)} and lora_B is {list(lora_B.shape)}: expected A [r, in] and B [out, r] with one r")
    return scaling * lora_B @ lora_A


def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``||W + s B A||`` of every row, [out], in float32 or wider, without forming the sum.

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T for a row w of W and b of B; W is read in blocks of rows.

    >>> W, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    >>> torch.allclose(weight_norm(W, A, B, 0.5), (W + 0.5 * B @ A).norm(dim=1), atol=1e-5)
    True
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B = A.flatten(1).to(dtype), scaling * B.flatten(1).to(dtype)
    step = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    with outside_autocast(weight):
        squares = [_row_squares(weight[row : row + step].to(dtype), A, B[row : row + step]) for row in range(0, weight.shape[0], step)]
    return torch.cat(squares).clamp_min(0).sqrt()


def _row_squares(W: Tensor, A: Tensor, sB: Tensor) -> Tensor:
    return W.square().sum(1) + 2 * (sB * (W @ A.T)).sum(1) + ((sB @ (A @ A.T)) * sB).sum(1)
