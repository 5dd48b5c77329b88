"""Checkpoints in safetensors files, read and written a few rows at a time: no file and no large tensor is ever held whole.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header {name: {dtype, shape, data_offsets}} padded
with spaces to a multiple of eight, and the tensors' bytes one after the other. A checkpoint is one file, model.safetensors, or
several with an index, model.safetensors.index.json, that says which tensor is in which.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoraLabError
from ..files import json_object

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
              "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
BLOCK_NUMBERS = 1 << 20  # numbers to a block: 4 MiB in float32, of which about ten exist at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet.  dtype: the format's name, "BF16"."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) over the first dimension. Every block opens the file anew: a mapping that stays open counts as memory."""
        if not self.shape:
            yield 0, self.read()
            return
        step = max(1, BLOCK_NUMBERS // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            yield start, self.read(start, min(start + step, self.shape[0]))

    def read(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Rows start to stop, or all of it."""
        try:
            with safe_open(self.file, "pt") as file:
                return file.get_slice(self.key)[start:stop] if self.shape else file.get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise LoraLabError(f"{self.file}: tensor {self.key!r} could not be read: {error}") from None


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors by name, and the texts stored with them."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_shard(path: Path) -> Shard:
    """What a safetensors file holds; reads the header only. Raises LoraLabError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            tensors = {key: StoredTensor(path, key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
            return Shard(tensors, file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraLabError(f"{path} is truncated or not a safetensors file ({error}): save or copy it again") from None


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
    if absent := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
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
