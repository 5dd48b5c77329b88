"""The models of the course: SmolLM2-135M-Instruct and the encoder all-MiniLM-L6-v2, fetched once and then read from the cache.

With LORA_LAB_COURSE=fast in the environment they are two of about a million random weights, made in a second: every cell runs as it would, and
says nothing worth reading. Both kinds are loaded by name with `lora_lab.models.load`, so a notebook can give the name to a command as well.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers

from lora_lab import data, training
from lora_lab import models as workshop
from lora_lab.training.precision import storage_dtype

REAL, REAL_ENCODER = "smollm2-135m-instruct-q4", "all-minilm-l6-v2"
Value = TypeVar("Value")


def fast() -> bool:
    """Whether this run only tries the code (LORA_LAB_COURSE=fast)."""
    return os.environ.get("LORA_LAB_COURSE") == "fast"


def pick(real: Value, quick: Value) -> Value:
    """`real` with the real model, `quick` where only the code is tried: steps, rows, seeds, settings.

    >>> pick(real=200, quick=3) in (200, 3)
    True
    """
    return quick if fast() else real


@functools.cache
def precision() -> str:
    """ "bf16-mixed" where this machine multiplies bfloat16 faster, else "fp32"."""
    return "fp32" if fast() else training.fastest_precision()


def name() -> str:
    """What `lora_lab.models.load`, `memory_math.predict` and the commands' --model take: the real model's name, or the small one's folder."""
    return str(_small_folder()) if fast() else REAL


def encoder_name() -> str:
    """The same of the encoder."""
    return str(_small_encoder_folder()) if fast() else REAL_ENCODER


def load(dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer), begun anew with each call.

    dtype: None is what training is fastest in on this machine; torch.float32 where a cell compares numbers closely.
    """
    return workshop.load(name(), dtype=dtype or storage_dtype(precision()))


def load_encoder(dtype: torch.dtype | None = torch.float32, **head: Any) -> tuple[Any, Any]:
    """The same of the encoder. head: task="sequence-classification", num_labels=... as `lora_lab.models.load` takes them.

    That a head asked for begins at random is no warning here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*begin at random.*")
        return workshop.load(encoder_name(), dtype=dtype, **head)


def load_t5() -> tuple[Any, Any] | None:
    """The same of an encoder-decoder: T5 or FLAN-T5 in the local folder that LORA_LAB_T5 names; None where it names none."""
    folder = str(_small_t5_folder()) if fast() else os.environ.get("LORA_LAB_T5")
    return workshop.load(folder, dtype=torch.float32) if folder else None


# The small models --------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = 1024  # in the small vocabularies


@functools.cache
def _temporary() -> Path:
    """A folder that goes with the process."""
    folder = tempfile.mkdtemp(prefix="lora-lab-course-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _small_folder() -> Path:
    """A Llama of 0.9 million weights, as a folder."""
    tokenizer = _small_tokenizer()
    config = workshop.LlamaConfig.from_dict({
        "vocab_size": tokenizer.vocab_size, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_theta": 10_000.0, "tie_word_embeddings": True,
    })  # fmt: skip
    return _saved(workshop.LlamaForCausalLM(config), tokenizer, "small-llama")


@functools.cache
def _small_encoder_folder() -> Path:
    """A BERT of 0.9 million weights, as a folder."""
    tokenizer = _small_encoder_tokenizer()
    config = workshop.BertConfig.from_dict({
        "vocab_size": tokenizer.vocab_size, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 512,
    })  # fmt: skip
    return _saved(workshop.BertModel(config), tokenizer, "small-bert")


@functools.cache
def _small_t5_folder() -> Path:
    """A FLAN-T5 of 0.6 million weights, as a folder. The Llama's tokenizer, with the end token behind every text."""
    tokenizer = _small_tokenizer()
    end = tokenizer.special["eos_token"]
    tokenizer.backend.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    config = workshop.T5Config.from_dict({
        "vocab_size": tokenizer.vocab_size, "d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    })  # fmt: skip
    return _saved(workshop.T5ForConditionalGeneration(config), workshop.Tokenizer(tokenizer.backend, tokenizer.special), "small-t5")


def _saved(model: Any, tokenizer: Any, folder: str) -> Path:
    """The same weights in every process."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.06, generator=generator)
    workshop.save(model, _temporary() / folder, tokenizer)
    return _temporary() / folder


def _small_tokenizer() -> Any:
    """Byte-level BPE as SmolLM2's, learned from the bundled reviews."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, every_byte = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=every_byte, show_progress=False)
    backend.train_from_iterator(_texts(), trainer)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return workshop.Tokenizer(backend, names, TEMPLATE)


def _small_encoder_tokenizer() -> Any:
    """WordPiece as MiniLM's, learned from the same."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(_texts(), trainers.WordPieceTrainer(vocab_size=WORDS, special_tokens=special, show_progress=False))
    pair = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pair)
    return workshop.Tokenizer(backend, {f"{token[1:-1].lower()}_token": token for token in special})


def _texts() -> Iterator[str]:
    for row in data.load("reviews")[0]:
        yield from (row["instruction"], row["input"], row["output"])
