"""Which parameters a request names with ``target_parameters``, and which of them cannot be adapted so, each with the reason.

Matching is PEFT's: a name matches the path of a parameter at dots from the right, "experts.down_proj" or "down_proj".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import LoraLabError, did_you_mean
from ..layers import AdapterParameters, LoRA
from ..paths import name_matches
from .layer import PART, adapted_names


def own_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Every parameter of the model itself by its path, and the module it is in; a shared module once, as in PEFT."""
    return {
        f"{path}.{name}".removeprefix("."): (module, parameter)
        for path, module in model.named_modules()
        if not isinstance(module, AdapterParameters)
        for name, parameter in module.named_parameters(recurse=False)
    }


def match_parameters(model: nn.Module, names: Any) -> list[str]:
    """Paths of the parameters that `target_parameters` names, at dots from the right, as in PEFT.

    Raises LoraLabError for a name that matches nothing, and for a parameter that cannot be adapted so.
    """
    check_names(names)
    if names is None:
        return []
    present = own_parameters(model)
    for name in names:
        if not any(name_matches(name, path) for path in present):
            here = dict.fromkeys(path.rpartition(".")[2] for path, (_, parameter) in present.items() if parameter.ndim in (2, 3))
            raise LoraLabError(f"target_parameters={list(names)!r}: {name!r} {_why_no_match(model, name)}.\n  Parameters of two or three dimensions "
                               f"here: {', '.join(here) or 'none'}{did_you_mean(name.rpartition('.')[2], here)}")  # fmt: skip
    matched = [path for path in present if any(name_matches(name, path) for name in names)]
    for path in matched:
        check_parameter(path, *present[path])
    return matched


def check_names(names: Any) -> None:
    several = names is None or (isinstance(names, (Sequence, set, frozenset)) and not isinstance(names, str))
    if not several or not all(isinstance(name, str) for name in names or ()):
        raise LoraLabError(f"target_parameters={names!r}: expected a list of names like ['experts.gate_up_proj', 'experts.down_proj']")


def _why_no_match(model: nn.Module, name: str) -> str:
    for path, module in model.named_modules():
        if path and name_matches(name, path):
            own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
            return f"is a {type(module).__name__}" + (f": name its parameters, {', '.join(own)}" if own else " without parameters of its own")
    owner, _, last = name.rpartition(".")
    for path, module in model.named_modules():
        if owner and name_matches(owner, path) and hasattr(module, "quantization"):
            return f"has no parameter: {path!r} is quantised to {module.quantization}, whose weight is adapted with target_modules"
        if owner and name_matches(owner, path) and hasattr(module, last):
            return f"is a {type(getattr(module, last)).__name__}, no parameter (a buffer, or computed by a parametrisation)"
    return "matches nothing"


def check_parameter(path: str, owner: nn.Module, parameter: nn.Parameter) -> None:
    """What cannot be adapted as a parameter, each with the reason."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise LoraLabError(f"{path!r} does not know its shape yet: run the model once before inject")
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise LoraLabError(f"{path!r} is {parameter.dtype}, a quantised weight to which no update can be added: adapt its layer with target_modules")
    if parameter.ndim not in (2, 3) or not parameter.numel():
        raise LoraLabError(f"{path!r} has shape {list(parameter.shape)}: expected a matrix [out, in] or a stack of them [n, out, in] "
                           "(train a vector whole, with modules_to_save or bias)")  # fmt: skip
    if type(owner).forward is nn.Module.forward:
        raise LoraLabError(f"{path!r} is in an {type(owner).__name__}, which has no forward for the update to be in: an adapter there would "
                           "do nothing")  # fmt: skip
    if "forward" in vars(owner):
        raise LoraLabError(f"{path!r}: the forward of its {type(owner).__name__} was replaced by a function (accelerate's hooks do so), which would "
                           "go around the adapter: inject first")  # fmt: skip
    if isinstance(owner, nn.RNNBase):
        raise LoraLabError(f"{path!r} is of an {type(owner).__name__}, which computes with a list of its weights: an adapter there would do nothing")
    if _is_output(owner):
        raise LoraLabError(f"{path!r} is read by its nn.MultiheadAttention without a call of its own: adapt it with target_modules=['out_proj']")
    if isinstance(owner, LoRA):
        raise LoraLabError(f"{path!r} is of a layer that is adapted itself: name it with target_modules, or eject first")
    if hasattr(owner, PART + path.rpartition(".")[2]) and path.rpartition(".")[2] not in adapted_names(owner):
        raise LoraLabError(f"{path!r}: the module has an attribute {PART + path.rpartition('.')[2]!r}, where its adapter would be")


def check_request(path: str, config: Any) -> None:
    """What an adapter of a parameter cannot have: it is added to a weight and knows neither input nor output."""
    for name, idle in (("dropout", 0.0), ("variant", "lora"), ("lora_bias", False)):
        if (value := getattr(config, name)) != idle:
            raise LoraLabError(f"{name}={value!r}, but {path!r} is a parameter, to which an update is added before anything runs: {name}={idle!r}, "
                               "or an adapter of its own for target_parameters")  # fmt: skip
    if config.init == "pissa":
        raise LoraLabError(f"init='pissa', but {path!r} is a parameter, and PiSSA is for the weights of layers: use another init")


def check_apart(model: nn.Module, layers: Sequence[str], embeddings: Sequence[str], parameters: Sequence[str]) -> None:
    """Raise LoraLabError where a layer is adapted as a layer and its weight as a parameter. layers, embeddings: what a plan adapts otherwise."""
    owners = {path.rpartition(".")[0]: path for path in parameters}
    for path in (path for path in (*layers, *embeddings) if path not in parameters):
        if path in owners:
            raise LoraLabError(f"target_parameters names {owners[path]!r}, the weight of a layer that is adapted as a layer, too: leave out one of "
                               "them (target_modules=[] adapts parameters only)")  # fmt: skip
        if adapted := adapted_names(model.get_submodule(path)):
            raise LoraLabError(f"{path!r} cannot be adapted as a layer: an adapter is on its parameter {adapted[0]!r}; name that with "
                               "target_parameters, leave the layer out with exclude_modules, or eject first")  # fmt: skip
        attention = path.rpartition(".")[0]
        if _is_output(model.get_submodule(path)) and (attention in owners or adapted_names(model.get_submodule(attention))):
            raise LoraLabError(f"{path!r} is read by its nn.MultiheadAttention, whose in_proj_weight is adapted as a parameter: adapt both with "
                               f"target_modules=[{attention.rpartition('.')[2]!r}]")  # fmt: skip


def _is_output(module: nn.Module) -> bool:
    """The output projection of nn.MultiheadAttention, which is never called."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
