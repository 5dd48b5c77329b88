"""Steps of models too big to hold: tensors that have a shape, a type and a storage of the right size, and no memory.

    config = transformers.LlamaConfig(...)                     # Llama-2-70B if you like
    m = fake_step(lambda: transformers.LlamaForCausalLM(config), batch_size=2, sequence_length=2048)
    print(m.against(predict("llama-2-70b", batch_size=2, sequence_length=2048, device="cpu")))

PyTorch's FakeTensorMode runs every operation on the CPU's rules without computing anything, so a step of a 7B model takes less than a minute
and less than 1 GiB. The integers among the tensors, token ids and labels, stay real: a model may look at them to see how many there are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import MemoryMathError
from .measurement import Measurement, measure, saved_bytes

Parameters = list[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}
AN_ID = 2  # a token that every vocabulary has; 0 or 1 is often padding, which models may look for

MOST_REAL = 2**22  # elements


def fake_step(
    build: Callable[[], nn.Module],
    *,
    batch_size: int,
    sequence_length: int,
    optimizer: str | Callable[[Parameters], Optimizer] = "adamw",
    autocast: torch.dtype | None = None,
    grad_accum_steps: int = 1,
    **arguments: Any,
) -> Measurement:
    """What one training step of a model holds: `measure` of forward, backward and optimizer, with `saved_bytes`, on fake tensors.

    build: makes the model, in the mode and with the weights' dtype that it trains in; nothing that exists already can be used in it, and
    nothing is read from files. batch_size, sequence_length: of one micro-batch, rows without padding; `arguments` go to every call of
    the model, beside input_ids and labels. autocast: the type that forward is cast to, such as torch.bfloat16.
    optimizer: a name, then torch.optim's for-loop, the CPU's default, or a function from the parameters that train to an optimizer.
    The step is the second one: the optimizer's states exist from the start.
    Raises MemoryMathError for an optimizer that torch.optim does not have, and for tensors on another device than the CPU.

    >>> from types import SimpleNamespace
    >>> class TenBillion(nn.Linear):
    ...     def forward(self, input_ids, labels):
    ...         return SimpleNamespace(loss=super().forward(torch.ones(*input_ids.shape, 100_000)).mean())
    >>> m = fake_step(lambda: TenBillion(100_000, 100_000, bias=False), batch_size=2, sequence_length=8)
    >>> m.start_bytes, m.saved_bytes                    # 40 GB of weights and AdamW's two moments of that size; the inputs of the layer
    (120000000004, 6400000)
    """
    make_optimizer = _optimizer_of(optimizer)
    with fake_tensors():
        model = build()
        stepper = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
        _make_states(stepper)

        def step() -> None:
            for _ in range(grad_accum_steps):
                loss = _loss(model, batch_size, sequence_length, autocast, arguments)
                loss.backward()
                del loss
            stepper.step()
            stepper.zero_grad(set_to_none=True)

        return measure(step, device="cpu", saved=True)


def fake_saved_bytes(
    build: Callable[[], nn.Module], *, batch_size: int, sequence_length: int, autocast: torch.dtype | None = None, **arguments: Any
) -> int:
    """What autograd keeps of one forward pass, as `saved_bytes` says, on fake tensors; the arguments are those of `fake_step`."""
    with fake_tensors():
        model = build()
        return saved_bytes(lambda: _loss(model, batch_size, sequence_length, autocast, arguments))


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, tensors that are made are fake; `measure` and `saved_bytes` in there follow those, for a loop of one's own.

    Integer tensors that come from outside stay real, and so does what is computed from them alone.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter = _Converter()
    with mode, _RealIntegers():
        yield


class _Converter(FakeTensorConverter):
    """Keeps no weak reference to a tensor it makes: with one, `model.bfloat16()` could not put another in its place (torch.utils.swap_tensors)."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        pass


class _RealIntegers(TorchDispatchMode):
    """Computes with real integers and booleans as usual, and hands everything else on to the FakeTensorMode beneath."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_other_devices(kwargs.get("device"))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _counts(func, args, kwargs) if not tensors else all(map(_is_real_integer, tensors)) and not _is_large(tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _as_numbers(args[1]))
        return func(*args, **kwargs)


def _is_real_integer(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not tensor.is_floating_point() and not tensor.is_complex()


def _counts(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `func` makes positions, 0 1 2 ..., which are integers, too."""
    whole = kwargs["dtype"] == torch.long if kwargs.get("dtype") else all(isinstance(number, int) for number in args)
    return func.overloadpacket is torch.ops.aten.arange and whole


def _is_large(tensors: list[Tensor]) -> bool:
    """Whether tensors that broadcast would give one, such as a mask of each position against each, that should not be made for real."""
    try:
        return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors))) > MOST_REAL
    except RuntimeError:
        return False


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Real masks as the positions they choose, whose count a fake tensor cannot know."""
    found: list[Tensor | None] = []
    with unset_fake_temporarily():
        for index in indices:
            mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
            found += list(index.nonzero(as_tuple=True)) if mask and index is not None else [index]
    return found


def _refuse_other_devices(device: object) -> None:
    if device is not None and torch.device(str(device)).type not in ("cpu", "meta"):
        raise MemoryMathError(f"device='{device}' in a fake run: PyTorch built for the CPU aborts there; make the model on the CPU")


def _optimizer_of(optimizer: str | Callable[[Parameters], Optimizer]) -> Callable[[Parameters], Optimizer]:
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise MemoryMathError(f"optimizer={optimizer!r}: a fake step has {', '.join(OPTIMIZERS)}, or a function from parameters to an optimizer")
    return OPTIMIZERS[optimizer]


def _make_states(optimizer: Optimizer) -> None:
    """One step on zeros: most optimizers make their states in their first."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _loss(model: nn.Module, batch_size: int, sequence_length: int, autocast: torch.dtype | None, arguments: dict[str, Any]) -> Tensor:
    with unset_fake_temporarily():
        ids = torch.full((batch_size, sequence_length), AN_ID)
        labels = ids.clone()
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        loss = getattr(model(input_ids=ids, labels=labels, **arguments), "loss", None)
    if not isinstance(loss, Tensor):
        raise MemoryMathError(f"{type(model).__name__}(input_ids=..., labels=...).loss is {loss!r}: a fake step needs a model that returns its loss")
    return loss
