"""What stands in an adapter file beside the adapter: whole embeddings, biases of models without any, requests that make no sense."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, build, logits, randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|tied)")


def theirs(folder: Path, family: str = "llama", embeddings: Any = "auto", moved: float = 0.0, **settings: Any) -> tuple[nn.Module, torch.Tensor]:
    """(the base, what PEFT computes with the adapter it saved). moved: by how much the embedding was trained on the side."""
    base = build(family)
    model = randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, **settings)).double(), by=0.2)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(moved)
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    return base, logits(model.eval(), family)


# Whole embeddings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "targets", "embeddings"), [
    ("llama", ["embed_tokens", "q_proj"], "auto"), ("llama", ["lm_head"], "auto"), ("llama", ["q_proj"], True), ("gpt2", ["wte"], True),
    ("gpt2", ["c_attn"], True), ("t5", ["q"], True),
])  # fmt: skip
def test_whole_embeddings_that_are_the_bases_own_are_left_out(tmp_path: Path, family: str, targets: list[str], embeddings: Any) -> None:
    """PEFT writes them wherever they are adapted, or asked for: they say nothing new, and belong to no adapter."""
    base, expected = theirs(tmp_path, family, embeddings, target_modules=targets)
    assert any("lora_" not in key for key in load_file(tmp_path / TENSORS))
    ours = lora_lab.load(base, tmp_path)
    assert_close(logits(ours, family), expected, rtol=0, atol=1e-9)
    assert ours.lora_injection.base_parameters.names == {"default": ()}


@pytest.mark.parametrize(("family", "targets"), [
    ("llama", ["embed_tokens", "q_proj"]), ("llama", ["q_proj"]), ("gpt2", ["wte"]), ("gpt2", ["c_attn"]),
    ("gpt2", ["lm_head"]),
])  # fmt: skip
def test_whole_embeddings_that_are_not_the_bases_become_the_adapters(tmp_path: Path, family: str, targets: list[str]) -> None:
    base, expected = theirs(tmp_path / "theirs", family, True, moved=0.5, target_modules=targets)
    before = logits(base, family)
    ours = lora_lab.load(base, tmp_path / "theirs", trainable=True)
    assert_close(logits(ours, family), expected, rtol=0, atol=1e-9)
    with lora_lab.disabled(ours):
        assert torch.equal(logits(ours, family), before)
    assert all("lora_" in name for name, parameter in ours.named_parameters() if parameter.requires_grad)  # as in PEFT, they do not train
    lora_lab.save(ours, tmp_path / "ours")
    assert_close(logits(lora_lab.load(build(family), tmp_path / "ours"), family), expected, rtol=0, atol=1e-9)
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").double().eval()
    assert_close(logits(again, family), expected, rtol=0, atol=1e-6)
    assert torch.equal(logits(lora_lab.eject(ours), family), before)


def test_a_resized_vocabulary_asks_for_the_same_of_the_model(tmp_path: Path) -> None:
    """PEFT issues 2898, 1457: new rows are saved with the whole matrices, and sizes clash when the base is loaded anew."""
    base, _ = theirs(tmp_path / "small", target_modules=["q_proj"])
    torch.manual_seed(0)
    base.resize_token_embeddings(70)
    model = randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=["q_proj"])).double())
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = build("llama")
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(LoraLabError, match=r"\[70, 32\].*expected \[64, 32\] finite numbers: resize this model's vocabulary first, to 70"):
        lora_lab.load(fresh, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    torch.manual_seed(1)  # other new rows
    fresh.resize_token_embeddings(70)
    ids = torch.tensor([[3, 66, 69, 5]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert not torch.allclose(fresh(ids).logits, base(ids).logits)
        assert_close(lora_lab.load(fresh, tmp_path)(ids).logits, expected, rtol=0, atol=1e-9)


def test_two_values_for_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    """PEFT's copies of tied modules drift apart (trap 2); one tensor cannot hold both."""
    theirs(tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    tied = FAMILIES["llama"](tie_word_embeddings=True).double()
    with pytest.raises(LoraLabError, match="'model.embed_tokens.weight' are one tensor in this model, and two different ones in the file"):
        lora_lab.load(tied, tmp_path)
    assert not hasattr(tied, "lora_injection")


def test_another_whole_tensor_is_still_unexpected(tmp_path: Path) -> None:
    base, _ = theirs(tmp_path, target_modules=["q_proj"])
    tensors = load_file(tmp_path / TENSORS)
    save_file(tensors | {"base_model.model.model.norm.weight": torch.ones(32)}, tmp_path / TENSORS)
    with pytest.raises(LoraLabError, match="unexpected tensor 'model.norm.weight'"):
        lora_lab.load(base, tmp_path)


def test_the_values_in_place_are_not_taken_for_the_bases(tmp_path: Path) -> None:
    """While an adapter with an embedding of its own is active, another file's is compared with the base's all the same."""
    base, expected = theirs(tmp_path / "moved", "llama", True, moved=0.5, target_modules=["q_proj"])
    _, plain = theirs(tmp_path / "plain", "llama", True, target_modules=["q_proj"])
    model = lora_lab.load(base, tmp_path / "moved", adapter="moved")
    lora_lab.load(model, tmp_path / "plain", adapter="plain")
    assert_close(logits(model, "llama"), plain, rtol=0, atol=1e-9)
    assert_close(logits(lora_lab.use(model, "moved"), "llama"), expected, rtol=0, atol=1e-9)
    assert model.lora_injection.base_parameters.names["plain"] == ()


# Models without biases, modules with adapters, requests without sense --------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_model_without_any_are_no_tensors(tmp_path: Path, bias: str) -> None:
    """PEFT takes bias="all" for T5, which has none; `inject` says so, a file need not be refused for it."""
    base, expected = theirs(tmp_path, "t5", target_modules=["q", "v"], bias=bias)
    assert_close(logits(lora_lab.load(base, tmp_path), "t5"), expected, rtol=0, atol=1e-9)
    with pytest.raises(LoraLabError, match="no bias"):
        lora_lab.inject(build("t5"), target_modules=["q"], bias=bias)


def test_a_module_that_is_trained_whole_leaves_the_adapters_inside_it_alone(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    model = lora_lab.inject(copy.deepcopy(base), rank=2, adapter="early")
    model = lora_lab.inject(model, rank=2, target_modules=["0"], exclude_modules=["1"], modules_to_save=["1"], adapter="late")
    of_early = lora_lab.use(randomise(model), "early")(x)
    lora_lab.use(model, "late")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["0.lora_A.late", "0.lora_B.late", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]
    with torch.no_grad():
        model[1][0].weight.add_(1.0)
    y = model(x)
    lora_lab.save(model, tmp_path)
    assert not any("lora_" in key and ".1." in key for key in load_file(tmp_path / TENSORS))
    assert_close(lora_lab.load(base, tmp_path)(x), y, rtol=0, atol=1e-12)
    assert_close(lora_lab.use(model, "early")(x), of_early, rtol=0, atol=1e-12)


@pytest.mark.parametrize("whole", [["1"], ["0", "1"]])
def test_a_quantised_module_is_not_trained_whole(whole: list[str]) -> None:
    """Only its bias would train, without a word."""
    model = lora_lab.quantize(nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Linear(64, 64), nn.Linear(64, 64)), "nf4")
    with pytest.raises(LoraLabError, match="'(1|0.0)' is quantised, and codes do not train"):
        lora_lab.inject(model, rank=2, target_modules=["2"], modules_to_save=whole)
    assert not hasattr(model, "lora_injection")


@pytest.mark.parametrize("names", [5, "0", {"a": 1}, [5], True])
def test_modules_to_save_that_is_no_list_of_names_is_refused(tmp_path: Path, names: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(LoraLabError, match="modules_to_save=.*expected a list of names"):
        lora_lab.inject(model, rank=2, target_modules=["1"], modules_to_save=names)
    lora_lab.save(lora_lab.inject(copy.deepcopy(model), rank=2, target_modules=["1"]), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | {"modules_to_save": names}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)
    with pytest.raises(LoraLabError, match=f"{CONFIG}: modules_to_save=.*expected a list of names"):
        lora_lab.load(model, tmp_path)
