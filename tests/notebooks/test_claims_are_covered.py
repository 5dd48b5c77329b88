"""Every claim of the lectures is treated in some notebook, which names its row in brackets; and the ledger says where."""

from __future__ import annotations

import re

import pytest

import memory_math
from course import coverage


@pytest.fixture(scope="module")
def ledger():
    return memory_math.claims()


def test_every_claim_of_the_lectures_is_in_a_notebook():
    """Issue 7: the lectures' content is covered completely."""
    assert [claim for claim, where in coverage.treated().items() if not where] == []


def test_the_ledger_points_to_notebooks_that_treat_the_claim(ledger):
    """A row that is not computed says which notebook measures it; that notebook is there, and names the row."""
    treated, pattern = coverage.treated(), re.compile(r"notebook (\d\d) of the course", re.IGNORECASE)
    pointed = [(row, number) for row in ledger for number in pattern.findall(row.why)]
    assert pointed
    assert [(row.id, f"notebook {number}") for row, number in pointed if number not in treated[row.group]] == []


def test_no_notebook_names_a_claim_that_there_is_not(ledger):
    assert {*coverage.treated()} == {*coverage.CLAIMS} == {row.group for row in ledger if re.fullmatch(r"[AB]\d+b?", row.group)}


def test_a_claim_that_nobody_names_is_noticed(tmp_path):
    (tmp_path / "00-a.py").write_text("# 32,768 [A15], x[A1:]")
    (tmp_path / "01-b.py").write_text("# [B7, B7b] and [A15]")
    found = coverage.treated(tmp_path)
    assert {claim: where for claim, where in found.items() if where} == {"A15": ["00", "01"], "B7": ["01"], "B7b": ["01"]}
