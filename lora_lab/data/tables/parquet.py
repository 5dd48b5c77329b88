"""Parquet, in which the hub keeps most data sets: typed columns, read by pyarrow (pip install 'lora-lab[parquet]').

A column of classes holds numbers, and Hugging Face's datasets write the classes' names beside the schema, under "huggingface":
{"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}. Such numbers are read as their names; the -1 of a secret label
has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import LoraLabError
from ..formats import Row

ENDING = ".parquet"
HELP = ("{0} is Parquet, and reading it needs the pyarrow package: pip install 'lora-lab[parquet]', or convert the file where pandas is, python -c "
        "\"import pandas; pandas.read_parquet('{0}').to_json('{0}.jsonl', orient='records', lines=True)\"")  # fmt: skip


def parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Each row of a file with its number, the first being 1. Raises LoraLabError for a damaged file, and where there is no pyarrow."""
    arrow = _import_pyarrow(path.name)
    try:
        with arrow.parquet.ParquetFile(path) as file:
            names = class_names(file.schema_arrow.metadata or {})
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, {column: _named(cell, names.get(column)) for column, cell in row.items()}
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise LoraLabError(f"{path} cannot be read as Parquet: {next(iter(str(error).splitlines()), type(error).__name__)}") from None


def class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the classes of each column that has some; what is not as datasets write it, names nothing.

    >>> class_names({b"huggingface": b'{"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {}}}}'})
    {'label': ['neg', 'pos']}
    >>> class_names({b"huggingface": b'[]'})
    {}
    """
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"].items()
        return {column: list(map(str, kind["names"])) for column, kind in features if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _named(cell: Any, names: list[str] | None) -> Any:
    if names is None or not isinstance(cell, int):
        return cell
    return names[cell] if 0 <= cell < len(names) else None


def check_installed(name: str) -> None:
    """Raise LoraLabError where there is no pyarrow, before anything large is fetched."""
    _import_pyarrow(name)


def _import_pyarrow(name: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise LoraLabError(HELP.format(name)) from None
    return pyarrow
