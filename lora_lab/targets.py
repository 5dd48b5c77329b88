"""Which layers a request names, with which rank and alpha; which of a model's layers have adapters, and of which names.

Matching follows PEFT, so that a request and a file mean the same layers in both: a list of names matches at dots from the
right ("q_proj", "mlp.down_proj"), a string is a regular expression over the whole path.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .base_parameters import base_parameter_names, modules_of, tensor_of
from .checks import check_alpha, check_numbers, check_rank
from .errors import LoraLabError, did_you_mean
from .fused.layouts import check_parts, parts_of, split_part
from .fused.parts import Layout
from .kinds import is_adaptable, is_linear, kind_of, layer_shape
from .layers import LoRA
from .parameters.layer import as_stack, part_of
from .parameters.targets import check_apart, check_request, match_parameters
from .paths import ancestors, is_inside, layer_number, name_matches
from .patterns import compile_pattern, ways_with
from .plans import AdapterConfig, Plan, PlannedLayer, first_match
from .token_rows.targets import plan_rows
from .variants import variant_of

ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ATTENTION_PART = re.compile(r"attn|attention", re.IGNORECASE)
CLASSIFIER_HEADS = ("score", "classifier")
KEYWORDS = ("all-linear", "attention")


def check_attention(path: str, module: Any, config: AdapterConfig) -> None:
    """nn.MultiheadAttention takes weights, not functions of its input: no dropout on the input, no bias, and q, k and v of one width."""
    for name, idle in (("dropout", 0.0), ("lora_bias", False)):
        if (value := getattr(config, name)) != idle:
            raise LoraLabError(f"{name}={value!r}, but {path!r} is of an nn.MultiheadAttention, which takes a weight and nothing else: leave it out")
    if getattr(module, "_qkv_same_embed_dim", True) is False:
        raise LoraLabError(f"{path!r} is an nn.MultiheadAttention with kdim or vdim of its own, which has no in_proj to adapt: name other layers")


def make_plan(model: nn.Module, config: AdapterConfig) -> Plan:
    """Resolve a request against a model. Changes nothing; raises LoraLabError for anything that matches nothing."""
    check_config(config)
    paths = dict(adaptable_layers(model))
    parts = parts_of(model, paths, config.target_modules, config.fused)
    parameters = match_parameters(model, config.target_parameters)
    no_layers = (config.trainable_token_indices is not None or bool(parameters)) and config.target_modules in ([], ())
    named = [] if no_layers else with_outputs(paths, match_targets(model, paths, config.target_modules, parts), parts)
    for path in named:
        if is_attention_output(paths[path]):
            attention_of(model, path)
    named += parameters
    check_layers(named, config.layers)
    saved = modules_of(model, config.modules_to_save)
    left_out = excluded(named, config.exclude_modules) | inside(named, saved)
    targets = [path for path in named if path not in left_out and (config.layers is None or layer_number(path) in config.layers)]
    if not targets and (parameters or not no_layers):
        raise LoraLabError(f"exclude_modules={config.exclude_modules!r}, layers={config.layers!r} and modules_to_save={config.modules_to_save!r} "
                           "leave no layer to adapt")  # fmt: skip
    for name in ("rank_pattern", "alpha_pattern"):
        check_patterns(name, getattr(config, name), targets)
    along = base_parameter_names(model, targets, config.bias, config.modules_to_save)
    numel = sum(p.numel() for p in {id(p): p for p in (tensor_of(model, name) for name in along)}.values() if isinstance(p, nn.Parameter))
    tokens = plan_rows(model, config.trainable_token_indices, targets, saved, config.variant)
    check_apart(model, targets, [rows.path for rows in tokens], parameters)
    planned = [
        plan_parameter(model, path, config) if path in parameters else plan_layer(path, paths[path], config, parts.get(path)) for path in targets
    ]
    return Plan(config, tuple(planned), along, numel, tokens)


def inside(targets: list[str], modules: list[str]) -> set[str]:
    """Targets in a module that is trained whole: they need no adapter."""
    return {path for path in targets if is_inside(path, modules)}


def plan_layer(path: str, module: nn.Module, config: AdapterConfig, parts: Layout | None = None) -> PlannedLayer:
    """parts: of a fused layer, those that are adapted."""
    config = of_its_attention(path, config) if is_attention_output(module) else config
    (fan_in, fan_out), rank, kind = layer_shape(module), config.rank_of(path), kind_of(module)
    assert kind is not None
    check_layer(path, module, config)
    if parts is not None:
        check_parts(path, parts, config)
        more = sum(parts.sizes) if config.variant == "dora" else 0
        return PlannedLayer(path, fan_in, fan_out, rank, config.alpha_of(path), config.scaling_of(path), more, parts)
    of_A, of_B = kind.pair_shapes(module, rank)
    vectors = fan_out * ((config.variant == "dora") + config.lora_bias)
    more = math.prod(of_A) + math.prod(of_B) - rank * (fan_in + fan_out) + vectors
    return PlannedLayer(path, fan_in, fan_out, rank, config.alpha_of(path), config.scaling_of(path), more)


def plan_parameter(model: nn.Module, path: str, config: AdapterConfig) -> PlannedLayer:
    """path: of a parameter that is adapted itself."""
    check_request(path, config)
    part = part_of(model, path)
    fan_in, fan_out = part.lora_kind.shape(part)
    numbers = config.rank_of(path), config.alpha_of(path), config.scaling_of(path)
    return PlannedLayer(path, fan_in, fan_out, *numbers, stack=len(as_stack(part.weight)))


def of_its_attention(path: str, config: AdapterConfig) -> AdapterConfig:
    """An output projection has its attention's rank and alpha, as in PEFT, where no pattern names it."""
    owner = path.rpartition(".")[0]
    rank = first_match(config.rank_pattern, path, first_match(config.rank_pattern, owner, config.rank))
    alpha = first_match(config.alpha_pattern, path, first_match(config.alpha_pattern, owner, config.alpha))
    return replace(config, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})


