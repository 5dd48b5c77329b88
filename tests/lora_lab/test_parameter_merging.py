"""Adapters of parameters merged into checkpoint files, where a stack of experts is one tensor or one for each expert."""

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
from torch import Tensor, nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*keys did not match.*")
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def oss(**changes: Any) -> Any:
    settings = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4, "layer_types": ["full_attention"] * 2, **changes}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings))


MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=10, num_experts=3, num_experts_per_tok=2, head_dim=4)),
    "gpt_oss": oss,
    "square gpt_oss": lambda: oss(intermediate_size=16),
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=20, num_local_experts=3, head_dim=4, interleave_moe_layer_step=1, attention_chunk_size=32)),
}  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": STACKS},
    "one stack": {"target_modules": [], "target_parameters": ["down_proj"]},
    "layers too": {"target_modules": ["q_proj", "o_proj"], "target_parameters": STACKS, "rank_pattern": {"down_proj": 3},
                   "alpha_pattern": {"q_proj": 9}},
}


def build(family: str) -> Any:
    torch.manual_seed(1)
    model: Any = MODELS[family]().double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def logits(model: Any) -> Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 64, (2, 7))).logits


def loaded(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    return model


def adapter_of(who: str, family: str, folder: Path, **request: Any) -> Tensor:
    """An adapter folder, and the logits with it."""
    torch.manual_seed(3)
    if who == "ours":
        model = randomise(lora_lab.inject(build(family), rank=2, alpha=5, **request), by=0.2)
        lora_lab.save(model, folder)
        return logits(model)
    theirs = randomise(peft.get_peft_model(build(family), peft.LoraConfig(r=2, lora_alpha=5, **request)).double().eval(), by=0.2)
    theirs.save_pretrained(folder)
    return logits(theirs)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("who", ["ours", "peft"])
def test_the_merged_checkpoint_computes_what_the_adapter_computes(tmp_path: Path, who: str, family: str, request_: str) -> None:
    build(family).save_pretrained(tmp_path / "base")
    wanted = adapter_of(who, family, tmp_path / "adapter", **REQUESTS[request_])
    report = lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert (wanted - logits(loaded(tmp_path / "base"))).abs().max() > 0.05
    assert_close(logits(loaded(tmp_path / "merged")), wanted, rtol=0, atol=1e-9)
    tensors = {"one stack": 1, "experts": 2, "layers too": 4}[request_]
    if family in ("mixtral", "qwen3_moe"):  # three projections of three experts each
        tensors = {"one stack": 3, "experts": 9, "layers too": 11}[request_]
    assert len(report.merged) == 2 * tensors


def test_the_router_is_a_parameter_that_files_call_otherwise(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "base")
    wanted = adapter_of("peft", "mixtral", tmp_path / "adapter", target_modules=[], target_parameters=["mlp.gate.weight", "down_proj"])
    report = lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert "model.layers.0.block_sparse_moe.gate.weight" in [tensor.name for tensor in report.merged]
    assert_close(logits(loaded(tmp_path / "merged")), wanted, rtol=0, atol=1e-9)


# What a file does not say -----------------------------------------------------------------------------------------------------------


class Square(nn.Module):
    """Stacks that their shapes do not tell apart."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.second = nn.Parameter(torch.randn(3, 4, 4))
        self.first = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return sum(x @ one @ two for one, two in zip(self.first, self.second, strict=True))


def square(transposed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"block": Square(transposed), "odd": nn.Linear(4, 5)}).double()


def base_folder(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "ones_own"}))
    return folder


@pytest.mark.parametrize("transposed", [False, True])
def test_our_files_say_order_and_orientation(tmp_path: Path, transposed: bool) -> None:
    base = base_folder(tmp_path / "base", square(transposed))
    model = randomise(lora_lab.inject(square(transposed), rank=2, target_modules=["odd"], target_parameters=["first", "second"]))
    lora_lab.save(model, tmp_path / "adapter")
    lora_lab.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    for name, tensor in lora_lab.merge(model).state_dict().items():
        assert_close(load_file(tmp_path / "merged" / "model.safetensors")[name], tensor, rtol=0, atol=1e-12)
    turned = square(not transposed)
    with pytest.raises(LoraLabError, match=f"saved with is_transposed={transposed}"):
        lora_lab.load(turned, tmp_path / "adapter")
    assert type(turned["block"]) is Square


@pytest.mark.parametrize(
    ("names", "message"),
    [(["first", "second"], "does not say which pair is for which of first, second"), (["first"], "stack of square matrices.*'ones_own'")],
)
def test_what_peft_does_not_say_is_not_guessed(tmp_path: Path, names: list[str], message: str) -> None:
    base = base_folder(tmp_path / "base", square())
    theirs = peft.get_peft_model(square(), peft.LoraConfig(r=2, target_modules=[], target_parameters=names))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraLabError, match=message):
        lora_lab.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"target_parameters": ["up"]}, "of 'up' the adapter has no tensors"),
    "one more": ({"target_parameters": ["first", "second", "third"]}, "of 'third' the adapter has no tensors"),
    "one less": ({"target_parameters": ["first"]}, "has adapters for 2 parameters in the file, and first in the base"),
    "another rank": ({"r": 3}, "fit no order of"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    base = base_folder(tmp_path / "base", square())
    lora_lab.save(randomise(lora_lab.inject(square(), rank=2, target_modules=[], target_parameters=["first", "second"])), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | CASES[case][0]))
    with pytest.raises(LoraLabError, match=CASES[case][1]):
        lora_lab.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
