"""What an adapter does with its A and B: LoRA as it is, DoRA, PiSSA. Another variant is another class here, and a line in `variant_of`.

A variant says which tensors it needs beside A and B, what it adds to the layer's output, and which change of the weight that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import LoraLabError, did_you_mean
from .kinds import LinearKind

if TYPE_CHECKING:
    from .layers import LoRA

ROWS_AT_ONCE = 2**22  # elements of a weight that are in float32 at one time


@dataclass(frozen=True)
class Variant:
    """LoRA: ``scaling * B A x`` is added. Source: Hu et al. 2021 (arXiv:2106.09685), equation 3.

    freeze_A: A stays as it began and only B trains. Source: LoRA-FA, Zhang et al. 2023 (arXiv:2308.03303).
    """

    freeze_A: bool = False

    def trains(self, container: str) -> bool:
        """Whether the adapter's tensor in this container is trained."""
        return not container.endswith("_start") and not (self.freeze_A and container == "lora_A")

    def extras(self, kind: LinearKind, module: nn.Module, A: Tensor, B: Tensor, scaling: float) -> dict[str, nn.Parameter]:
        """Tensors beside A and B by the name of their container; A and B may be filled here. Changes nothing of the module."""
        return {}

    def update(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """What is added to y, the output of the frozen layer for x."""
        return layer.lora_update(adapter, x)

    def delta(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        """The change of the weight that the update stands for, [out, in], or some of its rows."""
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        return layer.lora_scaling[adapter] * B[rows].flatten(1) @ A.flatten(1)

    def pair_for_file(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B of a plain adapter with the same update, for a file."""
        return layer.lora_A[adapter].detach(), layer.lora_B[adapter].detach()


@dataclass(frozen=True)
class DoRA(Variant):
    """Magnitude and direction apart: ``W' = m (W + s B A) / ||W + s B A||``, the norm taken per output and as a constant in backward.

    Added is ``(m / norm - 1) * W x + (m / norm) * s B A x``, without the bias, which DoRA leaves alone. Dropout is on the adapter's input
    only. Source: Liu et al. 2024 (arXiv:2402.09353), equations 5 and 11.
    """

    def extras(self, kind: LinearKind, module: nn.Module, A: Tensor, B: Tensor, scaling: float) -> dict[str, nn.Parameter]:
        """The magnitude starts as the norm, so that nothing has changed yet."""
        if A.shape[0] != B.shape[1]:
            raise LoraLabError("variant='dora' with a grouped convolution: its update is no kernel whose norm could be taken; use variant='lora'")
        return {"lora_magnitude_vector": nn.Parameter(weight_norm(kind.matrix(module), A, B, scaling).to(A.dtype))}

    def ratio(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        """``m / ||W + s B A||`` of these rows, [out]; 0 for a row of zeros, which has no direction."""
        A, B = layer.lora_A[adapter].detach(), layer.lora_B[adapter].detach()
        norm = weight_norm(layer.lora_kind.matrix(layer)[rows], A, B[rows], layer.lora_scaling[adapter])
        return layer.lora_magnitude_vector[adapter][rows] / norm.clamp_min(torch.finfo(A.dtype).tiny).to(A.dtype)

    def update(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        bias, ratio = getattr(layer, "bias", None), self.ratio(layer, adapter)
        frozen = y if bias is None else y - _spread(layer, bias, y)
        return _spread(layer, ratio - 1, y) * frozen + _spread(layer, ratio, y) * layer.lora_update(adapter, x).to(y.dtype)

    def delta(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        plain, ratio = Variant.delta(self, layer, adapter, rows), self.ratio(layer, adapter, rows)[:, None]
        return (ratio - 1) * layer.lora_kind.matrix(layer)[rows].to(plain.dtype) + ratio * plain


def _spread(layer: LoRA, vector: Tensor, y: Tensor) -> Tensor:
    """Cast last: m / norm - 1 is small, and would be lost in 16 bits beside the 1."""
    return layer.lora_kind.spread(layer, vector.to(y.dtype))


@dataclass(frozen=True)
class PiSSA(Variant):
    """The r largest singular values train, and W stays as it is: ``W x + s (B A - B0 A0) x``, where B0 A0 is how B A began.

    The paper takes the principal part out of W and trains it; W + s (B A - B0 A0) is the same function without changing W, so that
    switching off, several adapters and `eject` stay exact. A file holds the plain adapter [A; A0], [B, -B0] of rank 2r.
    Source: Meng et al. 2024 (arXiv:2404.02948), equations 2 to 4.
    """

    def extras(self, kind: LinearKind, module: nn.Module, A: Tensor, B: Tensor, scaling: float) -> dict[str, nn.Parameter]:
        rank = A.shape[0]
        if A.ndim != 2 or rank > min(kind.shape(module)):
            shape = kind.shape(module)
            raise LoraLabError(f"init='pissa' with rank {rank}: a {type(module).__name__} of {shape} has no {rank} singular values to train")
        left, values, right = torch.linalg.svd(kind.matrix(module).to(torch.promote_types(A.dtype, torch.float32)), full_matrices=False)
        root = (values[:rank] / scaling).sqrt()
        with torch.no_grad():
            A.copy_(root[:, None] * right[:rank])
            B.copy_(left[:, :rank] * root)
        return {name: nn.Parameter(start.detach().clone(), requires_grad=False) for name, start in (("lora_A_start", A), ("lora_B_start", B))}

    def _pair(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """[A; A0] and [B, -B0]."""
        start_A, start_B = layer.lora_A_start[adapter], layer.lora_B_start[adapter]
        return torch.cat((layer.lora_A[adapter], start_A)), torch.cat((layer.lora_B[adapter], -start_B), dim=1)

    def update(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return layer.lora_apply(adapter, x, *self._pair(layer, adapter))

    def delta(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        A, B = self._pair(layer, adapter)
        return layer.lora_scaling[adapter] * B[rows] @ A

    def pair_for_file(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        A, B = self._pair(layer, adapter)
        return A.detach(), B.detach()


def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``||W + s B A||`` of every row, [out], in float32 or wider, without forming the sum.

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T for a row w of W and b of B; W is read in blocks of rows.

    >>> W, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    >>> torch.allclose(weight_norm(W, A, B, 0.5), (W + 0.5 * B @ A).norm(dim=1), atol=1e-5)
    True
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B = A.flatten(1).to(dtype), B.flatten(1).to(dtype)
    step = max(1, ROWS_AT_ONCE // weight.shape[1])
    squares = [_row_squares(weight[row : row + step].to(dtype), A, B[row : row + step], scaling) for row in range(0, weight.shape[0], step)]
    return torch.cat(squares).clamp_min(0).sqrt()


def _row_squares(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return W.square().sum(1) + 2 * s * (B * (W @ A.T)).sum(1) + s**2 * ((B @ (A @ A.T)) * B).sum(1)


LORA = Variant()
VARIANTS: dict[str, type[Variant]] = {"lora": Variant, "dora": DoRA}
EXTRAS = ("lora_magnitude_vector", "lora_A_start", "lora_B_start", "lora_B_bias")


def variant_of(name: Any, init: str, freeze_A: bool = False) -> Variant:
    """The variant a request names: `variant`, or PiSSA, which is an initialisation that stays.

    >>> type(variant_of("dora", "kaiming")).__name__
    'DoRA'
    """
    if name not in VARIANTS:
        raise LoraLabError(f"variant={name!r}: expected one of {', '.join(VARIANTS)}{did_you_mean(str(name), VARIANTS)}")
    if init == "pissa" and name != "lora":
        raise LoraLabError(f"init='pissa' with variant={name!r}: PiSSA trains the principal part of W itself; use one of the two")
    return (PiSSA if init == "pissa" else VARIANTS[name])(freeze_A)
