"""Inputs and layers off the beaten track: one dimension, the meta device, sparse and lazy layers, words where lists are expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small_models import randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError


def adapted(layer: nn.Module, **request: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = lora_lab.inject(nn.Sequential(layer), rank=2, **{"target_modules": ["0"], **request})
    randomise(model)
    return model


def test_dropout_of_a_single_vector_has_gradients() -> None:
    model = adapted(nn.Linear(6, 4).double(), dropout=0.5)
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    alone = model(x)
    torch.manual_seed(0)
    in_a_batch = model(x[None])
    assert torch.equal(alone, in_a_batch[0])
    for a, b in zip(*(torch.autograd.grad(y.sum(), [x, *model[0].lora_A.parameters()]) for y in (alone, in_a_batch[0])), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 4), lambda: nn.Embedding(6, 4), lambda: nn.Conv1d(6, 4, 1)])
def test_dropout_and_embeddings_run_on_the_meta_device(layer: Any) -> None:
    """Shapes of a 70B model are tried out there; autocast does not know the device, and need not."""
    with torch.device("meta"):
        model = lora_lab.inject(nn.Sequential(layer()), rank=2, target_modules=["0"], dropout=0.1)
        x = torch.zeros(3, dtype=torch.long) if isinstance(model[0], nn.Embedding) else torch.zeros(3, 6, 6)
        y = model(x)
    y.sum().backward()
    assert y.is_meta and model[0].lora_B["default"].grad is not None


def test_an_embedding_with_sparse_gradients_trains_its_adapter() -> None:
    model, words = adapted(nn.Embedding(20, 4, sparse=True)), torch.tensor([1, 5, 5])
    model(words).pow(2).sum().backward()
    dense = adapted(nn.Embedding(20, 4))
    dense.load_state_dict(model.state_dict())
    dense(words).pow(2).sum().backward()
    for name in ("lora_A", "lora_B"):
        assert_close(getattr(model[0], name)["default"].grad, getattr(dense[0], name)["default"].grad)


def test_a_lazy_layer_is_adapted_once_it_knows_its_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(LoraLabError, match=r"'0' is a LazyLinear that does not know its shape yet: run the model once"):
        lora_lab.inject(model, rank=2)
    model(torch.zeros(1, 6))
    assert lora_lab.inject(model, rank=2)[0].lora_A["default"].shape == (2, 6)


def test_an_attention_alone_is_adapted_with_its_output_projection() -> None:
    model = lora_lab.inject(nn.MultiheadAttention(8, 2), rank=2, target_modules="attention")
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == [
        "lora_A.default", "lora_B.default", "out_proj.lora_A.default", "out_proj.lora_B.default",
    ]  # fmt: skip


def test_codes_that_two_layers_share_are_counted_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    assert lora_lab.count_parameters(model).base == lora_lab.count_parameters(lora_lab.quantize(model, "nf4")).base == 64 * 64


@pytest.mark.parametrize("call", [
    lambda model: lora_lab.use(model, 5),
    lambda model: lora_lab.per_sample(model, 5).__enter__(),
    lambda model: lora_lab.plan(model, adapter="b", exclude_modules=[5]),
    lambda model: lora_lab.plan(model, adapter="b", exclude_modules=5),
    lambda model: lora_lab.plan(model, adapter="b", target_modules=5),
    lambda model: lora_lab.plan(model, adapter="b", layers=5),
    lambda model: lora_lab.plan(model, adapter="b", layers=["0"]),
    lambda model: lora_lab.plan(model, adapter="b", rank_pattern=[4]),
    lambda model: lora_lab.plan(model, adapter="b", rank_pattern={5: 4}),
    lambda model: lora_lab.plan(model, adapter="b", bias=5),
    lambda model: lora_lab.plan(model, adapter="b", init=5),
    lambda model: lora_lab.plan(model, adapter="b", variant=[]),
    lambda model: lora_lab.plan(model, adapter=5),
    lambda model: lora_lab.combine(model, 5, into="c"),
    lambda model: lora_lab.combine(model, {"default": "1"}, into="c"),
    lambda model: lora_lab.merge(model, 5),
    lambda model: lora_lab.save(model, "folder", adapter=5),
])  # fmt: skip
def test_a_wrong_type_gets_an_error_that_names_it(call: Any) -> None:
    with pytest.raises(LoraLabError, match=r"5|\[\]|\[4\]|'1'|'0'"):
        call(adapted(nn.Linear(6, 4)))


# Resized after inject -----------------------------------------------------------------------------------------------------------


def resizable() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_head_that_was_resized_keeps_the_bases_values_and_says_what_to_do() -> None:
    model = lora_lab.inject(resizable(), rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.resize_token_embeddings(80)
    for verb in (lambda: lora_lab.use(model, None), lambda: lora_lab.eject(model)):
        with pytest.raises(LoraLabError, match=r"'lm_head.weight' is \[80, 16\] now, its values kept for the base are \[67, 16\]: it was resized"):
            verb()
    model.resize_token_embeddings(67)
    assert not any("lora" in name for name in lora_lab.eject(model).state_dict())


@pytest.mark.parametrize("verb", [lora_lab.merge, lambda model: lora_lab.save(model, "nowhere")])
def test_an_adapter_that_was_replaced_with_its_layer_is_not_lost_without_a_word(verb: Any) -> None:
    model = lora_lab.inject(resizable(), rank=2, target_modules=["q_proj", "lm_head"])
    model.resize_token_embeddings(80)
    with pytest.raises(LoraLabError, match=r"'lm_head' carried the adapter 'default' and was replaced since \(by resize_token_embeddings\?\)"):
        verb(model)
    assert not any("lora" in name for name in lora_lab.eject(model).state_dict())


def test_an_embedding_that_grew_says_so_instead_of_indexing_beyond_its_adapter() -> None:
    model = lora_lab.inject(resizable(), rank=2, target_modules=["embed_tokens"])
    model.resize_token_embeddings(80)
    with pytest.raises(LoraLabError, match="has 80 words, the adapter 67: it was resized after inject"):
        model(input_ids=torch.tensor([[75, 3]]))


@pytest.mark.parametrize("request_, message", [
    ({"dtype": "float32"}, "dtype='float32': expected None, torch.float32"), ({"dtype": torch.int8}, "dtype=torch.int8"),
    ({"target_modules": lambda module: True}, "expected a function of path and module"),
    ({"rank_pattern": {"0": 0}}, r"rank_pattern\['0'\]=0"), ({"alpha_pattern": {"nope": 3}}, "alpha_pattern: pattern 'nope' matches none"),
    ({"layers": [True]}, r"layers=\[True\]: expected a list of layer numbers"),
])  # fmt: skip
def test_errors_name_the_argument(request_: dict[str, Any], message: str) -> None:
    for verb in (lora_lab.plan, lora_lab.inject):
        with pytest.raises(LoraLabError, match=message):
            verb(nn.Sequential(nn.Linear(4, 4)), 2, **request_)


def test_a_plan_says_that_A_stays_frozen() -> None:
    assert str(lora_lab.plan(nn.Sequential(nn.Linear(4, 4)), 2, freeze_A=True)).endswith("16 parameters, of which A stays frozen")
