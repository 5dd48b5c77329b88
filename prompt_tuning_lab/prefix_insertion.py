"""Put prefixes into a model's inputs: a pure function from what the model was to be called with to what it is called with.

    [k; K] and [v; V] in each attention        k, v: [P, D], the prefix's;  K, V: [T, D], the text's

A prefix stands where P tokens before the text would have left their keys and values, so everything counts them: the text's positions start at
P, and a window that slides over the text leaves the prefix behind as it would leave tokens (PEFT's meaning, too, so that files agree).
Keys go in behind rotary positions: the prefix has learned where it is.  Rows with a shorter prefix, or none, have it padded on the left and masked.

Source: Li & Liang 2021 (arXiv:2101.00190), section 4; of encoders, Liu et al. 2022 (P-Tuning v2, arXiv:2110.07602), section 3.2.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.models.base import is_encoder_decoder
from lora_lab.models.blocks import compute_dtype

from .base_model import cache_length, first_position, flat_mask
from .prefix_cache import (
    Pairs,
    encode,
    extended,
    fill,
    from_transformers,
    looks_both_ways,
    new_cache,
    prefix_shape,
    refuse_dropped,
)  # fmt: skip


@dataclass(frozen=True)
class PrefixBlock:
    """The prefixes of a batch. tables: those that occur, [L, 2, P_i, N, D] each.  rows: the table of each row, or -1.  lengths: [B], their P_i."""

    tables: tuple[Tensor, ...]
    rows: tuple[int, ...]
    lengths: Tensor

    @property
    def longest(self) -> int:
        return max(table.shape[2] for table in self.tables)

    @property
    def even(self) -> bool:
        """Have all rows a prefix, of one length?"""
        return -1 not in self.rows and len({table.shape[2] for table in self.tables}) == 1

    @property
    def mask(self) -> Tensor | None:
        """[B, P], 1 where a row has a prefix, at the right edge; None where all have all of it."""
        if self.even:
            return None
        places = torch.arange(self.longest, device=self.lengths.device)
        return (places >= self.longest - self.lengths[:, None]).long()

    @property
    def pairs(self) -> Pairs:
        """Of each layer keys and values, [B, N, P, D] each; zeros, which are masked, where a row has less."""
        heads = [table.transpose(2, 3) for table in self.tables]  # [L, 2, N, P_i, D]
        if len(heads) == 1 and -1 not in self.rows:
            states = heads[0][:, :, None].expand(-1, -1, len(self.rows), -1, -1, -1)  # every row reads the same numbers
        else:
            padded = torch.stack([F.pad(each, (0, 0, self.longest - each.shape[3], 0)) for each in heads], dim=2)
            none = torch.zeros_like(padded[:, :, :1])
            states = torch.cat((padded, none), dim=2).index_select(2, torch.tensor(self.rows, device=padded.device) % (len(heads) + 1))
        return [(keys, values) for keys, values in states]

    def layers(self, start: int, end: int | None = None) -> PrefixBlock:
        return replace(self, tables=tuple(table[start:end] for table in self.tables))


def insert_prefixes(base: nn.Module, prefixes: Sequence[Tensor], which: Tensor | Sequence[int], inputs: dict[str, Any]) -> dict[str, Any]:
    """What to call the base with, so that row b has before its text the prefix ``prefixes[which[b]]``, or none where that is -1.

    prefixes: of each task [L, 2, P_i, N, D], see `prefix_shape`; any dtype, cast once to what the base computes in.  which: [B].
    inputs: as the base's forward takes them, soft prompts inserted already; nothing in them is changed, but an empty cache is filled.

    A cache that is not empty already has the prefix: then mask and positions alone are extended, which the caller gives for the text, as without
    a prefix. So it is with a T5's encoder_outputs. Where no cache is asked for, use_cache is False; some models of transformers give back all
    the same the one they were called with: see `cache_asked_for` and `without_cache`.
    Raises LoraLabError for a prefix of another shape than the base's, a number of rows that is not the batch's, a base that can have no prefix,
    transformers' gradient checkpointing, and padding between prefix and text where a model measures distances in columns.
    """
    rows = _listed(which)
    if all(index < 0 for index in rows):
        return dict(inputs)
    refuse_dropped(base)
    block = prefix_block(base, prefixes, rows)
    if is_encoder_decoder(base):
        return _into_both(base, block, inputs)
    _check_rows(_shape(inputs, ""), rows)
    return _into_encoder(base, block, inputs) if looks_both_ways(base) else _into_decoder(base, block, inputs)


def _listed(which: Tensor | Sequence[int]) -> list[int]:
    return which.tolist() if isinstance(which, Tensor) else [*which]


def cache_asked_for(inputs: dict[str, Any]) -> bool:
    """Does a call with these inputs want the cache back? Where it says use_cache, that holds; else where it brings one."""
    said = inputs.get("use_cache")
    return inputs.get("past_key_values") is not None if said is None else bool(said)


def without_cache(out: Any) -> Any:
    """The same output, the cache not in it: for transformers' models that give back the one they read the prefix from."""
    return replace(out, past_key_values=None) if getattr(out, "past_key_values", None) is not None else out


