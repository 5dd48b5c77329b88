"""Files written so that nothing is lost: each appears whole under its name, or what was there before stays.

Killed at any moment, a save leaves the old file or the new one. It may leave a hidden ".<name>.unfinished-..." folder beside it, which the next save
of that name removes where file locks exist. What a save has returned from survives a power failure, too: file and folder are synced, the first
before the rename, the other after it; a disk that lies about that, and other files than those written here, are beyond this promise.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import LoraLabError

ORIGIN = "lora_lab.json"  # in folders we converted: where the weights came from
UNFINISHED = ".unfinished-"  # in the names of hidden folders that are being written
IN_USE = ".in-use"


def cache_folder() -> Path:
    """LORA_LAB_CACHE, else the user's cache folder (XDG, macOS and Windows conventions)."""
    if configured := os.environ.get("LORA_LAB_CACHE"):
        return Path(configured).expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "lora-lab"
    mac = Path.home() / "Library" / "Caches"
    base = mac if mac.is_dir() else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lora-lab"


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path, then rename. A failure leaves what was there, and no litter."""
    with workplace(path) as folder:
        temporary = folder / path.name
        write(temporary)
        _finish(temporary)
        os.replace(temporary, path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_file(path, lambda temporary: _write_json(temporary, value))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def saving(what: str, target: Path, left: str = "what was there before is untouched") -> Iterator[None]:
    """Turn the system's refusal (disk full, no permission, a file in the way) into one clear line.  left: what is there then."""
    try:
        yield
    except OSError as error:
        raise LoraLabError(f"could not save {what} to {target}: {error.strerror or error} ({left})") from error
    except Exception as error:  # safetensors reports a failed write with its own class
        if type(error).__name__ != "SafetensorError":
            raise
        raise LoraLabError(f"could not save {what} to {target}: {error} ({left})") from error


@contextlib.contextmanager
def new_folder(target: Path, or_theirs: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well. Raises OSError where `target` is there by then, and not empty.

    or_theirs: if another process was faster, its folder will do, and stays.
    """
    with workplace(target) as place:
        (temporary := place / target.name).mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _finish(path)
        with contextlib.suppress(OSError):
            target.rmdir()  # an empty one may be there
        try:
            os.rename(temporary, target)
        except OSError:
            if not (or_theirs and target.is_dir()):
                raise
    sync(target.parent)


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, removed afterwards; with it go those of processes that were killed in theirs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}{UNFINISHED}"
    remove_abandoned(target.parent, glob.escape(target.name))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        with alone_in(folder):
            if not folder.exists():  # another process took it for abandoned before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """The hidden folders in `folder` whose processes were killed; those that live hold a lock. name: of what was to be written, a pattern."""
    for left in folder.glob(f".{name}{UNFINISHED}*"):
        with alone_in(left, patience_seconds=0) as abandoned:
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)


# Several files at once --------------------------------------------------------------------------------------------------------

DECIDED = ".lora-lab-new"
OUTDATED = {"model.safetensors": ORIGIN, "tokenizer.json": "chat_template.jinja"}  # a new file: the older one that it makes untrue


@contextlib.contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files take the place of those in `folder`, all of them or none.

    One rename decides it, to folder/.lora-lab-new. From there they are moved one by one; where that is interrupted, `settle` goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        _settle(folder)
        with new_folder(folder / DECIDED) as place:
            yield place
        _settle(folder)


def settle(folder: Path) -> None:
    """Finish what an interrupted `replacing_files` had decided; whoever reads those files calls this first. Raises LoraLabError where it cannot."""
    if not (folder / DECIDED).is_dir():  # nearly always: a reader does not wait for a save that has decided nothing yet
        return
    with alone_in(folder):
        _settle(folder)


def _settle(folder: Path) -> None:
    """In a folder that is locked. Where there are no locks another process may do the same: what is gone, it has moved."""
    decided = folder / DECIDED
    if not decided.is_dir() or decided.is_symlink():
        return
    with saving("the rest of an interrupted save", folder, f"some of its files are in place; the others are in {DECIDED}, for the next load or save"):
        waiting: list[Path] = []
        with contextlib.suppress(FileNotFoundError):
            waiting = sorted(path for path in decided.rglob("*") if path.is_file())
        for path in waiting:
            _move_to_its_place(path, path.relative_to(decided), folder)
        sync(folder)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(decided)


def _move_to_its_place(path: Path, name: Path, folder: Path) -> None:
    if (folder / name).parent.resolve() != (folder.resolve() / name).parent:
        raise LoraLabError(f"{path} is to be moved to {(folder / name).resolve()}, out of its folder: it was not written here; remove it")
    (folder / name).parent.mkdir(exist_ok=True)
    if str(name) in OUTDATED:
        (folder / OUTDATED[str(name)]).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, folder / name)


# Locks ------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone_in(folder: Path, patience_seconds: float = 10.0) -> Iterator[bool | None]:
    """Lock a folder against other processes that do so, until the block or the process ends, however it ends. Yields whether it is locked.

    It is not where another process keeps it for longer than `patience_seconds` (or this one, in a signal handler); None where the system, or a
    network's file system, has no such locks: what is done inside must be safe without, if not as tidy.
    """
    handle = None
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
    if handle is None:
        yield None
        return
    with _locked(handle, patience_seconds) as locked:
        yield locked


@contextlib.contextmanager
def in_use(folder: Path, what: str) -> Iterator[None]:
    """Refuse a second process that would do the same in `folder` meanwhile, by a LoraLabError; where there are no locks, let it.  what: it does."""
    sign = folder / IN_USE
    with saving("anything", folder):
        sign.mkdir(parents=True, exist_ok=True)
    with alone_in(sign, patience_seconds=0) as alone:
        if alone is False:
            raise LoraLabError(f"another process {what} in {folder}: wait until it ends, stop it, or choose another folder")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                sign.rmdir()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a file lock, so that two processes do not do the same work; where the system has none, both do it, harmlessly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), math.inf):
        yield


@contextlib.contextmanager
def _locked(handle: int, patience_seconds: float) -> Iterator[bool | None]:
    """Holds an open file's lock, where it can be had in time, and closes the file in the end."""
    locked = _flock(handle, patience_seconds)
    try:
        yield locked
    finally:
        if locked:
            _flock(handle, unlock=True)  # a process that was forked meanwhile has it, too
        os.close(handle)


def _flock(handle: int, patience_seconds: float = 0.0, unlock: bool = False) -> bool | None:
    """Whether it could be done; None where nobody could."""
    try:
        import fcntl
    except ImportError:
        return None
    how, until = fcntl.LOCK_UN if unlock else fcntl.LOCK_EX | fcntl.LOCK_NB, time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(handle, how)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        except OSError:
            return None


def check_writable(folder: Path) -> None:
    """Make sure now that something can be saved into `folder` later. Raises LoraLabError; leaves no trace but the folder."""
    with saving("anything", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_object(text: str | bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, which came from `path`. Raises LoraLabError for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraLabError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LoraLabError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LoraLabError(f"{path} is missing: a model folder needs config.json and safetensors files")
    return json_object(path.read_bytes(), path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not in its cache only."""
    folder, windows = path.is_dir(), os.name == "nt"
    if folder and windows:  # which cannot
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not folder:  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def _finish(path: Path) -> None:
    """As readable as any new file (temporary ones are their owner's only), and on the disk."""
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())
    sync(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
