"""Each path that saves something, ready to be disturbed; and, at the end of the session, a line on what was killed where."""

from __future__ import annotations

from typing import Any

import pytest
import savers
from cases import LONG, Case, told


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {}


@pytest.fixture(params=[*savers.SAVERS, *(savers.CACHES if LONG else savers.CACHES[:1])])
def case(request: pytest.FixtureRequest, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    if name not in cases:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        (folder / "wheel").mkdir()
        saver = savers.SAVERS.get(name) or savers.cache_of(savers.wheel(folder / "wheel", "gguf" if "GGUF" in name else "folder"))
        cases[name] = Case(name, saver, folder)
    return cases[name]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if told:
        terminalreporter.section("killed at moments of chance")
    for name, counts in told.items():
        terminalreporter.line(f"{name}: {sum(counts.values())} times; " + ", ".join(f"{count} {when}" for when, count in sorted(counts.items())))
