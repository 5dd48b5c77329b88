"""Small GPT-2s, GPT-NeoXs and Falcons of many shapes: transformers' and ours from the same random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from llama_tools import VOCABULARY, ids, randomised

from lora_lab.models.loading import build

transformers.logging.set_verbosity_error()

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
NEOX = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 48}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 48}
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
WIDE = {"hidden_size": 48, "num_attention_heads": 6}
CLASSES = {"gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2), "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", NEOX),
           "falcon": ("FalconConfig", "FalconForCausalLM", FALCON)}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied": {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 40},
    "gpt2-scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu", "layer_norm_epsilon": 1e-2},
    "gpt2-not-scaled": {"scale_attn_weights": False, "activation_function": "gelu_pytorch_tanh"},
    "gpt2-upcast": {"reorder_and_upcast_attn": True, "activation_function": "quick_gelu", "attn_implementation": "eager"},
    "neox": {},
    "neox-sequential": {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    "neox-all-turns": {"rotary_pct": 1.0, "rotary_emb_base": 500, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    "neox-stretched": {"rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "layer_norm_eps": 1e-2},
    "neox-odd-angles": {"hidden_size": 48, "hidden_act": "relu"},
    "falcon-7b": {},
    "falcon-40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    "falcon-11b": {**WIDE, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    "falcon-rw-1b": RW,
    "falcon-sequential": {"parallel_attn": False, "ffn_hidden_size": 40, "activation": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-2},
    "falcon-many-keys": {"multi_query": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "falcon-alibi-one-key": {**WIDE, "alibi": True},
    "falcon-alibi-groups": {**WIDE, "alibi": True, "new_decoder_architecture": True, "num_kv_heads": 3},
}  # fmt: skip
FAMILIES = ["gpt2", "neox", "falcon-7b", "falcon-40b", "falcon-rw-1b"]  # a shape for each way of computing, for what costs more


def theirs(shape: str, **changes: Any) -> Any:
    """transformers' model in eval mode; every parameter is random, norms and biases too, and large enough to matter."""
    config_class, model_class, plain = CLASSES[shape.partition("-")[0]]
    fields = {**plain, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **SHAPES[shape], **changes}
    torch.manual_seed(0)
    return randomised(getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval())


def ours(model: Any) -> Any:
    """Our model of the weights of transformers' and the config it would save."""
    source = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return build(source, ((name, tensor.clone()) for name, tensor in model.state_dict().items()), None, None)


def pair(shape: str, **changes: Any) -> tuple[Any, Any]:
    model = theirs(shape, **changes)
    return ours(model), model


def loss_and_gradients(model: Any, mode: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """In training mode, with this mode of checkpointing and the same random numbers each time."""
    torch.manual_seed(3)
    model.train().gradient_checkpointing_enable(mode)
    tokens = ids(2)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients
