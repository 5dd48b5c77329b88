"""The memory of a step with a prompt, predicted and measured."""

from __future__ import annotations

from typing import Any

import memory_math


def memory_of_a_step(prompted: Any, examples: Any, config: Any) -> str:
    """One line on the longest rows. The prompt is as it was afterwards."""
    longest = sorted(examples, key=lambda example: len(example["input_ids"]))[-config.micro_batch_size :]
    said = f"memory of a step on the longest rows ({len(longest)} x {len(longest[-1]['input_ids'])} tokens):"
    try:
        total = predicted_bytes(prompted, longest, config)
    except memory_math.MemoryMathError as error:
        return f"{said} no prediction ({error})"
    said += f" {total / 2**20:.1f} MiB of tensors predicted"
    if prompted.device.type not in ("cpu", "cuda"):
        return said
    measured = measured_bytes(prompted, longest, config)
    return f"{said}, {measured / 2**20:.1f} MiB measured (ratio {total / measured:.3f})"


def predicted_bytes(prompted: Any, rows: list[Any], config: Any) -> int:
    """rows: of one batch, encoded. Raises MemoryMathError for a base that is not modelled."""
    asked = {**prompted.memory_request, "precision": config.precision, "optimizer": config.optimizer, "batch_size": len(rows),
             "sequence_length": max(len(row["input_ids"]) for row in rows), "gradient_checkpointing": config.gradient_checkpointing,
             "device": "cuda" if prompted.device.type == "cuda" else "cpu"}  # fmt: skip
    return int(memory_math.predict(prompted, **asked, **_labels(prompted, rows)).total)


def _labels(prompted: Any, rows: list[Any]) -> dict[str, Any]:
    """How many positions get logits, and of an encoder-decoder how long the answers are; of a classifier neither."""
    if "labels" not in rows[0]:
        return {}
    if prompted.kind.encodes:
        return {"target_length": max(len(row["labels"]) for row in rows)}
    first = prompted.memory_request["method"] == "prefix"  # behind rows the text's first token has something before it that predicts it
    return {"label_tokens": sum(label != -100 for row in rows for label in row["labels"][first:])}


def measured_bytes(prompted: Any, rows: list[Any], config: Any) -> int:
    """The model, and what two steps add at their peak: from the second on, the optimizer's numbers are there all the time."""
    import torch

    from lora_lab.training import TrainConfig, fit

    trained = [p for p in prompted.parameters() if p.requires_grad]
    steps = TrainConfig(max_steps=2, micro_batch_size=len(rows), learning_rate=1e-6, precision=config.precision, progress=False,
                        gradient_checkpointing=config.gradient_checkpointing, optimizer=config.optimizer)  # fmt: skip
    before = [p.detach().clone() for p in trained]
    measured = memory_math.measure(lambda: fit(prompted, rows, steps), device=prompted.device.type)
    with torch.no_grad():
        for parameter, values in zip(trained, before, strict=True):
            parameter.copy_(values)
    return int(measured.peak_bytes - measured.start_bytes) + sum(map(bytes_of, [*prompted.parameters(), *prompted.buffers()]))


def bytes_of(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
