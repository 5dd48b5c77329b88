"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from lora_lab.models import Tokenizer

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
CONTROL, USER_DEFINED, NORMAL, UNKNOWN, BYTE = 3, 4, 1, 2, 6


def permuted(values, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def gguf_name(name):
    path, kind = name.rsplit(".", 1)
    if not path.startswith("model.layers."):
        return f"{NAMES[path]}.{kind}"
    layer, part = path.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def add_hyperparameters(writer, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def add_tensors(writer, model, kind):
    """Matrices as `kind`, norms and biases in float32; leaves in `model` the values a reader will find."""
    heads, tied = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}, model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = parameter.detach().float().numpy().copy()
        stored_as = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        rotated = next((heads[which] for which in "qk" if f"{which}_proj" in name), None)
        stored = permuted(values, rotated) if rotated else values
        raw = gguf.quants.quantize(np.ascontiguousarray(stored), stored_as)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=stored_as)
        back = torch.from_numpy(gguf.quants.dequantize(raw, stored_as).copy()).reshape(values.shape)
        parameter.copy_(unpermuted(back, rotated) if rotated else back)


def unpermuted(values, heads):
    return values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def add_byte_level_tokenizer(writer, tokenizer, pre="gpt-2", types=None):
    """The "gpt2" kind: vocabulary, merges and token types of a `lora_lab` tokenizer."""
    import json

    state = json.loads(tokenizer.backend.to_str())
    vocabulary = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    control = {added["content"] for added in state["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types(types or [CONTROL if token in control else NORMAL for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    add_special(writer, {name: vocabulary.index(token) for name, token in tokenizer.special.items()})
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_special(writer, ids):
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
                      ("pad", writer.add_pad_token_id)):  # fmt: skip
        if f"{name}_token" in ids:
            add(ids[f"{name}_token"])


def write(path, model, kind=gguf.GGMLQuantizationType.F32, tokenizer=None, extra=None, without=(), architecture="llama"):
    """Write transformers' `model` as GGUF, quantised; the model is left with the values that were stored.

    extra: a function of the writer, for further fields and tensors.  without: names of fields to leave out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("a small random Llama")
    add_hyperparameters(writer, model.config)
    if isinstance(tokenizer, Tokenizer):
        add_byte_level_tokenizer(writer, tokenizer)
    elif tokenizer is not None:
        tokenizer(writer)
    with torch.no_grad():
        add_tensors(writer, model, kind)
    if extra is not None:
        extra(writer)
    for name in without:
        assert writer.kv_data[0].pop(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
