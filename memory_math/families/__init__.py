"""The families of models, one file each: their sizes and their parameter tensors."""

from __future__ import annotations

from .base import Architecture, LinearLayer, Tensor
from .bert import Bert
from .falcon import Falcon
from .gpt2 import GPT2
from .llama import Llama, Mixtral
from .neox import NeoX
from .opt import OPT
from .t5 import T5

ALL: tuple[type[Architecture], ...] = (Llama, Mixtral, GPT2, OPT, NeoX, Falcon, Bert, T5)
FAMILIES: dict[str, type[Architecture]] = {kind: family for family in ALL for kind in family.model_types}

__all__ = ["ALL", "FAMILIES", "GPT2", "OPT", "T5", "Architecture", "Bert", "Falcon", "LinearLayer", "Llama", "Mixtral", "NeoX", "Tensor"]
