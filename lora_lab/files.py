"""Files written so that nothing is lost: each appears whole under its name, or what was there before stays. And the weights a folder holds."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import LoraLabError

ORIGIN = "lora_lab.json"  # in folders we converted: where the weights came from


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
    """Call `write` with a temporary path beside `path`, then rename. A failure leaves what was there, and no litter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    write_file(path, lambda temporary: _write_text(temporary, json.dumps(value, indent=2, sort_keys=True) + "\n"))


@contextlib.contextmanager
def saving(what: str, target: Path) -> Iterator[None]:
    """Turn the system's refusal (disk full, no permission, a file in the way) into one clear line."""
    try:
        yield
    except OSError as error:
        raise LoraLabError(f"could not save {what} to {target}: {error.strerror or error} (what was there before is untouched)") from error
    except Exception as error:  # safetensors reports a failed write with its own class
        if type(error).__name__ != "SafetensorError":
            raise
        raise LoraLabError(f"could not save {what} to {target}: {error} (what was there before is untouched)") from error


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well. If another process was faster, its folder stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a file lock, so that two processes do not do the same work; where the system has none, both do it, harmlessly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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
    """Wait until what was written is on the disk, and not in its cache only."""
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# A model's weights on disk ----------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = [path.name for path in folder.glob("*.bin")]
        hint = f"; {pickled[0]} is a pickle, which can run code when read: convert it with transformers' save_pretrained" if pickled else ""
        raise LoraLabError(f"{folder} holds no model.safetensors and no model.safetensors.index.json{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise LoraLabError(f"{index} has no weight_map (tensor: file): download or copy the model again")
    names = sorted({str(name) for name in weight_map.values()})
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise LoraLabError(f"{index} lists {missing[0]!r}, which is not in the folder: download or copy the model again")
    return [folder / name for name in names]


def weights_sha256(source: Path) -> str:
    """SHA-256 of a model's weights on disk: of the one file, or of the list of shards with their hashes.

    A folder we converted answers with the hash of the file it was made from.
    """
    if source.is_file():
        return _file_sha256(source)
    if (source / ORIGIN).is_file() and (origin := read_json(source / ORIGIN).get("sha256")):
        return str(origin)
    hashes = {path.name: _file_sha256(path) for path in weight_files(source)}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    blob, status = path.resolve(), path.stat()
    if path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name  # a hub snapshot links to a blob that is named by its SHA-256
    return _hash_once(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hash_once(path: Path, size: int, modified_ns: int) -> str:
    return sha256(path)
