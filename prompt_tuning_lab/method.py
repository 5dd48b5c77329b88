"""Soft prompts as a method of `lora_lab.comparison`: the model stays as it is, and a few vectors before the text are trained.

`python -m lora_lab compare --methods prompt` gets it from lora_lab/__main__.py, the one place that knows both labs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import memory_math
from lora_lab.comparison.methods import Choice, Method, Taught, trained
from lora_lab.comparison.workbench import Workbench
from lora_lab.data.formats import Row
from lora_lab.training import TrainConfig

from .checkpoint import save
from .commands.memory import predicted_bytes
from .injection import inject
from .tuning import learning_rate

SHARES = (0.03, 0.1, 0.3)  # of a word's size, that a step moves


class PromptMethod(Method):
    """Begins as what is to be done in words, where the task can say it, else as words of the vocabulary."""

    name, title = "prompt", "soft prompt"

    def choices(self, bench: Workbench) -> list[Choice]:
        return [{"share": share} for share in SHARES]

    def teach(self, bench: Workbench, rows: Sequence[Row], choice: Choice, seed: int, measure: bool = False) -> Taught:
        base, hint = bench.learner(rows), bench.reader.hint()
        begins: dict[str, Any] = {"init": "vocab"} if hint is None else {"init": "text", "text": hint}
        model = inject(base, bench.num_virtual_tokens, tokenizer=bench.reader.tokenizer, seed=seed, **begins)
        if bench.reader.new_head:
            base.classifier.requires_grad_(True)
        rate = learning_rate(model, choice["share"])
        return trained(bench, model, rows, rate, seed, save, {} if measure else None, predicted)


def predicted(model: Any, examples: list[Any], config: TrainConfig) -> int | None:
    """Bytes of a step on these rows; None of a base that is not modelled."""
    try:
        return predicted_bytes(model, examples, config)
    except memory_math.MemoryMathError:
        return None


METHODS: dict[str, Method] = {PromptMethod.name: PromptMethod()}
