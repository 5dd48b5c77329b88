"""What a prompt has to know of the model it stands before, ours or transformers': what it is called with, and where its text goes in."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.models.base import is_encoder_decoder
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


def kind_of(base: nn.Module) -> Kind:
    """Raises LoraLabError for a model without an input embedding, or that takes no inputs_embeds."""
    check_embedding(base)
    causal, encodes = is_causal_lm(base), is_encoder_decoder(base)
    backbone = "" if causal or is_named(base, ANSWERING) else backbone_of(base)
    inner = base.get_submodule(backbone)
    arguments = tuple(inspect.signature(base.forward).parameters)
    if "inputs_embeds" not in inspect.signature(inner.forward).parameters:
        raise LoraLabError(f"a {type(base).__name__} takes no inputs_embeds, which is how a prompt goes in: expected a model of lora_lab.models "
                           "or transformers that reads text")  # fmt: skip
    return Kind(arguments, causal, encodes, backbone, first_position(inner))


def check_embedding(base: nn.Module) -> None:
    get = getattr(base, "get_input_embeddings", None)
    if not callable(get) or not isinstance(getattr(get(), "embedding_dim", None), int):
        raise LoraLabError(f"a {type(base).__name__} has no get_input_embeddings() that gives an nn.Embedding: a prompt stands among the vectors of "
                           "words, so the model has to have some")  # fmt: skip


def is_causal_lm(base: nn.Module) -> bool:
    return isinstance(base, CausalLM) or (is_named(base, CAUSAL) and not is_encoder_decoder(base))


def is_named(base: nn.Module, endings: tuple[str, ...]) -> bool:
    """Whether the model's class, or one that it derives from, has such a name: how transformers says what a model does."""
    return any(each.__name__.endswith(endings) for each in type(base).__mro__)


def backbone_of(base: nn.Module) -> str:
    """The name of the part that turns text into hidden states, below a head; "" where the model is that part."""
    for name in (getattr(base, "base_prefix", None), getattr(base, "base_model_prefix", None)):
        if name and name in dict(base.named_children()):
            return str(name)
    return ""


def first_position(backbone: nn.Module) -> int:
    """0; RoBERTa's positions begin behind its padding's (and OPT adds its own offset itself)."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def context_length(base: nn.Module, kind: Kind) -> int | None:
    """Positions a row of text may take; None where the config sets no limit, as T5's."""
    config: Any = getattr(base, "config", None)
    length = getattr(config, "context_length", None)
    if length is not None:
        return int(length)
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None else int(positions) - kind.first_position


def cache_length(cache: Any) -> int:
    """Positions in a key-value cache; 0 of None, and of the empty one that transformers' generate begins with (trap T5)."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache.length if hasattr(cache, "length") else cache[0][0].shape[2])


def rows_of(inputs: dict[str, Any]) -> int:
    """Rows of the batch. Raises LoraLabError where nothing in the inputs tells."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if isinstance(given := inputs.get(name), Tensor):
            return len(given)
    raise LoraLabError(f"the inputs are {sorted(inputs)}: expected input_ids [B, T] or inputs_embeds [B, T, H]")


def flat_mask(inputs: dict[str, Any], name: str, before: str) -> Tensor | None:
    """The mask of this name, [B, T] or None. Raises LoraLabError for one that cannot be extended by `before`, a prompt or a prefix."""
    mask = inputs.get(name)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        given = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise LoraLabError(f"{name} with {given}: before a {before} it can be extended only as [B, T], 1 for text")
    return mask
