"""Merged weights compute the same function, and unmerge gives every bit back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import build, logits, randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda: torch.randn(3, 5, 12)),
    "embedding": (lambda: nn.Embedding(40, 12), lambda: torch.randint(0, 40, (3, 7))),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect", dilation=2), lambda: torch.randn(3, 4, 9, 9)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"variant": "dora"}, "rslora": {"rslora": True}, "pissa": {"init": "pissa"}, "lora_bias": {"lora_bias": True},
}  # fmt: skip


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_merge_equals_the_unmerged_forward_and_unmerge_every_bit(kind: str, variant: str) -> None:
    """LoRA paper, section 4.1: merged weights compute the same function, so inference costs nothing extra."""
    if (variant, kind) in (("lora_bias", "embedding"), ("pissa", "conv2d")):
        pytest.skip("not for this kind of layer")
    torch.manual_seed(0)
    make, example = LAYERS[kind]
    model, x = nn.Sequential(make()).double(), example()
    x = x.double() if x.is_floating_point() else x
    plain = model(x)
    lora_lab.inject(model, rank=4, target_modules=["0"], **VARIANTS[variant])
    randomise(model)
    before, y = bits(model), model(x)
    assert not torch.allclose(y, plain)
    assert lora_lab.merge(model) is model
    assert_close(model(x), y, rtol=0, atol=1e-12)
    assert type(model[0]) is type(make()) and not any("lora" in name for name in model.state_dict())
    lora_lab.unmerge(model)
    assert_same_bits(model, before)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unmerge_is_exact_in_16_bits_where_subtracting_is_not(dtype: torch.dtype) -> None:
    """merge + unmerge by adding and subtracting moves 16-bit weights by up to 5e-2; and the sum is rounded once, from float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    lora_lab.inject(model, rank=4)
    randomise(model)
    before, delta = bits(model), model[0].lora_delta("default").detach()
    exact = before["0.weight"].float() + delta
    lora_lab.merge(model)
    assert torch.equal(model[0].weight, exact.to(dtype))
    report = lora_lab.merge_report(model)
    assert report.rounding == pytest.approx(float((exact.to(dtype).float() - exact).abs().max()))
    assert not torch.equal((model[0].weight.float() - delta).to(dtype), before["0.weight"])
    lora_lab.unmerge(model)
    assert_same_bits(model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox", "t5", "bert"])
def test_whole_models_merge_and_unmerge(family: str) -> None:
    model = build(family)
    plain = logits(model, family)
    lora_lab.inject(model, rank=4)
    randomise(model)
    y, before = logits(model, family), bits(model)
    lora_lab.merge(model)
    assert_close(logits(model, family), y, rtol=0, atol=1e-9)
    assert not torch.allclose(y, plain)
    assert set(model.state_dict()) == {name for name in before if "lora_" not in name}
    lora_lab.unmerge(model)
    assert_same_bits(model, before)


def test_several_active_adapters_are_merged_together_and_one_of_them_alone_is_refused() -> None:
    """PEFT merges the one it is told and skips the others without a word."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)).double(), torch.randn(2, 6).double()
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, adapter=name)
    randomise(model)
    lora_lab.use(model, ["a", "b"])
    y = model(x)
    with pytest.raises(LoraLabError, match=r"\['a', 'b'\] are active together"):
        lora_lab.merge(model, "a")
    lora_lab.merge(model)
    assert_close(model(x), y, rtol=0, atol=1e-12)
    lora_lab.unmerge(model)
    assert model[0].lora_active == ("a", "b")
    lora_lab.use(model, "b")
    wanted = model(x)
    lora_lab.use(model, None)
    lora_lab.merge(model, "b")
    assert_close(model(x), wanted, rtol=0, atol=1e-12)


def test_merging_twice_is_refused_and_adds_nothing() -> None:
    """Before its pull request 1355 PEFT added the update again and again; loralib does after a save in eval mode."""
    model = nn.Sequential(nn.Linear(6, 6))
    lora_lab.inject(model, init="random", rank=2)
    lora_lab.merge(model)
    before = bits(model)
    for verb in (lora_lab.merge, lora_lab.inject, lambda m: lora_lab.save(m, "nowhere"), lambda m: lora_lab.load(m, "nowhere"),
                 lambda m: lora_lab.combine(m, {"default": 1}, "c")):  # fmt: skip
        with pytest.raises(LoraLabError, match="merged"):
            verb(model)
    model.eval().train()
    assert_same_bits(model, before)
    reloaded = nn.Sequential(nn.Linear(6, 6))
    reloaded.load_state_dict(model.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(reloaded(x), model(x))


def test_training_while_merged_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    lora_lab.merge(lora_lab.inject(model, init="random", rank=2))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(LoraLabError, match="fit: default is merged into this model's weights; call unmerge first"):
        lora_lab.training.fit(model, [{"input_ids": [1], "labels": [1]}])


def test_the_parameters_are_the_same_objects_after_a_round_trip() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    lora_lab.inject(model, init="random", rank=2)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora_lab.unmerge(lora_lab.merge(model))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


class Tied(nn.Module):
    """A language model in two layers that share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_a_tied_weight_is_not_changed_behind_the_other_layers_back() -> None:
    """PEFT merges into lm_head and changes the embedding with it."""
    torch.manual_seed(0)
    model, ids = Tied().double(), torch.tensor([[1, 2, 3]])
    lora_lab.inject(model, rank=2, target_modules=["head"], init="random")
    y, before, weight = model(ids), bits(model), model.embed.weight
    with pytest.raises(LoraLabError, match="shares its weight with another module"):
        lora_lab.merge(model)
    assert_same_bits(model, before)
    lora_lab.merge(model, untie=True)
    assert_close(model(ids), y, rtol=0, atol=1e-12)
    assert model.embed.weight is weight and model.head.weight is not weight
    lora_lab.unmerge(model)
    assert model.head.weight is model.embed.weight
    assert_same_bits(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_refused_before_anything_is_merged(value: float) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).half()
    lora_lab.inject(model, init="random", rank=2)
    with torch.no_grad():
        model[1].lora_B["default"][0, 0] = value
    before = bits(model)
    with pytest.raises(LoraLabError, match="'1': W \\+ delta is not finite in torch.float16"):
        lora_lab.merge(model)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) or name == "1.lora_B.default" for name, tensor in before.items())