def check_layer(path: str, module: nn.Module, config: AdapterConfig) -> None:
    """What a layer of this kind cannot have."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise LoraLabError(f"{path!r} is a {type(module).__name__} that does not know its shape yet: run the model once before inject")
    groups = getattr(module, "groups", 1)
    if groups > 1 and (config.rank_of(path) % groups or config.variant == "dora" or config.init in ("orthogonal", "pissa")):
        asked = f"rank={config.rank_of(path)}, variant={config.variant!r}, init={config.init!r}"
        raise LoraLabError(f"{path!r} is a convolution with {groups} groups: it needs a rank that {groups} divides, and plain LoRA with init "
                           f"'kaiming', 'gaussian' or 'random' ({asked})")  # fmt: skip
    if is_attention_output(module) or isinstance(module, nn.MultiheadAttention):
        check_attention(path, module, config)
    if config.lora_bias and isinstance(module, nn.Embedding):
        raise LoraLabError(f"lora_bias=True, but {path!r} is an embedding: leave it out, or adapt it on its own without")


# Matching -----------------------------------------------------------------------------------------------------------------


def adaptable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that can be adapted with its path, once even where two paths reach it."""
    for path, module in model.named_modules():
        if is_adaptable(module):
            yield path, module


def match_targets(model: nn.Module, paths: dict[str, nn.Module], request: Any, parts: Collection[str] = ()) -> list[str]:
    """The layers that a request names. parts: those of which it names parts."""
    if isinstance(request, str) and request == "all-linear":
        matched = [path for path in paths if is_linear(paths[path]) and not is_head(model, path, paths[path])]
    elif isinstance(request, str) and request == "attention":
        attentions = [path for path in paths if isinstance(paths[path], nn.MultiheadAttention)]
        matched = [*attentions, *(path for path in paths if is_linear(paths[path]) and ATTENTION_PART.search(path.rpartition(".")[0]))]
    elif isinstance(request, str):
        pattern = compile_pattern(request, "target_modules")
        matched = [path for path in paths if pattern.fullmatch(path)]
    elif (types := layer_types(request)) is not None:
        matched = [path for path in paths if isinstance(paths[path], types)]
    elif callable(request):
        check_takes_two(request)
        matched = [path for path in paths if request(path, paths[path])]
    elif isinstance(request, Iterable):
        return match_names(model, paths, list(request), parts)
    else:
        raise LoraLabError(f"target_modules={request!r}: expected 'all-linear', 'attention', a list of names, a regular expression, "
                           "layer classes, or a function of path and module")  # fmt: skip
    if not matched:
        regular = isinstance(request, str) and request not in KEYWORDS
        hint = f" (a string is a regular expression over the whole path: for a name write [{request!r}])" if regular else ""
        raise LoraLabError(f"target_modules={request!r} matches no layer{hint}.{layers_here(paths, str(request))}")
    return matched


