"""The questions people ask: every answer is held against predict itself."""

from __future__ import annotations

import inspect
from itertools import combinations
from typing import Any

import pytest

from memory_math import MemoryMathError, count_parameters, hardware, predict, questions
from memory_math.knobs import KNOBS, TIME, predict_defaults, turn_all
from memory_math.limits import limit_of, reserved_fits
from memory_math.presets import PRESETS
from memory_math.questions import explain_oom, largest, models_that_fit, savings
from memory_math.tape import PUBLIC_PARTS

SMALL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 688, "tie_word_embeddings": True,
}  # fmt: skip
MIB = 2**20


def small(**request: Any) -> int:
    return predict(SMALL, **request).total


@pytest.mark.parametrize(("what", "request_"), [
    ("batch_size", {"sequence_length": 256}),
    ("batch_size", {"sequence_length": 256, "method": "inference", "precision": "bf16"}),
    ("sequence_length", {"batch_size": 2, "attention": "eager"}),
    ("sequence_length", {"batch_size": 2, "method": "lora", "gradient_checkpointing": True}),
    ("rank", {"method": "lora", "sequence_length": 64}),
])  # fmt: skip
def test_the_largest_value_fits_and_the_next_does_not(what: str, request_: dict[str, Any]) -> None:
    limit = 300 * MIB
    found = largest(SMALL, limit, what, **request_)
    assert found.value > 1 and found.next_value == found.value + 1
    assert found.total_bytes == small(**request_, **{what: found.value}) <= limit
    assert found.next_bytes == small(**request_, **{what: found.next_value}) > limit
    assert f"{found.value:,} fits" in str(found)


def test_the_reserved_value_fits_with_what_torch_reserves_and_the_next_does_not() -> None:
    limit = 300 * MIB
    found = largest(SMALL, limit, sequence_length=256)
    assert 1 <= found.reserved_value <= found.value
    assert predict(SMALL, sequence_length=256, batch_size=found.reserved_value).reserved.estimate <= limit
    assert predict(SMALL, sequence_length=256, batch_size=found.reserved_value + 1).reserved.estimate > limit
    assert found.reserved_fits == reserved_fits(predict(SMALL, sequence_length=256, batch_size=found.value), limit)


