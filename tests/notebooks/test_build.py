"""notebooks/build.py: what it makes of a source, what it refuses, and what it notices."""

from __future__ import annotations

import base64
import io
import os

import nbformat
import pytest
from PIL import Image

import build

SOURCE = '''# %% [markdown]
# # 42 · A small one

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt

Path("written").mkdir()
sys.stderr.write("train:  50%|##   | 1/2")
print(os.environ["LORA_LAB_COURSE"])

# %%
plt.plot([1, 2])

# %% tags=["solution"] jupyter={"source_hidden": true}
print("yes: it is so")
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "42-small.py").write_text(SOURCE)
    return tmp_path


def changed(folder, old, new):
    source = folder / "42-small.py"
    assert old in SOURCE
    source.write_text(SOURCE.replace(old, new))
    return source


@pytest.mark.skipif(os.name != "posix", reason="asks for a process by its number")
def test_its_kernel_is_gone_when_a_notebook_is_done(folder):
    """Nine notebooks would leave nine processes behind, each with its model."""
    source = changed(folder, 'print(os.environ["LORA_LAB_COURSE"])', "print(os.getpid())")
    kernel = int(build.execute(source, fast=True).cells[1].outputs[-1].text)
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_a_build_writes_the_executed_pair_and_nothing_else(folder, capsys):
    assert build.main(["42"]) == 0
    assert {path.name for path in folder.iterdir()} == {"42-small.py", "42-small.ipynb"}
    notebook = nbformat.read(folder / "42-small.ipynb", as_version=4)
    _, code, figure, solution = notebook.cells
    assert [output["text"] for output in code.outputs] == ["real\n"], "a progress bar stayed, or an output went"
    picture = Image.open(io.BytesIO(base64.b64decode(figure.outputs[-1].data["image/png"])))
    assert picture.mode == "P" and picture.width > 200
    assert len(figure.outputs) == 1, "the repr of what was drawn stayed"
    assert solution.metadata["tags"] == ["solution"] and "execution" not in solution.metadata
    assert notebook.metadata.course.keys() == {"seconds", "cores"}
    assert build.main(["--check"]) == 0
    assert "1 pairs agree" in capsys.readouterr().out


def test_the_same_source_makes_the_same_cells(folder):
    source = folder / "42-small.py"
    assert build.read_source(source) == build.read_source(source)


def test_the_fast_path_writes_nothing(folder, capsys):
    assert build.main(["--fast"]) == 0
    assert [path.name for path in folder.iterdir()] == ["42-small.py"]


def test_a_cell_that_raises_fails_the_build_and_leaves_the_old_pair(folder, capsys):
    changed(folder, "plt.plot([1, 2])", "1 / 0")
    (folder / "42-small.ipynb").write_text("the old one")
    assert build.main([]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert (folder / "42-small.ipynb").read_text() == "the old one"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("print('✗ NOT HERE: it fell')", "NOT HERE: it fell"), ("print('not yet: try again')", "does not pass the solution: not yet: try again"),
     ("pass", "nothing printed"), ("print('yes: it is so')", None)],
)  # fmt: skip
def test_complaints_name_claims_that_failed_and_solutions_that_are_refused(folder, text, complaint):
    notebook = build.read_source(changed(folder, "print(\"yes: it is so\")", text))
    printed = {"print": text[7:-2] + "\n"}.get(text[:5], "")
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    found = build.complaints(notebook)
    assert (complaint is None and found == []) or complaint in found[0]


def test_drift_is_told_by_what_differs(folder):
    source = folder / "42-small.py"
    assert build.drift(source) == "42-small.ipynb is missing"
    notebook = build.read_source(source)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    assert "was not executed" in build.drift(source)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    assert build.drift(source) is None
    changed(folder, "[1, 2]", "[1, 3]")
    assert "differ in cell 2" in build.drift(source)
    changed(folder, '["solution"]', '["solved"]')
    assert "differ in cell 3" in build.drift(source)
    source.write_text(SOURCE + "\n# %%\nmore = 1\n")
    assert "has 4 cells, 42-small.py 5" in build.drift(source)


def test_texts_are_renewed_and_outputs_stay_where_the_code_is_the_same(folder, capsys):
    source, target = folder / "42-small.py", folder / "42-small.ipynb"
    assert build.main(["--texts"]) == 1 and not target.exists() and "is missing" in capsys.readouterr().out
    assert build.main([]) == 0
    before = nbformat.read(target, as_version=4)
    source.write_text(SOURCE.replace("# %%\n", "# %% [markdown]\n# one more text\n\n# %%\n", 1))
    assert build.drift(source)
    assert build.main(["--texts"]) == 0 and build.drift(source) is None
    after = nbformat.read(target, as_version=4)
    assert len(after.cells) == len(before.cells) + 1 and after.metadata == before.metadata
    outputs = [[cell.outputs for cell in notebook.cells if cell.cell_type == "code"] for notebook in (before, after)]
    assert outputs[0] == outputs[1] and any(outputs[0])
    changed(folder, "[1, 2]", "[1, 3]")
    assert build.main(["--texts"]) == 1 and nbformat.read(target, as_version=4) == after


def test_a_name_that_no_notebook_begins_with_is_refused(folder):
    with pytest.raises(SystemExit, match=r"no notebook begins with '07': there are 42-small"):
        build.main(["07"])
