"""Training prompts: the learning rate comes from the model's own scale, and sweeps are lora_lab's.

"Scale rule" is section 6 of the project's reference on prompt tuning: Adam moves each number by about the learning rate.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny_workshop import our_llama, their_llama, token_rows

from lora_lab import LoraLabError
from lora_lab.models import GPT2Config, GPT2LMHeadModel
from lora_lab.training import TrainConfig, fit, grid
from prompt_tuning_lab import inject, use
from prompt_tuning_lab.tuning import PREFIX_SHARE, SHARE, SHARES, gain, learning_rate, scale, sweep, training_config

METHODS = {"prompt": {}, "p-tuning": {"encoder_hidden_size": 24}, "residual": {"encoder_hidden_size": 8}, "prefix": {},
           "prefix-mlp": {"prefix_projection": True, "encoder_hidden_size": 24}}  # fmt: skip
TRAIN, VALIDATION = token_rows(8), token_rows(4, seed=1)
QUIET = {"micro_batch_size": 4, "progress": False}


def prompted(method="prompt", base=None, **more):
    return inject(our_llama() if base is None else base, 4, method=method.removesuffix("-mlp"), seed=0, **METHODS[method], **more)


def inserted(model):
    with torch.no_grad():
        return model.prompt()().clone()


# The learning rate --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [our_llama, their_llama])
def test_the_rate_of_rows_is_a_share_of_the_embeddings_rms(base):
    """Scale rule; ours and transformers' models alike."""
    model = base()
    size = float(model.get_input_embeddings().weight.detach().square().mean().sqrt())
    assert math.isclose(learning_rate(inject(model, 4, seed=0), 0.07), 0.07 * size, rel_tol=1e-5)


def test_the_rate_grows_with_the_embedding():
    """T5 is trained with 0.3 and Llama with 0.001: the embeddings' scales differ by as much."""
    small, large = our_llama(), our_llama()
    with torch.no_grad():
        large.get_input_embeddings().weight.mul_(50)
    assert math.isclose(learning_rate(inject(large, 4)), 50 * learning_rate(inject(small, 4)), rel_tol=1e-4)


