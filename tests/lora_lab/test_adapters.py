"""Several adapters on one model: row by row, summed, combined."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import randomise
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointError, checkpoint

import lora_lab
from lora_lab import LoraLabError
from lora_lab.targets import lora_layers


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


KINDS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(12, 10), lambda n: numbers(n, 5, 12)),
    "embedding": (lambda: nn.Embedding(40, 12), lambda n: torch.randint(0, 40, (n, 7))),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda n: numbers(n, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), lambda n: numbers(n, 4, 9, 9)),
}
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"variant": "dora"}, "rslora": {"rslora": True}, "pissa": {"init": "pissa"}}
ROWS = ["a", None, "b", "a", "c", None]


def several(kind: str, variant: str = "lora") -> nn.Sequential:
    """Three adapters of different ranks on one layer."""
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind][0]()).double()
    for name, rank in (("a", 4), ("b", 2), ("c", 6)):
        lora_lab.inject(model, rank=rank, target_modules=["0"], adapter=name, **VARIANTS[variant])
    randomise(model)
    return model


def one_by_one(model: nn.Module, x: torch.Tensor, rows: list[str | None] = ROWS) -> torch.Tensor:
    outputs = []
    for row, name in enumerate(rows):
        lora_lab.use(model, name)
        outputs.append(model(x[row : row + 1]))
    return torch.cat(outputs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_an_adapter_per_row_equals_the_rows_run_alone(kind: str, variant: str) -> None:
    if variant == "pissa" and kind.startswith("conv"):
        pytest.skip("PiSSA is for matrices")
    model, x = several(kind, variant), KINDS[kind][1](len(ROWS))
    expected = one_by_one(model, x)
    with lora_lab.per_sample(model, ROWS):
        assert_close(model(x), expected, rtol=0, atol=1e-12)
    lora_lab.use(model, "a")
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_learns_from_its_own_rows_in_training(kind: str) -> None:
    """PEFT raises in training mode; here the gradients are those of the rows run alone."""
    model, x = several(kind), KINDS[kind][1](len(ROWS))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    weight = torch.randn_like(model(x))
    (one_by_one(model, x) * weight).sum().backward()
    alone = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    with lora_lab.per_sample(model, ROWS):
        (model(x) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, alone[name], rtol=0, atol=1e-10)
    assert {"0.lora_A.a", "0.lora_B.b", "0.lora_A.c"} <= set(alone)


def test_names_stand_for_as_many_rows_each_as_the_input_has_times_more() -> None:
    """Beams: generate repeats every row k times in succession; a mixture of experts puts batch and sequence into one dimension."""
    model, x = several("linear"), numbers(3, 5, 12)
    expected = one_by_one(model, x, ["a", None, "b"])
    with lora_lab.per_sample(model, ["a", None, "b"]):
        assert_close(model(x.repeat_interleave(4, 0)), expected.repeat_interleave(4, 0), rtol=0, atol=1e-12)
        assert_close(model(x.flatten(0, 1)), expected.flatten(0, 1), rtol=0, atol=1e-12)


def test_a_batch_that_is_no_multiple_of_the_names_raises() -> None:
    model = several("linear")
    with lora_lab.per_sample(model, ["a", "b"]), pytest.raises(LoraLabError, match=r"2 names.*\[3, 5, 12\]: 3 rows in dimension 0"):
        model(numbers(3, 5, 12))
    for wrong, message in ((["a", "d"], "adapters \\['a', 'b', 'c'\\]"), ([], "expected a list"), ("ab", "expected a list")):
        with pytest.raises(LoraLabError, match=message), lora_lab.per_sample(model, wrong):
            pass


def test_with_the_sequence_first_rows_are_in_dimension_1() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)).double()
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, target_modules=["linear1", "linear2"], adapter=name)
    randomise(model)
    x, rows = numbers(5, 3, 8), ["a", None, "b"]
    expected = torch.cat([_with(model, name, x[:, row : row + 1]) for row, name in enumerate(rows)], dim=1)
    with lora_lab.per_sample(model, rows):
        assert_close(model(x), expected, rtol=0, atol=1e-12)


def _with(model: nn.Module, name: str | None, x: torch.Tensor) -> torch.Tensor:
    lora_lab.use(model, name)
    return model(x)


def test_a_layer_without_an_adapter_leaves_its_rows_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    lora_lab.inject(model, rank=2, target_modules=["0"], adapter="a")
    lora_lab.inject(model, rank=2, target_modules=["1"], adapter="b")
    randomise(model)
    x = numbers(2, 6)
    expected = torch.cat([_with(model, "a", x[:1]), _with(model, "b", x[1:])])
    with lora_lab.per_sample(model, ["a", "b"]):
        assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_the_selection_before_comes_back_even_after_an_error() -> None:
    model = several("linear")
    lora_lab.use(model, ["a", "c"])
    with pytest.raises(RuntimeError), lora_lab.per_sample(model, ["b", None]):
        raise RuntimeError
    assert lora_layers(model)["0"].lora_active == ("a", "c")


def test_backward_outside_per_sample_fails_under_checkpointing_instead_of_being_wrong() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), numbers(3, 5, 12).requires_grad_()
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, adapter=name)
    randomise(model)
    with lora_lab.per_sample(model, ["a", "b", None]):
        inside = checkpoint(model, x, use_reentrant=False).sum()
        inside.backward()
    gradient = x.grad.clone()
    x.grad = None
    with lora_lab.per_sample(model, ["a", "b", None]):
        outside = checkpoint(model, x, use_reentrant=False).sum()
    with lora_lab.per_sample(model, ["a", None, "b"]), pytest.raises(LoraLabError, match="recomputed a layer with other adapters"):
        outside.backward()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selections", [("a", "b"), (["a", "b"], ["b", "a"]), (["a", None], [None, "a"])])
def test_another_selection_in_the_recompute_fails_though_the_input_has_no_gradient(kind: str, selections: Any, dropout: float) -> None:
    """The first layer of a model reads data, an embedding whole numbers: neither has a gradient to notice it by."""
    model, x = several(kind), KINDS[kind][1](2)
    for layer in lora_layers(model).values():
        layer.lora_dropout = dict.fromkeys(layer.lora_dropout, dropout)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    during, after = (lora_lab.per_sample(model, s) if isinstance(s, list) else _using(model, s) for s in selections)
    with during:
        loss = checkpoint(model, x, use_reentrant=False).sum()
    with after, pytest.raises((LoraLabError, CheckpointError), match="recomputed a layer with other adapters|different metadata|different number"):
        loss.backward()


@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("selections", [("a", "b"), (["a", "b"], ["b", "a"])])
def test_another_selection_in_the_recompute_of_an_attention_fails(selections: Any, needs: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double(), numbers(2, 3, 8).requires_grad_(needs)
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, adapter=name, target_modules=["self_attn"])
    randomise(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    during, after = (lora_lab.per_sample(model, s) if isinstance(s, list) else _using(model, s) for s in selections)
    with during:
        loss = checkpoint(model, x, use_reentrant=False).sum()
    with after, pytest.raises(LoraLabError, match="recomputed a layer with other adapters"):
        loss.backward()


@contextlib.contextmanager
def _using(model: nn.Module, adapter: str) -> Iterator[None]:
    lora_lab.use(model, adapter)
    yield


def test_a_row_selection_pickles_with_the_model() -> None:
    model, x = several("linear"), numbers(2, 5, 12)
    with lora_lab.per_sample(model, ["a", "b"]):
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


# combine ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cat_is_exactly_the_weighted_sum_of_the_updates(kind: str) -> None:
    """PEFT's "linear" averages the A's and the B's instead: (sum A)(sum B) is not the sum of B A, 108 % off."""
    model, x = several(kind), KINDS[kind][1](4)
    layer = model[0]
    wanted = 0.7 * layer.lora_delta("a") - 0.3 * layer.lora_delta("b")
    assert lora_lab.combine(model, {"a": 0.7, "b": -0.3}, into="both") is model
    assert layer.lora_active == ("both",) and layer.lora_A["both"].shape[0] == 6
    assert_close(layer.lora_delta("both"), wanted, rtol=0, atol=1e-12)
    assert lora_lab.combine_error(model, "both") == 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not torch.allclose(model(x), _with(model, None, x))


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_svd_is_the_best_approximation_of_its_rank_and_says_what_it_lost(kind: str) -> None:
    model = several(kind)
    layer = model[0]
    wanted = (layer.lora_delta("a") + layer.lora_delta("c")).flatten(1)
    lora_lab.combine(model, {"a": 1, "c": 1}, into="small", method="svd", rank=3)
    left, values, right = torch.linalg.svd(wanted.detach())
    best = left[:, :3] * values[:3] @ right[:3]
    assert_close(layer.lora_delta("small").flatten(1), best, rtol=0, atol=1e-10)
    assert lora_lab.combine_error(model, "small") == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-9)
    lora_lab.combine(model, {"a": 1, "c": 1}, into="all", method="svd", rank=10)
    assert_close(layer.lora_delta("all").flatten(1), wanted, rtol=0, atol=1e-10)


