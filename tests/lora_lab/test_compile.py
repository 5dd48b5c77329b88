"""torch.compile: adapters come and go in a compiled model, every selection computes what it should, and replacing weights compiles nothing again.

PEFT and diffusers recompile for another adapter, rank or scale (diffusers issues 9279 and 9453, PEFT pull 2177).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import randomise
from torch import Tensor, nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()))


class Graphs:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> None:
    torch._dynamo.reset()


def base() -> Net:
    torch.manual_seed(0)
    return Net().double()


def adapted(seed: int = 1, **request: Any) -> Net:
    model = lora_lab.inject(base(), rank=2, target_modules=["first", "second"], **request)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def wrapped(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend)
    return model


WAYS = [wrapped, in_place]
X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
REQUESTS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"rslora": True, "alpha": 3}, "dora": {"variant": "dora"}, "lora_bias": {"lora_bias": True},
    "head": {"modules_to_save": ["head"], "bias": "lora_only"},
}  # fmt: skip


def eagerly(model: nn.Module, x: Tensor = X) -> Tensor:
    """What the model computes uncompiled."""
    with torch.compiler.set_stance("force_eager"):
        return model(x)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("way", WAYS)
def test_replacing_weights_changes_the_output_and_recompiles_nothing(tmp_path: Path, way: Any, request_: str) -> None:
    """A server that changes adapters: load(replace=True) copies into the Parameters that the compiled code reads."""
    other = adapted(seed=2, **REQUESTS[request_])
    lora_lab.save(adapted(seed=1, **REQUESTS[request_]), tmp_path / "one")
    lora_lab.save(other, tmp_path / "two")
    model, graphs = lora_lab.load(base(), tmp_path / "one"), Graphs()
    compiled = way(model, graphs)
    before, compiled_once = compiled(X), graphs.count
    assert compiled_once > 0
    lora_lab.load(model, tmp_path / "two", replace=True)
    assert_close(compiled(X), other(X), rtol=0, atol=1e-12)
    assert not torch.allclose(before, other(X))
    lora_lab.load(model, tmp_path / "one", replace=True)
    assert_close(compiled(X), before, rtol=0, atol=1e-12)
    assert graphs.count == compiled_once


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_made_before_weights_were_replaced_goes_on_training_them(tmp_path: Path, way: Any) -> None:
    """Parameters that were new objects would train no more, and nobody would say so (trap 26)."""
    other = adapted(seed=2)
    lora_lab.save(other, tmp_path)
    model, graphs = adapted(seed=1), Graphs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    compiled = way(model, graphs)
    for each in (compiled, other):
        each(X).square().sum().backward()
        optimizer.zero_grad()
    compiled_once = graphs.count
    lora_lab.load(model, tmp_path, replace=True, trainable=True)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    theirs = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for each, steps in ((compiled, optimizer), (other, theirs)):
        steps.zero_grad()
        each(X).square().sum().backward()
        steps.step()
    assert_close(compiled(X), eagerly(other), rtol=0, atol=1e-12)
    assert not torch.allclose(compiled(X), adapted(seed=2)(X))
    assert graphs.count == compiled_once


def test_freezing_an_adapter_while_replacing_it_is_compiled_again_and_is_right(tmp_path: Path) -> None:
    """load() freezes unless trainable=True; PyTorch's compiled code depends on what requires grad."""
    other = adapted(seed=2)
    lora_lab.save(other, tmp_path)
    model, graphs = adapted(seed=1), Graphs()
    compiled = wrapped(model, graphs)
    compiled(X)
    lora_lab.load(model, tmp_path, replace=True)
    assert_close(compiled(X), other(X), rtol=0, atol=1e-12)
    assert graphs.count == 2 and not compiled(X).requires_grad


def several(count: int = 2) -> Net:
    model = base()
    for number in range(count):
        lora_lab.inject(model, rank=1 + number, target_modules=["first", "second"], adapter=f"a{number}")
    return randomise(model)


SELECTIONS: list[Any] = ["a0", "a1", None, ["a0", "a1"], ["a1", "a0"]]


