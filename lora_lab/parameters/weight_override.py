"""A tensor in the place of a parameter, for the time of one call: ``module.weight`` is W + delta while the module's own forward runs.

The class of the module has a property where the parameter's name was looked up before; the Parameter itself stays where nn.Module keeps it, so
that state dicts, optimizers and `.to()` see what they saw. Each thread has its own stand-ins.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLabError


@contextlib.contextmanager
def standing_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block ``module.<name>`` is the tensor of that name, for this thread. The class of the module needs `replaceable` names."""
    entries = {_key(name): (tensor, _hooks()) for name, tensor in tensors.items()}
    before = {key: module.__dict__.get(key) for key in entries}  # of the call around this one, where a module calls itself
    module.__dict__.update(entries)
    try:
        yield
    finally:
        for key, entry in before.items():
            if entry is None:
                del module.__dict__[key]
            else:
                module.__dict__[key] = entry


def replaceable(name: str) -> property:
    """For a class: the parameter of this name, or what stands in for it."""

    def read(self: Any) -> Tensor:
        entry = self.__dict__.get(_key(name))
        if entry is None:
            return self._parameters[name]
        tensor, hooks = entry
        if _hooks() is not hooks:
            _refuse_checkpoint_inside(type(self), name)
        return tensor

    return property(read)


def _key(name: str) -> str:
    thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
    return f"lora_in_place_of_{name}_{thread}"


def _hooks() -> Any:
    """What is done with tensors that are saved for backward, None as a rule: checkpointing begins with a change of that."""
    if torch.compiler.is_compiling():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _refuse_checkpoint_inside(cls: type, name: str) -> None:
    """A part of forward that is checkpointed on its own runs again when forward is over, and would find the parameter without the update."""
    if getattr(_hooks(), "__module__", None) == "torch.utils.checkpoint":
        raise LoraLabError(f"{cls.__name__}.{name} carries an adapter and is read under gradient checkpointing inside its own module's forward, "
                           "which would run again without the adapter: checkpoint the whole module from outside")  # fmt: skip