def test_a_search_takes_few_predictions(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(questions, "try_predict", lambda source, request: asked.append(request) or predict(source, **request))
    found = largest(SMALL, 3000 * MIB, "sequence_length")
    assert found.value > 4000
    values = [request["sequence_length"] for request in asked]
    assert len(values) == len(set(values)) <= 36


def test_none_fits_is_0_with_the_reason() -> None:
    found = largest("llama-2-70b", "T4")
    assert found.value == 0 and found.total_bytes is None and found.next_value == 1
    assert found.next_bytes == predict("llama-2-70b").total > hardware.gpu_of("T4").usable_bytes
    assert "none fits T4" in str(found) and "batch_size=1" in found.reason


def test_a_gpu_is_its_usable_bytes() -> None:
    by_name = largest("smollm2-135m", "T4", sequence_length=512)
    by_bytes = largest("smollm2-135m", hardware.gpu_of("T4").usable_bytes, sequence_length=512)
    assert by_name.value == by_bytes.value and by_name.limit == "T4"
    assert predict("smollm2-135m", batch_size=by_name.value, sequence_length=512).fits("T4")
    assert not predict("smollm2-135m", batch_size=by_name.value + 1, sequence_length=512).fits("T4")


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(MemoryMathError, match=r"what='batchsize'.*did you mean 'batch_size'"):
        largest(SMALL, "T4", "batchsize")
    with pytest.raises(MemoryMathError, match=r"batch_size=4.*leave it out"):
        largest(SMALL, "T4", batch_size=4)
    with pytest.raises(MemoryMathError, match=r"what='rank' changes nothing"):
        largest(SMALL, "T4", "rank", sequence_length=64)
    with pytest.raises(MemoryMathError, match="did you mean 'T4'"):
        largest(SMALL, "T44")
    for nonsense in (0, -5, True, 1.5):
        with pytest.raises(MemoryMathError, match="name of a GPU"):
            largest(SMALL, nonsense)


def test_models_that_fit_are_those_that_predict_says_fit_largest_first() -> None:
    request = {"method": "inference", "precision": "bf16", "sequence_length": 128}
    found = models_that_fit("T4", **request)
    assert [fit.parameters for fit in found] == sorted((fit.parameters for fit in found), reverse=True)
    named = {name for fit in found for name in (fit.name, *fit.also)}
    assert {"llama-2-7b", "smollm2-135m"} <= named and "llama-2-13b" not in named
    for name in PRESETS:
        if name not in found.refused and count_parameters(name).total < 7.5e9:
            assert (name in named) == predict(name, **request).fits("T4"), name
    assert all(fit.total_bytes == predict(fit.name, **request).total for fit in found)
    assert "llama-2-7b" in str(found)


def test_quantised_models_are_not_left_out_by_their_16_bit_size() -> None:
    """13 billion weights are 24 GiB in 16 bit and 7 GiB in 4 bit."""
    found = models_that_fit("T4", method="inference", precision="bf16", quantization="nf4", sequence_length=16)
    assert "llama-2-13b" in {name for fit in found for name in (fit.name, *fit.also)}


def test_a_request_that_no_preset_can_have_is_an_error() -> None:
    with pytest.raises(MemoryMathError, match=r"no preset.*batch_size=0"):
        models_that_fit("T4", batch_size=0)
    for name in ("world_size", "tensor_parallel"):
        for nonsense in (0, "2"):
            with pytest.raises(MemoryMathError, match=f"{name}={nonsense!r}: expected a whole number of at least 1"):
                models_that_fit("T4", **{name: nonsense})


@pytest.mark.parametrize("request_", [
    {"precision": "fp32", "attention": "eager", "batch_size": 4, "sequence_length": 256},
    {"method": "lora", "precision": "bf16-mixed", "batch_size": 4, "sequence_length": 256, "dropout": 0.1},
    {"method": "inference", "precision": "fp32", "batch_size": 4, "sequence_length": 256},
    {"precision": "bf16-mixed", "world_size": 4, "batch_size": 2, "sequence_length": 128},
])  # fmt: skip
def test_savings_are_what_predict_says_with_the_knob(request_: dict[str, Any]) -> None:
    found = savings(SMALL, **request_)
    before = small(**request_)
    assert len(found) >= 3
    for saving in found:
        assert saving.before_bytes == before and saving.after_bytes == small(**{**request_, **saving.change}) < before
        assert saving.cost
    assert [saving.saved_bytes for saving in found] == sorted((saving.saved_bytes for saving in found), reverse=True)
    assert all(saving.knob in str(found) and saving.cost in found.markdown() for saving in found)


def test_a_frozen_base_may_be_in_codes_whatever_trains_before_it() -> None:
    for method in ("frozen", "lora", "prompt", "inference"):
        found = savings(SMALL, method=method, precision="bf16", batch_size=1, sequence_length=8)
        assert {"8-bit base", "4-bit base"} <= {saving.knob for saving in found}


def test_the_savings_that_people_ask_for_are_among_them() -> None:
    fused = {saving.knob for saving in savings(SMALL, precision="fp32", batch_size=8, sequence_length=512)}
    full = {saving.knob for saving in savings(SMALL, precision="fp32", attention="eager", batch_size=8, sequence_length=512)}
    assert "16-bit products" in fused
    assert {"gradient checkpointing", "pure 16 bit", "LoRA", "QLoRA", "fused attention", "8-bit AdamW", "chunked loss",
            "lora_lab's model code", "batch of one, accumulated", "half the sequence"} <= full  # fmt: skip
    short = {saving.knob for saving in savings(SMALL, precision="fp32", batch_size=1, sequence_length=8)}
    assert "fused optimizer" in short  # where the optimizer's step is the peak
    assert "batch of one, accumulated" not in short and "fused attention" not in short


def test_half_of_a_length_that_nobody_asked_for_is_half_of_what_there_is() -> None:
    assert {"sequence_length": 512} in [saving.change for saving in savings("gpt2")]
    assert {"sequence_length": 1024} in [saving.change for saving in savings("smollm2-135m")]


def test_a_smaller_batch_keeps_the_rows_of_a_step() -> None:
    turned = {knob.name: change for knob, change, _ in turn_all(SMALL, {"batch_size": 6, "grad_accum_steps": 2, "sequence_length": 64})}
    assert turned["half the batch, accumulated"] == {"batch_size": 3, "grad_accum_steps": 4}
    assert turned["batch of one, accumulated"] == {"batch_size": 1, "grad_accum_steps": 12}


def test_every_knob_turns_keywords_of_predict_and_applies_somewhere() -> None:
    requests = [
        {"attention": "eager", "batch_size": 8}, {"world_size": 4}, {"method": "lora", "dropout": 0.1}, {"method": "qlora"},
        {"method": "inference", "batch_size": 8},
    ]  # fmt: skip
    turned = {}
    for request in requests:
        for knob in KNOBS:
            change = knob.change({**predict_defaults(), **request})
            if change is not None:
                turned[knob.cost] = change
                assert set(change) <= set(inspect.signature(predict).parameters)
                assert any({**predict_defaults(), **request}[name] != value for name, value in change.items())
    assert len(turned) == len({knob.cost for knob in KNOBS})
    assert [knob.price for knob in KNOBS] == sorted(knob.price for knob in KNOBS)


def test_a_request_that_fits_says_so_with_the_head_room() -> None:
    found = explain_oom("smollm2-135m", "A100-80GB", sequence_length=512)
    total = predict("smollm2-135m", sequence_length=512).total
    assert found.fits and found.crossed_in is None and found.fixes == () and found.closest is None
    assert found.head_room_bytes == hardware.gpu_of("A100-80GB").usable_bytes - total > 0
    assert found.reserved_fits == "certain" and "to spare" in str(found)


def test_the_phase_is_the_first_that_crosses_the_limit() -> None:
    request = {"precision": "bf16-mixed", "batch_size": 4, "sequence_length": 256}
    phases = predict(SMALL, **request).phases
    order = list(phases)
    for limit in sorted(phases.values()):
        found = explain_oom(SMALL, limit - 1, **request)
        expected = next(name for name in order if phases[name] > limit - 1)
        assert found.crossed_in == expected and not found.fits
    assert explain_oom(SMALL, max(phases.values()), **request).fits


def test_one_knob_is_enough_where_one_is_and_it_really_fits() -> None:
    request = {"batch_size": 4, "sequence_length": 512, "attention": "eager"}
    limit = small(**request) - 1
    found = explain_oom(SMALL, limit, **request)
    assert found.fixes[0].knobs == ("fused attention",)  # costs nothing, and comes before all that costs something
    assert found.fixes[0].total_bytes == small(**{**request, **found.fixes[0].change}) <= limit


@pytest.mark.parametrize("share", [0.6, 0.4, 0.25, 0.2])
def test_a_fix_fits_and_no_fewer_knobs_would_have(share: float) -> None:
    request = {"batch_size": 4, "sequence_length": 256, "precision": "fp32"}
    limit = int(small(**request) * share)
    found = explain_oom(SMALL, limit, **request)
    turned = turn_all(SMALL, request)
    assert found.fixes
    for fix in found.fixes:
        assert fix.total_bytes == small(**{**request, **fix.change}) <= limit
    fewest = len(found.fixes[0].knobs)
    for size in range(1, fewest):
        for chosen in combinations(turned, size):
            change = {name: value for _, keywords, _ in chosen for name, value in keywords.items()}
            if len(change) < sum(len(keywords) for _, keywords, _ in chosen):
                continue
            try:
                assert small(**{**request, **change}) > limit, change
            except MemoryMathError:
                continue


def test_the_second_fix_costs_time_only() -> None:
    request = {"batch_size": 8, "sequence_length": 512, "precision": "fp32"}
    prices = {knob.name: knob.price for knob in KNOBS if knob.price <= TIME}
    seen = 0
    for percent in range(15, 60, 5):
        found = explain_oom(SMALL, small(**request) * percent // 100, **request)
        if len(found.fixes) == 2:
            seen += 1
            assert not all(name in prices for name in found.fixes[0].knobs)
            assert all(name in prices for name in found.fixes[1].knobs)
    assert seen


def test_where_nothing_helps_the_closest_is_named() -> None:
    found = explain_oom(SMALL, MIB, precision="bf16-mixed", batch_size=4)
    assert found.fixes == () and found.closest is not None and found.closest.total_bytes > MIB
    assert found.closest.total_bytes == small(**{"precision": "bf16-mixed", "batch_size": 4, **found.closest.change}) < found.footprint.total
    assert "no knobs make it fit" in str(found) and not found.fits


def test_where_three_knobs_are_not_enough_more_are_taken() -> None:
    request = {"batch_size": 16, "sequence_length": 256, "precision": "fp32"}
    least = explain_oom(SMALL, 1, **request).closest
    assert len(least.knobs) > 3 and least.total_bytes == small(**{**request, **least.change})
    found = explain_oom(SMALL, least.total_bytes, **request)
    assert found.fixes and found.closest is None and found.fixes[0].total_bytes == least.total_bytes


def test_the_explanation_names_the_parts_by_size() -> None:
    found = explain_oom(SMALL, 50 * MIB, batch_size=4, sequence_length=512)
    lines = str(found).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("part at the peak"))
    named = [line.split("  ")[0].strip().replace(" ", "_") for line in lines[start + 1 : start + 4]]
    parts = {part: getattr(found.footprint, part) for part in PUBLIC_PARTS}
    assert named == sorted(parts, key=lambda part: -parts[part])[:3]
    assert "<svg" in found._repr_html_() and "the limit" in found._repr_html_()


def test_reserved_fits_by_the_interval() -> None:
    footprint = predict("smollm2-135m", sequence_length=512, batch_size=4)
    assert footprint.reserved.estimate < footprint.reserved.high
    assert reserved_fits(footprint, footprint.reserved.high) == "certain"
    assert reserved_fits(footprint, footprint.reserved.high - 1) == "likely" == reserved_fits(footprint, footprint.reserved.estimate)
    assert reserved_fits(footprint, footprint.reserved.estimate - 1) == "no"
    on_cpu = predict(SMALL, sequence_length=256, device="cpu")
    assert reserved_fits(on_cpu, on_cpu.total) == "certain" and reserved_fits(on_cpu, on_cpu.total - 1) == "no"
    assert limit_of("t4") == ("T4", hardware.gpu_of("T4").usable_bytes)
    hopper = hardware.gpu_of("H100")
    assert limit_of(hopper) == limit_of("h100") == ("H100-80GB", hopper.usable_bytes - 2 * (32 * 2**20 - 8_519_680))
