"""Put soft prompts into a model's inputs: a pure function from what the model was to be called with to what it is called with.

    inputs_embeds     [prompt; embed(text)], in the columns that layout.py gives them
    attention_mask    1 for virtual tokens
    position_ids      the number of real tokens before, virtual ones counted
    labels            -100 for virtual tokens

Where all rows have the same prompt in front, this is torch.cat and nothing else, and no mask is made where none was given: a mask of ones
next to none at all changes the attention kernel.
Source: Lester et al. 2021 (arXiv:2104.08691), section 2; what others do is in the docstrings of the tests, trap by trap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.models.base import check_ids, is_encoder_decoder
from lora_lab.models.blocks import IGNORE

from .base_model import Kind, base_kind, cache_length, check_text, context_length, flat_mask, has_read, rows_of
from .embeddings import embed
from .layout import Layout, PromptBlock, layout_of, lead_of, prompt_block, source_of

MOVED = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels")  # those that give each position something


@dataclass(frozen=True)
class Inserted:
    """inputs: what to call the base with.  length: T, columns of the text, or 0 where nothing was inserted among them.

    columns: [B, T], where they are now; None: the last ones.  keep: the caller's logits_to_keep, where the base is not told.
    drop_cache: the base gives back a cache that nobody asked for.
    """

    inputs: dict[str, Any]
    length: int = 0
    columns: Tensor | None = None
    keep: int = 0
    drop_cache: bool = False

    def text_of(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The part of a tensor that belongs to the text: [B, .., P + T, ..] -> [B, .., T, ..] in this dimension."""
        if self.columns is None:
            length = min(self.length, tensor.shape[dim])
            return tensor.narrow(dim, tensor.shape[dim] - length, length)
        shape = [len(tensor), *(self.length if each == dim else 1 for each in range(1, tensor.ndim))]
        return torch.take_along_dim(tensor, self.columns.view(shape), dim)


def insert_prompts(base: nn.Module, prompts: Sequence[Tensor], which: Sequence[int], inputs: dict[str, Any],
                   placement: str | Sequence[str] = "front", kind: Kind | None = None, prefix: int = 0) -> Inserted:  # fmt: skip
    """What to call the base with, so that row b reads the prompt ``prompts[which[b]]`` with its text, or none where that is -1.

    prompts: of each task [P_i, H], of any dtype; cast once, to that of the embedding.  which: [B].  placement: of all, or of each prompt.
    inputs: as the base's forward takes them: input_ids or inputs_embeds, and attention_mask, position_ids, token_type_ids, labels of the
        text. Nothing in them is changed.  kind: of the base, where it is known already.  prefix: positions in a filled cache that are a prefix's.
    labels of a causal model are -100 for virtual tokens; the last of these predicts the text's first token. The first token of all has
    nothing before it, and so no label, also where padding stands there.

    A cache that is not empty has the prompt in it already: then the mask is extended and positions are moved, and nothing is inserted. So it is
    with encoder_outputs, and with the state of a recurrent model.
    Raises LoraLabError for a prompt of another width, an unknown placement, a number of rows that is not the batch's, a mask or labels of
    another shape than the text.
    """
    kind = base_kind(base) if kind is None else kind
    placements = [placement] * len(prompts) if isinstance(placement, str) else list(placement)
    block = prompt_block(base, prompts, list(which), placements)
    if block.longest == 0:
        return Inserted(dict(inputs))
    if rows_of(inputs) != block.rows:
        raise LoraLabError(f"{block.rows} rows are told their prompt, the batch has {rows_of(inputs)}")
    if kind.encodes and inputs.get("encoder_outputs") is not None:
        return Inserted(_seen_of_encoder(block, inputs))
    if has_read(inputs):
        return Inserted(dict(inputs))
    if not kind.encodes and cache_length(inputs.get("past_key_values")):
        return Inserted(_continued(block, inputs, kind, prefix))
    return _inserted(base, block, inputs, kind)


