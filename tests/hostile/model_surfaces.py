"""Folders and files of models: config.json, weights, indexes, tokenizers, chat templates, GGUF; each model that loads also runs."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf_tools
import llama_tools
import torch
from adapter_surfaces import Case, lay_out, read_folder
from mutations import NAMES, WORDS, header_of, spoilt_bytes, spoilt_json, spoilt_safetensors, text_of
from tiny_workshop import CHATML, chat_tokenizer
from torch import nn

from lora_lab import models
from lora_lab.data.chat_templates import CHAT_TEMPLATES
from lora_lab.models import chat_sandbox
from lora_lab.models.chat_sandbox import render
from lora_lab.models.embedding import Pooling
from lora_lab.models.loading import FAMILIES

PLAIN = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**PLAIN, "num_key_value_heads": 1, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, "rms_norm_eps": 1e-5, "head_dim": 8},
    "MistralForCausalLM": {**PLAIN, "sliding_window": 3, "num_key_value_heads": 2, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "Qwen3ForCausalLM": {**PLAIN, "head_dim": 8, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1,
                         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "GPT2LMHeadModel": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "activation_function": "gelu_new"},
    "GPTNeoXForCausalLM": {**PLAIN, "rotary_pct": 0.5, "max_position_embeddings": 16, "hidden_act": "gelu"},
    "FalconForCausalLM": {**PLAIN, "alibi": True, "bias": True, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "T5ForConditionalGeneration": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
                                   "decoder_start_token_id": 0, "eos_token_id": 1, "feed_forward_proj": "gated-gelu"},
    "BertForSequenceClassification": {**PLAIN, "max_position_embeddings": 16, "id2label": {"0": "a", "1": "b", "2": "c"}, "type_vocab_size": 2},
    "RobertaForMaskedLM": {**PLAIN, "max_position_embeddings": 18, "type_vocab_size": 1, "pad_token_id": 1},
}  # fmt: skip
KEYS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "hidden_size", "head_dim", "num_key_value_heads",
        "max_position_embeddings",
        "sliding_window", "layer_types", "max_window_layers", "rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "rotary_pct",
        "tie_word_embeddings", "architectures", "torch_dtype", "auto_map", "quantization_config", "id2label", "num_labels", "hidden_act", "n_inner",
        "original_max_position_embeddings", "attention_dropout", "rms_norm_eps", "layer_norm_epsilon", "initializer_range",
        "pad_token_id")  # fmt: skip
IDS = torch.tensor([[2, 5, 7, 3]])
TASKS = (None, None, None, "sequence-classification", "masked-lm", "feature-extraction")


def small(name: str) -> nn.Module:
    """A model of the family with weights of which none is zero."""
    torch.manual_seed(5)
    family = FAMILIES[name]
    model = family(family.config_class.from_dict({**CONFIGS[name], "architectures": [name], "model_type": name}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.tie_weights()
    return model.eval()


def runs(model: Any) -> None:
    """One pass, of the shape that the configuration says."""
    inputs = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        output = model(input_ids=IDS, **inputs)
    first = next(value for value in (getattr(output, "logits", None), getattr(output, "last_hidden_state", None)) if value is not None)
    assert (first.shape[0] == 1 and first.shape[-1] in vars(model.config).values()) or first.shape[-1] == model.config.num_labels


def folders(folder: Path) -> Case:
    """models.load of a folder, whole or in two shards, with and without another task."""
    good = []
    for name in CONFIGS:
        models.save(small(name), folder / "good" / name)
        good.append(read_folder(folder / "good" / name))
    work = folder / "work"
    work.mkdir()

    def case(rng: random.Random) -> None:
        files = dict(rng.choice(good))
        if rng.random() < 0.2:
            files = _sharded(files)
        name = rng.choice(["config.json", "config.json", "config.json", *files])
        if name.endswith("safetensors"):
            files[name] = spoilt_safetensors(files[name], rng)
        else:
            value = json.loads(files[name])
            if name.endswith("index.json") and rng.random() < 0.5:
                value["weight_map"][rng.choice([*value["weight_map"]])] = rng.choice([*NAMES, "../beside/model.safetensors", 3, None, []])
            else:
                value = spoilt_json(value, rng, KEYS)
            files[name] = text_of(value, rng)
        lay_out(work, files)
        model, _ = models.load(work, task=rng.choice(TASKS), dtype=rng.choice((None, torch.float32)))
        runs(model)

    return case


def _sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    header, _ = header_of(files["model.safetensors"])
    weight_map = dict.fromkeys((name for name in header if name != "__metadata__"), "model-00001-of-00001.safetensors")
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    return {**rest, "model-00001-of-00001.safetensors": files["model.safetensors"],
            "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}  # fmt: skip


def layouts(folder: Path) -> Case:
    """sentence-transformers' files, which say how vectors are made."""
    good: dict[str, Any] = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                         {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                         {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}],
        "sentence_bert_config.json": {"max_seq_length": 8, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    }  # fmt: skip
    (folder / "1_Pooling").mkdir(parents=True)

    def case(rng: random.Random) -> None:
        name = rng.choice([*good])
        for each, value in good.items():
            value = spoilt_json(value, rng) if each == name else value
            if each == name == "modules.json" and rng.random() < 0.4:
                value = [{"path": rng.choice(NAMES), "type": "x.Pooling"}]
            (folder / each).write_bytes(text_of(value, rng) if each == name else json.dumps(value).encode())
        vector = Pooling.of_folder(folder)(torch.ones(1, 3, 4), torch.ones(1, 3))
        assert vector.shape == (1, 4)

    return case


