"""LoRA layers, written by hand: ``y = W x + scaling * B A x`` (Hu et al. 2021, arXiv:2106.09685, equation 3).

        x ──┬────────── W [out, in], frozen ─────────────┬─(+)── y
            └── A [r, in] ── r numbers ── B [out, r] ────┘

A LoRA layer *is* the layer it adapts: `adapt` switches ``module.__class__`` to a class made of the mixin `LoRA` in front of
the module's own class. Identity, hooks, state-dict keys, ``isinstance`` and tied weights stay as they were. `LoRALinear` is
the same mixin as an ordinary class, to construct and to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapted_linear import adapted_linear, is_simple
from .checks import check_numbers, check_rank
from .initialization import INITIALISATIONS
from .kinds import LinearKind, kind_of
from .selection import RowSelection, remember_selection
from .variants import LORA, Variant, variant_of


class AdapterParameters(nn.Module):
    """Parameters by adapter name, so that a state dict has ``<module>.lora_A.<adapter>``.

    Unlike nn.ParameterDict it takes any name ("keys" and "training" included): parameters are not attributes here.
    """

    always_float32 = True  # `fit` leaves these in float32 whatever the precision of the base

    def __init__(self) -> None:
        super().__init__()
        # nn.TransformerEncoderLayer's eval fast path reads linear1.weight without calling linear1; a hook anywhere inside turns it off
        self.register_forward_pre_hook(_never_called)

    def __getitem__(self, adapter: str) -> nn.Parameter:
        parameter = self._parameters[adapter]
        assert parameter is not None
        return parameter

    def __setitem__(self, adapter: str, parameter: nn.Parameter) -> None:
        self._parameters[adapter] = parameter

    def __delitem__(self, adapter: str) -> None:
        del self._parameters[adapter]

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {list(p.shape)}" for name, p in self._parameters.items() if p is not None)


def _never_called(module: nn.Module, inputs: Any) -> None:
    """Never called; registering any hook turns off nn.TransformerEncoderLayer's fast path, which would leave the adapters out."""


def containers_of(module: nn.Module) -> dict[str, AdapterParameters]:
    """What a layer keeps of its adapters: lora_A, lora_B, and whatever their variants have beside."""
    return {name: child for name, child in module._modules.items() if isinstance(child, AdapterParameters)}


