"""Trainable token rows: the same function and gradients as an embedding whose rows were replaced, and nothing of its size that trains."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from small_models import build, logits
from token_tools import IDS, KINDS, WORDS, H, V, replaced, several, toy, trained, with_rows
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError
from lora_lab.token_rows.rows import places

# One function ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_has_changed_before_training(kind, dtype):
    """Rows begin as the embedding's own, bit for bit."""
    model = toy(dtype=dtype, **kind)
    before = model(IDS)
    lora_lab.inject(model, rank=2, target_modules=["proj"], trainable_token_indices=list(WORDS))
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-14)
    assert torch.equal(model.embed.lora_tokens["default"], model.embed.weight[list(WORDS)].to(model.embed.lora_tokens["default"].dtype))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_output_and_gradients_are_those_of_a_whole_embedding_with_these_rows(kind):
    """In float64, where equality is algebra; a tied head gives the rows a second gradient, a padding word has none in an embedding."""
    base = toy(**kind)
    model = with_rows(copy.deepcopy(base), target_modules=[])
    whole, plain = replaced(base, model.embed.lora_tokens["default"].detach()), base(IDS)
    assert_close(model(IDS), whole(IDS), rtol=0, atol=1e-13)
    assert (model(IDS) - plain).abs().max() > 0.1
    for each in (model, whole):
        each(IDS).square().sum().backward()
    rows = model.embed.lora_tokens["default"]
    assert_close(rows.grad, whole.embed.weight.grad[list(WORDS)], rtol=0, atol=1e-12)
    assert rows.grad.abs().max() > 0.1 and all(p.grad is None for p in model.parameters() if p is not rows)


@pytest.mark.parametrize("ids", [IDS.int(), IDS[:, ::2], IDS[0, 0], IDS[:0]], ids=["int32", "strided", "one word", "no row"])
def test_ids_may_come_in_any_form(ids):
    base = toy()
    model = with_rows(copy.deepcopy(base), target_modules=[])
    assert_close(model.embed(ids), replaced(base, model.embed.lora_tokens["default"].detach()).embed(ids), rtol=0, atol=0)


def test_words_are_found_in_whatever_order_they_were_given():
    words, ids = torch.randint(0, 500, (40, 6)), torch.randperm(500)[:60]
    expected = [[ids.tolist().index(word) if word in ids.tolist() else 60 for word in row] for row in words.tolist()]
    assert places(ids, words).tolist() == expected


def test_only_the_rows_train_and_only_they_move():
    """n * dim numbers: no gradient of the embedding, and an optimizer's step changes the output for these words alone."""
    model = toy()
    before = copy.deepcopy(model)
    planned = lora_lab.plan(model, target_modules=[], trainable_token_indices=list(WORDS))
    lora_lab.inject(model, target_modules=[], trainable_token_indices=list(WORDS))
    count = lora_lab.count_parameters(model)
    assert planned.parameters == count.trainable == count.adapter == len(WORDS) * H
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["embed.lora_tokens.default"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    words = torch.arange(V)
    moved = (model.embed(words) != before.embed(words)).any(1).nonzero().flatten()
    assert moved.tolist() == sorted(WORDS) and torch.equal(model.embed.weight, before.embed.weight)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)


def test_the_plan_names_the_rows_and_who_shares_them():
    text = str(lora_lab.plan(toy(tied=True), target_modules=["proj"], rank=2, trainable_token_indices=[3, 4]))
    assert re.search(r"embed +1 x 2 rows \* 8, in lm_head too = +16\n", text) and "2 layers, 48 parameters" in text


def test_float32_rows_on_a_16_bit_base():
    model = with_rows(toy(dtype=torch.bfloat16, tied=True))
    assert model.embed.lora_tokens["default"].dtype == torch.float32 and model(IDS).dtype == torch.bfloat16
    words = torch.tensor(WORDS)
    assert torch.equal(model.embed(words), model.embed.lora_tokens["default"].bfloat16())


# Which layers take part -----------------------------------------------------------------------------------------------------------


def test_a_tied_head_takes_the_rows_and_an_untied_one_its_own_weight():
    """As in PEFT: what counts is what the configuration says."""
    x = torch.randn(4, H, dtype=torch.float64)
    for tied in (True, False):
        model = with_rows(toy(tied=tied))
        assert_close(model.lm_head(x)[:, list(WORDS)] - x @ model.embed.lora_tokens["default"].T, torch.zeros(4, 3, dtype=torch.float64),
                     atol=1e-13 if tied else 1e9, rtol=0)  # fmt: skip
        assert torch.equal(model.lm_head(x), F.linear(x, model.lm_head.weight)) != tied
    model = toy(tied=True)
    model.config = {"tie_word_embeddings": False}
    with_rows(model)
    assert torch.equal(model.lm_head(x), F.linear(x, model.lm_head.weight))


