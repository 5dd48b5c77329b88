"""The measuring instrument itself, against sizes known by construction."""

from __future__ import annotations

import gc

import pytest
import torch

from memory_math import MemoryMathError, compare, measure, predict, saved_bytes

MIB = 2**20


def mebibytes(count: int):
    return torch.zeros(count * MIB // 4)


def test_peak_is_what_was_alive_at_once_not_what_was_allocated_in_all() -> None:
    gc.collect()
    with measure() as m:
        for _ in range(3):
            a = mebibytes(4)
            b = a + 1
            del a, b
    assert m.peak_bytes - m.start_bytes == 8 * MIB
    assert m.end_bytes == m.start_bytes


def test_tensors_from_before_count_at_the_start_and_their_end_is_noticed() -> None:
    before = mebibytes(16)
    with measure() as m:
        del before
        after = mebibytes(8)
    assert m.peak_bytes == m.start_bytes
    assert m.end_bytes == m.start_bytes - 8 * MIB
    del after


def test_views_and_in_place_operations_cost_nothing() -> None:
    a = mebibytes(4)
    with measure() as m:
        a.view(2, -1).t().add_(1)
        a[: MIB // 2].mul_(2)
    assert m.peak_bytes == m.start_bytes


def test_forward_backward_and_step_are_told_apart() -> None:
    layer = torch.nn.Linear(512, 512, bias=False)  # 1 MiB
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
    x = torch.randn(256, 512)  # 0.5 MiB
    with measure() as m:
        layer(x).square().mean().backward()
        optimizer.step()
    above = {phase: (nbytes - m.start_bytes) / MIB for phase, nbytes in m.by_phase.items()}
    assert list(above) == ["forward", "backward", "optimizer step"]
    assert above["forward"] == pytest.approx(1.0, abs=0.01)  # x W and its square
    assert above["backward"] >= 1.0  # the gradient, at least
    assert above["optimizer step"] == pytest.approx(1 + 2 + 2, abs=0.01)  # gradient, states, two temporaries


def test_phases_can_be_named() -> None:
    with measure() as m:
        m.phase("first")
        a = mebibytes(2)
        m.phase("second")
        b = mebibytes(1)
        m.phase(None)
    assert m.by_phase["second"] - m.by_phase["first"] == MIB
    del a, b


def test_measure_takes_a_step_and_runs_it_once() -> None:
    calls = []
    m = measure(lambda: calls.append(mebibytes(1)))
    assert len(calls) == 1 and m.peak_bytes - m.start_bytes == MIB
    assert "tensor storages" in str(m)


def test_an_error_inside_stops_the_measuring() -> None:
    with pytest.raises(ZeroDivisionError), measure():
        1 / 0  # noqa: B018
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None


def test_saved_bytes_counts_a_storage_once_and_parameters_not_at_all() -> None:
    layer = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(10, 64, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == 10 * 64 * 4  # x for the weight; the weight is there anyway
    assert saved_bytes(lambda: layer(x) + layer(x)) == 10 * 64 * 4
    assert saved_bytes(lambda: layer(x).exp()) == 10 * 64 * 4 + 10 * 32 * 4
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x)) == 0


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(MemoryMathError, match="device='tpu'"):
        measure(device="tpu")


def test_compare_puts_a_loss_that_was_not_marked_under_forward() -> None:
    footprint = predict("smollm2-135m", device="cpu", sequence_length=16)
    m = measure(lambda: mebibytes(1))
    text = compare(footprint, m)
    assert "peak" in text and "forward" in text and "loss" not in text
