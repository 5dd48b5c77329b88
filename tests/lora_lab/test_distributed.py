"""Two processes on one machine: DistributedDataParallel and FSDP2 over gloo; inject comes first, and what comes too late is refused."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import meet
from small_models import randomise
from tiny_workshop import same_bits, weights
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab import LoraLabError

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed with gloo")
STEPS = 3


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).bfloat16()
    return lora_lab.inject(model, rank=4, init="random")


def batch(step: int) -> torch.Tensor:
    torch.manual_seed(100 + step)
    return torch.randn(4, 16).bfloat16()


def train(model: nn.Module, rows: slice) -> None:
    """A few steps on this process's rows; the loss is a mean, so gradients of two halves average to those of the whole."""
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for step in range(STEPS):
        model(batch(step)[rows]).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def worker(rank: int, kind: str, folder: str) -> None:
    meet(rank, folder)
    try:
        model: Any = adapted()
        rows = slice(2 * rank, 2 * rank + 2)
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
            train(wrapped, rows)
            found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        else:
            found = sharded(model, rows)
        torch.save({name: tensor.cpu() for name, tensor in found.items()}, Path(folder) / f"found-{rank}.pt")
        dist.barrier()  # gloo aborts a process whose neighbour has hung up
    finally:
        dist.destroy_process_group()


def sharded(model: Any, rows: slice) -> dict[str, torch.Tensor]:
    train(shard(model), rows)
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


def shard(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_the_adapters_that_one_does(tmp_path, kind: str) -> None:
    """Frozen and trained parameters, two dtypes in one layer: what FSDP1 could not flatten together (PEFT issue 1702). One process alone with its
    half of the rows would be ten times as far off as the activations' bfloat16 allows."""
    mp.spawn(worker, args=(kind, str(tmp_path)), nprocs=2)
    found, others = (torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1))
    alone, half, near = adapted(), adapted(), {"rtol": 0.0, "atol": 2e-3}
    before = weights(alone)
    train(alone, slice(None))
    train(half, slice(0, 2))
    assert set(found) == set(before) and same_bits(found, others)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), **near, msg=lambda text, name=name: f"{name}: {text}")
        assert ("lora_" in name) == (not torch.equal(found[name], before[name])), name
        assert ("lora_" in name) == (not torch.allclose(found[name], half.get_parameter(name), **near)), name
        assert found[name].dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


# What comes before and after -------------------------------------------------------------------------------------------------