# Before the text ----------------------------------------------------------------------------------------------------------------


def _inserted(base: nn.Module, block: PromptBlock, inputs: dict[str, Any], kind: Kind) -> Inserted:
    embeds, mask = embedded(base, inputs), flat_mask(inputs, "attention_mask", "prompt")
    length = embeds.shape[1]
    _check_shapes(inputs, embeds, kind)
    learns = kind.causal and inputs.get("labels") is not None and inputs.get("use_cache") is False
    layout = layout_of(block, mask, length, on_the_right=kind.encodes or learns)
    out = {name: value for name, value in inputs.items() if name != "input_ids"}
    out["inputs_embeds"] = layout(block.vectors(embeds.dtype), embeds)
    whole = None if learns and mask is None else _whole_mask(block, mask, layout, embeds)  # what stands on the right no word can see
    if whole is not None:
        out["attention_mask"] = whole
    if (given := inputs.get("position_ids")) is not None:
        out["position_ids"] = _moved(block, given, mask, layout)
    elif whole is not None and "position_ids" in kind.arguments and (layout.first is not None or _padded_beyond(base, out, kind)):
        out["position_ids"] = (whole.long().cumsum(1) - 1).clamp(min=0) + kind.first_position
    if (types := inputs.get("token_type_ids")) is not None:
        out["token_type_ids"] = layout(types.new_zeros(block.rows, block.longest), types.expand(block.rows, -1))
    if kind.causal and (labels := inputs.get("labels")) is not None:
        out["labels"] = _whole_labels(block, labels, layout)
    return Inserted(out, length, layout.columns, _keep(out, length, layout, kind))


def _padded_beyond(base: nn.Module, out: dict[str, Any], kind: Kind) -> bool:
    """Padding stands where the model has no positions left, so it must not be counted."""
    context = context_length(base, kind)
    return context is not None and out["inputs_embeds"].shape[1] > context


