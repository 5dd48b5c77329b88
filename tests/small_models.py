"""Small random models of transformers, the oracles' side of the comparisons; and our own from the same weights."""

from __future__ import annotations

import torch
import transformers

transformers.logging.set_verbosity_error()

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**changes):
    config = transformers.LlamaConfig(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=64, **changes)  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def opt():
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                                                              max_position_embeddings=64, word_embed_proj_dim=32))  # fmt: skip


def neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                                                      num_attention_heads=4, max_position_embeddings=64))  # fmt: skip


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                                                         decoder_start_token_id=0))  # fmt: skip


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
                                                                              num_hidden_layers=2, num_attention_heads=4))  # fmt: skip


FAMILIES = {make.__name__: make for make in (llama, gpt2, opt, neox, t5, bert)}


def build(family, dtype=torch.float64, **changes):
    """A model in eval mode, in float64 where equality is algebra, with weights large enough for differences to show."""
    torch.manual_seed(1)
    model = FAMILIES[family](**changes).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def logits(model, family):
    """The model's logits for one fixed batch."""
    torch.manual_seed(2)
    ids = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids[:, :3]} if family == "t5" else {})).logits


def randomise(model, by=0.4):
    """B is not zero, the magnitude not the norm: otherwise every bug is hidden. Returns the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
            elif "lora_" in name and "_start" not in name:
                parameter.add_(torch.randn_like(parameter) * by)
    return model


def learn(model, by=0.3, seed=2):
    """Move whatever trains, as a training would. Returns the model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)
    return model
