"""Where the bytes, the time and the money of training and running a language model go: arithmetic only, no torch.

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
from .closed_form import activation_formula
from .errors import MemoryMathError
from .footprint import Footprint, predict
from .in_context import in_context, kv_cache_bytes
from .ledger import claims
from .number_formats import number_formats
from .questions import explain_oom, largest, models_that_fit, savings
from .scaling_laws import chinchilla
from .tables import compare_requests, table
from .time_and_cost import training_flops, training_time

if TYPE_CHECKING:
    from .fake_runs import fake_saved_bytes, fake_step, fake_tensors
    from .measurement import compare, measure, saved_bytes

__all__ = [
    "Footprint", "MemoryMathError", "activation_formula", "chinchilla", "claims", "compare", "compare_requests", "count_parameters",
    "explain_oom", "fake_saved_bytes", "fake_step", "fake_tensors", "hardware", "in_context", "kv_cache_bytes", "largest", "measure",
    "models_that_fit", "number_formats", "predict", "saved_bytes", "savings", "table", "training_flops", "training_time",
]  # fmt: skip


NEEDS_TORCH = {
    "compare": "measurement", "measure": "measurement", "saved_bytes": "measurement",
    "fake_saved_bytes": "fake_runs", "fake_step": "fake_runs", "fake_tensors": "fake_runs",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What measures needs torch, which is imported when one of them is first used."""
    if name in NEEDS_TORCH:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{NEEDS_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
