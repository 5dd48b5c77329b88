"""From an adapter folder to its `Contents`, in steps that each leave the names the next one knows. Nothing is changed.

    1  parameters     PEFT wraps a module once for each adapted parameter: without these wrappers "experts.lora_A" is of "experts.down_proj"
    2  token rows     taken out; PEFT's wrapper goes from the names of whole embeddings
    3  attentions     an output projection by its path in the model; pairs of zeros that are there for PEFT's sake go
    4  own tensors    what is of no adapter: biases, whole modules, embeddings; what is left are pairs
    5  layers         each pair with the layer it is for, its rank and scaling; then all of them with what the configuration names
    6  changed base   PiSSA and OLoRA as adapters of the base itself: needs 5 for the scalings, 4 for the file's copy of the base
    7  parts          of fused layers: last, as PEFT, and so each step before, knows them as plain pairs of the rank of all parts
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..base_parameters import PREFIX
from ..checks import are_finite
from ..errors import LoraLabError, did_you_mean
from ..kinds import is_adaptable, kind_of
from ..parameters.layer import part_at
from ..parameters.targets import check_apart
from ..plans import AdapterConfig, PlannedLayer
from ..streaming.shards import check_shape, opened
from ..targets import plan_layer, plan_parameter
from .attention import attentions_from_file, with_its_attention
from .base_parameters import adapted_paths, of_this_model, own_tensors, without_copies
from .changed_base import FOUND_AGAIN, on_the_base_itself
from .config import CONFIG, TENSORS, from_peft, initialisation, read_config, what_is_missing
from .contents import Contents, Layers, Named
from .fused import parts_from_file
from .parameters import check_pair, parameters_from_file
from .request import check_request
from .tokens import rows_from_file, rows_planned

KEY = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.(?P<which>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|lora_B\.bias)")
CONTAINERS = {  # name in a file -> container of the layer
    "lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector", "lora_B.bias": "lora_B_bias",
}  # fmt: skip


def read_contents(model: nn.Module, folder: Path) -> Contents:
    """Raises LoraLabError for a missing or damaged file, one of another model, and a feature that is not read here."""
    stored, metadata = _read_tensors(folder)
    written = read_config(folder, metadata, stacklevel=5)
    config = of_this_model(model, from_peft(written, folder / CONFIG, found_again=FOUND_AGAIN))
    by_parameter = parameters_from_file(model, stored, config.target_parameters, metadata, PREFIX, folder)
    without_rows, rows = rows_from_file(by_parameter)
    pairs, own = own_tensors(model, attentions_from_file(without_rows), config, folder)
    layers = _by_layer(pairs) if pairs or not rows else {}
    planned = tuple(_planned(model, path, named, config, folder) for path, named in layers.items())
    parameters = [layer.path for layer in planned if layer.stack]
    tokens = rows_planned(model, rows, config, layers, folder)
    check_apart(model, list(layers), [part.path for part in tokens], parameters)
    check_request(model, written, adapted_paths(without_rows) - set(parameters), folder)
    dtype = next(iter((pairs or rows).values())).dtype
    contents = Contents(config, planned, layers, own, tokens, rows, dtype, metadata.get("base_sha256"))
    if (init := initialisation(written)) in FOUND_AGAIN:
        contents = on_the_base_itself(model, init, contents, folder)
    plan, of_parts = parts_from_file(contents.plan, contents.layers, metadata, folder)
    return replace(contents, planned=plan.layers, layers=of_parts)


def _read_tensors(folder: Path) -> tuple[Named, dict[str, str]]:
    path = folder / TENSORS
    if not path.is_file():
        raise LoraLabError(what_is_missing(folder))
    with opened(path, "save or copy the adapter again") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        for key, tensor in tensors.items():
            check_shape(path, key, tensor.shape)
        return without_copies(tensors), file.metadata() or {}


def _by_layer(tensors: Named) -> Layers:
    layers: Layers = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            raise LoraLabError(f"unexpected tensor {key!r}: expected '{PREFIX}<path>.lora_A.weight' or '...lora_B.weight'")
        matrix = not match["which"].endswith(("vector", "bias"))
        if (matrix and tensor.ndim < 2) or not are_finite(tensor):
            raise LoraLabError(f"tensor {key!r} ({tensor.dtype}, {list(tensor.shape)}): expected a matrix of finite floating-point numbers")
        layers.setdefault(match["path"], {})[match["which"]] = tensor
    if not layers:
        raise LoraLabError("the file holds no tensors")
    for path, named in layers.items():
        if not {"lora_A", "lora_B"} <= {CONTAINERS[name] for name in named}:
            raise LoraLabError(f"{path!r} has {', '.join(named)} only: the file is incomplete")
    return layers


def _planned(model: nn.Module, path: str, named: Named, config: AdapterConfig, folder: Path) -> PlannedLayer:
    """Check one layer's tensors against the layer they are for."""
    if config.target_parameters and (part := part_at(model, path)) is not None:
        check_pair(folder, planned := plan_parameter(model, path, config), part, named)
        return planned
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = [name for name, module in model.named_modules() if is_adaptable(module)]
        raise LoraLabError(f"{folder} is an adapter for another model: it adapts {path!r}, which a {type(model).__name__} does not have"
                           f"{did_you_mean(path, names)}") from None  # fmt: skip
    if (kind := kind_of(module)) is None:
        raise LoraLabError(f"{folder} adapts {path!r}, a {type(module).__name__}: this version reads adapters of linear layers, embeddings "
                           "and convolutions")  # fmt: skip
    planned = with_its_attention(plan_layer(path, module, config), module, config)
    wanted = dict(zip(kind.names, kind.pair_shapes(module, planned.rank), strict=True))
    found = {name: tuple(tensor.shape) for name, tensor in named.items() if CONTAINERS[name] in ("lora_A", "lora_B")}
    if found != wanted:
        (A, B), (want_A, want_B) = (([list(shape) for shape in shapes.values()] + [None])[:2] for shapes in (found, wanted))
        raise LoraLabError(f"{folder}: {path!r} has A {A} and B {B}, but with rank {planned.rank} (adapter_config.json) this "
                           f"model needs {want_A} and {want_B}: another model, or a wrong rank")  # fmt: skip
    _check_vectors(path, named, config, planned.fan_out, folder)
    return planned


def _check_vectors(path: str, named: Named, config: AdapterConfig, fan_out: int, folder: Path) -> None:
    for name, wanted, key in (("lora_magnitude_vector", config.variant == "dora", "use_dora"), ("lora_B.bias", config.lora_bias, "lora_bias")):
        if (name in named) != wanted:
            here = f"has {name}" if name in named else f"has no {name}"
            raise LoraLabError(f"{folder}: {path!r} {here}, but adapter_config.json says {key}={wanted}: the two files do not belong together")
        if name in named and named[name].numel() != fan_out:
            raise LoraLabError(f"{folder}: {path!r} has {name} {list(named[name].shape)}, this model needs {fan_out} numbers: another model")
