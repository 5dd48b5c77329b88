"""Adapters over a quantised base: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), for every variant."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import build, logits, randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

KINDS = ("nf4", "nf4-dq", "int8")
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"variant": "dora"}, "pissa": {"init": "pissa"}, "dropout": {"dropout": 0.3}}


def quantized(kind: str, **request: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = lora_lab.quantize(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), kind)
    model = lora_lab.inject(model, rank=4, **request)
    randomise(model, by=0.1)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_over_codes_is_the_dequantised_layer_with_the_update(kind: str, variant: str) -> None:
    model, x = quantized(kind, **VARIANTS[variant]), torch.randn(3, 64)
    layer = model[0]
    weight = layer.dequantize() + layer.lora_delta("default")
    assert_close(layer(x), F.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-4)
    with lora_lab.disabled(model):
        assert not torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_train_and_gradients_pass_through_the_codes(kind: str) -> None:
    model, x = quantized(kind).train(), torch.randn(3, 64, requires_grad=True)
    model(x).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.lora_{part}.default" for layer in (0, 2) for part in "AB"}
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in trained)
    dense = nn.Sequential(*(copy.deepcopy(module) for module in lora_lab.dequantize(lora_lab.eject(copy.deepcopy(model)))))
    with torch.no_grad():
        for index in (0, 2):
            dense[index].weight.add_(model[index].lora_delta("default"))
    other = x.detach().clone().requires_grad_()
    dense(other).square().sum().backward()
    assert_close(x.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_adapters_of_a_quantised_base_are_float32_and_files_fit_the_full_base(tmp_path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    model = lora_lab.inject(lora_lab.quantize(copy.deepcopy(base), "nf4"), rank=4)
    randomise(model, by=0.1)
    assert model[0].lora_A["default"].dtype == torch.float32
    lora_lab.save(model, tmp_path)
    full = lora_lab.load(base, tmp_path)
    assert torch.equal(full[0].lora_delta("default"), model[0].lora_delta("default"))
    again = lora_lab.load(lora_lab.quantize(nn.Sequential(nn.Linear(64, 64)).bfloat16(), "nf4"), tmp_path)
    assert torch.equal(again[0].lora_B["default"], model[0].lora_B["default"])


def test_rows_with_adapters_of_their_own_pickle_eject_and_merge() -> None:
    model, x = quantized("nf4"), torch.randn(2, 64)
    with lora_lab.per_sample(model, ["default", None]):
        mixed = model(x)
    with lora_lab.disabled(model):
        assert_close(mixed[1:], model(x[1:]), rtol=1e-5, atol=1e-5)
        plain = model(x)
    assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    with pytest.raises(LoraLabError, match="quantised to nf4: rounding would take the adapter away again"):
        lora_lab.merge(model)
    with pytest.raises(LoraLabError, match="carries LoRA adapters, which would be quantised around: quantize before inject"):
        lora_lab.quantize(lora_lab.inject(nn.Sequential(nn.Linear(64, 64))), "nf4")
    lora_lab.eject(model)
    assert torch.equal(model(x), plain) and model[0].quantization == "nf4"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_whole_models_are_quantised_and_adapted(family: str) -> None:
    model = build(family, torch.float32)
    before = logits(model, family)
    lora_lab.quantize(model, "nf4")
    base = logits(model, family)
    lora_lab.inject(model, rank=4)
    assert torch.equal(logits(model, family), base)
    randomise(model, by=0.1)
    assert not torch.allclose(logits(model, family), base) and not torch.equal(base, before)


def test_quantised_weights_count_as_what_their_codes_stand_for() -> None:
    """qlora.py prints half of what trains, as two codes are one element of a tensor."""
    plain = lora_lab.count_parameters(lora_lab.inject(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), rank=4))
    model = lora_lab.quantize(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), "nf4")
    assert lora_lab.count_parameters(lora_lab.inject(model, rank=4)) == plain
