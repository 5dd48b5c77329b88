"""Every trap of the project's reference on prompt tuning, T1 to T29, is named by a test that would notice it; or it is said why none can."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAPS = [*(f"T{number}" for number in range(1, 30)), "T15b"]
NO_TEST = {"T11": "which checkpoint of T5 a prompt is trained on (one that was adapted to language modelling) is the user's choice, and no code's"}


def docstrings() -> Iterator[tuple[str, str]]:
    """(name, docstring) of each test of this folder, read and not run."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{path.name}::{node.name}", ast.get_docstring(node) or ""


TESTS = list(docstrings())


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_has_a_test_or_a_reason(trap: str) -> None:
    """A docstring begins with its traps ("T3, T4: ..."), or names them in passing."""
    named = [name for name, text in TESTS if re.search(rf"(?<!\d){trap}(?![0-9b])", text)]
    assert bool(named) != (trap in NO_TEST), named
