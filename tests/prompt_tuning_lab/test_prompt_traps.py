"""prompt_trap_index.py is complete and true: all 30 traps, each with tests that exist or with a reason why there can be none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from prompt_trap_index import TRAPS

HERE = Path(__file__).parent
NAMED = re.compile(r"(T\d+b?(?:(?:, | and )T\d+b?)*)(?:[:.]| at once)")  # at the beginning of a docstring: "T3, T4: ..."


def docstrings() -> dict[str, str]:
    """Of each test of this folder, read and not run."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{path.name}::{node.name}"] = ast.get_docstring(node) or ""
    return found


TESTS = docstrings()


def test_all_30_traps_are_there() -> None:
    assert sorted(TRAPS) == sorted([*(f"T{number}" for number in range(1, 30)), "T15b"])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_has_tests_that_exist_or_a_reason(trap: str) -> None:
    found = TRAPS[trap]
    assert len(found.wrong) > 20 and found.source and (found.tests or found.why)
    assert len(set(found.tests)) == len(found.tests)
    assert not [name for name in found.tests if name not in TESTS]


def test_a_test_that_names_a_trap_is_in_the_index_for_it() -> None:
    named = {(name, trap) for name, text in TESTS.items() if (said := NAMED.match(text)) for trap in re.findall(r"T\d+b?", said[1])}
    assert len(named) > 50
    assert not {(name, trap) for name, trap in named if name not in TRAPS[trap].tests}
