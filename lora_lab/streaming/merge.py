"""Merge an adapter file into a checkpoint folder, a few rows at a time: a model larger than the memory, no model code at all.

    merge_checkpoint("llama-2-7b", "my-adapter", "llama-2-7b-merged")

Reads a base in transformers' layout and an adapter in PEFT's, and writes a folder in transformers' layout: ``W + scaling * B @ A``
for each adapted tensor, accumulated in float32 and rounded once, every other byte as it was. Everything is checked before the
first byte is written, and the new folder appears whole, by a rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraLabError, did_you_mean
from ..files import json_object, new_folder, saving, settle, write_json
from ..peft_files.config import warn_of_another_base
from ..peft_files.folder import AdapterFile, Pair, Rows, read_adapter
from ..weight_files import weights_sha256
from .blockwise import Change, MergedTensor, merged_blocks
from .parameters import place_parameters
from .shards import FLOATS, INDEX, MODEL, NAMES, NewTensor, Shard, StoredTensor, read_checkpoint, write_shard

# Where the weight is stored [in, out] (transformers' Conv1D): the model types, and their layers of that kind.
CONV1D_MODELS = ("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
CONV1D_LAYERS = ("c_attn", "c_fc", "c_proj", "q_attn")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared", "tokens_embed", "tok_embeddings")
HEADS = ("lm_head", "embed_out")
WITH_A_HEAD = ("CausalLM", "LMHead", "ConditionalGeneration", "MaskedLM", "PreTraining", "DoubleHeads")
# Not copied beside the merged weights: other weights, the base's own card and record of origin.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
NOT_COPIED = ("README.md", "lora_lab.json", "adapter_config.json")


@dataclass(frozen=True)
class CheckpointMergeReport:
    """What `merge_checkpoint` did. Rounding errors are against the float32 (or float64) sum that was rounded."""

    folder: Path
    merged: tuple[MergedTensor, ...]
    replaced: tuple[str, ...]
    copied: int
    untied: bool

    @property
    def largest_rounding_error(self) -> float:
        return max((tensor.rounding_error for tensor in self.merged), default=0.0)

    def table(self) -> str:
        """One line a tensor: its norm, the norm of its change, their ratio and the rounding error."""
        width = max((len(tensor.name) for tensor in self.merged), default=6)
        lines = [f"{'tensor':<{width}}  {'|W|':>10}  {'|change|':>10}  {'ratio':>8}  {'rounding':>9}"]
        lines += [f"{t.name:<{width}}  {t.weight_norm:>10.4g}  {t.delta_norm:>10.4g}  {t.delta_norm / (t.weight_norm or 1):>8.2%}  "
                  f"{t.rounding_error:>9.2g}" for t in self.merged]  # fmt: skip
        return "\n".join([*lines, str(self)])

    def __str__(self) -> str:
        return (f"{len(self.merged)} tensors merged, {len(self.replaced)} replaced, {self.copied} copied to {self.folder}; largest rounding "
                f"error {self.largest_rounding_error:.2g}" + ("; embedding and head untied" if self.untied else ""))  # fmt: skip


@dataclass
class Job:
    """A merge that is checked before it starts: what is in the base, what changes in it; `merged` is filled while it runs."""

    shards: dict[str, Shard]
    config: dict[str, Any]
    dtype: torch.dtype | None = None
    changes: dict[str, Change] = field(default_factory=dict)
    new_heads: dict[str, StoredTensor] = field(default_factory=dict)  # heads that get a tensor of their own, and what they start from
    merged: list[MergedTensor] = field(default_factory=list)

    def tensors(self, shard: Shard) -> dict[str, StoredTensor]:
        """A shard's tensors in the result; a new head stands beside the embedding it was tied to."""
        return {**shard.tensors, **{head: tensor for head, tensor in self.new_heads.items() if shard.tensors.get(tensor.key) is tensor}}

    def all_tensors(self) -> dict[str, StoredTensor]:
        return {key: tensor for shard in self.shards.values() for key, tensor in self.tensors(shard).items()}


