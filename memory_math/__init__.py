"""Where the bytes of training and running a language model go: arithmetic only, no torch.

>>> from memory_math import predict
>>> footprint = predict("smollm2-135m", method="full", precision="bf16-mixed", batch_size=4, sequence_length=256)
>>> footprint.weights == 134_515_008 * 4                               # 32-bit masters
True
>>> footprint.optimizer_states // 134_515_008                         # AdamW: two more numbers per parameter
8
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import hardware
from .architectures import count_parameters
from .errors import MemoryMathError
from .footprint import Footprint, predict

if TYPE_CHECKING:
    from .measurement import compare, measure, saved_bytes

__all__ = ["Footprint", "MemoryMathError", "compare", "count_parameters", "hardware", "measure", "predict", "saved_bytes"]


def __getattr__(name: str) -> Any:
    """`measure`, `saved_bytes` and `compare` need torch, which is imported when one of them is first used."""
    if name in ("compare", "measure", "saved_bytes"):
        from importlib import import_module

        return getattr(import_module(f"{__name__}.measurement"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
