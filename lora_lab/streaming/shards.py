"""Checkpoints in safetensors files, read and written a few rows at a time: no file and no large tensor is ever held whole.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header {name: {dtype, shape, data_offsets}} padded
with spaces to a multiple of eight, and the tensors' bytes one after the other. A checkpoint is one file, model.safetensors, or
several with an index, model.safetensors.index.json, that says which tensor is in which.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraLabError
from ..files import json_object
from ..weight_files import is_file_in

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
              "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
MOST_HEADER = 32 << 20
BLOCK_NUMBERS = 1 << 20  # numbers to a block: 4 MiB in float32, of which about ten exist at a time
MOST_TRIES = 100
NO_MEMORY = re.compile("not enough memory|(can't|[Cc]annot) allocate memory")  # in torch's RuntimeErrors; they say nothing of the file


@contextlib.contextmanager
def opened(path: Path, way_out: str = "save or copy it again") -> Iterator[Any]:
    """A safetensors file, open. Raises LoraLabError for a damaged one, inside the block, too: some of it shows only when a tensor is read.

    And for one that is missing, or that the system refuses to read. Where memory runs out, that error stays what it is: the file may be good.
    """
    try:
        _check_header(path)
        with _opened_at_once(path) as file:
            yield file
    except (LoraLabError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.exists():  # safetensors says so of any file that it cannot open
            raise LoraLabError(f"{path} is missing: {way_out}") from None
        raise LoraLabError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, RuntimeError, OverflowError, TypeError, LookupError) as error:  # torch's, for shapes of 2**63
        if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
            raise
        if "unable to open file" in str(error):  # torch's, for too many open files
            raise LoraLabError(f"{path} cannot be read: {error}") from None
        raise LoraLabError(f"{path} is truncated or not a safetensors file ({error}): {way_out}") from None


def _opened_at_once(path: Path) -> Any:
    """safe_open opens a file twice, for its header and for its numbers; again, where another process has replaced it in between."""
    for _ in range(MOST_TRIES):
        before = _identity(path)
        try:
            file = safe_open(path, "pt")
        except Exception:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return file
    raise LoraLabError(f"{path} was replaced {MOST_TRIES} times while it was opened: wait until nobody writes it any more")


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_header(path: Path) -> None:
    """Each tensor in a header takes ten times its text once it is read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MOST_HEADER < length <= path.stat().st_size:
        raise LoraLabError(f"{path} has a header of {length:,} bytes, expected {MOST_HEADER:,} at most: no model has so many tensors in one file")


def check_shape(path: Path, key: str, shape: Iterable[int]) -> None:
    """A tensor of no numbers takes no bytes in a file, and may still have sides that PyTorch cannot multiply."""
    if math.prod(max(size, 1) for size in shape) >= 2**62:
        raise LoraLabError(f"{path}: tensor {key!r} is {list(shape)}, larger than any memory: it is damaged")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet.  dtype: the format's name, "BF16"."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) over the first dimension. Every block opens the file anew: a mapping that stays open counts as memory."""
        if not math.prod(self.shape):
            return
        if not self.shape:
            yield 0, self.read()
            return
        step = max(1, BLOCK_NUMBERS // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            yield start, self.read(start, min(start + step, self.shape[0]))

    def read(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows start to stop, or all of it."""
        with opened(self.file) as file:
            return file.get_slice(self.key)[start:stop] if self.shape else file.get_tensor(self.key)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors by name, and the texts stored with them."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_shard(path: Path) -> Shard:
    """What a safetensors file holds; reads the header only. Raises LoraLabError for a damaged file."""
    with opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        tensors = {key: StoredTensor(path, key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        for key, tensor in tensors.items():
            check_shape(path, key, tensor.shape)
        return Shard(tensors, file.metadata() or {})


def read_checkpoint(folder: Path) -> dict[str, Shard]:
    """The shards of a checkpoint folder by file name. Raises LoraLabError where weights are missing, damaged or pickled."""
    if (folder / MODEL).is_file():
        return {MODEL: read_shard(folder / MODEL)}
    if not (folder / INDEX).is_file():
        raise LoraLabError(_what_is_missing(folder))
    weight_map = json_object((folder / INDEX).read_bytes(), folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoraLabError(f"{folder / INDEX} has no 'weight_map' from tensors to files")
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not is_file_in(folder, name)]:
        raise LoraLabError(f"{folder / INDEX} names {absent[0]!r}, which is not in the folder: copy the missing shard")
    shards = {name: read_shard(folder / name) for name in names}
    if lost := [key for key, name in weight_map.items() if key not in shards[name].tensors]:
        raise LoraLabError(f"{folder / INDEX} says that {lost[0]!r} is in {weight_map[lost[0]]}, but it is not: save the checkpoint again")
    return shards


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"base folder {str(folder)!r} does not exist"
    if pickled := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        return (f"{folder} holds pickled weights ({pickled[0]}), which can run code when read and are refused: load them with transformers and "
                "call save_pretrained, which writes safetensors")  # fmt: skip
    return f"{folder} holds neither {MODEL} nor {INDEX}"


# Writing --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.  blocks: called once, when its turn comes; its rows in order."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        if self.dtype not in ITEM_BYTES:
            raise LoraLabError(f"number format {self.dtype} is not one that can be copied here; known are {', '.join(ITEM_BYTES)}")
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_shard(path: Path, tensors: dict[str, NewTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file block by block. Larger number formats come first, so that every tensor is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-ITEM_BYTES.get(item[1].dtype, 0), item[0]))
    with open(path, "wb") as file:
        file.write(header(dict(ordered), metadata))
        for name, tensor in ordered:
            written = sum(file.write(raw_bytes(block)) for block in tensor.blocks())
            assert written == tensor.nbytes, (name, written, tensor)
        file.flush()
        os.fsync(file.fileno())


def header(tensors: dict[str, NewTensor], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file, for tensors in this order.

    >>> first = header({"a": NewTensor("F32", (2, 3), lambda: iter(()))}, {})
    >>> int.from_bytes(first[:8], "little"), first[8:]
    (64, b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}       ')
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(block: Tensor) -> memoryview:
    """A block's memory, without a copy where it is contiguous."""
    return block.contiguous().reshape(-1).view(torch.uint8).numpy().data
