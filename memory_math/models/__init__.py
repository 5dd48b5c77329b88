"""The models as they run, one file per family: each mirrors the forward pass of its original, call by call, on a tape of sizes."""

from __future__ import annotations

from .base import Model
from .bert import TransformersBert
from .gpt2 import TransformersGPT2
from .llama import TransformersLlama
from .llama_lora_lab import LoraLabLlama

MODELS: dict[tuple[str, str], type[Model]] = {("transformers", "llama"): TransformersLlama, ("transformers", "bert"): TransformersBert, ("transformers", "gpt2"): TransformersGPT2, ("lora_lab", "llama"): LoraLabLlama}
