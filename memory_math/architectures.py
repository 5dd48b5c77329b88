"""The shape of a model, read from its config: how many parameters it has, part by part, and which linear layers.

    count_parameters("smollm2-135m")                  a preset
    count_parameters("path/to/model")                 a folder with config.json, or the file itself
    count_parameters({"model_type": "llama", ...})    the same as a dict
    count_parameters(model)                           anything with a .config

Today the Llama family (Llama 1 to 3, SmolLM2, TinyLlama). Every preset's total is held by a test to the integer that the built model has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import MemoryMathError
from .presets import PRESETS

SUPPORTED_TYPES = ("llama",)


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer of a block: its module name and its two sizes."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Architecture:
    """A Llama-like decoder: h hidden, L layers, a heads of hd, kv key/value heads, f the MLP's width, V the vocabulary."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def query_width(self) -> int:
        """Columns of q and of the attention's output: a * hd, which need not be h."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of k and of v: kv * hd."""
        return self.kv_heads * self.head_dim

    def linears(self) -> tuple[LinearLayer, ...]:
        """The linear layers of one block, in the order the forward pass calls them."""
        h, q, kv, f = self.hidden, self.query_width, self.kv_width, self.mlp_width
        attention = [("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h)]
        mlp = [("gate_proj", h, f), ("up_proj", h, f), ("down_proj", f, h)]
        return tuple(
            [LinearLayer(f"self_attn.{name}", i, o, self.attention_bias) for name, i, o in attention]
            + [LinearLayer(f"mlp.{name}", i, o, self.mlp_bias) for name, i, o in mlp]
        )

    def parameter_tensors(self) -> Iterator[tuple[str, int, int]]:
        """(name, rows, columns) of every parameter tensor, each stored once: a tied head has none of its own. A vector is one row."""
        yield "model.embed_tokens.weight", self.vocabulary, self.hidden
        for path in (f"model.layers.{layer}" for layer in range(self.layers)):
            for linear in self.linears():
                yield f"{path}.{linear.name}.weight", linear.outputs, linear.inputs
                if linear.bias:
                    yield f"{path}.{linear.name}.bias", 1, linear.outputs
            yield f"{path}.input_layernorm.weight", 1, self.hidden
            yield f"{path}.post_attention_layernorm.weight", 1, self.hidden
        yield "model.norm.weight", 1, self.hidden
        if not self.tied:
            yield "lm_head.weight", self.vocabulary, self.hidden

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config") -> Architecture:
        """From the fields of a config.json, of transformers 4 or 5.

        Raises MemoryMathError for another model type, and for a missing field, with what the field is for.
        """
        _check_type(config, name)
        fields = {field: _whole(config, field, purpose, name) for field, purpose in FIELDS.items()}
        heads = fields["num_attention_heads"]
        kv_heads = _whole(config, "num_key_value_heads", "the key/value heads", name, default=heads)
        head_dim = _whole(config, "head_dim", "the width of one head", name, default=0) or _even_split(fields["hidden_size"], heads, name)
        _even_split(heads, kv_heads, name)
        return cls(
            name, fields["vocab_size"], fields["hidden_size"], fields["num_hidden_layers"], heads, kv_heads, head_dim,
            fields["intermediate_size"], bool(config.get("tie_word_embeddings", False)),
            bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False)),
        )  # fmt: skip


FIELDS = {
    "vocab_size": "the rows of the embedding",
    "hidden_size": "the width of the residual stream",
    "num_hidden_layers": "the number of blocks",
    "num_attention_heads": "the query heads",
    "intermediate_size": "the width of the MLP",
}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part, each tensor once; `total` is their sum and `parts` maps part to count."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        width = max(len(part) for part in self.parts)
        lines = [f"{part:<{width}} {count:>18,}" for part, count in self.parts.items()]
        return "\n".join([self.name, *lines, f"{'total':<{width}} {self.total:>18,}"])


def count_parameters(source: object) -> ParameterCount:
    """The exact number of parameters, part by part.

    source: a preset name, a config dict, a path to a folder or a config.json, or a model with a .config.

    >>> count_parameters("smollm2-135m").total
    134515008
    """
    arch = architecture_of(source)
    parts: dict[str, int] = {"embedding": arch.vocabulary * arch.hidden}
    for linear in arch.linears():
        parts[linear.name.rpartition(".")[2].removesuffix("_proj")] = arch.layers * linear.weights
    parts["norms"] = (2 * arch.layers + 1) * arch.hidden
    parts["head"] = 0 if arch.tied else arch.vocabulary * arch.hidden
    parts["biases"] = arch.layers * sum(linear.parameters - linear.weights for linear in arch.linears())
    return ParameterCount(arch.name, parts)


def architecture_of(source: object) -> Architecture:
    """The architecture of a preset name, a config dict, a path, or an object with a .config."""
    if isinstance(source, Architecture):
        return source
    if isinstance(source, Mapping):
        return Architecture.from_config(source)
    if isinstance(source, (str, Path)):
        return _from_name(str(source))
    config = getattr(source, "config", None)
    to_dict = getattr(config, "to_dict", None)
    fields = config if isinstance(config, Mapping) else to_dict() if callable(to_dict) else getattr(config, "__dict__", None)
    if not fields:
        expected = "a preset name, a config dict, a path, or a model with a .config"
        raise MemoryMathError(f"{type(source).__name__} has no config to read: expected {expected}")
    return Architecture.from_config(fields, type(source).__name__)


def _from_name(name: str) -> Architecture:
    preset = PRESETS.get(name.lower())
    if preset is not None:
        return Architecture.from_config(preset, name.lower())
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return Architecture.from_config(_read_json(path), path.parent.name or str(path))
    near = get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"presets: {', '.join(PRESETS)}"
    raise MemoryMathError(f"{name!r} is neither a preset nor a folder with a config.json nor such a file: {hint}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise MemoryMathError(f"{path}: cannot be read as JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise MemoryMathError(f"{path}: expected a JSON object with the model's fields, found {type(content).__name__}")
    return content


def _check_type(config: Mapping[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind not in SUPPORTED_TYPES:
        raise MemoryMathError(f"{name}: model_type={kind!r} is not modelled yet; supported now: {', '.join(SUPPORTED_TYPES)}")
    if config.get("quantization_config"):
        raise MemoryMathError(f"{name}: quantization_config is set; quantised weights are not modelled yet, give the original's config")


def _whole(config: Mapping[str, Any], field: str, purpose: str, name: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise MemoryMathError(f"{name}: the config has no {field} ({purpose}); found: {', '.join(sorted(config)) or 'nothing'}")
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != default):
        raise MemoryMathError(f"{name}: {field}={value!r} ({purpose}): expected a whole number of at least 1")
    return value


def _even_split(total: int, parts: int, name: str) -> int:
    if total % parts:
        fields = "num_attention_heads, num_key_value_heads and head_dim"
        raise MemoryMathError(f"{name}: {total} does not divide into {parts} heads: check {fields}")
    return total // parts
