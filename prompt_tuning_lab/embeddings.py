"""A model's words as its first layer gets them: some embeddings multiply what their table holds by sqrt(H) in the call (trap T21), and some models
multiply what their embedding gives them for ids, but not vectors that they are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SCALED_BEHIND = {"marian": "embed_scale", "pegasus": "embed_scale", "blenderbot-small": "embed_scale", "mvp": "embed_scale",
                 "falcon_h1": "embedding_multiplier"}  # fmt: skip  # transformers' model_type -> where the model keeps the factor
BLOCK_NUMBERS = 1 << 20  # numbers of the embedding that are looked at at once: 4 MiB in float32, of which a few exist at a time


def embed(base: nn.Module, ids: Tensor) -> Tensor:
    """[.., H] in the embedding's dtype: what `base` makes of ids [..] before its first layer, and what it has to be given in their place."""
    rows: Tensor = base.get_input_embeddings()(ids)  # type: ignore[operator]
    factor = word_scale(base)
    return rows if factor == 1 else rows * factor


def word_scale(base: nn.Module) -> float:
    """What the model itself multiplies its words by, behind the embedding; 1 of most."""
    name = SCALED_BEHIND.get(getattr(getattr(base, "config", None), "model_type", ""))
    return next((float(vars(module)[name]) for module in base.modules() if name in vars(module)), 1.0) if name else 1.0


@torch.no_grad()
def embedding_rows(base: nn.Module, ids: Sequence[int]) -> Tensor:
    """[n, H] in float32 at least, where the embedding is."""
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    rows = embed(base, torch.tensor(list(ids), dtype=torch.long, device=embedding.weight.device))
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def embedding_blocks(base: nn.Module, vocabulary: int) -> Iterator[tuple[int, Tensor]]:
    """(first id, [n, H] rows) of the first so many words."""
    width: int = base.get_input_embeddings().embedding_dim  # type: ignore[operator]
    step = max(1, BLOCK_NUMBERS // width)
    for start in range(0, vocabulary, step):
        yield start, embedding_rows(base, range(start, min(start + step, vocabulary)))


def embedding_rms(base: nn.Module) -> float:
    """The root mean square of all words' numbers: the scale that learning rates and drift are told in."""
    count: int = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    squares = [rows.square().sum(1).cpu().double() for _, rows in embedding_blocks(base, count)]  # not every device has float64
    return float((torch.cat(squares).sum() / (count * base.get_input_embeddings().embedding_dim)).sqrt())  # type: ignore[operator]


def rms(rows: Tensor) -> float:
    """Root mean square of all numbers.

    >>> rms(torch.tensor([[3.0, -3.0], [3.0, 3.0]]))
    3.0
    """
    return float(rows.detach().cpu().double().square().mean().sqrt())
