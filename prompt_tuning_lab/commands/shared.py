"""Steps that several commands have in common; the rest are lora_lab's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import LoraLabError


def load_tasks(model: Any, folders: Sequence[Path], names: Sequence[str] | None = None) -> Any:
    """The model with the prompt of each folder as a task: under its name, or that of the folder. The first is the active one."""
    from .. import load, use

    tasks = task_names(folders, names)
    prompted = model
    for folder, task in zip(folders, tasks, strict=True):
        prompted = load(prompted, folder, task)
    return use(prompted, tasks[0])


def task_names(folders: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """A name for each folder.

    >>> task_names([Path("adapters/my prompt.v2"), Path("adapters/other")], None)
    ['my-prompt-v2', 'other']
    """
    tasks = [re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name)[:64] for folder in folders] if names is None else list(names)
    if len(tasks) != len(folders):
        raise LoraLabError(f"--tasks names {len(tasks)} tasks for {len(folders)} folders: expected one each")
    if twice := [name for name, count in Counter(tasks).items() if count > 1]:
        raise LoraLabError(f"two tasks are called {twice[0]!r}: name them, --tasks first second")
    return tasks
