"""Makes the notebooks' helpers (`course`, `build`) and this folder's tools importable, on the fast path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))


@pytest.fixture(autouse=True)
def fast_path(monkeypatch):
    monkeypatch.setenv("LORA_LAB_COURSE", "fast")
