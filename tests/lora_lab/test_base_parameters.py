"""Biases and whole modules that train along with an adapter: its own values, and the base's when it is off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from small_models import learn
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError


class Classifier(nn.Module):
    """A body of two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(x))


def build() -> Classifier:
    torch.manual_seed(0)
    return Classifier().double()


def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 6, dtype=torch.float64)


REQUESTS: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["classifier"]},
    "lora_only": {"bias": "lora_only"},
    "all": {"bias": "all"},
    "both": {"bias": "lora_only", "modules_to_save": ["classifier"]},
}
TRAINED = {
    "head": {"classifier.weight", "classifier.bias"},
    "lora_only": {"body.0.bias", "body.2.bias"},
    "all": {"body.0.bias", "body.1.bias", "body.2.bias", "classifier.bias"},
    "both": {"body.0.bias", "body.2.bias", "classifier.weight", "classifier.bias"},
}


def injected(request: str, adapter: str = "default", model: nn.Module | None = None) -> nn.Module:
    model = lora_lab.inject(model or build(), rank=2, target_modules=["0", "2"], adapter=adapter, **REQUESTS[request])
    return learn(model)


@pytest.mark.parametrize("request_", REQUESTS)
def test_exactly_what_is_asked_for_trains_along(request_: str) -> None:
    model = injected(request_)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == TRAINED[request_]


