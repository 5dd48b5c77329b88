"""Put LoRA into a model, look before doing so, and take it out again.

    model = lora_lab.inject(model, rank=8)      # every linear layer but the head; the same object comes back
    ...train...
    model = lora_lab.eject(model)               # as if nothing had happened
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from . import layers as lora_layer
from .adapters import activate, use
from .base_parameters import BaseParameters, base_values, injections
from .checks import check_dtype
from .errors import LoraLabError
from .fused.parts import variant_for
from .merging import RECORD, merged_modules, refuse_merged, unmerge
from .parameters.layer import OnParameter, ParameterLoRA, part_of
from .plans import AdapterConfig, Plan
from .targets import adapter_names, attention_of, check_adapter_name, is_attention_output, lora_layers, make_plan
from .token_rows.rows import attach_rows, new_rows
from .wrapping import on_base, refuse_sharded, refuse_wrapped

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Injection:
    """What a model remembers of its adapters: how each was asked for, and what `eject` has to put back."""

    requires_grad: dict[str, bool]
    adapters: dict[str, AdapterConfig] = field(default_factory=dict)
    base_parameters: BaseParameters = field(default_factory=BaseParameters)
    lost: dict[str, float] = field(default_factory=dict)  # of adapters made by combine: what their rank could not hold
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)  # adapter -> paths of its layers


@on_base
def plan(model: nn.Module, rank: int = 8, **request: Any) -> Plan:
    """What `inject` with the same arguments, and no others, would do: a `Plan` to print. Changes nothing.

    >>> print(plan(nn.Sequential(nn.Linear(512, 64)), rank=8))
    0         1 x rank 8 * (512 in + 64 out) =        4,608
    total     1 layers, 4,608 parameters
    """
    inspect.signature(inject).bind(model, rank, **request)
    adapter = request.pop("adapter", "default")
    check_dtype(request.pop("dtype", None))
    _check_new_adapter(model, adapter)
    patterns = {name: request.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    return make_plan(model, AdapterConfig(**{"rank": rank, **request, **patterns}))


@on_base
def inject(model: Model, rank: int = 8, *, alpha: float | None = None, target_modules: Any = "all-linear",
           exclude_modules: str | Sequence[str] | None = None, layers: Sequence[int] | None = None,
           rank_pattern: dict[str, int] | None = None, alpha_pattern: dict[str, float] | None = None, dropout: float = 0.0,
           variant: str = "lora", rslora: bool = False, init: str = "kaiming", freeze_A: bool = False, bias: str = "none",
           lora_bias: bool = False, modules_to_save: Sequence[str] | None = None, fused: Any = None,
           trainable_token_indices: Any = None, target_parameters: Sequence[str] | None = None,
           adapter: str = "default", dtype: torch.dtype | None = None) -> Model:  # fmt: skip
    """Adapt the layers a request names, in place; returns the same model with everything but the new adapter frozen.

    rank: r of A [r, in] and B [out, r].  alpha: the scaling is alpha / rank; None means alpha = rank, scaling 1.
    target_modules: "all-linear" (every linear layer but the head), "attention", a list of names matched at dots from the
        right, a regular expression over the whole path, a layer class or several, or a function of path and module.
        A name may end with a part of a fused layer, "c_attn.q": the part gets a pair of its own, the others none (fused/).
    fused: {layer: {part: its number of outputs, or a list of their numbers}} for layers whose layout is not known.
    exclude_modules: names or a regular expression, left out.
    layers: the layer numbers to adapt.  rank_pattern, alpha_pattern: {name or pattern: value} for layers that differ.
    dropout: on the adapter's input, in training.  rslora: scaling alpha / sqrt(rank).
    variant: "lora" | "dora" (magnitude and direction apart).  freeze_A: only B trains (LoRA-FA).  lora_bias: B with a bias of its own.
    init: "kaiming" | "gaussian" | "orthogonal" | "pissa" (all start from a zero update; see initialization.py, variants.py) | "random"
        (does not; for tests).
    bias: "none" | "lora_only" (those of the adapted layers) | "all": biases that train along.  modules_to_save: names of modules that are trained
        whole, such as a new head; the adapter has values of its own for both, and the base's come back when it is off (base_parameters.py).
    trainable_token_indices: ids of words whose rows of the input embedding train, or {name of an embedding: ids}; a list of target_modules may be
        empty then. An output layer that the configuration ties to the embedding takes the same rows (token_rows/).
    target_parameters: names of parameters, such as stacks of experts, that are adapted themselves; a list of target_modules may be empty then.
        Without dropout, DoRA and lora_bias (parameters/).
    adapter: its name. A further inject adds an adapter, makes it the only active and trainable one; earlier ones keep their values.
    dtype: of A and B; None is float32 on a 16-bit base, else the base's.
    Raises LoraLabError, the model untouched, for anything that matches nothing or makes no sense.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.

    >>> model = inject(nn.Sequential(nn.Linear(512, 64)), rank=8)
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
    ['0.lora_A.default', '0.lora_B.default']
    """
    config = AdapterConfig(rank, alpha, target_modules, exclude_modules, layers, rank_pattern or {}, alpha_pattern or {}, dropout, rslora, init,
                           variant, freeze_A, lora_bias, bias, modules_to_save, fused, trainable_token_indices, target_parameters)  # fmt: skip
    check_dtype(dtype)
    _check_new_adapter(model, adapter)
    apply_plan(model, make_plan(model, config), adapter, dtype=dtype)
    return model


@on_base
def eject(model: Model) -> Model:
    """Remove every adapter: the layers' own classes come back, and every `requires_grad` is what it was before `inject`.

    A merge is undone first; one with restorable=False stays in the weights, which are plain weights from then on.
    Raises LoraLabError, the model untouched, where there is nothing to eject, and after fully_shard.
    """
    refuse_sharded(model, "eject")
    merged = merged_modules(model)
    if not merged and not lora_layers(model):
        raise LoraLabError(f"this {type(model).__name__} has no LoRA layers to eject: call inject first")
    for owner in merged:
        _end_merge(owner)
    use(model, None)
    for layer in lora_layers(model).values():
        lora_layer.detach_adapters(layer)
    for owner in model.modules():
        if (injection := vars(owner).pop("lora_injection", None)) is not None:
            _restore_requires_grad(owner, injection)
    return model


def _end_merge(owner: Any) -> None:
    if owner.lora_merge.restorable:
        unmerge(owner)
    else:
        delattr(owner, RECORD)
        for _, injection in injections(owner):
            injection.base_parameters = BaseParameters()


def apply_plan(model: nn.Module, plan: Plan, adapter: str, dtype: torch.dtype | None = None, trainable: bool = True) -> None:
    """Carry out a plan. All memory is allocated before the first change, so that failing leaves the model as it was."""
    targets: list[nn.Module] = [part_of(model, p.path) if p.stack else model.get_submodule(p.path) for p in plan.layers]
    config = plan.config
    variants = [
        OnParameter(config.freeze_A) if planned.stack else variant_for(config.variant, config.init, config.freeze_A, planned.parts)
        for planned in plan.layers
    ]
    tensors = [
        lora_layer.new_tensors(layer, p.rank, variant, p.scaling, config.init, dtype, config.lora_bias)
        for layer, p, variant in zip(targets, plan.layers, variants, strict=True)
    ]
    rows = [new_rows(model, planned, dtype) for planned in plan.tokens]
    starts = base_values(model, plan.along)
    injection = injection_of(model) or new_injection(model)
    model.requires_grad_(False)
    for layer, own, planned, variant in zip(targets, tensors, plan.layers, variants, strict=True):
        if is_attention_output(layer):
            lora_layer.adapt(attention_of(model, planned.path))
        if isinstance(layer, ParameterLoRA):
            layer.lora_register()
        lora_layer.attach(layer, adapter, own, planned.scaling, config.dropout, variant)
    for tokens, own_rows in zip(plan.tokens, rows, strict=True):
        attach_rows(model, adapter, tokens, own_rows)
    injection.adapters[adapter] = config
    injection.places[adapter] = tuple(path for path, layer in lora_layers(model).items() if adapter in layer.lora_variant)
    injection.base_parameters.add(adapter, starts)
    activate(model, (adapter,), trainable=trainable)


def injection_of(model: nn.Module) -> Injection | None:
    """The model's own record of its adapters; None where nothing was injected at this level."""
    injection = vars(model).get("lora_injection")
    assert injection is None or isinstance(injection, Injection)
    return injection


def new_injection(model: nn.Module) -> Injection:
    """Begin the record, with every requires_grad as it is now."""
    injection = Injection({name: p.requires_grad for name, p in model.named_parameters()})
    model.lora_injection = injection  # type: ignore[assignment]
    return injection


def _restore_requires_grad(model: nn.Module, injection: Injection) -> None:
    for name, parameter in model.named_parameters():
        if name in injection.requires_grad:
            parameter.requires_grad_(injection.requires_grad[name])


def _check_new_adapter(model: nn.Module, adapter: str) -> None:
    refuse_merged(model, "inject")
    refuse_wrapped(model, "inject")
    refuse_sharded(model, "inject")
    check_adapter_name(adapter)
    if adapter in (taken := adapter_names(model)):
        raise LoraLabError(f"adapter={adapter!r} is already in this model (it has {taken}): choose another name, or eject first")
