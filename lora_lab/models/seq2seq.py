"""What an encoder-decoder does around its two stacks, the same for every family: encode, shift the labels, decode, head, loss.

The encoder reads `input_ids` once. The decoder begins with `decoder_start_token_id` and writes one token after another; in training
all at once, from the labels moved one place to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from .base import PretrainedModel, check_ids
from .blocks import IGNORE
from .cache import EncoderDecoderCache
from .losses import labelled_loss
from .recompute import Recomputable


@dataclass
class EncoderOutput:
    """last_hidden_state: [B, S, H]."""

    last_hidden_state: Tensor


@dataclass
class Seq2SeqLMOutput:
    """loss: scalar or None.  logits: [B, T, V] or None.  past_key_values: the cache, with use_cache=True.

    encoder_last_hidden_state: [B, S, H]; given back as `encoder_outputs`, the next call need not encode again.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    encoder_last_hidden_state: Tensor | None = None


class Seq2SeqLM(PretrainedModel):
    """An encoder, a decoder and its language-model head. Arguments and outputs are named as in transformers.

    B rows, S positions of the encoder, T of the decoder, H hidden, V vocabulary.
    """

    decoder_path: ClassVar[str] = "decoder"

    def encode(self, x: Tensor, padding: Tensor | None, past: EncoderDecoderCache | None = None) -> Tensor:
        """x: [B, S, H] embeddings.  padding: [B, past + S], 1 for text.  Returns [B, S, H].

        past: keys and values that each layer looks at, too, before those of the text (a prefix); these are added to it.
        """
        raise NotImplementedError

    def decode(self, x: Tensor, encoded: Tensor, encoder_padding: Tensor | None, padding: Tensor | None, cache: EncoderDecoderCache | None) -> Tensor:
        """x: [B, T, H] embeddings.  padding: [B, past + T].  Returns what goes into the head, [B, T, H]."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None,
                decoder_attention_mask: Tensor | None = None, encoder_outputs: Any = None, past_key_values: Any = None,
                inputs_embeds: Tensor | None = None, decoder_inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                use_cache: bool = False) -> Seq2SeqLMOutput:  # fmt: skip
        """input_ids: [B, S], or inputs_embeds: [B, S, H], or encoder_outputs: what the encoder made of them.  attention_mask: [B, S].

        decoder_input_ids: [B, T], or decoder_inputs_embeds: [B, T, H], or none of them: then the labels, one place to the right.
        decoder_attention_mask: [B, past + T].  labels: [B, T], -100 where none, each at the place that is to predict it (nothing is
        shifted against the logits); the loss is the mean over the others. In training mode with labels `.logits` is None: only labelled
        positions are computed.  encoder_outputs: has .last_hidden_state, or is a tuple that begins with it; takes the place of the inputs.
        Raises LoraLabError for inputs that are missing, given twice or of shapes that differ, use_cache=True under gradient
        checkpointing, and on the CPU for an id outside the vocabulary (a GPU stops by itself).
        """
        cache = self._cache(past_key_values, use_cache)
        given = None if encoder_outputs is None else _hidden(encoder_outputs)
        embedding = self.get_input_embeddings()
        source = embedded(embedding, input_ids, inputs_embeds, "", " (or encoder_outputs)") if given is None else given
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.shift_right(labels)
        target = embedded(embedding, decoder_input_ids, decoder_inputs_embeds, "decoder_", " (or labels)")
        self._check(source, target, attention_mask, decoder_attention_mask, labels, cache)
        encoded = self.encode(source, attention_mask) if given is None else given
        hidden = self.decode(target, encoded, attention_mask, decoder_attention_mask, cache)
        head = self.get_output_embeddings()
        loss = None if labels is None else labelled_loss(hidden, labels, head)
        logits = head(hidden) if labels is None or not self.training else None
        return Seq2SeqLMOutput(loss, logits, cache if use_cache else None, encoded)

    def shift_right(self, labels: Tensor) -> Tensor:
        """What the decoder is given to predict `labels` [B, T]: the start token, then the labels without the last; -100 becomes padding."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat((start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, self.config.pad_token_id)), dim=1)

    def _cache(self, past: Any, use_cache: bool) -> EncoderDecoderCache | None:
        if use_cache and _recomputes(self.get_submodule(self.decoder_path)):
            raise LoraLabError("use_cache=True under gradient checkpointing in training mode: the recompute would fill the cache twice")
        if past is None:
            return EncoderDecoderCache(self.config.num_decoder_layers) if use_cache else None
        return past if isinstance(past, EncoderDecoderCache) else EncoderDecoderCache(past)

    def _check(self, source: Tensor, target: Tensor, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None, labels: Tensor | None,
               cache: EncoderDecoderCache | None) -> None:  # fmt: skip
        hidden, layers = self.config.hidden_size, self.config.num_decoder_layers
        for name, x in (("encoder", source), ("decoder", target)):
            if x.ndim != 3 or x.shape[2] != hidden:
                raise LoraLabError(f"the {name}'s input is {list(x.shape)} as embeddings, expected [B, T, {hidden}] from ids [B, T]")
        if len(source) != len(target):
            raise LoraLabError(f"the encoder has {len(source)} rows, the decoder {len(target)}: expected as many")
        if cache is not None and len(cache) != layers:
            raise LoraLabError(f"past_key_values has {len(cache)} layers, the decoder has {layers}")
        batch, length, past = len(target), target.shape[1], cache.length if cache is not None else 0
        for name, given, shape in (("attention_mask", attention_mask, [batch, source.shape[1]]), ("labels", labels, [batch, length]),
                                   ("decoder_attention_mask", decoder_attention_mask, [batch, past + length])):  # fmt: skip
            if given is not None and list(given.shape) != shape:
                raise LoraLabError(f"{name} is {list(given.shape)}, expected {shape} (the decoder has {length} positions, its cache {past})")
        if labels is not None:
            check_ids("labels", labels, len(self.get_input_embeddings().weight), also=IGNORE)


def embedded(embedding: nn.Embedding, ids: Tensor | None, embeds: Tensor | None, side: str = "", instead: str = "") -> Tensor:
    """[B, T, H] of the one that is given. side: before the names in the error; instead: what else would have done."""
    if (ids is None) == (embeds is None):
        raise LoraLabError(f"give either {side}input_ids [B, T] or {side}inputs_embeds [B, T, H]{instead}, not both and not neither")
    if ids is None:
        return embeds  # type: ignore[return-value]
    check_ids(f"{side}input_ids", ids, len(embedding.weight))
    return embedding(ids)


def _hidden(encoder_outputs: Any) -> Tensor:
    """[B, S, H] of an output object, a tuple, or as it is."""
    if isinstance(encoder_outputs, (tuple, list)):
        encoder_outputs = encoder_outputs[0]
    hidden = getattr(encoder_outputs, "last_hidden_state", encoder_outputs)
    if not isinstance(hidden, Tensor):
        raise LoraLabError(f"encoder_outputs is a {type(encoder_outputs).__name__}: expected an object with .last_hidden_state, or a tuple of it")
    return hidden


def _recomputes(module: nn.Module) -> bool:
    return any(each.recomputes for each in module.modules() if isinstance(each, Recomputable))
