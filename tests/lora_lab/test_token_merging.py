"""Token rows in and out of the weights, and wherever else a model goes: copies, files of its state, compilers, 16 bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from token_tools import IDS, KINDS, WORDS, H, Toy, V, several, toy, with_rows
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab import LoraLabError

# In and out of the weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_merge_writes_the_rows_and_unmerge_restores_the_bits(kind, dtype):
    """A tied weight stays tied: embedding and head are both to have the rows, so that there is nothing to refuse."""
    model = with_rows(toy(dtype=dtype, **kind), target_modules=[] if dtype == torch.bfloat16 else ["proj"])
    before, expected = copy.deepcopy(model.state_dict()), model(IDS)
    rows = model.embed.lora_tokens["default"].detach()
    lora_lab.merge(model)
    assert torch.equal(model.embed.weight[list(WORDS)], rows.to(dtype))
    assert (model.lm_head.weight is model.embed.weight) == kind.get("tied", False)
    assert not any("lora_" in name for name in model.state_dict()) and type(model.lm_head) is nn.Linear
    assert_close(model(IDS), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.05)
    lora_lab.unmerge(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(IDS), expected)


def test_rows_of_several_adapters_and_lora_on_the_embedding_merge_together():
    model = lora_lab.use(several(), ["rows", "pair", "more"])
    expected = model(IDS)
    assert_close(lora_lab.merge(model)(IDS), expected, rtol=0, atol=1e-12)


def test_with_lora_on_a_tied_head_a_merge_has_to_untie():
    model = with_rows(toy(tied=True), target_modules=["lm_head", "proj"])
    expected = model(IDS)
    with pytest.raises(LoraLabError, match="untie=True"):
        lora_lab.merge(model)
    assert torch.equal(model(IDS), expected)
    lora_lab.merge(model, untie=True)
    assert_close(model(IDS), expected, rtol=0, atol=1e-12)
    assert model.lm_head.weight is not model.embed.weight
    lora_lab.unmerge(model)
    assert model.lm_head.weight is model.embed.weight and torch.equal(model(IDS), expected)


@pytest.mark.parametrize("head", [[], ["lm_head"]], ids=["rows", "rows and LoRA on the head"])
def test_the_delta_is_the_change_of_the_weight(head):
    model = with_rows(toy(tied=True), target_modules=["proj", *head])
    deltas = {name: model.get_submodule(name).lora_delta("default").detach() for name in ("embed", "lm_head")}
    before = model.embed.weight.detach().clone()
    lora_lab.merge(model, untie=True)
    assert_close(model.embed.weight - before, deltas["embed"].T, rtol=0, atol=1e-14)
    assert_close(model.lm_head.weight - before, deltas["lm_head"], rtol=0, atol=1e-14)


def test_only_what_is_merged_counts_for_a_tie():
    """LoRA of another adapter on embedding and head does not hinder rows from going into the weight of both."""
    model = lora_lab.use(several(tied=True), "rows")
    expected = model(IDS)
    lora_lab.merge(model)
    assert model.lm_head.weight is model.embed.weight
    assert_close(model(IDS), expected, rtol=0, atol=1e-12)


def test_merging_an_adapter_without_rows_leaves_those_of_another_in_place():
    model = several(tied=True)
    lora_lab.use(model, "pair")
    expected = model(IDS)
    assert_close(lora_lab.merge(model, untie=True)(IDS), expected, rtol=0, atol=1e-12)
    lora_lab.use(lora_lab.unmerge(model), "rows")
    assert (model(IDS) - expected).abs().max() > 0.1


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_eject_leaves_no_trace(tied, merged):
    base = toy(tied)
    base.proj.weight.requires_grad_(False)
    model = with_rows(copy.deepcopy(base))
    if merged:
        lora_lab.merge(model)
    lora_lab.eject(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: p.requires_grad for n, p in base.named_parameters()}
    assert torch.equal(model(IDS), base(IDS)) and model.state_dict().keys() == base.state_dict().keys()


# Travelling -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_is_tied_to_its_own_rows(travel):
    model = with_rows(toy(tied=True))
    other = travel(model)
    assert torch.equal(other(IDS), model(IDS))
    before = other(IDS)
    with torch.no_grad():
        model.embed.lora_tokens["default"].zero_()
    assert torch.equal(other(IDS), before) and not torch.equal(model(IDS), before)
    with torch.no_grad():
        other.embed.lora_tokens["default"].zero_()
    assert torch.equal(other(IDS), model(IDS))


def test_a_state_dict_holds_rows_and_words_once():
    model, other = with_rows(toy(tied=True)), with_rows(toy(tied=True), (1, 2, 3))
    state = model.state_dict()
    assert {name for name in state if "tokens" in name} == {"embed.lora_tokens.default", "embed.lora_tokens.indices.default"}
    other.load_state_dict(state)
    assert torch.equal(other(IDS), model(IDS))  # the words came along


def test_rows_move_with_their_model():
    model = with_rows(toy(tied=True)).to(torch.float32)
    assert model.embed.lora_tokens["default"].dtype == torch.float32 and model.embed.lora_tokens.ids("default").dtype == torch.int64
    assert model(IDS).dtype == torch.float32
    meta = lora_lab.inject(Toy().to("meta"), target_modules=[], trainable_token_indices=list(WORDS))
    assert lora_lab.count_parameters(meta).trainable == len(WORDS) * H and meta(IDS.to("meta")).shape == (3, 5, V)


@pytest.mark.parametrize("tied", [False, True])
def test_compiled_without_a_graph_break(tied):
    model = with_rows(toy(tied))
    eager = model(IDS)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(IDS), eager, rtol=0, atol=1e-13)
    compiled(IDS).square().sum().backward()
    own = model.embed.lora_tokens["default"].grad.clone()
    model.embed.lora_tokens["default"].grad = None
    model(IDS).square().sum().backward()
    assert_close(own, model.embed.lora_tokens["default"].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_autocast_computes_the_head_in_16_bit_and_the_rows_get_float32_gradients(tied):
    model = with_rows(toy(tied, torch.float32))
    exact = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(IDS)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and model.embed.lora_tokens["default"].grad.dtype == torch.float32
    assert_close(y.float(), exact, rtol=0.05, atol=0.2)


def test_checkpointing_gives_the_same_gradients_and_remembers_the_selection():
    model = with_rows(toy(tied=True))

    def gradient(run):
        rows = model.embed.lora_tokens["default"]
        return torch.autograd.grad(run(IDS).square().sum(), rows)[0]

    assert_close(gradient(lambda ids: checkpoint(model, ids, use_reentrant=False)), gradient(model), rtol=0, atol=0)
    y = checkpoint(model, IDS, use_reentrant=False)
    with lora_lab.disabled(model), pytest.raises((LoraLabError, RuntimeError)):
        y.sum().backward()
