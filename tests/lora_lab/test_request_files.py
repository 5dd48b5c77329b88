"""The layers a configuration names against those that the file has tensors of: every request that PEFT writes is read, a file that was cut is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import SMALL, build, logits, randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|tied|fan_in_fan_out)")

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a name": ("llama", {"target_modules": ["q_proj"]}),
    "names with dots": ("llama", {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]}),
    "whole paths": ("llama", {"target_modules": ["model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"]}),
    "names that match nothing, too": ("llama", {"target_modules": ["q_proj", "c_attn", "query"]}),
    "a regular expression": ("llama", {"target_modules": r".*\.0\..*(q|v)_proj"}),
    "alternatives": ("llama", {"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.down_proj)"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear, classifier": ("bert", {"target_modules": "all-linear"}),
    "all-linear, SEQ_CLS": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "no layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    "layers and a pattern": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers and patterns": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": ["layers", "h"]}),
    "layers and whole paths": ("llama", {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]}),
    "without names": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    "without a word that is none here": ("llama", {"target_modules": ["q_proj"], "exclude_modules": "all-linear"}),
    "without a pattern": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    "whole modules inside": ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp"]}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "a tied head": ("gpt2", {"target_modules": ["wte", "lm_head"]}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "wi", "EncDecAttention.v"]}),
}


def theirs(folder: Path, base: nn.Module, **settings: Any) -> nn.Module:
    model = randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **settings)).double(), by=0.2).eval()
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = load_file(folder / TENSORS)
    save_file(change(tensors) if change else tensors, folder / TENSORS)  # as PEFT writes it: without our copy of the configuration


def refused(model: nn.Module, folder: Path, message: str) -> None:
    before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    with pytest.raises(LoraLabError, match=message):
        lora_lab.load(model, folder)
    assert list(model.state_dict()) == keys and not hasattr(model, "lora_injection")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("request_", REQUESTS)
def test_what_peft_asks_for_is_what_is_in_its_file(tmp_path: Path, request_: str) -> None:
    family, settings = REQUESTS[request_]
    base = build(family)
    model = theirs(tmp_path, base, **settings)
    assert not torch.allclose(logits(model, family), logits(base, family))
    assert_close(logits(lora_lab.load(base, tmp_path), family), logits(model, family), rtol=0, atol=1e-9)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_file_without_the_tensors_of_one_layer_is_incomplete(tmp_path: Path, request_: str) -> None:
    """PEFT warns and computes without them."""
    family, settings = REQUESTS[request_]
    base = build(family)
    theirs(tmp_path, base, **settings)
    keys = [key for key in load_file(tmp_path / TENSORS) if ".lora_" in key]
    if request_ == "all-linear, classifier":
        keys = [key for key in keys if "classifier" not in key]
    lost = keys[-1].partition(".lora_")[0]
    edit(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(f"{lost}.lora_")})
    path = lost.removeprefix("base_model.model.")
    refused(base, tmp_path, f"target_modules=.* names '{path}', of which the file has no tensors: it is incomplete|the file holds no tensors")


def test_half_a_file_names_the_first_of_what_it_lacks(tmp_path: Path) -> None:
    base = build("llama")
    lora_lab.save(lora_lab.inject(copy.deepcopy(base), rank=2, init="random"), tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        metadata = file.metadata()
    save_file({key: value for key, value in load_file(tmp_path / TENSORS).items() if ".1." not in key}, tmp_path / TENSORS, metadata)
    refused(base, tmp_path, r"'model.layers.1.self_attn.q_proj', 'model.layers.1.self_attn.k_proj', .* and 4 more, of which the file has no tensors")


@pytest.mark.parametrize(("changes", "message"), [
    ({"target_modules": ["q_proj"]}, r"tensors for 'model.layers.0.mlp.up_proj', 'model.layers.1.mlp.up_proj', which target_modules=\['q_proj'\]"),
    ({"target_modules": r".*\.q_proj"}, "mlp.up_proj'"), ({"target_modules": "dummy-target-modules"}, "and 1 more, which target_modules='dummy"),
    ({"layers_to_transform": [1]}, "'model.layers.0.mlp.up_proj'"), ({"exclude_modules": ["up_proj"]}, "up_proj"),
    ({"modules_to_save": ["mlp"]}, "not in the file"), ({"target_modules": "all-linear"}, r"target_modules='all-linear' names .* and 7 more"),
    ({"layers_to_transform": [1], "layers_pattern": "blocks"}, "'model.layers.0.mlp.up_proj', .* and 1 more"),
])  # fmt: skip
def test_tensors_of_layers_that_are_not_named_are_not_loaded(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """PEFT passes them by without a word."""
    base = build("llama")
    theirs(tmp_path, base, target_modules=["q_proj", "up_proj"])
    edit(tmp_path, **changes)
    refused(base, tmp_path, message)


def test_exclude_modules_leaves_out_layers_of_that_name_and_not_what_is_in_them(tmp_path: Path) -> None:
    """So in PEFT; here a name leaves out everything below, too, and what is written says which layers these are."""
    base = build("llama")
    model = theirs(tmp_path, base, target_modules=["q_proj", "up_proj"], exclude_modules=["mlp"])
    assert_close(logits(lora_lab.load(base, tmp_path), "llama"), logits(model, "llama"), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("changes", "message"), [
    ({"target_modules": 5}, "target_modules=5: expected a list of names"), ({"target_modules": [5]}, r"target_modules=\[5\]: expected a list"),
    ({"exclude_modules": {"a": 1}}, "exclude_modules=.*: expected a list of names"), ({"layers_pattern": 1.5}, "layers_pattern=1.5: expected"),
    ({"layers_to_transform": ["a"]}, r"layers_to_transform=\['a'\]: expected a list of layer numbers"), ({"target_modules": "("}, "not a regular"),
    ({"layers_to_transform": "1"}, "layers_to_transform='1': expected"), ({"layers_to_transform": [1], "layers_pattern": "("}, "not a regular expr"),
])  # fmt: skip
def test_a_request_of_another_type_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = build("llama")
    theirs(tmp_path, base, target_modules=["q_proj"])
    edit(tmp_path, **changes)
    refused(base, tmp_path, message)


def test_a_file_that_says_nothing_of_layers_is_read_by_its_tensors(tmp_path: Path) -> None:
    """target_modules=null means PEFT's own list for a family, which changes with its versions."""
    base = build("llama")
    model = theirs(tmp_path, base, target_modules=["q_proj"])
    edit(tmp_path, target_modules=None)
    assert_close(logits(lora_lab.load(base, tmp_path), "llama"), logits(model, "llama"), rtol=0, atol=1e-9)


