"""nn.MultiheadAttention in PEFT's files, which has ways of its own there.

    <a>.lora_A.weight, .lora_B.weight                               the input projection of the attention <a>
    <a>.base_layer.out_proj.lora_A.weight, .lora_B.weight           its output projection
    <a>.base_layer.out_proj.base_layer.bias                         the output projection's bias, where biases train along

PEFT's wrapper has both projections with one rank and one alpha, those of the path <a>; a projection alone has no effect in PEFT. So the one
that is not adapted gets a pair of zeros, the smaller rank is filled up with zeros, and the other's scaling goes into B. And PEFT (0.21 at
least) adds the update of out_proj twice: its merge adds it to the weight and then merges out_proj, which adds it again, and every forward pass
goes through merge. So B of out_proj is halved on the way into a file and doubled on the way out, and both compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base_parameters import PREFIX
from ..errors import LoraLabError
from ..kinds import kind_of
from ..layers import LoRA
from ..plans import AdapterConfig, PlannedLayer
from ..targets import is_attention_output

OUT_PROJ, IN_FILE = ".out_proj.", ".base_layer.out_proj."
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
TIMES_ADDED = 2  # by PEFT; tests/lora_lab/test_multihead.py fails on the day it is added once


def attentions_for_file(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], layers: dict[str, LoRA]
) -> tuple[dict[str, Tensor], dict[str, LoRA], dict[str, int]]:
    """(tensors as PEFT names them, the layer that stands for each of its wrappers, the ranks of the attentions).

    Raises LoraLabError where a B, scaled, does not fit into the dtype it is saved in.
    """
    outputs = {path.rpartition(".")[0]: layer for path, layer in layers.items() if is_attention_output(layer)}  # type: ignore[arg-type]
    owners = {path: layer for path, layer in layers.items() if not is_attention_output(layer)}  # type: ignore[arg-type]
    attentions = {*outputs, *(path for path, layer in layers.items() if isinstance(layer, nn.MultiheadAttention))}
    written, ranks = dict(tensors), {}
    for path in sorted(attentions):
        owner = owners.setdefault(path, outputs[path]) if path in outputs else owners[path]
        ratio = outputs.get(path, owner).lora_scaling[adapter] / owner.lora_scaling[adapter]
        ranks[path] = _write(written, path, model.get_submodule(path), ratio)
    return written, owners, ranks


def _write(tensors: dict[str, Tensor], path: str, attention: nn.Module, ratio: float) -> int:
    """Give one attention's tensors PEFT's names, ranks and strength; returns the rank. ratio: out_proj's scaling to the input projection's."""
    inside, outside, there = (f"{PREFIX}{path}{middle}" for middle in (".", OUT_PROJ, IN_FILE))
    if outside + MAGNITUDE in tensors:
        tensors[there + MAGNITUDE] = tensors.pop(outside + MAGNITUDE)
    pairs = [(tensors.pop(prefix + A, None), tensors.pop(prefix + B, None)) for prefix in (inside, outside)]
    rank = max(one.shape[0] for one, _ in pairs if one is not None)
    like = next(one for one, _ in pairs if one is not None)
    for prefix, (one, two), part in zip((inside, there), pairs, (attention, attention.get_submodule("out_proj")), strict=True):
        if one is None or two is None:
            one, two = _zeros(part, rank, like)
        tensors[prefix + A] = F.pad(one, (0, 0, 0, rank - one.shape[0]))
        tensors[prefix + B] = F.pad(two, (0, rank - two.shape[1]))
    tensors[there + B] = _times(tensors[there + B], ratio / TIMES_ADDED, path)
    return rank


def _zeros(part: nn.Module, rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    kind = kind_of(part)
    assert kind is not None
    of_A, of_B = kind.pair_shapes(part, rank)
    return like.new_zeros(of_A), like.new_zeros(of_B)


def _times(tensor: Tensor, factor: float, path: str) -> Tensor:
    product = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor).to(tensor.dtype)
    if not torch.isfinite(product).all():
        raise LoraLabError(f"the scalings of {path!r} and of its out_proj are so different that B does not fit into {tensor.dtype}: save in float32")
    return product


def attentions_from_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the paths of the model, without pairs of zeros that are there for PEFT's sake."""
    found = {key.replace(IN_FILE, OUT_PROJ): tensor * TIMES_ADDED if key.endswith(IN_FILE + B) else tensor for key, tensor in tensors.items()}
    for owner in {key.partition(IN_FILE)[0] for key in tensors if IN_FILE in key}:
        empty = [prefix for prefix in (f"{owner}.", f"{owner}{OUT_PROJ}") if _adds_nothing(found, prefix)]
        for prefix in empty if len(empty) == 1 else ():
            del found[prefix + A], found[prefix + B]
    return found


def _adds_nothing(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    """Training moves A or B, and a new A is not zero: both are zero in a pair that only fills a place."""
    pair = [tensors[prefix + name] for name in (A, B) if prefix + name in tensors]
    return len(pair) == 2 and prefix + MAGNITUDE not in tensors and not any(tensor.any() for tensor in pair)


def with_its_attention(planned: PlannedLayer, module: nn.Module, config: AdapterConfig) -> PlannedLayer:
    """An output projection with the rank and scaling that PEFT gives it, which are its attention's; any other layer as it is."""
    if not is_attention_output(module):
        return planned
    owner = planned.path.rpartition(".")[0]
    return replace(planned, rank=config.rank_of(owner), alpha=config.alpha_of(owner), scaling=config.scaling_of(owner))
