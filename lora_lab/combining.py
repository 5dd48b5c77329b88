"""New adapters out of old ones: the weighted sum of their updates, exactly or at a rank of one's choice.

Averaging the A's and the B's instead would be something else: (w1 B1 + w2 B2)(w1 A1 + w2 A2) is not w1 B1 A1 + w2 B2 A2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import layers as lora_layer
from .adapters import activate, weights_of
from .autocast import outside_autocast
from .base_parameters import refuse_base_parameters
from .checks import check_rank
from .errors import LoraLabError, did_you_mean
from .injection import injection_of, new_injection
from .layers import LoRA
from .merging import refuse_merged
from .parameters.layer import OnParameter, ParameterLoRA, as_stack, parameter_path
from .plans import AdapterConfig
from .targets import adapter_names, check_adapter_name, lora_layers
from .token_rows.rows import own_rows
from .variants import LORA, Variant
from .wrapping import on_base, refuse_sharded, refuse_wrapped

Model = TypeVar("Model", bound=nn.Module)
METHODS = ("cat", "svd")


@dataclass(frozen=True)
class _Part:
    """A and B of one layer in the new adapter, of scaling 1; the share of the sum's norm that was lost."""

    A: Tensor
    B: Tensor
    lost: float = 0.0
    variant: Variant = LORA

    @property
    def rank(self) -> int:
        return self.A.shape[-2 if isinstance(self.variant, OnParameter) else 0]


