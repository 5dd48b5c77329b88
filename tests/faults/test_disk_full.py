"""A disk that is full or read-only: one clear error, what was there before, and nothing half written left behind."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import Case, names
from dying import CAN_BE_FULL, fail_at, largest_file, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX's")
FULL, READ_ONLY, TOO_LARGE = errno.ENOSPC, errno.EROFS, errno.EFBIG


def refused(case: Case, folder: Path, error: str | None, code: int) -> None:
    """The error is ours and says what the system said; the folder is as before, or, where only the last of its files was refused, new."""
    assert error is not None and error.startswith("LoraLabError: could not save") and os.strerror(code) in error, error
    case.what_loads(folder)
    assert not [name for name in names(folder) if "unfinished" in name]


def test_refused_at_any_file_operation(case: Case) -> None:
    """Whichever open, new folder, rename or sync is the first that finds no room, or the disk read-only, as it becomes after an error."""
    for number in (number for number, name in enumerate(case.whole.operations) if name in CAN_BE_FULL):
        code = (FULL, READ_ONLY)[number % 2]
        with case.copy() as folder:
            ended = run(lambda folder=folder: case.saver.save(folder), fail_at(number, code))
            if ended.error is None:  # a folder that is there already, or is only synced, which some file systems always refuse
                assert case.whole.operations[number] in ("fsync", "mkdir") and case.what_loads(folder) == "new"
            else:
                refused(case, folder, ended.error, code)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_refused_in_the_middle_of_a_write(case: Case, share: float) -> None:
    """RLIMIT_FSIZE: the write that reaches it is cut short, the next one is refused; inside safetensors as well."""
    with case.copy() as folder:
        case.saver.save(folder)
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with case.copy() as folder:
        ended = run(lambda: case.saver.save(folder), prepare=largest_file(int(share * largest), deadly=False))
        refused(case, folder, ended.error, TOO_LARGE)
        case.saves_again(folder)


# A disk that is really full ----------------------------------------------------------------------------------------------------------

PAGE, NEWNS, NEWUSER = 4096, 0x20000, 0x10000000


def small_disk(place: Path, size: int) -> None:
    """A disk of `size` bytes in memory, mounted for this process alone. Raises OSError where the system does not let it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC
    for call in (lambda: libc.unshare(NEWNS if os.geteuid() == 0 else NEWNS | NEWUSER), lambda: libc.mount(None, b"/", None, private, None),
                 lambda: libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, f"size={size}".encode())):  # fmt: skip
        if call() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def on_a_small_disk(case: Case, place: Path, free: int) -> dict[str, Any]:
    """In a child: the folder as it was before, on a disk with so many bytes to spare; what the save says, what loads then, what lies around."""
    used = sum(-(-path.stat().st_size // PAGE) * PAGE if path.is_file() else PAGE for path in (case.folder / "before").rglob("*"))
    try:
        small_disk(place, used + free + 8 * PAGE)
    except OSError as error:
        return {"skipped": str(error)}
    folder = Path(shutil.copytree(case.folder / "before", place / "folder"))
    with open(place / "filler", "wb", buffering=0) as filler:
        while (room := os.statvfs(place).f_bavail * PAGE) > free:
            filler.write(bytes(min(room - free, 1 << 20)))
    error = None
    try:
        case.saver.save(folder)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    return {"error": error, "loads": case.what_loads(folder), "litter": [name for name in names(folder) if "unfinished" in name]}


@pytest.mark.skipif(not Path("/proc/self/ns/mnt").exists(), reason="a disk of one's own is mounted on Linux only")
def test_a_write_finds_the_disk_full_after_so_many_bytes(case: Case, tmp_path: Path) -> None:
    """ENOSPC from the system itself, page after page, until there is room for all."""
    (tmp_path / "disk").mkdir()
    refusals = 0
    for pages in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        ended = run(lambda pages=pages: on_a_small_disk(case, tmp_path / "disk", pages * PAGE))
        assert ended.finished and ended.error is None, (pages, ended)
        found = ended.result
        if "skipped" in found:
            pytest.skip(f"no disk can be mounted here: {found['skipped']}")
        assert found["litter"] == []
        if found["error"] is None:
            assert found["loads"] == "new"
            break
        refusals += 1
        assert found["error"].startswith("LoraLabError: could not save") and os.strerror(FULL) in found["error"], found
    else:
        pytest.fail("it never had room enough")
    assert refusals > 1


# Nowhere to write ----------------------------------------------------------------------------------------------------------------------


def test_a_file_in_the_way_is_an_error_and_stays(case: Case) -> None:
    """Root writes into folders without permission; nobody writes into a file as if it were a folder."""
    targets = {path.relative_to(case.folder / "before").parts[0] for path in (case.folder / "before").iterdir()}
    (target,) = {name.split("/")[0] for name in case.names} - (targets if case.name == "merged checkpoint" else set())
    with case.copy() as folder:
        if (folder / target).is_dir():
            shutil.rmtree(folder / target)
        (folder / target).write_text("mine")
        ended = run(lambda: case.saver.save(folder))
        assert ended.error is not None and ended.error.startswith("LoraLabError: "), ended
        assert (folder / target).read_text() == "mine" and not [name for name in names(folder) if "unfinished" in name]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere: run as another user")
def test_a_folder_without_permission_is_an_error(case: Case) -> None:
    with case.copy() as folder:
        for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
            path.chmod(0o500)
        ended = run(lambda: case.saver.save(folder))
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            path.chmod(0o700)
        refused(case, folder, ended.error, errno.EACCES)