def check_takes_two(request: Any) -> None:
    try:
        inspect.signature(request).bind("path", None)
    except (TypeError, ValueError) as error:
        raise LoraLabError(f"target_modules={request!r}: expected a function of path and module ({error})") from None


def with_outputs(paths: dict[str, nn.Module], matched: list[str], parts: Collection[str] = ()) -> list[str]:
    """A request that names an nn.MultiheadAttention means its output projection, too, as in PEFT; one that names parts means those."""
    whole = (path for path in matched if path not in parts)
    outputs = {f"{path}.out_proj".removeprefix(".") for path in whole if isinstance(paths[path], nn.MultiheadAttention)}
    return [path for path in paths if path in outputs or path in matched]


def layer_types(request: Any) -> tuple[type, ...] | None:
    """The classes of a request that names layers by their class; None where it does not."""
    several = request if isinstance(request, (tuple, list, set)) else (request,)
    return tuple(several) if several and all(isinstance(item, type) for item in several) else None


def match_names(model: nn.Module, paths: dict[str, nn.Module], names: list[str], parts: Collection[str]) -> list[str]:
    for name in names:
        if not isinstance(name, str) or not (any(name_matches(name, path) for path in paths) or split_part(name, paths)[1]):
            raise LoraLabError(f"target_modules={names!r}: {name!r} {why_no_match(model, name)}.{layers_here(paths, str(name))}")
    if not names:
        raise LoraLabError(f"target_modules=[] names no layer.{layers_here(paths, '')}")
    return [path for path in paths if path in parts or any(name_matches(name, path) for name in names)]


def why_no_match(model: nn.Module, name: str) -> str:
    for path, module in model.named_modules():
        if path and name_matches(str(name), path):
            return f"is a {type(module).__name__}, which LoRA does not adapt here (name the linear layers in it)"
    return "matches nothing"


def layers_here(paths: Iterable[str], near: str) -> str:
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return f"\n  Linear layers here: {', '.join(names) or 'none'}{did_you_mean(near, names)}"


