"""Adapter folders through PEFT and back, on whole models of eight families and every variant that both know."""

from __future__ import annotations

import copy
import warnings
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
    "lora": ({"alpha": 10}, {"lora_alpha": 10}),
    "dora": ({"variant": "dora"}, {"use_dora": True}),
    "rslora": ({"rslora": True, "alpha": 7}, {"use_rslora": True, "lora_alpha": 7}),
    "patterns": ({"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 9}},
                 {"rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {r".*\.1\..*": 9}}),
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_peft_computes_what_we_save(tmp_path, family: str, variant: str) -> None:
    model = seeded(lora_lab.inject(build(family), rank=4, **VARIANTS[variant][0])).eval()
    assert not torch.allclose(logits(model, family), logits(build(family), family))
    lora_lab.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing or an unknown key is a warning in PEFT
        theirs = peft.PeftModel.from_pretrained(build(family), tmp_path, autocast_adapter_dtype=False).eval()
    assert_close(logits(theirs, family), logits(model, family), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", MODELS)
def test_we_compute_what_peft_saves(tmp_path, family: str, variant: str) -> None:
    settings = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **VARIANTS[variant][1]}
    theirs = seeded(peft.get_peft_model(build(family), peft.LoraConfig(**settings)).double()).eval()
    assert not torch.allclose(logits(theirs, family), logits(build(family), family))
    theirs.save_pretrained(tmp_path)
    ours = lora_lab.load(build(family), tmp_path).eval()
    assert_close(logits(ours, family), logits(theirs, family), rtol=0, atol=1e-12)
    merged = lora_lab.merge(copy.deepcopy(ours))
    assert_close(logits(merged, family), logits(theirs, family), rtol=0, atol=1e-9)
