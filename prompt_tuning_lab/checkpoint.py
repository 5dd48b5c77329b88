"""Prompt files in the format of Hugging Face PEFT, both ways; safetensors only, nothing pickled.

    adapter_model.safetensors      prompt_embeddings: what the task inserts, P rows; the head of a classifier
    adapter_config.json            PEFT's keys: peft_type, num_virtual_tokens, ...
    trainable-<digits>.safetensors the network that makes the rows, of reparameterised prompts; PEFT keeps the rows alone, so it cannot train on

The tensors are renamed into place before the configuration, and carry a copy of it in their metadata: whatever interrupts a save, the folder
that loads is the old one or the new one. The task's name is not in it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lab.errors import LoraLabError, did_you_mean
from lora_lab.files import alone_in, saving, write_file, write_json
from lora_lab.peft_files.config import CONFIG, TENSORS
from lora_lab.streaming.shards import NAMES
from lora_lab.wrapping import refuse_sharded, refuse_wrapped, whole

from .base_model import check_embedding, refuse_meta
from .injection import check_task_name
from .peft_files.config import peft_config, type_and_sizes
from .peft_files.heads import head_tensors, heads_of, put_in_place, refuse_another_head, warn_of_the_unsaved
from .peft_files.reading import BEGAN, KEY, NETWORK, Contents, read_contents, rows_for_file
from .peft_files.trainable import INITIAL, digest_of, network_tensors, remove_others, write_trainable
from .prompted_model import PromptedModel, check_module, check_prompted
from .soft_prompt import Prompt

# Saving ---------------------------------------------------------------------------------------------------------------------


def save(prompted: PromptedModel, folder: str | Path, task: str | None = None, *, dtype: torch.dtype | None = None) -> None:
    """Write one task straight into `folder`, so that `load` and PEFT's `PeftModel.from_pretrained(base, folder)` read it.

    task: its name; None means the active one.
    dtype: of the prompt in the file (None is float32); the network of a reparameterised prompt keeps its own.
    The head of a classifier goes into the file as it is: PEFT wants it there, and it may have been trained along.
    PEFT puts every prompt in front: a placement it does not know is a key that it warns of. A prefix of an encoder-decoder has a type that PEFT
    refuses, as it would share it out among the layers in another way.
    Raises LoraLabError where there is no such task, a value is not finite, or the disk refuses; earlier files are untouched then.
    """
    check_module(prompted, "save")
    refuse_wrapped(prompted, "save")
    check_prompted(prompted, "save")
    if dtype is not None and dtype not in NAMES:
        raise LoraLabError(f"dtype={dtype!r}: expected one of {', '.join(map(str, NAMES))}, or None for float32")
    prompt, heads = prompted.prompt(task), heads_of(prompted.base)
    tensors = {KEY: _ready(prompt, dtype), **head_tensors(prompted.base, heads)}
    config = _config(prompted.base, prompt, heads)
    warn_of_the_unsaved(prompted.base, heads)
    metadata = _metadata(prompted.base, prompt, config)
    folder, digest = Path(folder), digest_of(tensors[KEY])
    network = network_tensors(prompt) if prompt.hidden_size is not None else None
    with saving(f"task {task or prompted.active!r}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):  # or another save could remove this network before the prompt that it belongs to is there
            if network is not None:
                write_trainable(folder, digest, prompt.method, network)
            write_file(folder / TENSORS, lambda path: save_file(tensors, path, metadata))
            write_json(folder / CONFIG, config)
            remove_others(folder, digest)


def _ready(prompt: Prompt, dtype: torch.dtype | None) -> Tensor:
    """What the task inserts, as rows on the CPU. Raises LoraLabError for NaN and infinity."""
    with torch.no_grad():
        rows = rows_for_file(whole(prompt())).to("cpu", dtype or torch.float32).contiguous()
    if not torch.isfinite(rows).all():
        where = f" in {dtype}" if dtype else ""
        raise LoraLabError(f"the prompt holds NaN or infinity{where}: nothing was written (train with a lower learning rate)")
    return rows


def _config(base: nn.Module, prompt: Prompt, heads: list[str]) -> dict[str, Any]:
    peft_type, sizes = type_and_sizes(base, prompt)
    placement = {} if prompt.placement == "front" else {"placement": prompt.placement}
    return peft_config(base, peft_type, prompt.num_virtual_tokens, {**sizes, **placement}, heads)


def _metadata(base: nn.Module, prompt: Prompt, config: dict[str, Any]) -> dict[str, str]:
    metadata = {"format": "pt", "lora_lab_config": json.dumps(config, sort_keys=True)}
    if prompt.initialization is not None:
        metadata[BEGAN] = json.dumps(asdict(prompt.initialization), sort_keys=True)
    if prompt.hidden_size is not None:
        metadata[NETWORK] = f"network of method {prompt.method!r}"
    if base_sha256 := getattr(base, "base_sha256", None):
        metadata["base_sha256"] = base_sha256
    return metadata


# Loading --------------------------------------------------------------------------------------------------------------------


def load(model: nn.Module, folder: str | Path, task: str = "default", *, trainable: bool = False, replace: bool = False,
         head: bool = False) -> PromptedModel:  # fmt: skip
    """Read a prompt's folder, ours or PEFT's, before a model or beside the tasks of a prompted one; it becomes the active task.

    model: a base, which is frozen, or a PromptedModel, which is changed and returned.  task: the name it gets here.
    trainable: go on training it, alone; a reparameterised prompt with its network where the folder has that, else (PEFT keeps none, and cannot
        train on) as the plain rows that it made.  False freezes it.
    replace: copy the values into the task of that name, keeping its Parameter objects.
    head: put the file's head into the base, for all tasks, where it is not the base's own.
    Raises LoraLabError, nothing changed, for a missing or damaged file, a prompt for another model, another method than those written here, tensors
    that are missing, unexpected or not finite, a feature that is not read here, and another head without head=True; warns where the base's SHA-256
    is another, and where PEFT reads a class off another position than we do.
    """
    check_module(model, "load")
    refuse_wrapped(model, "load")
    refuse_sharded(model, "load")
    base = model.base if isinstance(model, PromptedModel) else model
    check_embedding(base)
    refuse_meta(base)
    contents = read_contents(base, Path(folder), trainable)
    if not head:
        refuse_another_head(contents.heads, Path(folder))
    tasks = model.tasks if isinstance(model, PromptedModel) else nn.ModuleDict()
    _check_task(tasks, task, contents.prompt, replace)
    prompted = model if isinstance(model, PromptedModel) else PromptedModel(model)
    _take(prompted, task, contents, replace)
    prompted.tasks[task].requires_grad_(trainable)
    return prompted


def _check_task(tasks: nn.ModuleDict, task: str, prompt: Prompt, replace: bool) -> None:
    check_task_name(task)
    if replace and task not in tasks:
        raise LoraLabError(f"replace=True: this model has the tasks {sorted(tasks)}, and none called {task!r}{did_you_mean(task, tasks)}")
    if not replace and task in tasks:
        raise LoraLabError(f"task={task!r} is already in this model: choose another name, or replace=True to overwrite its values")
    if replace and (here := _form(tasks[task])) != (there := _form(prompt)):
        raise LoraLabError(f"replace=True takes a prompt that differs in its values only; {task!r} is {here} here, {there} in the file. Load it "
                           "under another name")  # fmt: skip


def _form(prompt: Any) -> tuple[Any, ...]:
    return prompt.method, prompt.placement, {name: list(tensor.shape) for name, tensor in prompt.state_dict().items()}


@torch.no_grad()
def _take(prompted: PromptedModel, task: str, contents: Contents, replace: bool) -> None:
    if replace:
        prompted.tasks[task].load_state_dict(contents.prompt.state_dict())
        prompted.tasks[task].get_buffer(INITIAL).copy_(contents.prompt.get_buffer(INITIAL))
        prompted.prompt(task).initialization = contents.prompt.initialization
        prompted.tasks.requires_grad_(False)
        prompted.active = task
    else:
        prompted.add(task, contents.prompt)
    put_in_place(prompted.base, contents.heads)
