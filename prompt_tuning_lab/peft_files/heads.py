"""The head of a classifier: tensors of the base itself, in the prompt's file.

    base_model.classifier.weight, .bias      with modules_to_save=["classifier"]; "score" of decoders, "qa_outputs" of question answering

PEFT trains such a head along with the prompt, always writes it and cannot read a file without it, so ours have it, too, trained or not. Our
prompts leave the base as it is, and all tasks share it: a file's head that is the base's own needs nothing, and another one goes into the base
only where the caller says so, `load(..., head=True)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lab.base_parameters import of_an_adapter
from lora_lab.checks import are_finite
from lora_lab.errors import LoraLabError, did_you_mean
from lora_lab.wrapping import whole

PREFIX = "base_model."  # of such a tensor's name; the prompt's has none
HEADS = ("classifier", "score", "qa_outputs")


def heads_of(base: nn.Module) -> list[str]:
    """The names of the base's heads, of a classifier; of others none."""
    return [name for name, module in base.named_children() if name in HEADS and next(module.parameters(), None) is not None]


def with_heads(base: nn.Module, heads: Iterable[str]) -> list[str]:
    """Paths of the modules that PEFT takes for heads: all whose names end so. To it DistilBERT's pre_classifier is a classifier, too."""
    ends = tuple(heads)
    return [path for path, _ in base.named_modules() if ends and path.endswith(ends) and not of_an_adapter(path)]


def head_tensors(base: nn.Module, heads: Iterable[str]) -> dict[str, Tensor]:
    """Name in the file -> values."""
    modules = {path: base.get_submodule(path) for path in with_heads(base, heads)}
    return {f"{PREFIX}{path}.{name}": whole(p.detach()) for path, module in modules.items() for name, p in module.named_parameters()}


def warn_of_the_unsaved(base: nn.Module, heads: Iterable[str]) -> None:
    """What trains along in the base and is not in the file: another one's base would not have it. LoRA has files of its own."""
    inside = tuple(f"{path}." for path in with_heads(base, heads))
    left = [name for name, p in base.named_parameters() if p.requires_grad and not of_an_adapter(name) and not name.startswith(inside)]
    if left:
        warnings.warn(f"{', '.join(left[:3])}{' and others' if len(left) > 3 else ''} of the base train, but are not in the prompt's file: "
                      "only prompts and the head of a classifier are", stacklevel=3)  # fmt: skip


def read_heads(base: nn.Module, tensors: Mapping[str, Tensor], announced: Iterable[str], folder: Path) -> dict[str, Tensor]:
    """Of a file, the tensors that are not the prompt's: those by name in the base whose values differ from the base's.

    Raises LoraLabError for a tensor this base does not have, another shape, NaN, and a head of this base that is announced and missing.
    """
    own = dict(base.named_parameters())
    found = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX) or name not in own:
            raise LoraLabError(f"{folder}: unexpected tensor {key!r} {list(tensor.shape)}: expected 'prompt_embeddings', and tensors of a head such "
                               f"as '{PREFIX}classifier.weight'{did_you_mean(name, own)}")  # fmt: skip
        if tensor.shape != own[name].shape or not are_finite(tensor):
            raise LoraLabError(f"{folder}: {key!r} ({tensor.dtype}, {list(tensor.shape)}): expected {list(own[name].shape)} finite numbers: a head "
                               "for another number of classes?")  # fmt: skip
    for name in own:
        if name.split(".")[0] in announced and name not in found:
            raise LoraLabError(f"{folder}: modules_to_save={list(announced)}, but {PREFIX}{name} is not in the file: it is incomplete")
    return {name: tensor for name, tensor in found.items() if not torch.equal(tensor.to(own[name].device, own[name].dtype), own[name])}


def refuse_another_head(heads: Mapping[str, Tensor], folder: Path) -> None:
    """Raise LoraLabError where a file has a head that is not the base's, and the caller did not say what to do with it."""
    if heads:
        raise LoraLabError(f"{folder} has a head that was trained along and is not this base's ({', '.join(heads)}): all tasks of a base share "
                           "its head. load(..., head=True) puts the file's values into the base")  # fmt: skip


@torch.no_grad()
def put_in_place(base: nn.Module, heads: Mapping[str, Tensor]) -> None:
    for name, tensor in heads.items():
        base.get_parameter(name).copy_(tensor)
