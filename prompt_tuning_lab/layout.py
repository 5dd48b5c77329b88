"""The prompts of a batch side by side, and which column everything goes to.

    front        [filled][padding][prompt][text]
    after-bos    [filled][padding][first token][prompt][text]

A row's own P virtual tokens and its text are one stretch without a gap, so text padded on the left, on the right or not at all has the
same neighbours, whether a model counts positions, turns by them (RoPE) or measures distances in columns. Rows with a shorter prompt, or none,
are filled up: on the left, where generation goes on at the right; in an encoder-decoder, and where a loss is all that is wanted, on the right,
where causal attention needs no mask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.errors import LoraLabError, did_you_mean

PLACEMENTS = ("front", "after-bos")


@dataclass(frozen=True)
class PromptBlock:
    """The prompts of a batch, side by side. table: [n, P, H], shorter ones filled up on the left.  places: of each row its place there.

    lengths: of each row, P_b virtual tokens, 0 for none.  behind_first: of each row, whether they come after the text's first token.
    """

    table: Tensor
    places: list[int]
    lengths: list[int]
    behind_first: list[bool]

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return self.table.shape[1]

    @property
    def even(self) -> bool:
        """All rows have as many."""
        return min(self.lengths) == self.longest

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """[B, P, H]; cast here, once for each prompt (trap T23)."""
        table = self.table.to(dtype)
        if len(table) == 1:
            return table.expand(self.rows, -1, -1)
        return table.index_select(0, torch.tensor(self.places, device=table.device))

    @property
    def counts(self) -> Tensor:
        """[B, 1], P_b."""
        return torch.tensor(self.lengths, device=self.table.device)[:, None]

    @property
    def after(self) -> Tensor:
        """[B, 1], tokens of the text before the prompt: 0 or 1."""
        return torch.tensor(self.behind_first, device=self.table.device)[:, None].long()

    def mask(self, like: Tensor) -> Tensor:
        """[B, P] in the dtype of `like`: 1 for a virtual token, 0 where a shorter prompt is filled up."""
        if self.even:
            return like.new_ones(self.rows, self.longest)
        return (torch.arange(self.longest, device=like.device) >= self.longest - self.counts).to(like.dtype)


def prompt_block(base: nn.Module, prompts: Sequence[Tensor], which: list[int], placements: list[str]) -> PromptBlock:
    """which: for each row the index of its prompt, or -1."""
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    _check_prompts(prompts, which, placements, embedding.embedding_dim)
    used = sorted({index for index in which if index >= 0})
    longest = max([0, *(len(prompts[index]) for index in used)])
    padded = [F.pad(prompts[index], (0, 0, longest - len(prompts[index]), 0)) for index in used]
    if -1 in which:
        padded.append(embedding.weight.new_zeros(longest, embedding.embedding_dim, dtype=torch.float32))
    table = torch.stack(padded) if len(padded) > 1 else padded[0][None]
    places = [used.index(index) if index >= 0 else len(used) for index in which]
    lengths = [len(prompts[index]) if index >= 0 else 0 for index in which]
    return PromptBlock(table, places, lengths, [index >= 0 and placements[index] == "after-bos" for index in which])


def _check_prompts(prompts: Sequence[Tensor], which: list[int], placements: list[str], width: int) -> None:
    if not which or max(which) >= len(prompts) or len(placements) != len(prompts):
        raise LoraLabError(f"which={which!r:.80} and {len(placements)} placements for {len(prompts)} prompts: expected an index (or -1) for each row")
    for placement in placements:
        check_placement(placement)
    for index in {index for index in which if index >= 0}:
        if prompts[index].ndim != 2 or prompts[index].shape[1] != width:
            raise LoraLabError(f"a prompt is {list(prompts[index].shape)}, expected [num_virtual_tokens, {width}], the width of this model's "
                               "embedding: was it made for another model?")  # fmt: skip


def check_placement(placement: Any) -> str:
    if placement not in PLACEMENTS:
        raise LoraLabError(f"placement={placement!r}: expected one of {', '.join(PLACEMENTS)}{did_you_mean(placement, PLACEMENTS)}")
    return str(placement)


# Columns -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where everything goes. source: [B, P + T], for each column the one of [block; text] that comes there; None: as they are.

    columns: [B, T], where the text goes; None: to the end.  first: [B, 1], the column of a row's first token, virtual or real; None: 0 in all.
    """

    source: Tensor | None = None
    columns: Tensor | None = None
    first: Tensor | None = None

    def __call__(self, block: Tensor, text: Tensor) -> Tensor:
        """[B, P, ..] and [B, T, ..] -> [B, P + T, ..]."""
        whole = torch.cat((block, text), dim=1)
        if self.source is None:
            return whole
        return torch.take_along_dim(whole, self.source.view(*self.source.shape, *[1] * (whole.ndim - 2)), 1)


def layout_of(block: PromptBlock, mask: Tensor | None, length: int, on_the_right: bool = False) -> Layout:
    """mask: [B, T] of the text, or None.  on_the_right: rows with a shorter prompt are filled up there."""
    left, behind = _padded_on_the_left(mask), any(block.behind_first)
    if block.even and not left and not behind:
        return Layout()
    counts, lead = block.counts, lead_of(mask) if left and mask is not None else torch.zeros_like(block.counts)
    before = lead + block.after
    filled = torch.zeros_like(counts) if on_the_right else block.longest - counts  # columns before all else
    first = None if on_the_right and not left else lead + filled
    if not left and not behind and not on_the_right:
        return Layout(first=first)
    text = torch.arange(length, device=counts.device)[None]
    columns = filled + text + counts * (text >= before) if behind or on_the_right else None
    return Layout(source_of(block, length, before, on_the_right), columns, first)


def source_of(block: PromptBlock, length: int, before: Tensor, on_the_right: bool) -> Tensor:
    """[B, P + T]: filled columns, then `before` of the text, the prompt's own, and the rest of the text; or the filled ones last. before: [B, 1]."""
    longest, filled = block.longest, block.longest - block.counts
    column = torch.arange(longest + length, device=filled.device)[None]
    text_first = torch.where(column < filled + before, longest + column - filled, column - before)
    source = torch.where(column < filled, column, torch.where(column < longest + before, text_first, column))
    if not on_the_right:
        return source
    return torch.take_along_dim(source, (column + filled) % (longest + length), 1)


def _padded_on_the_left(mask: Tensor | None) -> bool:
    """Compiled code cannot ask, and takes the way that is right for both."""
    return mask is not None and (torch.compiler.is_compiling() or not bool(mask[:, 0].all()))


def lead_of(mask: Tensor) -> Tensor:
    """[B, 1], padding before the first token."""
    return mask.bool().int().argmax(dim=1, keepdim=True)
