"""Reading the fields of a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ..checks import LARGEST, is_number, is_size
from ..errors import LoraLabError

# How configs call the numbers of layers and of heads
DEPTHS, HEADS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), ("num_attention_heads", "n_head", "num_heads")


def check_config(source: dict[str, Any], family: str, needed: Iterable[str], optional: Iterable[str] = (), epsilon: str = "rms_norm_eps") -> None:
    """Raise LoraLabError for a missing field, one of the wrong kind, and what is not modelled here.

    needed, optional: whole numbers of at least 1.  epsilon: the name of the norms' small number.
    """
    if missing := [name for name in needed if source.get(name) is None]:
        raise LoraLabError(f"config.json lacks {', '.join(missing)}: a {family} cannot be built without")
    for name in (*needed, *optional):
        value = source.get(name)
        if value is not None and not is_size(value):
            raise LoraLabError(f"{name}={value!r} in config.json: expected a whole number of at least 1, at most {LARGEST:,}")
    eps = source.get(epsilon, 1e-6)
    if not is_number(eps) or eps < 0:
        raise LoraLabError(f"{epsilon}={eps!r} in config.json: expected a small positive number")
    if source.get("quantization_config"):
        raise LoraLabError("config.json has a quantization_config: quantised weights are not read here; load the original model")


def check_against(source: dict[str, Any], shapes: Collection[Collection[int]]) -> None:
    """Raise LoraLabError for more layers than the weights have tensors, and more heads than any has rows or columns.

    A model is made before its first tensor is read, and each layer takes memory.  shapes: of all tensors.
    """
    most = {**dict.fromkeys(DEPTHS, len(shapes)), **dict.fromkeys(HEADS, max((size for shape in shapes for size in shape), default=0))}
    for name, limit in most.items():
        if isinstance(value := source.get(name), int) and value > limit:
            raise LoraLabError(f"{name}={value} in config.json, but the weights have {len(shapes)} tensors, the longest side of which is "
                               f"{most[HEADS[0]]}: another model's config.json")  # fmt: skip


def flags(source: dict[str, Any], defaults: dict[str, bool]) -> dict[str, Any]:
    """These yes-or-no fields, null being no. Raises LoraLabError for any other kind."""
    values = {name: source.get(name, default) for name, default in defaults.items()}
    for name, value in values.items():
        if value is not None and not isinstance(value, bool):
            raise LoraLabError(f"{name}={value!r} in config.json: expected true or false")
    return {name: bool(value) for name, value in values.items()}


def shares(source: dict[str, Any], defaults: dict[str, float]) -> dict[str, Any]:
    """These dropout probabilities, null being none. Raises LoraLabError for what is no number from 0 to 1."""
    values = {name: source.get(name, default) for name, default in defaults.items()}
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1):
            raise LoraLabError(f"{name}={value!r} in config.json: expected a probability, from 0 to 1")
    return {name: float(value or 0.0) for name, value in values.items()}


def check_heads(hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        raise LoraLabError(f"{heads} attention heads cannot share a width of {hidden_size} in config.json: expected a divisor")
