"""What adapter_config.json says: that PEFT's rules give every layer the rank and alpha it has, for whatever was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, LoRALinear

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def with_peft(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


def test_patterns_whose_order_matters_survive_a_file_with_sorted_keys(tmp_path: Path) -> None:
    """The first match wins; PEFT writes its keys sorted, so that its own file can give a layer another rank than it has."""
    model = randomise(lora_lab.inject(mlp(), rank=2, rank_pattern={"2": 3, ".*": 1}, alpha_pattern={"2": 9, ".*": 5}))
    assert [model[i].lora_A["default"].shape[0] for i in (0, 2)] == [1, 3]
    lora_lab.save(model, tmp_path)
    assert_close(lora_lab.load(mlp(), tmp_path)(X), model(X), rtol=0, atol=1e-12)
    assert_close(with_peft(mlp(), tmp_path)(X), model(X), rtol=0, atol=1e-12)


def test_a_layer_made_by_hand_is_saved_from_what_it_says_itself(tmp_path: Path) -> None:
    """It was never injected; rank, scaling and dropout are the layer's own."""
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(6, 5, rank=2, alpha=6, dropout=0.25), nn.ReLU(), LoRALinear(5, 4, rank=3, alpha=12)).double().eval()
    randomise(model)
    lora_lab.save(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert (written["r"], written["rank_pattern"], written["lora_alpha"], written["alpha_pattern"]) == (2, {"^2": 3}, 6.0, {"^2": 12.0})
    assert written["lora_dropout"] == 0.25
    for read in (with_peft, lora_lab.load):
        base = mlp().eval()
        base.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" not in name})
        assert_close(read(base, tmp_path)(X), model(X), rtol=0, atol=1e-12)


def test_an_adapter_of_a_part_is_saved_from_that_part(tmp_path: Path) -> None:
    """What trains along is recorded where inject was called, and the names in the file begin there."""
    model = nn.Sequential(mlp(), nn.Linear(4, 2).double()).requires_grad_(False)
    lora_lab.inject(model[0], rank=2)
    with pytest.raises(LoraLabError, match="injected into another level"):
        lora_lab.save(model, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    lora_lab.save(model[0], tmp_path / "here")


class Config:
    def __init__(self, is_encoder_decoder: bool) -> None:
        self.is_encoder_decoder = is_encoder_decoder

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


@pytest.mark.parametrize(("name", "encodes", "reads", "expected"), [
    ("LlamaForCausalLM", False, "input_ids", "CAUSAL_LM"), ("GPT2LMHeadModel", False, "input_ids", "CAUSAL_LM"),
    ("T5ForConditionalGeneration", True, "input_ids", "SEQ_2_SEQ_LM"), ("WhisperForConditionalGeneration", True, "input_features", None),
    ("Gemma3ForConditionalGeneration", False, "input_ids", None), ("BertForSequenceClassification", False, "input_ids", None),
])  # fmt: skip
def test_a_task_is_only_said_where_it_is_certain(tmp_path: Path, name: str, encodes: bool, reads: str, expected: str | None) -> None:
    """By it PEFT chooses a wrapper with arguments of its own, which models of speech and images do not take."""
    model = type(name, (nn.Sequential,), {"main_input_name": reads, "config": Config(encodes)})(nn.Linear(4, 4))
    lora_lab.save(lora_lab.inject(model, rank=2), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == expected


def test_peft_runs_an_adapter_of_a_model_of_speech(tmp_path: Path) -> None:
    def speech() -> Any:
        torch.manual_seed(0)
        config = transformers.Speech2TextConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                                encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32, input_feat_per_channel=8, conv_channels=8,
                                                num_conv_layers=1, conv_kernel_sizes=(3,))  # fmt: skip
        return transformers.Speech2TextForConditionalGeneration(config).double().eval()

    ours, inputs = lora_lab.inject(speech(), rank=2, target_modules=["q_proj"]), {"input_features": torch.ones(2, 12, 8, dtype=torch.float64)}
    inputs["decoder_input_ids"] = torch.tensor([[3, 4, 5]] * 2)
    lora_lab.save(randomise(ours), tmp_path)
    with torch.no_grad():
        assert_close(with_peft(speech(), tmp_path)(**inputs).logits, ours(**inputs).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_a_file_of_other_than_floating_point_numbers_is_refused(tmp_path: Path, dtype: Any) -> None:
    model = lora_lab.inject(mlp(), rank=2, init="random")
    with pytest.raises(LoraLabError, match=r"dtype=.*expected one of torch.float64, torch.float32.*or None"):
        lora_lab.save(model, tmp_path / "here", dtype=dtype)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"bias": 5}, "bias=5: expected one of none, all, lora_only"), ({"bias": "some"}, "bias='some': expected one of"),
    ({"modules_to_save": 5}, "modules_to_save=5: expected a list of names"), ({"rank_pattern": {"0": "x"}}, r"rank_pattern\['0'\]='x'"),
    ({"lora_alpha": [8]}, "alpha="), ({"r": 2.0}, "rank=2.0"), ({"lora_dropout": "x"}, "dropout='x'"), ({"peft_type": None}, "peft_type is None"),
    ({"use_rslora": 1}, "rslora=1"), ({"lora_bias": "yes"}, "lora_bias='yes'"), ({"init_lora_weights": ["pissa"]}, "changed the base"),
])  # fmt: skip
def test_a_setting_of_another_type_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    lora_lab.save(lora_lab.inject(mlp(), rank=2), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((tmp_path / CONFIG).read_text()) | changes))
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)
    model = mlp()
    with pytest.raises(LoraLabError, match=message):
        lora_lab.load(model, tmp_path)
    assert not hasattr(model, "lora_injection")
