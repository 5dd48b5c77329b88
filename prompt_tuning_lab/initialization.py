"""How a prompt begins. For small models that decides most of how it ends: words of the vocabulary beat noise by ten points.

    random     uniform in [-0.5, 0.5], the paper's default; far larger than the words of most models, see `Initialization.rms`
    vocab      words drawn without replacement from the most frequent, which have the lowest ids
    labels     the words for the classes, a position each (the mean of a label's tokens), the rest drawn
    text       the words of a text, the rest drawn
    a path, a task's name, a Prompt or a tensor: rows that are there already

All words go through a call of the model's embedding: some scale what their table holds (trap T21).
Sources: Lester et al. 2021 (arXiv:2104.08691), section 3.2; its code for the details; Vu et al. 2022 (SPoT, arXiv:2110.07904) for other tasks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_lab.checks import LARGEST, are_finite, is_size
from lora_lab.errors import LoraLabError, did_you_mean
from lora_lab.models.base import is_encoder_decoder
from lora_lab.peft_files.config import CONFIG, TENSORS, read_config

from .embeddings import embedding_rms, embedding_rows, rms
from .peft_files.config import rows_in_use

INITIALISATIONS = ("random", "vocab", "labels", "text")
TENSOR = "prompt_embeddings"  # PEFT's name
UNUSED = re.compile(r"[\[<](unused|extra_id_|reserved_special_token_)\d+[\]>]|<\|.*\|>")  # places kept free in BERT's, T5's and others' vocabularies


@dataclass(frozen=True)
class Initialization:
    """What a prompt began as. given: positions that were asked for.  filled: positions drawn from the vocabulary.  cut: what there was no room for.

    rms, embedding_rms: root mean square of the prompt's numbers and of the words'. A learning rate is a step in these units.
    """

    init: str
    given: int
    filled: int
    cut: int
    rms: float
    embedding_rms: float

    def __str__(self) -> str:
        parts = [f"{self.given} from {self.init}"] if self.given else []
        parts += [f"{self.filled} drawn from the vocabulary"] if self.filled else []
        parts += [f"{self.cut} left out"] if self.cut else []
        return f"{', '.join(parts)}; rms {self.rms:.3g}, the embedding's {self.embedding_rms:.3g}"


@dataclass(frozen=True)
class Start:
    """What a prompt is asked to begin as; the arguments of `inject` of these names."""

    init: Any = "vocab"
    text: str | None = None
    labels: Sequence[str] | None = None
    tokenizer: Any = None
    top_n: int = 5000
    seed: int | None = None

    def generator(self) -> torch.Generator | None:
        """None goes on with PyTorch's own random numbers."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    @property
    def is_known(self) -> bool:
        return isinstance(self.init, str) and self.init in INITIALISATIONS


def first_rows(base: nn.Module, num_virtual_tokens: int, start: Start) -> tuple[Tensor, Initialization]:
    """The first values of a prompt, [P, H] in float32 at least on the CPU, and the record of them. Changes nothing.

    Warns where a text or labels are cut. Raises LoraLabError for what makes no sense, a text without words, and rows of another shape.
    """
    check_words(start)
    generator, width, scale = start.generator(), int(_embedding(base).embedding_dim), embedding_rms(base)  # not the hidden size (trap T22)
    if not start.is_known:
        rows = rows_there(base, start.init, [num_virtual_tokens, width])
        return rows, Initialization("rows that were there", len(rows), 0, 0, rms(rows), scale)
    if start.init == "random":
        rows = torch.rand(num_virtual_tokens, width, generator=generator) - 0.5
        return rows, Initialization("random numbers", len(rows), 0, 0, rms(rows), scale)
    asked = [words(base, ids).mean(0) for ids in _labels(start)] if start.init == "labels" else list(words(base, _named(start)))
    given = asked[:num_virtual_tokens]
    warn_of_the_cut(start, len(asked), num_virtual_tokens)
    drawn = words(base, draw(base, num_virtual_tokens - len(given), start, generator))
    rows = torch.stack([*given, *drawn])
    return rows, Initialization(start.init, len(given), len(drawn), len(asked) - len(given), rms(rows), scale)