class LoRA:
    """Mixin in front of the layer's own class: parameters, scaling, dropout and variant of each adapter, by its name.

    lora_A[name]: [r, in].  lora_B[name]: [out, r].  lora_scaling[name]: float.  lora_dropout[name]: float.  lora_variant[name]: see variants.py; its
    keys are the layer's adapters, as not every variant has an A and a B.
    lora_active: the adapters whose updates are added, in order; empty means the layer computes what it did before. lora_kind: see kinds.py.
    A variant may have containers of its own (lora_magnitude_vector, ...), lora_B_bias[name] [out] is there with lora_bias=True.
    """

    lora_base_class: type[nn.Module]
    lora_A: AdapterParameters
    lora_B: AdapterParameters
    lora_B_bias: AdapterParameters
    lora_magnitude_vector: AdapterParameters
    lora_A_start: AdapterParameters
    lora_B_start: AdapterParameters
    lora_scaling: dict[str, float]
    lora_dropout: dict[str, float]
    lora_variant: dict[str, Variant]
    lora_active: tuple[str, ...]
    training: bool

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input: [..., in].  Returns [..., out] in the base layer's dtype."""
        x = remember_selection(input, self.lora_active)
        if (result := self._in_one_function(x)) is not None:
            return result
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if isinstance(self.lora_active, RowSelection):
            return self._add_by_row(self.lora_active, x, y)
        result = y
        for adapter in self.lora_active:
            result = self.lora_variant[adapter].output(self, adapter, x, y, result)
        return result

    def _in_one_function(self, x: Tensor) -> Tensor | None:
        """``W x + scaling * B A x`` of a linear layer with one plain adapter, in place and keeping less (adapted_linear.py); else None."""
        if type(self) is LoRALinear and (pair := self.lora_only_pair()) is not None:
            (A, B, scaling), weight, bias = pair, self.weight, self.bias
            if is_simple(x, weight, bias, A):
                return adapted_linear(x, weight, bias, self._remembered(A, x), B, scaling)
        return None

    def _remembered(self, update: Tensor, x: Tensor) -> Tensor:
        """The update, or A, with checkpointing's check of the selection attached, where x (of a first layer, of an embedding) has no gradient to
        carry it."""
        return update if x.requires_grad else remember_selection(update, self.lora_active)

    def _add_by_row(self, selected: RowSelection, x: Tensor, y: Tensor) -> Tensor:
        """Add to each row of the batch the update of its own adapter."""
        updates, places, dim = [], [], selected.dim
        if dim == 0 and self.lora_kind.by_product and all(self._is_plain(adapter) for adapter in selected):
            return self._add_batched(selected, x, y)
        for variant in map(self.lora_variant.__getitem__, selected):
            if variant.replaces:
                return variant.output_by_row(self, selected, x, y)
        for adapter, rows in selected.indices(x).items():
            own_x, own_y = x.index_select(dim, rows), y.index_select(dim, rows)
            updates.append(self.lora_variant[adapter].update(self, adapter, own_x, own_y).to(y.dtype))
            places.append(rows)
        return y.index_add(dim, torch.cat(places), self._remembered(torch.cat(updates, dim), x)) if updates else y

    def lora_only_pair(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and scaling of the active adapter where it is one, the same for every row, and plain; else None."""
        active = self.lora_active
        if len(active) != 1 or isinstance(active, RowSelection) or not self._is_plain(active[0]):
            return None
        return *self.lora_variant[active[0]].pair(self, active[0]), self.lora_scaling[active[0]]

    def _is_plain(self, adapter: str) -> bool:
        """Whether the update is two products and nothing else."""
        dropped = self.training and self.lora_dropout[adapter] > 0
        return self.lora_variant[adapter].is_pair and not dropped and adapter not in self.lora_extra("lora_B_bias")

    def _add_batched(self, selected: RowSelection, x: Tensor, y: Tensor) -> Tensor:
        """``y_n + B_n A_n x_n`` for every name n as one batched product; smaller ranks are filled up with zeros, None has A = B = 0."""
        selected.times(x)
        names = list(selected)
        if not names:
            return y
        pairs = [(A, self.lora_scaling[name] * B) for name in names for A, B in [self.lora_variant[name].pair(self, name)]]
        rank = max(A.shape[0] for A, _ in pairs)
        A = torch.stack([F.pad(A.to(x.dtype), (0, 0, 0, rank - A.shape[0])) for A, _ in pairs])
        B = torch.stack([F.pad(B.to(x.dtype), (0, rank - B.shape[1])) for _, B in pairs])
        which = torch.tensor([names.index(row) if row is not None else len(names) for row in selected.rows], device=x.device)
        A, B = (torch.cat((stack, torch.zeros_like(stack[:1])))[which] for stack in (A, B))
        low = torch.bmm(x.reshape(len(selected.rows), -1, x.shape[-1]), A.mT)
        low = self._remembered(low, x)
        return torch.baddbmm(y.reshape(len(selected.rows), -1, y.shape[-1]), low, B.mT).view_as(y)

    def lora_update(self, adapter: str, x: Tensor) -> Tensor:
        """``scaling * (B A x + bias)``: [..., in] -> [..., out], in training with dropout. Casts the small A and B to x's dtype, not x to theirs."""
        A, B = self.lora_variant[adapter].pair(self, adapter)
        kind, scaling = self.lora_kind, self.lora_scaling[adapter]
        dtype, dropout = kind.dtype(self, x), self.lora_dropout[adapter] if self.training else 0.0
        update = kind.update(self, x, A.to(dtype), B.to(dtype), scaling, dropout)
        if adapter not in self.lora_extra("lora_B_bias"):
            return update
        return update + kind.spread(self, scaling * self.lora_B_bias[adapter].to(update.dtype))

    def lora_delta(self, adapter: str) -> Tensor:
        """What the adapter changes of the weight, ``scaling * B @ A`` for LoRA: [out, in], whatever the orientation of the base weight."""
        return self.lora_variant[adapter].delta(self, adapter)

    @property
    def lora_kind(self) -> LinearKind:
        kind = kind_of(cast(nn.Module, self))
        assert kind is not None
        return kind

    def lora_extra(self, name: str) -> Mapping[str, nn.Parameter]:
        """A container that only some adapters need, or an empty one."""
        return cast("Mapping[str, nn.Parameter]", cast(nn.Module, self)._modules.get(name, {}))

    def lora_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's tensors by container: lora_A, lora_B, and what its variant has."""
        return {name: container[adapter] for name, container in containers_of(cast(nn.Module, self)).items() if adapter in container}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy: the class is made on the fly, so it travels as its base class."""
        base = type(self).lora_base_class
        if type(self) is not cast(type, lora_class(base)):  # somebody's own subclass of LoRALinear
            return super().__reduce_ex__(protocol)
        return _rebuild, (base,), dict(self.__dict__)


class LoRALinear(LoRA, nn.Linear):
    """An nn.Linear with one LoRA adapter called "default"; the rest of the layer is frozen.

    in_features, out_features: of the base.  rank: r >= 1.  alpha: the scaling is alpha / rank (None: alpha = rank).
    Raises LoraLabError for a rank below 1.

    >>> layer = LoRALinear(512, 64, rank=8)
    >>> layer.weight.numel(), layer.lora_A["default"].numel() + layer.lora_B["default"].numel()
    (32768, 4608)
    """

    lora_base_class = nn.Linear

    def __init__(self, in_features: int, out_features: int, rank: int = 8, *, alpha: float | None = None, dropout: float = 0.0,
                 bias: bool = True, init: str = "kaiming", device: Any = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        check_numbers(rank, alpha, dropout, init)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        scaling = (rank if alpha is None else alpha) / rank
        attach(self, "default", new_tensors(self, rank, variant_of("lora", init), scaling, init), scaling, dropout, variant_of("lora", init))
        self.lora_active = ("default",)


# Switching a layer's class --------------------------------------------------------------------------------------------------


_CLASSES: dict[type, type[nn.Module]] = {nn.Linear: LoRALinear}


def lora_class(base: type) -> type[nn.Module]:
    """The class `base` with `LoRA` in front of it; one per base class, so that isinstance and pickle agree."""
    if base not in _CLASSES:
        _CLASSES[base] = _new_class(base)
    return _CLASSES[base]


def _new_class(base: type) -> type[nn.Module]:
    return type(f"LoRA{base.__name__}", (_mixin(base), base), {"lora_base_class": base, "__module__": __name__, "__doc__": base.__doc__})


def _mixin(base: type) -> type[LoRA]:
    if not issubclass(base, (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)):
        return LoRA
    from .multihead import mixin_of  # which is made of what is in this file

    return mixin_of(base)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = lora_class(base)
    return cls.__new__(cls)


def adapt(module: Any) -> None:
    """Switch a layer to its LoRA class, with no adapter yet: it computes exactly what it did."""
    if not isinstance(module, LoRA):
        module.__class__ = lora_class(type(module))
    if "lora_A" not in module._modules:
        module.lora_A, module.lora_B = AdapterParameters(), AdapterParameters()
        module.lora_scaling, module.lora_dropout, module.lora_variant, module.lora_active = {}, {}, {}, ()


def detach_adapters(module: Any) -> dict[str, Any]:
    """Make a LoRA layer the plain layer it was; returns what `reattach_adapters` needs to undo that."""
    if hasattr(module, "lora_unregister"):  # the adapters of a parameter, beside it (parameters/)
        return {"owner": module.lora_unregister()}
    containers = {name: module._modules.pop(name) for name in containers_of(module)}
    settings = {name: module.__dict__.pop(name) for name in ("lora_scaling", "lora_dropout", "lora_variant", "lora_active")}
    own, base = type(module), type(module).lora_base_class
    module.__class__ = base
    return {"containers": containers, "settings": settings, "class": None if own is lora_class(base) else own}


def reattach_adapters(module: Any, detached: dict[str, Any]) -> None:
    """The same adapters, the same Parameter objects, back in their places, on the device where the layer is by now."""
    device, _ = device_and_dtype(module)
    if "owner" in detached:
        module.to(device).lora_register()
        return
    module.__class__ = detached["class"] or lora_class(type(module))
    module._modules.update({name: container.to(device) for name, container in detached["containers"].items()})
    module.__dict__.update(detached["settings"])


Tensors = dict[str, nn.Parameter]  # container -> an adapter's tensor in it


def new_tensors(
    module: nn.Module, rank: int, variant: Variant = LORA, scaling: float = 1.0, init: str = "kaiming", dtype: torch.dtype | None = None,
    lora_bias: bool = False,
) -> Tensors:  # fmt: skip
    """An adapter's tensors for a layer, on its device: A and B, and what the variant needs; dtype None: see `adapter_dtype`."""
    kind = module.lora_kind if isinstance(module, LoRA) else kind_of(module)
    assert kind is not None
    device, stored = device_and_dtype(module)
    dtype = dtype or adapter_dtype(stored)
    A, B = (torch.empty(shape, device=device, dtype=dtype) for shape in variant.shapes(kind, module, check_rank(rank)))
    with torch.no_grad():
        for piece_A, piece_B in variant.pieces(A, B):
            INITIALISATIONS[init](piece_A, piece_B)
        extras = variant.extras(kind, module, A, B, scaling)
    if lora_bias:
        extras["lora_B_bias"] = nn.Parameter(torch.zeros(B.shape[0], device=device, dtype=dtype))
    return {"lora_A": nn.Parameter(A), "lora_B": nn.Parameter(B), **extras}


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, and in what; a quantised one has no weight to ask."""
    if hasattr(module, "quantization"):
        return next(module.buffers()).device, cast(torch.dtype, module.compute_dtype)
    kind = kind_of(module)
    weight = getattr(module, kind.weight if kind else "weight")
    assert isinstance(weight, Tensor)
    return weight.device, weight.dtype


def attach(module: nn.Module, adapter: str, tensors: Tensors, scaling: float, dropout: float = 0.0, variant: Variant = LORA) -> None:
    """Give a layer one more adapter, not yet active."""
    adapt(module)
    assert isinstance(module, LoRA)
    for name, tensor in tensors.items():
        if name not in module._modules:
            module._modules[name] = AdapterParameters()
        cast(AdapterParameters, module._modules[name])[adapter] = tensor
    module.lora_scaling[adapter], module.lora_dropout[adapter], module.lora_variant[adapter] = scaling, dropout, variant


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """float32 on a 16-bit or quantised base (small updates vanish in 16 bit), else the base's own."""
    return base if base in (torch.float32, torch.float64) else torch.float32
