"""Counts that several rows need: adapters, prompts and prefixes by the shapes of a model, and what one device holds under ZeRO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..architectures import LinearLayer, architecture_of
from ..optimizers import Shape, state_bytes
from ..parallel import Parallel
from ..quantization import quantized_bytes
from ..targets import adapted_layers

ATTENTION_QV = ("q_proj", "v_proj")


def lora_elements(layers: Iterable[LinearLayer], rank: int, *, dora: bool = False) -> int:
    """A [r, in] and B [out, r] of every layer; DoRA's magnitudes are one number per output.

    >>> lora_elements([LinearLayer("w", 512, 64)], rank=8)
    4608
    """
    return sum(rank * (layer.inputs + layer.outputs) + (layer.outputs if dora else 0) for layer in layers)


def lora_parameters(model: object, rank: int, targets: str | Sequence[str] = ATTENTION_QV, *, dora: bool = False) -> int:
    """Of an adapter on the layers that `targets` names, which are found as `predict` finds them."""
    return lora_elements(adapted_layers(architecture_of(model), targets).values(), rank, dora=dora)


def stacked(count: int, inputs: int, outputs: int) -> list[LinearLayer]:
    """`count` equal layers, for models whose family is not read from a config."""
    return [LinearLayer(str(number), inputs, outputs) for number in range(count)]


def prompt_parameters(model: object, tokens: int) -> int:
    """`tokens` vectors as wide as an embedding."""
    return tokens * architecture_of(model).hidden


def prefix_parameters(model: object, tokens: int) -> int:
    """A key and a value for each token, block and key/value head."""
    shape = architecture_of(model)
    return tokens * 2 * shape.layers * shape.kv_width


def zero_states_bytes(parameters: int, stage: int, devices: int) -> float:
    """Model states on one device: 16-bit weights and gradients, float32 masters and Adam's two states. The step counter is left out."""
    division = Parallel(stage, devices)
    states = state_bytes("adam", [Shape(1, parameters, 2)], masters=True) - state_bytes("adam", [Shape(1, 0, 2)], masters=True)
    return 2 * parameters / division.weight_shards + 2 * parameters / division.gradient_shards + states / division.state_shards


def quantized_linear_bytes(model: object, quantization: str) -> int:
    """All linear layers of a model; the output embedding is not among them."""
    return sum(quantized_bytes(quantization, layer.outputs, layer.inputs) for layer in architecture_of(model).linears())
