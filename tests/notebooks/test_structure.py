"""Every notebook has the parts that a learner counts on; notebooks/README.md has them as a template."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest

import build

HERE = Path(__file__).parent
SOURCES = build.sources()
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
EXERCISE = re.compile(r"^## Exercise (\d+)\. (.+) \((\*{1,3}), (\d+) minutes\)$", re.MULTILINE)
CALL = re.compile(r"^check\.(\w+)\(", re.MULTILINE)


def cells(source):
    return build.read_source(source).cells


def tagged(cell, tag):
    return tag in cell.metadata.get("tags", [])


def module_of(source):
    """05-sentiment.py -> sentiment: its checks are course/checks/sentiment.py, tested by test_checks_sentiment.py."""
    return source.stem.split("-", 1)[1].replace("-", "_")


# The source ---------------------------------------------------------------------------------------------------------------------


@each_notebook
def test_begins_with_a_promise_what_you_learn_and_the_minutes(source):
    first = cells(source)[0]
    assert first.cell_type == "markdown"
    title, promise, rest = first.source.split("\n\n", 2)
    assert re.fullmatch(rf"# {source.name[:2]} · .+", title)
    assert promise.startswith("> ") and "\n" not in promise, "the promise is one line"
    learned = re.search(r"\*\*What you will learn\*\*\n\n((?:(?:- |  ).*\n?)+)", rest)
    assert learned and 3 <= len(re.findall(r"^- ", learned[1], re.MULTILINE)) <= 5
    assert re.search(r"^\*\*Time:\*\* about \d+ minutes on 2 cores", rest, re.MULTILINE)


@each_notebook
def test_has_three_exercises_or_more_numbered_and_rated(source):
    headings = [match for cell in cells(source) if cell.cell_type == "markdown" for match in EXERCISE.finditer(cell.source)]
    mentioned = sum(cell.source.count("## Exercise") for cell in cells(source) if cell.cell_type == "markdown")
    assert len(headings) >= 3
    assert len(headings) == mentioned, "a heading is not '## Exercise 1. Title (**, 10 minutes)'"
    assert [int(heading[1]) for heading in headings] == [*range(1, len(headings) + 1)]


@each_notebook
def test_each_exercise_has_a_stub_a_hint_a_solution_and_one_check_for_both(source):
    parts, current = [], None
    for cell in cells(source):
        if cell.cell_type == "markdown" and EXERCISE.search(cell.source):
            parts.append(current := [])
        if current is not None:
            current.append(cell)
    for number, part in enumerate(parts, start=1):
        (stub,), (solution,) = ([cell for cell in part if tagged(cell, tag)] for tag in ("exercise", "solution"))
        text = "\n".join(cell.source for cell in part[: part.index(solution)] if cell.cell_type == "markdown")
        assert "..." in stub.source and "# your" in stub.source, number
        assert "<summary>Hint</summary>" in text and "<summary>Solution" in text, number
        assert solution.metadata.get("jupyter") == {"source_hidden": True}, f"the solution of exercise {number} is not folded"
        assert CALL.findall(stub.source) and set(CALL.findall(stub.source)) == set(CALL.findall(solution.source)), number


@each_notebook
def test_ends_with_takeaways_and_three_questions(source):
    last = "\n\n".join(cell.source for cell in cells(source)[-3:] if cell.cell_type == "markdown")
    assert re.search(r"^## Takeaways\n\n- ", last, re.MULTILINE)
    questions = last.split("## Three questions")[1]
    assert [*re.findall(r"^(\d)\. ", questions, re.MULTILINE)] == ["1", "2", "3"]
    assert questions.count("<details>") == questions.count("</details>") == 3


@each_notebook
def test_uses_every_check_of_its_module_and_each_is_tested(source):
    module = importlib.import_module(f"course.checks.{module_of(source)}")
    there = {name for name, value in vars(module).items() if getattr(value, "is_check", False)}
    used = {name for cell in cells(source) if cell.cell_type == "code" for name in CALL.findall(cell.source)}
    assert used == there
    tests = (HERE / f"test_checks_{module_of(source)}.py").read_text()
    assert {name for name in there if f"check.{name}," not in tests} == set(), "without a test of right and wrong answers"


@each_notebook
def test_figures_claims_and_small_steps(source):
    code = [cell.source for cell in cells(source) if cell.cell_type == "code" and not tagged(cell, "solution")]
    assert sum("figures." in each for each in code) >= 2
    assert sum("holds(" in each for each in code) >= 3
    assert max(len(each.splitlines()) for each in code) <= 40


@pytest.fixture
def pair(source):
    """The page that was made of the source with the real model."""
    page = source.with_suffix(".ipynb")
    assert page.is_file(), f"{page.name} is to be made with the real model: python notebooks/build.py {source.name[:2]}"
    return page


# The pair -----------------------------------------------------------------------------------------------------------------------


@each_notebook
def test_its_pair_has_not_drifted(source, pair):
    assert build.drift(source) is None


@each_notebook
def test_the_pair_was_run_with_the_real_model_and_names_the_minutes_it_took(source, pair):
    notebook = nbformat.read(pair, as_version=4)
    minutes = int(re.search(r"about (\d+) minutes", notebook.cells[0].source)[1])
    assert notebook.metadata.course.cores == 2
    assert abs(minutes - notebook.metadata.course.seconds / 60) <= max(1, 0.3 * minutes)
    assert build.complaints(notebook) == []


@each_notebook
def test_the_pair_shows_figures_and_is_small(source, pair):
    notebook = nbformat.read(pair, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert pair.stat().st_size < 700_000


@each_notebook
def test_the_pair_names_no_path_of_the_machine_it_ran_on(source, pair):
    printed = json.dumps([cell.get("outputs", []) for cell in nbformat.read(pair, as_version=4).cells])
    printed = re.sub(r'"image/png": "[^"]*"', "", printed)
    assert re.search(r"/(?:tmp|home|root|work|Users|var|opt)/", printed) is None
