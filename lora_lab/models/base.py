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
from ..weight_files import weights_sha256
from .cache import KVCache
from .recompute import Mode, recompute_mode, set_recompute


@dataclass
class CausalLMOutput:
    """loss: scalar or None.  logits: [B, T, V] or None.  past_key_values: the cache, with use_cache=True."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None


class PretrainedModel(nn.Module):
    """A model with a `config`, an embedding and, for most, a head. The paths are transformers'."""

    config_class: ClassVar[Any]
    embedding_path: ClassVar[str] = "model.embed_tokens"
    head_path: ClassVar[str | None] = "lm_head"
    new_head: ClassVar[tuple[str, ...]] = ()  # modules that begin anew where a checkpoint of another task is loaded
    config: Any
    name_or_path: str = ""
    source_folder: Path | None = None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.get_submodule(self.embedding_path)  # type: ignore[return-value]

    def get_output_embeddings(self) -> Any:
        return None if self.head_path is None else self.get_submodule(self.head_path)

    def tie_weights(self) -> None:
        """One Parameter under all its names, where the config says so."""
        for second, first in self.tied.items():
            owner, _, leaf = second.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(first))

    @property
    def tied(self) -> dict[str, str]:
        """Parameters that are another one under a second name, which a file need not repeat: {second: first}. For most the head's weight."""
        if self.head_path is None or not self.config.tie_word_embeddings:
            return {}
        return {f"{self.head_path}.weight": f"{self.embedding_path}.weight"}

    @classmethod
    def rename(cls, name: str) -> str | None:
        """The name here of a tensor in a checkpoint; None for one that is no parameter (masks and frequencies that old files carry)."""
        return None if name.endswith("rotary_emb.inv_freq") else name

    @classmethod
    def stored_name(cls, name: str) -> str:
        """The name in a checkpoint of a tensor here."""
        return name

    def without(self, missing: set[str]) -> set[str]:
        """Told which parameters a checkpoint has no tensor for; returns those that the model cannot do without."""
        return missing

    def gradient_checkpointing_enable(self, mode: Mode = True) -> None:
        """Keep less in forward and compute it again in backward (training mode only); see recompute.py for the modes."""
        set_recompute(self, mode)

    def gradient_checkpointing_disable(self) -> None:
        set_recompute(self, False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return recompute_mode(self)

    @property
    def base_sha256(self) -> str | None:
        """SHA-256 of the weights on disk this model was loaded from; adapters record it.

        None for a model made by hand, and (with a warning) where the files are no longer there: an adapter can be saved all the same.
        """
        try:
            return weights_sha256(self.source_folder) if self.source_folder is not None else None
        except (LoraLabError, OSError) as error:
            warnings.warn(f"the base's SHA-256 is not recorded: {error}", stacklevel=3)
            return None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model, ours or transformers', answers what an encoder has read, rather than continues it."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def context_of(model: nn.Module) -> int | None:
    """Tokens of text a row may have, where the model says so: some of its positions are not for text, or taken by virtual tokens before it."""
    length = context_in(getattr(model, "config", None))
    return None if length is None else length - getattr(model, "virtual_tokens", 0)


def context_in(config: Any) -> int | None:
    """Positions that a config of ours or transformers' allows; None where it says nothing.

    Rotary positions that are stretched (rope_type "linear" and "dynamic") go on beyond max_position_embeddings, which there says what the model was
    trained on at first; with the other kinds it is the whole.
    """
    length = getattr(config, "context_length", getattr(config, "max_position_embeddings", None))
    return None if length is None else int(length * _stretched(config))


def _stretched(config: Any) -> float:
    rope = getattr(config, "rope", None)
    if rope is None:
        given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kind, factor = given.get("rope_type", given.get("type")), given.get("factor")
    else:
        kind, factor = rope.kind, rope.numbers.get("factor")
    return max(1.0, float(factor)) if kind in ("linear", "dynamic") and isinstance(factor, (int, float)) else 1.0


def longest_row(model: nn.Module, *limits: int | None) -> int | None:
    """The smallest of the limits that are given and of the model's context; None where nothing limits a row."""
    return min((limit for limit in (*limits, context_of(model)) if limit is not None), default=None)


def pad_id_of(tokenizer: Any) -> int:
    """What fills up a row; where the tokenizer has nothing for that, or is None, word 0 does, as the mask hides it."""
    return getattr(tokenizer, "pad_token_id", 0) or 0


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
