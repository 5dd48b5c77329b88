"""A saver with what loads before its save and after, and copies of the folder that the save is about to change."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dying
import savers

KILLS = int(os.environ.get("LORA_LAB_KILLS", "5"))  # at moments of chance, of each path; `make faults` asks for more
LONG = "LORA_LAB_KILLS" in os.environ
told: dict[str, Counter[str]] = {}


class Case:
    """A saver, what loads before its save and after, and copies of the folder it is about to change."""

    def __init__(self, name: str, saver: savers.Saver, folder: Path) -> None:
        self.name, self.saver, self.folder, self.count = name, saver, folder, 0
        saver.prepare(folder / "before")
        with self.copy() as copy:
            self.old = saver.read(copy)
            self.whole = dying.run(lambda: saver.save(copy))
            assert self.whole.finished and self.whole.error is None, self.whole
            self.new, self.names = saver.read(copy), names(copy)
        assert not savers.same(self.old, self.new)

    @functools.cached_property
    def seconds(self) -> float:
        """What a save takes, a quick one of five: a later moment would kill nothing."""

        def once() -> float:
            with self.copy() as copy:
                return dying.run(lambda: self.saver.save(copy)).seconds

        return sorted(once() for _ in range(5))[1]

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        self.count += 1
        folder = self.folder / str(self.count)
        shutil.copytree(self.folder / "before", folder)
        yield folder
        shutil.rmtree(folder)

    def what_loads(self, folder: Path) -> str:
        """"old" or "new", bit for bit; anything else fails."""
        found = self.saver.read(folder)
        if savers.same(found, self.new):
            return "new"
        assert savers.same(found, self.old), f"{self.name}: neither the old one nor the new one loads"
        return "old"

    def saves_again(self, folder: Path) -> None:
        """The next save is as if nothing had happened, and has tidied up."""
        if self.name == "merged checkpoint" and (folder / "merged").exists():  # it never overwrites
            shutil.rmtree(folder / "merged")
        self.saver.save(folder)
        assert self.what_loads(folder) == "new" and names(folder) == self.names

    def tell(self, ended: dying.Ended) -> None:
        """Where it died: seen from the renames, of which the last ones make the new files appear."""
        when = ("finished before its kill" if ended.finished else "before the first rename" if not ended.renames
                else "between renames" if ended.renames < self.whole.renames else "at the last rename or after")  # fmt: skip
        told.setdefault(self.name, Counter())[when] += 1


def names(folder: Path) -> list[str]:
    """Every file and folder, hidden ones included; a lock is no litter."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
