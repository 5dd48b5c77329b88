"""LoRA on parameters themselves, ``target_parameters=["experts.down_proj"]``, for modules that are no layer of their own: stacks of experts, or
anything that multiplies with a parameter of its own in its own forward.

    parameter [out, in]                    A [r, in]         B [out, r]         W + scaling * B @ A
    stack [n, out, in]                     A [n, r, in]      B [n, out, r]      the same for each of the n
    stack [n, in, out], `is_transposed`    A [n, r, in]      B [n, out, r]      W + scaling * A^T @ B^T

The module keeps its parameter and switches its class (see layers.py): while its forward runs under an active adapter, ``module.down_proj`` is the
sum, formed once however often it is read. The adapter is in a module of its own beside the parameter, ``lora_of_down_proj.lora_A.<adapter>``, which
to every verb is a LoRA layer as any other. What is read outside of that forward is the parameter without its update.
The same function as PEFT's target_parameters (0.21), in whose files the parameters of a module are told apart by position; see
peft_files/parameters.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from ..kinds import LinearKind
from ..layers import AdapterParameters, LoRA
from ..selection import remember_selection
from ..variants import Variant
from .weight_override import replaceable, standing_in
from .weight_sums import WeightSum, add_product, forgotten, read_one_by_one

PART = "lora_of_"  # before a parameter's name: the module with its adapters


class ParameterKind(LinearKind):
    """A parameter, or each matrix of a stack. As a matrix it is [rows, columns] as stored, the matrices of a stack one below the other."""

    by_product = False

    def __init__(self, name: str) -> None:
        self.weight = name

    def matches(self, module: nn.Module) -> bool:
        return False  # it is named, not found

    def shape(self, module: Any) -> tuple[int, int]:
        rows, columns = module.weight.shape[-2:]
        return (rows, columns) if module.lora_transposed else (columns, rows)

    def pair_shapes(self, module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        (fan_in, fan_out), stack = self.shape(module), module.weight.shape[:-2]
        return (*stack, rank, fan_in), (*stack, fan_out, rank)

    def matrix(self, module: Any) -> Tensor:
        return cast(Tensor, module.weight.detach()).flatten(0, -2)

    def stored(self, delta: Tensor, module: Any) -> Tensor:
        return delta.view_as(module.weight)


@dataclass(frozen=True)
class OnParameter(Variant):
    """LoRA whose update is in the weight: ``W + scaling * B A``, matrix by matrix. Source: Hu et al. 2021 (arXiv:2106.09685), equation 3."""

    def rank(self, layer: LoRA, adapter: str) -> int:
        return layer.lora_B[adapter].shape[-1]

    def pieces(self, A: Tensor, B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(as_stack(A), as_stack(B), strict=True)

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """left [n, rows, r] and right [n, r, columns], whose product is the update of the weight as it is stored."""
        A, B = self._wide(layer, adapter)
        scaling = layer.lora_scaling[adapter]
        return (scaling * A.mT, B.mT) if layer.lora_transposed else (scaling * B, A)

    def delta(self, layer: LoRA, adapter: str, rows: slice = slice(None)) -> Tensor:
        """The change of the weight as the kind's matrix: [rows, columns] as stored, of a stack one below the other."""
        A, B = self._wide(layer, adapter)
        left, right = (A.mT, B.mT) if cast(Any, layer).lora_transposed else (B, A)
        n, each, scaling = *left.shape[:2], layer.lora_scaling[adapter]
        start, stop, _ = rows.indices(n * each)
        inside = [(i, max(start - i * each, 0), min(stop - i * each, each)) for i in range(start // each, -(-stop // each))]
        return torch.cat([scaling * left[i, first:last] @ right[i] for i, first, last in inside])

    def _wide(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """A [n, r, in] and B [n, out, r] in float32 or wider: an update is rounded once, in the sum."""
        A, B = (as_stack(tensor.to(torch.promote_types(tensor.dtype, torch.float32))) for tensor in self.pair(layer, adapter))
        return A, B

    def matrices(self, layer: Any, adapter: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A [r, in], B [out, r] and the weight [out, in] of each matrix."""
        weight = as_stack(layer.weight.detach())
        pairs = (as_stack(tensor.detach()) for tensor in self.pair(layer, adapter))
        yield from zip(*pairs, weight.mT if layer.lora_transposed else weight, strict=True)

    def pair_for_file(self, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
        """As matrices in PEFT's order: of a stack A [n r, in], those of a matrix one below the other, and B [out, r n], through the n first."""
        A, B = (tensor.detach() for tensor in self.pair(layer, adapter))
        return (A, B) if A.ndim == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))


def as_stack(tensor: Tensor) -> Tensor:
    """A matrix as a stack of one."""
    return tensor if tensor.ndim == 3 else tensor[None]


class ParameterLoRA(LoRA, nn.Module):
    """The adapters of one parameter, beside it in the module that owns it.

    lora_A[name]: [r, in], of a stack [n, r, in].  lora_B[name]: [out, r], of a stack [n, out, r].  weight: the parameter itself.
    It belongs to `lora_owner`, whose child it becomes with `lora_register`.
    """

    lora_base_class = nn.Module

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["lora_owner"] = owner  # as an attribute it would be a child
        self.lora_name = name
        self.lora_A, self.lora_B = AdapterParameters(), AdapterParameters()
        self.lora_scaling, self.lora_dropout, self.lora_variant, self.lora_active = {}, {}, {}, ()

    @property
    def lora_kind(self) -> LinearKind:
        return ParameterKind(self.lora_name)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as a layer has its weight."""
        return cast(nn.Parameter, self.__dict__["lora_owner"]._parameters[self.lora_name])

    @property
    def lora_transposed(self) -> bool:
        return is_transposed(self.__dict__["lora_owner"], self.weight)

    def forward(self, weight: Tensor) -> WeightSum:  # type: ignore[override]
        """The weight with the updates of the active adapters, in its own dtype and shape."""
        factors = [cast(OnParameter, self.lora_variant[adapter]).factors(self, adapter) for adapter in self.lora_active]
        left, right = torch.cat([left for left, _ in factors], 2), torch.cat([right for _, right in factors], 1)
        left, stack = remember_selection(left, self.lora_active), as_stack(weight)
        return WeightSum(add_product(stack, left, right), stack, left, right)

    def lora_delta(self, adapter: str) -> Tensor:
        """What the adapter changes of the parameter, in its shape."""
        return super().lora_delta(adapter).view_as(self.weight)

    def lora_register(self) -> None:
        """Become a child of the owner, which switches its class; nothing happens where it is one."""
        owner = self.__dict__["lora_owner"]
        names, base = (*adapted_names(owner), self.lora_name), getattr(type(owner), "lora_base_class", type(owner))
        owner._modules[PART + self.lora_name] = self
        owner.__class__ = owner_class(base, tuple(name for name in owner._parameters if name in names))

    def lora_unregister(self) -> None:
        owner = self.__dict__["lora_owner"]
        base, names = type(owner).lora_base_class, tuple(name for name in adapted_names(owner) if name != self.lora_name)
        del owner._modules[PART + self.lora_name]
        owner.__class__ = owner_class(base, names) if names else base

    def extra_repr(self) -> str:
        return f"{self.lora_name}: {list(self.weight.shape)}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Module.__reduce_ex__(self, protocol)


class ParameterOwner:
    """In front of the class of a module with adapted parameters: its forward finds the sums in their places."""

    lora_base_class: type[nn.Module]
    lora_names: tuple[str, ...]
    _parameters: dict[str, Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        parts = parts_of_owner(cast(nn.Module, self))
        active = tuple(name for part in parts for name in part.lora_active)
        args, kwargs = tuple(_remembering(value, active) for value in args), {key: _remembering(value, active) for key, value in kwargs.items()}
        if not active:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        sums = {part.lora_name: part(self._parameters[part.lora_name]) for part in parts if part.lora_active}
        totals = {name: read_one_by_one(made.total.view(self._parameters[name].shape)) for name, made in sums.items()}
        if torch.compiler.is_compiling():  # which does not trace two contexts in one
            with standing_in(cast(nn.Module, self), totals):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        with forgotten(list(sums.values())), standing_in(cast(nn.Module, self), totals):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy: the class is made on the fly, so it travels as its base class and the names."""
        return _rebuild, (type(self).lora_base_class, type(self).lora_names), dict(self.__dict__)


def _remembering(value: Any, active: tuple[str, ...]) -> Any:
    return remember_selection(value, active) if isinstance(value, Tensor) else value


_CLASSES: dict[tuple[type, tuple[str, ...]], type[nn.Module]] = {}


def owner_class(base: type, names: tuple[str, ...]) -> type[nn.Module]:
    """The class `base` whose parameters of these names can be stood in for; one per base class and names."""
    if (base, names) not in _CLASSES:
        own = {"lora_base_class": base, "lora_names": names, "__module__": __name__, "__doc__": base.__doc__}
        _CLASSES[base, names] = type(f"LoRA{base.__name__}", (ParameterOwner, base), own | {name: replaceable(name) for name in names})
    return _CLASSES[base, names]


def _rebuild(base: type, names: tuple[str, ...]) -> nn.Module:
    cls = owner_class(base, names)
    return cls.__new__(cls)


def adapted_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that carry adapters themselves, in the order in which it has them."""
    return cast("tuple[str, ...]", getattr(type(module), "lora_names", ()))


def parts_of_owner(module: nn.Module) -> list[ParameterLoRA]:
    return [cast(ParameterLoRA, module._modules[PART + name]) for name in adapted_names(module)]


def part_of(model: nn.Module, path: str) -> ParameterLoRA:
    """The adapters of the parameter "experts.down_proj": those it has, or a new module for them, not registered yet."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    known = module._modules.get(PART + name)
    return known if isinstance(known, ParameterLoRA) else ParameterLoRA(module, name)


def part_at(model: nn.Module, path: str) -> ParameterLoRA | None:
    """`part_of` a path in a file; None where the model has no such parameter."""
    owner, _, name = path.rpartition(".")
    try:
        known = name in model.get_submodule(owner)._parameters
    except AttributeError:
        known = False
    return part_of(model, path) if known else None


def parameter_path(path: str) -> str:
    """The parameter whose adapters are at a path; of a layer its own path.

    >>> parameter_path("experts.lora_of_down_proj"), parameter_path("attention.q_proj")
    ('experts.down_proj', 'attention.q_proj')
    """
    owner, dot, name = path.rpartition(".")
    return f"{owner}{dot}{name.removeprefix(PART)}"


def is_transposed(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether a stack is [n, in, out]: as in transformers and PEFT the module says so."""
    return parameter.ndim == 3 and bool(getattr(owner, "is_transposed", False))


def refuse_rows(layers: dict[str, LoRA], names: Sequence[str | None]) -> None:
    """For per_sample. Raises LoraLabError where one of the adapters is on a parameter, which all rows share."""
    for path, layer in layers.items():
        if isinstance(layer, ParameterLoRA) and (own := [name for name in names if name in layer.lora_variant]):
            raise LoraLabError(f"per_sample: {own[0]!r} adapts the parameter {parameter_path(path)!r}, with which its module computes all rows at "
                               "once; run the rows of each adapter in a batch of their own")  # fmt: skip