def test_not_restorable_keeps_nothing_and_eject_makes_it_plain() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(2, 6)
    lora_lab.inject(model, init="random", rank=2)
    y = model(x)
    lora_lab.merge(model, restorable=False)
    assert_close(model(x), y)
    assert lora_lab.merge_report(model)._state == [] and "for good" in str(lora_lab.merge_report(model))
    with pytest.raises(LoraLabError, match="restorable=False"):
        lora_lab.unmerge(model)
    lora_lab.eject(model)
    assert_close(model(x), y)
    assert all(parameter.requires_grad for parameter in model.parameters()) and lora_lab.merge_report(model) is None
    lora_lab.inject(model)  # a plain model again


def test_eject_while_merged_gives_the_original_back() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    before = bits(model)
    lora_lab.merge(lora_lab.inject(model, init="random", rank=2))
    assert_same_bits(lora_lab.eject(model), before)


@pytest.mark.parametrize(("verb", "message"), [
    (lambda model: lora_lab.unmerge(model), "is not merged"),
    (lambda model: lora_lab.merge(model), "has no adapters to merge"),
])  # fmt: skip
def test_what_is_not_there_is_said(verb: Any, message: str) -> None:
    with pytest.raises(LoraLabError, match=message):
        verb(nn.Sequential(nn.Linear(4, 4)))


def test_an_unknown_adapter_no_active_one_and_rows_of_several_are_refused() -> None:
    model = lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), rank=2)
    with pytest.raises(LoraLabError, match=r"adapter='defalt'.*did you mean 'default'"):
        lora_lab.merge(model, "defalt")
    with lora_lab.per_sample(model, ["default", None]), pytest.raises(LoraLabError, match="merge inside per_sample"):
        lora_lab.merge(model)
    lora_lab.use(model, None)
    with pytest.raises(LoraLabError, match="no adapter is active"):
        lora_lab.merge(model)


def test_a_grouped_convolution_is_not_merged() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    lora_lab.inject(model, rank=2, target_modules=["0"], init="random")
    with pytest.raises(LoraLabError, match="grouped convolution"):
        lora_lab.merge(model)


def test_a_large_weight_is_merged_in_blocks_of_rows(monkeypatch) -> None:
    """The whole update is never formed: with blocks of one row the result is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48))
    lora_lab.inject(model, rank=2, variant="dora")
    randomise(model)
    again = copy.deepcopy(model)
    lora_lab.merge(model)
    monkeypatch.setattr(lora_lab.merging, "ELEMENTS_AT_ONCE", 32)
    lora_lab.merge(again)
    assert_close(again[0].weight, model[0].weight, rtol=0, atol=1e-6)


def test_a_weight_that_lies_otherwise_in_memory_is_merged_too() -> None:
    """channels_last: flattening the kernel gives a copy, and a merge into the copy would be lost."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last), torch.randn(2, 4, 6, 6)
    lora_lab.inject(model, rank=4, target_modules=["0"], init="random")
    y = model(x)
    lora_lab.merge(model)
    assert_close(model(x), y)
    with lora_lab.unmerge(model) and lora_lab.disabled(model):
        assert not torch.allclose(model(x), y)


def test_a_weight_that_is_computed_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    lora_lab.inject(model, rank=2, init="random")
    with pytest.raises(LoraLabError, match="computes its weight"):
        lora_lab.merge(model)


@pytest.mark.parametrize("verb", [lambda model: lora_lab.use(model, None), lambda model: lora_lab.disabled(model).__enter__(),
                                  lambda model: lora_lab.per_sample(model, ["default"]).__enter__()])  # fmt: skip
def test_a_merged_model_has_no_adapters_to_choose_from(verb: Any) -> None:
    model = lora_lab.merge(lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), rank=2, init="random"))
    with pytest.raises(LoraLabError, match="is merged into this model's weights"):
        verb(model)


def moved(model: nn.Module, **request: Any) -> nn.Module:
    torch.manual_seed(3)
    return randomise(lora_lab.inject(model, rank=4, **request), by=0.2)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_autocast_around_it_changes_no_bit_of_a_merge(variant: str) -> None:
    """Sums are taken in float32, whatever the forward passes around them are computed in."""
    model, other = (moved(build("llama").float(), variant=variant) for _ in range(2))
    lora_lab.merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        lora_lab.merge(other)
    layers = {name: weight for name, weight in model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in layers.items())


def test_autocast_around_it_changes_no_bit_of_a_combination() -> None:
    pair = [moved(moved(build("llama").float(), adapter="a"), adapter="b") for _ in range(2)]
    lora_lab.combine(pair[0], {"a": 1.0, "b": 0.5}, into="c", method="svd", rank=3)
    with torch.autocast("cpu", torch.bfloat16):
        lora_lab.combine(pair[1], {"a": 1.0, "b": 0.5}, into="c", method="svd", rank=3)
    one, other = (model.state_dict() for model in pair)
    assert all(torch.equal(one[name], other[name]) for name in one)
