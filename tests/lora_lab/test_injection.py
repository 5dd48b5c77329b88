"""inject, plan, eject, use, disabled: which layers, what is frozen, and nothing changed where something is refused."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        for proj in self.attn.values():
            x = x + proj(x)
        return x + self.down_proj(self.up_proj(self.norm(x)).relu())


class Toy(nn.Module):
    """Two blocks and a head, as a language model has them."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, 16, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def model():
    return Toy().double()


IDS = torch.arange(12).reshape(2, 6)


def adapted(model):
    return sorted(name.removesuffix(".lora_A.default") for name in model.state_dict() if name.endswith(".lora_A.default"))


def snapshot(model):
    """Everything about a model that a refused call must leave alone."""
    return ({name: tensor.clone() for name, tensor in model.state_dict().items()}, {name: p.requires_grad for name, p in model.named_parameters()},
            [type(module) for module in model.modules()], sorted(vars(model)))  # fmt: skip


def assert_untouched(model, before):
    after = snapshot(model)
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


# What is adapted and what is frozen -------------------------------------------------------------------------------------------


def test_inject_returns_the_same_object_and_all_linear_leaves_the_head_alone(model):
    assert lora_lab.inject(model, rank=2) is model
    assert adapted(model) == sorted(f"layers.{i}.{name}" for i in range(2) for name in
                                    ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "up_proj", "down_proj"))  # fmt: skip
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {name for name in dict(model.named_parameters()) if "lora_" in name}


def test_all_linear_without_get_output_embeddings_leaves_out_top_level_classifiers_only():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2), "out": nn.Linear(4, 2)})
    model["body"].score = nn.Linear(4, 4)
    lora_lab.inject(model, rank=1)
    assert adapted(model) == ["body", "body.score", "out"]


@pytest.mark.parametrize(
    ("request_", "count"),
    [("attention", 8), (["q_proj", "v_proj"], 4), (["attn.q_proj"], 2), (["layers.1.up_proj"], 1), (r".*\.(q|k)_proj", 4), (["lm_head"], 1)],
)
def test_targets_by_keyword_name_path_and_regular_expression(model, request_, count):
    lora_lab.inject(model, rank=2, target_modules=request_)
    assert len(adapted(model)) == count


def test_a_name_matches_at_dots_only():
    """PEFT matches modules_to_save=["head"] against lm_head; a name here is a whole name."""
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "seq_proj": nn.Linear(2, 2)})
    assert adapted(lora_lab.inject(model, rank=1, target_modules=["q_proj"])) == ["q_proj"]


def test_exclude_layers_and_patterns_narrow_and_vary_the_request(model):
    lora_lab.inject(model, rank=4, alpha=4, exclude_modules=["o_proj"], layers=[1], rank_pattern={"q_proj": 2}, alpha_pattern={r"attn\..*": 8})
    assert adapted(model) == sorted(f"layers.1.{n}" for n in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "up_proj", "down_proj"))
    attn = model.layers[1].attn
    assert attn["q_proj"].lora_A["default"].shape == (2, 8) and attn["q_proj"].lora_scaling["default"] == 8 / 2
    assert attn["k_proj"].lora_scaling["default"] == 8 / 4 and model.layers[1].up_proj.lora_scaling["default"] == 1.0


def test_excluding_a_container_leaves_out_everything_in_it(model):
    lora_lab.inject(model, rank=2, exclude_modules=["attn"])
    assert adapted(model) == sorted(f"layers.{i}.{name}" for i in range(2) for name in ("up_proj", "down_proj"))


@pytest.mark.parametrize(("keywords", "scaling"), [({}, 1.0), ({"alpha": 16}, 4.0), ({"alpha": 16, "rslora": True}, 8.0), ({"rslora": True}, 2.0)])
def test_scaling_is_alpha_over_rank_or_over_its_root_with_rslora(model, keywords, scaling):
    """Hu et al. 2021, section 4.1; Kalajdzievski 2023 (arXiv:2312.03732). alpha=None means alpha = rank."""
    lora_lab.inject(model, rank=4, **keywords)
    assert model.layers[0].up_proj.lora_scaling["default"] == scaling


def test_alpha_none_means_scaling_one_for_every_rank_of_a_pattern(model):
    lora_lab.inject(model, rank=4, rank_pattern={"q_proj": 2})
    assert model.layers[0].attn["q_proj"].lora_scaling["default"] == 1.0


def test_a_module_reachable_by_two_paths_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = lora_lab.inject(nn.Sequential(shared, nn.ReLU(), shared), rank=2, init="random")
    assert lora_lab.count_parameters(model).trainable == 2 * (4 + 4)
    assert lora_lab.plan(nn.Sequential(nn.Linear(4, 4)), rank=9).parameters == 72  # a rank above min(in, out) is legal


