"""trap_index.py is complete and true: all 45 traps, each with tests that exist or with a reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from trap_index import TRAPS

HERE = Path(__file__).parent


def functions_in(path: Path) -> set[str]:
    """The test functions of a file, read and not run."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}


def test_all_45_traps_are_there():
    assert list(TRAPS) == list(range(1, 46))


@pytest.mark.parametrize("number", TRAPS)
def test_a_trap_has_tests_that_exist_or_a_reason(number):
    trap = TRAPS[number]
    assert len(trap.wrong) > 20 and trap.source and (trap.tests or trap.why)
    for name in trap.tests:
        file, _, test = name.partition("::")
        assert test in functions_in(HERE / file), name
    assert len(set(trap.tests)) == len(trap.tests)


def test_every_trap_that_a_test_names_is_the_one_the_index_names_it_for():
    """A test of test_traps.py says "Trap N" in its docstring; the index has it there, and each of them somewhere."""
    indexed = {name.partition("::")[2]: number for number, trap in TRAPS.items() for name in trap.tests if name.startswith("test_traps.py")}
    tree = ast.parse((HERE / "test_traps.py").read_text(encoding="utf-8")).body
    for node in tree:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            said = re.search(r"Trap (\d+)", ast.get_docstring(node) or "")
            numbers = {number for number, trap in TRAPS.items() if f"test_traps.py::{node.name}" in trap.tests}
            assert said is None or int(said[1]) in numbers, node.name
            assert node.name in indexed or said is None, node.name
