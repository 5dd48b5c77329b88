"""The memory of a step with a prompt, predicted and measured."""

from __future__ import annotations

from typing import Any

import memory_math
from lora_lab.comparison.memory import longest, measured_step, shape_of


def memory_of_a_step(prompted: Any, examples: Any, config: Any) -> str:
    """One line on the longest rows. The prompt is as it was afterwards."""
    rows = longest(examples, config.micro_batch_size)
    said = f"memory of a step on the longest rows ({len(rows)} x {len(rows[-1]['input_ids'])} tokens):"
    try:
        total = predicted_bytes(prompted, rows, config)
    except memory_math.MemoryMathError as error:
        return f"{said} no prediction ({error})"
    said += f" {total / 2**20:.1f} MiB of tensors predicted"
    measured = measured_step(prompted, rows, config)
    return said if measured is None else f"{said}, {measured / 2**20:.1f} MiB measured (ratio {total / measured:.3f})"


def predicted_bytes(prompted: Any, rows: list[Any], config: Any) -> int:
    """rows: of one batch, encoded. Raises MemoryMathError for a base that is not modelled."""
    trains = prompted.memory_request
    first = int(trains.get("method") == "prefix")  # behind rows the text's first token has something before it that predicts it
    asked = {**trains, **shape_of(prompted, rows, first), "precision": config.precision, "optimizer": config.optimizer,
             "gradient_checkpointing": config.gradient_checkpointing,
             "device": "cuda" if prompted.device.type == "cuda" else "cpu"}  # fmt: skip
    return int(memory_math.predict(prompted, **asked).total)
