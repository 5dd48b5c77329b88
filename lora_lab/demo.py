"""The whole story in one run: a real model before LoRA and after, in text and in bytes (`make demo`).

The untuned model answers a request for a product review like a brochure; after a few minutes of training 1.8 % of its parameters on
240 reviews it answers like a customer.
"""

from __future__ import annotations

import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import memory_math

from . import data, models
from .adapters import disabled
from .analysis import count_parameters
from .checkpoint import load, save
from .errors import LoraLabError
from .files import check_writable
from .injection import inject, plan
from .peft_files.config import TENSORS
from .training import FitResult, TrainConfig, fastest_precision, fit
from .training.precision import storage_dtype

MODEL, RANK = "smollm2-135m-instruct-q4", 8
HORRIBLE = "Write a horrible review of the following product."  # in no training row
SAMPLING: dict[str, Any] = {"max_new_tokens": 90, "temperature": 0.4, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7}


@dataclass
class Settings:
    """quick: a shorter training, for a first look.  out: where the adapter goes.  precision: "auto" tries which is faster here."""

    quick: bool = False
    out: Path = Path("adapters/demo")
    precision: str = "auto"
    model: str = MODEL

    def training(self, precision: str) -> TrainConfig:
        steps = 16 if self.quick else 60  # one pass over the reviews is 30 steps of 8 rows
        return TrainConfig(max_steps=steps, micro_batch_size=8, learning_rate=1e-3, schedule="cosine", warmup_steps=4, precision=precision)