def test_a_pissa_adapter_combines_as_the_change_that_it_is() -> None:
    model = several("linear", "pissa")
    layer = model[0]
    wanted = layer.lora_delta("a") + layer.lora_delta("b")
    lora_lab.combine(model, {"a": 1, "b": 1}, into="both")
    assert_close(layer.lora_delta("both"), wanted, rtol=0, atol=1e-12)


def test_a_combined_adapter_saves_and_loads(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).double()
    base, x = copy.deepcopy(model), numbers(3, 12)
    lora_lab.inject(model, rank=2, target_modules=["0"], adapter="a")
    lora_lab.inject(model, rank=3, adapter="b")
    randomise(model)
    lora_lab.combine(model, {"a": 0.5, "b": 2}, into="both")
    lora_lab.save(model, tmp_path)
    assert_close(lora_lab.load(base, tmp_path)(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("arguments", "message"), [
    (({"a": 1, "z": 1}, "n"), r"adapters \['a', 'b', 'c'\]"), (({}, "n"), "expected a dict"), (({"a": 1}, "b"), "into='b'"),
    (({"a": 1}, "n", "linear"), "method='linear'"), (({"a": 1}, "n", "svd"), "rank=None with method='svd'"),
    (({"a": 1}, "n", "cat", 3), "rank=3 with method='cat'"), (({"a": 1}, "a b"), "adapter='a b'"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused_and_the_model_untouched(arguments: tuple[Any, ...], message: str) -> None:
    model = several("linear")
    keys = set(model.state_dict())
    weights, into, *rest = arguments
    with pytest.raises(LoraLabError, match=message):
        lora_lab.combine(model, weights, into, **dict(zip(("method", "rank"), rest, strict=False)))
    assert set(model.state_dict()) == keys


def test_dora_is_not_combined_as_if_it_were_a_plain_adapter() -> None:
    with pytest.raises(LoraLabError, match="lora_magnitude_vector.*no plain adapter"):
        lora_lab.combine(several("linear", "dora"), {"a": 1, "b": 1}, "both")
