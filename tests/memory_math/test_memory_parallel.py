"""Several devices, offloading, and steps in backward: the shares of each, and what passing weights around takes."""

from __future__ import annotations

from typing import Any

import pytest

from memory_math import Footprint, count_parameters, predict
from memory_math.optimizers import Shape, state_bytes
from memory_math.parallel import Parallel, communication_bytes

MODEL = "llama-2-7b"
N = count_parameters(MODEL).total
STEPPED = 32 * 9 + 3  # tensors of Llama-2-7B, each with Adam's step counter of 4 bytes


def zero(stage: int, devices: int, **more: Any) -> Footprint:
    request = {"precision": "bf16-mixed", "sequence_length": 128, "gradient_checkpointing": True, "optimizer_implementation": "fused"}
    return predict(MODEL, zero_stage=stage, world_size=devices, **{**request, **more})


@pytest.mark.parametrize(("stage", "weights", "gradients", "states"), [(1, 2, 2, 12 / 64), (2, 2, 2 / 64, 12 / 64), (3, 2 / 64, 2 / 64, 12 / 64)])
def test_zero_divides_what_its_paper_says(stage: int, weights: float, gradients: float, states: float) -> None:
    """Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1: 16 bytes per parameter with Adam; 4 + 12/N, 2 + 14/N, 16/N."""
    footprint = zero(stage, 64)
    assert footprint.weights == pytest.approx(weights * N, rel=1e-5)
    assert footprint.optimizer_states == pytest.approx(states * N, rel=1e-3)
    kept = zero(stage, 64, grad_accum_steps=2)
    assert max(footprint.gradients, kept.gradients) == pytest.approx(gradients * N, rel=1e-3)


def test_figure_1_of_the_zero_paper() -> None:
    """7.5 B parameters, 64 devices, K = 12: 120, 31.4, 16.6 and 1.9 GB, by the same formulas."""
    tensors = [Shape(1, 7_500_000_000, 2)]
    states = state_bytes("adamw", tensors, masters=True)
    assert states == pytest.approx(12 * 7.5e9, rel=1e-9)
    totals = [4 * 7.5e9 + states, 4 * 7.5e9 + states / 64, 2 * 7.5e9 + (2 * 7.5e9 + states) / 64, (4 * 7.5e9 + states) / 64]
    assert [round(total / 1e9, 1) for total in totals] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "momentum"])
def test_several_matrices_in_one_tensor_have_as_many_states_with_masters(name: str) -> None:
    narrow, wide = Shape(64, 128, 2, matrices=3), Shape(64, 128, 4, matrices=3)
    assert state_bytes(name, [narrow], masters=True) == state_bytes(name, [wide]) + 4 * 3 * 64 * 128


def test_without_zero_every_device_holds_everything_and_ddp_a_second_copy_of_the_gradients() -> None:
    """gradient_as_bucket_view=False is DistributedDataParallel's default."""
    alone, together = zero(0, 1), zero(0, 8)
    assert together.weights == alone.weights == 4 * N
    assert together.total - alone.total == 4 * N


@pytest.mark.parametrize(("method", "itemsize"), [("full", 4), ("lora", 4)])
def test_buckets_are_of_the_numbers_that_train_and_in_this_library_they_are_the_gradients(method: str, itemsize: int) -> None:
    """An adapter's are float32 over a 16-bit base. lora_lab's DDP has gradient_as_bucket_view=True: no copy, and none freed after the step."""
    for implementation in ("transformers", "lora_lab"):
        request = {"method": method, "implementation": implementation, "sequence_length": 64}
        alone, together = (predict("llama-2-7b", precision="bf16-mixed", world_size=devices, **request) for devices in (1, 8))
        bucket = itemsize * alone.trained
        assert together.phases["load"] - alone.phases["load"] == bucket
        if implementation == "transformers":
            assert together.total - alone.total == bucket
        else:  # in the step all gradients are there in any case, before it they are now
            assert together.phases["optimizer step"] == alone.phases["optimizer step"]
            assert together.phases["forward"] - alone.phases["forward"] == bucket


