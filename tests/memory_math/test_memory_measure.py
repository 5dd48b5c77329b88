"""The measuring instrument itself, against sizes known by construction."""

from __future__ import annotations

import gc

import pytest
import torch

from memory_math import MemoryMathError, compare, measure, predict, saved_bytes
from memory_math.measurement import comparison, used_on_gpu

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


def test_gradients_are_no_part_of_the_next_forward_pass() -> None:
    layer = torch.nn.Linear(512, 512, bias=False)  # 1 MiB
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(1, 512)
    with measure() as m:
        layer(x).sum().backward()
        optimizer.step()
    assert m.by_phase["forward"] - m.start_bytes < 0.1 * MIB
    assert m.by_phase["optimizer step"] - m.start_bytes == pytest.approx(MIB, rel=0.01)


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


def test_a_measurement_can_say_what_autograd_kept_when_backward_began() -> None:
    layer = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(10, 64)
    with measure(saved=True) as m:
        layer(x).exp().sum().backward()  # keeps x and the exponential
        layer(x[:5]).sum().backward()
        layer(x)
    assert m.saved_bytes == 10 * 64 * 4 + 10 * 32 * 4
    assert "saved for backward" in str(m)
    assert measure(lambda: layer(x).sum().backward()).saved_bytes is None
    assert measure(lambda: layer(x), saved=True).saved_bytes is None  # no backward pass began


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(MemoryMathError, match="device='tpu'"):
        measure(device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(MemoryMathError, match="torch finds no GPU here"):
        measure(device="cuda")


def test_a_gpu_is_measured_by_its_allocator_and_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator as torch.cuda documents it, played by a stand-in: this shows what is asked when, not what a GPU answers."""
    gpu = StandIn()
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda: 9 * MIB)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    gpu.take(2 * MIB)
    with measure(device="cuda") as m:
        gpu.take(5 * MIB)
        gpu.give(4 * MIB)
        optimizer.step(lambda: gpu.take(MIB))
    assert (m.start_bytes, m.peak_bytes, m.end_bytes, m.reserved_bytes, m.used_bytes) == (2 * MIB, 7 * MIB, 4 * MIB, 8 * MIB, 9 * MIB)
    assert m.by_phase == {"forward and backward": 7 * MIB, "optimizer step": 4 * MIB}
    footprint = predict("smollm2-135m", sequence_length=16)
    rows = {name: predicted for name, predicted, _ in comparison(footprint, m)}
    assert rows["forward and backward"] == max(footprint.phases[phase] for phase in ("forward", "loss", "backward"))
    assert footprint.reserved and footprint.nvidia_smi
    assert (rows["reserved"], rows["nvidia-smi"]) == (footprint.reserved.estimate, footprint.nvidia_smi.estimate)


class StandIn:
    """torch.cuda's counters; it reserves in steps of 4 MiB."""

    def __init__(self) -> None:
        self.live = self.most = self.held = 0

    def take(self, nbytes: int) -> None:
        self.live += nbytes
        self.most = max(self.most, self.live)
        self.held = max(self.held, -(-self.live // (4 * MIB)) * 4 * MIB)

    def give(self, nbytes: int) -> None:
        self.live -= nbytes

    def synchronize(self) -> None:
        pass

    def reset_peak_memory_stats(self) -> None:
        self.most = self.live

    def memory_allocated(self) -> int:
        return self.live

    def max_memory_allocated(self) -> int:
        return self.most

    def memory_reserved(self) -> int:
        return self.held

    max_memory_reserved = memory_reserved


def test_a_driver_that_does_not_answer_is_replaced_by_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise ModuleNotFoundError("nvidia-ml-py")

    monkeypatch.setattr(torch.cuda, "device_memory_used", absent)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3, 10))
    assert used_on_gpu() == 7


def test_a_measurement_prints_itself_against_a_prediction() -> None:
    footprint = predict("smollm2-135m", device="cpu", sequence_length=16)
    layer = torch.nn.Linear(64, 32, bias=False)
    m = measure(lambda: layer(torch.ones(10_000, 64)).sum().backward(), saved=True)
    assert m.against(footprint) == compare(footprint, m)
    saved = next(line.split() for line in m.against(footprint).splitlines() if line.startswith("saved for backward"))
    assert saved[-3:-1] == ["2.44", "MiB"]  # ones [10000, 64]
    assert float(saved[-1]) == pytest.approx(footprint.saved_bytes / 2_560_000, abs=0.001)


def test_compare_puts_a_loss_that_was_not_marked_under_forward() -> None:
    footprint = predict("smollm2-135m", device="cpu", sequence_length=16)
    m = measure(lambda: mebibytes(1))
    text = compare(footprint, m)
    assert "peak" in text and "forward" in text and "loss" not in text
