"""The configs of T5, FLAN-T5 and mT5, of both generations of transformers.

The decoder's output is multiplied by d_model**-0.5 before the head in T5 1.0, whose head is the embedding, and not in 1.1 and FLAN, which
have one of their own. transformers 4 reads both from tie_word_embeddings. transformers 5 writes tie_word_embeddings=true for every T5, and
whether it is scaled as scale_decoder_outputs; what is not scaled has its own head, unless the weights have none (`without` in t5.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from ..errors import LoraLabError, did_you_mean
from .config import check_config, flags, shares

MLPS = ("relu", "gated-gelu", "gated-silu")


@dataclass(frozen=True)
class T5Config:
    """The fields of a config.json that shape the model; `source` keeps the whole file. scale_decoder_outputs: by d_model**-0.5, before the head."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    dropout_rate: float
    layer_norm_epsilon: float
    feed_forward_proj: str
    tie_word_embeddings: bool
    scale_decoder_outputs: bool
    pad_token_id: int
    eos_token_id: int | list[int]
    decoder_start_token_id: int
    source: dict[str, Any] = field(default_factory=dict, repr=False)

    family: ClassVar[str] = "T5"
    task: ClassVar[str] = "ForConditionalGeneration"
    defaults: ClassVar[dict[str, Any]] = {"feed_forward_proj": "relu"}
    is_encoder_decoder: ClassVar[bool] = True

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> T5Config:
        """Read a Hugging Face config, of transformers 4 or 5. Raises LoraLabError for a missing or unsupported field."""
        needed = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads")
        optional = {"d_kv": 64, "num_decoder_layers": source.get("num_layers"), "relative_attention_num_buckets": 32,
                    "relative_attention_max_distance": 128}  # fmt: skip
        check_config(source, cls.family, needed, optional, "layer_norm_epsilon")
        given = {"layer_norm_epsilon": 1e-6, "eos_token_id": 1, **cls.defaults, **source}
        shape = {name: source[name] for name in needed} | {name: given.get(name) or usual for name, usual in optional.items()}
        tied = flags(given, {"tie_word_embeddings": True})["tie_word_embeddings"]
        scaled = flags(given, {"scale_decoder_outputs": tied})["scale_decoder_outputs"]
        pad, start = given.get("pad_token_id") or 0, given.get("decoder_start_token_id")
        rate = shares(given, {"dropout_rate": 0.1})["dropout_rate"]
        config = cls(**shape, dropout_rate=rate, layer_norm_epsilon=given["layer_norm_epsilon"],
                     feed_forward_proj=given["feed_forward_proj"], eos_token_id=given["eos_token_id"],
                     tie_word_embeddings=tied and scaled,
                     scale_decoder_outputs=scaled, pad_token_id=pad, decoder_start_token_id=pad if start is None else start,
                     source=source)  # fmt: skip
        config._check()
        return config

    def _check(self) -> None:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if self.feed_forward_proj not in MLPS:
            wrong = self.feed_forward_proj
            raise LoraLabError(f"feed_forward_proj={wrong!r}: expected one of {', '.join(MLPS)}{did_you_mean(wrong, MLPS)}")
        if buckets < 4 or distance <= buckets // 2:
            raise LoraLabError(f"relative_attention_num_buckets={buckets}, relative_attention_max_distance={distance}: expected at least 4 buckets, "
                               "and a distance beyond half of them")  # fmt: skip
        for name in ("pad_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise LoraLabError(f"{name}={token!r} in config.json: expected an id, 0 to {self.vocab_size - 1}")

    @property
    def hidden_size(self) -> int:
        return self.d_model

    def to_dict(self) -> dict[str, Any]:
        """The config.json this model would be saved with; what the file it came from said beyond our fields is kept."""
        ours = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "source"}
        names = {"model_type": self.family.lower(), "architectures": [f"{self.family}{self.task}"]}
        return {**self.source, **ours, "is_encoder_decoder": self.is_encoder_decoder, **names}


@dataclass(frozen=True)
class MT5Config(T5Config):
    """scale_decoder_outputs: never, whatever is tied."""

    family = "MT5"
    defaults: ClassVar[dict[str, Any]] = {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False}


@dataclass(frozen=True)
class T5EncoderConfig(T5Config):
    task = "EncoderModel"
    is_encoder_decoder: ClassVar[bool] = False
