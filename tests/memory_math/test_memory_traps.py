"""memory_trap_index.py is complete and true: all 12 traps, each with tests that exist; and the tests of those that no other file holds."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from memory_trap_index import TRAPS

from memory_math import count_parameters

HERE = Path(__file__).parent


def functions_in(path: Path) -> set[str]:
    """The test functions of a file, read and not run."""
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}


def test_all_12_traps_are_there() -> None:
    assert list(TRAPS) == ["4i", "4ii", "4iii", *(f"6.{number}" for number in range(1, 10))]


@pytest.mark.parametrize("number", TRAPS)
def test_a_trap_has_tests_that_exist_or_a_reason(number: str) -> None:
    trap = TRAPS[number]
    assert len(trap.wrong) > 20 and trap.source and (trap.tests or trap.why)
    assert len(set(trap.tests)) == len(trap.tests)
    for name in trap.tests:
        file, _, test = name.partition("::")
        assert test in functions_in(HERE / file), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_total_in_an_index_is_not_believed(tied: bool, tmp_path: Path) -> None:
    """Trap 4ii: the config says what there is."""
    config = {"model_type": "llama", "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
              "tie_word_embeddings": tied}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": {"lm_head.weight": "a"}}))
    assert count_parameters(tmp_path) == count_parameters(config) == (2 - tied) * 100 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16
