"""load(replace=True): each difference between the adapter here and the one in the file is named with both values, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_lab
from lora_lab import LoraLabError

ASKED: dict[str, Any] = {"rank": 2, "alpha": 4, "target_modules": ["0", "2"]}
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 3, "alpha": 6}, "the rank of '0': 3 in 'default' here, 2 in the file"),
    "scaling": ({"alpha": 6}, "the scaling of '0': 3.0 in 'default' here, 2.0 in the file"),
    "layers": ({"target_modules": ["0"]}, "the layer '2': 'left alone' in 'default' here, 'adapted' in the file"),
    "more layers": ({"target_modules": ["0", "1", "2"]}, "the layer '1': 'adapted' in 'default' here, 'left alone' in the file"),
    "variant": ({"variant": "dora"}, r"the tensors of '0': \['lora_A', 'lora_B', 'lora_magnitude_vector'\] in 'default' here, \["),
    "bias of B": ({"lora_bias": True}, "the tensors of '0': .*'lora_B_bias'"),
    "biases": ({"bias": "lora_only"}, r"what it trains of the model itself: \['0.bias', '2.bias'\] in 'default' here, \[\] in the file"),
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_what_differs_is_named(tmp_path: Path, difference: str) -> None:
    other, message = DIFFERENCES[difference]
    lora_lab.save(lora_lab.inject(mlp(), init="random", **ASKED), tmp_path)
    model = lora_lab.inject(mlp(), **{**ASKED, **other})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LoraLabError, match=f"differs in its values only; {message}"):
        lora_lab.load(model, tmp_path, replace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_that_is_not_there_cannot_be_replaced(tmp_path: Path) -> None:
    lora_lab.save(lora_lab.inject(mlp(), init="random", **ASKED), tmp_path)
    model = lora_lab.inject(mlp(), **ASKED, adapter="german")
    with pytest.raises(LoraLabError, match=r"this model has \['german'\], and none called 'germn' \(did you mean 'german'\?\)"):
        lora_lab.load(model, tmp_path, adapter="germn", replace=True)
    with pytest.raises(LoraLabError, match="this model has no adapters, and none called 'default'"):
        lora_lab.load(mlp(), tmp_path, replace=True)