def tokenizers(folder: Path) -> Case:
    """The tokenizer's files of a folder; what loads encodes, renders and decodes."""
    chat_tokenizer().save(folder / "good")
    good = {**read_folder(folder / "good"), "special_tokens_map.json": b'{"unk_token": {"content": "<s>"}}',
    "generation_config.json": b'{"eos_token_id": 2}'}
    work = folder / "work"
    work.mkdir()

    def case(rng: random.Random) -> None:
        files, name = dict(good), rng.choice([*good, "chat_template.jinja"])
        if name == "chat_template.jinja":
            files[name] = spoilt_bytes(CHATML.encode(), rng)
        elif rng.random() < 0.3:
            files[name] = spoilt_bytes(files[name], rng)
        else:
            files[name] = text_of(spoilt_json(json.loads(files[name]), rng, ("chat_template", "eos_token", "eos_token_id", "added_tokens")), rng)
        lay_out(work, files)
        words = models.Tokenizer.from_folder(work)
        assert words is not None and isinstance(words.pad_token_id, int) and isinstance(words.end_ids, frozenset)
        ids = words.encode("a text")
        assert isinstance(words.decode(ids), str)
        if words.chat_template:
            assert isinstance(words.apply_chat_template([{"role": "user", "content": "hi"}]), str)

    return case


PIECES = ["messages", "messages[0]", "messages[0]['content']", "''", "'x' * 1000000", "range(100000)", "range(10**9)", "ns.t", "x", "[x, x]", "x ~ x",
          "x + x", "x * 3", "10 ** 9", "9 ** 9 ** 9", "messages|tojson(indent=100000)", "x|replace('', x)", "x|join(x)", "'%99999999999d' % 1",
          "'{:>99999999}'.format(1)", "'{:{}}'.format(1, 10**9)", "x.center(10**9)", "(1).to_bytes(10**9, 'big')", "''.__class__.__mro__", "m(x)",
          "self", "cycler(x)", "joiner(x)", "namespace(t=x)", "dict(a=x)", "lipsum(10**6)", "x|list", "x|indent(10**7)", "x.split('')",
          "x|map('upper')|list",
          "x|attr('__class__')", "strftime_now('%Y' * 1000)", "raise_exception(x)", "x|round(10**9)", "x|sum", "{'a': x, 'b': x}", "x[::2]",
          "x|batch(10**9)",
          "range.__globals__", "messages.__init__.__globals__", "x|string", "x.translate(x)", "x.join([x, x])", "[x] * 100000", "x|safe",
          "loop"]  # fmt: skip