def first_words(base: nn.Module, num_virtual_tokens: int, start: Start) -> tuple[list[int], int]:
    """The same as ids of words, for a prefix, which begins as what the model makes of them; and how many of them are not drawn."""
    named = [i for ids in _labels(start) for i in ids] if start.init == "labels" else _named(start)
    warn_of_the_cut(start, len(named), num_virtual_tokens)
    given = named[:num_virtual_tokens]
    return given + draw(base, num_virtual_tokens - len(given), start, start.generator()), len(given)


def warn_of_the_cut(start: Start, asked: int, num_virtual_tokens: int) -> None:
    if asked > num_virtual_tokens:
        warnings.warn(f"init={start.init!r} gives {asked} positions, num_virtual_tokens is {num_virtual_tokens}: the last "
                      f"{asked - num_virtual_tokens} are left out", stacklevel=5)  # fmt: skip


def check_count(num_virtual_tokens: Any) -> int:
    if not is_size(num_virtual_tokens):
        raise LoraLabError(f"num_virtual_tokens={num_virtual_tokens!r}: expected a whole number of at least 1, at most {LARGEST:,} (20 is a good "
                           "start)")  # fmt: skip
    return num_virtual_tokens


def check_seed(seed: Any) -> None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise LoraLabError(f"seed={seed!r}: expected a whole number, or None (torch takes 64 bits)")


# Words --------------------------------------------------------------------------------------------------------------------------


def _named(start: Start) -> list[int]:
    """Ids of the text's tokens; none of "vocab", which draws all."""
    return token_ids(start.text, start.tokenizer, "text") if start.init == "text" else []


def _labels(start: Start) -> list[list[int]]:
    if not isinstance(start.labels, (list, tuple)) or not start.labels:
        raise LoraLabError(f"labels={start.labels!r:.60}: expected a list of words, one for each class")
    return [token_ids(label, start.tokenizer, "a label") for label in start.labels]


def check_words(start: Start) -> None:
    """Raise LoraLabError where a text or labels are given and would not be read, or are lacking."""
    for name in ("text", "labels"):
        value = getattr(start, name)
        if (value is not None) != (isinstance(start.init, str) and start.init == name):
            raise LoraLabError(f"init={_brief(start.init)} with {name}={value!r:.40}: {name} belongs to init={name!r}, and that needs it")


def _brief(init: Any) -> str:
    return f"a tensor {list(init.shape)}" if isinstance(init, Tensor) else f"{init!r:.60}"


def token_ids(text: Any, tokenizer: Any, what: str) -> list[int]:
    """The ids of a text without the tokenizer's special tokens: a start token is no word of it (trap T20)."""
    if tokenizer is None:
        raise LoraLabError(f"{what} is {text!r:.40}, so a tokenizer is needed: inject(model, ..., tokenizer=tokenizer)")
    if not isinstance(text, str):
        raise LoraLabError(f"{what} is {text!r:.40}: expected words")
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    if not ids:
        raise LoraLabError(f"{what} {text!r} has no tokens: a prompt cannot begin as nothing")
    return ids


def draw(base: nn.Module, count: int, start: Start, generator: torch.Generator | None) -> list[int]:
    """So many different words among the top_n with the lowest ids. Raises LoraLabError where there are not as many."""
    top_n = start.top_n
    if not is_size(top_n):
        raise LoraLabError(f"top_n={top_n!r}: expected a whole number of at least 1, at most {LARGEST:,}")
    no_words = without_meaning(start.tokenizer, top_n)
    choice = [i for i in range(min(top_n, _embedding(base).num_embeddings)) if i not in no_words]
    if len(choice) < count:
        raise LoraLabError(f"{count} words are to be drawn from the {len(choice)} most frequent (top_n={top_n}): raise top_n, or take fewer tokens")
    return [choice[i] for i in torch.randperm(len(choice), generator=generator)[:count].tolist()]


