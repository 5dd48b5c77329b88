"""What a folder of an adapter or a prompt may do to the model it is loaded into: nothing, where it is refused.

A surface is made with a folder, its own, and is then called with a random generator for each case.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mutations import PATTERNS, header_of, spoilt_json, spoilt_safetensors, text_of, with_header
from tiny_workshop import our_llama
from torch import nn

import lora_lab
import prompt_tuning_lab
from lora_lab.streaming import merge_checkpoint
from prompt_tuning_lab.peft_files.description import describe

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "modules_to_save",
        "target_parameters", "trainable_token_indices", "bias", "use_dora", "use_rslora", "lora_bias", "lora_dropout", "init_lora_weights",
        "peft_type",
        "fan_in_fan_out", "ensure_weight_tying", "base_model_name_or_path", "auto_mapping", "eva_config", "loftq_config", "megatron_config",
        "num_virtual_tokens", "num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim", "task_type", "placement",
        "prefix_projection", "encoder_hidden_size", "encoder_reparameterization_type")  # fmt: skip
Case = Callable[[random.Random], None]
IDS = torch.tensor([[1, 5, 7, 2]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.c_attn, self.norm = nn.Linear(6, 6), nn.Linear(6, 18), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.q_proj(x) + self.c_attn(x).unflatten(-1, (3, 6)).sum(-2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x):
        return x + torch.einsum("btd,ned->bte", x, self.down_proj)


class Small(nn.Module):
    """Layers of each kind that adapters have formats for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.layers, self.experts = nn.Embedding(8, 6), nn.ModuleList([Block(), Block()]), Experts()
        self.conv, self.score = nn.Conv1d(6, 6, 1), nn.Linear(6, 3)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(self.conv(self.experts(x).transpose(1, 2)).transpose(1, 2))


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {}, "dora": {"variant": "dora", "target_modules": ["q_proj"]}, "regex": {"target_modules": r".*\.(q_proj|c_attn)",
    "rank_pattern": {"c_attn": 3}},
    "biases": {"bias": "all", "target_modules": ["q_proj"], "layers": [1]}, "whole": {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4]}, "stack": {"target_modules": [],
    "target_parameters": ["experts.down_proj"]},
    "parts": {"target_modules": ["c_attn.q", "c_attn.v"], "fused": {"c_attn": {"q": 6, "k": 6, "v": 6}}},
    "embedding": {"target_modules": ["embed", "conv"]}, "lora bias": {"target_modules": ["q_proj"], "lora_bias": True, "rslora": True},
}  # fmt: skip


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that loading might change: classes, attributes, hooks, the Parameter objects, their flags."""
    modules = {path: (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
               for path, module in model.named_modules()}  # fmt: skip
    return {**modules, **{f"={name}": (id(p), p.requires_grad, p.dtype, p.shape) for name, p in model.named_parameters()}}


class Watched:
    """A model, and whether it is still what it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state = model, state_of(model)
        self.values = {name: value.clone() for name, value in model.state_dict().items()}

    def check(self) -> None:
        assert state_of(self.model) == self.state, "the model is another one"
        now = self.model.state_dict()
        assert now.keys() == self.values.keys() and all(torch.equal(now[name], value) for name, value in self.values.items()), "weights were changed"


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def lay_out(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def spoil(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """One file of an adapter's folder; a configuration counts where the tensors have no copy of it."""
    files, name = dict(files), rng.choice([TENSORS, CONFIG, CONFIG, *files])
    if name == CONFIG:
        header, body = header_of(files[TENSORS])
        header.get("__metadata__", {}).pop("lora_lab_config", None)
        config = json.loads(files[CONFIG])
        if rng.random() < 0.2:
            place = rng.choice(("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save"))
            pattern = rng.choice(PATTERNS)
            config[place] = {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 2}, "modules_to_save": [pattern]}.get(place, pattern)
            config["layers_to_transform"] = [0, 1] if place == "layers_pattern" else None
            spoilt = config
        else:
            spoilt = spoilt_json(config, rng, KEYS)
        return {**files, TENSORS: with_header(header, body), CONFIG: text_of(spoilt, rng)}
    return {**files, name: spoilt_safetensors(files[name], rng)}


def adapters(folder: Path) -> Case:
    """lora_lab.load into a small model of all kinds of layers."""
    good = []
    for name, request in ADAPTERS.items():
        lora_lab.save(lora_lab.inject(Small(), rank=2, init="random", **request), folder / "good" / name)
        good.append(read_folder(folder / "good" / name))
    work, watched = folder / "work", Watched(Small())
    work.mkdir()

    def case(rng: random.Random) -> None:
        lay_out(work, spoil(rng.choice(good), rng))
        try:
            lora_lab.load(watched.model, work, trainable=rng.random() < 0.5)
        except lora_lab.LoraLabError:
            watched.check()
            raise
        with torch.no_grad():
            assert watched.model(IDS).shape == (1, 4, 3)
        lora_lab.eject(watched.model)
        watched.check()

    return case


def prompts(folder: Path) -> Case:
    """prompt_tuning_lab.load before a small Llama."""
    good = []
    for method, request in {"prompt": {}, "prefix": {"prefix_projection": True, "encoder_hidden_size": 5}, "p-tuning": {"encoder_hidden_size": 6},
                            "residual": {"encoder_hidden_size": 4}}.items():  # fmt: skip
        prompted = prompt_tuning_lab.inject(our_llama(), 4, method=method, init="random", **request)
        prompt_tuning_lab.save(prompted, folder / "good" / method)
        good.append(read_folder(folder / "good" / method))
    work, watched = folder / "work", Watched(our_llama().requires_grad_(False))
    work.mkdir()

    def case(rng: random.Random) -> None:
        lay_out(work, spoil(rng.choice(good), rng))
        with contextlib.suppress(lora_lab.LoraLabError):
            describe(work)
        try:
            prompted = prompt_tuning_lab.load(watched.model, work, trainable=rng.random() < 0.7)
        except lora_lab.LoraLabError:
            watched.check()
            raise
        with torch.no_grad():
            assert prompted(input_ids=IDS).logits.shape[:2] == (1, 4)
        watched.check()

    return case


def merges(folder: Path) -> Case:
    """merge_checkpoint, with an adapter's folder or a base's that is spoilt."""
    model = our_llama()
    lora_lab.models.save(model, folder / "base")
    lora_lab.save(lora_lab.inject(our_llama(), rank=2, init="random"), folder / "adapter")
    lora_lab.save(lora_lab.inject(our_llama(), rank=2, init="random", variant="dora", modules_to_save=["lm_head"]), folder / "adapter 2")
    tensors = folder / "base" / "model.safetensors"
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(header_of(tensors.read_bytes())[0], "model-00001-of-00001.safetensors")}
    index["weight_map"].pop("__metadata__", None)
    sharded = {"config.json": (folder / "base" / "config.json").read_bytes(), "model-00001-of-00001.safetensors": tensors.read_bytes(),
               "model.safetensors.index.json": json.dumps(index).encode()}  # fmt: skip
    bases, good = [read_folder(folder / "base"), sharded], [read_folder(folder / name) for name in ("adapter", "adapter 2")]
    base, adapter = folder / "work base", folder / "work adapter"
    base.mkdir(), adapter.mkdir()

    def case(rng: random.Random) -> None:
        files, chosen = dict(rng.choice(bases)), dict(rng.choice(good))
        if rng.random() < 0.5:
            chosen = spoil(chosen, rng)
        else:
            name = rng.choice([*files])
            files[name] = spoilt_safetensors(files[name], rng) if name.endswith("safetensors") else text_of(spoilt_json(json.loads(files[name]),
            rng), rng)
        lay_out(base, files), lay_out(adapter, chosen)
        out = folder / f"out {rng.random()}"
        try:
            merge_checkpoint(base, adapter, out, progress=False)
        except lora_lab.LoraLabError:
            assert not out.exists(), "a refused merge left something"
            raise
        for path in out.iterdir():
            path.unlink()
        out.rmdir()

    return case
