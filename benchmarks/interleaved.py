"""Two contestants, each in a process of its own, taking turns in one run, so that both meet the same machine.

A worker script prints "ready", then for each line it reads does one round and prints a JSON object with its seconds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# glibc keeps what is freed for later, more at some times than at others; with this it gives large blocks back at once, so that a resident set shows
# what is in use. It costs time, so that speed is measured without.
GIVES_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Worker:
    """A process of this same script, started with `--worker ARGS`; environment: variables beside those of this process."""

    def __init__(self, script: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, str(Path(script).resolve()), "--worker", *arguments]
        variables = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)
        self.rounds: list[dict[str, Any]] = []
        self.read()  # "ready"

    def read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"a worker died: {self.process.args}")

    def round(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def summary(self) -> dict[str, float]:
        """The median of each figure over the rounds; the largest of a peak."""
        return {key: (max if key.startswith("peak") else statistics.median)(entry[key] for entry in self.rounds) for key in self.rounds[0]}


def take_turns(workers: list[Worker], rounds: int, warm_up: int = 1) -> None:
    for number in range(warm_up + rounds):
        for worker in workers:
            worker.round()
            if number < warm_up:
                worker.rounds.clear()
    for worker in workers:
        worker.close()


def serve(one_round: Any) -> None:
    """The worker's side: say ready, then answer each line with what one_round() returns."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(one_round()), flush=True)


def setting() -> dict[str, Any]:
    """Date, machine and versions, for the head of a table."""
    import torch

    versions = {}
    for name in ("torch", "transformers", "peft", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"date": date.today().isoformat(), "cpu": _cpu(), "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return name + "".join(f", {flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
