"""The models as they run, one file per family: each mirrors the forward pass of its original, call by call, on a tape of sizes."""

from __future__ import annotations

from .base import Model
from .llama import TransformersLlama
from .llama_lora_lab import LoraLabLlama

MODELS: dict[tuple[str, str], type[Model]] = {("transformers", "llama"): TransformersLlama, ("lora_lab", "llama"): LoraLabLlama}
