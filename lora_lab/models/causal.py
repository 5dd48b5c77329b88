"""What a causal language model does around its decoder, the same for every family: embed, decode, head, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from ..selection import RowSelection
from ..targets import lora_layers
from .attention import Mask, attention_mask, documents_of, padding_cannot_matter
from .base import CausalLMOutput, PretrainedModel, check_ids
from .blocks import IGNORE, project
from .cache import KVCache
from .losses import next_token_loss
from .recompute import Recomputable


class Decoder(nn.Module):
    """Embeddings to hidden states, [B, T, H] -> [B, T, H], through blocks that keep their past in a cache."""

    def __init__(self, config: Any, **factory: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None, padding: Tensor | None) -> Tensor:
        """positions: [B or 1, T].  mask: see `Mask`; None is plain causality.  padding: [B, S] or None, for what counts positions itself."""
        raise NotImplementedError

    @property
    def recomputes(self) -> bool:
        """Is checkpointing at work in a forward pass made now? Without gradients it never is, and no token of generation looks for it."""
        return torch.is_grad_enabled() and any(module.recomputes for module in self.modules() if isinstance(module, Recomputable))


class CausalLM(PretrainedModel):
    """A decoder with its language-model head. Arguments and outputs are named as in transformers."""

    decoder_path: ClassVar[str] = "model"
    decoder_class: ClassVar[type[Decoder]]

    def __init__(self, config: Any, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.add_module(self.decoder_path, self.decoder_class(config, **factory))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        self.tie_weights()

    @property
    def decoder(self) -> Decoder:
        return self.get_submodule(self.decoder_path)  # type: ignore[return-value]

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, past_key_values: Any = None,
                use_cache: bool = False, logits_to_keep: int = 0, document_lengths: Sequence[int] | None = None) -> CausalLMOutput:  # fmt: skip
        """input_ids: [B, T] or inputs_embeds: [B, T, H].  attention_mask: [B, S], 1 for text.  position_ids: [B, T].

        labels: [B, T], -100 where none; shifted here, loss is the mean over the others. In training mode with labels `.logits` is
        None: only labelled positions are computed.  logits_to_keep: compute logits of the last so many positions only (0: all).
        document_lengths: the one row is several documents, each to be seen by itself only, its positions from 0; no padding, no cache.
        Raises LoraLabError for both or neither of input_ids and inputs_embeds, shapes that differ, use_cache=True under gradient
        checkpointing, and on the CPU for an id outside the vocabulary (a GPU stops by itself).
        """
        x = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        self._check(x, attention_mask, position_ids, labels, cache)
        if self.training and labels is not None and padding_cannot_matter(attention_mask, labels):
            attention_mask = None
        if document_lengths is not None:
            self._check_packed(attention_mask, cache)
            mask: Mask = (documents := documents_of(document_lengths, x.shape[0], x.shape[1]))
            position_ids = documents.positions(x.device) if position_ids is None else position_ids
            labels = None if labels is None else labels.masked_fill(documents.positions(x.device) == 0, IGNORE)  # nothing stands before them
        else:
            mask = self.mask(x, attention_mask, cache)
        if position_ids is None:
            past = cache.length if cache is not None else 0
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        hidden = self.decoder(x, position_ids, mask, cache, attention_mask)
        head = self.get_output_embeddings()
        loss = None if labels is None else next_token_loss(hidden, labels, head)
        logits = None
        if labels is None or not self.training:
            logits = project(head, hidden[:, -logits_to_keep:].contiguous())  # of a slice F.linear would copy the weight for each row
        return CausalLMOutput(loss=loss, logits=logits, past_key_values=cache if use_cache else None)

    def mask(self, x: Tensor, padding: Tensor | None, cache: KVCache | None) -> Mask:
        return attention_mask(padding, x.shape[0], x.shape[1], cache.length if cache is not None else 0, x.device)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise LoraLabError("give either input_ids [B, T] or inputs_embeds [B, T, H], not both and not neither")
        if input_ids is None:
            return inputs_embeds  # type: ignore[return-value]
        embedding = self.get_input_embeddings()
        check_ids("input_ids", input_ids, len(embedding.weight))
        return embedding(input_ids)

    def _cache(self, past: Any, use_cache: bool) -> KVCache | None:
        if use_cache and self.decoder.recomputes:
            raise LoraLabError("use_cache=True under gradient checkpointing in training mode: the recompute would fill the cache twice")
        if past is None:
            return KVCache(self.config.num_hidden_layers) if use_cache else None
        return past if isinstance(past, KVCache) else KVCache(past)

    def _check(self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, labels: Tensor | None, cache: KVCache | None) -> None:
        if x.ndim != 3 or x.shape[2] != self.config.hidden_size:
            raise LoraLabError(f"the input's embeddings are {list(x.shape)}, expected [B, T, {self.config.hidden_size}] from input_ids [B, T]")
        if cache is not None and len(cache) != self.config.num_hidden_layers:
            raise LoraLabError(f"past_key_values has {len(cache)} layers, the model has {self.config.num_hidden_layers}")
        batch, length, past = x.shape[0], x.shape[1], cache.length if cache is not None else 0
        for name, given, *shapes in (("attention_mask", attention_mask, [batch, past + length]), ("labels", labels, [batch, length]),
                                     ("position_ids", position_ids, [batch, length], [1, length])):  # fmt: skip
            if given is not None and list(given.shape) not in shapes:
                raise LoraLabError(f"{name} is {list(given.shape)}, expected {shapes[0]} (the input has {length} positions, the cache {past})")
        if labels is not None:
            check_ids("labels", labels, len(self.get_input_embeddings().weight), also=IGNORE)

    def _check_packed(self, attention_mask: Tensor | None, cache: KVCache | None) -> None:
        if attention_mask is not None or cache is not None:
            given = "a cache" if cache is not None else "an attention_mask"
            raise LoraLabError(f"document_lengths together with {given}: a packed row has no padding, and is not continued")
        if not torch.compiler.is_compiling():
            refuse_per_sample(self, "document_lengths")


def refuse_per_sample(model: nn.Module, asked: str) -> None:
    """Raise LoraLabError inside per_sample: adapters are chosen by row there, and a packed row is several documents."""
    if any(isinstance(layer.lora_active, RowSelection) for layer in lora_layers(model).values()):
        raise LoraLabError(f"{asked} inside per_sample: adapters are chosen by row there, but a packed row is several documents: give padded rows "
                           "[B, T] with an attention_mask, or choose one adapter for all of them with lora_lab.use")  # fmt: skip
