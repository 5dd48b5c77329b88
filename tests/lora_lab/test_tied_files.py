"""Tied weights in adapter files: one tensor here, a copy for each module that is named in PEFT; both are to compute the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import SMALL, build, learn, logits, randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TARGETS = {"llama": ["q_proj"], "gemma": ["q_proj"], "gpt2": ["c_attn"], "t5": ["q"]}
pytestmark = pytest.mark.filterwarnings("ignore:.*(save_embedding_layers|tie_word_embeddings|tied|ensure_weight_tying|fan_in_fan_out)")


def tied(family: str) -> nn.Module:
    if family != "gemma":
        return build(family, **({"tie_word_embeddings": True} if family == "llama" else {}))
    torch.manual_seed(1)
    config = transformers.Gemma2Config(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                       num_key_value_heads=2, head_dim=8)  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).double().eval()


def learned(model: nn.Module) -> nn.Module:
    return learn(model, by=0.2, seed=5).eval()


def theirs(folder: Path, family: str, **settings: Any) -> torch.Tensor:
    """What PEFT computes with the adapter that it trained and saved."""
    config = peft.LoraConfig(r=2, target_modules=settings.pop("targets", TARGETS[family]), **settings)
    model = learned(peft.get_peft_model(tied(family), config).double())
    model.save_pretrained(folder)
    return logits(model, family)


def with_peft(folder: Path, family: str) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(tied(family), folder, autocast_adapter_dtype=False).eval(), family)


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


# Whole modules --------------------------------------------------------------------------------------------------------------------


ONE_OF_THEM = [("llama", "lm_head"), ("llama", "embed_tokens"), ("gemma", "lm_head"), ("gemma", "embed_tokens"), ("gpt2", "wte"), ("gpt2", "lm_head"),
               ("t5", "shared"), ("t5", "lm_head"), ("t5", "decoder.embed_tokens")]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), ONE_OF_THEM)
def test_a_tied_tensor_is_written_under_all_its_names_so_that_peft_computes_the_same(tmp_path: Path, family: str, name: str) -> None:
    """PEFT unties what is named alone: its copy would be trained, the other module the base's."""
    base = tied(family)
    model = learned(lora_lab.inject(copy.deepcopy(base), rank=2, target_modules=TARGETS[family], modules_to_save=[name]))
    assert not torch.allclose(logits(model, family), logits(base, family), atol=0.1)
    lora_lab.save(model, tmp_path)
    whole, embedding = {key for key in load_file(tmp_path / TENSORS) if "lora_" not in key}, base.get_input_embeddings().weight
    assert whole == {PREFIX + key for key, parameter in base.named_parameters(remove_duplicate=False) if parameter is embedding}
    assert_close(with_peft(tmp_path, family), logits(model, family), rtol=0, atol=1e-12)
    assert torch.equal(logits(lora_lab.load(base, tmp_path), family), logits(model, family))
    assert written(tmp_path)["ensure_weight_tying"] is (family != "t5")  # PEFT's tied T5 does not run: it makes linear layers of its embeddings


def test_nothing_is_said_of_modules_that_are_not_tied(tmp_path: Path) -> None:
    lora_lab.save(lora_lab.inject(build("llama"), rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path)
    assert written(tmp_path)["modules_to_save"] == ["lm_head"] and written(tmp_path)["ensure_weight_tying"] is False


def test_names_of_tied_modules_mean_no_other_module(tmp_path: Path) -> None:
    """PEFT's modules_to_save compares ends of names without regard to dots."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ModuleDict({"head": nn.Linear(4, 4, bias=False)}), nn.ModuleDict({"head": nn.Linear(4, 4, bias=False)})
            self.overhead = nn.Linear(4, 4)
            self.a["head"].weight = self.b["head"].weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a["head"](self.b["head"](x)) + self.overhead(x)

    torch.manual_seed(0)
    base, x = Model().double(), torch.randn(3, 4, dtype=torch.float64)
    model = learned(lora_lab.inject(copy.deepcopy(base), rank=2, target_modules=["overhead"], modules_to_save=["b.head"]))
    lora_lab.save(model, tmp_path)
    assert written(tmp_path)["modules_to_save"] == ["b.head", "a.head"]
    assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)(x), model(x), rtol=0, atol=1e-12)
    assert torch.equal(lora_lab.load(base, tmp_path)(x), model(x))


class Biased(nn.Module):
    """A head whose weight is tied and whose bias is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)))


