"""Soft prompts written by hand: a task as a few trained vectors before the text of a model that stays as it is.

>>> import torch
>>> from lora_lab.models import GPT2Config, GPT2LMHeadModel
>>> model = GPT2LMHeadModel(GPT2Config.from_dict({"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64})).eval()
>>> prompted = inject(model, 20)                                       # the model is frozen; only 20 rows of 16 numbers train now
>>> print(count_parameters(prompted))
320 of 8,736 parameters are trainable (3.66 %)
>>> ids = torch.arange(12).view(2, 6)
>>> prompted(input_ids=ids).logits.shape                               # the text's: virtual tokens are read and not answered
torch.Size([2, 6, 50])
>>> prompted = inject(prompted, 5, task="other")                       # a second task beside the same model
>>> with per_sample(prompted, ["default", "other"]):                   # each row of the batch with its own
...     logits = prompted(input_ids=ids).logits
>>> torch.equal(use(prompted, None)(input_ids=ids).logits, model(input_ids=ids).logits)
True

"Trap T12" and the like, in docstrings here, are mistakes of other libraries: tests/prompt_tuning_lab/prompt_trap_index.py lists them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lora_lab.errors import LoraLabError

from .checkpoint import load, save
from .counting import count_parameters
from .ensembling import Ensemble, ensemble
from .initialization import Initialization
from .injection import eject, inject, remove
from .insertion import insert_prompts
from .interpretation import drift, nearest_tokens, similarity
from .mixed_tasks import per_sample, use
from .prefix import Prefix
from .prefix_insertion import insert_prefixes
from .prompted_model import PromptedModel
from .reparameterization import PrefixMLP, PTuning, ResidualPrompt
from .soft_prompt import Prompt, SoftPrompt
from .summary import summary

__all__ = [
    "Ensemble", "Initialization", "LoraLabError", "PTuning", "Prefix", "PrefixMLP", "Prompt", "PromptedModel", "ResidualPrompt", "SoftPrompt",
    "count_parameters", "drift", "eject", "ensemble", "inject", "insert_prefixes", "insert_prompts", "learning_rate",
    "load", "nearest_tokens", "per_sample", "picture", "remove", "save", "similarity", "summary", "training_config", "use",
]  # fmt: skip

if TYPE_CHECKING:
    from .drawing import picture
    from .tuning import learning_rate, training_config

LATER = {"picture": "drawing", "learning_rate": "tuning", "training_config": "tuning"}  # what trains or draws is imported when first used


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(importlib.import_module(f".{LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
