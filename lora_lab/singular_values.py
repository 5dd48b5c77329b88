"""What an adapter has learned, seen through its singular values: the measurements of the LoRA paper's section 7, for one pair A, B.

An update ``s B A`` of rank r has at most r singular values above zero. They are found without forming the matrix: with ``B = Q R`` and
``A^T = P T`` they are those of the small ``s R T^T`` [r, r], and its singular vectors, rotated by Q and P, are the update's.

    intrinsic rank     how many directions the update really uses
    subspace overlap   how much two adapters (two tasks, two seeds, two ranks) use the same directions: equation 4
    amplification      how much stronger the update is in its directions than the frozen weight already was: table 7

All of it is computed in float64 on the CPU, whatever the model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import LoraLabError

ELEMENTS_AT_ONCE = 1 << 22  # of a frozen weight, that are in float64 at one time


# One update ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SingularValues:
    """The singular value decomposition of an update: U [out, k], values [k] from the largest, V [in, k], k = min(r, out, in)."""

    U: Tensor
    values: Tensor
    V: Tensor


def delta_svd(lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> SingularValues:
    """``scaling * B @ A = U diag(values) V^T``, from the factors: r^2 (in + out) steps instead of in * out * min(in, out).

    lora_A: [r, in].  lora_B: [out, r].  Raises LoraLabError where the two disagree on r, or a value is not finite.

    >>> delta_svd(torch.eye(2, 5), torch.eye(4, 2), scaling=3.0).values.tolist()
    [3.0, 3.0]
    """
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise LoraLabError(f"lora_A is {list(lora_A.shape)} and lora_B is {list(lora_B.shape)}: expected A [r, in] and B [out, r] with one r")
    Q, R = torch.linalg.qr(_wide(lora_B, "lora_B"))
    P, T = torch.linalg.qr(_wide(lora_A, "lora_A").T)
    U, values, Vh = torch.linalg.svd(scaling * R @ T.T, full_matrices=False)
    return SingularValues(Q @ U, values, P @ Vh.T)


@dataclass(frozen=True)
class IntrinsicRank:
    """How many directions a set of singular values s uses.

    effective: exp(entropy of s / sum(s)) (Roy and Vetterli 2007); equal values give their number, one value gives 1.
    stable: sum(s^2) / max(s)^2.  for_energy: how many of the largest hold `energy` of sum(s^2).  All are 0 for an update of zero.
    """

    effective: float
    stable: float
    for_energy: int
    energy: float


def intrinsic_rank(values: Tensor, energy: float = 0.9) -> IntrinsicRank:
    """Of singular values, in any order.  energy: 0 < energy <= 1.

    >>> rank = intrinsic_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))
    >>> f"{rank.effective:.6f}", rank.stable, rank.for_energy
    ('3.000000', 3.0, 3)
    """
    if not 0 < energy <= 1:
        raise LoraLabError(f"energy={energy!r}: expected a share above 0 and at most 1 (0.9 is nine tenths)")
    s = _wide(values, "values").sort(descending=True).values
    if len(s) == 0 or s[0] == 0:
        return IntrinsicRank(0.0, 0.0, 0, energy)
    p, squares = s / s.sum(), (s / s[0]).square()
    share = squares.cumsum(0) / squares.sum()
    effective = math.exp(float(torch.special.entr(p).sum()))
    return IntrinsicRank(effective, float(squares.sum()), int((share < energy - 1e-12).sum()) + 1, energy)


@dataclass(frozen=True)
class Amplification:
    """An update against the frozen weight it is added to, in Frobenius norms (LoRA paper, section 7.3 and table 7).

    delta_norm: ||dW||.  weight_norm: ||W||.  projected_norm: ||U^T W V||, what W has in the update's own directions U and V.
    own_norm: the same with W's own strongest directions, None where it was not asked for.  rank: of the update.  size: (out, in) of W.
    """

    delta_norm: float
    weight_norm: float
    projected_norm: float
    own_norm: float | None
    rank: int
    size: tuple[int, int]

    @property
    def factor(self) -> float:
        """||dW|| / ||U^T W V||: above 1, the update amplifies directions that W did not emphasise (appendix H.4)."""
        return self.delta_norm / self.projected_norm if self.projected_norm else math.inf if self.delta_norm else 0.0

    @property
    def ratio(self) -> float:
        """||dW|| / ||W||."""
        return self.delta_norm / self.weight_norm if self.weight_norm else math.inf if self.delta_norm else 0.0

    @property
    def random_norm(self) -> float:
        """What ||U^T W V|| is for random directions (root mean square): rank * ||W|| / sqrt(out * in)."""
        return self.rank * self.weight_norm / math.sqrt(math.prod(self.size))


def amplification(lora_A: Tensor, lora_B: Tensor, scaling: float, weight: Tensor, *, own: bool = False) -> Amplification:
    """Compare an update with the frozen weight it is added to.

    weight: [out, in].  own: also take W's own strongest directions, for which W needs a singular value decomposition (slow when large).
    Raises LoraLabError where the shapes do not fit.
    """
    if tuple(weight.shape) != (lora_B.shape[0], lora_A.shape[1]):
        raise LoraLabError(f"weight is {list(weight.shape)}, B @ A [{lora_B.shape[0]}, {lora_A.shape[1]}]: expected the frozen weight as [out, in]")
    return amplification_of(delta_svd(lora_A, lora_B, scaling), weight, own)


def amplification_of(svd: SingularValues, weight: Tensor, own: bool) -> Amplification:
    rank = numerical_rank(svd.values)
    inner, squares = torch.zeros(rank, rank, dtype=torch.float64), 0.0
    step = max(1, ELEMENTS_AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = _wide(weight[start : start + step], "weight")
        inner += svd.U[start : start + step, :rank].T @ rows @ svd.V[:, :rank]
        squares += float(rows.square().sum())
    own_norm = float(torch.linalg.svdvals(_wide(weight, "weight"))[:rank].norm()) if own else None
    return Amplification(float(svd.values.norm()), squares**0.5, float(inner.norm()), own_norm, rank, (weight.shape[0], weight.shape[1]))


# Two updates --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OverlapGrid:
    """phi for every i and j: values[i - 1, j - 1] in 0 .. 1, of subspaces of `size` dimensions (LoRA paper, figure 3)."""

    values: Tensor
    size: int

    def at(self, i: int, j: int) -> float:
        if not (1 <= i <= self.values.shape[0] and 1 <= j <= self.values.shape[1]):
            raise LoraLabError(f"i={i}, j={j}: expected 1 <= i <= {self.values.shape[0]} and 1 <= j <= {self.values.shape[1]} (the ranks)")
        return float(self.values[i - 1, j - 1])

    def random(self, i: int, j: int) -> float:
        """The mean of phi for two random subspaces: max(i, j) / size."""
        return max(i, j) / self.size

    def table(self) -> str:
        """i down, j across."""
        columns = range(1, self.values.shape[1] + 1)
        rows = [["i \\ j", *map(str, columns)]]
        rows += [[str(i + 1), *(f"{value:.3f}" for value in line)] for i, line in enumerate(self.values.tolist())]
        return columns_of(rows)


def overlap_grid(first: Tensor, second: Tensor) -> OverlapGrid:
    """phi(first, second, i, j) = ||V_i^T V_j||_F^2 / min(i, j) for all i and j: 1 where the smaller subspace lies in the other, 0 where
    they are orthogonal. V_i: the i strongest right singular vectors.

    first, second: two A's [r, in], or two B's transposed [r, out]; the ranks may differ.  Rows that are no direction of their own (a rank
    below r) are left out.  Source: Hu et al. 2021, section 7.2, equation 4; it is one minus a squared projection distance on Grassmannians.
    Raises LoraLabError for different widths, or a matrix of zeros: it has no directions.

    >>> print(overlap_grid(torch.tensor([[2.0, 0, 0], [0, 1.0, 0]]), torch.tensor([[0, 3.0, 0]])).table())
    i \\ j      1
    1      0.000
    2      1.000
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise LoraLabError(f"first is {list(first.shape)} and second is {list(second.shape)}: expected [r, n] with one n (B's transposed)")
    V, W = _directions(first, "first"), _directions(second, "second")
    squares = (V.T @ W).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, V.shape[1] + 1), torch.arange(1, W.shape[1] + 1)
    return OverlapGrid((squares / torch.minimum(i[:, None], j)).clamp(0.0, 1.0), first.shape[1])


