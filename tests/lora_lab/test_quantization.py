"""Frozen bases in four and eight bits: the paper's numbers, bitsandbytes' bits, and layers that are still layers.

Where bitsandbytes is not installed its tests are skipped, and a few values taken from its version 0.50.2 stand in.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from small_models import build, logits
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab import LoraLabError
from lora_lab.codes import BLOCK, DYNAMIC, NF4, PARTS, decode, encode
from lora_lab.quantization import Quantized, dequantize, quantization_report, quantize, quantized_layers
from memory_math.quantization import CODEBOOK_BYTES, SECOND_CODEBOOK_BYTES, quantized_bytes

KINDS = ("nf4", "nf4-dq", "int8")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
kinds, dtypes = pytest.mark.parametrize("kind", KINDS), pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="session")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of these tests, is not installed").functional


def mlp(dtype=torch.float32, device=None):
    """70 numbers a row: blocks of 64 cross the rows, and the last of 24 * 70 is a short one."""
    return nn.Sequential(nn.Linear(70, 24, dtype=dtype, device=device), nn.ReLU(), nn.Linear(24, 9, dtype=dtype, device=device))


def round_trip(weight, kind):
    return decode(kind, encode(weight, kind), *weight.shape, weight.dtype)


# The codes ----------------------------------------------------------------------------------------------------------------


def test_the_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA, section 3 and appendix E: quantiles of N(0, 1), nine on one side and eight on the other, 0 among them, scaled to [-1, 1]."""
    half = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    other = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([half, torch.zeros(1), other]).sort().values
    assert_close(torch.tensor(NF4, dtype=torch.float64), levels / levels.abs().max(), rtol=0, atol=2e-7)
    assert len(NF4) == 16 and list(NF4) == sorted(NF4)


def test_the_8_bit_levels_are_256_dense_near_0_and_1_the_largest():
    """Dettmers 2015, section 3.2: a sign, an exponent of changing length, a linear fraction."""
    assert len(set(DYNAMIC)) == 256 and list(DYNAMIC) == sorted(DYNAMIC)
    assert 0.0 in DYNAMIC and max(DYNAMIC) == 1.0 and min(DYNAMIC) == pytest.approx(-0.99296875)
    assert min(level for level in DYNAMIC if level > 0) == pytest.approx(0.55e-6)


def test_a_level_times_its_scale_comes_back_exactly_in_every_place_of_a_byte():
    matrix = torch.tensor(NF4).repeat(8).view(2, 64) * torch.tensor([[3.0], [0.5]])
    codes, absmax = encode(matrix, "nf4")
    assert absmax.tolist() == [3.0, 0.5]
    assert [f"{byte:02x}" for byte in codes[:8].tolist()] == ["01", "23", "45", "67", "89", "ab", "cd", "ef"]
    assert torch.equal(decode("nf4", (codes, absmax), 2, 64, torch.float32), matrix)


