"""Adapters of parameters under FSDP2: fully_shard switches the class of a module whose class inject has switched, and divides its parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import meet
from small_models import randomise
from torch import Tensor, nn

import lora_lab


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8))
        self.down = nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.tanh(x @ up.T) @ down.T for up, down in zip(self.up, self.down, strict=True))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Experts(), nn.Linear(8, 8))


def step(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    y.square().mean().backward()
    return y


def adapted() -> Any:
    return randomise(lora_lab.inject(base(), rank=2, target_modules=["0"], target_parameters=["up", "down"]), by=0.3)


def worker(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    meet(rank, folder)
    model: Any = adapted()
    alone, x = copy.deepcopy(model), torch.randn(2, 3, 8)[rank]
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    report = {"output": float((step(model, x) - step(alone, x)).abs().max())}
    for (name, own), whole in zip(model.named_parameters(), alone.parameters(), strict=True):
        if whole.grad is not None:
            dist.all_reduce(whole.grad)
            report[name] = float((own.grad.full_tensor() - whole.grad / 2).abs().max())
    lora_lab.save(model, Path(folder) / f"adapter{rank}")
    if rank == 0:
        torch.save(report, Path(folder) / "report.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_compute_and_learn_what_one_does(tmp_path: Path) -> None:
    """Backward forms the sums again from parameters that were freed in between and gathered once more."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    report = torch.load(tmp_path / "report.pt")
    assert len(report) == 7 and all(error < 1e-4 for error in report.values()), report
    saved, x = adapted(), torch.randn(3, 8)
    for rank in (0, 1):
        loaded = lora_lab.load(base(), tmp_path / f"adapter{rank}")
        torch.testing.assert_close(loaded(x), saved(x))
    assert not torch.allclose(saved(x), base()(x), rtol=0.1)