@on_base
def combine(model: Model, adapters: Mapping[str, float], into: str, *, method: str = "cat", rank: int | None = None) -> Model:
    """Add an adapter `into` whose update is the weighted sum of others'; it becomes the active one, frozen. Returns the same model.

    adapters: name -> weight. method: "cat" puts the A's below and the B's beside each other, exact, of the ranks' sum; "svd" is the best
    approximation of rank `rank`, made from the factors without forming the matrix; `combine_error(model, into)` says what it lost.
    Raises LoraLabError, the model untouched, for an unknown name, a name that is taken, an unknown method, a rank with "cat" or none with
    "svd", and for DoRA, adapter biases and token rows, whose sum is no plain adapter.
    """
    refuse_merged(model, "combine")
    refuse_wrapped(model, "combine")
    refuse_sharded(model, "combine")
    weights = weights_of(model, adapters, f"combine({adapters!r})")
    check_adapter_name(into)
    if into in adapter_names(model):
        raise LoraLabError(f"into={into!r}: this model has an adapter of that name: choose another")
    if method not in METHODS:
        raise LoraLabError(f"method={method!r}: expected one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    if (rank is None) != (method == "cat"):
        raise LoraLabError(f"rank={rank!r} with method={method!r}: 'svd' needs the rank of the result, 'cat' has the sum of the ranks")
    if rank is not None:
        check_rank(rank)
    refuse_base_parameters(model, weights, "which a sum of adapters cannot hold")
    for name in weights:
        if rows := own_rows(model, name):
            raise LoraLabError(f"{name!r} has token rows in {next(iter(rows))!r}, which stand in the place of its own: a weighted sum of such "
                               "is no plain adapter; use the adapters together where their words differ")  # fmt: skip
    parts = {path: part for path, layer in lora_layers(model).items() if (part := _part(path, layer, weights, rank)) is not None}
    ranks = {part.rank for part in parts.values()}
    parameters = {path: parameter_path(path) for path, part in parts.items() if isinstance(part.variant, OnParameter)}
    config = AdapterConfig(rank=max(ranks), alpha=None, target_modules=[path for path in parts if path not in parameters],
                           rank_pattern=_ranks(parts, max(ranks)), target_parameters=list(parameters.values()) or None)  # fmt: skip
    for path, part in parts.items():
        tensors = {"lora_A": nn.Parameter(part.A, requires_grad=False), "lora_B": nn.Parameter(part.B, requires_grad=False)}
        lora_layer.attach(model.get_submodule(path), into, tensors, 1.0, variant=part.variant)
    (injection_of(model) or new_injection(model)).adapters[into] = config
    (injection_of(model) or new_injection(model)).lost[into] = max(part.lost for part in parts.values())
    activate(model, (into,), trainable=False)
    return model


@on_base
def combine_error(model: nn.Module, adapter: str) -> float:
    """Of an adapter made by combine(method="svd"): the largest ||sum - result|| / ||sum|| of a layer; 0 for an exact one."""
    injection = injection_of(model)
    if injection is None or adapter not in injection.lost:
        raise LoraLabError(f"adapter={adapter!r} was not made by combine here")
    return injection.lost[adapter]


def _ranks(parts: dict[str, _Part], common: int) -> dict[str, int]:
    return {f"^{re.escape(parameter_path(path))}": part.rank for path, part in parts.items() if part.rank != common}


@torch.no_grad()
def _part(path: str, layer: LoRA, weights: dict[str, float], rank: int | None) -> _Part | None:
    names = [name for name in weights if name in layer.lora_variant]
    if not names:
        return None
    if getattr(layer, "groups", 1) > 1:
        raise LoraLabError(f"{path!r} is a grouped convolution, whose A and B are divided among the groups: such updates are not combined")
    for name in names:
        if extra := set(layer.lora_parameters(name)) & {"lora_magnitude_vector", "lora_B_bias"}:
            raise LoraLabError(f"{path!r}: {name!r} has {', '.join(sorted(extra))}; the sum of such updates is no plain adapter: "
                               "merge them, or use them together")  # fmt: skip
    if isinstance(layer, ParameterLoRA):
        return _of_parameter(layer, {name: weights[name] for name in names}, rank)
    pairs = [layer.lora_variant[name].pair_for_file(layer, name) for name in names]
    A = torch.cat([pair[0] for pair in pairs])
    B = torch.cat([weights[name] * layer.lora_scaling[name] * pair[1] for name, pair in zip(names, pairs, strict=True)], dim=1)
    return _Part(A, B) if rank is None else _truncated(A, B, rank)


def _of_parameter(layer: ParameterLoRA, weights: dict[str, float], rank: int | None) -> _Part:
    """The same for each matrix of a stack."""
    pairs = [layer.lora_variant[name].pair(layer, name) for name in weights]
    A = torch.cat([pair[0] for pair in pairs], dim=-2)
    B = torch.cat([weight * layer.lora_scaling[name] * pair[1] for (name, weight), pair in zip(weights.items(), pairs, strict=True)], dim=-1)
    if rank is None:
        return _Part(A, B, variant=OnParameter())
    parts = [_truncated(one_A, one_B, rank) for one_A, one_B in zip(as_stack(A), as_stack(B), strict=True)]
    A, B = (torch.stack([getattr(part, name) for part in parts]).view(*A.shape[:-2], *getattr(parts[0], name).shape) for name in "AB")
    return _Part(A, B, max(part.lost for part in parts), OnParameter())


def _truncated(A: Tensor, B: Tensor, rank: int) -> _Part:
    """The best rank-r approximation of B A: QR of both, and the SVD of the small core between them (Eckart and Young 1936)."""
    wide = torch.promote_types(A.dtype, torch.float32)
    with outside_autocast(A):
        left, upper = torch.linalg.qr(B.flatten(1).to(wide))
        right, lower = torch.linalg.qr(A.flatten(1).T.to(wide))
        U, S, Vh = torch.linalg.svd(upper @ lower.T)
        kept = min(rank, S.numel())
        root = S[:kept].sqrt()
        new_A, new_B = (root[:, None] * Vh[:kept]) @ right.T, left @ (U[:, :kept] * root)
    lost = float(S[kept:].norm() / S.norm().clamp_min(torch.finfo(wide).tiny))
    new_A, new_B = _padded(new_A, rank, 0).view(rank, *A.shape[1:]), _padded(new_B, rank, 1).view(B.shape[0], rank, *B.shape[2:])
    return _Part(new_A.to(A.dtype), new_B.to(B.dtype), lost)


def _padded(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros where the sum has no more directions than this."""
    missing = rank - matrix.shape[dim]
    shape = (missing, matrix.shape[1]) if dim == 0 else (matrix.shape[0], missing)
    return torch.cat((matrix, matrix.new_zeros(shape)), dim) if missing > 0 else matrix
