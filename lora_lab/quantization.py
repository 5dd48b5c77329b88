"""QLoRA's frozen base in pure PyTorch: linear layers whose weight is kept in four or eight bits (Dettmers et al. 2023, arXiv:2305.14314).

    model = lora_lab.quantize(model, "nf4-dq")      # 4.127 bits a weight; embeddings, norms and the head stay as they are
    model = lora_lab.inject(model, rank=8)          # A and B in float32 on top; they alone train

A quantised layer *is* the layer it was: its class is switched to one made of the mixin `Quantized` in front of its own, so that identity,
hooks, bias and ``isinstance`` stay. It has no ``weight``: codes and scales are buffers, `dequantize` gives the matrix. A product makes the
matrix anew, forward and once more backward, and keeps neither it nor the input.

No ``weight`` means none: ``hasattr(layer, "weight")`` is False. What reads a weight it finds (merging, initialising, counting) would take
codes for numbers, or write into a copy; an AttributeError that says what to call instead is the safer answer. An AttributeError it has
to be, as with anything else hasattr and getattr with a default would raise.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import FLOATS
from .codes import PARTS, decode, encode
from .errors import LoraLabError, did_you_mean
from .kinds import is_conv1d, is_linear
from .layers import LoRA
from .parameters.layer import ParameterOwner
from .paths import ancestors, name_matches
from .targets import excluded, is_head
from .wrapping import on_base

Model = TypeVar("Model", bound=nn.Module)


@on_base
def quantize(model: Model, kind: str = "nf4", *, exclude_modules: str | Sequence[str] | None = None) -> Model:
    """Keep the weights of a model's linear layers in four or eight bits, in place; returns the same model.

    kind: "nf4" (4.5 bits a weight), "nf4-dq" (4.127; double quantisation) or "int8" (8, and 32 for each row).
    exclude_modules: names matched at dots from the right, or a regular expression over the whole path: layers to leave as they are.
    Every nn.Linear and Conv1D is quantised but what get_output_embeddings() returns, a top-level score or classifier, what a transformers
    model keeps in float32 (T5's wo, whose weight it reads), and the layers of nn.MultiheadAttention and nn.TransformerEncoderLayer, whose
    weights PyTorch reads without calling them.
    Weights that trained no longer do: they become buffers. Biases stay parameters. The codes of all layers are made before the first change,
    so a quarter (nf4; int8: half) of a 16-bit model is needed beside it. Under DDP pass broadcast_buffers=False, or every step sends all codes.
    Raises LoraLabError, the model untouched, for layers that carry adapters, are quantised already, share their weight with one that stays,
    have numbers that are not finite, or compute something else than x W^T + b.
    Source: Dettmers et al. 2023, sections 2 and 3.

    >>> model = quantize(nn.Sequential(nn.Linear(512, 64), nn.ReLU()), "nf4")
    >>> model[0].dequantize().shape, hasattr(model[0], "weight")
    (torch.Size([64, 512]), False)
    """
    if kind not in PARTS:
        raise LoraLabError(f"kind={kind!r}: expected one of {', '.join(PARTS)}{did_you_mean(kind, PARTS)}")
    layers = _layers_to_quantize(model, exclude_modules)
    classes = [quantized_class(type(layer)) for layer in layers.values()]
    parts: dict[int, tuple[Tensor, ...]] = {}
    for path, layer in layers.items():
        if id(layer.weight) not in parts:  # two layers that share a weight share its codes
            parts[id(layer.weight)] = _encode(path, layer, kind)
    for layer, cls in zip(layers.values(), classes, strict=True):
        _switch(layer, cls, kind, parts[id(layer.weight)])
    return model


@on_base
def dequantize(model: Model) -> Model:
    """Give quantised layers an ordinary weight again, in place: what their codes stand for, frozen; returns the same model.

    Raises LoraLabError where no layer is quantised, or one carries adapters.
    """
    layers = quantized_layers(model)
    if not layers:
        raise LoraLabError(f"this {type(model).__name__} has no quantised layers")
    for path, layer in layers.items():
        if isinstance(layer, LoRA):
            raise LoraLabError(f"{path!r} carries LoRA adapters: eject them before dequantize")
    shared = {id(layer.weight_codes): layer for layer in layers.values()}
    weights = {codes: nn.Parameter(layer.dequantize().contiguous(), requires_grad=False) for codes, layer in shared.items()}
    for layer in layers.values():
        _restore(layer, weights[id(layer.weight_codes)])
    return model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Every quantised layer of a model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


@dataclass(frozen=True)
class QuantizationReport:
    """What the quantised layers keep. bytes: of codes and scales. bytes_before: of the same weights in the layers' own dtype."""

    layers: int
    weights: int
    bytes: int
    bytes_before: int

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes / self.weights

    def __str__(self) -> str:
        return (f"quantised layers: {self.layers}, with {self.weights:,} weights in {self.bytes:,} bytes instead of {self.bytes_before:,}: "
                f"{self.bits_per_parameter:.3f} bits a weight")  # fmt: skip


@on_base
def quantization_report(model: nn.Module) -> QuantizationReport:
    """Count what a model's quantised layers keep. Raises LoraLabError where there are none.

    >>> print(quantization_report(quantize(nn.Sequential(nn.Linear(4096, 4096, bias=False)), "nf4-dq")))
    quantised layers: 1, with 16,777,216 weights in 8,654,852 bytes instead of 67,108,864: 4.127 bits a weight
    """
    layers = list({id(layer.weight_codes): layer for layer in quantized_layers(model).values()}.values())
    if not layers:
        raise LoraLabError(f"this {type(model).__name__} has no quantised layers: call quantize first")
    weights = [layer.matrix_shape[0] * layer.matrix_shape[1] for layer in layers]
    before = sum(count * layer.compute_dtype.itemsize for count, layer in zip(weights, layers, strict=True))
    return QuantizationReport(len(layers), sum(weights), sum(part.nbytes for layer in layers for part in layer.parts()), before)


# The layer ----------------------------------------------------------------------------------------------------------------


class Quantized:
    """What every quantised layer has, in front of the class it was.

    quantization: "nf4", "nf4-dq" or "int8".  matrix_shape: (out, in), also where the layer stored its weight [in, out] (Conv1D).
    compute_dtype: what `dequantize` gives; the dtype the weight had, and like a weight's it follows ``.to(dtype)`` and ``.half()``.
    The layer computes in the dtype of its input, or autocast's.
    """

    quantized_base_class: type[nn.Module]
    quantization: str
    matrix_shape: tuple[int, int]
    compute_dtype: torch.dtype
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in].  Returns ``x W^T + b``: [..., out], W as it is decoded to the dtype of x."""
        if not input.is_floating_point():
            raise LoraLabError(f"the input of a quantised layer is {input.dtype}: expected floats")
        bias, device = self.bias, input.device.type
        if input.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        if bias is not None:
            bias = bias.to(input.dtype)
        return _product(input, bias, False, self.quantization, *self.matrix_shape, *self.parts())

    def dequantize(self) -> Tensor:
        """The matrix the codes stand for, as the layer stored it: [out, in] (Conv1D: [in, out]), in compute_dtype."""
        matrix = decode(self.quantization, self.parts(), *self.matrix_shape, self.compute_dtype)
        return matrix.t() if is_conv1d(cast(nn.Module, self)) else matrix

    def parts(self) -> list[Tensor]:
        """The codes, then the scales, as in ``codes.PARTS``."""
        return [getattr(self, name) for name in PARTS[self.quantization]]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(f"this {type(self).__name__} has no weight, only {self.quantization} codes: call .dequantize() for the matrix")
        return super().__getattr__(name)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """``.to``, ``.half``, ``.cuda``: codes and scales go to another device, but stay the numbers they are."""
        before = dict(zip(PARTS[self.quantization], self.parts(), strict=True))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=before["weight_codes"].device)).dtype
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, part in before.items():
            after = getattr(self, name)
            if after.dtype != part.dtype:
                setattr(self, name, part.to(after.device))
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantization={self.quantization}"  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy: the class is made on the fly, so it travels as its base class."""
        return _rebuild, (type(self).quantized_base_class,), dict(self.__dict__)


