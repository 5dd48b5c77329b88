"""Files that PEFT trained on a base it had changed: PiSSA and OLoRA become plain adapters on the base itself, the others are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_models import build, logits, randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

CONFIG = "adapter_config.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "patterns": {"r": 3, "lora_alpha": 6, "rank_pattern": {"v_proj": 5, r"0\..*\.q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    "biases": {"r": 2, "lora_alpha": 4, "bias": "lora_only"},
    "an embedding": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
}


def trained(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, embeddings: Any = False, **settings: Any) -> torch.Tensor:
    """PEFT's adapter after some training, in `folder`; returns the logits of PEFT's own reload."""
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    theirs = randomise(peft.get_peft_model(build(family, dtype), peft.LoraConfig(**settings)), by=0.1)
    theirs.save_pretrained(folder, save_embedding_layers=embeddings)
    return reload(folder, family, dtype)


def reload(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(build(family, dtype), folder).eval(), family)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_loaded_adapter_computes_what_peft_computes_on_its_changed_base(tmp_path: Path, init: str, settings: str) -> None:
    family = "opt" if settings == "biases" else "llama"
    expected = trained(tmp_path, family, init_lora_weights=init, **SETTINGS[settings])
    base = build(family, torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ours = lora_lab.load(base, tmp_path)
    assert_close(logits(ours, family), expected, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(expected, logits(build(family, torch.float32), family), atol=0.1)
    assert all(torch.equal(value, before[name]) for name, value in lora_lab.eject(ours).state_dict().items())  # PEFT changes the base for good


@pytest.mark.parametrize(("init", "targets"), [("pissa", ["c_attn", "c_proj"]), ("olora", ["attn.c_proj"])])
def test_transposed_layers_too(tmp_path: Path, init: str, targets: list[str]) -> None:
    """PEFT's SVD is of W [out, in]; its QR is of the weight as Conv1D stores it, [in, out], though B A is added as [out, in]."""
    expected = trained(tmp_path, "gpt2", init_lora_weights=init, target_modules=targets, r=4, lora_alpha=4, fan_in_fan_out=True)
    ours = lora_lab.load(build("gpt2", torch.float32), tmp_path)
    assert_close(logits(ours, "gpt2"), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_16_bit_base_agrees_to_its_own_rounding(tmp_path: Path, init: str) -> None:
    """PEFT rounds what is left of W to 16 bit; that error is of the size of the weights' own."""
    expected = trained(tmp_path, dtype=torch.bfloat16, init_lora_weights=init, r=3, lora_alpha=6)
    ours = logits(lora_lab.load(build("llama", torch.bfloat16), tmp_path), "llama").float()
    exact = trained(tmp_path / "float32", init_lora_weights=init, r=3, lora_alpha=6)
    assert (ours - expected.float()).norm() < 0.05 * ours.norm()
    assert exact.isfinite().all() and (ours - logits(build("llama", torch.bfloat16), "llama").float()).norm() > 0.2 * ours.norm()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_saved_again_it_is_a_plain_adapter_that_peft_and_merge_checkpoint_take(tmp_path: Path, init: str) -> None:
    expected = trained(tmp_path / "theirs", init_lora_weights=init, **SETTINGS["patterns"])
    lora_lab.save(lora_lab.load(build("llama", torch.float32), tmp_path / "theirs"), tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / CONFIG).read_text())
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    ranks = {key.split(".")[4] + key.split(".")[6]: len(tensor) for key, tensor in tensors.items() if "lora_A" in key}
    assert written["init_lora_weights"] is True and ranks == {"0q_proj": 4, "0v_proj": 10, "1q_proj": 6, "1v_proj": 10}
    assert_close(reload(tmp_path / "plain"), expected, rtol=1e-4, atol=2e-4)
    base = build("llama", torch.float32)
    base.save_pretrained(tmp_path / "base")
    lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "plain", tmp_path / "out", progress=False)
    assert_close(logits(type(base).from_pretrained(tmp_path / "out").eval(), "llama"), expected, rtol=1e-4, atol=2e-4)


def test_one_of_several_adapters_may_have_its_layers_trained_whole(tmp_path: Path) -> None:
    """The start is a part of the base's own weight, not of what another adapter has put in its place."""
    expected = trained(tmp_path, init_lora_weights="pissa", r=3, lora_alpha=6)
    model = lora_lab.inject(build("llama", torch.float32), rank=2, target_modules=["down_proj"], modules_to_save=["q_proj"], adapter="whole")
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj").weight.add_(1.0)
    assert_close(logits(lora_lab.load(model, tmp_path), "llama"), expected, rtol=1e-4, atol=2e-4)