def is_head(model: nn.Module, path: str, module: nn.Module) -> bool:
    """The output embedding, or a top-level classifier: "all-linear" leaves both alone, as PEFT does."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if callable(get_output_embeddings) else None
    return module is head or path.split(".")[0] in CLASSIFIER_HEADS


def excluded(targets: list[str], request: str | Sequence[str] | None) -> set[str]:
    """The targets a request leaves out. A name leaves out what it matches and everything below; each has to leave out something."""
    if request is None:
        return set()
    if isinstance(request, str):
        pattern = compile_pattern(request, "exclude_modules")
        groups = {request: {path for path in targets if pattern.fullmatch(path)}}
    else:
        if not isinstance(request, Sequence) or not all(isinstance(name, str) for name in request):
            raise LoraLabError(f"exclude_modules={request!r}: expected a list of names, or a regular expression")
        groups = {name: {path for path in targets if any(name_matches(name, part) for part in ancestors(path))} for name in request}
    for name, paths in groups.items():
        if not paths:
            hint = f" (a string is a regular expression over the whole path: for a name write [{name!r}])" if isinstance(request, str) else ""
            raise LoraLabError(f"exclude_modules={request!r}: {name!r} matches none of the targets{hint}.{layers_here(targets, str(name))}")
    return set().union(*groups.values())


def check_layers(targets: list[str], layers: Sequence[int] | None) -> None:
    present = sorted({number for path in targets if (number := layer_number(path)) is not None})
    if absent := [number for number in layers or () if number not in present]:
        raise LoraLabError(f"layers={list(layers or ())}: there is no layer {absent[0]} among the targets; they are in {present}")


# Checks -------------------------------------------------------------------------------------------------------------------


def check_config(config: AdapterConfig) -> None:
    check_numbers(config.rank, config.alpha, config.dropout, config.init)
    variant_of(config.variant, config.init)
    if config.variant == "dora" and config.lora_bias:
        raise LoraLabError("variant='dora' with lora_bias=True: the magnitude scales the weight, not a bias; use bias='lora_only' to train biases")
    if config.init == "pissa" and config.alpha is not None and config.alpha <= 0:
        raise LoraLabError(f"alpha={config.alpha!r} with init='pissa': the principal part is divided by the scaling, which has to be above 0")
    for name in ("rslora", "freeze_A", "lora_bias"):
        if not isinstance(value := getattr(config, name), bool):
            raise LoraLabError(f"{name}={value!r}: expected True or False")
    ways = 0
    for name, pattern, check in (("rank_pattern", config.rank_pattern, check_rank), ("alpha_pattern", config.alpha_pattern, check_alpha)):
        if not isinstance(pattern, dict):
            raise LoraLabError(f"{name}={pattern!r}: expected a dict of name or pattern -> value")
        for key, value in pattern.items():
            ways = ways_with(key, name, ways)
            check(value, f"{name}[{key!r}]")
            if value is None:
                raise LoraLabError(f"{name}[{key!r}]=None: expected a number")
    if config.layers is not None and not (isinstance(config.layers, Iterable) and all(type(number) is int for number in config.layers)):
        raise LoraLabError(f"layers={config.layers!r}: expected a list of layer numbers")


def check_patterns(name: str, pattern: dict[str, Any], targets: list[str]) -> None:
    for key in pattern:
        if not any(first_match({key: True}, path, False) for path in targets):
            raise LoraLabError(f"{name}: pattern {key!r} matches none of the {len(targets)} adapted layers.{layers_here(targets, key)}")


def check_adapter_name(name: str) -> str:
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise LoraLabError(f"adapter={name!r}: expected 1 to 64 letters, digits, '-' or '_'")
    return name


def is_attention_output(module: nn.Module) -> bool:
    """The output projection of nn.MultiheadAttention, whose weight the attention reads without calling it; see multihead.py."""
    return any(base.__name__ == "NonDynamicallyQuantizableLinear" for base in type(module).__mro__)


def attention_of(model: nn.Module, path: str) -> nn.MultiheadAttention:
    """The attention that an output projection belongs to, which has to be adapted with it.

    Raises LoraLabError where there is none: an adapter there would train nothing, without a word.
    """
    owner = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(owner, nn.MultiheadAttention):
        raise LoraLabError(f"{path!r} is an output projection made for nn.MultiheadAttention, inside a {type(owner).__name__}, which reads its "
                           "weight without calling it: LoRA there would have no effect; leave it out with exclude_modules")  # fmt: skip
    return owner


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    """Every adapted layer of a model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRA)}


def adapter_names(model: nn.Module) -> list[str]:
    return sorted({name for layer in lora_layers(model).values() for name in layer.lora_variant})


def one_adapter(model: nn.Module, adapter: str | None, how: str = "") -> str:
    """The adapter of this name, or without one the active one. how: to name it, for the LoraLabError where that is not one."""
    known = adapter_names(model)
    if adapter is not None and adapter not in known:
        raise LoraLabError(f"adapter={adapter!r}: this model has {known or 'no adapters'}{did_you_mean(adapter, known)}")
    active = sorted({name for layer in lora_layers(model).values() for name in layer.lora_active})
    if adapter is None and len(active) != 1:
        raise LoraLabError(f"which adapter? {active or 'none'} of {known} active: name one{how}")
    return adapter or active[0]