def test_initialisations_that_promise_a_zero_update_keep_it(model):
    base = model(IDS)
    for init in ("kaiming", "gaussian"):
        assert torch.equal(lora_lab.inject(model, rank=3, init=init)(IDS), base)
        assert float(model.layers[0].up_proj.lora_A["default"].detach().std()) > 0
        lora_lab.eject(model)
    assert not torch.equal(lora_lab.inject(model, rank=3, init="random")(IDS), base)


# plan, eject -------------------------------------------------------------------------------------------------------------------


def test_plan_changes_nothing_and_counts_what_inject_makes(model):
    before = snapshot(model)
    plan = lora_lab.plan(model, rank=4, target_modules="attention")
    assert_untouched(model, before)
    assert plan.parameters == 8 * 4 * (8 + 8) and "8 x rank 4 * (8 in + 8 out)" not in str(plan) and "2 x rank 4 * (8 in + 8 out)" in str(plan)
    assert lora_lab.count_parameters(lora_lab.inject(model, rank=4, target_modules="attention")).trainable == plan.parameters


@pytest.mark.parametrize("request_", [{"ensure_weight_tying": True}, {"ranks": 4}])
def test_plan_takes_what_inject_takes_and_nothing_else(model, request_):
    """ensure_weight_tying belongs to a file: tied modules are trained as one in any case."""
    for verb in (lora_lab.plan, lora_lab.inject):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(request_))}'"):
            verb(model, 4, **request_)
    everything = {name: value.default for name, value in inspect.signature(lora_lab.inject).parameters.items() if name != "model"}
    assert len(lora_lab.plan(model, **everything).layers) == len(lora_lab.plan(model).layers)


def test_eject_leaves_no_trace(model):
    model.embed.weight.requires_grad_(False)
    before, y = snapshot(model), model(IDS)
    lora_lab.inject(model, rank=2, init="random")
    lora_lab.inject(model, rank=3, init="random", adapter="second", target_modules=["q_proj"])
    assert not torch.equal(model(IDS), y)
    assert lora_lab.eject(model) is model
    assert_untouched(model, before)
    assert torch.equal(model(IDS), y)
    with pytest.raises(LoraLabError, match="no LoRA layers"):
        lora_lab.eject(model)


def test_eject_of_the_whole_undoes_an_inject_into_a_part(model):
    before = snapshot(model)
    lora_lab.inject(model.layers[0], rank=2)
    assert model.embed.weight.requires_grad
    lora_lab.eject(model)
    assert_untouched(model, before)


def test_tied_weights_stay_tied(model):
    model.lm_head.weight = model.embed.weight
    lora_lab.inject(model, rank=2, target_modules=["lm_head", "q_proj"], init="random")
    assert model.lm_head.weight is model.embed.weight
    assert lora_lab.eject(model).lm_head.weight is model.embed.weight


def test_summary_and_counts_tell_base_adapter_and_trainable_apart(model):
    base = sum(p.numel() for p in model.parameters())
    lora_lab.inject(model, rank=2, target_modules=["q_proj"])
    lora_lab.inject(model, rank=4, target_modules=["q_proj"], adapter="b")
    count = lora_lab.count_parameters(model)
    assert (count.base, count.adapter, count.trainable) == (base, 2 * (2 + 4) * 16, 2 * 4 * 16)
    assert count.total == base + count.adapter
    assert re.search(r"q_proj\s+b\s+A \[4, 8\]\s+B \[8, 4\]\s+1\s+active, trains\s+2\s+128", lora_lab.summary(model))
    assert "no LoRA layers" in lora_lab.summary(nn.Linear(2, 2))


# Several adapters ----------------------------------------------------------------------------------------------------------------


def test_a_second_inject_is_the_only_active_and_trainable_one_and_the_first_keeps_its_values(model):
    lora_lab.inject(model, rank=2, init="random", adapter="a")
    y_a, a = model(IDS), model.layers[0].up_proj.lora_A["a"]
    values = a.clone()
    lora_lab.inject(model, rank=3, init="random", adapter="b")
    assert torch.equal(a, values) and not a.requires_grad and model.layers[0].up_proj.lora_A["b"].requires_grad
    assert model.layers[0].up_proj.lora_active == ("b",)
    assert_close(lora_lab.use(model, "a")(IDS), y_a, rtol=0, atol=1e-13 * float(y_a.abs().max()))  # not every processor gives the same last bit


def test_active_adapters_are_summed_and_none_switches_all_off():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    base = model(x)
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, init="random", adapter=name)
    deltas = {name: lora_lab.use(model, name)(x) - base for name in ("a", "b")}
    assert_close(lora_lab.use(model, ["a", "b"])(x), base + deltas["a"] + deltas["b"])
    assert torch.equal(lora_lab.use(model, None)(x), base)
    with pytest.raises(LoraLabError, match="'c'.*adapters"):
        lora_lab.use(model, "c")
    with pytest.raises(LoraLabError, match="'a' is named twice"):
        lora_lab.use(model, ["a", "a"])


