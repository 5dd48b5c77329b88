"""Every way of the study to teach a model a task, from nothing at all to all of its weights.

A method has a grid of choices, each a dict that goes into the key of its runs, and a function that makes a model which can answer. What is
chosen from its grid is chosen on the validation split, by one seed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sentiment_data import LABELS, Review
from sentiment_models import LanguageModel, Reader, SentenceEncoder
from torch import Tensor, nn

import lora_lab
import prompt_tuning_lab
from lora_lab.training import fit
from lora_lab.training.probing import linear_probe
from prompt_tuning_lab.tuning import learning_rate

VIRTUAL, RANK, EXAMPLES, MLP = 20, 8, 4, 128
BATCH, WARM_UP = 8, 0.06
TASK = "Is this movie review positive or negative? Answer positive if the critic likes the film."  # what a prompt begins as
ITEM_BYTES = 4  # float32
Scores = Callable[[Sequence[Review]], Tensor]  # -> [n, 2]
Save = Callable[[Any, Path], None]  # model, folder
Choice = dict[str, Any]


@dataclass(frozen=True)
class Taught:
    """scores: the model's answers.  trained: parameters.  nbytes: a task takes in a file.  seconds: of training, of one core (other processes, which
    a study of hours has beside it, do not count)."""

    scores: Scores
    trained: int = 0
    nbytes: int = 0
    seconds: float = 0.0


Teach = Callable[[Reader, list[Review], Choice, int], Taught]  # reader, training rows, the choice, the seed


@dataclass(frozen=True)
class Method:
    """title: in the table.  grids: model -> choices.  seeded: another seed gives another result.  epochs: 0 of what is not trained step by step."""

    title: str
    teach: Teach
    grids: dict[str, list[Choice]]
    seeded: bool = True
    epochs: dict[str, int] = field(default_factory=dict)

    def choices(self, model: str) -> list[Choice]:
        epochs = self.epochs.get(model, 0)
        settings = {"epochs": epochs, "batch": BATCH} if epochs else {}
        return [{**choice, **settings} for choice in self.grids[model]]


# Without training -----------------------------------------------------------------------------------------------------------------


def majority(reader: Reader, train: list[Review], choice: Choice, seed: int) -> Taught:
    counts = torch.bincount(torch.tensor([review.label for review in train]), minlength=len(LABELS)).double()
    return Taught(lambda reviews: counts.expand(len(reviews), -1))


def zero_shot(reader: Reader, train: list[Review], choice: Choice, seed: int) -> Taught:
    template = choice["template"]
    return Taught(lambda reviews: reader.zero_shot(template, reviews), nbytes=len(template.encode()))


def few_shot(reader: Reader, train: list[Review], choice: Choice, seed: int) -> Taught:
    """As many of each class, other ones for each seed."""
    examples = train[EXAMPLES * seed : EXAMPLES * (seed + 1)]
    return Taught(lambda reviews: reader.few_shot(examples, reviews), nbytes=reader.shown_bytes(examples))


def probe(reader: Reader, train: list[Review], choice: Choice, seed: int) -> Taught:
    """Features once, then a linear head."""
    features, labels = reader.features(train), torch.tensor([review.label for review in train])
    started = time.process_time()
    head = linear_probe(features, labels, l2=choice["l2"])
    numbers = sum(p.numel() for p in head.parameters())
    return Taught(lambda reviews: head(reader.features(reviews)).detach(), numbers, ITEM_BYTES * numbers, time.process_time() - started)


# With training --------------------------------------------------------------------------------------------------------------------


def trained(reader: Reader, model: nn.Module, train: list[Review], choice: Choice, seed: int, rate: float, save: Save) -> Taught:
    """Any model in which something requires grad: `fit` knows no method."""
    steps = -(-len(train) // choice["batch"]) * choice["epochs"]
    settings = {"epochs": choice["epochs"], "micro_batch_size": choice["batch"], "learning_rate": rate, "warmup_steps": round(WARM_UP * steps),
                "precision": reader.precision, "seed": seed, "progress": False}  # fmt: skip
    started = time.process_time()
    fit(model, [reader.example(review) for review in train], settings)
    seconds = time.process_time() - started
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Taught(lambda reviews: reader.scores(model, reviews), count, file_bytes(model, save), seconds)


def file_bytes(model: nn.Module, save: Save) -> int:
    """Of the tensors that a task needs; the network of a reparameterised prompt is not among them."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        return sum(path.stat().st_size for path in Path(folder).glob("*model.safetensors"))


