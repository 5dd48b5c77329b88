"""Where a real model cannot be had, a test is skipped with the reason, or fails where LORA_LAB_REQUIRE_REAL=1 is set, as CI does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from lora_lab import LoraLabError


@contextlib.contextmanager
def had_or_skipped() -> Iterator[None]:
    try:
        yield
    except LoraLabError as error:
        if os.environ.get("LORA_LAB_REQUIRE_REAL"):
            raise
        pytest.skip(f"the real model cannot be had here: {error}")
