"""Small Llamas: transformers' and ours from the same random weights, and what the tests measure them with."""

from __future__ import annotations

import contextlib
import gc

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, trainers
from torch.testing import assert_close

from lora_lab.models import LlamaConfig, LlamaForCausalLM, Tokenizer

transformers.logging.set_verbosity_error()

VOCABULARY = 64
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRICKY = [
    "Hello, world!", "", " ", "   three spaces", "trailing   ", "line\nbreaks\r\n\r\n  and\ttabs", "it's we'll I'D THEY'VE",
    "2024 was 3.14 or 1,000,000",
    "naïve café Ünïcödé", "日本語のテキスト", "مرحبا بالعالم", "👩‍👩‍👧‍👦 🙂 e\u0301", "<|im_start|>user\nhi<|im_end|>", "a<|im_end|>b",
    "def f(x):\n    return x**2  # ok",
    "\u00a0\u200bzero width", "\ufffd", "aaaaaaaaaaaaaaaaaaaaaaaa", "...!?!?", "x" * 300,
]  # fmt: skip


def config(**changes):
    """A config.json of transformers, as a dict: two layers, grouped queries."""
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu",
             "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return {**plain, **changes}


def theirs(**changes):
    """transformers' Llama in eval mode; every parameter is random, norms and biases too, and large enough to matter."""
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config(**changes))).eval())


def randomised(model):
    """Every parameter random; the weights of norms, which are vectors, around 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if name.endswith(".weight") and parameter.ndim == 1:
                parameter.add_(1.0)
    return model


def ours(model, **factory):
    """Our Llama with the weights of transformers' and the config it would save."""
    mine = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict()), **factory).eval()
    mine.load_state_dict(model.state_dict())
    return mine


def pair(**changes):
    model = theirs(**changes)
    return ours(model), model


def ids(batch=2, length=9, start=3):
    return torch.randint(start, VOCABULARY, (batch, length))


def relative_error(actual, expected):
    """The largest difference, in units of the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def logits_of(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(mine, reference, tolerance=1e-4, **inputs):
    """Logits, loss and every gradient of two models, each relative to the largest value."""
    labels = inputs.pop("labels", inputs.get("input_ids"))
    keep = inputs.get("attention_mask", torch.ones(labels.shape)).bool()
    logits = [logits_of(model, **inputs)[keep[:, -labels.shape[1] :]] for model in (mine, reference)]
    assert relative_error(*logits) < tolerance
    losses = [model.train()(**inputs, labels=labels).loss for model in (mine, reference)]
    assert_close(*losses, rtol=tolerance, atol=tolerance)
    slopes = [gradients(model, loss) for model, loss in zip((mine, reference), losses, strict=True)]
    assert slopes[0].keys() == slopes[1].keys()
    for name, slope in slopes[0].items():
        assert relative_error(slope, slopes[1][name]) < tolerance, name
        assert slope.abs().max() > 0, name
    mine.eval(), reference.eval()


@contextlib.contextmanager
def saved_for_backward():
    """The tensors autograd keeps, by the storage they lie in: {address: bytes}."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@contextlib.contextmanager
def compiled(function):
    """The function compiled without a graph break; what the compiler keeps (fake tensors with symbolic sizes) is dropped afterwards."""
    torch._dynamo.reset()
    try:
        yield torch.compile(function, fullgraph=True, backend="aot_eager")
    finally:
        torch._dynamo.reset()
        gc.collect()


def tokenizer(chat_template=CHATML, size=400, texts=("the quick brown fox jumps over the lazy dog, and the dog sleeps on",)):
    """A byte-level BPE trained on a few lines, with ChatML's special tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator([*texts] * 3, trainer)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    return Tokenizer(backend, special, chat_template)
