"""Every notebook runs to its end on the fast path; what it claims holds, stubs are told "not yet", and solutions pass."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import build

SOURCES = build.sources()


@pytest.fixture(scope="module")
def executed(request):
    """A function: source -> the executed notebook. Of those whose tests were selected, one a core at a time; under xdist, whose workers share the
    cores and each know of all tests, one when its test asks for it."""
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        yield functools.partial(build.execute, fast=True)
        return
    wanted = dict.fromkeys(item.callspec.params["source"] for item in request.session.items if item.name.startswith("test_runs_to_its_end"))
    with ThreadPoolExecutor(build.cores()) as pool:
        futures = {source: pool.submit(build.execute, source, fast=True) for source in wanted}
        yield lambda source: futures[source].result()


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_runs_to_its_end_and_keeps_its_claims(executed, source):
    notebook = executed(source)
    assert build.complaints(notebook) == []
    for cell in notebook.cells:
        if "exercise" in cell.metadata.get("tags", []):
            assert "not yet: " in "".join(output.get("text", "") for output in cell.outputs), cell.source