FRAMES = ["{{% set x = {0} %}}", "{{% set x = {0} %}}" * 40, "{{{{ {0} }}}}", "{{% for i in {0} %}}{1}{{% endfor %}}",
          "{{% for x in {0} %}}{1}{{% endfor %}}{1}",
          "{{% set ns = namespace(t={0}) %}}{{% for i in range(300) %}}{{% set ns.t = {2} %}}{{% endfor %}}", "{{% if {0} %}}{1}{{% endif %}}",
          "{{% macro m(x) %}}{1}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m({0}) }}}}", "{{% filter indent({0}) %}}{1}{{% endfilter %}}",
          "{{% macro m(x) %}}{{% if x < 60 %}}{{{{ m(x + 1) }}}}{{{{ m(x + 1) }}}}{{% endif %}}{{% endmacro %}}{{{{ m(0) }}}}{1}",
          "{{% for i in {0} recursive %}}{{{{ loop({2}) }}}}{{% endfor %}}", "{{% set x %}}{1}{{{{ x }}}}{{% endset %}}" * 30, "{{% include {0} %}}",
          "{{% call(y) m({0}) %}}{1}{{% endcall %}}", "text {1}"]  # fmt: skip


def written_template(rng: random.Random, depth: int = 3) -> str:
    """A program in jinja2 that is up to no good."""
    inner = written_template(rng, depth - 1) if depth and rng.random() < 0.7 else "y"
    return rng.choice(FRAMES).format(rng.choice(PIECES), inner, rng.choice(PIECES))


def templates(folder: Path) -> Case:
    """Chat templates: programs that count, grow and reach out, and real ones that are spoilt."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    chat_sandbox.MOST_WORK = 1_000_000  # in this process: so that thousands of templates come to the bound within a minute

    def case(rng: random.Random) -> None:
        real = rng.random() < 0.3
        template = spoilt_bytes(rng.choice([*CHAT_TEMPLATES.values()]).encode(), rng).decode(errors="replace") if real else written_template(rng)
        given = json.loads(json.dumps(messages))
        try:
            text = render(template, messages=given, bos_token="<s>", eos_token="</s>", add_generation_prompt=True, x="ab", tools=None)
            assert isinstance(text, str) and len(text) <= chat_sandbox.MOST_WORK
        finally:
            assert given == messages, "the template changed its input"

    return case


def gguf_files(folder: Path) -> Case:
    """models.load of a GGUF file: counts, lengths, types and offsets of its header, and its fields."""
    folder.mkdir(parents=True, exist_ok=True)
    source = llama_tools.theirs(num_hidden_layers=1)
    plain = gguf_tools.write(folder / "plain.gguf", source).read_bytes()
    whole = gguf_tools.write(folder / "whole.gguf", source, tokenizer=llama_tools.tokenizer(llama_tools.CHATML)).read_bytes()
    path = folder / "work.gguf"

    def case(rng: random.Random) -> None:
        data = rng.choice((plain, whole))
        header = data.find(b"token_embd.weight") + 4000
        match rng.randrange(4):
            case 0:
                data = spoilt_bytes(data, rng)
            case 1:
                data = spoilt_bytes(data[:header], rng) + data[header:]
            case 2:
                at = rng.choice((4, 8, 16, rng.randrange(24, min(header, len(data) - 8))))
                data = data[:at] + rng.choice(WORDS) + data[at + 8 :]
            case _:
                data = _other_value(data, rng)
        path.write_bytes(data)
        model, words = models.load(path)
        runs(model)
        if words is not None:
            words.decode(words.encode("some text"))

    return case


def _other_value(data: bytes, rng: random.Random) -> bytes:
    """A field of the header with a value, or a type, of another kind."""
    names = [b"llama.block_count", b"llama.embedding_length", b"llama.attention.head_count", b"llama.attention.head_count_kv",
             b"llama.context_length",
             b"llama.rope.freq_base", b"llama.attention.key_length", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges",
             b"tokenizer.ggml.eos_token_id",
             b"tokenizer.ggml.token_type", b"tokenizer.ggml.model", b"tokenizer.chat_template", b"general.alignment", b"general.architecture",
             b"llama.attention.layer_norm_rms_epsilon", b"llama.feed_forward_length"]  # fmt: skip
    at = data.find(name := rng.choice(names)) + len(name)
    if at < len(name):
        return data
    if rng.random() < 0.4:
        return data[:at] + struct.pack("<I", rng.choice((0, 4, 5, 6, 7, 8, 9, 10, 12, 13, 2**31))) + data[at + 4 :]
    if rng.random() < 0.2:
        many = struct.pack("<IIQ", 9, rng.choice((0, 4, 8, 9)), rng.choice((2**60, 2**32, 10**7, 100)))
        return data[:at] + many + data[at + 4 :]
    return data[: at + 4] + rng.choice(WORDS)[: rng.choice((4, 8))] + data[at + 8 :]
