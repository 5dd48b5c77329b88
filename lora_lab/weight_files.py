"""A model's weights on disk: which files they are, and the SHA-256 that an adapter's file names its base by."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

from .errors import LoraLabError
from .files import ORIGIN, read_json, sha256


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
    if missing := [name for name in names if not is_file_in(folder, name)]:
        raise LoraLabError(f"{index} lists {missing[0]!r}, which is not in the folder: download or copy the model again")
    return [folder / name for name in names]


def is_file_in(folder: Path, name: str) -> bool:
    """Whether the name is one of a file in this very folder; not "../x", "/x", or one that no file can have."""
    try:
        return Path(name).name == name and (folder / name).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


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
