"""modules_to_save in files: PEFT takes every module whose path ends so, without regard to dots, and writes some of them under more than one name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import build, logits, randomise
from torch import Tensor, nn
from torch.testing import assert_close

import lora_lab
from lora_lab.peft_files.names import exact_names, meant_by_peft

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|tied)")
SMALL = {"vocab_size": 40, "num_labels": 3, "pad_token_id": 0}
IDS = torch.tensor([[3, 7, 9, 4], [5, 6, 2, 8]])


def distilbert() -> nn.Module:
    """It has a pre_classifier beside its classifier."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=2, max_position_embeddings=16, **SMALL)
    return transformers.DistilBertForSequenceClassification(config).double().eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **SMALL)).double().eval()


class Heads(nn.Module):
    """Two heads in the model itself, of which one name ends in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux_head = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).tanh()
        return torch.cat([self.head(x), self.aux_head(x)], -1)


def heads() -> nn.Module:
    torch.manual_seed(0)
    return Heads().double().eval()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Norms(nn.Module):
    """A norm in the model itself, and one of the same name in a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.part, self.norm = nn.Linear(6, 6), Inner(), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.part(self.body(x)) + x)


def norms() -> nn.Module:
    torch.manual_seed(0)
    return Norms().double().eval()


@torch.no_grad()
def classes(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def both(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6))


def llama_logits(model: nn.Module) -> Tensor:
    return logits(model, "llama")


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "norm": (lambda: build("llama"), llama_logits, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),  # LongLoRA's
    "a classifier": (distilbert, classes, {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}),
    "a head beside another": (heads, both, {"target_modules": ["body"], "modules_to_save": ["head"]}),
}


def moved(model: nn.Module) -> nn.Module:
    """Everything that trains, so that a value from the wrong place shows."""
    return randomise(model, by=0.2)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_means_by_a_name_is_read(case: str, tmp_path: Path) -> None:
    make, outputs, request = copy.deepcopy(CASES[case])  # PEFT extends the list of names
    task = "SEQ_CLS" if case == "a classifier" else None  # PEFT adds classifier and score itself
    model = moved(peft.get_peft_model(make(), peft.LoraConfig(r=2, task_type=task, **request)).double())
    model.save_pretrained(tmp_path)
    ours = lora_lab.load(make(), tmp_path)
    assert_close(outputs(ours), outputs(model.eval()), rtol=0, atol=1e-9)
    before = outputs(make())
    with lora_lab.disabled(ours):
        assert torch.equal(outputs(ours), before)
    lora_lab.save(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "again").double().eval()
    assert_close(outputs(again), outputs(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_what_we_mean_by_a_name_is_what_peft_reads(case: str, tmp_path: Path) -> None:
    """Here names are compared at dots, so the file says them in a way that means the same to both, or brings what else PEFT means by them."""
    make, outputs, request = copy.deepcopy(CASES[case])  # PEFT extends the list of names
    ours = lora_lab.inject(make(), rank=2, **request)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    lora_lab.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).double().eval()
    assert_close(outputs(theirs), outputs(ours), rtol=0, atol=1e-6)
    assert any("modules_to_save" in name for name, _ in theirs.named_modules()), "PEFT found none of them"
    trained = {key for key in load_file(tmp_path / TENSORS) if "lora_" not in key}
    assert len(trained) == {"norm": 1, "a classifier": 4, "a head beside another": 4}[case]
    assert_close(outputs(lora_lab.load(make(), tmp_path)), outputs(ours), rtol=0, atol=1e-6)


def test_one_module_of_a_name_that_means_several_to_peft(tmp_path: Path) -> None:
    """PEFT has no name for the model's own norm alone, so the file brings what else it means by that, as the base has it."""
    ours = lora_lab.inject(norms(), 2, target_modules=["body"], modules_to_save=["base_model.model.norm"])
    assert {name for name, parameter in ours.named_parameters() if parameter.requires_grad and "lora_" not in name} == {"norm.weight", "norm.bias"}
    with torch.no_grad():
        ours.norm.weight.add_(0.5)
    lora_lab.save(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["norm"]
    assert torch.equal(load_file(tmp_path / TENSORS)["base_model.model.part.norm.weight"], torch.ones(6, dtype=torch.float64))
    again = peft.PeftModel.from_pretrained(norms(), tmp_path).double().eval()
    assert_close(both(again), both(ours), rtol=0, atol=1e-6)
    assert_close(both(lora_lab.load(norms(), tmp_path)), both(ours), rtol=0, atol=1e-9)


def test_names_are_the_shortest_that_mean_none_but_these() -> None:
    assert meant_by_peft(heads(), ["head"]) == ["head", "aux_head"]
    assert exact_names(heads(), ["head", "body"]) == ["head", "body"]  # the first cannot be said
    assert exact_names(build("llama"), ["model.norm"]) == ["model.norm"]


# What PEFT writes twice -------------------------------------------------------------------------------------------------------------


def resized() -> nn.Module:
    torch.manual_seed(0)
    model = build("llama")
    model.resize_token_embeddings(70)
    return model.double().eval()


TWICE: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "all biases and a head": (bert, classes, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}, "auto"),
    "embeddings that train": (resized, llama_logits, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "DoRA on an embedding": (lambda: build("gpt2"), lambda model: logits(model, "gpt2"), {"target_modules": ["wte"], "use_dora": True}, True),
}


@pytest.mark.parametrize("case", TWICE)
def test_what_a_file_has_twice_is_read_once(case: str, tmp_path: Path) -> None:
    make, outputs, request, embeddings = TWICE[case]
    base = make()
    model = moved(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **request)).double())
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    keys = load_file(tmp_path / "adapter" / TENSORS).keys()
    assert any(".original_module." in key or "vector.weight" in key for key in keys), sorted(keys)
    expected = outputs(model.eval())
    assert_close(outputs(lora_lab.load(make(), tmp_path / "adapter")), expected, rtol=0, atol=1e-9)
    base.save_pretrained(tmp_path / "base")
    lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False, untie=True)
    merged = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert_close(outputs(merged), expected, rtol=0, atol=1e-9)


def test_a_copy_alone_is_still_unexpected(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    lora_lab.save(lora_lab.inject(heads(), rank=2, target_modules=["body"]), tmp_path)
    save_file({**load_file(tmp_path / TENSORS), "base_model.model.head.original_module.weight": torch.ones(3, 6)}, tmp_path / TENSORS)
    with pytest.raises(lora_lab.LoraLabError, match="unexpected tensor 'head.original_module.weight'"):
        lora_lab.load(heads(), tmp_path)