def test_continued_training_and_replacing_go_on_from_the_files_values(tmp_path: Path) -> None:
    trained(tmp_path, init_lora_weights="pissa", r=3, lora_alpha=6)
    model = lora_lab.load(build("llama", torch.float32), tmp_path, trainable=True)
    y = logits(model, "llama")
    randomise(model)
    assert not torch.allclose(logits(model, "llama"), y, atol=0.1)
    assert_close(logits(lora_lab.load(model, tmp_path, replace=True), "llama"), y)


# The head, whose weight PEFT writes into the file and which may be the embedding's, too ---------------------------------------------


def llama(tied: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    return build("llama", dtype, tie_word_embeddings=tied)


def head_trained(folder: Path, tied: bool, init: str, dtype: torch.dtype = torch.float32, embeddings: Any = "auto", **settings: Any) -> torch.Tensor:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], **settings}
    theirs = randomise(peft.get_peft_model(llama(tied, dtype), peft.LoraConfig(init_lora_weights=init, **settings)), by=0.1)
    theirs.save_pretrained(folder, save_embedding_layers=embeddings)
    return head_reload(folder, tied, dtype)


def head_reload(folder: Path, tied: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(llama(tied, dtype), folder).eval(), "llama")


HEADS: dict[str, dict[str, Any]] = {
    "written": {},
    "not written": {"embeddings": False},
    "with an embedding": {"target_modules": ["lm_head", "embed_tokens"]},
    "dora": {"use_dora": True},
    "all-linear and all written": {"target_modules": ["lm_head", "q_proj", "down_proj"], "embeddings": True},
}


@pytest.mark.parametrize("settings", HEADS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_left_of_a_head_is_in_the_file_and_not_taken_out_twice(tmp_path: Path, init: str, tied: bool, settings: str) -> None:
    """Where the embedding is tied, PEFT changes it with the head."""
    expected = head_trained(tmp_path / "theirs", tied, init, **HEADS[settings])
    base = llama(tied)
    before = logits(base, "llama")
    ours = lora_lab.load(base, tmp_path / "theirs", trainable=True)
    assert_close(logits(ours, "llama"), expected, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(expected, before, atol=0.1)
    assert all("lora_" in name for name, parameter in ours.named_parameters() if parameter.requires_grad)
    lora_lab.save(ours, tmp_path / "plain")
    whole = [key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors") if "lora_" not in key]
    middle = "base_layer." if settings == "with an embedding" else ""
    assert whole == (["base_model.model.lm_head.base_layer.weight", f"base_model.model.model.embed_tokens.{middle}weight"] if tied else [])
    assert_close(head_reload(tmp_path / "plain", tied), expected, rtol=1e-4, atol=2e-4)
    assert torch.equal(logits(lora_lab.eject(ours), "llama"), before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_saved_again_is_merged_into_a_checkpoint(tmp_path: Path, tied: bool) -> None:
    """What is left of a tied weight is the embedding's and the head's; only the head has an adapter besides."""
    expected = head_trained(tmp_path / "theirs", tied, "pissa")
    base = llama(tied)
    base.save_pretrained(tmp_path / "base")
    lora_lab.save(lora_lab.load(base, tmp_path / "theirs"), tmp_path / "plain")
    lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "plain", tmp_path / "out", progress=False, untie=tied)
    assert_close(logits(type(base).from_pretrained(tmp_path / "out").eval(), "llama"), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_untrained_start_is_the_base_itself(tmp_path: Path, init: str, tied: bool) -> None:
    """Untied; a tied embedding has lost what the head still has."""
    peft.get_peft_model(llama(tied), peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=init)).save_pretrained(tmp_path)
    ours = logits(lora_lab.load(llama(tied), tmp_path), "llama")
    assert_close(ours, head_reload(tmp_path, tied), rtol=1e-4, atol=2e-4)
    assert torch.allclose(ours, logits(llama(tied), "llama"), atol=1e-4) is not tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_16_bit_head_is_what_peft_left_of_it_up_to_rounding(tmp_path: Path, tied: bool) -> None:
    expected = head_trained(tmp_path, tied, "pissa", torch.bfloat16)
    ours = logits(lora_lab.load(llama(tied, torch.bfloat16), tmp_path), "llama").float()
    assert (ours - expected.float()).norm() < 0.05 * ours.norm()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_left_of_another_base_is_refused(tmp_path: Path, init: str, tied: bool) -> None:
    head_trained(tmp_path, tied, init)
    other = llama(tied)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    refused(other, tmp_path, r"'lm_head': the file has what PEFT left of the weight it trained on.*(0.9|1.0)% of its norm.*another base")
    with torch.no_grad():  # the base that PEFT left behind
        other.lm_head.weight.copy_(load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lm_head.base_layer.weight"])
    refused(other, tmp_path, "it was trained on another base")


def test_two_starts_out_of_one_weight_are_refused(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    model = Twice()
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="pissa")).save_pretrained(tmp_path)
    refused(model, tmp_path, "'b': it shares its weight with another adapted layer, and PEFT takes two starts out of it")


# What cannot be found again -----------------------------------------------------------------------------------------------------


def edited(folder: Path, **changes: Any) -> Path:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))
    return folder


def refused(model: nn.Module, folder: Path, message: str) -> None:
    before, keys = copy.deepcopy(model), list(model.state_dict())
    with pytest.raises(LoraLabError, match=message):
        lora_lab.load(model, folder)
    assert list(model.state_dict()) == keys and not hasattr(model, "lora_injection")
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("init", "message"), [
    ("pissa_niter_4", "randomised SVD that cannot be computed again.*convert"), ("corda", "changed the base.*convert"),
    ("lora_ga", "changed the base.*convert"), ("loftq", "changed the base.*convert"), ("of_tomorrow", "changed the base.*convert"),
])  # fmt: skip
def test_other_changes_of_the_base_are_refused(tmp_path: Path, init: str, message: str) -> None:
    trained(tmp_path, r=3)
    refused(build("llama", torch.float32), edited(tmp_path, init_lora_weights=init), f"init_lora_weights='{init}' {message}|{message}")