@pytest.mark.parametrize("way", WAYS)
def test_each_selection_computes_what_it_does_uncompiled_and_is_compiled_once(way: Any) -> None:
    """Which adapters are active is part of the compiled code: use() compiles once for each selection, and coming back costs nothing."""
    model, graphs, counts = several(), Graphs(), []
    compiled = way(model, graphs)
    for _ in range(2):
        outputs = []
        for selection in SELECTIONS:
            lora_lab.use(model, selection)
            outputs.append(compiled(X).detach())
            assert_close(outputs[-1], eagerly(model), rtol=0, atol=1e-12)
        with lora_lab.disabled(model):
            assert_close(compiled(X), base()(X), rtol=0, atol=1e-12)
        counts.append(graphs.count)
    assert counts[0] == counts[1]
    assert len({tuple(output.flatten().tolist()) for output in outputs[:4]}) == 4  # they differ


def test_more_selections_than_pytorch_compiles_are_right_all_the_same() -> None:
    """After torch._dynamo.config.recompile_limit variants (8) PyTorch runs the layer uncompiled."""
    limit = torch._dynamo.config.recompile_limit
    model, graphs = several(limit + 3), Graphs()
    compiled = wrapped(model, graphs)
    for number in [*range(limit + 3), 0]:
        lora_lab.use(model, f"a{number}")
        assert_close(compiled(X), eagerly(model), rtol=0, atol=1e-12)
    assert graphs.count == limit


@pytest.mark.parametrize("way", WAYS)
def test_rows_with_adapters_of_their_own_are_right_when_compiled(way: Any) -> None:
    model = several()
    compiled = way(model, Graphs())
    for rows in (["a0", None, "a1"], ["a1", "a1", None]):
        with lora_lab.per_sample(model, rows):
            alone = eagerly(model)
            assert_close(compiled(X), alone, rtol=0, atol=1e-12)
    assert not torch.allclose(alone, base()(X))


@pytest.mark.parametrize("way", WAYS)
def test_merge_unmerge_eject_and_inject_are_seen_by_what_is_compiled(way: Any) -> None:
    """PyTorch guards the classes of the layers and what they hold, and compiles again where they changed."""
    model, plain = adapted(), base()(X)
    compiled = way(model, Graphs())
    y = compiled(X).detach()
    assert not torch.allclose(y, plain)
    lora_lab.merge(model)
    assert_close(compiled(X), y, rtol=0, atol=1e-12)
    lora_lab.unmerge(model)
    assert_close(compiled(X), y, rtol=0, atol=1e-12)
    lora_lab.eject(model)
    assert_close(compiled(X), plain, rtol=0, atol=1e-12)
    lora_lab.inject(model, rank=3, init="random")
    assert_close(compiled(X), eagerly(model), rtol=0, atol=1e-12)
    assert not torch.allclose(compiled(X), plain)


# torch.compile's wrapper ----------------------------------------------------------------------------------------------------------


def test_verbs_that_go_by_names_refuse_the_wrapper_and_point_inside(tmp_path: Path) -> None:
    """Its layers are called _orig_mod.first: a file of them would fit no model, and PEFT would only warn."""
    inner = adapted()
    lora_lab.save(inner, tmp_path / "whole")
    for verb in (lambda m: lora_lab.inject(m, rank=2, adapter="b"), lambda m: lora_lab.load(m, tmp_path / "whole", adapter="b"),
                 lambda m: lora_lab.save(m, tmp_path / "wrapped"), lambda m: lora_lab.combine(m, {"default": 1.0}, "b")):  # fmt: skip
        before = set(inner.state_dict())
        with pytest.raises(LoraLabError, match=r"this is torch's OptimizedModule.*the model inside \(\._orig_mod\)"):
            verb(torch.compile(inner, backend="eager"))
        assert set(inner.state_dict()) == before and not (tmp_path / "wrapped").exists()


def test_a_part_that_is_compiled_is_found_by_its_path(tmp_path: Path) -> None:
    model = adapted()
    model.second = torch.compile(model.second, backend="eager")
    with pytest.raises(LoraLabError, match=r"save: layer 'second' is torch's OptimizedModule"):
        lora_lab.save(model, tmp_path / "part")
    again = adapted()
    again.second.compile(backend="eager")  # wraps nothing
    lora_lab.save(again, tmp_path / "part")
    assert_close(lora_lab.load(base(), tmp_path / "part")(X), again(X), rtol=0, atol=1e-12)
