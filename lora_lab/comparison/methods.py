"""Ways to have a model do a task, from asking it to training all of its weights.

A method has choices, each a dict that goes into the key of its runs, and makes a model that can answer. The study chooses among them on the
validation rows. A method of another lab is a subclass that is handed to the study: see prompt_tuning_lab/method.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .. import checkpoint, models
from ..data.formats import Row
from ..injection import inject
from ..models.base import pad_id_of
from ..tasks import Way, model_kind
from ..training import TrainConfig, fit
from ..training.batches import count_steps
from .memory import Memory, longest, measured_reading, measured_step, predicted, shape_of
from .workbench import Workbench

Choice = dict[str, Any]
Save = Callable[[Any, Path], None]
WARM_UP = 0.06  # of the steps
RATES = {"lora": (3e-4, 1e-3, 3e-3), "full": (1e-5, 3e-5, 1e-4), "full, small": (3e-5, 1e-4, 3e-4)}
SMALL = 50e6  # parameters; smaller models take larger steps


@dataclass(frozen=True)
class Taught:
    """way: how it is asked, None as it was taught.  trained: parameters.  file_bytes: what a task takes in a file.  seconds: of training."""

    model: Any
    way: Way | None = None
    trained: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    memory: Memory = field(default_factory=Memory)


class Method:
    """title: in the table.  seeded: another seed gives another result."""

    name: ClassVar[str]
    title: ClassVar[str]
    seeded: ClassVar[bool] = True

    def choices(self, bench: Workbench) -> list[Choice]:
        raise NotImplementedError

    def ways(self, bench: Workbench, choice: Choice, seed: int) -> list[Way]:
        """Those in which the test rows will be asked that may leave them no room."""
        return []

    def teach(self, bench: Workbench, rows: Sequence[Row], choice: Choice, seed: int, measure: bool = False) -> Taught:
        """A model that answers, after these rows. measure: its memory, too, which takes two more steps."""
        raise NotImplementedError


# Without training -------------------------------------------------------------------------------------------------------------


class ZeroShot(Method):
    """The model is asked, in the best of several ways."""

    name, title, seeded = "zero-shot", "zero-shot", False

    def choices(self, bench: Workbench) -> list[Choice]:
        words = [way.words for way in (bench.reader.way, *bench.reader.ways())]  # the first may be the user's own
        return [{"words": each} for each in dict.fromkeys(words)]

    def teach(self, bench: Workbench, rows: Sequence[Row], choice: Choice, seed: int, measure: bool = False) -> Taught:
        return asked(bench, Way(choice["words"]), rows, measure)


class FewShot(Method):
    """The model is shown examples with their answers before each question; other ones for each seed."""

    name, title = "few-shot", "few-shot"

    def choices(self, bench: Workbench) -> list[Choice]:
        return [{"shots": count} for count in bench.shots]

    def ways(self, bench: Workbench, choice: Choice, seed: int) -> list[Way]:
        return [bench.reader.few(bench.material.train, choice["shots"], seed)]

    def teach(self, bench: Workbench, rows: Sequence[Row], choice: Choice, seed: int, measure: bool = False) -> Taught:
        return asked(bench, bench.reader.few(rows, choice["shots"], seed), rows, measure)


def asked(bench: Workbench, way: Way, rows: Sequence[Row], measure: bool) -> Taught:
    """The model as it was published. Its memory is that of reading a batch of the longest questions."""
    model, reading = bench.fresh().requires_grad_(False), bench.reader.reading
    size = len(way.words.encode()) + sum(len(str(cell).encode()) for shot in way.shots for cell in shot.values())
    if not measure:
        return Taught(model, way, file_bytes=size)
    batch = sorted(bench.reader.questions(rows, way), key=len)[-reading.batch_size :]
    shape = {"batch_size": len(batch), "sequence_length": len(batch[-1]), **({"target_length": 1} if model_kind(model) == "encoder-decoder" else {})}
    foreseen = predicted(model, method="inference", precision=reading.precision, **shape)
    found = measured_reading(model, batch, pad_id_of(bench.reader.tokenizer), reading.precision)
    return Taught(model, way, file_bytes=size, memory=Memory(foreseen, found))


# With training ----------------------------------------------------------------------------------------------------------------


class LoRAMethod(Method):
    name, title = "lora", "LoRA"

    def choices(self, bench: Workbench) -> list[Choice]:
        return [{"learning_rate": rate} for rate in RATES["lora"]]

    def teach(self, bench: Workbench, rows: Sequence[Row], choice: Choice, seed: int, measure: bool = False) -> Taught:
        base = bench.learner(rows)
        torch.manual_seed(seed)
        model = inject(base, bench.rank, target_modules=bench.target_modules, modules_to_save=["classifier"] if bench.reader.new_head else None)
        request = {"method": "lora", "rank": bench.rank, "target_modules": bench.target_modules}
        return trained(bench, model, rows, choice["learning_rate"], seed, checkpoint.save, request if measure else None)


class FullMethod(Method):
    name, title = "full", "full fine-tuning"

    def choices(self, bench: Workbench) -> list[Choice]:
        return [{"learning_rate": rate} for rate in RATES["full, small" if bench.parameters < SMALL else "full"]]

    def teach(self, bench: Workbench, rows: Sequence[Row], choice: Choice, seed: int, measure: bool = False) -> Taught:
        model = bench.learner(rows, whole=True).requires_grad_(True)
        return trained(bench, model, rows, choice["learning_rate"], seed, models.save, {"method": "full"} if measure else None)


def trained(bench: Workbench, model: nn.Module, rows: Sequence[Row], learning_rate: float, seed: int, save: Save,
            request: Mapping[str, Any] | None = None, predict: Callable[[Any, Any, TrainConfig], int | None] | None = None) -> Taught:  # fmt: skip
    """Any model in which something requires grad. request: what trains, in memory_math's words; None measures nothing.

    predict: another way to predict, by (model, examples, config).
    """
    examples = bench.reader.examples(rows)
    config = TrainConfig.of({**bench.training, "learning_rate": learning_rate, "seed": seed, "precision": bench.precision,
                              "progress": bench.reader.reading.progress})  # fmt: skip
    config.warmup_steps = round(WARM_UP * (config.max_steps or count_steps(list(examples), config)))
    memory = Memory()
    if request is not None:
        batch = longest(examples, config.micro_batch_size)
        foreseen = predict(model, batch, config) if predict else predicted(model, precision=config.precision, **shape_of(model, batch), **request)
        memory = Memory(foreseen, measured_step(model, batch, config))
    result = fit(model, examples, config, tokenizer=bench.reader.tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if (save, count) not in bench.file_bytes:  # the same for every choice and seed
        bench.file_bytes[save, count] = file_bytes(model, save)
    return Taught(model, None, count, bench.file_bytes[save, count], result.seconds, memory)


def file_bytes(model: nn.Module, save: Save) -> int:
    """Of the tensors that a task needs."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        return sum(path.stat().st_size for path in Path(folder).glob("*model.safetensors"))


METHODS: dict[str, Method] = {method.name: method for method in (ZeroShot(), FewShot(), LoRAMethod(), FullMethod())}
