"""A model's words as its embedding gives them out: some multiply what their table holds by sqrt(H) in the call (trap T21)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_NUMBERS = 1 << 20  # numbers of the embedding that are looked at at once: 4 MiB in float32, of which a few exist at a time


@torch.no_grad()
def embedding_rows(base: nn.Module, ids: Sequence[int]) -> Tensor:
    """[n, H] in float32 at least, where the embedding is."""
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    rows = embedding(torch.tensor(list(ids), dtype=torch.long, device=embedding.weight.device))
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
    squares = [(float(rows.double().square().sum()), rows.numel()) for _, rows in embedding_blocks(base, count)]
    return float((sum(total for total, _ in squares) / sum(numbers for _, numbers in squares)) ** 0.5)


def rms(rows: Tensor) -> float:
    """Root mean square of all numbers.

    >>> rms(torch.tensor([[3.0, -3.0], [3.0, 3.0]]))
    3.0
    """
    return float(rows.detach().double().square().mean().sqrt())
