"""nn.MultiheadAttention in PEFT's files, which has ways of its own there.

PEFT's wrapper has both projections, out_proj below `base_layer`; a projection alone has no effect in PEFT. And PEFT (0.21 at least) adds the
update of out_proj twice: its merge adds it to the weight and then merges out_proj, which adds it again, and every forward pass goes through
merge. So B of out_proj is halved on the way into a file and doubled on the way out, and both compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import LoraLabError
from .kinds import kind_of
from .layers import LoRA
from .targets import attention_of, is_attention_output

PREFIX = "base_model.model."
OUT_PROJ, IN_FILE = ".out_proj.", ".base_layer.out_proj."
TIMES_ADDED = 2  # by PEFT; tests/lora_lab/test_multihead.py fails on the day it is added once


def attentions_for_file(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], layers: dict[str, LoRA]
) -> tuple[dict[str, Tensor], dict[str, LoRA]]:
    """Tensors and layers as PEFT names them: an output projection is written with its attention, which gets a pair that adds zero where its
    input projection is not adapted."""
    written, owners = dict(tensors), dict(layers)
    for path, layer in layers.items():
        if is_attention_output(layer):  # type: ignore[arg-type]
            owner, attention, rank = path.rpartition(".")[0], attention_of(model, path), layer.lora_A[adapter].shape[0]
            if owner in layers and layers[owner].lora_A[adapter].shape[0] != rank:
                raise LoraLabError(f"{path!r} and its attention have different ranks, which a PEFT file cannot say: give both the same")
            written[f"{PREFIX}{owner}{IN_FILE}lora_A.weight"] = written.pop(f"{PREFIX}{path}.lora_A.weight")
            written[f"{PREFIX}{owner}{IN_FILE}lora_B.weight"] = written.pop(f"{PREFIX}{path}.lora_B.weight") / TIMES_ADDED
            if owner not in layers:
                written |= {f"{PREFIX}{owner}.{name}": tensor for name, tensor in _adds_nothing(attention, rank).items()}
            del owners[path]
            owners.setdefault(owner, layer)
    return written, owners


def _adds_nothing(attention: nn.Module, rank: int) -> dict[str, Tensor]:
    kind = kind_of(attention)
    assert kind is not None
    return {name: torch.zeros(shape) for name, shape in zip(kind.names, kind.pair_shapes(attention, rank), strict=True)}


def attentions_from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the paths of the model."""
    return {
        key.replace(IN_FILE, OUT_PROJ): tensor * TIMES_ADDED if IN_FILE in key and key.endswith("lora_B.weight") else tensor
        for key, tensor in tensors.items()
    }
