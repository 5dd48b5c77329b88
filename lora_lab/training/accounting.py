"""What a run used and wrote: peak memory, the log, saved steps."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..files import saving, write_file


def reset_peak(device: torch.device) -> None:
    """Start counting `peak_bytes` from here, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_bytes(device: torch.device) -> int:
    """On a GPU what PyTorch allocated at most; elsewhere the process's largest resident set, Python and libraries included (0: unknown here)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Log:
    """log.jsonl in the output folder: one JSON object a line, flushed as it is written; without a folder, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "log.jsonl"
        if self.path is not None:
            with saving("log", self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text("", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        if self.path is not None:
            with saving("log", self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({key: _json_number(value) for key, value in entry.items()}) + "\n")


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_trainable(model: nn.Module, folder: Path, step: int) -> None:
    """The weights that train, by name, as step-<n>.safetensors."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    path = folder / f"step-{step:06d}.safetensors"
    with saving(f"step {step}", path):
        write_file(path, lambda temporary: save_file(tensors, temporary, {"format": "pt", "step": str(step)}))
