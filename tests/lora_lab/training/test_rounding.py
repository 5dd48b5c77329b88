"""Stochastic rounding: right on average, one of the two neighbours always, and weights that learn in 16 bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.training.optimizers import OPTIMIZERS, make_optimizer
from lora_lab.training.rounding import RoundedStochastically, round_stochastically

DTYPES = [torch.bfloat16, torch.float16]


@given(value=st.floats(-60_000, 60_000, width=32), dtype=st.sampled_from(DTYPES))
def test_a_number_becomes_one_of_its_two_neighbours(value: float, dtype: torch.dtype) -> None:
    x = torch.full((64,), value)
    rounded = round_stochastically(x, dtype).double()
    spacing = torch.finfo(dtype).eps * max(abs(value), torch.finfo(dtype).tiny)
    assert float((rounded - value).abs().max()) < spacing and len({*rounded.tolist()}) <= 2
    if x.to(dtype)[0].double() == value:
        assert {*rounded.tolist()} == {value}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_value(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for value in (1.001, -0.37001, 3e-4, 1234.56):
        mean = round_stochastically(torch.full((200_000,), value), dtype).double().mean()
        step = torch.finfo(dtype).eps * abs(value)
        assert abs(float(mean) - value) < 5 * step / math.sqrt(200_000)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.0, -0.0])
def test_what_has_no_neighbours_stays(value: float) -> None:
    assert torch.equal(round_stochastically(torch.full((9,), value), torch.bfloat16).float(), torch.full((9,), value))
    assert round_stochastically(torch.full((9,), math.nan), torch.bfloat16).isnan().all()


def moved(optimizer: str, rate: float, dtype: torch.dtype, rounded: bool = True, steps: int = 20) -> torch.Tensor:
    """How far each of many equal weights has come under equal gradients."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(512, 1024, dtype=dtype))
    make = make_optimizer if rounded else lambda name, *rest: OPTIMIZERS[name](*rest)
    stepper = make(optimizer, [weight], rate, 0.0)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, 0.03125)
        stepper.step()
    return (weight.detach().float() - 1).mean()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_mean_update_of_16_bit_weights_is_that_of_float32(optimizer: str) -> None:
    """Within 2 %. To the nearest, nothing moves at all: 2e-5 is far below the 1/256 that a bfloat16 of 1 needs."""
    rate = {"sgd": 1e-3, "momentum": 1e-4}.get(optimizer, 2e-5)
    exact = moved(optimizer, rate, torch.float32)
    assert moved(optimizer, rate, torch.bfloat16) == pytest.approx(float(exact), rel=0.02)
    assert moved(optimizer, rate, torch.bfloat16, rounded=False) == 0


def test_states_are_16_bit_and_counters_are_not() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = make_optimizer("adamw", [weight], 1e-3, 0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.step()
    state = optimizer.state[weight]
    assert isinstance(optimizer, RoundedStochastically)
    assert {name: value.dtype for name, value in state.items()} == {"step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    assert int(state["step"]) == 2


def test_an_adapter_in_float32_beside_them_steps_as_it_would_alone() -> None:
    adapter, weight = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    alone = torch.nn.Parameter(torch.ones(3))
    mixed, plain = make_optimizer("adamw", [adapter, weight], 1e-3, 0.0), make_optimizer("adamw", [alone], 1e-3, 0.0)
    for step in range(3):
        for parameter in (adapter, weight, alone):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        mixed.step()
        plain.step()
    assert torch.equal(adapter, alone)


def test_groups_keep_their_own_rates() -> None:
    slow, fast = (torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = make_optimizer("sgd", [{"params": [slow], "lr": 1e-3}, {"params": [fast], "lr": 1e-2}], 1e-3, 0.0)
    torch.manual_seed(0)
    for _ in range(20):
        slow.grad, fast.grad = torch.ones_like(slow), torch.ones_like(fast)
        optimizer.step()
    assert float(1 - slow.float().mean()) == pytest.approx(0.02, rel=0.05) and float(1 - fast.float().mean()) == pytest.approx(0.2, rel=0.05)