# The block of a batch -----------------------------------------------------------------------------------------------------------


def prefix_block(base: nn.Module, prefixes: Sequence[Tensor], rows: Sequence[int]) -> PrefixBlock:
    """rows: for each the index of its prefix, or -1; not all of them -1."""
    _check_prefixes(base, prefixes, rows)
    weight: Tensor = base.get_input_embeddings().weight  # type: ignore[operator]
    used = sorted({index for index in rows if index >= 0})
    lengths = [prefixes[index].shape[2] if index >= 0 else 0 for index in rows]
    return PrefixBlock(tuple(prefixes[index].to(weight.device, compute_dtype(weight)) for index in used),
                 tuple(used.index(index) if index >= 0 else -1 for index in rows), torch.tensor(lengths, device=weight.device))  # fmt: skip


def _check_prefixes(base: nn.Module, prefixes: Sequence[Tensor], rows: Sequence[int]) -> None:
    layers, heads, head_dim = prefix_shape(base)
    for index in {index for index in rows if index >= 0}:
        if index >= len(prefixes):
            raise LoraLabError(f"which={list(rows)!r:.80} names prefix {index}; there are {len(prefixes)}")
        shape = list(prefixes[index].shape)
        if len(shape) != 5 or shape[:2] != [layers, 2] or shape[3:] != [heads, head_dim] or shape[2] < 1:
            raise LoraLabError(f"a prefix is {shape}, for this {type(base).__name__} expected [{layers}, 2, P, {heads}, {head_dim}]: layers, "
                               "keys and values, virtual tokens, key-value heads, head dimension. Was it made for another model?")  # fmt: skip


def _check_rows(shape: tuple[int, int] | None, rows: Sequence[int]) -> None:
    if shape is not None and shape[0] != len(rows):
        raise LoraLabError(f"which has {len(rows)} rows, the batch {shape[0]}")


# Each kind of model -------------------------------------------------------------------------------------------------------------


def _into_decoder(base: nn.Module, block: PrefixBlock, inputs: dict[str, Any], side: str = "") -> dict[str, Any]:
    """side: "decoder_" before the names of its inputs in an encoder-decoder, which has no position_ids (T5 has relative positions)."""
    out, shape = dict(inputs), _shape(inputs, side)
    past, mask = _past(inputs, block), flat_mask(inputs, f"{side}attention_mask", "prefix")
    if past == 0:
        empty = inputs.get("past_key_values")
        out["past_key_values"] = fill(new_cache(base, block.tables[0].shape[0]) if empty is None else empty, block.pairs)
    if not cache_asked_for(inputs):
        out["use_cache"] = False
    if shape is None:
        return out  # the base says what is missing
    (rows, length), text = shape, max(past - block.longest, 0)
    if mask is not None and list(mask.shape) != [rows, text + length]:
        raise LoraLabError(f"{side}attention_mask is {list(mask.shape)}, expected [{rows}, {text + length}]: of the text, without its prefix")
    _refuse_gap(base, block, mask, decodes=bool(side))
    whole = extended(mask, block.mask, block.lengths.new_ones(rows, text + length), block.longest)
    if whole is not None:
        out[f"{side}attention_mask"] = whole
    if not side:
        _move(base, out, block, whole, length)
    return out


def _move(base: nn.Module, out: dict[str, Any], block: PrefixBlock, whole: Tensor | None, length: int) -> None:
    """Positions of the text: those given, moved by each row's P, else the number of real positions before; None is the cache's length on."""
    if out.get("position_ids") is not None:
        out["position_ids"] = out["position_ids"] + block.lengths[:, None]
    elif whole is not None and "position_ids" in inspect.signature(base.forward).parameters:
        out["position_ids"] = (whole.long().cumsum(1) - 1).clamp(min=0)[:, -length:] + first_position(base)


def _into_encoder(base: nn.Module, block: PrefixBlock, inputs: dict[str, Any]) -> dict[str, Any]:
    """All of the text sees the prefix; positions start at P."""
    if cache_length(inputs.get("past_key_values")):
        raise LoraLabError(f"past_key_values with a prefix: a {type(base).__name__} reads a text at once, there is nothing to continue")
    shape, mask = _shape(inputs, ""), flat_mask(inputs, "attention_mask", "prefix")
    out = {**inputs, "past_key_values": fill(new_cache(base, block.tables[0].shape[0]), block.pairs)}
    if shape is None:
        return out
    if mask is not None and tuple(mask.shape) != shape:
        raise LoraLabError(f"attention_mask is {list(mask.shape)}, expected {list(shape)}: of the text, without its prefix")
    mask = block.lengths.new_ones(shape) if mask is None else mask  # transformers' encoders know of a prefix by the mask alone
    out["attention_mask"] = extended(mask, block.mask, mask, block.longest)
    out["position_ids"] = _encoder_positions(base, block, inputs, shape[1])
    return {name: value for name, value in out.items() if name != "position_ids" or value is not None}


