"""Two processes on this machine: how they find each other, and what each was told."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lora_lab import LoraLabError
from lora_lab.training import Interrupted

PATIENCE_SECONDS = 300.0  # with a process that says nothing any more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(rank: int, port: int) -> None:
    """As torchrun starts one of two, whose group `fit` makes itself."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)


def meet(rank: int, folder: str | Path) -> None:
    """A group of two, by a file in place of a port, which somebody else may have taken meanwhile."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)


def refused(what: Callable[[], Any]) -> str:
    """What it said."""
    try:
        what()
    except (LoraLabError, Interrupted) as error:
        return str(error)
    return "no error"
