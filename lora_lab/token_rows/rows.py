"""Trainable token rows: some words of a vocabulary get vectors of their own, all else in the embedding stays frozen.

        ids ──┬── W [V, dim], frozen ──────────────────────────────┐
              └── one of the trained words? lora_tokens [n, dim] ──┴─(instead)── output

Only the n * dim numbers train: no gradient, no optimizer state and no copy of the whole matrix. The rows hold the vectors themselves and
not what they differ by, so that words that were added to a vocabulary may begin anywhere. Where the model says that its output layer has the
embedding's weight (config.tie_word_embeddings), the score of a trained word is taken with its trained row, too: ``logits[word] = row . h``.
Names, files and the function are those of PEFT's `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoraLabError
from ..kinds import embed_scaled
from ..layers import AdapterParameters, LoRA, adapter_dtype, attach
from ..variants import Variant
from .targets import PlannedRows


class TokenTable(AdapterParameters):
    """Trained rows by adapter name, [n, dim], and which words they belong to, `ids` [n]: a buffer, so that both move and are saved together."""

    def __init__(self) -> None:
        super().__init__()
        self.indices = nn.Module()

    def ids(self, adapter: str) -> Tensor:
        ids = self.indices._buffers[adapter]
        assert ids is not None
        return ids

    def add(self, adapter: str, rows: nn.Parameter, ids: Sequence[int]) -> None:
        self[adapter] = rows
        self.indices._buffers[adapter] = torch.tensor(ids, device=rows.device)

    def __delitem__(self, adapter: str) -> None:
        super().__delitem__(adapter)
        del self.indices._buffers[adapter]


@dataclass(frozen=True)
class TokenRows(Variant):
    """Rows in the place of the weight's own, in an embedding or in an output layer."""

    is_pair: ClassVar[bool] = False
    replaces: ClassVar[bool] = True

    def source(self, layer: LoRA) -> Any:
        """The layer whose table holds the rows."""
        return layer

    def output(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor, so_far: Tensor) -> Tensor:
        if (table := self.source(layer)._modules.get("lora_tokens")) is None:
            return so_far  # merged or ejected there: the rows are in the weight that both share, or nowhere
        replaced = _looked_up if isinstance(layer, nn.Embedding) else _scored
        return replaced(layer, x, y, so_far, table[adapter], table.ids(adapter))

    def rows_alone(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(rows [n, dim], ids [n]) where they are all that the adapter does here, for those who put them in place themselves."""
        table = self.source(layer)._modules.get("lora_tokens")
        return (None, None) if table is None else (table[adapter], table.ids(adapter))

    def update(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        return self.output(layer, adapter, x, y, y) - y

    def merged(self, layer: LoRA, adapter: str, rows: slice, weight: Tensor, so_far: Tensor) -> Tensor:
        """An embedding's weight is [dim, V] here, and the words are its columns; an output layer's are rows."""
        table = self.source(layer).lora_tokens
        trained, ids = table[adapter].detach().to(so_far), table.ids(adapter)
        if isinstance(layer, nn.Embedding):
            return so_far.index_copy(1, ids, trained.T[rows] + (so_far - weight)[:, ids])
        start, stop, _ = rows.indices(layer.lora_kind.shape(layer)[1])
        here = (ids >= start) & (ids < stop)
        own = ids[here] - start
        return so_far.index_copy(0, own, trained[here] + (so_far - weight)[own])

    def delta(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        weight = layer.lora_kind.matrix(layer)[rows].to(self.source(layer).lora_tokens[adapter].dtype)
        return self.merged(layer, adapter, rows, weight, weight) - weight


@dataclass(frozen=True)
class TiedRows(TokenRows):
    """The rows of another layer, which has the same weight.

    embedding: that layer.  inner: what the adapter does here besides (LoRA on the output layer); it holds for the weight without the rows.
    """

    inner: Variant | None = None
    embedding: Any = field(default=None, repr=False, compare=False)

    def source(self, layer: LoRA) -> Any:
        return self.embedding

    def output(self, layer: LoRA, adapter: str, x: Tensor, y: Tensor, so_far: Tensor) -> Tensor:
        if self.inner is not None:
            so_far = self.inner.output(layer, adapter, x, y, so_far)
        return super().output(layer, adapter, x, y, so_far)

    def merged(self, layer: LoRA, adapter: str, rows: slice, weight: Tensor, so_far: Tensor) -> Tensor:
        if self.inner is not None:
            so_far = self.inner.merged(layer, adapter, rows, weight, so_far)
        return super().merged(layer, adapter, rows, weight, so_far)

    def rows_alone(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return super().rows_alone(layer, adapter) if self.inner is None else (None, None)

    def trains(self, container: str) -> bool:
        return self.inner is None or self.inner.trains(container)

    def pair(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        assert self.inner is not None, "tied rows alone have no A and B"
        return self.inner.pair(layer, adapter)

    def pair_for_file(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        assert self.inner is not None, "tied rows alone have no A and B"
        return self.inner.pair_for_file(layer, adapter)


def _looked_up(layer: Any, x: Tensor, y: Tensor, so_far: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """x: ids [...].  y, so_far: [..., dim].  The lookup has one more row, where every other word goes and no gradient comes from."""
    if layer.padding_idx is not None:  # which has no gradient in an embedding
        rows = torch.where((ids == layer.padding_idx)[:, None], rows.detach(), rows)
    place, count = places(ids, x), len(ids)
    table = F.pad(rows.to(y.dtype), (0, 0, 0, 1))
    found = embed_scaled(layer, F.embedding(place, table, count, scale_grad_by_freq=layer.scale_grad_by_freq))
    found = layer._remembered(found, x)
    return torch.where((place < count)[..., None], found if so_far is y else found + (so_far - y), so_far)


def _scored(layer: Any, x: Tensor, y: Tensor, so_far: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """x: [..., in].  y, so_far: [..., V].  The scores of the trained words, with their rows."""
    bias = None if layer.bias is None else layer.bias[ids].to(x.dtype)
    scores = layer._remembered(F.linear(x, rows.to(x.dtype), bias), x).to(y.dtype)
    if so_far is not y:
        scores = scores + so_far.index_select(-1, ids) - y.index_select(-1, ids)
    return so_far.index_copy(-1, ids, scores)


def places(ids: Tensor, words: Tensor) -> Tensor:
    """Where each word is in ids, in whatever order these are; len(ids) for one that is not there.

    >>> places(torch.tensor([7, 2]), torch.tensor([[2, 3, 7]]))
    tensor([[1, 2, 0]])
    """
    ranked, order = ids.sort()
    near = torch.searchsorted(ranked, words.to(ranked.dtype).contiguous()).clamp_max(len(ids) - 1)
    return torch.where(ranked[near] == words, order[near], len(ids))


# Words and layers ---------------------------------------------------------------------------------------------------------------


def refuse_overlap(model: nn.Module, adapters: Sequence[str]) -> None:
    """Raise LoraLabError where two of these adapters have a row for the same word: it can have one of them."""
    for path, layer in model.named_modules():
        seen: dict[int, str] = {}
        for adapter in adapters if isinstance(layer, LoRA) else ():
            for word in words_of(cast(LoRA, layer), adapter):
                if word in seen:
                    raise LoraLabError(f"{seen[word]} and {adapter} both have a row for word {word} of {path!r}, which can have one: use one of them")
                seen[word] = adapter


def words_of(layer: LoRA, adapter: str) -> list[int]:
    """The words that an adapter has rows for in this layer, its own or tied; [] where it has none, or on the meta device."""
    variant = layer.lora_variant.get(adapter)
    table = variant.source(layer)._modules.get("lora_tokens") if isinstance(variant, TokenRows) else None
    ids = None if table is None else table.ids(adapter)
    return [] if ids is None or ids.is_meta else ids.tolist()


# The change ---------------------------------------------------------------------------------------------------------------------


def new_rows(model: nn.Module, planned: PlannedRows, dtype: torch.dtype | None = None) -> nn.Parameter:
    """The rows as they are in the weight, [n, dim], in `dtype`; None: float32 for 16-bit weights, else theirs."""
    weight = cast(Any, model.get_submodule(planned.path)).weight.detach()
    return nn.Parameter(weight[torch.tensor(planned.indices, device=weight.device)].to(dtype or adapter_dtype(weight.dtype)))


def attach_rows(model: nn.Module, adapter: str, planned: PlannedRows, rows: nn.Parameter) -> None:
    """Give an embedding its rows, and the layers that are tied to it a way to them; after the adapter's pairs are in place."""
    embedding: Any = model.get_submodule(planned.path)
    attach(embedding, adapter, {}, 1.0, variant=TokenRows())
    embedding._modules.setdefault("lora_tokens", TokenTable()).add(adapter, rows, planned.indices)
    for path in planned.tied:
        layer: Any = model.get_submodule(path)
        if isinstance(layer, LoRA) and adapter in layer.lora_variant:
            layer.lora_variant[adapter] = TiedRows(inner=layer.lora_variant[adapter], embedding=embedding)
        else:
            attach(layer, adapter, {}, 1.0, variant=TiedRows(embedding=embedding))


def own_rows(model: nn.Module, adapter: str) -> dict[str, LoRA]:
    """The layers that hold rows of this adapter, by path; not those tied to them."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRA) and adapter in layer.lora_extra("lora_tokens")}


def followers(model: nn.Module, adapters: Sequence[str]) -> list[nn.Module]:
    """Layers that take all that these adapters do to them from the layer whose weight they share: to merge that one is to merge them."""
    sharing: dict[int, list[Any]] = {}
    for module in model.modules():
        if (weight := module._parameters.get("weight")) is not None:
            sharing.setdefault(id(weight), []).append(module)
    found: list[nn.Module] = []
    for modules in sharing.values():
        for first in modules:
            rest = [module for module in modules if module is not first]
            if all(_follows(module, first, adapters) for module in rest):
                found += rest
    return found


def _follows(layer: Any, first: Any, adapters: Sequence[str]) -> bool:
    """Whether these adapters do to `layer` what they do to `first`, and nothing else."""
    if not isinstance(layer, LoRA) or not isinstance(first, LoRA):
        return False
    own, other = ({name: each.lora_variant[name] for name in adapters if name in each.lora_variant} for each in (layer, first))
    tied = all(isinstance(variant, TiedRows) and variant.inner is None and variant.embedding is first for variant in own.values())
    return bool(own) and own.keys() == other.keys() and tied and all(type(variant) is TokenRows for variant in other.values())