def embedded(base: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """[B, T, H] of the text, as the model's first layer would get it."""
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    check_text(inputs, embedding.embedding_dim, is_encoder_decoder(base))
    if (ids := inputs.get("input_ids")) is None:
        return inputs["inputs_embeds"]
    check_ids("input_ids", ids, embedding.num_embeddings)
    return embed(base, ids)


def _whole_mask(block: PromptBlock, mask: Tensor | None, layout: Layout, like: Tensor) -> Tensor | None:
    """[B, P + T]; None where everything is seen."""
    if mask is None and block.even:
        return None
    mask = like.new_ones(like.shape[:2], dtype=torch.long) if mask is None else mask
    return layout(block.mask(mask), mask)


def _moved(block: PromptBlock, given: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """The caller's positions: the prompt has those from where it stands on, what comes behind it is moved by P_b."""
    given = given.expand(block.rows, -1)
    before = block.after if mask is None else block.after + lead_of(mask)
    text = torch.arange(given.shape[1], device=given.device)[None]
    start = torch.take_along_dim(given, before.clamp(max=given.shape[1] - 1), 1)
    own = (torch.arange(block.longest, device=given.device)[None] - (block.longest - block.counts)).clamp(min=0)
    return layout(start + own, given + block.counts * (text >= before))


def _whole_labels(block: PromptBlock, labels: Tensor, layout: Layout) -> Tensor:
    whole = layout(labels.new_full((block.rows, block.longest), IGNORE), labels)
    return whole if layout.first is None else whole.scatter(1, layout.first, IGNORE)


def _keep(out: dict[str, Any], length: int, layout: Layout, kind: Kind) -> int:
    """No logits are made for virtual tokens where the base can be told so; returns what is left to be cut off behind it."""
    keep = out.get("logits_to_keep") or 0
    if "logits_to_keep" not in kind.arguments or not kind.causal:
        return 0
    if isinstance(keep, Tensor):
        raise LoraLabError("logits_to_keep is a tensor: with a prompt before the text it can be a number, of the last positions")
    if layout.columns is not None:
        out.pop("logits_to_keep", None)
        return int(keep)
    if out.get("labels") is None:
        out["logits_to_keep"] = min(keep or length, length)
    return 0


def _check_shapes(inputs: dict[str, Any], embeds: Tensor, kind: Kind) -> None:
    shape = list(embeds.shape[:2])
    one_for_all = [1, shape[1]]
    for name in ("attention_mask", "token_type_ids", "position_ids", *(["labels"] if kind.causal else [])):
        given = inputs.get(name)
        right = (shape, one_for_all) if name in ("token_type_ids", "position_ids") else (shape,)
        if given is not None and list(given.shape) not in right:
            raise LoraLabError(f"{name} is {list(given.shape)}, expected {shape}: of the text, without the prompt")
    for name, given in inputs.items():
        another = name not in MOVED and not name.startswith(("decoder_", "encoder_", "head_", "cross_"))
        if another and isinstance(given, Tensor) and list(given.shape[:2]) == shape:
            raise LoraLabError(f"{name} is {list(given.shape)}, numbers for the text's positions: what virtual tokens have there is not known, so no "
                               "prompt can go before this text")  # fmt: skip


# Behind what is there already ---------------------------------------------------------------------------------------------------


def _continued(block: PromptBlock, inputs: dict[str, Any], kind: Kind, prefix: int) -> dict[str, Any]:
    """A later step of generation: the mask is that of all columns so far, and the new ones' positions come after the prompt's."""
    out, mask, past = dict(inputs), flat_mask(inputs, "attention_mask", "prompt"), cache_length(inputs["past_key_values"]) - prefix
    if past < block.longest:
        raise LoraLabError(f"past_key_values has {past} positions, the prompt alone {block.longest}: it was made without; begin without a cache")
    new = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    seen = past - block.longest + new.shape[1]
    if mask is not None and list(mask.shape) != [block.rows, seen]:
        raise LoraLabError(f"attention_mask is {list(mask.shape)}, expected {[block.rows, seen]}: of the text so far, without the prompt")
    if mask is not None or not block.even:
        out["attention_mask"] = whole = _so_far(block, mask, seen)
        if inputs.get("position_ids") is None and "position_ids" in kind.arguments:
            out["position_ids"] = (whole.long().cumsum(1) - 1)[:, -new.shape[1] :] + kind.first_position
    if inputs.get("position_ids") is not None:
        out["position_ids"] = inputs["position_ids"] + block.counts
    return out


def _so_far(block: PromptBlock, mask: Tensor | None, length: int, on_the_right: bool = False) -> Tensor:
    """The mask of prompt and text in the columns they were put in."""
    mask = torch.ones(block.rows, length, dtype=torch.long, device=block.table.device) if mask is None else mask
    source = source_of(block, length, lead_of(mask) + block.after, on_the_right)
    return torch.take_along_dim(torch.cat((block.mask(mask), mask), 1), source, 1)


def _seen_of_encoder(block: PromptBlock, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the encoder made of prompt and text is given back: the decoder has to see the virtual tokens, too (trap T12)."""
    encoded, mask = inputs["encoder_outputs"], flat_mask(inputs, "attention_mask", "prompt")
    hidden: Any = getattr(encoded, "last_hidden_state", encoded[0] if isinstance(encoded, (tuple, list)) else encoded)
    text = hidden.shape[1] - block.longest
    if mask is not None and mask.shape[1] != text:
        raise LoraLabError(f"attention_mask is {list(mask.shape)}, expected {[block.rows, text]}: the encoder_outputs have {hidden.shape[1]} "
                           f"positions, {block.longest} of them the prompt's")  # fmt: skip
    if mask is None and block.even:
        return dict(inputs)
    return {**inputs, "attention_mask": _so_far(block, mask, text, on_the_right=True)}