@pytest.mark.parametrize("request_", REQUESTS)
def test_with_the_adapter_off_the_model_is_the_base_again(request_: str) -> None:
    """PEFT warns that with bias="all" the disabled model is not the base; here it is, bit for bit, and so after eject."""
    model, before = injected(request_), build()(x())
    y = model(x())
    with lora_lab.disabled(model):
        assert torch.equal(model(x()), before)
    assert torch.equal(model(x()), y) and not torch.allclose(y, before)
    assert torch.equal(lora_lab.use(model, None)(x()), before)
    lora_lab.use(model, "default")
    assert torch.equal(model(x()), y)
    assert torch.equal(lora_lab.eject(model)(x()), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_each_adapter_has_a_head_of_its_own() -> None:
    model = injected("head", "a")
    of_a = model(x())
    injected("head", "b", model)
    of_b = model(x())
    assert not torch.allclose(of_a, of_b)
    assert torch.equal(lora_lab.use(model, "a")(x()), of_a)
    assert torch.equal(lora_lab.use(model, "b")(x()), of_b)
    with pytest.raises(LoraLabError, match="a and b both train 'classifier.weight' itself"):
        lora_lab.use(model, ["a", "b"])
    assert torch.equal(model(x()), of_b)


def test_rows_that_share_a_head_cannot_have_adapters_with_heads_of_their_own() -> None:
    model, message = injected("head"), "'default' trains 'classifier.weight' of the model itself"
    with pytest.raises(LoraLabError, match=message), lora_lab.per_sample(model, ["default", None]):
        pass


@pytest.mark.parametrize("request_", REQUESTS)
def test_merge_and_unmerge_keep_them(request_: str) -> None:
    model = injected(request_)
    y, before = model(x()), {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(lora_lab.merge(model)(x()), y, rtol=0, atol=1e-12)
    lora_lab.unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    lora_lab.use(model, None)
    lora_lab.merge(model, "default", restorable=False)
    assert_close(model(x()), y, rtol=0, atol=1e-12)
    assert_close(lora_lab.eject(model)(x()), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("request_", REQUESTS)
def test_files_both_ways_with_peft(tmp_path, request_: str) -> None:
    model = injected(request_)
    lora_lab.save(model, tmp_path / "ours")
    assert_close(lora_lab.load(build(), tmp_path / "ours")(x()), model(x()), rtol=0, atol=0)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    assert_close(theirs(x()), model(x()), rtol=0, atol=1e-9)
    settings = {"bias": REQUESTS[request_].get("bias", "none"), "modules_to_save": REQUESTS[request_].get("modules_to_save")}
    theirs = learn(peft.get_peft_model(build(), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"], **settings)).double()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_lab.load(build(), tmp_path / "theirs")
    assert_close(ours(x()), theirs(x()), rtol=0, atol=1e-9)
    with lora_lab.disabled(ours):
        assert torch.equal(ours(x()), build()(x()))


def test_an_inactive_adapter_is_saved_with_its_own_head(tmp_path) -> None:
    model = injected("head", "a")
    of_a = model(x())
    injected("head", "b", model)
    lora_lab.save(model, tmp_path, adapter="a")
    assert_close(lora_lab.load(build(), tmp_path)(x()), of_a, rtol=0, atol=0)


def test_the_new_head_of_a_classifier_travels_with_a_peft_adapter(tmp_path) -> None:
    """PEFT trains and saves "classifier" and "score" of every SEQ_CLS model; a head that is not saved is random when loaded (issues 310, 577)."""

    def bert() -> Any:
        torch.manual_seed(3)
        config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        return transformers.BertForSequenceClassification(config).eval()

    ids = torch.tensor([[1, 5, 9, 2]])
    theirs = learn(peft.get_peft_model(bert(), peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"]))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_lab.load(bert(), tmp_path / "theirs")
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(ours(ids).logits, bert()(ids).logits)
    lora_lab.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(ids)))


def test_tied_modules_stay_tied(tmp_path) -> None:
    """PEFT makes two copies of them that drift apart, unless told otherwise."""
    torch.manual_seed(0)
    base, ids = Tied(), torch.tensor([[1, 2, 3]])
    model = learn(lora_lab.inject(copy.deepcopy(base), rank=2, target_modules=["block"], modules_to_save=["embed", "head"]))
    assert model.head.weight is model.embed.weight
    y = model(ids)
    with lora_lab.disabled(model):
        assert torch.equal(model(ids), base(ids))
    assert torch.equal(model(ids), y)
    lora_lab.save(model, tmp_path)
    assert_close(lora_lab.load(copy.deepcopy(base), tmp_path)(ids), y)


@pytest.mark.parametrize(("request_", "message"), [
    ({"bias": "some"}, "bias='some': expected one of none, all, lora_only"),
    ({"modules_to_save": ["clasifier"]}, r"'clasifier' matches no module.*did you mean 'classifier'"),
    ({"modules_to_save": "classifier"}, r"expected a list of names, \['classifier'\]"),
    ({"modules_to_save": ["body", "classifier"]}, "leave no layer to adapt"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(request_: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.raises(LoraLabError, match=message):
        lora_lab.inject(model, **request_)
    assert not hasattr(model, "lora_injection")


def test_a_module_that_is_trained_whole_gets_no_adapter_and_the_plan_counts_it() -> None:
    planned = lora_lab.plan(build(), rank=2, modules_to_save=["classifier"])
    assert [layer.path for layer in planned.layers] == ["body.0", "body.2"]
    assert "2 of the model's own tensors train along, 27 parameters" in str(planned)


def test_a_file_that_lacks_what_it_announces_is_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    lora_lab.save(injected("head"), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.classifier.bias"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = build()
    with pytest.raises(LoraLabError, match=r"'classifier.bias' is not in the file"):
        lora_lab.load(model, tmp_path)
    assert not hasattr(model, "lora_injection")


def test_rows_without_an_adapter_get_the_bases_own_values() -> None:
    """The active adapter's head is not theirs."""
    model = injected("head", "a")
    lora_lab.inject(model, rank=2, target_modules=["0"], adapter="plain")
    lora_lab.use(model, "a")
    y = model(x())
    with lora_lab.per_sample(model, [None, None]):
        assert_close(model(x()), build()(x()), rtol=0, atol=1e-12)
    assert torch.equal(model(x()), y)


@pytest.mark.parametrize("level", [lambda model: model, nn.Sequential], ids=["as injected", "one level up"])
def test_adapters_with_values_of_the_model_are_not_combined(level: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(LoraLabError, match="'default' trains 'classifier.weight' of the model itself, which a sum"):
        lora_lab.combine(level(injected("head")), {"default": 1.0}, into="c")


def test_replacing_values_takes_an_adapter_of_the_same_making(tmp_path) -> None:
    """A file with a head over an adapter without one would put the head into the base itself, and the other way round keep the old one."""
    lora_lab.save(injected("head"), tmp_path / "head")
    lora_lab.save(learn(lora_lab.inject(build(), rank=2, target_modules=["0", "2"], variant="dora")), tmp_path / "dora")
    plain = learn(lora_lab.inject(build(), rank=2, target_modules=["0", "2"]))
    pissa = learn(lora_lab.inject(build(), rank=2, target_modules=["0", "2"], init="pissa"))
    lora_lab.save(plain, tmp_path / "plain")
    for model, folder in ((plain, "head"), (plain, "dora"), (pissa, "plain"), (injected("head"), "plain")):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(LoraLabError, match="replace=True"):
            lora_lab.load(model, tmp_path / folder, replace=True)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = learn(injected("head"))
    lora_lab.load(other, tmp_path / "head", replace=True)
    assert_close(other(x()), injected("head")(x()), rtol=0, atol=0)


# Whose parameters train -------------------------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_that_is_loaded_for_inference_has_no_head_that_trains(tmp_path) -> None:
    model = learn(lora_lab.inject(build(), 2, modules_to_save=["classifier"]))
    lora_lab.save(model, tmp_path)
    assert "classifier.weight" in trainable(model)
    lora_lab.load(model, tmp_path, replace=True)
    assert trainable(model) == set()
    lora_lab.load(model, tmp_path, replace=True, trainable=True)
    assert {"classifier.weight", "classifier.bias"} < trainable(model)


def test_the_head_of_an_adapter_that_is_off_does_not_train() -> None:
    """It holds the base's own values then, and training them would change the base."""
    model = build()
    for name in ("b", "c"):
        lora_lab.inject(model, 2, adapter=name, init="random")
    lora_lab.inject(model, 2, adapter="a", bias="lora_only")
    assert "body.0.bias" in trainable(model)
    lora_lab.combine(model, {"b": 1.0, "c": 1.0}, into="d")
    assert trainable(model) == set()
