"""Gradient checkpointing changes memory and time and nothing else; the recompute sees the adapters of its forward pass."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from tiny_workshop import QUIET, CutOff, our_llama, same_bits, their_gpt2, their_llama, token_rows, weights
from torch.utils.checkpoint import CheckpointError

import lora_lab
from lora_lab import LoraLabError
from lora_lab.data import collate
from lora_lab.training import TrainConfig, fit


class Calls:
    """How often a module's forward runs: twice a step where it is recomputed."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_pre_hook(self.called)

    def called(self, module, inputs):
        self.count += 1


@pytest.mark.parametrize("make", [our_llama, their_llama, their_gpt2])
def test_losses_and_weights_are_those_without_checkpointing(make):
    """Dropout included: the recompute draws the masks of its forward pass."""
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = lora_lab.inject(make(), rank=2, dropout=0.2, init="random")
        calls = Calls(next(module for name, module in model.named_modules() if name.endswith(("q_proj", "c_attn"))))
        result = fit(model, token_rows(8), {"max_steps": 3, "micro_batch_size": 4, "gradient_checkpointing": checkpointing, **QUIET})
        runs.append((result.losses, weights(model), calls.count))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-6)
    assert all(torch.allclose(p, runs[1][1][name], rtol=0, atol=1e-6) for name, p in runs[0][1].items())
    assert (runs[0][2], runs[1][2]) == (3, 6)  # it was on


@pytest.mark.parametrize("make", [our_llama, their_llama, their_gpt2])
@pytest.mark.parametrize("fails", [False, True])
def test_the_switch_and_the_hooks_are_the_callers_own_afterwards(make, fails):
    model = lora_lab.inject(make(), rank=2)
    embedding = model.get_input_embeddings()
    if fails:
        model.register_forward_pre_hook(raise_an_error)
    with pytest.raises(RuntimeError, match="on purpose") if fails else warnings.catch_warnings():
        fit(model, token_rows(2), {"max_steps": 1, "gradient_checkpointing": True, **QUIET})
    assert True not in switches(model)
    assert not embedding._forward_hooks  # transformers hangs one there that makes inference build graphs


def raise_an_error(module, inputs):
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("make", [our_llama, their_llama])
def test_checkpointing_that_was_on_stays_on(make):
    model = lora_lab.inject(make(), rank=2)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    flags = switches(model)
    for wanted in (False, True):
        fit(model, token_rows(2), {"max_steps": 1, "gradient_checkpointing": wanted, **QUIET})
        assert switches(model) == flags
    assert True in flags


def switches(model):
    return [getattr(module, name, None) for module in model.modules() for name in ("gradient_checkpointing", "recompute")]


@pytest.mark.parametrize("make", [our_llama, their_llama, their_gpt2])
def test_nothing_warns(make, no_warnings):
    fit(lora_lab.inject(make(), rank=2), token_rows(2), {"max_steps": 1, "gradient_checkpointing": True, **QUIET})


def test_a_module_without_the_switch_is_refused_and_unchanged():
    model = lora_lab.inject(CutOff(), rank=2)
    before = weights(model)
    with pytest.raises(LoraLabError, match=r"a CutOff has no gradient_checkpointing_enable\(\)"):
        fit(model, token_rows(2), {"gradient_checkpointing": True, "precision": "bf16-mixed", **QUIET})
    assert same_bits(weights(model), before)


@pytest.mark.parametrize("mode", [1.5, -1, "attn", None])
def test_a_mode_that_is_none_is_refused_where_the_config_is_made(mode):
    with pytest.raises(LoraLabError, match=f"gradient_checkpointing={mode!r}: expected True, False, a number n"):
        TrainConfig(gradient_checkpointing=mode)


def test_a_transformers_model_that_does_not_support_it_is_refused():
    model = lora_lab.inject(their_llama(), rank=2)
    model.supports_gradient_checkpointing = False
    with pytest.raises(LoraLabError, match="gradient_checkpointing=True: .*does not support"):
        fit(model, token_rows(2), {"gradient_checkpointing": True, **QUIET})


# The selection of adapters belongs to the forward pass ----------------------------------------------------------------------


def two_adapters(make):
    model = make(torch.float64)
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, init="random", adapter=name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model.train()


def gradients(model, loss):
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


BATCH = collate(token_rows(3), 0)


def test_ours_recomputes_with_the_adapters_the_forward_pass_had():
    plain = two_adapters(our_llama)
    kept, changed = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = gradients(lora_lab.use(plain, "a"), plain(**BATCH).loss)
    for model in (kept, changed):
        model.gradient_checkpointing_enable()
    loss = lora_lab.use(changed, "a")(**BATCH).loss
    lora_lab.use(changed, "b")
    found = gradients(changed, loss)
    assert found.keys() == expected.keys() and all(".a" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)
    other = gradients(lora_lab.use(kept, "b"), kept(**BATCH).loss)
    assert all(".b" in name for name in other)  # the other adapter's gradients would be others'
    assert {layer.lora_active for layer in lora_lab.targets.lora_layers(changed).values()} == {("b",)}


def test_ours_may_be_disabled_in_the_forward_pass_only():
    """The gradient of what is before the model, as in `with disabled(model): reference = model(...)`."""
    grads = []
    for checkpointing in (False, True):
        model = two_adapters(our_llama)
        if checkpointing:
            model.gradient_checkpointing_enable()
        x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with lora_lab.disabled(model):
            loss = model(inputs_embeds=x, labels=torch.arange(10).view(2, 5)).loss
        loss.backward()
        grads.append(x.grad)
        assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


OURS = (LoraLabError, "recomputed a layer with other adapters than its forward pass had")
TORCHS = (CheckpointError, "torch.utils.checkpoint: (A different number of tensors|Recomputed values)")


@pytest.mark.parametrize("make", [their_llama, their_gpt2])
@pytest.mark.parametrize(("forward", "backward", "speaks"), [
    ("a", "b", OURS), ("a", None, TORCHS), (["a", "b"], "a", TORCHS), ("a", ["a", "b"], TORCHS),
])  # fmt: skip
def test_a_foreign_model_whose_adapters_changed_before_backward_is_an_error(make, forward, backward, speaks):
    """It would recompute with other adapters: gradients of a function that was never evaluated. Where their number is another, the recompute keeps
    other tensors, which torch notices before a layer of ours is asked."""
    model = two_adapters(make)
    model.activation_checkpointing_enable()
    gradients(model, lora_lab.use(model, forward)(**BATCH).loss)  # unchanged, it works
    loss = lora_lab.use(model, forward)(**BATCH).loss
    lora_lab.use(model, backward)
    with pytest.raises(speaks[0], match=speaks[1]):
        loss.backward()


def test_falcon_trains_under_checkpointing_although_it_changes_a_layers_output_in_place():
    """transformers' Falcon: mlp_output += attention_output."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, parallel_attn=True,
                                       new_decoder_architecture=False)  # fmt: skip
    model = lora_lab.inject(transformers.FalconForCausalLM(config), rank=2, init="random")
    twin = copy.deepcopy(model)
    losses = [fit(each, token_rows(), {"max_steps": 2, "gradient_checkpointing": on, **QUIET}).losses for each, on in ((model, True), (twin, False))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
