"""The lectures' tasks on real data: which rows are for what, how the model is trained and asked, what is to come of it.

    mts_dialog      talks between doctor and patient, and their summaries (MTS-Dialog, EACL 2023, CC BY 4.0); its own three parts
    reviews         "Write a negative review of this product.", or a neutral, or a positive one (Women's E-Commerce Clothing Reviews, CC0); no
                    product is in two parts
    polar_reviews   the same without the neutral ones, which customers themselves make hard to tell
    instructions    instructions and answers of four sources (Apache-2.0); parts by a hash of what is asked

Training rows that are longer than `longest` tokens are left out: few of the rows, much of the time. Held-out rows all stay.
The data are looked for in LORA_LAB_DATA, else beside the checkout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared_data import spread
from tasks_readers import SENTIMENTS, Answers, Reviews, Summaries, Writes

from lora_lab.data.tables import Table
from lora_lab.tasks import Material, gather
from lora_lab.tasks.base import digest

Means = dict[str, dict[str, float]]  # line of the table -> measure -> mean
OF_TWENTY = {"test": 3, "validation": 1, "judge": 8, "train": 8}  # products; the judge learns from others than the generator
UNTUNED, LORA = "untuned", "LoRA"


@dataclass(frozen=True)
class Task:
    """material: reads the folder of the data set.  reader: how answers are judged.  required: (what, whether it is so) of the table's means.

    rows, sweep_rows: training rows, of a run and of a choice, at most.  validation, test: rows at most.  longest: tokens of a training row.
    training: of `fit`.  generation: of `models.generate`; each row has its own random numbers, the same for every model.
    """

    folder: str
    material: Callable[[Path], Material]
    reader: type[Writes]
    required: Callable[[Means], list[tuple[str, bool]]]
    rows: int
    training: dict[str, Any]
    generation: dict[str, Any]
    validation: int = 60
    test: int = 200
    sweep_rows: int = 120
    longest: int = 256


def dialogues(folder: Path) -> Material:
    return gather("summarization", folder)


def instructions(folder: Path) -> Material:
    return gather("instruction", folder / "instructions.jsonl")


def polar_reviews(folder: Path) -> Material:
    return reviews(folder, ("negative", "positive"))


def reviews(folder: Path, sentiments: Sequence[str] = SENTIMENTS) -> Material:
    """As many of each sentiment, one after another. The part is that of the product; what the model reads is the kind of clothing alone."""
    file = folder / "derived_balanced_instruction.jsonl"
    whole, sources = gather("reviews", file, wanted=()), [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows, seen = whole.part("all"), set[str]()
    places: dict[str, dict[str, list[int]]] = {part: {each: [] for each in sentiments} for part in OF_TWENTY}
    for index, (_, line) in enumerate(rows.places):
        source = sources[line - 1]
        if source["sentiment"] in sentiments and rows[index]["output"] not in seen:
            places[part_of(source["clothing_id"])][source["sentiment"]].append(index)
        seen.add(rows[index]["output"])
    return replace(whole, parts={part: balanced(rows, [*each.values()]) for part, each in places.items()})


def balanced(rows: Table, groups: list[list[int]]) -> Table:
    """As many of each group, those of one group together: what `spread` takes of them is balanced, too."""
    count = min(map(len, groups))
    return rows.only(index for group in groups for index in group[:count])


def part_of(product: Any) -> str:
    """By a hash of the product: the same in every run."""
    parts = [part for part, count in OF_TWENTY.items() for _ in range(count)]
    return parts[int(digest(f"product {product}")[:8], 16) % len(parts)]


def cut(material: Material, task: Task, reader: Writes, rows: int, held_out: int | None) -> Material:
    """With so many rows of each part at most, spread over it, and the longest training rows left out."""
    lengths = [len(example["input_ids"]) for example in reader.examples(material.train)]
    short = material.train.only(index for index, length in enumerate(lengths) if length <= task.longest)
    limits = {"train": rows, "validation": held_out or task.validation, "test": held_out or task.test}
    parts = {**material.parts, "train": short}
    return replace(material, lengths={}, parts={part: table.only(spread(len(table), limits.get(part))) for part, table in parts.items()})


# What is to come of it --------------------------------------------------------------------------------------------------------


def of_summaries(means: Means) -> list[tuple[str, bool]]:
    rouge = means[LORA]["ROUGE-L"]
    return [("LoRA's ROUGE-L is at least 23", rouge >= 0.23), ("above copying and the untuned model",
            rouge > max(means["the dialogue itself"]["ROUGE-L"], means[UNTUNED]["ROUGE-L"]))]  # fmt: skip


def of_reviews(means: Means) -> list[tuple[str, bool]]:
    read = {name: values["read as asked"] for name, values in means.items()}
    return [("reviews are read as asked as often as real ones, less 5 points at most", read[LORA] >= read[Reviews.title] - 0.05),
            ("and 25 points more often than the untuned model's", read[LORA] >= read[UNTUNED] + 0.25)]  # fmt: skip


def of_answers(means: Means) -> list[tuple[str, bool]]:
    return [("the held-out loss is lower", means[LORA]["loss"] < means[UNTUNED]["loss"]),
            ("more answers end cleanly", means[LORA]["clean endings"] > means[UNTUNED]["clean endings"])]  # fmt: skip


def reviews_task(material: Callable[[Path], Material]) -> Task:
    generation = {**SAMPLED, "max_new_tokens": 96}
    return Task("clothing_reviews", material, Reviews, of_reviews, 1000, {"epochs": 1, "micro_batch_size": 8}, generation, validation=100)


GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}
TASKS = {
    "mts_dialog": Task("mts_dialog", dialogues, Summaries, of_summaries, 1200, {"epochs": 2, "micro_batch_size": 8},
                       {**GREEDY, "max_new_tokens": 64}),
    "reviews": reviews_task(reviews),
    "polar_reviews": reviews_task(polar_reviews),
    "instructions": Task("instructions_apache", instructions, Answers, of_answers, 1200, {"epochs": 1, "micro_batch_size": 8},
                         {**GREEDY, "max_new_tokens": 96}),
}  # fmt: skip