def _product(*inputs: Any) -> Tensor:
    if torch.compiler.is_dynamo_compiling():  # the compiler would take both decodings for one, and keep the matrix for backward
        return checkpoint(_Product.forward, *inputs, use_reentrant=False, preserve_rng_state=False)
    return _Product.apply(*inputs)


class _Product(torch.autograd.Function):
    """``x W^T + b`` of a matrix there are only codes of, or with `transposed` ``x W``. The one is in the other's derivative, so that
    derivatives of every order decode the matrix when they need it, and nothing but the codes is kept for them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, transposed: bool, kind: str, rows: int, columns: int, *parts: Tensor) -> Tensor:
        matrix = decode(kind, parts, rows, columns, x.dtype)
        return F.linear(x, matrix.t() if transposed else matrix, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.constants = inputs[2:6]
        ctx.save_for_backward(*inputs[6:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (transposed, *constants), parts = grads, ctx.constants, ctx.saved_tensors
        x_grad = _Product.apply(grad, None, not transposed, *constants, *parts) if ctx.needs_input_grad[0] else None
        bias_grad = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[1] else None
        return x_grad, bias_grad, *[None] * (4 + len(parts))


# Switching classes --------------------------------------------------------------------------------------------------------


class _QuantizedClass(type):
    """The class of the classes made below, so that pickle can take such a class for what it is made of."""


_CLASSES: dict[type, type[nn.Module]] = {}


def quantized_class(base: type) -> type[nn.Module]:
    """The class `base` with `Quantized` in front of it; one per base class, so that isinstance and pickle agree."""
    if base not in _CLASSES:
        members = {"quantized_base_class": base, "__module__": __name__, "__doc__": base.__doc__}
        _CLASSES[base] = cast("type[nn.Module]", _QuantizedClass(f"Quantized{base.__name__}", (Quantized, base), members))
    return _CLASSES[base]


def _reduce_class(cls: Any) -> Any:
    """A class of ours travels as its base class; what others derive from it, by its name."""
    return (quantized_class, (cls.quantized_base_class,)) if "quantized_base_class" in vars(cls) else cls.__qualname__


copyreg.pickle(_QuantizedClass, _reduce_class)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = quantized_class(base)
    return cls.__new__(cls)


def _encode(path: str, layer: Any, kind: str) -> tuple[Tensor, ...]:
    """The parts of a layer's matrix [out, in]. Raises LoraLabError for numbers a float32 cannot hold."""
    weight = layer.weight.detach()
    if not weight.is_meta and not torch.stack(weight.aminmax()).float().isfinite().all():
        raise LoraLabError(f"the weight of {path!r} has numbers that are not finite in float32: repair it, or leave it out with exclude_modules")
    return encode(weight.t() if is_conv1d(layer) else weight, kind)


