"""From a prompt's folder to its `Contents`, checked against the model it is to go before; nothing is changed.

    prompt_embeddings [P * S, H]           rows before the text; of S = 2 submodules (PEFT, encoder-decoders) the first P, the others are never used
    prompt_embeddings [P, L * 2 * N * D]   a prefix: in each row layer by layer a key, then a value
    base_model.<name>                      a head that was trained along, see heads.py
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.files import json_object
from lora_lab.peft_files.config import CONFIG, TENSORS, read_config, warn_of_another_base, what_is_missing
from lora_lab.streaming.shards import FLOATS, read_shard

from ..base_model import refuse_words_in_layers
from ..initialization import Initialization
from ..prefix import Prefix, from_rows, to_rows
from ..prefix_cache import prefix_shape
from ..soft_prompt import Prompt, SoftPrompt
from .config import ROWS, BaseSizes, Written, from_peft
from .heads import read_heads
from .trainable import digest_of, read_trainable

KEY = "prompt_embeddings"
BEGAN, NETWORK = "lora_lab_initialization", "lora_lab_network"  # in the metadata: how the prompt began, and the words for what made it


@dataclass(frozen=True)
class Contents:
    """prompt: ready to be a task.  heads: values for parameters of the base that differ from its own."""

    prompt: Prompt
    heads: dict[str, Tensor]


def read_contents(base: nn.Module, folder: Path, trainable: bool) -> Contents:
    """trainable: take the network that makes the rows, where the folder has it.

    Raises LoraLabError for a missing or damaged file, one of another model or method, and a feature that is not read here; warns where the base's
    SHA-256 is another, the network is asked for and not there, and where PEFT reads a class off another position than we do.
    """
    if not (folder / TENSORS).is_file():
        raise LoraLabError(what_is_missing(folder))
    shard = read_shard(folder / TENSORS)
    if "lora_lab_config" not in shard.metadata and not (folder / CONFIG).is_file():
        raise LoraLabError(f"{folder / CONFIG} is missing: it says what kind of prompt the tensor is")
    written = from_peft(read_config(folder, shard.metadata, stacklevel=4), base, folder / CONFIG)
    tensors = {key: tensor.read() for key, tensor in shard.tensors.items() if key != KEY}
    if KEY not in shard.tensors:
        raise LoraLabError(f"{folder / TENSORS} holds {', '.join(shard.tensors) or 'nothing'}, and no {KEY!r}: it is incomplete, or no prompt")
    rows = shard.tensors[KEY].read()
    _check_rows(rows, shard.tensors[KEY].dtype, written, base, folder)
    heads = read_heads(base, tensors, written.heads, folder)
    plain = _plain(rows, written, base)
    try:
        network = read_trainable(plain, folder, digest_of(rows)) if trainable else None
    except LoraLabError:
        if not _is_replaced(rows, folder):
            raise
        network = None
    if trainable and network is None and _is_replaced(rows, folder):
        return read_contents(base, folder, trainable)
    _warn(base, folder, shard.metadata, written, trainable and network is None)
    prompt = plain if network is None else network
    prompt.placement, prompt.initialization = written.placement, initialization_in(shard.metadata, folder)
    return Contents(prompt, heads)


def _is_replaced(rows: Tensor, folder: Path) -> bool:
    """Whether another save has put other rows into the folder meanwhile, and taken the network of these away."""
    now = read_shard(folder / TENSORS).tensors.get(KEY)
    return now is None or digest_of(now.read()) != digest_of(rows)


def rows_for_file(inserted: Tensor) -> Tensor:
    """What a task inserts, as the rows of PEFT's files: [P, ...]."""
    return to_rows(inserted) if inserted.ndim == 5 else inserted


def _check_rows(rows: Tensor, dtype: str, written: Written, base: nn.Module, folder: Path) -> None:
    count, width = written.num_virtual_tokens * written.submodules, _width(written, base)
    said = f"num_virtual_tokens={written.num_virtual_tokens}" + (f" and num_transformer_submodules={written.submodules}" * (written.submodules > 1))
    if dtype not in FLOATS or rows.ndim != 2 or len(rows) != count:
        raise LoraLabError(f"{folder}: {KEY} is {list(rows.shape)} ({dtype}), but with {said} ({CONFIG}) it has to be [{count}, {width}] "
                           "floating-point numbers")  # fmt: skip
    if rows.shape[1] != width:
        what = "this model's embedding has" if written.peft_type in ROWS else f"a prefix of this model, {prefix_shape(base)}, has"
        raise LoraLabError(f"{folder}: the rows of {KEY} have {rows.shape[1]} numbers, {what} {width}: a prompt for another model")
    if not torch.isfinite(rows).all():
        raise LoraLabError(f"{folder}: {KEY} holds NaN or infinity: take an earlier checkpoint, or train with a lower learning rate")


def _width(written: Written, base: nn.Module) -> int:
    return BaseSizes.of(base).hidden if written.peft_type in ROWS else prefix_shape(base).per_token


def _plain(rows: Tensor, written: Written, base: nn.Module) -> Prompt:
    if written.peft_type in ROWS:
        refuse_words_in_layers(base)
        return SoftPrompt(rows[: written.num_virtual_tokens])
    return Prefix(from_rows(rows, prefix_shape(base)))


def initialization_in(metadata: dict[str, str], folder: Path) -> Initialization | None:
    """How the prompt began, where the file says so."""
    if BEGAN not in metadata:
        return None
    try:
        return Initialization(**json_object(metadata[BEGAN], folder / TENSORS))
    except TypeError:
        raise LoraLabError(f"{folder / TENSORS}: {BEGAN} in the metadata is {metadata[BEGAN]!r:.80}: save the task again") from None


def _warn(base: nn.Module, folder: Path, metadata: dict[str, str], written: Written, network_missing: bool) -> None:
    if (trained_on := metadata.get("base_sha256")) and (here := getattr(base, "base_sha256", None)):
        warn_of_another_base(trained_on, here, folder, stacklevel=5)
    if network_missing and (network := metadata.get(NETWORK, written.network)):
        warnings.warn(f"{folder} does not have the {network} that made its prompt (PEFT does not keep it): what it made trains on as it is",
                      stacklevel=4)  # fmt: skip
    if "lora_lab_config" not in metadata and written.peft_type in ROWS and (other := _other_meaning(written.task, base)):
        warnings.warn(f"{folder} is of PEFT, {other}: train on for some steps, or take a prefix", stacklevel=4)


def _other_meaning(task: str | None, base: nn.Module) -> str:
    """What PEFT makes of rows before a head that pools or points, where it differs (traps T15 and T15b)."""
    if task == "SEQ_CLS" and isinstance(getattr(base, "classifier", None), nn.Module):
        return "which reads the class off the first virtual token; here it is read off the text's own first position, so that the logits differ"
    if task == "QUESTION_ANS":
        return ("which in training counts the start and end of an answer from the first virtual token, though they are given as places in the text; "
                "here they are places in the text, so that what was trained there points too far to the left")  # fmt: skip
    return ""
