"""What an adapter does with its A and B: LoRA as it is, DoRA, PiSSA. Another variant is another class here, and a line in VARIANTS.

A variant says which tensors it needs beside A and B, and which pair of plain LoRA its update is: what is added to the layer's output, the
change of the weight and the tensors of a file follow from that. DoRA, whose update is more than a pair, says all of it itself. Those for parts
of a fused layer are in fused/parts.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .autocast import outside_autocast
from .delta import lora_delta, weight_norm
from .errors import LoraLabError, did_you_mean
from .kinds import LinearKind
from .selection import RowSelection

if TYPE_CHECKING:
    from .layers import LoRA


@dataclass(frozen=True)
class Variant:
    """LoRA: ``scaling * B A x`` is added. Source: Hu et al. 2021 (arXiv:2106.09685), equation 3.

    freeze_A: A stays as it began and only B trains. Source: LoRA-FA, Zhang et al. 2023 (arXiv:2308.03303).
    """

    freeze_A: bool = False
    is_pair: ClassVar[bool] = True  # the update is ``scaling * B A x`` of `pair`, and nothing else
    replaces: ClassVar[bool] = False  # a part of the output is put in the place of the frozen layer's, see token_rows/rows.py

    def trains(self, container: str) -> bool:
        """Whether the adapter's tensor in this container is trained."""
        return not container.endswith("_start") and not (self.freeze_A and container == "lora_A")

    def shapes(self, kind: LinearKind, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of lora_A and lora_B."""
        return kind.pair_shapes(module, rank)

    def pieces(self, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs, each of its rank r, in lora_A and lora_B: views, to be initialised one by one."""
        yield A, B

    def extras(self, kind: LinearKind, module: nn.Module, A: Tensor, B: Tensor, scaling: float) -> dict[str, nn.Parameter]:
        """Tensors beside A and B by the name of their container; A and B may be filled here. Changes nothing of the module."""
        return {}

    def pair(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of a plain adapter with the same update."""
        return layer.lora_A[adapter], layer.lora_B[adapter]

    def rank(self, layer: LoRA, adapter: str) -> int:
        """r, of one pair where A and B hold several."""
        return layer.lora_A[adapter].shape[0]

    def update(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """What is added to y, the output of the frozen layer for x."""
        return layer.lora_update(adapter, x)

    def output(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor, so_far: Tensor) -> Tensor:
        """The layer's output with this adapter. y: of the frozen layer for x; so_far: with the adapters before this one."""
        return so_far + layer._remembered(self.update(layer, adapter, x, y), x).to(y.dtype)

    def output_by_row(self, layer: LoRA, selected: RowSelection, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output where the rows have different adapters: each one's `output` for its own rows."""
        result, dim = y, selected.dim
        for adapter, rows in selected.indices(x).items():
            own_x, own_y = x.index_select(dim, rows), y.index_select(dim, rows)
            result = result.index_copy(dim, rows, layer.lora_variant[adapter].output(layer, adapter, own_x, own_y, own_y))
        return result

    def delta(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        """The change of the weight that the update stands for, [out, in], or some of its rows; in float32 or wider, whatever A and B are."""
        A, B = (tensor.flatten(1).to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in self.pair(layer, adapter))
        with outside_autocast(A):
            return lora_delta(A, B[rows], layer.lora_scaling[adapter])

    def merged(self, layer: LoRA, adapter: str, rows: slice, weight: Tensor, so_far: Tensor) -> Tensor:
        """Rows of the weight with this adapter. weight: as they are, [rows, in]; so_far: with the adapters before this one."""
        return so_far + self.delta(layer, adapter, rows).to(so_far.dtype)

    def pair_for_file(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """The same pair without its history, for a file."""
        A, B = self.pair(layer, adapter)
        return A.detach(), B.detach()

    def magnitude_for_file(self, layer: LoRA, adapter: str) -> Tensor:
        """The magnitude of all outputs, [out], of a variant that has one."""
        return layer.lora_magnitude_vector[adapter].detach()


@dataclass(frozen=True)
class DoRA(Variant):
    """Magnitude and direction apart: ``W' = m (W + s B A) / ||W + s B A||``, the norm taken per output and as a constant in backward.

    Added is ``(m / norm - 1) * W x + (m / norm) * s B A x``, without the bias, which DoRA leaves alone. Dropout is on the adapter's input
    only. Source: Liu et al. 2024 (arXiv:2402.09353), equations 5 and 11.
    """

    is_pair: ClassVar[bool] = False

    def extras(self, kind: LinearKind, module: nn.Module, A: Tensor, B: Tensor, scaling: float) -> dict[str, nn.Parameter]:
        """The magnitude starts as the norm, so that nothing has changed yet."""
        if A.shape[0] != B.shape[1]:
            raise LoraLabError("variant='dora' with a grouped convolution: its update is no kernel whose norm could be taken; use variant='lora'")
        return {"lora_magnitude_vector": nn.Parameter(weight_norm(kind.matrix(module), A, B, scaling).to(A.dtype))}

    def ratio(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        """``m / ||W + s B A||`` of these rows, [out]; 0 for a row of zeros, which has no direction."""
        norm = self.norm(layer, adapter, rows)
        return self.magnitude(layer, adapter, norm, rows) / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def norm(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        """``||W + s B A||`` of these rows, [out], in the adapter's dtype."""
        A, B = self.pair_for_file(layer, adapter)
        return weight_norm(layer.lora_kind.matrix(layer)[rows], A, B[rows], layer.lora_scaling[adapter]).to(A.dtype)

    def magnitude(self, layer: LoRA, adapter: str, norm: Tensor, rows: slice = slice(None)) -> Tensor:
        """m of these rows, [out]; a variant that trains some outputs only has the norm for the others."""
        return layer.lora_magnitude_vector[adapter][rows]

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

    def pair(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """[A; A0] and [B, -B0], of rank 2r."""
        start_A, start_B = layer.lora_A_start[adapter], layer.lora_B_start[adapter]
        return torch.cat((layer.lora_A[adapter], start_A)), torch.cat((layer.lora_B[adapter], -start_B), dim=1)


LORA = Variant()
VARIANTS: dict[str, type[Variant]] = {"lora": Variant, "dora": DoRA}


def variant_of(name: Any, init: str, freeze_A: bool = False) -> Variant:
    """The variant a request names: `variant`, or PiSSA, which is an initialisation that stays.

    >>> type(variant_of("dora", "kaiming")).__name__
    'DoRA'
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise LoraLabError(f"variant={name!r}: expected one of {', '.join(VARIANTS)}{did_you_mean(name, VARIANTS)}")
    if init == "pissa" and name != "lora":
        raise LoraLabError(f"init='pissa' with variant={name!r}: PiSSA trains the principal part of W itself; use one of the two")
    return (PiSSA if init == "pissa" else VARIANTS[name])(freeze_A)