def run(settings: Settings) -> None:
    """Print the story to stdout, progress bars to stderr."""
    started = time.perf_counter()
    precision = fastest_precision() if settings.precision == "auto" else settings.precision
    config = settings.training(precision)
    check_writable(settings.out)
    train_rows, held_out_rows = data.load("reviews")
    assert held_out_rows is not None
    title(f"1. The model: {settings.model}, {precision}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

    title("2. Memory of a training step, predicted before anything runs")
    predicted, measured = memory(settings.model, train_rows, config)
    print(predicted.table())

    model, tokenizer = models.load(settings.model, dtype=storage_dtype(precision))
    prompts = held_out_prompts(held_out_rows, tokenizer)
    title("3. What the model writes now: four requests about a product it will not see in training")
    before = write(model, prompts, tokenizer)
    print(side_by_side(list(prompts), before))

    title("4. Inject LoRA")
    print(plan(model, RANK))
    probe = torch.tensor([tokenizer.encode(next(iter(prompts.values())), add_special_tokens=False)])  # type: ignore[union-attr]
    logits = next_logits(model, probe)
    inject(model, RANK)
    print(f"\n{count_parameters(model)}")
    print(f"A file of this adapter: {adapter_bytes(model) / 1e6:.1f} MB; of the whole model: {count_parameters(model).base * 4 / 1e6:.0f} MB.")

    title("5. Nothing has changed yet: B starts at zero")
    same_text = write(model, prompts, tokenizer) == before
    print(f"same text: {yes(same_text)}; same logits, bit for bit: {yes(torch.equal(next_logits(model, probe), logits))}")

    title(f"6. Train on {len(train_rows)} reviews of other products")
    result = fit(model, train_rows, config, tokenizer=tokenizer, eval_data=held_out_rows)
    print(f"{result.steps} steps, {result.tokens:,} tokens ({result.label_tokens:,} with a label) in {result.seconds:.0f} s")

    title("7. Before and after, the same requests and the same random numbers")
    after = write(model, prompts, tokenizer)
    print(side_by_side(list(prompts), before, after, headings=("BEFORE", "AFTER")))

    title("8. The numbers")
    print(numbers(result, predicted, measured))

    title("9. Save, reload into a fresh model, compare")
    print(check_reload(model, settings, precision, probe))
    print(f"\nAll of it took {time.perf_counter() - started:.0f} s. Go on with:\n  {try_it(settings)}")


def held_out_prompts(rows: data.Rows, tokenizer: Any) -> dict[str, str]:
    """Request -> rendered prompt, for the first held-out product: its three sentiments, and one that is in no training row."""
    first = [row for row in rows if row["product"] == rows[0]["product"]]
    requests = [{"instruction": row["instruction"], "input": row["input"]} for row in first]
    requests.append({"instruction": HORRIBLE, "input": first[0]["input"]})
    return {f"{row['instruction']}\n{row['input']}": data.prompt_of(row, tokenizer) for row in requests}


def write(model: Any, prompts: dict[str, str], tokenizer: Any) -> list[str]:
    return models.generate(model, list(prompts.values()), tokenizer, **SAMPLING).texts


def memory(name: str, rows: data.Rows, config: TrainConfig) -> tuple[Any, Any]:
    """(predicted, measured) bytes of a step on the longest rows, in a model of its own that is thrown away.

    Two steps are measured: from the second one on the optimizer's states are there all the time.
    """
    model, tokenizer = models.load(name, dtype=storage_dtype(config.precision))
    longest = sorted(data.encode_rows(rows, tokenizer), key=lambda example: len(example["input_ids"]))[-config.micro_batch_size :]
    length = len(longest[-1]["input_ids"])
    inject(model, RANK)
    labels = sum(label != -100 for example in longest for label in example["labels"][1:])
    predicted = memory_math.predict(
        model, method="lora", precision=config.precision, rank=RANK, batch_size=len(longest), sequence_length=length, label_tokens=labels,
        implementation="lora_lab", device="cpu",
    )  # fmt: skip
    two_steps = TrainConfig(max_steps=2, micro_batch_size=len(longest), precision=config.precision, progress=False)
    return predicted, memory_math.measure(lambda: fit(model, longest, two_steps), device="cpu")


def numbers(result: FitResult, predicted: Any, measured: Any) -> str:
    held_out = result.eval_losses
    rows = [
        ("held-out loss", f"{held_out[0]:.3f} -> {held_out[-1]:.3f}"),
        ("training loss", f"{sum(result.losses[:4]) / 4:.3f} (first 4 steps) -> {sum(result.losses[-4:]) / 4:.3f} (last 4)"),
        ("speed", f"{result.tokens_per_second:.0f} tokens per second in training"),
        ("memory of a step, predicted", f"{predicted.total / 2**20:.1f} MiB of tensors"),
        ("memory of a step, measured", f"{measured.peak_bytes / 2**20:.1f} MiB of tensors"),
        ("predicted / measured", f"{predicted.total / measured.peak_bytes:.3f}"),
        ("peak of the whole process", f"{result.peak_bytes / 2**20:.0f} MiB, Python and libraries included"),
    ]
    return "\n".join(f"{name:<28} {value}" for name, value in rows)


def check_reload(model: Any, settings: Settings, precision: str, probe: torch.Tensor) -> str:
    """Save the adapter, read it into a model from disk, and compare logits; raises LoraLabError where they differ."""
    save(model, settings.out)
    fresh, _ = models.load(settings.model, dtype=storage_dtype(precision))
    load(fresh, settings.out)
    tuned, again = next_logits(model, probe), next_logits(fresh, probe)
    with disabled(model):
        base = next_logits(model, probe)
    if not torch.equal(tuned, again):
        raise LoraLabError(f"the reloaded adapter computes other logits, by up to {(tuned - again).abs().max():g}")
    size = (settings.out / TENSORS).stat().st_size
    return (f"{settings.out / TENSORS}: {size / 1e6:.2f} MB\nreloaded logits equal, bit for bit: yes\n"
            f"largest change of a logit by the adapter: {float((tuned - base).abs().max()):.1f}; switched off, the model is what it was")  # fmt: skip


@torch.no_grad()
def next_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, logits_to_keep=1).logits


def adapter_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def side_by_side(requests: list[str], *columns: list[str], headings: tuple[str, ...] = (), width: int = 120) -> str:
    """Each request above its answers, in as many columns as there are lists of them, under headings where given."""
    each = (width - 3 * (len(columns) - 1)) // len(columns)
    blocks = []
    for row, request in enumerate(requests):
        cells = [textwrap.wrap(column[row].replace("\n", " "), each) or ["(nothing)"] for column in columns]
        cells = [[heading, "-" * each, *cell] for heading, cell in zip(headings, cells, strict=True)] if headings else cells
        height = max(map(len, cells))
        lines = [" | ".join((cell[i] if i < len(cell) else "").ljust(each) for cell in cells).rstrip() for i in range(height)]
        blocks.append("\n".join([*(f"> {line}" for line in textwrap.wrap(request, width - 2)), *lines]))
    return "\n\n".join(blocks)


def try_it(settings: Settings) -> str:
    return f'python -m lora_lab generate --model {settings.model} --adapter {settings.out} --prompt "Write a negative review of a toaster."'


def title(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


def yes(fact: bool) -> str:
    return "yes" if fact else "NO"