def test_a_merge_of_files_says_the_way_out(tmp_path: Path) -> None:
    trained(tmp_path / "adapter", init_lora_weights="olora", r=3)
    build("llama", torch.float32).save_pretrained(tmp_path / "base")
    with pytest.raises(LoraLabError, match="init_lora_weights='olora'.*`load` computes again and `save` then writes"):
        lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)


def one_layer(folder: Path, weight: torch.Tensor, init: str, rank: int = 2, **settings: Any) -> nn.Module:
    """A layer of this weight, and an untrained adapter of PEFT's for it in `folder`."""
    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=init, **settings))
    theirs.save_pretrained(folder)
    return model


def test_equal_singular_values_on_both_sides_of_the_cut_are_refused(tmp_path: Path) -> None:
    """Every direction of an orthogonal weight is as good as any other: which two PEFT took is not in the file."""
    weight = torch.linalg.qr(torch.randn(6, 6))[0]
    refused(one_layer(tmp_path, weight, "pissa"), tmp_path, "singular values 2 and 3 of the weight are equal")


@pytest.mark.parametrize("values", [[3.0, 3.0, 1.0, 0.5], [3.0, 2.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
def test_equal_singular_values_on_one_side_of_the_cut_cancel_in_the_product(tmp_path: Path, values: list[float]) -> None:
    left, right = (torch.linalg.qr(torch.randn(4, 4))[0] for _ in range(2))
    model, x = one_layer(tmp_path, left @ torch.diag(torch.tensor(values)) @ right, "pissa"), torch.randn(3, 4)
    assert_close(lora_lab.load(copy.deepcopy(model), tmp_path)(x), model(x), rtol=0, atol=1e-5)


def test_dependent_columns_are_refused_for_olora_and_a_full_rank_needs_no_choice(tmp_path: Path) -> None:
    weight = torch.randn(5, 4)
    weight[:, 1] = 2 * weight[:, 0]
    refused(one_layer(tmp_path / "cut", weight, "olora"), tmp_path / "cut", "first 2 columns of the weight depend on each other")
    model, x = one_layer(tmp_path / "full", weight, "olora", rank=4), torch.randn(3, 4)
    assert_close(lora_lab.load(copy.deepcopy(model), tmp_path / "full")(x), model(x), rtol=0, atol=1e-5)


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    for init in ("pissa", "olora"):
        model = one_layer(tmp_path, torch.randn(64, 64), init)
        refused(lora_lab.quantize(model, "nf4"), tmp_path, "quantises again what is left of the base")


def test_a_scaling_without_a_root_is_refused(tmp_path: Path) -> None:
    model = one_layer(tmp_path, torch.randn(4, 4), "pissa")
    refused(model, edited(tmp_path, lora_alpha=-8), "expected a number above 0")


def test_an_output_projection_of_an_attention_is_refused(tmp_path: Path) -> None:
    """PEFT takes the start out of its weight and never adds the adapter: nobody means that."""
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights="pissa"))
    theirs.save_pretrained(tmp_path)
    refused(model, tmp_path, "linear layers only")


class Raw(nn.Module):
    """A parameter of a module that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table


def test_a_parameter_that_is_no_layer_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Raw())
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.table"]))
    theirs.save_pretrained(tmp_path)
    refused(model, edited(tmp_path, init_lora_weights="pissa"), "at '0.table', a parameter that is no layer")


def test_a_start_that_leaves_the_base_alone_is_read_as_it_is(tmp_path: Path) -> None:
    """MiCA: B is of the smallest singular values and frozen, A begins at zero."""
    expected = trained(tmp_path, init_lora_weights="mica", r=3, lora_alpha=6)
    assert_close(logits(lora_lab.load(build("llama", torch.float32), tmp_path), "llama"), expected, rtol=1e-5, atol=1e-5)
