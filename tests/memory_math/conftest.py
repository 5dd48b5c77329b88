"""What tests that measure memory have in common."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from memory_math import measure


@pytest.fixture(scope="module")
def aside() -> Iterator[None]:
    """Measuring looks at every object that Python knows: those of before are set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def elsewhere() -> int:
    """Bytes that other tests have left behind."""
    return measure(lambda: None).start_bytes