def test_a_head_may_have_rows_of_its_own():
    """{"lm_head": ids}, or other words for a head that is tied: then neither takes the other's."""
    x = torch.randn(4, H, dtype=torch.float64)
    for request in ({"lm_head": [5]}, {"lm_head": [5], "embed": [2, 7]}):
        model = with_rows(toy(tied=True, bias=True), request)
        assert_close(model.lm_head(x)[:, 5], x @ model.lm_head.lora_tokens["default"][0] + model.lm_head.bias[5], rtol=0, atol=1e-13)
        assert_close(model.lm_head(x)[:, 7], x @ model.lm_head.weight[7] + model.lm_head.bias[7], rtol=0, atol=1e-13)
    one = with_rows(toy(tied=True), {"lm_head": [5, 7], "embed": [5, 7]})
    assert lora_lab.count_parameters(one).adapter == 2 * H + 2 * 2 * H


def test_without_get_input_embeddings_a_list_means_embed_tokens():
    model = nn.Sequential()
    model.embed_tokens, model.other = nn.Embedding(V, H), nn.Embedding(V, H)
    lora_lab.inject(model, target_modules=(), trainable_token_indices=[1])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["embed_tokens.lora_tokens.default"]


# Several adapters -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_updates_of_active_adapters_are_summed(tied):
    model = several(tied)
    ids, x = torch.arange(V), torch.randn(4, H, dtype=torch.float64)
    for layer, given in ((model.embed, ids), (model.lm_head, x)):
        outputs = {}
        for names in (None, "rows", "pair", "more", ["rows", "pair", "more"], ["pair", "more", "rows"]):
            lora_lab.use(model, names)
            outputs[str(names)] = layer(given)
        base = outputs["None"]
        summed = base + sum(outputs[name] - base for name in ("rows", "pair", "more"))
        for order in ("['rows', 'pair', 'more']", "['pair', 'more', 'rows']"):
            assert_close(outputs[order], summed, rtol=0, atol=1e-12)
        assert (summed - base).abs().max() > 0.5


def test_two_adapters_with_a_row_for_one_word_cannot_be_active_together():
    """PEFT refuses them, too: a word has one row. Row by row of a batch they can."""
    model = with_rows(with_rows(toy(tied=True), adapter="a"), (5, 7), adapter="b")
    active = model.embed.lora_active
    with pytest.raises(LoraLabError, match="a and b both have a row for word 7 of 'embed'"):
        lora_lab.use(model, ["a", "b"])
    assert model.embed.lora_active == active
    with lora_lab.per_sample(model, ["a", "b", None]):
        model(IDS)


def test_disabled_and_use_none_give_the_base_and_come_back():
    base = toy(tied=True)
    model = with_rows(copy.deepcopy(base))
    own = model(IDS)
    with lora_lab.disabled(model):
        assert torch.equal(model(IDS), base(IDS))
    assert torch.equal(model(IDS), own) and torch.equal(lora_lab.use(model, None)(IDS), base(IDS))


def test_a_second_adapter_freezes_the_first_ones_rows():
    model = with_rows(with_rows(toy(), adapter="a"), (5,), adapter="b", target_modules=[])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["embed.lora_tokens.b"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_per_sample_equals_row_by_row_with_gradients(tied, dtype):
    model = several(tied, dtype)
    names = ["rows", None, "pair", "more", "rows"]
    ids = torch.tensor([[7, 2, 11, 3], [7, 5, 1, 0], [7, 8, 3, 4], [3, 5, 7, 1], [2, 9, 5, 11]])
    parameters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for p in parameters.values():
        p.requires_grad_(True)
    with lora_lab.per_sample(model, names):
        together = model(ids)
        embedded = model.embed(ids)
        gradients = torch.autograd.grad(together.square().sum(), parameters.values())
    single, looked_up = [], []
    for name, row in zip(names, ids, strict=True):
        lora_lab.use(model, name)
        single.append(model(row[None]))
        looked_up.append(model.embed(row[None]))
    assert torch.equal(embedded, torch.cat(looked_up)) or dtype == torch.float64
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.2}
    assert_close(together, torch.cat(single), **tolerance)
    if dtype == torch.float64:
        own = torch.autograd.grad(sum(y.square().sum() for y in single), parameters.values(), allow_unused=True)
        assert_close(gradients, tuple(own), rtol=1e-12, atol=1e-11)
        assert all(g.abs().max() > 0 for g in own)


def test_combine_refuses_rows():
    with pytest.raises(LoraLabError, match="'rows' has token rows in 'embed'"):
        lora_lab.combine(several(), {"rows": 1.0, "pair": 1.0}, into="both")


