"""What PyTorch wraps a model in or divides it into: DistributedDataParallel, torch.compile's wrapper, fully_shard; and our own model around a model.

Adapters go into the model first, the wrapper around it afterwards. The other way round much would still run, and be wrong without a word: new
adapters whose gradients no process exchanges, files whose names begin with "module.", layers that lose the class fully_shard gave them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from .errors import LoraLabError

Verb = TypeVar("Verb", bound=Callable[..., Any])

WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}


def base_of(model: Any) -> Any:
    """The model that adapters belong to: what a model around another one (a prompted model) names as its `lora_base`, else the model itself."""
    return getattr(model, "lora_base", model)


def on_base(verb: Verb) -> Verb:
    """The verb, which given a model around another one works on that one. Where it returns the model, it returns what it was given."""

    @functools.wraps(verb)
    def called(model: Any, *args: Any, **options: Any) -> Any:
        base = base_of(model)
        result = verb(base, *args, **options)
        return model if result is base else result

    return called  # type: ignore[return-value]


def refuse_wrapped(model: nn.Module, verb: str) -> None:
    """For the verbs that go by the names of layers. Raises LoraLabError where a wrapper is among them, at the top or further down.

    `model.compile()` wraps nothing and is welcome at any time; known by name, as importing them costs more than this whole package.
    """
    for path, module in model.named_modules():
        where = f"layer {path!r} is" if path else "this is"
        if "FullyShardedDataParallel" in _names(module):
            raise LoraLabError(f"{verb}: {where} torch's FullyShardedDataParallel, which takes the parameters out of their layers: divide the model "
                               "with fully_shard (FSDP2) instead, which lora_lab.training.shard does")  # fmt: skip
        for name in _names(module):
            if name in WRAPPERS:
                raise LoraLabError(f"{verb}: {where} torch's {name}, whose layers have other names; call {verb} with the model inside "
                                   f"(.{WRAPPERS[name]}), and for new adapters before it is wrapped (model.compile() wraps nothing)")  # fmt: skip


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """For the verbs that add, remove or write whole parameters. Raises LoraLabError where FSDP (`fully_shard`, or the older one) divided them."""
    for path, module in model.named_modules():
        if _names(module) & {"FSDPModule", "FullyShardedDataParallel"}:
            raise LoraLabError(f"{verb}: {path or type(module).__name__!r} is divided among processes by FSDP: inject and load before that; to "
                               "merge or eject, save the adapter and load it into a model that is whole")  # fmt: skip


def refuse_replaced(model: nn.Module, verb: str) -> None:
    """Raise LoraLabError where a layer that carried an adapter is gone: resize_token_embeddings puts new, plain ones in its place."""
    injection = vars(model).get("lora_injection")
    for adapter, paths in (() if injection is None else injection.places.items()):
        present = {path: module for path, module in model.named_modules() if adapter in getattr(module, "lora_variant", ())}
        if missing := [path for path in paths if path not in present]:
            raise LoraLabError(f"{verb}: {missing[0]!r} carried the adapter {adapter!r} and was replaced since (by resize_token_embeddings?): "
                               "eject, and inject once the model has its final layers")  # fmt: skip


def _names(module: nn.Module) -> set[str]:
    """The names of the classes that PyTorch gave a module."""
    return {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")}


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that fully_shard divided, all of it. That is gathered: every process has to ask.

    Raises LoraLabError for an empty vector, which is what DeepSpeed's ZeRO-3 leaves of a divided tensor.
    """
    if tensor.shape == (0,):
        raise LoraLabError("a tensor of the adapter is empty: if ZeRO-3 has divided the parameters, save within deepspeed.zero.GatheredParameters")
    return gathered(tensor)


def is_divided(tensor: Any) -> bool:
    """Whether this is a DTensor: asked without importing DTensor, which costs more than this whole package."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Any) -> Tensor:
    """All of a tensor. One that is divided is gathered: every process has to ask."""
    return tensor.full_tensor() if is_divided(tensor) else tensor
