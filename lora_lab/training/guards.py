"""What watches over a run: layers that learn nothing, numbers that are none, memory that runs out; and switches that are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import memory_math

from ..errors import LoraLabError
from ..models.base import PretrainedModel
from ..models.recompute import Mode
from ..targets import lora_layers
from ..wrapping import base_of, gathered
from .dtensors import piece

NOTHING_LEARNS = ("the loss depends on no weight that requires grad: is the adapter that trains switched on (lora_lab.use)? "
                  "Reentrant checkpointing over frozen inputs cuts the graph, too (use_reentrant=False)")  # fmt: skip


class Diverged(LoraLabError):
    """The loss or a gradient is not a number any more."""


class WhichLayersRan:
    """During the first step, notes which LoRA layers were called; then each of those must have received a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.layers, self.ran, self.hooks = lora_layers(model), set[str](), list[Any]()

    def __enter__(self) -> None:
        for path, layer in self.layers.items():
            assert isinstance(layer, nn.Module)
            self.hooks.append(layer.register_forward_hook(lambda *_, path=path: self.ran.add(path)))

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def check(self, trained: list[nn.Parameter]) -> None:
        if all(p.grad is None for p in trained):
            raise LoraLabError(NOTHING_LEARNS)
        for path in sorted(self.ran):
            layer = self.layers[path]
            tensors = [(name, p) for adapter in layer.lora_active for name, p in layer.lora_parameters(adapter).items()]
            for name, parameter in tensors:
                if name in ("lora_B", "lora_tokens") and parameter.requires_grad and parameter.grad is None:
                    raise LoraLabError(f"layer {path!r} ran, but its {name} got no gradient: something between it and the loss cuts the graph "
                                       "(reentrant checkpointing? use use_reentrant=False)")  # fmt: skip


@contextlib.contextmanager
def own_gradients(trained: list[nn.Parameter]) -> Iterator[None]:
    """No gradient of an earlier backward() gets into the run, and none of the run stays behind."""
    _drop_gradients(trained)
    try:
        yield
    finally:
        _drop_gradients(trained)


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextlib.contextmanager
def checkpointing(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Gradient checkpointing for the run, where the model does not use it already."""
    model = base_of(model)
    if not mode or _member(model, "is_{}_checkpointing"):
        yield
        return
    enable, disable = _member(model, "{}_checkpointing_enable"), _member(model, "{}_checkpointing_disable")
    if enable is None or disable is None:
        raise LoraLabError(f"gradient_checkpointing={mode!r}: a {type(model).__name__} has no gradient_checkpointing_enable() to switch it on")
    _switch_on(model, enable, mode)
    try:
        yield
    finally:
        disable()


def _switch_on(model: nn.Module, enable: Any, mode: Mode) -> None:
    if isinstance(model, PretrainedModel):
        enable(mode)
        return
    if mode is not True:
        raise LoraLabError(f"gradient_checkpointing={mode!r}: a {type(model).__name__} of transformers checkpoints every block or none; give True")
    try:
        enable({"use_reentrant": False})  # transformers': its reentrant kind gives frozen inputs a gradient that nobody needs
    except ValueError as error:
        raise LoraLabError(f"gradient_checkpointing=True: {error}") from None
    with contextlib.suppress(AttributeError):  # some versions of transformers have no such hook to remove, or fail without one
        model.disable_input_require_grads()  # type: ignore[operator]


def _member(model: nn.Module, name: str) -> Any:
    """transformers calls it activation checkpointing since 5.23, and warns of the older name."""
    newer = name.format("activation")
    return getattr(model, newer if hasattr(model, newer) else name.format("gradient"), None)




def first_not_finite(model: nn.Module, batch: dict[str, Tensor]) -> str:
    """Where numbers stop being numbers: the first weight that is not finite, else the first module of a forward pass whose output is not."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(gathered(parameter)).all():
            return f"the weight {name!r}"
    found: list[str] = []

    def look(path: str, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        if not found and any(isinstance(tensor, Tensor) and not torch.isfinite(tensor).all() for tensor in tensors):
            found.append(f"the output of {path!r}, a {type(model.get_submodule(path)).__name__}")

    hooks = [module.register_forward_hook(lambda _, __, output, path=path: look(path, output)) for path, module in model.named_modules() if path]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the loss"


def first_gradient_not_finite(model: nn.Module) -> str:
    gradients = ((name, piece(p.grad)) for name, p in model.named_parameters() if p.grad is not None)
    return next((f"the gradient of {name!r}" for name, gradient in gradients if not torch.isfinite(gradient).all()), "")


@contextlib.contextmanager
def out_of_memory_explained(model: nn.Module, request: dict[str, Any]) -> Iterator[None]:
    """Where memory runs out: what a step was predicted to need, and the knobs that would lower it most."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "not enough memory" not in str(error):
            raise
        raise LoraLabError(f"out of memory in a step on rows of up to {request['sequence_length']} tokens. {_prediction(model, request)}") from error


def _prediction(model: nn.Module, request: dict[str, Any]) -> str:
    model = base_of(model)
    try:
        savings = memory_math.savings(model, **request)
    except memory_math.MemoryMathError as error:
        return f"Lower micro_batch_size or max_length, or use gradient_checkpointing=True (no prediction: {error})"
    best = [f"{saving.knob} ({saving.saved_bytes / 2**30:.2f} GiB less)" for saving in list(savings)[:3]]
    return f"Predicted were {memory_math.predict(model, **request).gib():.2f} GiB of tensors; what would lower that most: {', '.join(best)}"
