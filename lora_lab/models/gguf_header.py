"""A GGUF file's header, walked through once before the `gguf` package reads it: that one believes every count it finds.

    "GGUF", version, number of tensors, number of fields
    field:   name, type, value          a text is its length and its bytes; an array its elements' type, their number, the elements
    tensor:  name, number of dimensions, dimensions, type, offset
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number of each type
TEXT, ARRAY = 8, 9
# Of all arrays, as gguf keeps some 700 bytes for a number and 1,400 for a text: the largest vocabularies need 1.3 million; a SentencePiece model's
# table of characters has 300,000 bytes, and no other array is near that
MOST_VALUES, MOST_OTHERS = 1_500_000, 400_000
OF_VOCABULARIES = (5, 6, 8)  # int32: the tokens' types; float32: their scores; the texts
MOST_DIMENSIONS = 8


def check_header(path: Path) -> None:
    """Raise ValueError where a count or a length leads beyond the file, and for arrays of more values than any tokenizer has."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Header(data).walk()


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.values, self.others = data, 0, 0, 0
        self.order = ">" if data[4:6] == b"\0\0" else "<"  # the version is a small number

    def walk(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.skip(8)
        tensors, fields = self.number("Q"), self.number("Q")
        for _ in range(fields):
            self.text()
            self.value(self.number("I"))
        for _ in range(tensors):
            self.text()
            if (dimensions := self.number("I")) > MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self.skip(8 * dimensions + 4 + 8)

    def value(self, kind: int) -> None:
        if kind == TEXT:
            self.text()
        elif kind == ARRAY:
            self.array(self.number("I"), self.number("Q"))
        else:
            self.skip(_size(kind))

    def array(self, kind: int, count: int) -> None:
        self.values += count
        if self.values > MOST_VALUES:
            raise ValueError(f"arrays of more than {MOST_VALUES:,} values")
        self.others += count if kind not in OF_VOCABULARIES else 0
        if self.others > MOST_OTHERS:
            raise ValueError(f"arrays of more than {MOST_OTHERS:,} values that are neither texts, int32 nor float32")
        if kind != TEXT:
            return self.skip(count * _size(kind))
        for _ in range(count):
            self.text()
        return None

    def text(self) -> None:
        self.skip(self.number("Q"))

    def number(self, kind: str) -> int:
        begins = self.at
        self.skip(struct.calcsize(kind))
        return int(struct.unpack_from(self.order + kind, self.data, begins)[0])

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("a length or a number in it leads beyond its end")


def _size(kind: int) -> int:
    if kind not in SIZES:
        raise ValueError(f"a value of type {kind}")
    return SIZES[kind]
