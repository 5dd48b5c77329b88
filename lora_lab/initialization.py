"""How A and B begin. All but "random" start from a zero update (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import LoraLabError


def _kaiming(A: Tensor, B: Tensor) -> None:
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # what nn.Linear does, and loralib and PEFT after it
    nn.init.zeros_(B)


def _gaussian(A: Tensor, B: Tensor) -> None:
    nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)


def _random(A: Tensor, B: Tensor) -> None:
    """Both non-zero, so that a test sees what the adapter does."""
    nn.init.normal_(A, std=1 / math.sqrt(A[0].numel()))
    nn.init.normal_(B, std=1 / math.sqrt(A.shape[0]))


def _orthogonal(A: Tensor, B: Tensor) -> None:
    """Neither is zero, but B A is: the columns of B and the rows of A meet in two halves of one orthogonal basis of R^r.

    With Q orthogonal [r, r], A = Q_even^T N_A and B = N_B Q_odd, so B A = N_B (Q_odd Q_even^T) N_A = 0.
    Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation, as in PEFT.
    """
    rank = A.shape[0]
    if rank % 2:
        raise LoraLabError(f"rank={rank} with init='orthogonal': the basis is split into halves, choose an even rank")
    basis = torch.linalg.qr(torch.randn(rank, rank))[0]
    down, up = torch.randn(rank // 2, A[0].numel()) / 10, torch.randn(B.shape[0], rank // 2) / 10
    A.copy_((basis[0::2].T @ down).view_as(A))
    B.copy_((up @ basis[1::2]).view_as(B))


INITIALISATIONS = {"kaiming": _kaiming, "gaussian": _gaussian, "orthogonal": _orthogonal, "pissa": _kaiming, "random": _random}
