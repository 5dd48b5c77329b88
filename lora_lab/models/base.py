"""What every model family has in common: its output, its embeddings, where it came from, checkpointing on and off."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from .blocks import KVCache


@dataclass
class CausalLMOutput:
    """loss: scalar or None.  logits: [B, T, V] or None.  past_key_values: the cache, with use_cache=True."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None


class PretrainedModel(nn.Module):
    """A model with a `config`, an embedding and a head."""

    config_class: ClassVar[Any]
    config: Any
    model: nn.Module
    lm_head: nn.Linear
    name_or_path: str = ""
    source_folder: Path | None = None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def tie_weights(self) -> None:
        """One Parameter for the embedding and the head, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each block's input in forward and recompute the block in backward (training mode only)."""
        self.model.gradient_checkpointing = True  # type: ignore[assignment]

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = False  # type: ignore[assignment]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.model.gradient_checkpointing)

    @property
    def base_sha256(self) -> str | None:
        """SHA-256 of the weights on disk this model was loaded from; adapters record it.

        None for a model made by hand, and (with a warning) where the files are no longer there: an adapter can be saved all the same.
        """
        from .loading import weights_sha256

        try:
            return weights_sha256(self.source_folder) if self.source_folder is not None else None
        except (LoraLabError, OSError) as error:
            warnings.warn(f"the base's SHA-256 is not recorded: {error}", stacklevel=3)
            return None


def check_ids(name: str, ids: Tensor, vocabulary: int, also: int = 0) -> None:
    """Raise LoraLabError for an id outside 0 .. vocabulary - 1 that is not `also`. On the CPU only: elsewhere looking would wait for the device."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    outside = ids[((ids < 0) | (ids >= vocabulary)) & (ids != also)]
    if len(outside):
        raise LoraLabError(f"{name} has the id {int(outside[0])}, the model's vocabulary ends at {vocabulary - 1}: is this the model's tokenizer?")


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in training or eval mode; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
