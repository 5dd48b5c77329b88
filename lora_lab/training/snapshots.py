"""A run's whole state in a folder, so that a run that was stopped goes on as if it had not been.

    OUTPUT_DIR/snapshots/step-000120/
        tensors.safetensors     what trains, the optimizer's states, the generators' states
        state.json              numbers: step, losses, the scale, where the log ends, the SHA-256 of the tensors

A snapshot appears whole or not at all: it is written beside its place, synced and renamed before an older one is removed; files.py says what that
is good for. One that is damaged all the same is noticed by its checksum, and the one before is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import LoraLabError
from ..files import json_object, new_folder, remove_abandoned, saving, sha256, workplace, write_json
from ..streaming.shards import opened

FOLDER, TENSORS, STATE = "snapshots", "tensors.safetensors", "state.json"
NAME = re.compile(r"step-(\d{6,})")
FORMAT = 1  # of these files; a newer one is refused


class Damaged(LoraLabError):
    """A snapshot that no other try will read; or all of them, or there is none."""


@dataclass
class Snapshot:
    """tensors: by name, on the CPU.  state: what JSON holds, "step" among it."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def write(output_dir: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write a snapshot, then remove all but the newest `keep`. Raises LoraLabError where the disk refuses; earlier ones are untouched.

    Of those of later steps only the damaged ones go, which `newest` has passed over; one that is whole, or cannot be read at the moment, stays.
    """
    target = output_dir / FOLDER / f"step-{snapshot.step:06d}"
    with saving(f"step {snapshot.step}", target):
        shutil.rmtree(target, ignore_errors=True)  # of a run that was begun anew over this one
        with new_folder(target) as folder:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}, folder / TENSORS)
            write_json(folder / STATE, {"format": FORMAT, "tensors_sha256": sha256(folder / TENSORS), **snapshot.state})
    folders = _folders(output_dir)
    place = folders.index(target)
    for other in (*filter(_is_damaged, folders[:place]), *folders[place + keep :]):
        shutil.rmtree(other, ignore_errors=True)
    remove_abandoned(output_dir / FOLDER)
    return target


def any_in(output_dir: Path) -> bool:
    """Whether there are snapshots, whole or damaged."""
    return bool(_folders(output_dir))


def newest(output_dir: Path) -> Snapshot:
    """The newest snapshot that is whole; a warning names each that is damaged.

    Raises Damaged where there is none, and another LoraLabError where one cannot be read at the moment: it may be whole, and is not passed over.
    """
    folders = _folders(output_dir)
    if not folders:
        raise Damaged(f"nothing to resume: {output_dir / FOLDER} holds no step-... folder; the run has to be started with save_every")
    for folder in folders:
        try:
            return _read(folder)
        except Damaged as error:
            warnings.warn(f"{error}; going back to the snapshot before", stacklevel=2)
    raise Damaged(f"nothing to resume: all {len(folders)} snapshots in {output_dir / FOLDER} are damaged")


def newest_state(output_dir: Path) -> dict[str, Any]:
    """What the newest whole snapshot says; its tensors are checked and not loaded. Raises Damaged where there is none."""
    for folder in _folders(output_dir):
        with contextlib.suppress(Damaged):
            return _checked_state(folder)
    raise Damaged(f"no snapshot in {output_dir / FOLDER} is whole")


def settings_said(output_dir: Path) -> dict[str, Any]:
    """The settings that the newest snapshot names, whole or not, as far as they can be read: its tensors are not looked at."""
    for folder in _folders(output_dir)[:1]:
        with contextlib.suppress(LoraLabError, OSError):
            settings = json_object((folder / STATE).read_bytes(), folder / STATE).get("settings")
            return settings if isinstance(settings, dict) else {}
    return {}


def _read(folder: Path) -> Snapshot:
    state = _checked_state(folder)
    with opened(folder / TENSORS) as file:
        return Snapshot({name: file.get_tensor(name) for name in file.keys()}, state)


def _checked_state(folder: Path) -> dict[str, Any]:
    """Raises Damaged where a file is missing, or is not the one that was written; LoraLabError where the system refuses to read it."""
    try:
        content, digest = (folder / STATE).read_bytes(), sha256(folder / TENSORS)
    except FileNotFoundError as error:
        raise Damaged(f"{folder} is incomplete ({error})") from None
    except OSError as error:
        raise LoraLabError(f"{folder} cannot be read ({error}): try again, or delete it, and the snapshot before is used") from None
    try:
        state = json_object(content, folder / STATE)
    except LoraLabError as error:
        raise Damaged(str(error)) from None
    if state.get("format") != FORMAT:
        raise Damaged(f"{folder} has format {state.get('format')!r}, this version reads {FORMAT}")
    if state.get("tensors_sha256") != digest:
        raise Damaged(f"{folder / TENSORS} is damaged (its SHA-256 is not the one written with it)")
    return state


def _is_damaged(folder: Path) -> bool:
    try:
        _checked_state(folder)
    except LoraLabError as error:
        return isinstance(error, Damaged)
    return False


def _folders(output_dir: Path) -> list[Path]:
    """Newest first."""
    inside = (output_dir / FOLDER).iterdir() if (output_dir / FOLDER).is_dir() else ()
    steps = {int(match[1]): path for path in inside if (match := NAME.fullmatch(path.name)) and path.is_dir()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def remove_all(output_dir: Path) -> None:
    """A run that begins anew leaves no snapshot of an earlier one to be resumed by mistake; all go at once, as half of them would look like a run."""
    if not output_dir.is_dir():
        return
    with saving("a new run", output_dir), workplace(output_dir / FOLDER) as place, contextlib.suppress(FileNotFoundError):
        os.rename(output_dir / FOLDER, place / FOLDER)


# Optimizers ------------------------------------------------------------------------------------------------------------------


def optimizer_tensors(states: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) of each weight's state, {weight: {name: value}}, under names for a file."""
    flat = {f"optimizer/{weight}/{name}": value for weight, state in states.items() for name, value in state.items()}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in flat.items() if name not in tensors}
    json.dumps(numbers)  # nothing else is expected there
    return tensors, numbers


def optimizer_states(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """The inverse of `optimizer_tensors`."""
    states: dict[str, dict[str, Any]] = {}
    for key, value in {**snapshot.tensors, **snapshot.state.get("optimizer", {})}.items():
        if key.startswith("optimizer/"):
            weight, _, name = key.removeprefix("optimizer/").rpartition("/")  # torch takes names with a slash
            states.setdefault(weight, {})[name] = value
    return states