def test_what_else_is_in_a_tied_module_is_written_as_the_base_has_it(tmp_path: Path) -> None:
    """PEFT wants whole modules; and a head that it ties itself would lose its bias."""
    torch.manual_seed(0)
    base, ids = Biased().double(), torch.tensor([[1, 2, 3]])
    model = learned(lora_lab.inject(copy.deepcopy(base), rank=2, target_modules=["block"], modules_to_save=["embed"]))
    lora_lab.save(model, tmp_path)
    assert torch.equal(load_file(tmp_path / TENSORS)[PREFIX + "head.bias"], base.head.bias)
    assert written(tmp_path)["ensure_weight_tying"] is False
    assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)(ids), model(ids), rtol=0, atol=1e-12)
    assert torch.equal(lora_lab.load(base, tmp_path)(ids), model(ids))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_tensor_that_trains_whole_below_another_adapter_is_put_in_its_place(tmp_path: Path, family: str) -> None:
    """PEFT has no adapters in what it trains whole; a tensor of neither kind it writes into the base."""
    embedding, base = {"llama": "embed_tokens", "gpt2": "wte"}[family], tied(family)
    model = learned(lora_lab.inject(copy.deepcopy(base), rank=2, target_modules=["lm_head"], modules_to_save=[embedding]))
    lora_lab.save(model, tmp_path)
    assert PREFIX + "lm_head.base_layer.weight" in load_file(tmp_path / TENSORS) and written(tmp_path)["modules_to_save"] == [embedding]
    assert_close(with_peft(tmp_path, family), logits(model, family), rtol=0, atol=1e-12)
    assert_close(logits(lora_lab.load(base, tmp_path), family), logits(model, family), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", ["Bert", "Roberta"])
@pytest.mark.parametrize("name", ["decoder", "word_embeddings", "head"])
@pytest.mark.parametrize("targets", [["query"], ["query", "dense"]])
def test_heads_of_masked_words_with_a_tied_weight_and_a_tied_bias(tmp_path: Path, cls: str, name: str, targets: list[str]) -> None:
    """The bias of the decoder is that of the module around it, too, in which other layers may have adapters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{cls}Config")(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    base = getattr(transformers, f"{cls}ForMaskedLM")(config).double().eval()
    request = {"target_modules": targets, "modules_to_save": [{"Bert": "cls", "Roberta": "lm_head"}[cls] if name == "head" else name]}
    model, ids = learned(lora_lab.inject(copy.deepcopy(base), rank=2, **request)), torch.tensor([[4, 9, 7, 20]])
    lora_lab.save(model, tmp_path)
    y = model(ids).logits
    assert not torch.allclose(y, base(ids).logits, atol=0.1)
    model_of_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False).eval()
    assert_close(model_of_peft(ids).logits, y, rtol=0, atol=1e-12)
    assert_close(lora_lab.load(base, tmp_path)(ids).logits, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "name"), ONE_OF_THEM[:8])
def test_a_file_with_one_of_two_tied_modules_is_refused_and_read_by_an_untied_model(tmp_path: Path, family: str, name: str) -> None:
    """PEFT trained a copy of it; in one shared tensor that is another function."""
    expected = theirs(tmp_path, family, modules_to_save=[name])
    model = tied(family)
    before = logits(model, family)
    assert not torch.allclose(expected, before, atol=0.1) or name == "shared"  # T5 does not use its `shared` itself
    with pytest.raises(LoraLabError, match=r"one tensor in this model: PEFT trained a copy.*untie them first, model\.\S+ = torch") as error:
        lora_lab.load(model, tmp_path)
    assert torch.equal(logits(model, family), before) and not hasattr(model, "lora_injection")
    advice = str(error.value).partition("untie them first, ")[2].partition(", and say so")[0]
    exec(advice, {"model": model, "torch": torch})
    assert_close(logits(lora_lab.load(model, tmp_path), family), expected, rtol=0, atol=1e-9)


def test_one_module_at_two_paths_is_untied_by_a_copy(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4).double()
    base = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4).double()})
    learned(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["c"], modules_to_save=["b"]))).save_pretrained(tmp_path)
    with pytest.raises(LoraLabError, match=r"model.b = copy.deepcopy\(model.b\)"):
        lora_lab.load(base, tmp_path)
    base["b"] = copy.deepcopy(base["b"])
    assert not torch.equal(lora_lab.load(base, tmp_path)["b"].weight, base["a"].weight)


@pytest.mark.parametrize(("family", "names"), [("llama", ["lm_head"]), ("llama", ["embed_tokens"]), ("gemma", ["lm_head"]), ("gpt2", ["lm_head"])])
def test_a_tying_that_peft_ensured_is_read_and_kept(tmp_path: Path, family: str, names: list[str]) -> None:
    expected = theirs(tmp_path / "theirs", family, modules_to_save=names, ensure_weight_tying=True)
    ours = lora_lab.load(tied(family), tmp_path / "theirs", trainable=True)
    assert_close(logits(ours, family), expected, rtol=0, atol=1e-9)
    learned(ours)
    lora_lab.save(ours, tmp_path / "ours")
    assert written(tmp_path / "ours")["ensure_weight_tying"] is True
    assert_close(with_peft(tmp_path / "ours", family), logits(ours, family), rtol=0, atol=1e-12)


def test_two_values_for_one_tensor_are_named_both(tmp_path: Path) -> None:
    theirs(tmp_path, "llama", modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(LoraLabError, match="'lm_head.weight' and 'model.embed_tokens.weight' are one tensor in this model, and two different ones"):
        lora_lab.load(tied("llama"), tmp_path)


def test_equal_values_for_one_tensor_are_one_value(tmp_path: Path) -> None:
    theirs(tmp_path, "llama", modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(tmp_path / TENSORS)
    tensors[PREFIX + "lm_head.weight"] = tensors[PREFIX + "model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / TENSORS)
    assert_close(logits(lora_lab.load(tied("llama"), tmp_path), "llama"), with_peft(tmp_path, "llama"), rtol=0, atol=1e-9)


# Adapters of tied layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "targets"), [("llama", ["embed_tokens"]), ("llama", ["lm_head", "q_proj"]), ("gemma", ["lm_head"])])
def test_tied_adapters_are_two_that_are_equal_and_no_longer_said_to_be_tied_once_they_differ(tmp_path: Path, family: str, targets: list[str]) -> None:
    """PEFT's ensure_weight_tying gives the head the embedding's pair, transposed: it names one layer, and writes the tensors of both."""
    expected = theirs(tmp_path / "theirs", family, targets=targets, ensure_weight_tying=True)
    ours = lora_lab.load(tied(family), tmp_path / "theirs", trainable=True)
    assert_close(logits(ours, family), expected, rtol=0, atol=1e-9)
    lora_lab.save(ours, tmp_path / "same")
    assert written(tmp_path / "same")["ensure_weight_tying"] is True
    assert_close(with_peft(tmp_path / "same", family), expected, rtol=0, atol=1e-9)
    randomise(ours)
    lora_lab.save(ours, tmp_path / "apart")
    assert written(tmp_path / "apart")["ensure_weight_tying"] is False
    assert_close(with_peft(tmp_path / "apart", family), logits(ours, family), rtol=0, atol=1e-9)


def test_a_tying_of_another_type_is_refused(tmp_path: Path) -> None:
    theirs(tmp_path, "llama")
    (tmp_path / CONFIG).write_text(json.dumps(written(tmp_path) | {"ensure_weight_tying": "yes"}))
    with pytest.raises(LoraLabError, match="ensure_weight_tying='yes': expected true or false"):
        lora_lab.load(tied("llama"), tmp_path)
