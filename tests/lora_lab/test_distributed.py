"""Two processes on one machine: DistributedDataParallel and FSDP2 over gloo, with a 16-bit base and float32 adapters."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lora_lab

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed with gloo")
STEPS = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def worker(rank: int, port: int, kind: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model: Any = adapted()
        rows = slice(2 * rank, 2 * rank + 2)
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
            train(wrapped, rows)
            found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        else:
            found = sharded(model, rows)
        if rank == 0:
            torch.save({name: tensor.cpu() for name, tensor in found.items()}, Path(folder) / "found.pt")
        dist.barrier()  # gloo aborts a process whose neighbour has hung up
    finally:
        dist.destroy_process_group()


def sharded(model: Any, rows: slice) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, rows)
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_the_adapters_that_one_does(tmp_path, kind: str) -> None:
    """Frozen and trained parameters, two dtypes in one layer: what FSDP1 could not flatten together (PEFT issue 1702)."""
    mp.spawn(worker, args=(free_port(), kind, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    alone = adapted()
    before = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    train(alone, slice(None))
    assert set(found) == set(before)
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert ("lora_" in name) == (not torch.equal(found[name], before[name])), name
        assert found[name].dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