def without_meaning(tokenizer: Any, top_n: int) -> set[int]:
    """Of the lowest ids the tokenizer's special tokens, and places it keeps free ("[unused7]"); none without a tokenizer."""
    if tokenizer is None:
        return set()
    backend: Any = getattr(tokenizer, "backend", None)  # ours has tokenizers' own; transformers' has a word here, and names the same things otherwise
    if not hasattr(backend, "id_to_token"):
        names, special = tokenizer.convert_ids_to_tokens(list(range(min(top_n, len(tokenizer))))), set(tokenizer.all_special_ids)
    else:
        names = [backend.id_to_token(i) or "" for i in range(min(top_n, backend.get_vocab_size()))]
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return special | {i for i, name in enumerate(names) if UNUSED.fullmatch(str(name))}


def words(base: nn.Module, ids: Sequence[int]) -> Tensor:
    """[n, H] on the CPU, in float32 at least."""
    if ids and max(ids) >= (count := _embedding(base).num_embeddings):
        raise LoraLabError(f"the tokenizer gave the id {max(ids)}, the model's vocabulary ends at {count - 1}: is this the model's tokenizer?")
    return embedding_rows(base, ids).cpu()


def _embedding(base: nn.Module) -> Any:
    return base.get_input_embeddings()  # type: ignore[operator]


# Rows that are there already ----------------------------------------------------------------------------------------------------


def rows_there(base: nn.Module, init: Any, shape: list[int]) -> Tensor:
    """The rows of a file, or of a tensor. shape: [virtual tokens, width] that they are to have."""
    rows = init.detach() if isinstance(init, Tensor) else _from_file(base, init)
    if not are_finite(rows) or list(rows.shape) != shape:
        hint = _of_other_length(base, rows, shape[0]) if rows.ndim == 2 and rows.shape[1] == shape[1] else ""
        raise LoraLabError(f"init gives {rows.dtype} {list(rows.shape)}: expected finite numbers {shape}, virtual tokens and the width of a row in "
                           f"this model{hint}")  # fmt: skip
    return rows.to("cpu", torch.promote_types(rows.dtype, torch.float32)).clone()


def _of_other_length(base: nn.Module, rows: Tensor, wanted: int) -> str:
    """What rows of the right width and another number may be (trap T13)."""
    if is_encoder_decoder(base) and len(rows) == 2 * wanted:
        return (f": of an encoder-decoder's prompt PEFT keeps {wanted} rows more, for its decoder, which nothing ever reads; give the folder with "
                f"{CONFIG}, which tells them apart, or the first {wanted} rows as a tensor")  # fmt: skip
    return f" (num_virtual_tokens={len(rows)}?)"


def _from_file(base: nn.Module, init: Any) -> Tensor:
    """A .npy file, as Google's prompts are; a safetensors file with `prompt_embeddings`, or the folder of it, as PEFT's and ours are."""
    if not isinstance(init, (str, Path)):
        raise LoraLabError(f"init={init!r:.60}: expected {', '.join(map(repr, INITIALISATIONS))}, a path, a task's name or a tensor")
    try:
        path = Path(init) / TENSORS if Path(init).is_dir() else Path(init)
        is_there = path.is_file()
    except (OSError, ValueError):  # a text in the place of a path: too long for one, or with characters that none has
        is_there = False
    if not is_there:
        hint = f" (init=\"text\", text={str(init)!r:.30}?)" if " " in str(init) else did_you_mean(init, INITIALISATIONS)
        raise LoraLabError(f"init={str(init)!r:.80}: neither one of {', '.join(INITIALISATIONS)} nor a file{hint}")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        with safe_open(path, "pt") as file:
            rows, metadata = file.get_tensor(TENSOR), file.metadata() or {}
    except Exception as error:  # of either library, each has its own
        raise LoraLabError(f"{path} holds no prompt: expected a .npy array, or safetensors with {TENSOR!r} ({error})") from None
    if "lora_lab_config" not in metadata and not (path.parent / CONFIG).is_file():
        return rows
    return rows_in_use(rows, read_config(path.parent, metadata, stacklevel=7), base, path.parent / CONFIG)
