"""Small, hand-written models that load real checkpoints, and what it takes to generate with them."""

from .base import CausalLMOutput, PretrainedModel
from .blocks import KVCache
from .generation import Generation, generate
from .llama import LlamaConfig, LlamaForCausalLM
from .loading import load, save
from .tokenizer import Tokenizer

__all__ = [
    "CausalLMOutput", "Generation", "KVCache", "LlamaConfig", "LlamaForCausalLM", "PretrainedModel", "Tokenizer", "generate", "load", "save",
]  # fmt: skip