def merge_checkpoint(base_folder: str | Path, adapter_folder: str | Path, out_folder: str | Path, *, dtype: torch.dtype | None = None,
                     untie: bool = False, progress: bool = True) -> CheckpointMergeReport:  # fmt: skip
    """Write base + adapter to a new folder that transformers and `lora_lab.models.load` read; returns a `CheckpointMergeReport`.

    base_folder: transformers' layout, safetensors in one file or sharded.  adapter_folder: PEFT's layout: LoRA, rsLoRA and DoRA on
        linear layers, Conv1D, embeddings and ungrouped convolutions; LoRA on parameters, such as stacks of experts, which may be by
        expert in the base; trained biases, token rows and modules_to_save replace the base's.
    out_folder: must not exist, or be empty. The shards keep their names; configuration and tokenizer files are copied.
    dtype: of the floating-point tensors (None keeps each tensor's own).
    untie: where embedding and head are one tensor and the adapter changes one of them, write both and say so in the config.
    progress: a bar over the tensors.
    Memory: blocks of rows and one A and B at a time, whatever the size of the model.
    Raises LoraLabError, nothing written, where a tensor of the adapter has no place in the base or does not fit, a value is not
    finite, embedding and head are tied, a file is pickled, or a feature is not read here. Warns where the base's SHA-256 is another than the
    adapter's (hashing a 7B model takes seconds, and is done for adapters that know theirs).
    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1; DoRA: Liu et al. 2024 (arXiv:2402.09353), equation 5.
    """
    base_folder, out = Path(base_folder), Path(out_folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LoraLabError(f"out_folder={str(out)!r} is there and not empty: choose a new folder (nothing is overwritten)")
    if dtype is not None and dtype not in NAMES:
        raise LoraLabError(f"dtype={dtype!r}: expected one of {', '.join(map(str, NAMES))}, or None to keep the base's")
    settle(base_folder)
    job = Job(read_checkpoint(base_folder), _read_config(base_folder), dtype)
    adapter = read_adapter(Path(adapter_folder))
    plan_merge(job, adapter, untie)
    if adapter.base_sha256:
        warn_of_another_base(adapter.base_sha256, weights_sha256(base_folder), Path(adapter_folder))
    with saving("the merged checkpoint", out), new_folder(out) as temporary:
        _write_weights(job, temporary, progress)
        _write_index(job, base_folder, temporary)
        _copy_files(base_folder, temporary)
        _write_config(job, temporary)
    replaced = tuple(key for key, change in job.changes.items() if not change.computed)
    return CheckpointMergeReport(out, tuple(job.merged), replaced, len(job.all_tensors()) - len(job.changes), bool(job.new_heads))


# Planning: where each tensor of the adapter goes, and whether it fits ---------------------------------------------------------


def plan_merge(job: Job, adapter: AdapterFile, untie: bool) -> None:
    """Find each of the adapter's tensors its place, and check everything that can be checked without writing."""
    if job.config.get("quantization_config"):
        raise LoraLabError("the base is quantised (quantization_config in its config.json): merge into the original 16-bit checkpoint")
    base = job.all_tensors()
    tied = tied_head(job.config, base)
    base |= {head: base[embedding] for head, embedding in tied.items() if head not in base}
    adapter, of_parameters = place_parameters(adapter, base, job.config)
    places = find_places(adapter, set(base))
    for name, tensor in adapter.replaced.items():
        _check_shape(name, tensor, base[places[name]])
        if not same_values(tensor, base[places[name]]):  # PEFT writes whole embeddings beside their adapters, most often unchanged
            job.changes[places[name]] = Change(tensor)
    for path, pair in adapter.pairs.items():
        _plan_pair(job, path, pair, adapter, base, places)
    for path, rows in adapter.rows.items():
        _plan_rows(job, path, rows, base, places[f"{path}.weight"])
    for key, change in of_parameters.items():
        if key in job.changes:
            raise LoraLabError(f"{key!r} is changed by the adapter of a layer and by that of a parameter: merge in memory, with the model")
        job.changes[key] = change
    for key in job.changes:
        if base[key].dtype not in FLOATS:
            raise LoraLabError(f"{key!r} is stored as {base[key].dtype}: an adapter is merged into {', '.join(FLOATS)}; use the 16-bit checkpoint")
    share_rows(job, tied)
    check_ties(job, tied, base, untie)


def _plan_pair(job: Job, path: str, pair: Pair, adapter: AdapterFile, base: dict[str, StoredTensor], places: dict[str, str]) -> None:
    weight, scaling = places[f"{path}.weight"], adapter.settings.scaling_of(path)
    transposed = is_transposed(path, pair, base[weight], job.config, adapter.fan_in_fan_out)
    job.changes[weight] = replace(job.changes.get(weight, Change()), pair=pair, scaling=scaling, transposed=transposed)
    if pair.bias is not None:
        bias = places[f"{path}.bias"]
        _check_shape(f"{path}.lora_B.bias", pair.bias, base[bias])
        job.changes[bias] = replace(job.changes.get(bias, Change()), bias=pair.bias, scaling=scaling)


def _plan_rows(job: Job, path: str, rows: Rows, base: dict[str, StoredTensor], weight: str) -> None:
    words, *dim = base[weight].shape
    if rows.tensor.shape != (len(rows.words), *dim) or not all(0 <= word < words for word in rows.words):
        raise LoraLabError(f"the adapter has rows {list(rows.tensor.shape)} for words up to {max(rows.words)} of {path!r}, the base's is "
                           f"{list(base[weight].shape)}: another model, or a vocabulary that was not resized")  # fmt: skip
    change = job.changes.get(weight, Change())
    if change.pair is not None and change.pair.magnitude is not None:
        raise LoraLabError(f"{path!r} has token rows and DoRA, whose norm is that of a weight without them: they are not merged together")
    job.changes[weight] = replace(change, rows=rows)


def find_places(adapter: AdapterFile, base: set[str]) -> dict[str, str]:
    """The base's tensor for each name the adapter has. The base may lack, or have, one leading name ("transformer."), for all."""
    biases = [f"{path}.bias" for path, pair in adapter.pairs.items() if pair.bias]
    wanted = list(dict.fromkeys([*adapter.replaced, *(f"{path}.weight" for path in (*adapter.pairs, *adapter.rows)), *biases]))
    if not wanted:
        return {}
    first = {name.partition(".")[0] for name in base}
    renamed = [[name.partition(".")[2] for name in wanted], *([f"{prefix}.{name}" for name in wanted] for prefix in first)]
    for candidates in ([wanted], renamed):
        fitting = [keys for names in candidates if base.issuperset(keys := [_head_alias(name, base) for name in names])]
        if len(fitting) == 1 and len(set(fitting[0])) == len(wanted):
            return dict(zip(wanted, fitting[0], strict=True))
    lost = next((name for name in wanted if _head_alias(name, base) not in base), wanted[0])
    raise LoraLabError(f"the adapter has values for {lost!r}, which is not in the base{did_you_mean(lost, base)}: an adapter of another model, a new "
                       "part (a classifier), or a family whose files name layers otherwise than its model: merge that in memory")  # fmt: skip


def _head_alias(key: str, base: set[str]) -> str:
    """GPT-NeoX's head is lm_head in the newer transformers and embed_out in its files."""
    path, _, kind = key.rpartition(".")
    names = [f"{head}.{kind}" for head in HEADS] if path in HEADS else []
    return key if key in base else next((name for name in names if name in base), key)


def is_transposed(path: str, pair: Pair, weight: StoredTensor, config: dict[str, Any], fan_in_fan_out: bool) -> bool:
    """True where the weight is stored [in, out]: embeddings [numbers, dim], and Conv1D. Raises LoraLabError where nothing fits."""
    inside, out = tuple(pair.A.shape[1:]), pair.B.shape[0]
    straight, across = weight.shape == (out, *inside), len(weight.shape) == 2 and weight.shape == (*inside, out)
    if straight and across and not pair.embedding:  # square: the shapes do not tell
        named = path.rpartition(".")[2] in CONV1D_LAYERS
        return named if config.get("model_type") in CONV1D_MODELS else fan_in_fan_out
    if not (across if pair.embedding else straight or across):
        raise LoraLabError(f"{path!r}: A {list(pair.A.shape)} and B {list(pair.B.shape)} do not fit the base's weight {list(weight.shape)}: "
                           "another model, other sizes of the vocabulary, or a grouped convolution (not merged here)")  # fmt: skip
    return across


def _check_shape(name: str, tensor: StoredTensor, base: StoredTensor) -> None:
    if tensor.shape != base.shape:
        raise LoraLabError(f"the adapter's {name!r} is {list(tensor.shape)}, the base's {list(base.shape)}: another model, or a resized vocabulary")


def same_values(tensor: StoredTensor, base: StoredTensor) -> bool:
    pairs = zip(tensor.blocks(), base.blocks(), strict=True)
    return all(torch.equal(new.to(old.dtype), old) for (_, new), (_, old) in pairs)


# Tied embeddings --------------------------------------------------------------------------------------------------------------


def tied_head(config: dict[str, Any], base: dict[str, StoredTensor]) -> dict[str, str]:
    """{the head's name: the embedding's} where the model computes both with one tensor; else empty."""
    flags = [part.get("tie_word_embeddings") for part in (config, config.get("text_config") or {})]
    head = next((key for key in base if key.endswith(".weight") and key.rpartition(".")[0] in HEADS), None)
    embedding = next((key for key in base if _layer_name(key) in EMBEDDINGS), None)
    has_a_head = any(part in name for name in config.get("architectures") or WITH_A_HEAD for part in WITH_A_HEAD)
    tied = True in flags or (flags == [None, None] and head is None)
    if not tied or not has_a_head or embedding is None:
        return {}
    return {head or ("embed_out.weight" if config.get("model_type") == "gpt_neox" else "lm_head.weight"): embedding}


def share_rows(job: Job, tied: dict[str, str]) -> None:
    """Rows of the embedding are the tied head's, too, unless it has rows of its own; see token_rows/."""
    for head, embedding in tied.items():
        rows = job.changes.get(embedding, Change()).rows
        own = job.changes.get(head, Change()).rows
        if rows is not None and (own is None or (own.words == rows.words and same_values(own.tensor, rows.tensor))):
            job.changes[head] = replace(job.changes.get(head, Change()), rows=rows)


def check_ties(job: Job, tied: dict[str, str], base: dict[str, StoredTensor], untie: bool) -> None:
    """Refuse a change to one of two tied tensors that would change the other, or give the head a tensor of its own."""
    inputs = [key for key in job.changes if _layer_name(key) in EMBEDDINGS]
    if inputs and job.config.get("is_encoder_decoder"):
        raise LoraLabError(f"the adapter changes {inputs[0]!r}, which encoder and decoder share: merge it in memory, with the model")
    for head, embedding in tied.items():
        touched = [key for key in (head, embedding) if key in job.changes]
        if not touched or _stay_tied(job, head, embedding):
            continue
        if not untie:
            raise LoraLabError(f"the adapter changes {touched[0]!r}, but this model's embedding and head are one tensor (tie_word_embeddings): the "
                               "other would change with it; untie=True writes both")  # fmt: skip
        architectures = job.config.get("architectures") or []
        if job.config.get("is_encoder_decoder") or not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
            raise LoraLabError(f"untie=True: the head of {architectures} cannot be given a tensor of its own; adapt other layers")
        job.new_heads[head] = base[head]


def _stay_tied(job: Job, head: str, embedding: str) -> bool:
    """Both replaced by the same values (PEFT's ensure_weight_tying), as a whole or in some rows: they are written once, or twice where the base
    has both."""
    one, other = (job.changes.get(key, Change()) for key in (head, embedding))
    if any(change.pair or change.bias for change in (one, other)) or one.rows != other.rows:
        return False
    if one.source is not other.source and (one.source is None or other.source is None or not same_values(one.source, other.source)):
        return False
    if not any(head in shard.tensors for shard in job.shards.values()):
        del job.changes[head]
    return True


def _layer_name(key: str) -> str:
    """'model.embed_tokens.weight' -> 'embed_tokens'."""
    return key.rpartition(".")[0].rpartition(".")[2]


# Writing ----------------------------------------------------------------------------------------------------------------------


def _write_weights(job: Job, folder: Path, progress: bool) -> None:
    from tqdm import tqdm  # a run-time dependency, but LoRA itself does not need it

    with tqdm(total=len(job.all_tensors()), desc="merge", unit="tensor", disable=not progress, leave=False) as bar:
        for name, shard in job.shards.items():
            tensors = {key: _new_tensor(job, key, tensor, bar) for key, tensor in job.tensors(shard).items()}
            write_shard(folder / name, tensors, {"format": "pt", **shard.metadata})


def _new_tensor(job: Job, key: str, tensor: StoredTensor, bar: Any) -> NewTensor:
    name = NAMES[job.dtype] if job.dtype is not None and tensor.dtype in FLOATS else tensor.dtype

    def blocks() -> Iterator[Tensor]:
        change = job.changes.get(key)
        if change is not None and change.computed:
            yield from merged_blocks(tensor, change, FLOATS[name], key, job.merged)
        else:
            yield from _copied_blocks(change.source if change and change.source else tensor, name, key)
        bar.update()

    return NewTensor(name, tensor.shape, blocks)


def _copied_blocks(tensor: StoredTensor, dtype: str, key: str) -> Iterator[Tensor]:
    for _, block in tensor.blocks():
        copied = block if dtype == tensor.dtype else block.to(FLOATS[dtype])
        if copied is not block and not torch.isfinite(copied).all() and torch.isfinite(block).all():
            raise LoraLabError(f"{key!r} has values too large for {FLOATS[dtype]}: use dtype=torch.bfloat16 or torch.float32")
        yield copied


def _write_index(job: Job, base_folder: Path, folder: Path) -> None:
    if set(job.shards) == {MODEL}:
        return
    new = {key: (name, tensor) for name, shard in job.shards.items() for key, tensor in job.tensors(shard).items()}
    total = sum(_new_tensor(job, key, tensor, None).nbytes for key, (_, tensor) in new.items())
    index = json_object((base_folder / INDEX).read_bytes(), base_folder / INDEX)
    known = index.get("metadata")
    metadata = {**(known if isinstance(known, dict) else {}), "total_size": total}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": {key: name for key, (name, _) in sorted(new.items())}})


def _copy_files(base_folder: Path, folder: Path) -> None:
    for path in base_folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name not in NOT_COPIED and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    templates = base_folder / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise LoraLabError(f"{path} is missing: without it transformers cannot load the result, and whether the embeddings are tied is unknown")
    config = json_object(path.read_bytes(), path)
    names, parts = config.get("architectures") or [], [config, config.get("text_config") or {}]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LoraLabError(f"{path}: architectures={names!r:.80}, expected a list of names")
    if not all(isinstance(part, dict) and isinstance(part.get("model_type"), (str, NoneType)) for part in parts):
        raise LoraLabError(f"{path}: model_type is no name, or text_config no object: download or copy it again")
    return config


def _write_config(job: Job, folder: Path) -> None:
    """The base's configuration, with what this merge made untrue put right."""
    config = json.loads(json.dumps(job.config))
    parts = [config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])]
    for part in parts:
        if job.new_heads and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if job.dtype is not None and key in part:
                part[key] = str(job.dtype).removeprefix("torch.")
    if config != job.config:
        write_json(folder / "config.json", config)
