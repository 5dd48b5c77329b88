"""What a run used and wrote: peak memory, the log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..files import saving, sync


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
    """log.jsonl in the output folder: one JSON object a line, flushed as it is written; without a folder, nothing.

    keep_bytes: of the log that is there, the part to go on after (a run that is resumed has written more than its snapshot knows of). Without,
    the log of an earlier run becomes log.previous.jsonl.
    """

    def __init__(self, folder: Path | None, keep_bytes: int = 0) -> None:
        self.path = None if folder is None else folder / "log.jsonl"
        if self.path is not None:
            with saving("log", self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if not keep_bytes and self.path.exists() and self.size():
                    os.replace(self.path, self.path.with_name("log.previous.jsonl"))
                self.path.touch()
                os.truncate(self.path, min(keep_bytes, self.size()))  # somebody may have taken it away

    def size(self) -> int:
        """Bytes, all of them on the disk: a snapshot that knows of them must not outlive them."""
        if self.path is None:
            return 0
        sync(self.path)
        return self.path.stat().st_size

    def write(self, **entry: Any) -> None:
        if self.path is not None:
            with saving("log", self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({key: _json_number(value) for key, value in entry.items()}) + "\n")


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
