"""Four and eight bit weights: the paper's bits, and what a QLoRA step holds."""

from __future__ import annotations

import pytest

from memory_math import MemoryMathError, count_parameters, predict
from memory_math.quantization import dequantized_bytes, quantized_bytes

LINEAR = 6_476_005_376  # Llama-2-7B without embedding, head and norms


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4.5), ("nf4-dq", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + 32 / 4096)])
def test_bits_per_weight_are_the_papers(quantization: str, bits: float) -> None:
    """QLoRA (arXiv:2305.14314), section 3: 0.5 bits of constants become 0.127, which saves 0.373; the codebooks are the rest."""
    rows = columns = 4096
    codebooks = {"nf4": 64, "nf4-dq": 64 + 1024 + 4, "int8": 0}[quantization]
    assert quantized_bytes(quantization, rows, columns) == rows * columns * bits / 8 + codebooks


def test_double_quantization_saves_373_thousandths_of_a_bit() -> None:
    saved = (quantized_bytes("nf4", 4096, 4096) - quantized_bytes("nf4-dq", 4096, 4096)) * 8 / 4096**2
    assert saved == pytest.approx(0.373, abs=0.001)


def test_sizes_that_fill_no_block_are_rounded_up() -> None:
    assert quantized_bytes("nf4", 1, 3) == 2 + 4 + 64
    assert quantized_bytes("nf4-dq", 1, 65) == 33 + 2 + 4 + 4 + 64 + 1024
    assert dequantized_bytes("nf4-dq", 65, 2) == 130 + 8
    with pytest.raises(MemoryMathError, match="quantization='nf3'"):
        quantized_bytes("nf3", 4, 4)


def test_embedding_head_and_norms_stay_as_they_are() -> None:
    """Llama-2-7B in nf4-dq: 3.34 GB of codes and 0.525 GB in bf16."""
    footprint = predict("llama-2-7b", method="inference", quantization="nf4-dq", precision="bf16", sequence_length=1)
    kept = count_parameters("llama-2-7b").total - LINEAR
    assert kept * 2 / 1e9 == pytest.approx(0.525, abs=0.001)
    assert (footprint.weights - 2 * kept) / 1e9 == pytest.approx(3.34, abs=0.005)


def test_a_quantized_product_keeps_no_input_since_bitsandbytes_0_43_2() -> None:
    """Commit 9e753741: before it, each 4-bit product kept its input; per block and token 2 (h + q + h + f) bytes, where inputs are shared."""
    request = {"method": "qlora", "precision": "bf16", "sequence_length": 256, "target_modules": ["q_proj"]}
    new, old = (predict("llama-2-7b", versions=versions, **request).saved_bytes for versions in (None, {"bitsandbytes": "0.43.1"}))
    h, f, blocks, tokens = 4096, 11008, 32, 256
    attention_output = 2 * h  # the fused attention keeps it anyway
    x_of_q = 4 * h  # the adapter's float32 copy of its input is one more tensor in both
    assert x_of_q and old - new == pytest.approx(blocks * tokens * (2 * (h + h + h + f) - attention_output), rel=0.04)


def test_qlora_is_lora_over_nf4_and_one_matrix_at_a_time_is_unpacked() -> None:
    request = {"precision": "bf16", "sequence_length": 32, "gradient_checkpointing": True}
    assert predict("llama-2-7b", method="qlora", **request) .weights == predict("llama-2-7b", method="lora", quantization="nf4", **request).weights
    lora, qlora = (predict("llama-2-7b", method=method, **request) for method in ("lora", "qlora"))
    assert lora.weights - qlora.weights == pytest.approx(LINEAR * (2 - 4.5 / 8), rel=0.001)
    assert qlora.total - qlora.phases["load"] < 4 * 2 * 4096 * 11008
    assert predict("llama-2-7b", method="qlora", quantization="int8", **request).weights > qlora.weights


def test_weights_that_are_codes_do_not_train() -> None:
    with pytest.raises(MemoryMathError, match="integer codes have no gradient"):
        predict("llama-2-7b", quantization="int8")


@pytest.mark.parametrize(("quantization", "gigabytes"), [("nf4", 9.54), ("int8", 13.4)])
def test_t5s_wo_is_never_quantised(quantization: str, gigabytes: float) -> None:
    """Its _keep_in_fp32_modules are modules_to_not_convert of bitsandbytes, whatever the dtype; 2.0 of flan-t5-xxl's 11.1 billion weights."""
    shape = {"precision": "bf16", "sequence_length": 16, "method": "inference"}
    assert predict("flan-t5-xxl", quantization=quantization, **shape).weights / 1e9 == pytest.approx(gigabytes, rel=0.01)