def _switch(layer: Any, cls: type[nn.Module], kind: str, parts: tuple[Tensor, ...]) -> None:
    weight = layer.weight
    del layer.weight
    layer.__class__ = cls
    layer.quantization, layer.compute_dtype = kind, weight.dtype
    layer.matrix_shape = tuple(weight.t().shape if is_conv1d(layer) else weight.shape)
    for name, part in zip(PARTS[kind], parts, strict=True):
        layer.register_buffer(name, part)


def _restore(layer: Any, weight: nn.Parameter) -> None:
    for name in PARTS[layer.quantization]:
        delattr(layer, name)
    del layer.quantization, layer.compute_dtype, layer.matrix_shape
    layer.__class__ = type(layer).quantized_base_class
    others = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update(weight=weight, **others)  # first, where it was: optimizers number parameters


# Which layers -------------------------------------------------------------------------------------------------------------


def _layers_to_quantize(model: nn.Module, exclude_modules: str | Sequence[str] | None) -> dict[str, Any]:
    linear = {path: module for path, module in model.named_modules() if is_linear(module)}
    left_out = excluded(list(linear), exclude_modules)
    layers = {path: module for path, module in linear.items() if path not in left_out and not _stays(model, path, module)}
    if not layers:
        raise LoraLabError(f"this {type(model).__name__} has nothing to quantise: each of its {len(linear)} linear layers is excluded or has to stay")
    for path, layer in layers.items():
        _check_weight(path, layer)
    _check_tied(model, layers)
    for path, layer in layers.items():
        _check_forward(path, layer)
    return layers


def _stays(model: nn.Module, path: str, layer: nn.Module) -> bool:
    """The head; what transformers keeps in float32; and what PyTorch's attention and encoder layers read without calling it."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    parent = model.get_submodule(path.rpartition(".")[0])
    return (is_head(model, path, layer) or isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
            or any(name_matches(name, part) for name in kept for part in ancestors(path)))  # fmt: skip


def _check_weight(path: str, layer: nn.Module) -> None:
    if isinstance(layer, (LoRA, ParameterOwner)):
        raise LoraLabError(f"{path!r} carries LoRA adapters, which would be quantised around: quantize before inject (eject, quantize, inject)")
    if isinstance(layer, Quantized):
        raise LoraLabError(f"{path!r} is already quantised ({layer.quantization}): dequantize first, or leave it out with exclude_modules")
    weight = layer._parameters.get("weight")
    if weight is None:
        raise LoraLabError(f"{path!r} computes its weight (a parametrization, weight_norm): remove that first, or leave it out with exclude_modules")
    if nn.parameter.is_lazy(weight) or not weight.numel():
        raise LoraLabError(f"the weight of {path!r} has no numbers yet: run the model once first, or leave it out with exclude_modules")
    if weight.dtype not in FLOATS:
        raise LoraLabError(f"the weight of {path!r} is {weight.dtype}: expected one of {', '.join(str(dtype) for dtype in FLOATS)}")


def _check_tied(model: nn.Module, layers: dict[str, Any]) -> None:
    """A weight is quantised for all its owners, or for none: one that kept it would go its own way, and no memory be saved."""
    quantised = {id(layer.weight): path for path, layer in layers.items()}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in quantised and path not in layers:
                path, here = f"{path}.{name}".lstrip("."), quantised[id(parameter)]
                raise LoraLabError(f"{here!r} shares its weight with {path!r}, which is not quantised: leave it out with exclude_modules=[{here!r}]")


def _check_forward(path: str, layer: Any) -> None:
    """A subclass with a forward of its own is asked whether it still is x W^T + b (transformers' FalconLinear is)."""
    own = next(base for base in type(layer).__mro__ if "forward" in vars(base))
    if own is nn.Linear or own.__name__ == "Conv1D" or layer.weight.is_meta:
        return
    weight = layer.weight.detach()
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).cos().view(2, -1).to(weight.dtype)
    with torch.no_grad():
        wanted, found = F.linear(x, weight, layer.bias), type(layer).forward(layer, x)
    if found.shape != wanted.shape or not torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=0.02 * float(wanted.float().abs().max())):
        raise LoraLabError(f"{path!r} is a {type(layer).__name__}, whose forward is not x W^T + b: leave it out with exclude_modules=[{path!r}]")