def _encoder_positions(base: nn.Module, block: PrefixBlock, inputs: dict[str, Any], length: int) -> Tensor | None:
    """P, P + 1, ... ; RoBERTa's begin behind its padding's, and padding keeps its own. None for a model without a table of positions."""
    if inputs.get("position_ids") is not None:
        return inputs["position_ids"] + block.lengths[:, None]
    tables = (module for name, module in base.named_modules() if name.endswith("position_embeddings") and isinstance(module, nn.Embedding))
    if (table := next(tables, None)) is None:
        return None
    padding, ids, moved = table.padding_idx, inputs.get("input_ids"), block.lengths[:, None]
    if padding is None or ids is None:
        first = 0 if padding is None else padding + 1
        places = torch.arange(first, first + length, device=moved.device)[None] + moved
        return places.clamp(max=table.num_embeddings - 1)  # beyond it there is padding alone
    text = (ids != padding).long()
    return (text.cumsum(1) + moved) * text + padding


def _into_both(base: nn.Module, block: PrefixBlock, inputs: dict[str, Any]) -> dict[str, Any]:
    """The encoder reads under the first layers of the prefix, the decoder writes under the others; what it looks at of the encoder is text alone."""
    out = dict(inputs)
    if inputs.get("encoder_outputs") is None:
        out["encoder_outputs"] = _encoded(base, block, inputs)
        out.pop("input_ids", None), out.pop("inputs_embeds", None)
    _check_rows(_shape(inputs, "decoder_"), block.lengths.tolist())
    return _into_decoder(base, block.layers(base.config.num_layers), out, side="decoder_")  # type: ignore[union-attr, arg-type]


def _encoded(base: nn.Module, block: PrefixBlock, inputs: dict[str, Any]) -> Any:
    shape, mask = _shape({**inputs, "labels": None}, ""), flat_mask(inputs, "attention_mask", "prefix")
    if shape is None:
        raise LoraLabError("an encoder-decoder needs input_ids [B, S], inputs_embeds [B, S, H] or encoder_outputs")
    _check_rows(shape, block.lengths.tolist())
    if mask is not None and tuple(mask.shape) != shape:
        raise LoraLabError(f"attention_mask is {list(mask.shape)}, expected {list(shape)}: of the text, without its prefix")
    encoder = block.layers(0, base.config.num_layers)  # type: ignore[union-attr, arg-type]
    return encode(base, inputs, fill(new_cache(base, encoder.tables[0].shape[0]), encoder.pairs), encoder.mask)


# What is in the inputs ----------------------------------------------------------------------------------------------------------


def _shape(inputs: dict[str, Any], side: str) -> tuple[int, int] | None:
    """Rows and positions of the text: (B, T). A decoder without inputs has as many as its labels."""
    for name in (f"{side}input_ids", f"{side}inputs_embeds", *(["labels"] if side else [])):
        if isinstance(given := inputs.get(name), Tensor):
            if given.ndim < 2:
                raise LoraLabError(f"{name} is {list(given.shape)}, expected [B, T]")
            return given.shape[0], given.shape[1]
    return None


def _past(inputs: dict[str, Any], block: PrefixBlock) -> int:
    past = cache_length(inputs.get("past_key_values"))
    if 0 < past < block.longest:
        raise LoraLabError(f"past_key_values has {past} positions, the prefix alone {block.longest}: it was made without it; begin without a cache")
    return past


def _refuse_gap(base: nn.Module, block: PrefixBlock, mask: Tensor | None, decodes: bool) -> None:
    """Raise LoraLabError for padding on the left of the text where the model would take it for distance from the prefix.

    transformers' windows, its T5 decoders and MPT's distances go by columns. Our models count text, and its T5 encoders are told to.
    """
    if mask is None or not from_transformers(base):
        return
    window = _window(base.config)
    far = window is not None and block.longest + mask.shape[1] > window
    by_distance = decodes or getattr(base.config, "model_type", None) == "mpt"
    if (by_distance or far) and bool((mask[:, 0] == 0).any()):
        why = f"its window of {window} positions" if far else "its relative positions"
        raise LoraLabError(f"a prefix before text that is padded on the left: {type(base).__name__} measures {why} in columns and would count the "
                           "padding. Pad on the right, run rows of one length at a time, or load the model with lora_lab.models.load")  # fmt: skip


def _window(config: Any) -> int | None:
    """Positions that a layer sees at most, in those of transformers' models that have such layers."""
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return int(config.window_size)  # GPT-Neo
    window = config.sliding_window if getattr(config, "use_sliding_window", True) and hasattr(config, "sliding_window") else None
    return None if window is None else int(window)
