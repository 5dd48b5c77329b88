"""A run in memory_math's words: what the memory of its largest step is predicted from."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.base import is_encoder_decoder
from ..parameters.layer import parameter_path
from ..quantization import quantized_layers
from ..targets import lora_layers
from ..variants import DoRA
from .batches import Examples
from .config import TrainConfig
from .sharding import is_sharded


def request_of(model: nn.Module, config: TrainConfig, examples: Examples, processes: int = 1) -> dict[str, Any]:
    """Arguments of `memory_math.predict` for a step of this run on its longest rows, or as many of those as max_tokens allows."""
    longest = max(len(example["input_ids"]) for example in examples)
    rows = config.micro_batch_size if config.max_tokens is None else max(1, config.max_tokens // longest)
    divided = is_sharded(model) or (processes > 1 and config.distributed == "fsdp")
    written = max(len(example.get("labels") or ()) for example in examples)
    answers = {"target_length": written} if written and is_encoder_decoder(model) else {}
    return {"precision": config.precision, "batch_size": rows, "sequence_length": longest, **answers,
            "grad_accum_steps": config.grad_accum_steps, "gradient_checkpointing": config.gradient_checkpointing, "optimizer": config.optimizer,
            "optimizer_in_backward": config.optimizer_in_backward, "offload_activations": config.activation_offload,
            "world_size": processes, "zero_stage": 3 if divided else 0,
            "device": "cuda" if any(p.is_cuda for p in model.parameters()) else "cpu", **_trained(model)}  # fmt: skip


def _trained(model: nn.Module) -> dict[str, Any]:
    """What trains, and how a base that does not is stored."""
    adapters = [(path, layer, name) for path, layer in lora_layers(model).items() for name in layer.lora_active]
    kinds = [layer.quantization for layer in quantized_layers(model).values()]
    stored = {"quantization": kinds[0]} if kinds else {}
    if not adapters:
        return {"method": "full", **stored, **getattr(model, "memory_request", {})}
    directed = any(isinstance(layer.lora_variant[name], DoRA) for _, layer, name in adapters)
    pairs = [(path, layer.lora_variant[name].rank(layer, name)) for path, layer, name in adapters if name in layer.lora_A]
    names = sorted({path.rpartition(".")[2] for path, _ in pairs if parameter_path(path) == path})
    size = {"rank": max(rank for _, rank in pairs), **({"target_modules": names} if names else {})} if pairs else {}
    return {"method": "dora" if directed else "qlora" if stored else "lora", **stored, **size,
            "dropout": max(layer.lora_dropout.get(name, 0.0) for _, layer, name in adapters)}  # fmt: skip
