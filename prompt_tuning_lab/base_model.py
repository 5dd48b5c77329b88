"""What a prompt has to know of the model it stands before, ours or transformers': what it is called with, and where its text goes in."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.models.base import context_in, is_encoder_decoder
from lora_lab.models.causal import CausalLM

CAUSAL = ("ForCausalLM", "LMHeadModel")
ANSWERING = ("ForConditionalGeneration", "ForSeq2SeqLM", "MTModel")


@dataclass(frozen=True)
class Kind:
    """arguments: of forward, in their order.  causal: each position predicts the next one, and logits belong to positions.

    encodes: the text goes into the encoder of an encoder-decoder.  backbone: path of the part below a head that reads hidden states; "" is
    the model itself.  first_position: of a text's first token.
    """

    arguments: tuple[str, ...]
    causal: bool = False
    encodes: bool = False
    backbone: str = ""
    first_position: int = 0


def base_kind(base: nn.Module) -> Kind:
    """Raises LoraLabError for a model without an input embedding, or that takes no inputs_embeds."""
    check_embedding(base)
    arguments = tuple(inspect.signature(base.forward).parameters)
    causal, encodes = is_causal_lm(base), is_encoder_decoder(base) and "decoder_input_ids" in arguments  # half of one may keep its config
    backbone = "" if causal or is_named(base, ANSWERING) else backbone_of(base)
    inner = base.get_submodule(backbone)
    if "inputs_embeds" not in inspect.signature(inner.forward).parameters:
        raise LoraLabError(f"a {type(base).__name__} takes no inputs_embeds, which is how a prompt goes in: expected a model of lora_lab.models "
                           "or transformers that reads text")  # fmt: skip
    return Kind(arguments, causal, encodes, backbone, first_position(base))


def check_embedding(base: nn.Module) -> None:
    get = getattr(base, "get_input_embeddings", None)
    if not callable(get) or not isinstance(getattr(get(), "embedding_dim", None), int):
        raise LoraLabError(f"a {type(base).__name__} has no get_input_embeddings() that gives an nn.Embedding: a prompt stands among the vectors of "
                           "words, so the model has to have some")  # fmt: skip


def refuse_words_in_layers(base: nn.Module) -> None:
    """Raise LoraLabError for a model whose layers look words up for themselves: behind rows without ids it would leave that out in silence."""
    config = getattr(base, "config", None)
    if any(getattr(each, "hidden_size_per_layer_input", None) for each in (config, getattr(config, "text_config", None))):
        raise LoraLabError(f"a {type(base).__name__} looks each word up again in its layers, where a virtual token is no word: method='prefix' puts "
                           "keys and values there instead")  # fmt: skip


def is_causal_lm(base: nn.Module) -> bool:
    """Many that see or hear and then write are called ...ForConditionalGeneration, without an encoder-decoder's second half."""
    return isinstance(base, CausalLM) or (is_named(base, (*CAUSAL, *ANSWERING)) and not is_encoder_decoder(base))


def is_named(base: nn.Module, endings: tuple[str, ...]) -> bool:
    """Whether the model's class, or one that it derives from, has such a name: how transformers says what a model does."""
    return any(each.__name__.endswith(endings) for each in type(base).__mro__)


def backbone_of(base: nn.Module) -> str:
    """The name of the part that turns text into hidden states, below a head; "" where the model is that part."""
    for name in (getattr(base, "base_prefix", None), getattr(base, "base_model_prefix", None)):
        if name and name in dict(base.named_children()):
            return str(name)
    return ""


def first_position(base: nn.Module) -> int:
    """0; RoBERTa's positions begin behind its padding's (and OPT adds its own offset itself)."""
    table = getattr(getattr(base.get_submodule(backbone_of(base)), "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def context_length(base: nn.Module, kind: Kind) -> int | None:
    """Positions a row of text may take; None where the config sets no limit, as T5's, or one below 0, as XLNet's."""
    config = text_config(base)
    positions = context_in(config)
    if positions is None or positions < 0:
        return None
    return positions if hasattr(config, "context_length") else positions - kind.first_position


def text_config(base: nn.Module) -> Any:
    """The config, or of a model that sees or hears, too, the part of it about text."""
    config = getattr(base, "config", None)
    part = getattr(config, "text_config", None)
    return config if part is None or is_encoder_decoder(base) else part


def has_read(inputs: dict[str, Any]) -> bool:
    """Whether a recurrent model (Mamba, xLSTM, RWKV) is given the state that a text, and the prompt with it, has left."""
    if (state := inputs.get("cache_params")) is None:
        return inputs.get("state") is not None
    filled = getattr(state, "has_previous_state", getattr(state, "seqlen_offset", True))
    return bool(filled() if callable(filled) else filled)


def refuse_meta(base: nn.Module) -> None:
    if base.get_input_embeddings().weight.is_meta:  # type: ignore[operator]
        raise LoraLabError("the model is on the meta device, which holds shapes and no numbers: load the weights first")


def cache_length(cache: Any) -> int:
    """Positions in a key-value cache; 0 of None, and of the empty one that transformers' generate begins with (trap T5)."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    try:
        return int(cache.length if hasattr(cache, "length") else cache[0][0].shape[2])
    except (TypeError, IndexError, AttributeError):
        raise LoraLabError(f"past_key_values is a {type(cache).__name__}: expected a cache that this model gave back, or None") from None


def check_text(inputs: dict[str, Any], width: int, encodes: bool) -> None:
    """Raise LoraLabError for a text that is no batch: input_ids [B, T], or inputs_embeds [B, T, H] of the embedding's width, at least one row.

    And of at least one token, but for an encoder-decoder, which can read a prompt alone, and which may have read its text before (encoder_outputs).
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if encodes and inputs.get("encoder_outputs") is not None:
        return
    if (ids is None) == (embeds is None):
        raise LoraLabError("give either input_ids [B, T] or inputs_embeds [B, T, H], not both and not neither")
    name, given, form = ("input_ids", ids, "[B, T] of whole numbers") if embeds is None else ("inputs_embeds", embeds, f"[B, T, {width}] of numbers")
    if not isinstance(given, Tensor):
        raise LoraLabError(f"{name} is a {type(given).__name__}, expected a tensor {form}")
    fits = given.ndim == 2 and not given.is_floating_point() and given.dtype != torch.bool
    if not (fits if embeds is None else given.ndim == 3 and given.shape[2] == width and given.is_floating_point()):
        raise LoraLabError(f"{name} is {given.dtype} {list(given.shape)}, expected {form}")
    if given.shape[0] == 0 or (given.shape[1] == 0 and not encodes):
        lacks = "tokens: give each row at least one, such as the model's start token" if given.shape[0] else "rows"
        raise LoraLabError(f"{name} is {list(given.shape)}, a batch without {lacks}")


def rows_of(inputs: dict[str, Any]) -> int:
    """Rows of the batch. Raises LoraLabError where nothing in the inputs tells."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if isinstance(given := inputs.get(name), Tensor):
            return len(given)
    given = sorted(name for name, value in inputs.items() if value is not None)
    raise LoraLabError(f"the inputs are {given}: expected input_ids [B, T] or inputs_embeds [B, T, H]")


def flat_mask(inputs: dict[str, Any], name: str, before: str) -> Tensor | None:
    """The mask of this name, [B, T] or None. Raises LoraLabError for one that cannot be extended by `before`, a prompt or a prefix."""
    mask = inputs.get(name)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        given = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise LoraLabError(f"{name} with {given}: before a {before} it can be extended only as [B, T], 1 for text")
    return mask
