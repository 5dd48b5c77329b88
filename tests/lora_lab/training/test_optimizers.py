"""Schedules by value and by property; settings that make no sense are refused before anything starts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lab import LoraLabError
from lora_lab.training import TrainConfig
from lora_lab.training.optimizers import OPTIMIZERS, SCHEDULES, learning_rate_share


def shares(steps, warmup_steps, schedule):
    return [learning_rate_share(step, steps, warmup_steps, schedule) for step in range(steps)]


def test_constant_stays_and_linear_and_cosine_decay_towards_zero():
    assert shares(4, 0, "constant") == [1, 1, 1, 1]
    assert shares(4, 0, "linear") == [1, 0.75, 0.5, 0.25]
    assert shares(4, 0, "cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_warm_up_rises_in_equal_steps_to_the_whole_rate():
    assert shares(6, 4, "constant") == [0.25, 0.5, 0.75, 1, 1, 1]
    assert shares(3, 10, "linear") == [0.1, 0.2, 0.3]  # a run shorter than its warm-up


@given(st.integers(1, 200), st.integers(0, 250), st.sampled_from([*SCHEDULES]))
def test_no_step_has_a_rate_of_zero_or_above_one(steps, warmup_steps, schedule):
    rates = shares(steps, warmup_steps, schedule)
    assert all(0 < rate <= 1 for rate in rates)
    after = rates[warmup_steps:]
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps]) and after == sorted(after, reverse=True)
    assert not after or after[0] == 1


FIRST_STEP = {  # of weights 2 and -4 with gradients 0.3 and -0.7, at rate 0.1 and decay 0.5
    "adamw": (2.0 * 0.95 - 0.1, -4.0 * 0.95 + 0.1),  # the first step is the rate, and the decay is decoupled
    "adam": (2.0 - 0.1, -4.0 + 0.1),  # the decay is part of the gradient, whose sign the first step is
    "sgd": (2.0 - 0.1 * (0.3 + 1.0), -4.0 - 0.1 * (-0.7 - 2.0)),
    "momentum": (2.0 - 0.1 * (0.3 + 1.0), -4.0 - 0.1 * (-0.7 - 2.0)),
    "lion": (2.0 * 0.95 - 0.1, -4.0 * 0.95 + 0.1),
}


def stepped(name, gradients, dtype=torch.float64, rate=0.1, decay=0.5):
    weight = torch.nn.Parameter(torch.tensor([2.0, -4.0], dtype=dtype))
    optimizer = OPTIMIZERS[name]([weight], rate, decay)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", FIRST_STEP)
def test_optimizers_move_weights_as_their_definition_says(name):
    torch.testing.assert_close(stepped(name, [[0.3, -0.7]]), torch.tensor(FIRST_STEP[name], dtype=torch.float64), rtol=0, atol=1e-7)


def test_lion_is_algorithm_2_of_its_paper():
    """Chen et al. 2023: the update is sign(beta1 m + (1 - beta1) g), the mean is kept with beta2."""
    weight, mean = torch.tensor([2.0, -4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    gradients = [[0.3, -0.7], [-0.02, 0.9], [-0.5, 0.01]]
    for gradient in torch.tensor(gradients, dtype=torch.float64):
        weight = weight - 0.1 * ((0.9 * mean + 0.1 * gradient).sign() + 0.5 * weight)
        mean = 0.99 * mean + 0.01 * gradient
    torch.testing.assert_close(stepped("lion", gradients), weight, rtol=0, atol=1e-12)


def test_momentum_keeps_nine_tenths_of_the_last_step():
    torch.testing.assert_close(stepped("momentum", [[1.0, 0.0], [1.0, 0.0]], decay=0.0), torch.tensor([2 - 0.1 - 0.19, -4.0], dtype=torch.float64))


def test_adafactor_keeps_rows_and_columns_of_a_matrix():
    weight = torch.nn.Parameter(torch.ones(30, 20))
    optimizer = OPTIMIZERS["adafactor"]([weight], 1e-2, 0.0)
    weight.grad = torch.randn(30, 20)
    optimizer.step()
    assert sum(value.numel() for value in optimizer.state[weight].values()) == 1 + 30 + 20


# Settings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1e-3}, r"unknown training setting 'learning_rat' \(did you mean 'learning_rate'"),
        ({"optimizer": "adamww"}, r"optimizer='adamww': expected one of adamw, .* \(did you mean 'adamw'"),
        ({"schedule": "cosin"}, r"schedule='cosin': expected one of constant, linear, cosine \(did you mean 'cosine'"),
        ({"precision": "bf16mixed"}, r"precision='bf16mixed': expected one of fp32, bf16, bf16-mixed, fp16-mixed \(did you mean 'bf16-mixed'"),
        ({"precision": None}, "precision=None: expected one of"),
        ({"optimizer": ["adamw"]}, "optimizer=.*: expected one of"),
    ],
)
def test_unknown_names_are_errors_that_suggest_what_was_meant(settings, message):
    with pytest.raises(LoraLabError, match=message):
        TrainConfig.of(settings)


WHOLE = ("max_steps", "micro_batch_size", "grad_accum_steps", "save_every", "eval_every", "max_length", "warmup_steps", "seed")
BAD = {
    **{name: (-1, 2.0, "3", True, float("nan")) for name in WHOLE},
    **{name: (0, -1.0, "1e-4", float("nan"), float("inf"), True) for name in ("epochs", "learning_rate", "max_grad_norm")},
    "weight_decay": (-0.1, "0.1", float("nan"), None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_number_is_an_error_that_names_it(name, value):
    with pytest.raises(LoraLabError, match=rf"^{name}={value!r}: expected a "):
        TrainConfig(**{"output_dir": "here", name: value})


@pytest.mark.parametrize("name", ["max_steps", "micro_batch_size", "grad_accum_steps", "save_every", "eval_every", "max_length"])
def test_zero_steps_or_rows_are_refused(name):
    with pytest.raises(LoraLabError, match=f"^{name}=0: expected a whole number of at least 1"):
        TrainConfig(**{"output_dir": "here", name: 0})


@pytest.mark.parametrize("name", ["micro_batch_size", "grad_accum_steps", "warmup_steps", "epochs", "learning_rate", "seed"])
def test_none_is_no_number_where_a_number_is_needed(name):
    with pytest.raises(LoraLabError, match=f"^{name}=None"):
        TrainConfig(**{name: None})


def test_saving_needs_a_folder():
    with pytest.raises(LoraLabError, match="save_every=5 needs an output_dir"):
        TrainConfig(save_every=5)


def test_a_config_a_dict_and_nothing_are_all_taken():
    config = TrainConfig(max_steps=3)
    assert TrainConfig.of(config) is config
    assert TrainConfig.of({"max_steps": 3}) == config
    assert TrainConfig.of(None) == TrainConfig.of({}) == TrainConfig()
    assert TrainConfig(weight_decay=0, warmup_steps=0, max_grad_norm=None, seed=0, epochs=2) is not None