class Blocks(nn.Sequential):
    """Its first two layers are checkpointed, as the blocks of a language model are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](checkpoint(lambda x: self[1](self[0](x)), x, use_reentrant=False))


def whole(**request: Any) -> Any:
    """A model in float32 with one adapter that is not zero."""
    torch.manual_seed(0)
    model = Blocks(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    return randomise(lora_lab.inject(model, rank=4, **request))


WITH_HEAD: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["2"]}
X = torch.linspace(-1, 1, 64).view(4, 16)
TOO_LATE: dict[str, Callable[[Any, str], Any]] = {
    "inject": lambda model, folder: lora_lab.inject(model, rank=2, adapter="late"),
    "eject": lambda model, folder: lora_lab.eject(model),
    "merge": lambda model, folder: lora_lab.merge(model),
    "load": lambda model, folder: lora_lab.load(model, folder, adapter="late"),
    "replace": lambda model, folder: lora_lab.load(model, folder, replace=True),
    "combine": lambda model, folder: lora_lab.combine(model, {"default": 1.0}, into="late"),
}


def outcome(verb: Callable[[Any, str], Any], model: Any, folder: str) -> tuple[str, bool]:
    """What a verb said, and whether it left the model alone."""
    before, y = [(name, type(module)) for name, module in model.named_modules()], model(X)
    try:
        verb(model, folder)
    except LoraLabError as error:
        return str(error), before == [(name, type(module)) for name, module in model.named_modules()] and torch.equal(model(X), y)
    return "no error", False


def story(rank: int, folder: str) -> None:
    """Everything that needs two processes, in one go: starting them is what takes the time."""
    meet(rank, folder)
    found: dict[str, Any] = {}
    try:
        rows = slice(2 * rank, 2 * rank + 2)
        if rank == 0:
            lora_lab.save(whole(), f"{folder}/whole")
        dist.barrier()
        wrapped = nn.parallel.DistributedDataParallel(whole(**WITH_HEAD))
        train32(wrapped, rows)
        found["ddp with head"] = {name: parameter.detach() for name, parameter in wrapped.module.named_parameters()}
        found["ddp"] = {verb: outcome(TOO_LATE[verb], wrapped, f"{folder}/whole") for verb in ("inject", "load", "combine")}
        found["dora"] = full(train32(shard(whole(variant="dora")), rows))
        model = train32(shard(whole()), rows)
        found["trained"], found["y"] = full(model), model(X).detach()
        lora_lab.save(model, f"{folder}/sharded")
        with lora_lab.disabled(model):
            found["disabled"] = model(X).detach()
        found["fsdp2"] = {verb: outcome(TOO_LATE[verb], model, f"{folder}/whole") for verb in TOO_LATE}
        found["bare"] = outcome(TOO_LATE["inject"], shard(lora_lab.eject(whole())), folder)
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def train32(model: Any, rows: slice) -> Any:
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step).float()[rows]).square().mean().backward()
        optimizer.step()
    return model


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}  # type: ignore[operator]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("story")
    mp.spawn(story, args=(str(folder),), nprocs=2)
    return {**torch.load(folder / "found.pt"), "folder": folder}


@pytest.mark.parametrize("verb", TOO_LATE)
def test_after_fully_shard_what_changes_whole_parameters_is_refused_and_changes_nothing(found: dict[str, Any], verb: str) -> None:
    """`eject` would take away the class that fully_shard gave a layer, and with it the hooks that gather its weight; a late adapter would be
    another one in every process, as nothing exchanges its gradients."""
    message, untouched = found["fsdp2"][verb]
    assert "is divided among processes by FSDP" in message and untouched


def test_inject_into_a_bare_model_that_is_sharded_already_is_refused(found: dict[str, Any]) -> None:
    message, untouched = found["bare"]
    assert "inject: 'FSDPBlocks' is divided among processes by FSDP: inject and load before that" in message and untouched


@pytest.mark.parametrize("verb", ["inject", "load", "combine"])
def test_new_adapters_are_not_put_into_a_model_that_is_wrapped_in_ddp(found: dict[str, Any], verb: str) -> None:
    """DDP exchanges the gradients of the parameters it found when it was made: each process would train an adapter of its own."""
    message, untouched = found["ddp"][verb]
    assert f"{verb}: this is torch's DistributedDataParallel" in message and "(.module)" in message and untouched


def test_a_sharded_adapter_is_saved_whole(found: dict[str, Any]) -> None:
    """Under FSDP and ZeRO-3 PEFT writes the piece that one process has, or nothing (its issue 1402); here the file loads into a whole model."""
    model = lora_lab.load(lora_lab.eject(whole()), found["folder"] / "sharded")
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in found["trained"].items()}
    assert all(torch.equal(p, found["trained"][name]) for name, p in model.named_parameters())
    assert_close(model(X), found["y"])
    assert not torch.allclose(model(X), whole()(X))  # it has learned


def test_disabled_works_on_a_sharded_model(found: dict[str, Any]) -> None:
    assert_close(found["disabled"], lora_lab.eject(whole())(X))
    assert not torch.allclose(found["disabled"], found["y"])


def test_dora_trains_under_fully_shard_as_it_does_alone(found: dict[str, Any]) -> None:
    """B @ A outside a layer's forward is a product of pieces: PEFT and torchtune multiply with an identity matrix instead (PEFT's pull 1806).
    Here A, B and the magnitude belong to the layer, and are gathered for its forward."""
    check_trained(found["dora"], {"variant": "dora"}, {"lora_A", "lora_B", "lora_magnitude_vector"})


def test_a_head_that_trains_along_leaves_ddp_no_parameter_without_a_gradient(found: dict[str, Any]) -> None:
    """PEFT keeps the old head beside the new one, and DDP waits for its gradients (PEFT issue 899); and blocks are checkpointed here, whose
    reentrant form makes DDP see a parameter twice (PEFT issue 313)."""
    check_trained(found["ddp with head"], WITH_HEAD, {"lora_A", "lora_B", "weight", "bias"})


def check_trained(together: dict[str, torch.Tensor], request: dict[str, Any], moved: set[str]) -> None:
    alone = whole(**request)
    before = {name: copy.deepcopy(parameter.detach()) for name, parameter in alone.named_parameters()}
    train32(alone, slice(None))
    assert set(together) == set(before)
    for name, parameter in alone.named_parameters():
        assert_close(together[name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    trained = {name for name in before if not torch.equal(before[name], together[name])}
    assert trained == {name for name, parameter in alone.named_parameters() if parameter.requires_grad}
    assert {part for name in trained for part in name.split(".") if part in moved} == moved


def test_the_older_fsdp_is_refused_by_name(tmp_path: Path) -> None:
    """It flattens the parameters of several layers into one: their names and shapes are no longer a model's."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single process, which has nothing to divide with
            model = FullyShardedDataParallel(whole(), use_orig_params=True, device_id=torch.device("cpu"))
        for verb in (*TOO_LATE.values(), lora_lab.save):
            with pytest.raises(LoraLabError, match="this is torch's FullyShardedDataParallel|'FullyShardedDataParallel' is divided among processes"):
                verb(model, str(tmp_path / "adapter"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat = FullyShardedDataParallel(whole().requires_grad_(True), device_id=torch.device("cpu"))
        with pytest.raises(LoraLabError, match="have no tensors any more: FullyShardedDataParallel"):
            lora_lab.save(flat.module, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
    finally:
        dist.destroy_process_group()


def test_a_tensor_that_zero_3_has_emptied_is_not_saved(tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 leaves a parameter of no elements outside a layer's forward; a file of such tensors loads nowhere."""
    model = whole()
    model[0].lora_B["default"].data = torch.empty(0)
    with pytest.raises(LoraLabError, match="GatheredParameters"):
        lora_lab.save(model, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
