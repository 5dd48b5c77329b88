"""The memory of a step, or of reading a batch, predicted and measured on the longest rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import memory_math

from ..models.base import is_encoder_decoder
from ..models.generation import decoder_start, left_pad, right_pad
from ..tasks import model_kind
from ..training import TrainConfig, fit
from ..training.evaluation.passes import evaluating

Example = dict[str, Any]


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors, the model's own among them. None: not modelled, or not measured here."""

    predicted: int | None = None
    measured: int | None = None


def longest(examples: Sequence[Example], count: int) -> list[Example]:
    return sorted(examples, key=lambda example: len(example["input_ids"]))[-count:]


def shape_of(model: Any, rows: Sequence[Example], first: int = 1) -> dict[str, int]:
    """The batch in memory_math's words. first: label of a row that counts; 0 where virtual tokens before it predict it."""
    shape = {"batch_size": len(rows), "sequence_length": max(len(row["input_ids"]) for row in rows)}
    if "labels" not in rows[0]:
        return shape
    if is_encoder_decoder(model):
        return {**shape, "target_length": max(len(row["labels"]) for row in rows)}
    return {**shape, "label_tokens": sum(label != -100 for row in rows for label in row["labels"][first:])}


def predicted(model: Any, **request: Any) -> int | None:
    """memory_math's prediction for this model; None where it is not modelled."""
    device = "cuda" if next(model.parameters()).is_cuda else "cpu"
    try:
        return int(memory_math.predict(model, implementation="lora_lab", device=device, **request).total)
    except memory_math.MemoryMathError:
        return None


def measured_step(model: Any, rows: Sequence[Example], config: TrainConfig) -> int | None:
    """The model, and what two steps add at their peak: from the second on the optimizer's numbers are there all the time.

    What trains is as it was afterwards. None on a device whose memory is not followed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    two = TrainConfig(max_steps=2, micro_batch_size=len(rows), learning_rate=1e-6, precision=config.precision, progress=False,
                      gradient_checkpointing=config.gradient_checkpointing, optimizer=config.optimizer)  # fmt: skip
    before = [parameter.detach().clone() for parameter in trained]
    try:
        return measured_peak(model, lambda: fit(model, rows, two))
    finally:
        with torch.no_grad():
            for parameter, values in zip(trained, before, strict=True):
                parameter.copy_(values)


def measured_reading(model: Any, questions: Sequence[Sequence[int]], pad: int, precision: str) -> int | None:
    """The same of reading a batch, keys and values kept, for the next token or the class."""
    device, kind = next(model.parameters()).device, model_kind(model)
    ids, mask = (left_pad if kind == "causal" else right_pad)([list(row) for row in questions], pad, device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "causal":
        inputs |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": True, "logits_to_keep": 1}
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids.new_full((len(ids), 1), decoder_start(model))
    with evaluating(model, precision):
        return measured_peak(model, lambda: model(**inputs))


def measured_peak(model: Any, work: Callable[[], Any]) -> int | None:
    """The model's bytes, and what `work` adds at its peak."""
    kind = next(model.parameters()).device.type
    if kind not in ("cpu", "cuda"):
        return None
    measured = memory_math.measure(work, device=kind)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return int(measured.peak_bytes - measured.start_bytes) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
