"""The models as they run, one file per family: each mirrors the forward pass of its original, call by call, on a tape of sizes."""

from __future__ import annotations

from .base import Model
from .bert import TransformersBert
from .bert_lora_lab import LoraLabBert
from .falcon import TransformersFalcon
from .falcon_lora_lab import LoraLabFalcon
from .gpt2 import TransformersGPT2
from .gpt2_lora_lab import LoraLabGPT2
from .llama import TransformersLlama
from .llama_lora_lab import LoraLabLlama
from .mixtral import TransformersMixtral
from .neox import TransformersNeoX
from .neox_lora_lab import LoraLabNeoX
from .opt import TransformersOPT
from .t5 import TransformersT5
from .t5_lora_lab import LoraLabT5

MODELS: dict[tuple[str, str], type[Model]] = {
    ("transformers", "llama"): TransformersLlama,
    ("transformers", "bert"): TransformersBert,
    ("transformers", "t5"): TransformersT5,
    ("transformers", "mixtral"): TransformersMixtral,
    ("transformers", "gpt2"): TransformersGPT2,
    ("transformers", "gpt_neox"): TransformersNeoX,
    ("transformers", "falcon"): TransformersFalcon,
    ("transformers", "opt"): TransformersOPT,
    ("lora_lab", "llama"): LoraLabLlama,
    ("lora_lab", "bert"): LoraLabBert,
    ("lora_lab", "t5"): LoraLabT5,
    ("lora_lab", "gpt2"): LoraLabGPT2,
    ("lora_lab", "gpt_neox"): LoraLabNeoX,
    ("lora_lab", "falcon"): LoraLabFalcon,
}
