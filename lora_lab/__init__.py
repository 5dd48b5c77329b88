"""LoRA written by hand, and the small workshop to train it in.

>>> import torch, lora_lab
>>> model = torch.nn.Sequential(torch.nn.Linear(512, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> before = model(torch.ones(1, 512))
>>> model = lora_lab.inject(model, rank=8, target_modules=["0"])       # the same object; only A and B train now
>>> torch.equal(model(torch.ones(1, 512)), before)                     # B starts at zero: nothing has changed yet
True
>>> print(lora_lab.count_parameters(model))
4,608 of 38,090 parameters are trainable (12.10 %)
>>> model = lora_lab.eject(model)                                      # as if nothing had happened

To read the code, begin with layers.py (``W x + scaling * B A x``) and delta.py (``scaling * B @ A``); then kinds.py and variants.py (other layers,
other methods), targets.py (which layers), injection.py (put them in), training/loop.py (train them), checkpoint.py (save them). The rest is
special cases.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import spectra
from .adapters import disabled, per_sample, use
from .analysis import count_parameters, summary
from .checkpoint import load, save
from .combining import combine, combine_error
from .delta import lora_delta
from .errors import LoraLabError
from .injection import eject, inject, plan
from .layers import LoRALinear
from .learning_rates import parameter_groups
from .merging import merge, merge_report, unmerge
from .quantization import dequantize, quantization_report, quantize
from .streaming import merge_checkpoint
from .version import __version__

if TYPE_CHECKING:
    from . import data, models, training

__all__ = [
    "LoRALinear", "LoraLabError", "__version__", "combine", "combine_error", "count_parameters", "data", "dequantize", "disabled", "eject", "inject",
    "load", "lora_delta", "merge", "merge_checkpoint", "merge_report", "models", "parameter_groups", "per_sample", "plan", "quantization_report",
    "quantize", "save", "spectra", "summary", "training", "unmerge", "use",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`lora_lab.models`, `.training` and `.data` are imported when first used."""
    if name in ("models", "training", "data"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
