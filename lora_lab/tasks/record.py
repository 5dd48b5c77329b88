"""What an adapter was taught, in a file beside it: so that it is asked later as it was asked then, and its classes keep their order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.tables import Classes
from ..errors import LoraLabError
from ..files import json_object, saving, write_json
from .base import Reader
from .material import Material

RECORD = "lora_lab_task.json"


@dataclass(frozen=True)
class Record:
    """task: of TASKS.  words: how the model was asked.  classes: of a labelled task.

    source: of the rows.  columns: role -> column.  held_back: the parts that were taken from its training rows.  None of what nobody has written
    down.
    """

    task: str
    words: str
    classes: Classes | None = None
    source: str | None = None
    columns: dict[str, Any] | None = None
    held_back: tuple[str, ...] | None = None


def write_record(folder: Path, material: Material, reader: Reader, held_out: str | None = None) -> None:
    """held_out: another source, of the rows that were watched."""
    classes = material.classes
    write_json(folder / RECORD, {"task": material.task.name, "words": reader.way.words, "columns": material.columns.of,
                                 "source": _place(material.source), "held_back": material.made, "eval_data": held_out,
                                 "classes": None if classes is None else {"names": classes.names, "of": classes.of}})  # fmt: skip


def remove_record(folder: Path) -> None:
    """Before another adapter takes the place of the one that it is of."""
    with saving("an adapter", folder):
        (folder / RECORD).unlink(missing_ok=True)


def read_record(folder: Path, task: str) -> Record | None:
    """What the adapter in this folder was taught; None where nobody has written it down. Raises LoraLabError for another task."""
    path = folder / RECORD
    if not path.is_file():
        return None
    found = json_object(path.read_bytes(), path)
    if found.get("task") != task:
        raise LoraLabError(f"--task {task}: {folder} was taught {found.get('task')!r}")
    source, columns, held_back = (found.get(name) for name in ("source", "columns", "held_back"))
    return Record(task, str(found.get("words")), _classes(found.get("classes"), path), source if isinstance(source, str) else None,
                  columns if isinstance(columns, dict) else None, tuple(map(str, held_back)) if isinstance(held_back, list) else None)  # fmt: skip


def check_held_back(folder: Path, material: Material, part: str) -> None:
    """Raise LoraLabError where the adapter in this folder was trained on these rows, which a new division of its source would call held back."""
    record = read_record(folder, material.task.name)
    if record is None or record.source != _place(material.source) or part not in material.made:
        return
    if reason := _another_division(record, material):
        raise LoraLabError(f"the {part} rows of {material.source} are not those that were held back from {folder}, and some were trained on: "
                           f"{reason}, or give --data that it has not seen, and --split all")  # fmt: skip
    if record.held_back is not None and part not in record.held_back:
        raise LoraLabError(f"the {part} rows of {material.source} would be rows that {folder} was trained on: it was given held-out rows of another "
                           "source (--eval-data), and none of these were held back. Give --data that it has not seen, and --split all")  # fmt: skip


def _place(source: str) -> str:
    """A file or folder by its whole path: the name that was typed means another one elsewhere."""
    return os.path.abspath(source) if os.path.exists(source) else source


def _another_division(record: Record, material: Material) -> str:
    """Why the tenths of the same rows would be others, which are chosen by a hash of the texts, of each class; "" where they are the same."""
    if record.columns is not None and record.columns != dict(material.columns.of):
        return f"its columns were {record.columns}, here they are {dict(material.columns.of)}; name the same"
    before, now = record.classes, material.classes
    if before is not None and now is not None and {label: now.of.get(label) for label in before.of} != before.of:
        return f"its classes were {before.of}, here they are {now.of}; leave --labels out"
    return ""


def _classes(found: Any, path: Path) -> Classes | None:
    if found is None:
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("names"), list) or not isinstance(found.get("of"), Mapping):
        raise LoraLabError(f"{path}: 'classes' is {found!r:.80}, expected names and what they are of")
    names, of = tuple(map(str, found["names"])), dict(found["of"])
    if not names or not all(type(number) is int and 0 <= number < len(names) for number in of.values()):
        raise LoraLabError(f"{path}: 'of' is {of!r:.80}, expected the number of a class, 0 to {len(names) - 1}, for each label")
    return Classes(names, of)
