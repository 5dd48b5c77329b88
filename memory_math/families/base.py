"""What every family says of itself: its sizes, its parameter tensors by name, and its linear layers.

A family writes down `body` (what all its classes share) with the helpers below, in the order in which the forward pass comes by; the
counts and the layers that "all-linear" names follow from it. Parameter names are those of transformers 5.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import MemoryMathError
from .fields import Fields

PARTS = (  # the order of a table
    "embedding", "token types", "positions", "relative positions", "q", "k", "v", "o", "router", "experts", "gate", "up", "down",
    "norms", "pooler", "head", "classifier", "biases",
)  # fmt: skip
ATTENTION_PARTS = frozenset("qkvo")


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer: its module path and its two sizes."""

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
class Tensor:
    """One parameter tensor. A vector is one row; a stack of matrices is all their rows, one below the other.

    parts: (part, elements) of what it holds; a fused query_key_value holds three. linear: the layer of which it is the weight, where
    "all-linear" names that layer.
    """

    path: str
    rows: int
    columns: int
    parts: tuple[tuple[str, int], ...]
    linear: LinearLayer | None = None

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def in_attention(self) -> bool:
        """Whether it projects into or out of an attention: q, k, v, o, or several of them in one."""
        return all(part in ATTENTION_PARTS for part, _ in self.parts)


def matrix(path: str, rows: int, columns: int, part: str) -> Tensor:
    return Tensor(path, rows, columns, ((part, rows * columns),))


def vector(path: str, size: int, part: str) -> Tensor:
    return matrix(path, 1, size, part)


def norm(path: str, width: int, bias: bool = False) -> Iterator[Tensor]:
    """RMSNorm, or LayerNorm with its bias; both vectors count as norms."""
    yield vector(f"{path}.weight", width, "norms")
    if bias:
        yield vector(f"{path}.bias", width, "norms")


def linear(path: str, inputs: int, parts: Mapping[str, int], bias: bool = False, conv1d: bool = False) -> Iterator[Tensor]:
    """nn.Linear, [outputs, inputs], or with `conv1d` transformers' Conv1D, [inputs, outputs]. parts: part -> its columns of the output."""
    outputs = sum(parts.values())
    shape = (inputs, outputs) if conv1d else (outputs, inputs)
    shares = tuple((part, inputs * columns) for part, columns in parts.items())
    yield Tensor(f"{path}.weight", *shape, shares, LinearLayer(path, inputs, outputs, bias))
    if bias:
        yield vector(f"{path}.bias", outputs, "biases")


@dataclass(frozen=True)
class Architecture(abc.ABC):
    """The sizes of a model: h hidden, L layers, a heads of hd, kv key/value heads, f the MLP's width, V the vocabulary.

    task: which of the family's classes it is, by the end of the class's name ("ForCausalLM", "Model", ...); labels: of a classifier.
    activation: of the MLP, by transformers' name. dropout: of the residual stream, in training; attention_dropout: of the softmax.
    """

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    tied: bool
    task: str = "ForCausalLM"
    labels: int = 2
    activation: str = ""
    dropout: float = 0.0
    attention_dropout: float = 0.0

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # of config.json; the first is the one that gave the family its name here
    class_names: ClassVar[tuple[str, ...]]  # what the names of its classes begin with
    tasks: ClassVar[tuple[str, ...]] = ("ForCausalLM", "Model", "ForSequenceClassification")  # the first where a config names no class
    body_name: ClassVar[str] = "model"  # where a class with a head keeps its body

    @property
    def query_width(self) -> int:
        """Columns of q and of the attention's output: a * hd, which need not be h."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of k and of v: kv * hd."""
        return self.kv_heads * self.head_dim

    @property
    def learned_positions(self) -> int | None:
        """The longest row of a model that learns its positions; None where they are computed."""
        return getattr(self, "positions", None)

    @property
    def root(self) -> str:
        """What the paths of the body begin with: nothing in the bare model."""
        return "" if self.task == "Model" else f"{self.body_name}."

    @classmethod
    @abc.abstractmethod
    def read(cls, fields: Fields, task: str, labels: int) -> Architecture:
        """From the fields of a config.json, of transformers 4 or 5."""

    @classmethod
    def from_config(cls, config: Mapping[str, object], name: str = "config") -> Architecture:
        """Raises MemoryMathError for a class of models that is not in `tasks`, a missing field, a value of the wrong kind."""
        fields = Fields(config, name)
        return cls.read(fields, fields.task(cls.class_names, cls.tasks), fields.labels())

    def beside_linears(self) -> tuple[LinearLayer, ...]:
        """What PEFT's "all-linear" gives an adapter beside `linears`."""
        return ()

    def of_transformers_4(self) -> Architecture:
        """The same model with the layers that it had before transformers 5."""
        return self

    def with_loss(self) -> Architecture:
        """What training takes this for: itself, or where it has no loss of its own, the class that has one."""
        return self

    @abc.abstractmethod
    def body(self) -> Iterator[Tensor]:
        """The tensors that all classes of the family share."""

    def top(self) -> Iterator[Tensor]:
        """The head of the class: of a causal language model the output embedding, where it is not tied, and of a classifier its score."""
        if self.task == "ForCausalLM" and not self.tied:
            yield matrix("lm_head.weight", self.vocabulary, self.hidden, "head")
        if self.task == "ForSequenceClassification":
            yield matrix("score.weight", self.labels, self.hidden, "classifier")

    def tensors(self) -> Iterator[Tensor]:
        """Every parameter tensor of the model, each stored once: a tied head has none of its own."""
        yield from self.body()
        yield from self.top()

    def parameter_tensors(self) -> Iterator[tuple[str, int, int]]:
        """(name, rows, columns) of every parameter tensor."""
        return ((tensor.path, tensor.rows, tensor.columns) for tensor in self.tensors())

    def linears(self) -> tuple[LinearLayer, ...]:
        """What "all-linear" names: every nn.Linear and Conv1D but the output embedding and a classifier, in the order of the forward pass."""
        return tuple(tensor.linear for tensor in self.tensors() if tensor.linear is not None)

    def shard(self, devices: int) -> Architecture:
        """What one of `devices` tensor-parallel devices holds: its share of the heads, of the MLP and of the vocabulary (padded to divide).

        Key/value heads fewer than devices are held more than once. Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
        Raises MemoryMathError where heads or the MLP do not divide.
        """
        for size, what in ((self.heads, "heads"), (self.mlp_width, "columns of the MLP")):
            if size % devices:
                raise MemoryMathError(f"tensor_parallel={devices}: the {size} {what} of {self.name} do not divide into {devices}")
        if self.kv_heads % devices and devices % self.kv_heads:
            raise MemoryMathError(f"tensor_parallel={devices}: the {self.kv_heads} key/value heads of {self.name} do not divide into {devices}")
        return replace(
            self, heads=self.heads // devices, kv_heads=max(self.kv_heads // devices, 1), mlp_width=self.mlp_width // devices,
            vocabulary=-(-self.vocabulary // devices),
        )  # fmt: skip

    def parts(self) -> dict[str, int]:
        """Parameters by part. "head" is 0 where a language model's output embedding is tied."""
        found: dict[str, int] = {}
        for tensor in self.tensors():
            for part, elements in tensor.parts:
                found[part] = found.get(part, 0) + elements
        has_head = self.task not in ("Model", "EncoderModel") and "Classification" not in self.task
        shown = {"biases", *(["head"] if has_head else [])}
        return {part: found.get(part, 0) for part in PARTS if part in found or part in shown}