class Nested(nn.Module):
    """Paths with two numbers: layers.1.experts.0."""

    def __init__(self) -> None:
        super().__init__()
        experts = [nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2)])}) for _ in range(2)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(experts)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model["layers"]:
            for expert in layer["experts"]:
                x = x + expert["up"](x)
        return x


@pytest.mark.parametrize("wanted", [["layers.1.experts.0", "layers.1.experts.1"], ["layers.0.experts.1", "layers.1.experts.1"]])
def test_the_number_of_a_layer_with_several_is_read_as_new_and_old_versions_of_peft_do(tmp_path: Path, wanted: list[str]) -> None:
    """The first since lately, the last before."""
    torch.manual_seed(0)
    base, x = Nested().double(), torch.randn(3, 4, dtype=torch.float64)
    model = theirs(tmp_path, base, target_modules=[f"{path}.up" for path in wanted])
    edit(tmp_path, target_modules=["up"], layers_to_transform=[1])
    assert_close(lora_lab.load(copy.deepcopy(base), tmp_path)(x), model(x), rtol=0, atol=1e-9)
    edit(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if "1.experts.1" not in key} or tensors)
    refused(base, tmp_path, "names 'model.layers.1.experts.1.up', of which the file has no tensors")


def test_a_shared_layer_is_there_by_either_path(tmp_path: Path) -> None:
    """PEFT sees its first path only; a file of another model may have its second."""
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    theirs(tmp_path, nn.ModuleDict({"b": nn.Linear(4, 4), "c": nn.Linear(4, 4)}), target_modules=["b", "c"])
    assert "default" in lora_lab.load(model, tmp_path)["a"].lora_A


def test_a_further_adapter_is_compared_with_the_model_and_not_with_the_adapters_in_it(tmp_path: Path) -> None:
    base = build("llama")
    model = theirs(tmp_path, base, target_modules="all-linear")
    for name in ("a", "b"):
        lora_lab.load(base, tmp_path, adapter=name)
    assert_close(logits(base, "llama"), logits(model, "llama"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("targets", [["0"], ["0", "1"], "all-linear"])
def test_an_attention_is_complete_with_both_of_its_projections(tmp_path: Path, targets: Any) -> None:
    base = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)).double()
    if targets == "all-linear":
        targets = ["0.out_proj", "1"]  # as PEFT resolves and writes it
    theirs(tmp_path, base, target_modules=targets)
    lora_lab.load(copy.deepcopy(base), tmp_path)
    edit(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if "out_proj" not in key} or {"x": torch.ones(1)})
    refused(base, tmp_path, "names '0.out_proj', of which")


def test_experts_that_all_linear_means_for_peft_are_no_layers(tmp_path: Path) -> None:
    """PEFT adapts the experts' parameters with "all-linear", and writes them as target_parameters beside the layers."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    base = transformers.MixtralForCausalLM(config).double().eval()
    for module in base.modules():
        if (own := getattr(module, "config", None)) is not None:
            own._experts_implementation = "eager"
    model = theirs(tmp_path, base, target_modules="all-linear")
    assert json.loads((tmp_path / CONFIG).read_text())["target_parameters"]
    assert_close(logits(lora_lab.load(base, tmp_path), "llama"), logits(model, "llama"), rtol=0, atol=1e-9)
