"""What a trained prompt looks like from the vocabulary: its nearest words, how far it has gone, and how alike tasks are.

Nearest words are by cosine: prompts travel far from the embedding's scale (row norms of hundreds where a word's is 5), and by L2 distance the
longest words would win, whatever their direction.
Source: Lester et al. 2021 (arXiv:2104.08691), section 7; similarity: Vu et al. 2022 (SPoT, arXiv:2110.07904), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.errors import LoraLabError

from .embeddings import embedding_blocks, embedding_rms
from .prompted_model import check_prompted


class Neighbour(NamedTuple):
    """A word near a virtual token.  distance: 1 - cosine, from 0 (the same direction) to 2."""

    token: str
    distance: float
    id: int


@dataclass(frozen=True)
class Drift:
    """How far one position has gone.  distance: L2.  cosine: between where it began and where it is.

    relative: the root mean square of the change, over that of the embedding's numbers.
    """

    distance: float
    cosine: float
    relative: float


# Nearest words ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_tokens(prompted: Any, tokenizer: Any, k: int = 5, task: str | None = None) -> list[list[Neighbour]]:
    """For each virtual token the k words of the vocabulary with the smallest cosine distance, nearest first.

    tokenizer: ours or transformers'; words the embedding has beyond the tokenizer's are left out.  task: None is the active one.
    The embedding is read a block at a time: there is never a copy of it in float32, which for 150,000 words would be half a GiB.
    Raises LoraLabError for an unknown task, a prefix (keys and values are not in the embedding's space), and a k the vocabulary cannot give.
    """
    rows, vocabulary = rows_of(prompted, task), _vocabulary(prompted.base, tokenizer)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocabulary:
        raise LoraLabError(f"k={k!r}: expected a whole number, 1 to the {vocabulary} words of the vocabulary")
    cosines, ids = _nearest(rows, prompted.base, vocabulary, k)
    found = zip(cosines.clamp(-1, 1).tolist(), ids.tolist(), strict=True)
    return [[Neighbour(token_text(tokenizer, i), 1.0 - cosine, i) for cosine, i in zip(*position, strict=True)] for position in found]


def _nearest(rows: Tensor, base: nn.Module, vocabulary: int, k: int) -> tuple[Tensor, Tensor]:
    """(cosines [P, k], ids [P, k]) of the words nearest to rows [P, H]; of each block of words the best are kept."""
    rows = F.normalize(rows, dim=1)
    best, ids = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long, device=rows.device)
    for start, words in embedding_blocks(base, vocabulary):
        cosines = rows @ F.normalize(words.to(rows), dim=1).T
        numbers = torch.arange(start, start + len(words), device=rows.device).expand(len(rows), -1)
        best, order = torch.cat([best, cosines], dim=1).topk(min(k, best.shape[1] + len(words)), dim=1)
        ids = torch.cat([ids, numbers], dim=1).gather(1, order)
    return best, ids


# Drift and similarity -----------------------------------------------------------------------------------------------------------


def drift(prompted: Any, task: str | None = None) -> list[Drift]:
    """How far each virtual token has gone from its initialisation. Of a task that was loaded, from its file.

    Raises LoraLabError for an unknown task, and a prefix.
    """
    now, start = rows_of(prompted, task), initial_rows_of(prompted, task)
    scale = embedding_rms(prompted.base)
    lengths, cosines = (now - start).norm(dim=1), F.cosine_similarity(now, start, dim=1)
    shares = lengths / (now.shape[1] ** 0.5 * scale)
    return [Drift(*each) for each in zip(lengths.tolist(), cosines.tolist(), shares.tolist(), strict=True)]


def similarity(prompted: Any, tasks: Sequence[str] | None = None, pairs: bool = False) -> Tensor:
    """How alike tasks are: [K, K] cosines for K tasks (all, in their order); the prompts may differ in length.

    pairs: False compares the means of the rows, True takes the mean of the cosines of all pairs of rows.
    Source: Vu et al. 2022 (SPoT, arXiv:2110.07904), section 4: both predict how well one task's prompt begins another's.
    Raises LoraLabError for an unknown task, and a prefix.
    """
    names = list(prompted.tasks) if tasks is None else [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise LoraLabError("similarity of no tasks: expected the names of some, or None for all that the model has")
    rows = [rows_of(prompted, name) for name in names]
    pooled = torch.stack([F.normalize(each, dim=1).mean(0) if pairs else F.normalize(each.mean(0), dim=0) for each in rows])
    return pooled @ pooled.T  # the mean over pairs of unit rows is the product of their means


# What is looked at ------------------------------------------------------------------------------------------------------------


def rows_of(prompted: Any, task: str | None = None) -> Tensor:
    """What a task inserts, [P, H] in float32. Raises LoraLabError for a prefix."""
    check_prompted(prompted, "looking at a prompt")
    with torch.no_grad():
        return _rows(prompted.prompt(task)())


def initial_rows_of(prompted: Any, task: str | None = None) -> Tensor:
    """What it inserted when it began, [P, H] in float32."""
    return _rows(prompted.prompt(task).initial)


def _rows(inserted: Tensor) -> Tensor:
    if inserted.ndim != 2:
        raise LoraLabError(f"this task is a prefix, keys and values {list(inserted.shape)} in every layer: they are not in the embedding's space. "
                           "Expected a task of method 'prompt', 'p-tuning' or 'residual'")  # fmt: skip
    return inserted.detach().float()


def token_text(tokenizer: Any, token_id: int) -> str:
    """A word as text, with the space that stands before it; a piece that is no text by itself (bytes of a letter) as the tokenizer writes it."""
    text = str(tokenizer.decode([token_id], skip_special_tokens=False))
    if text and "\ufffd" not in text:
        return text
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    return str(convert(token_id) if callable(convert) else tokenizer.backend.id_to_token(token_id))


def _vocabulary(base: Any, tokenizer: Any) -> int:
    return min(base.get_input_embeddings().num_embeddings, len(tokenizer))
