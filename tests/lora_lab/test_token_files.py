"""Token rows in files: PEFT reads ours, we read PEFT's, and a merged checkpoint computes the same; what does not fit is refused."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
ROWS = "token_adapter.trainable_tokens_delta"


def llama(tied):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **SHAPE, num_key_value_heads=2, tie_word_embeddings=tied))


def gpt2(tied):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, n_embd=32, n_layer=1, n_head=4, n_positions=64, tie_word_embeddings=tied))


def gemma2(tied):
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, **SHAPE, head_dim=8, num_key_value_heads=2, tie_word_embeddings=tied))


def t5(tied):
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                                                                         decoder_start_token_id=0, tie_word_embeddings=tied))  # fmt: skip


# family -> (make, embedding, a layer for LoRA)
FAMILIES = {"llama": (llama, "embed_tokens", "q_proj"), "gpt2": (gpt2, "wte", "c_attn"), "gemma2": (gemma2, "embed_tokens", "q_proj"),
            "t5": (t5, "shared", "q")}  # fmt: skip
REQUESTS = {
    "a list": lambda embedding: [9, 4, 60],
    "a dict": lambda embedding: {embedding: [9, 4, 60]},
    "both alike": lambda embedding: {embedding: [9, 4], "lm_head": [9, 4]},
    "both unlike": lambda embedding: {embedding: [9, 4], "lm_head": [4, 9]},
    "the head alone": lambda embedding: {"lm_head": [9, 4]},
}


def build(family="llama", tied=True):
    torch.manual_seed(1)
    model = FAMILIES[family][0](tied).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[9, 4, 60, 3, 11, 9], [5, 60, 60, 4, 30, 31]])
    more = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def with_peft(base, request, layers, **config):
    config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **config}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=layers, trainable_token_indices=request, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_()
    return model


def with_rows(model, request, layers):
    lora_lab.inject(model, rank=3, alpha=5, init="random", target_modules=layers, trainable_token_indices=request)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_tokens" in name:
                parameter.normal_()
    return model


def read_with_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing or an unknown key is a warning in PEFT
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


# With PEFT, both ways ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_compute_what_peft_computes_from_its_file(family, tied, request_, tmp_path):
    base, (_, embedding, layer) = build(family, tied), FAMILIES[family]
    theirs = with_peft(copy.deepcopy(base), request_(embedding), [layer])
    theirs.save_pretrained(tmp_path)
    before = logits(base)
    model = lora_lab.load(base, tmp_path)
    assert_close(logits(model), logits(theirs), rtol=0, atol=1e-12)
    assert (logits(model) - before).abs().max() > 0.1
    assert torch.equal(logits(lora_lab.eject(model)), before)


@pytest.mark.parametrize("layers", [True, False], ids=["with LoRA", "rows alone"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_we_compute_from_our_file(family, tied, request_, layers, tmp_path):
    """Also rows alone, an adapter that PEFT itself cannot make: its placeholder for "no layer" says so."""
    base, (_, embedding, layer) = build(family, tied), FAMILIES[family]
    model = with_rows(copy.deepcopy(base), request_(embedding), [layer] if layers else [])
    lora_lab.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["target_modules"] == "dummy-target-modules") != layers
    assert_close(logits(read_with_peft(copy.deepcopy(base), tmp_path)), logits(model), rtol=0, atol=1e-12)
    assert_close(logits(lora_lab.load(base, tmp_path)), logits(model), rtol=0, atol=1e-13)


def test_the_file_is_as_peft_writes_it(tmp_path):
    request = {"embed_tokens": [9, 4]}
    with_peft(build(), request, ["q_proj"]).save_pretrained(tmp_path / "theirs")
    lora_lab.save(with_rows(build(), request, ["q_proj"]), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / TENSORS) for who in ("theirs", "ours"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert ours[f"base_model.model.model.embed_tokens.{ROWS}"].shape == (2, 32)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["trainable_token_indices"] == [9, 4]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_on_the_head_beside_rows_is_peft_s(tied, tmp_path):
    """PEFT wraps the base layer of its LoRA there: row . h for the trained words, and B A h for all."""
    base = build(tied=tied)
    theirs = with_peft(copy.deepcopy(base), [9, 4, 60], ["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model = lora_lab.load(copy.deepcopy(base), tmp_path / "theirs")
    assert_close(logits(model), logits(theirs), rtol=0, atol=1e-12)
    lora_lab.save(model, tmp_path / "ours")
    assert_close(logits(read_with_peft(base, tmp_path / "ours")), logits(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_file_with_whole_embeddings_beside_the_rows_is_read(tied, tmp_path):
    """What PEFT writes after resize_token_embeddings: the resized matrix, and the rows of a tied head a second time."""
    base = build(tied=tied)
    base.resize_token_embeddings(66)
    theirs = with_peft(copy.deepcopy(base), [64, 65, 9], ["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"base_model.model.model.embed_tokens.{ROWS.replace('trainable_tokens_delta', 'base_layer.weight')}" in load_file(tmp_path / TENSORS)
    assert_close(logits(lora_lab.load(base, tmp_path)), logits(theirs), rtol=0, atol=1e-12)


def test_rows_of_no_words_are_nothing(tmp_path):
    base = build()
    with_peft(base, [], ["q_proj"]).save_pretrained(tmp_path)  # and PEFT cannot run it
    assert load_file(tmp_path / TENSORS)[EMBED].shape == (0, 32)
    model = lora_lab.load(build(), tmp_path)
    assert sorted(path for path, layer in lora_lab.targets.lora_layers(model).items()) == ["model.layers.0.self_attn.q_proj"]


def test_a_bias_of_a_tied_head_stays_and_saving_says_that_peft_loses_it(tmp_path):
    """PEFT computes logits = h W', without the bias of BERT's decoder."""
    torch.manual_seed(1)
    base = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **SHAPE)).double().eval()
    nn.init.normal_(base.cls.predictions.decoder.bias)
    model = with_rows(copy.deepcopy(base), [9, 4], ["query"])
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.lora_tokens["default"].copy_(base.bert.embeddings.word_embeddings.weight[[9, 4]])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert_close(logits(model), logits(base), rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match=r"'cls.predictions.decoder' has a bias, which PEFT"):
        lora_lab.save(model, tmp_path)
    assert (logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()) - logits(model)).abs().max() > 0.1


# Loading --------------------------------------------------------------------------------------------------------------------------


def test_replace_copies_into_the_same_rows(tmp_path):
    first, second = with_rows(build(), [9, 4], ["q_proj"]), with_rows(build(), [9, 4], ["q_proj"])
    lora_lab.save(second, tmp_path / "second")
    rows = first.model.embed_tokens.lora_tokens["default"]
    lora_lab.load(first, tmp_path / "second", replace=True)
    assert first.model.embed_tokens.lora_tokens["default"] is rows
    assert_close(logits(first), logits(second), rtol=0, atol=1e-13)
    for other in (with_rows(build(), [9, 5], ["q_proj"]), with_rows(build(), {"lm_head": [9, 4]}, ["q_proj"]), with_rows(build(), None, ["q_proj"])):
        before = logits(other)
        with pytest.raises(LoraLabError, match="the words with rows of their own: .* in 'default' here, .* in the file"):
            lora_lab.load(other, tmp_path / "second", replace=True)
        assert torch.equal(logits(other), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_saved_in_the_dtype_asked_for_and_come_back_in_float32(dtype, tmp_path):
    lora_lab.save(with_rows(build(), [9, 4], []), tmp_path, dtype=dtype)
    assert load_file(tmp_path / TENSORS)[f"base_model.model.model.embed_tokens.{ROWS}"].dtype == dtype
    model = lora_lab.load(build().bfloat16(), tmp_path, trainable=True)
    rows = model.model.embed_tokens.lora_tokens["default"]
    assert rows.dtype == torch.float32 and [p for p in model.parameters() if p.requires_grad] == [rows]


EMBED = f"base_model.model.model.embed_tokens.{ROWS}"
SPOILED = {
    "NaN": (lambda t, c: t[EMBED].fill_(float("nan")), "not finite"),
    "whole numbers": (lambda t, c: t.update({EMBED: torch.zeros(2, 32, dtype=torch.long)}), "not finite floating-point"),
    "rows lost": (lambda t, c: t.pop(EMBED), "the file has no token rows: it is incomplete"),
    "words lost": (lambda t, c: c.pop("trainable_token_indices"), "trainable_token_indices=None: the two files do not belong together"),
    "fewer words": (lambda t, c: c.update(trainable_token_indices=[9]), r"token rows \[2, 32\].*do not belong together"),
    "words of another name": (lambda t, c: c.update(trainable_token_indices={"wte": [9, 4]}), "do not belong together"),
    "a word twice": (lambda t, c: c.update(trainable_token_indices=[9, 9]), "expected different whole numbers"),
    "no number": (lambda t, c: c.update(trainable_token_indices=[9, "4"]), "expected different whole numbers"),
    "a word too many": (lambda t, c: c.update(trainable_token_indices=[9, 64]), "64 is no word of 'model.embed_tokens'.*0 to 63"),
    "another width": (lambda t, c: t.update({EMBED: torch.zeros(2, 16)}), r"are \[2, 16\], this model needs \[2, 32\]"),
    "another model": (lambda t, c: t.update({EMBED.replace("embed_tokens", "wte"): t.pop(EMBED)}), "another model: .* rows for 'model.wte'"),
    "more announced": (lambda t, c: c.update(trainable_token_indices={"embed_tokens": [9, 4], "q_proj": [1]}), "no token rows for 'q_proj'"),
    "a head that is not tied": (lambda t, c: t.update({f"base_model.model.lm_head.{ROWS}": torch.zeros(2, 32)}), "has those of the embedding"),
    "a pair there, too": (lambda t, c: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 64),
                                                 "base_model.model.model.embed_tokens.lora_embedding_B": torch.zeros(32, 3)}), "target_modules, too"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "match"), SPOILED.values(), ids=SPOILED)
def test_a_damaged_or_foreign_file_is_refused_and_the_model_is_untouched(spoil, match, tmp_path):
    lora_lab.save(with_rows(build(), [9, 4], ["q_proj"]), tmp_path)
    tensors, config = load_file(tmp_path / TENSORS), json.loads((tmp_path / CONFIG).read_text())
    spoil(tensors, config)
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    model = build()
    types, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(LoraLabError, match=match):
        lora_lab.load(model, tmp_path)
    after = model.state_dict()
    assert [type(module) for module in model.modules()] == types and after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_a_file_of_a_tied_model_does_not_fit_an_untied_one_where_it_names_both(tmp_path):
    lora_lab.save(with_rows(build(), [9, 4], []), tmp_path)
    tensors, config = load_file(tmp_path / TENSORS), json.loads((tmp_path / CONFIG).read_text())
    config["trainable_token_indices"] = {"embed_tokens": [9, 4], "lm_head": [9, 4]}
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    lora_lab.load(build(), tmp_path)
    with pytest.raises(LoraLabError, match="no token rows for 'lm_head'.*this one's are not"):
        lora_lab.load(build(tied=False), tmp_path)


# merge_checkpoint -----------------------------------------------------------------------------------------------------------------


def merged(folder, base, model, **kwargs):
    """The merged folder as transformers loads it."""
    lora_lab.save(model, folder / "adapter")
    base.save_pretrained(folder / "base", max_shard_size="20KB")
    lora_lab.merge_checkpoint(folder / "base", folder / "adapter", folder / "merged", progress=False, **kwargs)
    return type(base).from_pretrained(folder / "merged", dtype=torch.float64).eval()


@pytest.mark.parametrize("request_", ["a list", "both alike"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_merged_checkpoint_has_the_rows_and_stays_tied(family, tied, request_, tmp_path):
    base, (_, embedding, layer) = build(family, tied), FAMILIES[family]
    model = with_rows(copy.deepcopy(base), REQUESTS[request_](embedding), [layer])
    result = merged(tmp_path, base, model)
    assert_close(logits(result), logits(model), rtol=0, atol=1e-12 if family != "gemma2" else 1e-5)  # its scale is stored in float32 here
    assert result.config.tie_word_embeddings == tied
    assert (result.get_output_embeddings().weight is result.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("request_", ["both unlike", "the head alone"])
def test_rows_for_one_of_two_tied_tensors_need_untie(request_, tmp_path):
    base = build()
    model = with_rows(copy.deepcopy(base), REQUESTS[request_]("embed_tokens"), ["q_proj"])
    with pytest.raises(LoraLabError, match="untie=True"):
        merged(tmp_path, base, model)
    assert not (tmp_path / "merged").exists()
    assert_close(logits(merged(tmp_path, base, model, untie=True)), logits(model), rtol=0, atol=1e-12)


def test_lora_on_a_tied_head_beside_rows_is_merged_into_two_tensors(tmp_path):
    base = build()
    model = with_rows(copy.deepcopy(base), [9, 4], ["q_proj", "lm_head"])
    with pytest.raises(LoraLabError, match="untie=True"):
        merged(tmp_path, base, model)
    assert_close(logits(merged(tmp_path, base, model, untie=True)), logits(model), rtol=0, atol=1e-12)


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_to_gets_the_rows_too(tmp_path):
    base = build()
    model = with_rows(copy.deepcopy(base), [9, 4], [])
    lora_lab.save(model, tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    rows = model.model.embed_tokens.lora_tokens["default"]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        expected = tensors["model.embed_tokens.weight"].index_copy(0, torch.tensor([9, 4]), rows.detach())
        assert torch.equal(after[name], expected)


@pytest.mark.parametrize("embeddings", [False, True], ids=["rows", "rows and whole embeddings"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_file_of_peft_is_merged(tied, embeddings, tmp_path):
    base = build(tied=tied)
    theirs = with_peft(copy.deepcopy(base), [9, 4], ["q_proj"])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=embeddings)
    base.save_pretrained(tmp_path / "base")
    lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    result = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert_close(logits(result), logits(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("match", [r"rows \[2, 32\] for words up to 64.*\[64, 32\]", "shared.*merge it in memory"], ids=["resized", "T5"])
def test_what_cannot_be_merged_is_refused(match, tmp_path):
    family = "t5" if "shared" in match else "llama"
    base = build(family)
    base.save_pretrained(tmp_path / "base")
    if family == "llama":
        base.resize_token_embeddings(66)
    lora_lab.save(with_rows(base, [9, 64 if family == "llama" else 4], []), tmp_path / "adapter")
    with pytest.raises(LoraLabError, match=match):
        lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
