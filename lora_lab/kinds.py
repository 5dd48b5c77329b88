"""The layers that can be adapted, and what ``scaling * B A x`` is for each.

A kind says how a layer's frozen weight looks as a matrix [out, in], which shapes A and B have, and how they are applied to the layer's
input. Another kind of layer is another class here, and a line in `KINDS`.

    Linear       x [..., in]          A [r, in]            B [out, r]
    Conv1D       the same; transformers stores the weight [in, out]
    Embedding    ids [...]            A [r, words]         B [width, r]
    Conv1d/2d/3d x [N, in, ...]       A [r, in, *kernel]   B [out, r / groups, 1, ...]
    MultiheadAttention's in_proj      A [r, width]         B [3 width, r]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import autocast_dtype
from .dropout import dropped_update
from .errors import LoraLabError
from .rematerialize import linear_rematerialized


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D and ours (GPT-2's linear layer, weight stored [in, out]), recognised without importing either."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith(("transformers", "lora_lab.models")) for base in type(module).__mro__)


def dense(module: Any, name: str = "weight") -> Tensor:
    """The frozen weight as it is stored, of a quantised layer what its codes stand for."""
    weight = module.dequantize() if hasattr(module, "quantization") else getattr(module, name)
    assert isinstance(weight, Tensor)
    return weight.detach()


class LinearKind:
    """nn.Linear and its subclasses."""

    names = ("lora_A.weight", "lora_B.weight")  # in PEFT's files
    weight = "weight"  # the parameter that the adapter changes
    by_product = True  # B A x is two matrix products with x

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def shape(self, module: Any) -> tuple[int, int]:
        """(in, out)."""
        return int(module.in_features), int(module.out_features)

    def pair_shapes(self, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and of B."""
        fan_in, fan_out = self.shape(module)
        return (rank, fan_in), (fan_out, rank)

    def matrix(self, module: Any) -> Tensor:
        """The frozen weight as [out, in]; of a convolution in is channels times kernel."""
        return dense(module)

    def stored(self, delta: Tensor, module: Any) -> Tensor:
        """A matrix [out, in] in the shape in which the layer stores its weight."""
        return delta

    def dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """What A and B are cast to: the input's, never the input to theirs."""
        return x.dtype

    def update(self, module: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        """``scaling * B A x``; dropout, in training, on x."""
        return dropped_update(x, A, B, scaling, dropout) if dropout else F.linear(scaling * linear_rematerialized(x, A), B)

    def spread(self, module: Any, vector: Tensor) -> Tensor:
        """A number per output, in the shape in which it multiplies the layer's output."""
        return vector


class Conv1DKind(LinearKind):
    """transformers' Conv1D: a linear layer that stores its weight [in, out]."""

    def matches(self, module: nn.Module) -> bool:
        return is_conv1d(module)

    def shape(self, module: Any) -> tuple[int, int]:
        weight = dense(module)
        return weight.shape[0], weight.shape[1]

    def matrix(self, module: Any) -> Tensor:
        return dense(module).T

    def stored(self, delta: Tensor, module: Any) -> Tensor:
        return delta.T


class EmbeddingKind(LinearKind):
    """nn.Embedding: the input is a number of a word, which stands for a column of A.

    Dropout is on what A gives, as ids cannot be dropped. An embedding that multiplies what it looks up (Gemma's) multiplies the update, too.
    """

    names = ("lora_embedding_A", "lora_embedding_B")
    by_product = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def shape(self, module: Any) -> tuple[int, int]:
        return int(module.num_embeddings), int(module.embedding_dim)

    def matrix(self, module: Any) -> Tensor:
        return dense(module).T

    def stored(self, delta: Tensor, module: Any) -> Tensor:
        return delta.T

    def dtype(self, module: Any, x: Tensor) -> torch.dtype:
        return autocast_dtype(x) or module.weight.dtype

    def update(self, module: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        if A.shape[1] != module.num_embeddings:
            raise LoraLabError(f"the embedding has {module.num_embeddings} words, the adapter {A.shape[1]}: it was resized after inject; eject, "
                               "resize, inject")  # fmt: skip
        low = F.embedding(x, A.T, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
        update = F.linear(scaling * F.dropout(low, dropout, dropout > 0), B)
        return embed_scaled(module, update)


def embed_scaled(module: Any, vectors: Tensor) -> Tensor:
    """Multiplied as an embedding multiplies what it looks up: Gemma's and its like by `embed_scale`, others not at all."""
    scale = getattr(module, "embed_scale", None)
    return vectors if scale is None else vectors * (scale.to(vectors.dtype) if isinstance(scale, Tensor) else scale)


class ConvKind(LinearKind):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d: A is the convolution with r outputs, B the one with a kernel of 1.

    With groups A sees every channel and B is grouped, as in PEFT's files; such an update is no grouped kernel and cannot be merged.
    """

    by_product = False

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def shape(self, module: Any) -> tuple[int, int]:
        kernel = 1
        for size in module.kernel_size:
            kernel *= size
        return int(module.in_channels) * kernel, int(module.out_channels)

    def pair_shapes(self, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * len(module.kernel_size)
        return (rank, module.in_channels, *module.kernel_size), (module.out_channels, rank // module.groups, *ones)

    def matrix(self, module: Any) -> Tensor:
        return dense(module).flatten(1)

    def stored(self, delta: Tensor, module: Any) -> Tensor:
        return delta.view_as(module.weight) if delta.numel() == module.weight.numel() else delta

    def update(self, module: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float) -> Tensor:
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[A.ndim]
        x, padding = F.dropout(x, dropout, dropout > 0), module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        low = convolve(x, A, None, module.stride, padding, module.dilation)
        return convolve(scaling * low, B, groups=module.groups)

    def spread(self, module: Any, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1,) * len(module.kernel_size))


class MultiheadKind(LinearKind):
    """The input projection of nn.MultiheadAttention, q, k and v in one matrix; its output projection is a layer of its own.

    The attention reads its weights without calling a layer, so that the update is added to the weight for the call; see multihead.py.
    """

    weight = "in_proj_weight"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    def shape(self, module: Any) -> tuple[int, int]:
        return int(module.embed_dim), 3 * int(module.embed_dim)

    def matrix(self, module: Any) -> Tensor:
        return dense(module, self.weight)


KINDS: list[LinearKind] = [Conv1DKind(), LinearKind(), EmbeddingKind(), ConvKind(), MultiheadKind()]


def kind_of(module: nn.Module) -> LinearKind | None:
    """The kind of a layer; None where it cannot be adapted."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def is_adaptable(module: nn.Module) -> bool:
    return kind_of(module) is not None


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an adaptable layer; of a convolution in is channels times kernel, of an embedding the number of words."""
    kind = kind_of(module)
    assert kind is not None
    return kind.shape(module)


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means it: nn.Linear, its subclasses, and Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)