@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (5, 13), (3, 64), (7, 65), (129, 1100)])
def test_every_weight_gets_the_nearest_level_of_its_block(shape):
    """The definition, in float64 and without any of the code's own steps; 129 * 1100 is more than is taken at a time."""
    weight = torch.randn(shape)
    flat, found = weight.double().view(-1), round_trip(weight, "nf4").double().view(-1)
    absmax = torch.stack([block.abs().max() for block in flat.split(BLOCK)]).repeat_interleave(BLOCK)[: flat.numel()]
    nearest = (flat[:, None] - absmax[:, None] * torch.tensor(NF4, dtype=torch.float64)).abs().min(1).values
    assert_close((flat - found).abs(), nearest, rtol=0, atol=1e-6)
    assert len(encode(weight, "nf4")[0]) == -(-weight.numel() // 2) and len(encode(weight, "nf4")[1]) == -(-weight.numel() // BLOCK)


def test_double_quantisation_codes_the_scales_less_their_mean():
    """QLoRA, section 3: c2 in 8 bits, blocks of 256, the mean subtracted first so that they are symmetric."""
    weight = torch.randn(300, 128)  # 600 blocks: two whole second blocks and a short one
    (codes, absmax), (same, scale_codes, second, mean) = encode(weight, "nf4"), encode(weight, "nf4-dq")
    assert torch.equal(codes, same) and torch.equal(mean, absmax.mean())
    blocks = [block.abs().max() for block in (absmax - mean).split(256)]
    assert second.tolist() == [block.item() for block in blocks] and scale_codes.dtype == torch.uint8
    found = torch.tensor(DYNAMIC)[scale_codes.long()] * second.repeat_interleave(256)[:600] + mean
    nearest = (((absmax - mean) / second.repeat_interleave(256)[:600])[:, None] - torch.tensor(DYNAMIC)).abs().min(1).values
    assert_close((found - absmax).abs(), nearest * second.repeat_interleave(256)[:600], rtol=0, atol=1e-6)


def test_int8_rounds_each_row_to_127ths_of_its_largest():
    """LLM.int8(), section 2: absmax of a row; never off by more than half a step."""
    weight = torch.randn(33, 70) * torch.logspace(-3, 3, 33)[:, None]
    codes, absmax = encode(weight, "int8")
    assert codes.dtype == torch.int8 and torch.equal(absmax, weight.abs().amax(1)) and codes.abs().amax(1).tolist() == [127] * 33
    assert bool(((round_trip(weight, "int8") - weight).abs() <= absmax[:, None] / 254 * 1.0001).all())


@kinds
@dtypes
def test_zeros_stay_zeros_whole_blocks_of_them_too(kind, dtype):
    weight = torch.randn(6, 64).to(dtype)
    weight[2:4] = 0
    assert round_trip(weight, kind)[2:4].abs().sum() == 0
    assert round_trip(torch.zeros(3, 70, dtype=dtype), kind).abs().sum() == 0


def expected_error(points=1500):
    """E|w - nf4(w)| of a standard normal w: over the largest m of 64 |w|, and the 63 others, which are normal within [-m, m]."""
    m = torch.linspace(0.8, 6.5, points, dtype=torch.float64)
    inside = torch.erf(m / 2**0.5)
    density_of_m = 64 * (2 / torch.pi) ** 0.5 * torch.exp(-m * m / 2) * inside**63
    u = torch.linspace(-1, 1, 2 * points + 1, dtype=torch.float64)
    off = (u[:, None] - torch.tensor(NF4, dtype=torch.float64)).abs().min(1).values
    density = torch.exp(-((m[:, None] * u) ** 2) / 2) / (2 * torch.pi) ** 0.5 * m[:, None]
    error = m * torch.trapezoid(off * density, u, dim=1) / inside
    return torch.trapezoid(63 / 64 * error * density_of_m, m).item()


def test_the_error_on_a_normal_matrix_is_what_theory_and_bitsandbytes_say():
    """bitsandbytes' own test (test_4bit_quant) has the mean of 1,000 matrices at block 64: 0.072792, and 0.203299 relative."""
    weight = torch.randn(1024, 1024)
    error = (round_trip(weight, "nf4") - weight).abs()
    assert expected_error() == pytest.approx(0.072792, abs=1e-4)
    assert error.mean().item() == pytest.approx(expected_error(), rel=5e-3)
    assert (error / (weight.abs() + 1e-8)).mean().item() == pytest.approx(0.203299, abs=2e-3)


def test_double_quantisation_costs_next_to_no_accuracy():
    """QLoRA, section 3: "without degrading performance"; and 8 bits are an order of magnitude nearer than 4."""
    weight = torch.randn(512, 512)
    error = {kind: (round_trip(weight, kind) - weight).abs().mean().item() for kind in KINDS}
    assert error["nf4"] < error["nf4-dq"] < 1.02 * error["nf4"] and error["int8"] < error["nf4"] / 9


# bitsandbytes -------------------------------------------------------------------------------------------------------------

GOLDEN_ROW = "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a0"
GOLDEN_ABSMAX = [0.78125, 1.5625, 2.34375, 3.125, 3.90625, 4.6875]


def golden_weight():
    """5 x 70 numbers without a generator: the same on every machine, each block larger than the one before."""
    i = torch.arange(5 * 70)
    return (((i * 37) % 101 - 50) / 64 * (1 + i // 64)).view(5, 70)


def test_codes_scales_and_values_are_those_bitsandbytes_gave():
    """From bitsandbytes 0.50.2, quantize_4bit and int8_vectorwise_quant of this matrix."""
    codes, absmax = encode(golden_weight(), "nf4")
    assert bytes(codes[:51].tolist()).hex() == GOLDEN_ROW and codes.numel() == 175 and absmax.tolist() == GOLDEN_ABSMAX
    parts = encode(golden_weight(), "nf4-dq")
    assert [part.tolist() for part in parts[1:]] == [[0, 28, 56, 198, 226, 255], [1.953125], 2.734375]
    values = decode("nf4-dq", parts, 5, 70, torch.float32).view(-1)
    assert values[[0, 1, 100, 349]].tolist() == [-0.79498291015625, -0.226126030087471, 0.3849260210990906, 3.3888602256774902]
    codes, absmax = encode(golden_weight(), "int8")
    assert absmax.tolist() == [1.3125, 2.34375, 3.125, 3.828125, 4.6875] and codes.int().sum(1).tolist() == [36, 95, -216, 40, 64]
    assert codes[0, :8].tolist() == [-76, -20, 36, -60, -5, 51, -45, 11]


def test_both_code_tables_are_bitsandbytes_own(bnb):
    assert torch.equal(torch.tensor(NF4), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(torch.tensor(DYNAMIC), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (33, 65), (300, 700), (512, 1024)])
def test_nf4_is_bitsandbytes_to_the_last_bit(bnb, dtype, shape):
    """bitsandbytes 0.50.2's AVX512 kernel decodes other shapes wrongly: columns a multiple of 32 but not of 64 (error 0.16, not 0.07)."""
    weight = (torch.randn(shape) / 50).to(dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    codes, absmax = encode(weight, "nf4")
    assert torch.equal(codes, theirs.view(-1)) and torch.equal(absmax, state.absmax)
    assert torch.equal(decode("nf4", (codes, absmax), *shape, dtype), bnb.dequantize_4bit(theirs, state).view(shape))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_nf4_dq_is_bitsandbytes_but_for_the_grid_of_its_cpu_table(bnb, dtype):
    """Its CPU build rounds a scale to 65,536 places before it looks for the nearest level; rounded so, ours are equal, all of them."""
    weight = (torch.randn(512, 1024) / 50).to(dtype)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    _, scale_codes, second, mean = encode(weight, "nf4-dq")
    assert torch.equal(second, state.state2.absmax) and torch.equal(mean, state.offset)
    scaled = (encode(weight, "nf4")[1] - mean).view(-1, 256) / second[:, None]
    place = ((scaled + 1) * 0.5 * 65535 + 0.5).int() / 65535 * 2 - 1
    level = torch.tensor(DYNAMIC)
    assert torch.equal((place.view(-1, 1) - level).abs().argmin(1).to(torch.uint8), state.absmax)
    assert (scale_codes != state.absmax).float().mean() < 0.01 and (scale_codes.int() - state.absmax.int()).abs().max() <= 1
    parts = (theirs.view(-1), state.absmax, state.state2.absmax, state.offset)
    assert torch.equal(decode("nf4-dq", parts, 512, 1024, dtype), bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_int8_is_bitsandbytes_to_the_last_bit(bnb, dtype):
    weight = (torch.randn(300, 700) / 50).to(dtype)
    theirs, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    codes, ours = encode(weight, "int8")
    assert torch.equal(codes, theirs) and torch.equal(ours, absmax)
    assert torch.equal(decode("int8", (codes, ours), 300, 700, dtype), bnb.int8_vectorwise_dequant(theirs, absmax).to(dtype))


def test_gpt2s_conv1d_is_turned_before_it_is_quantised_as_transformers_does_for_bitsandbytes(bnb):
    """transformers' integration hands bitsandbytes the transpose of a Conv1D: blocks run along the inputs there, too."""
    model = build("gpt2", torch.float32)
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    layer = quantize(model, "nf4").transformer.h[0].mlp.c_fc
    theirs, state = bnb.quantize_4bit(weight.t().contiguous(), quant_type="nf4")
    assert torch.equal(layer.weight_codes, theirs.view(-1)) and torch.equal(layer.weight_absmax, state.absmax)


# Memory -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("nf4-dq", 4.127), ("int8", 8 + 32 / 4096)])
def test_bits_per_parameter_are_the_papers(kind, bits):
    """QLoRA, section 3: 0.5 bits a parameter for float32 scales at block 64; 8/64 + 32/(64 * 256) = 0.127 with double quantisation."""
    report = quantization_report(quantize(nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta", dtype=torch.bfloat16)), kind))
    assert report.bits_per_parameter == pytest.approx(bits, abs=5e-4)
    assert (report.layers, report.weights, report.bytes_before) == (1, 4096**2, 2 * 4096**2)
    assert f"{report.bits_per_parameter:.3f} bits" in str(report) and f"{report.bytes:,} bytes" in str(report)


@kinds
@pytest.mark.parametrize(("rows", "columns"), [(576, 1536), (1024, 640), (3, 5)])
def test_measured_bytes_are_what_memory_math_predicts_for_bitsandbytes_less_its_tables(kind, rows, columns):
    """bitsandbytes keeps the 16 levels with every matrix, and the 256 of the second code; here one table serves all layers."""
    tables = {"nf4": CODEBOOK_BYTES, "nf4-dq": CODEBOOK_BYTES + SECOND_CODEBOOK_BYTES, "int8": 0}[kind]
    model = quantize(nn.Sequential(nn.Linear(columns, rows, bias=False)), kind)
    assert quantization_report(model).bytes == quantized_bytes(kind, rows, columns) - tables
    assert quantization_report(model).bytes == sum(buffer.nbytes for buffer in model.buffers())


@kinds
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_is_kept_for_backward_but_the_codes_the_model_has_anyway(kind, compiled):
    """Neither the decoded matrix nor the input; a compiler that finds the same decoding in forward and backward must not keep it either."""
    model = quantize(nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128)), kind)
    run = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else model
    own, kept = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}, []
    x = torch.randn(4, 128, requires_grad=True)

    def pack(tensor):
        kept.append((tensor.untyped_storage().data_ptr() in own, tensor.numel()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x).sum().backward()
    assert kept and all(is_own for is_own, _ in kept)
    assert max(size for _, size in kept) <= 256 * 128
    expected = torch.ones(4, 128) @ model[1].dequantize() @ model[0].dequantize()
    assert_close(x.grad, expected)


# The layer ----------------------------------------------------------------------------------------------------------------


@kinds
@dtypes
def test_the_layer_computes_with_the_matrix_it_dequantises_to(kind, dtype):
    model, x = mlp(dtype), torch.randn(5, 3, 70).to(dtype)
    before, weight = model(x), model[0].weight.detach().clone()
    quantize(model, kind)
    layer = model[0]
    assert layer.dequantize().dtype == dtype == layer.compute_dtype and layer.dequantize().shape == (24, 70) == layer.matrix_shape
    assert torch.equal(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    assert model(x).dtype == dtype and not torch.equal(model(x), before)
    assert_close(layer.dequantize(), round_trip(weight, kind), rtol=0, atol=0)
    assert_close(model(x).float(), before.float(), rtol=0, atol=0.5)


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_every_order_are_those_of_the_matrix(kind, bias):
    layer = quantize(nn.Sequential(nn.Linear(12, 7, bias=bias).double()), kind)[0]
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,)) and torch.autograd.gradgradcheck(layer, (x,))
    layer(x).pow(2).sum().backward()
    found, x.grad = [x.grad, *(p.grad.clone() for p in layer.parameters())], None
    layer.zero_grad()
    F.linear(x, layer.dequantize(), layer.bias).pow(2).sum().backward()
    for ours, theirs in zip(found, [x.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert_close(ours, theirs)
    assert len(found) == 1 + bias


@kinds
def test_torch_func_differentiates_and_maps_it(kind):
    model = quantize(mlp(torch.float64), kind)
    x = torch.randn(5, 70, dtype=torch.float64)
    on = (model[0](x[0]) > 0).double().diag()
    assert_close(torch.func.jacrev(model)(x[0]), model[2].dequantize() @ on @ model[0].dequantize())
    assert_close(torch.func.vmap(model)(x), model(x))
    gradient = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
    assert_close(gradient[0], torch.ones(9, dtype=torch.float64) @ model[2].dequantize() @ on @ model[0].dequantize())


@kinds
def test_under_autocast_input_and_matrix_are_autocasts(kind, monkeypatch):
    """The matrix is decoded to 16 bit at once: by way of float32 it would take three times the memory."""
    layer, x, decoded_to = quantize(mlp(), kind)[0], torch.randn(5, 70, requires_grad=True), []
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, layer.dequantize(), layer.bias)
        monkeypatch.setattr("lora_lab.quantization.decode", lambda *inputs: decoded_to.append(inputs[-1]) or decode(*inputs))
        y = layer(x)
    assert y.dtype == torch.bfloat16 == expected.dtype
    assert_close(y, expected, rtol=0, atol=0)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 == layer.bias.grad.dtype and decoded_to == [torch.bfloat16, torch.bfloat16]
    assert_close(x.grad, layer.dequantize().sum(0).expand(5, -1), rtol=0.02, atol=0.02)


@kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    model, x = quantize(mlp(), kind), torch.randn(5, 70, requires_grad=True)
    plain = torch.autograd.grad(model(x).pow(2).sum(), [x, model[0].bias])
    checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(x.grad, plain[0]) and torch.equal(model[0].bias.grad, plain[1])


@kinds
def test_a_compiled_model_computes_the_same(kind):
    model, x = quantize(mlp(), kind), torch.randn(5, 70, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradient = torch.autograd.grad(model(x).sum(), x)[0]
    assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
    assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], gradient, rtol=0, atol=1e-6)


@kinds
def test_a_conv1d_has_the_codes_of_the_linear_layer_it_is(kind):
    """GPT-2's layer stores the transpose of its matrix; blocks and rows are the matrix's."""
    conv = build("gpt2", torch.float32).transformer.h[0].mlp.c_fc
    linear = nn.Linear(32, 128)
    linear.load_state_dict({"weight": conv.weight.detach().t(), "bias": conv.bias.detach()})
    model, x = nn.Sequential(nn.Sequential(conv), nn.Sequential(linear)), torch.randn(2, 5, 32)
    quantize(model, kind)
    for ours, theirs in zip(conv.parts(), linear.parts(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(conv(x), linear(x)) and torch.equal(conv.dequantize(), linear.dequantize().t())
    assert conv.matrix_shape == (128, 32) and (conv.nx, conv.nf) == (32, 128) and not hasattr(conv, "weight")


def test_there_is_no_weight_to_be_taken_for_numbers_and_the_error_says_what_to_call():
    layer = quantize(mlp(), "nf4")[0]
    assert not hasattr(layer, "weight") and getattr(layer, "weight", None) is None
    with pytest.raises(AttributeError, match=r"QuantizedLinear has no weight, only nf4 codes: call .dequantize\(\)"):
        layer.weight  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        layer.wieght  # noqa: B018
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_quantised_layer_is_the_layer_it_was():
    model = mlp()
    layer, bias, calls = model[0], model[0].bias, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert quantize(model, "nf4") is model and model[0] is layer and layer.bias is bias and bias.requires_grad
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (70, 24)
    assert "in_features=70" in repr(layer) and "quantization=nf4" in repr(layer)
    model(torch.randn(2, 70))
    assert calls == [1]
    with pytest.raises(LoraLabError, match=r"torch.int64: expected floats"):
        layer(torch.ones(2, 70, dtype=torch.int64))


@kinds
def test_casting_a_model_casts_what_it_computes_in_and_no_code_and_no_scale(kind):
    """``.half()`` casts float buffers: a scale in float16 would be another number, an absmax above 65,504 infinite."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6
    quantize(model, kind)
    before, matrix = {name: buffer.clone() for name, buffer in model.named_buffers()}, model[0].dequantize()
    for cast, dtype in [(nn.Module.half, torch.float16), (nn.Module.bfloat16, torch.bfloat16), (nn.Module.double, torch.float64),
                        (lambda m: m.to(torch.bfloat16), torch.bfloat16), (lambda m: m.type(torch.float16), torch.float16)]:  # fmt: skip
        cast(model)
        assert model[0].compute_dtype == dtype == model[0].bias.dtype and model[0].dequantize().dtype == dtype
        assert model(torch.randn(2, 70).to(dtype)).dtype == dtype
        for name, buffer in model.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name
    assert torch.equal(model.float()[0].dequantize(), matrix)


@kinds
def test_on_the_meta_device_shapes_and_bytes_are_there_and_to_takes_the_numbers(kind):
    model = quantize(mlp(torch.bfloat16, "meta"), kind)
    assert model(torch.empty(5, 70, device="meta", dtype=torch.bfloat16)).shape == (5, 9)
    real = quantize(mlp(torch.bfloat16), kind)
    assert quantization_report(model).bytes == quantization_report(real).bytes
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(5, 70).bfloat16()
    assert torch.equal(model(x), real(x))
    assert all(buffer.is_meta for buffer in copy.deepcopy(real).to("meta").buffers())


@kinds
def test_state_dict_goes_into_another_model_quantised_the_same_way_and_into_no_other(kind):
    model, other = quantize(mlp(), kind), quantize(mlp(), kind)
    x = torch.randn(5, 70)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    assert {name.split(".")[1] for name in model.state_dict()} == {"bias", *PARTS[kind]}
    for wrong in (mlp(), *(quantize(mlp(), name) for name in KINDS if name != kind)):
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key|size mismatch"):
            wrong.load_state_dict(model.state_dict())


def test_deepcopy_and_pickle_keep_codes_class_and_adapters():
    model, x = quantize(mlp(), "nf4-dq"), torch.randn(5, 70)
    lora_lab.inject(model, rank=2, init="random")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x)) and type(twin[0]) is type(model[0])
        twin[0].weight_codes.zero_()
        assert not torch.equal(twin(x), model(x))
    lora_lab.eject(model)
    assert type(pickle.loads(pickle.dumps(model))[0]) is type(model[0]) is pickle.loads(pickle.dumps(type(model[0])))


def test_a_pickle_is_read_by_a_process_that_has_quantised_nothing(tmp_path):
    """The classes are made on the fly, LoRA's on top of ours, too: they have to be made again there."""
    model = nn.Sequential(nn.Linear(70, 8), nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8))
    lora_lab.inject(quantize(model, "nf4"), rank=2, init="random", target_modules=["0"])
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, model(torch.ones(1, 70)))))
    code = ("import pickle, sys, torch; model, y = pickle.load(open(sys.argv[1], 'rb')); assert torch.equal(model(torch.ones(1, 70)), y); "
            "print(*(type(layer).__name__ for layer in model))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LoRAQuantizedLinear", "QuantizedNonDynamicallyQuantizableLinear"]


@kinds
def test_dequantize_gives_ordinary_layers_with_the_codes_values(kind):
    model, names, x = mlp(), [name for name, _ in mlp().named_parameters()], torch.randn(5, 70)
    quantize(model, kind)
    y = model(x)
    assert dequantize(model) is model and type(model[0]) is nn.Linear and not quantized_layers(model)
    assert torch.equal(model(x), y) and [name for name, _ in model.named_parameters()] == names and not list(model.buffers())
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad and model[0].weight.is_contiguous()
    assert vars(model[0]).keys() == vars(mlp()[0]).keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox", "t5", "bert"])
def test_transformers_models_compute_with_the_dequantised_weights(family):
    """Head, embeddings and norms stay; T5's wo, too, which transformers keeps in float32 and reads the weight of."""
    model = build(family)
    before, head = logits(model, family), model.get_output_embeddings() if family != "bert" else model.classifier
    stay = {name for name, module in model.named_modules() if isinstance(module, (nn.Embedding, nn.LayerNorm)) or name.endswith(".wo")}
    quantize(model, "nf4-dq")
    assert type(head) is nn.Linear and all(hasattr(model.get_submodule(name), "weight") for name in stay) and quantized_layers(model)
    after = logits(model, family)
    dequantize(model)
    assert_close(after, logits(model, family), rtol=0, atol=1e-12)
    assert not torch.allclose(after, before, atol=1e-3)


@kinds
def test_lora_trains_on_a_quantised_base(kind):
    """QLoRA, equation 5: y = x doubleDequant(c1, c2, W) + x L1 L2; gradients go through the codes to A and B alone."""
    model = build("llama", torch.float32)
    quantize(model, kind)
    reference = dequantize(copy.deepcopy(model))
    for either in (model, reference):
        torch.manual_seed(3)
        lora_lab.inject(either, rank=2, init="random")
        either(torch.arange(3, 10)[None]).logits.pow(2).mean().backward()
    adapters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert adapters and all("lora_" in name for name in adapters)
    for name in adapters:
        ours, theirs = model.get_parameter(name).grad, reference.get_parameter(name).grad
        assert ours.abs().sum() > 0
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    lora_lab.eject(model)
    assert all(isinstance(layer, Quantized) for layer in quantized_layers(model).values())


# What is left alone, and what is refused ------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, has_head):
        super().__init__()
        self.embed, self.proj, self.out = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight
        if has_head:
            self.get_output_embeddings = lambda: self.out


class Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x).sigmoid()


class Written(nn.Linear):
    """As transformers' FalconLinear: a forward of its own, for the same function."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def unchanged(model, before, classes):
    after = {name: (id(tensor), tensor._version) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return after == before and classes == [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (mlp, {"kind": "nf4_dq"}, r"kind='nf4_dq': expected one of nf4, nf4-dq, int8 \(did you mean 'nf4-dq'"),
        (mlp, {"kind": None}, "kind=None: expected one of"),
        (mlp, {"exclude_modules": ["0", "2"]}, "Sequential has nothing to quantise: each of its 2 linear layers"),
        (mlp, {"exclude_modules": ["1"]}, "exclude_modules=.*'1' matches none"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "each of its 0 linear layers"),
        (lambda: quantize(mlp(), "int8", exclude_modules=["0"]), {}, r"'2' is already quantised \(int8\): dequantize first"),
        (lambda: lora_lab.inject(mlp(), rank=2, target_modules=["2"]), {}, "'2' carries LoRA adapters.*quantize before inject"),
        (lambda: Tied(has_head=False), {}, r"'out' shares its weight with 'embed.weight', which is not quantised: .*exclude_modules=\['out'\]"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), {}, "the weight of '1' has no numbers yet: run the model once"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0)), {}, "the weight of '1' has no numbers"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), {}, "'1' computes its weight"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(torch.float8_e5m2)), {}, "the weight of '1' is torch.float8_e5m2: expected"),
        (lambda: nn.Sequential(nn.Linear(4, 4), Gated(4, 4)), {}, r"'1' is a Gated, whose forward is not x W\^T \+ b"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_cannot_be_quantised_is_refused_before_anything_changes(make, arguments, message):
    model = make()
    state = {name: (id(tensor), tensor._version) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(LoraLabError, match=message):
        quantize(model, **arguments)
    assert unchanged(model, state, classes)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused_with_the_layers_name(number):
    model = mlp(torch.float64)
    with torch.no_grad():
        model[2].weight[1, 1] = number
    with pytest.raises(LoraLabError, match="the weight of '2' has numbers that are not finite in float32"):
        quantize(model, "nf4")
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_class_that_cannot_be_made_leaves_the_model_as_it_was():
    class Meta(type):
        pass

    class Odd(nn.Linear, metaclass=Meta):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    with pytest.raises(TypeError, match="metaclass"):
        quantize(model)
    assert type(model[0]) is nn.Linear and hasattr(model[0], "weight")


def test_the_head_a_classifier_and_excluded_layers_stay():
    model = quantize(Tied(has_head=True), "nf4")
    assert list(quantized_layers(model)) == ["proj"] and model.out.weight is model.embed.weight
    model = nn.ModuleDict({"body": mlp(), "score": nn.Linear(9, 2), "classifier": nn.Linear(9, 2)})
    assert list(quantized_layers(quantize(model, exclude_modules=["body.2"]))) == ["body.0"]
    quantize(model, "int8", exclude_modules=["body.0"])
    assert [layer.quantization for layer in quantized_layers(model).values()] == ["nf4", "int8"]
    assert list(quantized_layers(quantize(build("llama"), exclude_modules=["mlp", "lm_head"])))[-1].endswith("self_attn.o_proj")


def test_pytorchs_encoder_layers_keep_the_weights_they_read_without_a_call():
    """In eval mode nn.TransformerEncoderLayer hands linear1.weight to a kernel; nn.MultiheadAttention does so with out_proj.weight always."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()
    assert list(quantized_layers(quantize(model))) == ["1"]
    assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_layers_that_share_a_weight_share_its_codes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    quantize(model)
    assert model[0].weight_codes is model[1].weight_codes and quantization_report(model).layers == 1
    dequantize(model)
    assert model[0].weight is model[1].weight


def test_a_module_at_two_paths_is_quantised_once():
    layer = nn.Linear(8, 8)
    model = quantize(nn.Sequential(layer, nn.ReLU(), layer))
    assert model[0] is model[2] is layer and quantization_report(model).layers == 1


def test_a_subclass_with_its_own_words_for_the_same_function_is_quantised():
    model, x = nn.Sequential(Written(70, 8)), torch.randn(3, 70)
    quantize(model, "int8")
    assert isinstance(model[0], Written) and torch.equal(model(x), F.linear(x, model[0].dequantize(), model[0].bias))


def test_dequantize_and_report_say_what_is_missing():
    with pytest.raises(LoraLabError, match="Sequential has no quantised layers"):
        dequantize(mlp())
    with pytest.raises(LoraLabError, match="call quantize first"):
        quantization_report(mlp())
    model = lora_lab.inject(quantize(mlp()), rank=2)
    with pytest.raises(LoraLabError, match="'0' carries LoRA adapters: eject them"):
        dequantize(model)
    assert len(quantized_layers(model)) == 2