def subspace_overlap(first: Tensor, second: Tensor, i: int | None = None, j: int | None = None) -> float:
    """One phi of `overlap_grid`; i and j default to the ranks.

    >>> subspace_overlap(torch.eye(2, 6), torch.eye(4, 6))
    1.0
    """
    grid = overlap_grid(first, second)
    return grid.at(grid.values.shape[0] if i is None else i, grid.values.shape[1] if j is None else j)


def _directions(matrix: Tensor, name: str) -> Tensor:
    """The right singular vectors [n, rank] of a flat matrix [r, n], strongest first."""
    _, values, Vh = torch.linalg.svd(_wide(matrix, name), full_matrices=False)
    rank = numerical_rank(values)
    if rank == 0:
        raise LoraLabError(f"{name} is zero and has no directions: B is zero until the adapter has been trained (compare the A's)")
    return Vh[:rank].T


def numerical_rank(values: Tensor) -> int:
    """How many singular values are more than rounding (the factors are float32 as a rule)."""
    return int((values > values.max() * torch.finfo(torch.float32).eps).sum()) if len(values) else 0


def _wide(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_meta:
        raise LoraLabError(f"{name} is on the meta device and has no values: load the weights first")
    wide = tensor.detach().to("cpu", torch.float64)
    if not torch.isfinite(wide).all():
        raise LoraLabError(f"{name} holds NaN or infinity")
    return wide


def columns_of(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows)
