"""LoRA+: B at a higher rate than A."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_lab
from lora_lab import LoraLabError


def test_every_B_has_the_higher_rate_and_every_trained_tensor_is_in_one_group() -> None:
    """Hayou et al. 2024 (arXiv:2402.12354), section 4: the rates of B and A in the ratio lambda >> 1."""
    model = lora_lab.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), variant="dora", modules_to_save=["1"])
    groups = lora_lab.parameter_groups(model, 1e-3, ratio=8, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert rates == {
        "0.lora_A.default": (1e-3, 0.1), "0.lora_B.default": (8e-3, 0.1), "0.lora_magnitude_vector.default": (1e-3, 0.0),
        "1.weight": (1e-3, 0.1), "1.bias": (1e-3, 0.0),
    }  # fmt: skip
    torch.optim.AdamW(groups).step()


@pytest.mark.parametrize(("arguments", "message"), [((0,), "learning_rate=0"), ((1e-3, -1), "ratio=-1"), ((float("nan"),), "learning_rate=nan")])
def test_rates_that_make_no_sense_are_refused(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(LoraLabError, match=message):
        lora_lab.parameter_groups(lora_lab.inject(nn.Sequential(nn.Linear(4, 4))), *arguments)


def test_a_model_of_which_nothing_trains_is_refused() -> None:
    with pytest.raises(LoraLabError, match="nothing in this Sequential trains"):
        lora_lab.parameter_groups(nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), 1e-3)
