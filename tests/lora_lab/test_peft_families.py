"""Adapter folders through PEFT and back, on whole models of eight families and every variant that both know."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from small_models import FAMILIES, SMALL, randomise
from torch import nn
from torch.testing import assert_close

import lora_lab

transformers.logging.set_verbosity_error()


def falcon() -> Any:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))


def vit() -> Any:
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
    return transformers.ViTForImageClassification(config)


MODELS = {**FAMILIES, "falcon": falcon, "vit": vit}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> (ours, PEFT's)
    "lora": ({}, {}),
    "dora": ({"variant": "dora"}, {"use_dora": True}),
    "rslora": ({"rslora": True, "alpha": 7}, {"use_rslora": True, "lora_alpha": 7}),
    "patterns": ({"rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 9}}, {"rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 9}}),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[family]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def logits(model: nn.Module, family: str) -> torch.Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        if family == "vit":
            return model(pixel_values=torch.randn(2, 3, 16, 16, dtype=torch.float64)).logits
        ids = torch.randint(3, 64, (2, 7))
        return model(input_ids=ids, **({"decoder_input_ids": ids[:, :3]} if family == "t5" else {})).logits


def seeded(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return randomise(model, by=0.2)


def linear_names(model: nn.Module) -> list[str]:
    """What "all-linear" means here, by full path, so that both adapt the same."""
    return [layer.path for layer in lora_lab.plan(model, rank=4).layers]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_peft_computes_what_we_save(tmp_path, family: str, variant: str) -> None:
    if variant == "patterns" and family in ("t5",):
        pytest.skip("the patterns name numbered layers, which T5 has in its encoder and its decoder alike")
    model = seeded(lora_lab.inject(build(family), rank=4, **VARIANTS[variant][0])).eval()
    assert not torch.allclose(logits(model, family), logits(build(family), family))
    lora_lab.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert_close(logits(theirs, family), logits(model, family), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_we_compute_what_peft_saves(tmp_path, family: str, variant: str) -> None:
    if variant == "patterns" and family in ("t5",):
        pytest.skip("the patterns name numbered layers, which T5 has in its encoder and its decoder alike")
    settings = {"r": 4, "lora_alpha": 4, "target_modules": linear_names(build(family)), **VARIANTS[variant][1]}
    theirs = seeded(peft.get_peft_model(build(family), peft.LoraConfig(**settings)).double()).eval()
    theirs.save_pretrained(tmp_path)
    ours = lora_lab.load(build(family), tmp_path).eval()
    assert_close(logits(ours, family), logits(theirs, family), rtol=0, atol=1e-9)
    merged = lora_lab.merge(copy.deepcopy(ours))
    assert_close(logits(merged, family), logits(theirs, family), rtol=0, atol=1e-9)
