"""The settings of a training run, each checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import LoraLabError, did_you_mean
from .optimizers import OPTIMIZERS, SCHEDULES
from .precision import PRECISIONS

# name: least value
WHOLE_NUMBERS = {"max_steps": 1, "micro_batch_size": 1, "grad_accum_steps": 1, "save_every": 1, "eval_every": 1, "max_length": 1, "warmup_steps": 0,
                 "seed": 0}  # fmt: skip
# name: may it be zero?
NUMBERS = {"epochs": False, "learning_rate": False, "max_grad_norm": False, "weight_decay": True}


@dataclass
class TrainConfig:
    """What `fit` needs to know; the defaults suit LoRA on a small model."""

    max_steps: int | None = None
    """Optimizer steps; None trains for `epochs`."""
    epochs: float = 1.0
    """Passes over the data, where max_steps is not given."""
    micro_batch_size: int = 8
    """Rows in one forward and backward pass."""
    grad_accum_steps: int = 1
    """Micro-batches per optimizer step; each counts by its labelled tokens, so the step equals one big batch."""
    learning_rate: float = 5e-4
    schedule: str = "linear"
    """"linear" or "cosine" decay to zero after the warm-up, or "constant"."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay per unit of learning rate."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None leaves them."""
    optimizer: str = "adamw"
    precision: str = "fp32"
    """"fp32", "bf16", "bf16-mixed" or "fp16-mixed"; adapters are float32 in all."""
    gradient_checkpointing: bool = False
    """Keep each block's input only and recompute the block in backward: less memory, about a third more time."""
    max_length: int | None = None
    """Tokens a row may have; None is the model's context."""
    seed: int = 0
    output_dir: str | Path | None = None
    """Where log.jsonl and the saved steps go; None writes nothing."""
    save_every: int | None = None
    """Steps between saves of the trainable weights into output_dir."""
    eval_every: int | None = None
    """Steps between evaluations on eval_data; None evaluates before the first and after the last step."""
    progress: bool = True
    """Show a progress bar on stderr."""

    def __post_init__(self) -> None:
        for name, choices in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if (value := getattr(self, name)) not in [*choices]:
                raise LoraLabError(f"{name}={value!r}: expected one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        for name, least in WHOLE_NUMBERS.items():
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= least, f"a whole number of at least {least}")
        for name, zero in NUMBERS.items():
            value = getattr(self, name)
            right = isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (zero and value == 0))
            self._check(name, right, "a number of at least 0" if zero else "a number above 0")
        if self.save_every and self.output_dir is None:
            raise LoraLabError(f"save_every={self.save_every} needs an output_dir to save into")

    def _check(self, name: str, right: bool, expected: str) -> None:
        value, optional = getattr(self, name), type(self).__dataclass_fields__[name].default is None or name == "max_grad_norm"
        if isinstance(value, bool) or not (right or (value is None and optional)):
            raise LoraLabError(f"{name}={value!r}: expected {expected}{' or None' if optional else ''}")

    @classmethod
    def of(cls, config: TrainConfig | dict[str, Any] | None) -> TrainConfig:
        """A config as it is, or from a dict of its fields. Raises LoraLabError for an unknown field."""
        if isinstance(config, TrainConfig):
            return config
        given, known = config or {}, [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise LoraLabError(f"unknown training setting {name!r}{did_you_mean(str(name), known)}; the settings are {', '.join(known)}")
        return cls(**given)