def test_disabled_is_the_base_and_comes_back_even_after_an_error(model):
    base = model(IDS)
    tuned = lora_lab.inject(model, rank=2, init="random")(IDS)
    with pytest.raises(ZeroDivisionError), lora_lab.disabled(model):
        assert torch.equal(model(IDS), base)
        _ = 1 / 0
    assert torch.equal(model(IDS), tuned)


def test_an_adapter_name_is_one_to_64_letters_digits_dashes_underscores(model):
    for name in ("", "a.b", "a/b", "../x", "x" * 65, "é"):
        with pytest.raises(LoraLabError, match="letters, digits"):
            lora_lab.inject(model, adapter=name)
    with pytest.raises(LoraLabError, match="already in this model"):
        lora_lab.inject(lora_lab.inject(model, rank=2))


# Refused, and untouched ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"target_modules": ["q_proj", "gate_porj", "up_porj"]}, "'gate_porj' matches nothing"),
        ({"target_modules": ["q_proj", "up_porj"]}, r"did you mean 'up_proj'\?"),
        ({"target_modules": "q_proj"}, "matches no layer.*\n.*did you mean 'q_proj'"),
        ({"target_modules": []}, "names no layer"),
        ({"target_modules": ["norm"]}, "is a LayerNorm, which LoRA does not adapt"),
        ({"target_modules": 3}, "expected 'all-linear'"),
        ({"target_modules": "(q"}, "not a regular expression"),
        ({"target_modules": "q_proj"}, r"for a name write \['q_proj'\]"),
        ({"exclude_modules": ["o_prj"]}, "'o_prj' matches none of the targets.*\n.*did you mean 'o_proj'"),
        ({"exclude_modules": "q_proj"}, r"matches none of the targets .*write \['q_proj'\]"),
        ({"exclude_modules": ["lm_head"]}, "'lm_head' matches none of the targets"),
        ({"exclude_modules": ["layers"]}, "leave no layer to adapt"),
        ({"layers": [0, 7]}, r"layers=\[0, 7\]: there is no layer 7 .*they are in \[0, 1\]"),
        ({"layers": 0}, "layers=0: expected a list"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=.*expected a dict"),
        ({"alpha_pattern": {"q(": 3}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\]=nan"),
        ({"alpha": True}, "alpha=True"),
        ({"dropout": "a"}, "dropout='a'"),
        ({"init": None}, "init=None"),
        ({"rslora": "yes"}, "rslora='yes'"),
        ({"rank_pattern": {"gate": 2}}, "pattern 'gate' matches none"),
        ({"alpha_pattern": {"^q_proj": 2}}, r"pattern '\^q_proj' matches none"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": "16"}, "alpha='16'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"init": "kaimng"}, "did you mean 'kaiming'"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_names_it_and_the_model_is_untouched(model, keywords, message):
    before = snapshot(model)
    for verb in (lora_lab.inject, lora_lab.plan):
        with pytest.raises(LoraLabError, match=message):
            verb(model, **keywords)
    assert_untouched(model, before)


def test_running_out_of_memory_in_the_middle_of_inject_leaves_the_model_as_it_was(model, monkeypatch):
    before, calls, real = snapshot(model), [], lora_lab.layers.new_tensors

    def fails_at_the_fifth(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(lora_lab.layers, "new_tensors", fails_at_the_fifth)
    with pytest.raises(RuntimeError, match="out of memory"):
        lora_lab.inject(model, rank=2)
    assert_untouched(model, before)


def test_an_attention_output_that_pytorch_never_calls_has_an_effect_all_the_same():
    """nn.MultiheadAttention reads out_proj.weight without calling it: PEFT accepts the target and trains nothing."""
    model, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)), torch.randn(2, 3, 8)
    before = model(x)
    lora_lab.inject(model, rank=2, target_modules=["out_proj"], init="random")
    assert not torch.allclose(model(x), before)
    strange = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4))
    with pytest.raises(LoraLabError, match="'0' is an output projection made for nn.MultiheadAttention, inside a Sequential"):
        lora_lab.inject(strange, rank=2)


def test_a_70b_shape_is_planned_and_injected_on_the_meta_device():
    """Lecture B's model: rank 8 on q and v of Llama-2-70B is 80 * 8 * ((8192 + 8192) + (8192 + 1024)) parameters."""
    with torch.device("meta"):
        layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8192, 8192, False), "v_proj": nn.Linear(8192, 1024, False)}) for _ in range(80))
    assert lora_lab.count_parameters(lora_lab.inject(layers, rank=8)).trainable == 80 * 8 * (16_384 + 9_216) == 16_384_000