# Refusals -------------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "beyond the vocabulary": ({"trainable_token_indices": [3, 20]}, "20 is no word of 'embed', whose words are 0 to 19"),
    "negative": ({"trainable_token_indices": [-1]}, "-1 is no word"),
    "twice": ({"trainable_token_indices": [3, 4, 3]}, "3 is there twice"),
    "a bool": ({"trainable_token_indices": [True]}, "expected a list of whole numbers"),
    "a float": ({"trainable_token_indices": [1.0]}, "expected a list of whole numbers"),
    "a number": ({"trainable_token_indices": 3}, "=3: expected a list of whole numbers"),
    "a string": ({"trainable_token_indices": "12"}, "expected a list of whole numbers"),
    "none": ({"trainable_token_indices": []}, "names no word"),
    "no embedding": ({"trainable_token_indices": {}}, "names no embedding"),
    "a wrong name": ({"trainable_token_indices": {"embde": [1]}}, r"'embde' matches nothing.\n  Embeddings here: embed \(did you mean 'embed'"),
    "part of a name": ({"trainable_token_indices": {"bed": [1]}}, "'bed' matches nothing"),
    "a linear layer": ({"trainable_token_indices": {"proj": [1]}}, "'proj' is a Linear, and neither an embedding nor the model's output layer"),
    "named twice": ({"trainable_token_indices": {"embed": [1], "lm_head": [1], "": [2]}}, "'' matches nothing"),
    "LoRA there, too": ({"trainable_token_indices": [1], "target_modules": ["proj", "embed"]}, "'embed' is among target_modules, too"),
    "trained whole": ({"trainable_token_indices": [1], "modules_to_save": ["embed"]}, "trained whole by modules_to_save"),
    "no rows, no layers": ({"target_modules": []}, "names no layer"),
    "DoRA on the tied head": ({"trainable_token_indices": [1], "target_modules": ["lm_head"], "variant": "dora"}, "variant='dora' in 'lm_head'"),
}  # fmt: skip


@pytest.mark.parametrize(("request_", "match"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_and_the_model_is_untouched(request_, match):
    model = toy(tied=True)
    types, state, flags = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    for verb in (lora_lab.plan, lora_lab.inject):
        with pytest.raises(LoraLabError, match=match):
            verb(model, **{"target_modules": ["proj"], "rank": 2, **request_})
    assert [type(m) for m in model.modules()] == types and model.state_dict().keys() == state.keys()
    assert [p.requires_grad for p in model.parameters()] == flags and "lora_injection" not in vars(model)


def test_models_whose_rows_cannot_be_told_or_replaced_are_refused():
    two = nn.ModuleDict({"a": nn.Embedding(V, H), "b": nn.Embedding(V, H)})
    with pytest.raises(LoraLabError, match="does not say which is its input embedding.*'embed_tokens'.*\n  Embeddings here: a, b"):
        lora_lab.inject(two, target_modules=[], trainable_token_indices=[1])
    with pytest.raises(LoraLabError, match="max_norm=1"):
        lora_lab.inject(toy(max_norm=1.0), target_modules=[], trainable_token_indices=[1])
    quantised = toy(dtype=torch.float32)
    quantised.get_output_embeddings = lambda: None  # of a model that says so, quantize leaves the head alone
    lora_lab.quantize(quantised, "int8")
    quantised.get_output_embeddings = lambda: quantised.lm_head
    with pytest.raises(LoraLabError, match="'lm_head' is quantised"):
        lora_lab.inject(quantised, target_modules=[], trainable_token_indices={"lm_head": [1]})


def test_rows_train_beside_lora_on_a_quantised_base():
    """QLoRA: the linear layers are in codes, the embedding is as it was."""
    model = with_rows(lora_lab.quantize(toy(tied=True, dtype=torch.float32), "nf4"))
    model(IDS).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert hasattr(model.proj, "quantization") and model.lm_head.weight is model.embed.weight


def test_summary_counts_rows_and_spectra_have_nothing_to_say_of_them():
    model = with_rows(toy(tied=True), target_modules=[])
    assert re.search(r"embed +default +rows \[3, 8\] +1 +active, trains +1 +24\n", lora_lab.summary(model))
    with pytest.raises(LoraLabError, match="no layer with an A and a B"):
        lora_lab.spectra.spectra(model)


def test_a_tied_model_of_transformers_is_what_it_would_be_with_the_rows_in_its_weight():
    base = build("gpt2")
    model = trained(lora_lab.inject(copy.deepcopy(base), target_modules=[], trainable_token_indices=[5, 3, 40]))
    rows = model.transformer.wte.lora_tokens["default"]
    with torch.no_grad():
        base.transformer.wte.weight[[5, 3, 40]] = rows
    assert_close(logits(model, "gpt2"), logits(base, "gpt2"), rtol=0, atol=1e-12)