def prompt(**options: Any) -> Teach:
    """options: of `prompt_tuning_lab.inject`."""

    def teach(reader: Reader, train: list[Review], choice: Choice, seed: int) -> Taught:
        base = reader.fresh(train)
        words = {"labels": LABELS} if options.get("init") == "labels" else {"text": TASK} if options.get("init") == "text" else {}
        model = prompt_tuning_lab.inject(base, VIRTUAL, **words, **options, tokenizer=reader.tokenizer, seed=seed)
        if reader.has_head:
            base.classifier.requires_grad_(True)
        rate = learning_rate(model, choice["share"]) if "share" in choice else choice["rate"]
        return trained(reader, model, train, choice, seed, rate, prompt_tuning_lab.save)

    return teach


def lora(reader: Reader, train: list[Review], choice: Choice, seed: int) -> Taught:
    torch.manual_seed(seed)
    model = lora_lab.inject(reader.fresh(train), RANK, modules_to_save=["classifier"] if reader.has_head else None)
    return trained(reader, model, train, choice, seed, choice["rate"], lora_lab.save)


def full(reader: Reader, train: list[Review], choice: Choice, seed: int) -> Taught:
    model = reader.fresh(train, whole=True).requires_grad_(True)
    return trained(reader, model, train, choice, seed, choice["rate"], lora_lab.models.save)


# The study ------------------------------------------------------------------------------------------------------------------------


def grid(name: str, smollm2: Sequence[Any], minilm: Sequence[Any] | None = None) -> dict[str, list[Choice]]:
    values = {LanguageModel.name: smollm2, SentenceEncoder.name: smollm2 if minilm is None else minilm}
    return {model: [{name: value} for value in each] for model, each in values.items()}


def epochs(smollm2: int, minilm: int) -> dict[str, int]:
    return {LanguageModel.name: smollm2, SentenceEncoder.name: minilm}


SHARES, OF_NETWORKS = (0.03, 0.1, 0.3), (0.05, 0.15, 0.5)  # of a word's size, that a step moves what is inserted (prompt_tuning_lab.tuning)
NOTHING: dict[str, list[Choice]] = {LanguageModel.name: [{}], SentenceEncoder.name: [{}]}
OF_PREFIXES = grid("rate", (2e-3, 5e-3, 1e-2), (3e-3, 1e-2, 3e-2))
ASKED = grid("template", LanguageModel.templates, SentenceEncoder.templates)

METHODS: dict[str, Method] = {
    "majority": Method("majority class", majority, NOTHING, seeded=False),
    "zero-shot": Method("zero-shot, best of 5 templates", zero_shot, ASKED, seeded=False),
    "few-shot": Method(f"{EXAMPLES}-shot", few_shot, NOTHING),
    "probe": Method("linear probe", probe, grid("l2", (0.1, 0.3, 1.0)), seeded=False),
    "prompt-vocab": Method("soft prompt, from the vocabulary", prompt(init="vocab"), grid("share", SHARES), epochs=epochs(3, 3)),
    "prompt-labels": Method("soft prompt, from the labels", prompt(init="labels"), grid("share", SHARES), epochs=epochs(3, 3)),
    "prompt-text": Method("soft prompt, from a text", prompt(init="text"), grid("share", SHARES), epochs=epochs(3, 3)),
    "p-tuning": Method("p-tuning, from a text", prompt(method="p-tuning", init="text", encoder_hidden_size=MLP), grid("share", OF_NETWORKS),
                       epochs=epochs(3, 3)),
    "residual": Method("residual prompt, from a text", prompt(method="residual", init="text", encoder_hidden_size=MLP), grid("share", OF_NETWORKS),
                       epochs=epochs(3, 3)),
    "prefix-random": Method("prefix, random", prompt(method="prefix", init="random"), OF_PREFIXES, epochs=epochs(3, 3)),
    "prefix-text": Method("prefix, from a text", prompt(method="prefix", init="text"), OF_PREFIXES, epochs=epochs(3, 3)),
    "lora": Method(f"LoRA, rank {RANK}, all linear layers", lora, grid("rate", (3e-4, 1e-3, 3e-3)), epochs=epochs(2, 3)),
    "full": Method("full fine-tuning", full, grid("rate", (1e-5, 3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 3e-4)), epochs=epochs(2, 3)),
}  # fmt: skip
