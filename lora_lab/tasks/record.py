"""What an adapter was taught, in a file beside it: so that it is asked later as it was asked then, and its classes keep their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.tables import Classes
from ..errors import LoraLabError
from ..files import json_object, write_json
from .base import Reader
from .material import Material

RECORD = "lora_lab_task.json"


@dataclass(frozen=True)
class Record:
    """task: of TASKS.  words: how the model was asked.  classes: of a labelled task."""

    task: str
    words: str
    classes: Classes | None = None


def write_record(folder: Path, material: Material, reader: Reader) -> None:
    classes = material.classes
    write_json(folder / RECORD, {"task": material.task.name, "words": reader.way.words, "columns": material.columns.of,
                                 "classes": None if classes is None else {"names": classes.names, "of": classes.of}})  # fmt: skip


def read_record(folder: Path, task: str) -> Record | None:
    """What the adapter in this folder was taught; None where nobody has written it down. Raises LoraLabError for another task."""
    path = folder / RECORD
    if not path.is_file():
        return None
    found = json_object(path.read_bytes(), path)
    if found.get("task") != task:
        raise LoraLabError(f"--task {task}: {folder} was taught {found.get('task')!r}")
    return Record(task, str(found.get("words")), _classes(found.get("classes"), path))


def _classes(found: Any, path: Path) -> Classes | None:
    if found is None:
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("names"), list) or not isinstance(found.get("of"), Mapping):
        raise LoraLabError(f"{path}: 'classes' is {found!r:.80}, expected names and what they are of")
    names, of = tuple(map(str, found["names"])), dict(found["of"])
    if not names or not all(type(number) is int and 0 <= number < len(names) for number in of.values()):
        raise LoraLabError(f"{path}: 'of' is {of!r:.80}, expected the number of a class, 0 to {len(names) - 1}, for each label")
    return Classes(names, of)
