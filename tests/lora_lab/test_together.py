"""Layers of one input, computed together, give what each of them gives alone; and where one has to be called by itself, all are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab.errors import LoraLabError
from lora_lab.models.blocks import project_all
from lora_lab.together import together

WIDTHS = (5, 4, 3)


def layers(base: torch.dtype = torch.float64, **request: Any) -> nn.ModuleList:
    """From 6 numbers to 5, 4 and 3, with biases, at ranks 3, 2, 3 and three scalings."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(6, width, dtype=base) for width in WIDTHS)
    options = {"rank_pattern": {"1": 2}, "alpha_pattern": {"0": 6, "2": 1.5}, "init": "random", **request}
    return lora_lab.inject(model, 3, **options)


def gradients(model: nn.Module, x: Tensor, outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of x and of every A and B."""
    weights = torch.linspace(-1, 1, sum(WIDTHS), dtype=outputs[0].dtype).split(WIDTHS)
    loss = sum((y.sin() * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, [x, *(p for p in model.parameters() if p.requires_grad)], allow_unused=True)


def assert_same(ours: Any, wanted: Any) -> None:
    for one, other in zip(ours, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
@pytest.mark.parametrize("run", ["plain", "checkpointed"])
def test_values_and_gradients_are_those_of_the_layers_alone(shape: tuple[int, ...], run: str) -> None:
    """Hu et al. 2021, equation 3, of several W, A and B and one x."""
    model, x = layers(), torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    alone = [layer(x) for layer in model]
    ours = together(x, model) if run == "plain" else checkpoint(lambda x: together(x, model), x, use_reentrant=False)
    assert_same(ours, alone)
    assert_same(gradients(model, x, ours), gradients(model, x, alone))


def test_an_output_that_nobody_uses_has_no_part_in_the_gradients() -> None:
    model, x = layers(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found, wanted = (torch.autograd.grad(run()[1].square().sum(), x) for run in (lambda: together(x, model), lambda: [layer(x) for layer in model]))
    assert_same(found, wanted)


def test_first_and_second_derivatives_are_the_numerical_ones() -> None:
    model, x = layers(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    pairs = [p for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: tuple(together(x, model)), (x, *pairs))
    assert torch.autograd.gradgradcheck(lambda x, *_: tuple(together(x, model)), (x, *pairs))


APART: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {  # how it is injected, and what is done to it then
    "dropout": ({"dropout": 0.5}, lambda model: model.train()),
    "dora": ({"variant": "dora"}, lambda model: None),
    "one without an adapter": ({"exclude_modules": ["2"], "alpha_pattern": None}, lambda model: None),
    "another selection": ({}, lambda model: setattr(model[1], "lora_active", ())),
    "two adapters": ({}, lambda model: lora_lab.use(lora_lab.inject(model, 2, adapter="b"), ["default", "b"])),
    "a weight that trains": ({}, lambda model: model[0].weight.requires_grad_()),
    "biases that train": ({"bias": "lora_only"}, lambda model: None),
    "a hook": ({}, lambda model: model[1].register_forward_hook(lambda *_: None)),
    "a forward of its own": ({}, lambda model: setattr(model[1], "forward", model[1].forward)),
}


@pytest.mark.parametrize("case", APART)
def test_where_one_layer_is_another_matter_each_is_called_by_itself(case: str) -> None:
    request, change = APART[case]
    model, x = layers(**request), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    change(model)
    assert together(x, model) is None
    torch.manual_seed(1)
    found = project_all(x, *model)
    torch.manual_seed(1)
    assert_same(found, [layer(x) for layer in model])


@pytest.mark.parametrize("adapted", [names for count in range(4) for names in itertools.combinations("012", count)])
def test_any_of_the_layers_may_have_an_adapter(adapted: tuple[str, ...]) -> None:
    model, x = nn.ModuleList(nn.Linear(6, width, dtype=torch.float64) for width in WIDTHS), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    if adapted:
        lora_lab.inject(model, 2, target_modules=[*adapted], init="random")
    assert (together(x, model) is None) == (len(adapted) < 3)
    assert_same(project_all(x, *model), [layer(x) for layer in model])


def test_it_is_for_training_alone() -> None:
    model, x = layers(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert together(x, model) is not None and together(x, model[:1]) is None
    with torch.no_grad():
        assert together(x, model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert together(x.float(), layers(torch.float32)) is None


def test_a_row_with_another_adapter_is_served_by_the_layers() -> None:
    model, x = layers(), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    with lora_lab.per_sample(model, ["default", None]):
        assert together(x, model) is None
        assert_same(project_all(x, *model), [layer(x) for layer in model])


@pytest.mark.parametrize(("request_", "error", "message"), [
    ({"rank_pattern": {"1": 2}}, LoraLabError, "recomputed a layer with other adapters than its forward pass had"),
    ({"rank_pattern": {"1": 3}}, torch.utils.checkpoint.CheckpointError, "Recomputed values .* have different metadata"),
])  # fmt: skip
def test_a_recompute_under_another_selection_fails_as_it_does_for_a_layer(request_: dict[str, Any], error: type[Exception], message: str) -> None:
    """Where its ranks are others, torch notices before a layer of ours is asked."""
    model, x = layers(), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    outputs = checkpoint(lambda x: project_all(x, *model), x, use_reentrant=False)
    lora_lab.use(lora_lab.inject(model, 3, adapter="b", **request_), "b")
    with pytest.raises(error, match=message):
        sum(y.sum() for y in outputs).backward()


def test_x_is_kept_once_and_beside_it_small_tensors_only() -> None:
    model, x, sizes = layers(torch.float32), torch.randn(500, 6, requires_grad=True), {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = together(x, model)
    assert outputs is not None and sum(sizes.values()) <= x.nbytes + 500 * (3 + 2 + 3) * 4 + 8  # x, every A x, a stamp of the selection