def test_stage_3_holds_two_gathered_blocks_the_rest_and_a_block_of_gradients() -> None:
    block, rest, trained = 202_383_360, 262_148_096, N
    assert 32 * block + rest == N
    assert communication_bytes(Parallel(3, 8), [block] * 32, rest, trained, 2) == 2 * (3 * block + rest)
    assert communication_bytes(Parallel(2, 8), [block] * 32, rest, trained, 2) == 2 * block
    assert communication_bytes(Parallel(0, 8), [block] * 32, rest, 1000, 4) == 4000
    assert communication_bytes(Parallel(3, 1), [block] * 32, rest, trained, 2) == 0
    alone, eight = zero(3, 1), zero(3, 8)
    assert eight.phases["load"] == pytest.approx(14 * N / 8 + 2 * (3 * block + rest), rel=0.01)
    assert alone.phases["load"] == pytest.approx(14 * N, rel=0.01)


def test_more_devices_never_need_more_memory() -> None:
    totals = [zero(3, devices).total for devices in (2, 4, 8, 16)]
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0] / 2


def test_tensor_parallelism_divides_matrices_and_repeats_norms() -> None:
    """Shoeybi et al. 2019 (arXiv:1909.08053): each device has its heads, its part of the MLP and of the vocabulary, and every norm."""
    whole, half = (predict(MODEL, precision="bf16", sequence_length=512, tensor_parallel=t) for t in (1, 2))
    norms = count_parameters(MODEL).parts["norms"]
    assert half.weights == 2 * ((N - norms) // 2 + norms)
    assert 0.5 * whole.saved_bytes < half.saved_bytes < 0.75 * whole.saved_bytes  # norms and residuals are not divided
    adapted = predict(MODEL, method="lora", precision="bf16", sequence_length=128, tensor_parallel=2)
    assert adapted.trained < predict(MODEL, method="lora", precision="bf16", sequence_length=128).trained


def test_fewer_key_value_heads_than_devices_are_held_more_than_once() -> None:
    eight, sixteen = (predict("llama-3-8b", method="inference", precision="bf16", tensor_parallel=t, sequence_length=64) for t in (8, 16))
    k = 4096 * 128 * 2 * 32
    assert eight.weights > sixteen.weights and sixteen.weights > 2 * k


def test_offloaded_states_are_in_the_hosts_memory() -> None:
    here, there = zero(2, 4), zero(2, 4, offload_optimizer=True)
    assert there.optimizer_states == 0 and here.total - there.total >= 0.9 * here.optimizer_states


def test_a_step_in_backward_leaves_one_gradient_at_a_time() -> None:
    """LOMO (Lv et al. 2023, arXiv:2306.09782), table 1: gradients fall from 12.55 GiB to 0.24 GiB, the largest tensor."""
    request = {"precision": "bf16", "sequence_length": 64, "gradient_checkpointing": True, "optimizer": "sgd"}
    plain, fused = predict(MODEL, **request), predict(MODEL, optimizer_in_backward=True, **request)
    assert plain.phases["optimizer step"] - plain.phases["load"] == pytest.approx(2 * N, rel=0.01)
    assert fused.gradients == 0
    assert fused.phases["backward"] - fused.phases["load"] < 3 * 2 * 32000 * 4096  # 0.24 GiB is 2 bytes for each weight of the embedding


def test_offloaded_activations_leave_room_for_one_block() -> None:
    request = {"precision": "bf16", "sequence_length": 2048, "gradient_checkpointing": True, "batch_size": 4, "loss": "none"}
    here, there = predict(MODEL, **request), predict(MODEL, offload_activations=True, **request)
    stream = 32 * 2 * 4096 * 4 * 2048
    assert here.phases["after forward"] - there.phases["after forward"] == pytest.approx(stream, rel=0.1)
    assert here.saved_bytes == there.saved_bytes


def test_several_devices_are_said_to_be_unchecked() -> None:
    assert "several devices" in zero(3, 8).outside and "not checked against anything: several devices" in zero(3, 8).table()
    assert predict(MODEL, precision="bf16", sequence_length=64).outside == ()
