"""A verb that fails half-way, for want of memory say, leaves the model bit for bit as it was; and verbs see what was done at other levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, base_parameters, injection, layers, merging
from lora_lab.targets import lora_layers


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3)).double()


def x() -> torch.Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def everything(model: nn.Module) -> Any:
    """What there is to see of a model: classes, tensors and their identity, what trains, what is active."""
    tensors = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    active = {path: layer.lora_active for path, layer in lora_layers(model).items()}
    return {name: type(module) for name, module in model.named_modules()}, tensors, active, "lora_injection" in vars(model)


def assert_untouched(model: nn.Module, before: Any) -> None:
    now = everything(model)
    assert (now[0], now[2], now[3]) == (before[0], before[2], before[3])
    assert list(now[1]) == list(before[1])
    for name, (identity, trains, values) in before[1].items():
        assert now[1][name][:2] == (identity, trains) and torch.equal(now[1][name][2], values), name


class OutOfMemory:
    """A function that works a number of times, and then raises MemoryError."""

    def __init__(self, function: Callable[..., Any], works: int) -> None:
        self.function, self.left = function, works

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.left:
            raise MemoryError
        self.left -= 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("works", [0, 1, 2])
@pytest.mark.parametrize("place", ["_survey", "_prepare", "_add_to_weight", "_merge_layer"])
def test_a_merge_that_runs_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch, place: str, works: int) -> None:
    model = lora_lab.inject(build(), rank=2, bias="lora_only")
    randomise(model)
    before, y = everything(model), model(x())
    monkeypatch.setattr(merging, place, OutOfMemory(getattr(merging, place), works))
    with pytest.raises(MemoryError):
        lora_lab.merge(model)
    assert_untouched(model, before)
    assert torch.equal(model(x()), y) and lora_lab.merge_report(model) is None


@pytest.mark.parametrize("works", [0, 1, 2])
def test_an_inject_that_runs_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch, works: int) -> None:
    model = build()
    before = everything(model)
    monkeypatch.setattr(layers, "new_tensors", OutOfMemory(layers.new_tensors, works))
    with pytest.raises(MemoryError):
        lora_lab.inject(model, rank=2)
    assert_untouched(model, before)


def test_an_inject_that_cannot_copy_the_head_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_lab.inject(build(), rank=2, modules_to_save=["2"], adapter="a")
    randomise(model)
    before = everything(model)
    monkeypatch.setattr(injection, "base_values", OutOfMemory(base_parameters.base_values, 0))
    with pytest.raises(MemoryError):
        lora_lab.inject(model, rank=2, modules_to_save=["2"], adapter="b")
    assert_untouched(model, before)


def test_a_swap_of_heads_that_runs_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """use() of another head: half of its values in place would be a head that nobody trained."""
    model = build()
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, modules_to_save=["2"], adapter=name)
        randomise(model)
    before = everything(model)
    clone = OutOfMemory(torch.Tensor.clone, 1)
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor, **options: clone(tensor, **options))
    with pytest.raises(MemoryError):
        lora_lab.use(model, "a")
    monkeypatch.undo()
    assert_untouched(model, before)


def test_a_bias_that_two_layers_share_is_not_merged_into_twice() -> None:
    model = build()
    model[1].bias = nn.Parameter(torch.randn(8, dtype=torch.float64))
    model[0][0].bias = model[1].bias
    lora_lab.inject(model, rank=2, lora_bias=True)
    randomise(model)
    y = model(x())
    with pytest.raises(LoraLabError, match="shares its bias"):
        lora_lab.merge(model)
    assert_close(lora_lab.merge(model, untie=True)(x()), y, rtol=0, atol=1e-12)
    assert model[0][0].bias is not model[1].bias
    lora_lab.unmerge(model)
    assert model[0][0].bias is model[1].bias and torch.equal(model(x()), y)


def test_a_layer_of_ones_own_class_is_of_that_class_after_unmerge() -> None:
    class Mine(lora_lab.LoRALinear):
        pass

    model = nn.Sequential(Mine(6, 4, rank=2))
    lora_lab.unmerge(lora_lab.merge(model))
    assert type(model[0]) is Mine


def test_eject_inside_disabled_leaves_plain_layers() -> None:
    model = lora_lab.inject(build(), rank=2)
    with lora_lab.disabled(model):
        lora_lab.eject(model)
    assert not any("lora" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("weight", [torch.zeros(4, 6, dtype=torch.int8), torch.zeros(4, 6, device="meta")])
def test_no_update_is_merged_into_what_is_no_weight_of_numbers(weight: torch.Tensor) -> None:
    """Other libraries keep codes in `weight`; adding to codes would be noise."""
    model = lora_lab.inject(nn.Sequential(nn.Linear(6, 4)), rank=2)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(LoraLabError, match="no update can be added"):
        lora_lab.merge(model)


# What was done at another level ------------------------------------------------------------------------------------------------


@pytest.fixture
def nested() -> nn.Sequential:
    """inject was called with a part of the model."""
    model = build()
    lora_lab.inject(model[0], rank=2, bias="lora_only", adapter="a")
    randomise(model[0])
    return model


def test_disabled_and_eject_of_a_model_reach_what_was_injected_into_a_part(nested: nn.Sequential) -> None:
    y, base = nested(x()), build()(x())
    assert not torch.allclose(y, base)
    with lora_lab.disabled(nested):
        assert torch.equal(nested(x()), base)
    assert torch.equal(nested(x()), y)
    assert torch.equal(lora_lab.eject(nested)(x()), base)


def test_an_adapter_of_the_model_and_one_of_a_part_both_give_the_base_its_bias_back(nested: nn.Sequential) -> None:
    y, base = nested(x()), build()
    lora_lab.inject(nested, rank=2, bias="all", adapter="b")
    assert_close(nested(x()), base(x()))  # "b" alone is active, and begins as the base
    with torch.no_grad():
        for parameter in nested.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    assert not torch.allclose(nested(x()), base(x()))
    assert torch.equal(lora_lab.use(nested, "a")(x()), y)
    lora_lab.use(nested, None)
    assert torch.equal(nested(x()), base(x()))


def test_a_part_that_is_merged_is_seen_by_the_whole(nested: nn.Sequential) -> None:
    y = nested(x())
    lora_lab.merge(nested[0])
    assert_close(nested(x()), y)
    for verb in (lora_lab.merge, lambda model: lora_lab.inject(model, rank=2), lambda model: lora_lab.use(model, "a")):
        with pytest.raises(LoraLabError, match="is merged into"):
            verb(nested)
    assert torch.equal(lora_lab.eject(nested)(x()), build()(x()))
