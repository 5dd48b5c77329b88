"""The libraries whose bytes are predicted: what holds to the byte for the versions that the rules were derived from."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import transformers

KNOWN = transformers.__version__.startswith("5.23") and peft.__version__.startswith("0.21")


def equals(kept: int, implementation: str = "transformers") -> Any:
    """To the byte for transformers 5.23 with PEFT 0.21 and for our own layers, within 2 % for other versions."""
    return kept if KNOWN or implementation == "lora_lab" else pytest.approx(kept, rel=0.02)
