"""Every notebook runs to its end on the fast path; what it claims holds, stubs are told "not yet", and solutions pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import build

SOURCES = build.sources()


@pytest.fixture(scope="module")
def executed(request):
    """Name -> the future notebook; of those whose tests were selected, one a core at a time."""
    wanted = dict.fromkeys(item.callspec.params["source"] for item in request.session.items if item.name.startswith("test_runs_to_its_end"))
    with ThreadPoolExecutor(build.cores()) as pool:
        yield {source: pool.submit(build.execute, source, fast=True) for source in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_runs_to_its_end_and_keeps_its_claims(executed, source):
    notebook = executed[source].result()
    assert build.complaints(notebook) == []
    for cell in notebook.cells:
        if "exercise" in cell.metadata.get("tags", []):
            assert "not yet: " in "".join(output.get("text", "") for output in cell.outputs), cell.source
