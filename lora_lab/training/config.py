"""The settings of a training run, each checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import LoraLabError, did_you_mean
from ..models.recompute import check_mode
from .distributed import KINDS
from .optimizers import OPTIMIZERS, SCHEDULES
from .precision import PRECISIONS

# name: least value
WHOLE_NUMBERS = {"max_steps": 1, "micro_batch_size": 1, "grad_accum_steps": 1, "save_every": 1, "eval_every": 1, "max_length": 1, "warmup_steps": 0,
                 "seed": 0, "keep_snapshots": 1, "early_stopping": 1, "max_tokens": 1}  # fmt: skip
# name: may it be zero?
NUMBERS = {"epochs": False, "learning_rate": False, "max_grad_norm": False, "weight_decay": True, "lora_plus_ratio": False}
SWITCHES = ("activation_offload", "optimizer_in_backward", "keep_best", "resume", "progress", "packing")


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
    packing: bool = False
    """Instead of padding rows of like length, put rows drawn at random one after another: the same loss, no padding, smaller largest batches
    (data/packing.py). For causal models of lora_lab."""
    max_tokens: int | None = None
    """With packing: a micro-batch is as many rows as fit into so many tokens; micro_batch_size is of evaluations only then."""
    learning_rate: float = 5e-4
    """The highest, reached after the warm-up. LoRA: 1e-3 for small models, 2e-4 for billions of weights."""
    schedule: str = "linear"
    """"linear" or "cosine" decay to zero after the warm-up, or "constant"."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay per unit of learning rate."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None leaves them."""
    optimizer: str = "adamw"
    """"adamw", "adam", "sgd", "momentum", "adafactor" or "lion"."""
    precision: str = "fp32"
    """"fp32", "bf16", "bf16-mixed" or "fp16-mixed"; adapters are float32 in all."""
    gradient_checkpointing: bool | int | str = False
    """True: keep each block's input only and recompute the block in backward (less memory, about a third more time); n: every n-th block
    only; "attention": only softmax(q k^T) v."""
    activation_offload: bool = False
    """On a GPU: what backward needs waits in main memory."""
    optimizer_in_backward: bool = False
    """Each weight steps in backward and frees its gradient: needs grad_accum_steps=1, max_grad_norm=None and no fp16-mixed."""
    lora_plus_ratio: float | None = None
    """LoRA+: how many times faster B learns than A (16 in the paper)."""
    max_length: int | None = None
    """Tokens a row may have; None is the model's context."""
    seed: int = 0
    """Of the order of rows, dropout and stochastic rounding; A's first values are drawn in `inject`, from PyTorch's own generator."""
    output_dir: str | Path | None = None
    """Where log.jsonl and the saved steps go; None writes nothing."""
    save_every: int | None = None
    """Steps between snapshots of the whole run in output_dir, from which resume=True goes on; Ctrl-C takes one, too."""
    keep_snapshots: int = 2
    """How many of the newest snapshots stay."""
    resume: bool = False
    """Go on from the newest whole snapshot in output_dir, bit for bit as if the run had not stopped."""
    eval_every: int | None = None
    """Steps between evaluations on eval_data; None evaluates before the first and after the last step."""
    early_stopping: int | None = None
    """Stop after so many evaluations without a better loss."""
    keep_best: bool = False
    """End with the weights of the best evaluation, not the last."""
    progress: bool = True
    """Show a progress bar on stderr."""
    distributed: str | None = None
    """Of several processes (torchrun): "ddp", each holds the whole model, or "fsdp", it is divided among them and stays so (see `shard`).
    None is "ddp", or "fsdp" for a model that is divided already. micro_batch_size and grad_accum_steps are each process's."""

    def __post_init__(self) -> None:
        for name, choices in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if (value := getattr(self, name)) not in [*choices]:
                raise LoraLabError(f"{name}={value!r}: expected one of {', '.join(choices)}{did_you_mean(value, choices)}")
        if self.distributed not in (None, *KINDS):
            raise LoraLabError(f"distributed={self.distributed!r}: expected ddp, fsdp or None{did_you_mean(self.distributed, KINDS)}")
        for name, least in WHOLE_NUMBERS.items():
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= least, f"a whole number of at least {least}")
        for name, zero in NUMBERS.items():
            value = getattr(self, name)
            right = isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 or (zero and value == 0))
            self._check(name, right, "a number of at least 0" if zero else "a number above 0")
        for name in SWITCHES:
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        check_mode(self.gradient_checkpointing)
        for name in ("save_every", "resume"):
            if getattr(self, name) and self.output_dir is None:
                raise LoraLabError(f"{name}={getattr(self, name)} needs an output_dir")
        if self.max_tokens is not None and not self.packing:
            raise LoraLabError(f"max_tokens={self.max_tokens} needs packing=True: padded batches are counted in rows (micro_batch_size)")
        self._check_in_backward()

    def _check_in_backward(self) -> None:
        """A gradient that is gone can be neither added to, nor measured against the others, nor unscaled."""
        apart = {"grad_accum_steps": 1, "max_grad_norm": None}
        for name, wanted in apart.items() if self.optimizer_in_backward else ():
            if getattr(self, name) != wanted:
                raise LoraLabError(f"optimizer_in_backward=True with {name}={getattr(self, name)!r}: each gradient is gone before the next is there; "
                                   f"give {name}={wanted!r}")  # fmt: skip
        if self.optimizer_in_backward and self.precision == "fp16-mixed":
            raise LoraLabError("optimizer_in_backward=True with precision='fp16-mixed': an overflow is noticed after the steps; use bf16-mixed")

    def _check(self, name: str, right: bool, expected: str) -> None:
        value, optional = getattr(self, name), type(self).__dataclass_fields__[name].default is None or name == "max_grad_norm"
        if (isinstance(value, bool) and name not in SWITCHES) or not (right or (value is None and optional)):
            raise LoraLabError(f"{name}={value!r}: expected {expected}{' or None' if optional else ''}")

    @classmethod
    def of(cls, config: TrainConfig | dict[str, Any] | None) -> TrainConfig:
        """A config as it is, or from a dict of its fields. Raises LoraLabError for an unknown field."""
        if isinstance(config, TrainConfig):
            return config
        given, known = config or {}, [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise LoraLabError(f"unknown training setting {name!r}{did_you_mean(name, known)}; the settings are {', '.join(known)}")
        return cls(**given)
