"""Tokenizers, models and rows small enough for a test of a second: ten thousand parameters, nothing downloaded.

The tokenizers have one token per byte, id == byte: what a text must become can be written down without them.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

import lora_lab
from lora_lab.models.llama import LlamaConfig, LlamaForCausalLM
from lora_lab.models.tokenizer import Tokenizer

transformers.logging.set_verbosity_error()

BOS, EOS, START, END = 256, 257, 258, 259
SPECIAL = {"<s>": BOS, "</s>": EOS, "<|im_start|>": START, "<|im_end|>": END}
VOCABULARY = 260
QUIET = {"progress": False}  # for `fit`
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip


# Tokenizers -----------------------------------------------------------------------------------------------------------------


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


def byte_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def chat_tokenizer(template: str = CHATML) -> Tokenizer:
    return Tokenizer(byte_backend(), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "</s>"}, template)


def plain_tokenizer() -> Tokenizer:
    """No chat template: rows become Alpaca's prompt."""
    return Tokenizer(byte_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


def transformers_tokenizer(template: str | None = CHATML):
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} if template else {"bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_backend(), pad_token="</s>", chat_template=template, **ends)


def ids(text: str) -> list[int]:
    return list(text.encode())


# Models ---------------------------------------------------------------------------------------------------------------------


def our_llama(dtype: torch.dtype = torch.float32, seed: int = 1, **changes) -> LlamaForCausalLM:
    """Weights of a size that gives every part a say; in eval mode, as `models.load` hands models out."""
    source = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 10_000.0, **changes}
    return livelier(LlamaForCausalLM(LlamaConfig.from_dict(source)), seed).to(dtype).eval()


def their_llama(dtype: torch.dtype = torch.float32, seed: int = 1):
    return livelier(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)), seed).to(dtype).eval()


def their_gpt2(dtype: torch.dtype = torch.float32, seed: int = 1):
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return livelier(transformers.GPT2LMHeadModel(config), seed).to(dtype).eval()


def exact_model(**changes):
    """LoRA on a float64 model, both factors non-zero: where equality is algebra. Each call makes the same one."""
    torch.manual_seed(5)
    return lora_lab.inject(our_llama(torch.float64, **changes), rank=3, alpha=6, init="random")


class CutOff(torch.nn.Module):
    """Two layers, the graph cut between them: the first runs and learns nothing."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = torch.nn.Embedding(300, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask, labels):
        return type("Out", (), {"loss": self.second(self.first(self.embed(input_ids)).detach()).square().mean()})


class OverFeatures(torch.nn.Module):
    """Running statistics, as convolutional models have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
def livelier(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3, generator=generator)
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter by name."""
    return {name: copy.deepcopy(parameter.detach()) for name, parameter in model.named_parameters()}


@torch.no_grad()
def forgotten(model: torch.nn.Module) -> torch.nn.Module:
    """With zeros wherever it trains: a run that goes on from a snapshot takes every one from there, and one that begins anew ends elsewhere."""
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.zero_()
    return model


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


# Runs -----------------------------------------------------------------------------------------------------------------------


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a run's log, or its result, without what depends on the machine's pace and memory."""
    return {name: value for name, value in entry.items() if name not in ("seconds", "peak_bytes")}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]


# Rows -----------------------------------------------------------------------------------------------------------------------


def token_rows(count: int = 8, seed: int = 0, shortest: int = 5, longest: int = 14) -> list[dict[str, list[int]]]:
    """Encoded rows of different lengths, with prompts of different lengths: label counts are uneven."""
    generator, rows = random.Random(seed), []
    for _ in range(count):
        length = generator.randint(shortest, longest)
        prompt, tokens = generator.randint(1, length - 2), [generator.randrange(256) for _ in range(length)]
        rows.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return rows


def text_rows(count: int = 6) -> list[dict[str, str]]:
    return [{"instruction": f"Say {word}.", "output": word * 2} for word in ("one", "two", "three", "four", "five", "six")[:count]]