def test_an_embedding_that_scales_is_measured_by_its_call():
    """T21: what the table holds is not what a word becomes."""

    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 8

    model = GPT2LMHeadModel(GPT2Config.from_dict({"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2})).eval()
    plain = learning_rate(inject(model, 4))
    model.get_input_embeddings().__class__ = Scaled
    assert math.isclose(learning_rate(inject(model, 4)), 8 * plain, rel_tol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_first_step_moves_what_is_inserted_by_about_the_share_of_its_scale(method):
    """What the rate promises, whatever stands between the parameters and the rows."""
    model = prompted(method)
    rate, size, before = learning_rate(model, 0.01), scale(model, model.prompt()), inserted(model)
    fit(model, TRAIN, {**QUIET, "max_steps": 1, "learning_rate": rate, "max_grad_norm": None})
    moved = float((inserted(model) - before).square().mean().sqrt()) / size
    assert 0.005 < moved < 0.02


def test_plain_rows_have_a_gain_of_one_and_networks_a_larger_one():
    """A network's weights are shared by all rows, so a step of each moves a row further."""
    assert math.isclose(gain(prompted().prompt()), 1.0) and math.isclose(gain(prompted("prefix").prompt()), 1.0)
    assert all(gain(prompted(method).prompt()) > 2 for method in ("p-tuning", "residual", "prefix-mlp"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inside torch.func.jvp
@pytest.mark.parametrize("method", METHODS)
def test_the_gain_is_that_of_the_jacobian(method):
    """By PyTorch's forward-mode derivative."""
    prompt = prompted(method).prompt().double()
    values = {name: parameter.detach() for name, parameter in prompt.named_parameters()}
    now, pulled = torch.func.vjp(lambda values: torch.func.functional_call(prompt, values, ()), values)
    (gradients,) = pulled(torch.randn(now.shape, generator=torch.Generator().manual_seed(0)).double())
    signs = {name: gradient.sign() for name, gradient in gradients.items()}
    _, moved = torch.func.jvp(lambda values: torch.func.functional_call(prompt, values, ()), (values,), (signs,))
    assert math.isclose(gain(prompt), float(moved.square().mean().sqrt()), rel_tol=1e-4)


def test_a_prefix_is_measured_by_its_keys_and_values():
    """The median over layers: the first layer's values may be a fiftieth of the last's."""
    model = prompted("prefix")
    states = model.prompt().weight.detach()
    sizes = sorted(float(each.square().mean().sqrt()) for layer in states for each in layer)
    assert math.isclose(scale(model, model.prompt()), sizes[1], rel_tol=1e-5)  # of four, the lower of the middle ones


def test_zeros_are_no_scale():
    """PEFT lets a prefix begin as zeros; half of one that does is left out, and all of one is told."""
    model = prompted("prefix")
    prompt, whole = model.prompt(), scale(model, model.prompt())
    prompt.initial[:, 0].zero_()
    assert 0.1 * whole < scale(model, prompt) < 10 * whole
    prompt.initial.zero_()
    with pytest.raises(LoraLabError, match="began as zeros.*give learning_rate="):
        learning_rate(model)


def test_a_prefix_has_a_smaller_share():
    """SmolLM2, 30 steps on sentiments: at 0.1 the loss first rises to 4.4, at 0.01 and 0.03 it falls to 1.01, lower than a prompt's."""
    rows, states = prompted(), prompted("prefix")
    assert learning_rate(rows) == learning_rate(rows, SHARE) and learning_rate(states) == learning_rate(states, PREFIX_SHARE)
    assert PREFIX_SHARE < SHARE


def test_the_rate_is_of_the_task_that_is_named_and_changes_nothing():
    model = prompted("residual")
    inject(model, 3, task="other", seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    assert learning_rate(model, task="default") < learning_rate(model) == learning_rate(model, task="other")
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("share", [0, -0.1, float("nan"), float("inf"), 10**400, True, "0.1"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(LoraLabError, match="share=.*expected a number above 0"):
        learning_rate(prompted(), share)


def test_without_an_active_task_there_is_no_rate():
    with pytest.raises(LoraLabError, match="no task is active"):
        learning_rate(use(prompted(), None))


# The config ---------------------------------------------------------------------------------------------------------------------


def test_the_config_warms_up_for_a_twentieth_of_the_steps_and_decays_no_weight():
    model = prompted()
    config = training_config(model, TRAIN, epochs=20, **QUIET)  # 2 batches an epoch
    assert (config.warmup_steps, config.weight_decay, config.max_grad_norm) == (2, 0.0, 1.0)
    assert config.learning_rate == learning_rate(model, SHARE)
    assert training_config(model, TRAIN, max_steps=300).warmup_steps == 15
    assert training_config(model, TRAIN, max_steps=3).warmup_steps == 1


def test_what_is_given_goes_before_what_is_derived():
    config = training_config(prompted(), TRAIN, learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    assert (config.learning_rate, config.warmup_steps, config.weight_decay) == (0.5, 0, 0.1)


def test_an_unknown_setting_is_refused():
    with pytest.raises(LoraLabError, match="did you mean 'max_steps'"):
        training_config(prompted(), TRAIN, max_step=3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_at_its_derived_rate(method):
    model = prompted(method)
    result = fit(model, TRAIN, training_config(model, TRAIN, max_steps=30, **QUIET))
    assert sum(result.losses[-4:]) < sum(result.losses[:4]) - 0.2


# Sweeps -------------------------------------------------------------------------------------------------------------------------


def make(method="prompt", tokens=4):
    return inject(our_llama(), tokens, method=method, seed=0)


def test_shares_become_the_rates_of_each_method():
    told = []
    found = sweep(make, TRAIN, VALIDATION, grid(method=["prompt", "prefix"], share=[0.01, 0.1]), {**QUIET, "max_steps": 4}, on_trial=told.append)
    for trial in found.trials:
        model = make(trial.settings["method"])
        assert trial.settings["learning_rate"] == learning_rate(model, trial.settings["share"])
    assert told == found.trials and found.best in found.trials
    assert found.table().splitlines()[0].split()[:4] == ["share", "method", "learning", "rate"]


def test_a_trial_is_what_fit_gives_at_its_config():
    found = sweep(make, TRAIN, VALIDATION, [{"share": 0.05}], {**QUIET, "max_steps": 40})
    model = make()
    config = training_config(model, TRAIN, 0.05, max_steps=40, **QUIET)
    assert config.warmup_steps == 2
    assert fit(model, TRAIN, config).losses == found.trials[0].result.losses


def test_without_candidates_the_usual_shares_are_tried():
    found = sweep(make, TRAIN, VALIDATION, config={**QUIET, "max_steps": 2})
    assert [trial.settings["share"] for trial in found.trials] == list(SHARES)


@pytest.mark.parametrize(("candidates", "config", "rates"), [
    ([{"tokens": 3}], {}, "derived"), ([{"learning_rate": 0.25}], {}, 0.25), ([{"tokens": 3}], {"learning_rate": 0.125}, 0.125),
    ([{"share": 0.1}], {"learning_rate": 0.125}, "derived"),
])  # fmt: skip
def test_a_rate_that_is_given_is_used(candidates, config, rates):
    found = sweep(make, TRAIN, VALIDATION, candidates, {**QUIET, "max_steps": 2, **config})
    result = found.trials[0].result
    expected = learning_rate(make(), SHARE) if rates == "derived" else rates
    model = make(tokens=candidates[0].get("tokens", 4))
    assert fit(model, TRAIN, TrainConfig(**QUIET, max_steps=2, learning_rate=expected, warmup_steps=1)).losses == result.losses


def test_one_frozen_base_serves_all_trials():
    """`make` may put each prompt before the same model: nothing of a trial stays in it."""
    base = our_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    shared = sweep(lambda: inject(base, 4, seed=0), TRAIN, VALIDATION, grid(share=[0.3, 0.01]), {**QUIET, "max_steps": 3})
    apart = sweep(make, TRAIN, VALIDATION, grid(share=[0.3, 0.01]), {**QUIET, "max_steps": 3})
    assert [trial.score for trial in shared.trials] == [trial.score for trial in apart.trials]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


MISTAKES = {
    "both": ([{"share": 0.1, "learning_rate": 0.1}], "share and learning_rate say the same in two ways"),
    "a share of none": ([{"share": 0.0}], "share=0.0: expected a number above 0"),
    "unknown": ([{"token": 3}], "'token' is neither an argument of make .method, tokens. nor a field of TrainConfig .did you mean 'tokens'"),
    "no list": ({"share": 0.1}, "expected a list of dicts"),
}


@pytest.mark.parametrize(("candidates", "message"), MISTAKES.values(), ids=MISTAKES)
def test_candidates_that_cannot_be_meant_are_refused(candidates, message):
    with pytest.raises(LoraLabError, match=message):
        sweep(make, TRAIN, VALIDATION, candidates, {**QUIET, "max_steps": 1})
