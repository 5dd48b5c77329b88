"""LoRALinear and the class-switching layers: the algebra of the paper, and everything a layer must still be after it is adapted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, LoRALinear, lora_delta
from lora_lab.kinds import is_conv1d
from lora_lab.layers import AdapterParameters


def random_layer(fan_in=64, fan_out=128, rank=4, dtype=torch.float64, **keywords):
    """B is not zero: a zero B hides every bug."""
    return LoRALinear(fan_in, fan_out, rank=rank, init="random", dtype=dtype, **keywords)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_forward_is_the_papers_equation_3():
    """Hu et al. 2021, equation 3: h = W0 x + (alpha / r) B A x."""
    layer, x = random_layer(alpha=12), randn(8, 64)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert_close(layer(x), F.linear(x, layer.weight + (12 / 4) * B @ A, layer.bias), rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))


def test_lora_delta_is_scaling_times_B_times_A_and_names_both_shapes_where_they_disagree():
    A, B = randn(4, 6), randn(5, 4)
    assert_close(lora_delta(A, B, 0.25), 0.25 * (B @ A))
    layer = random_layer()
    assert_close(layer.lora_delta("default"), lora_delta(layer.lora_A["default"], layer.lora_B["default"], 1.0))
    with pytest.raises(LoraLabError, match=r"\[4, 6\].*\[5, 3\]"):
        lora_delta(A, randn(5, 3), 1.0)


def test_a_new_layer_computes_what_its_base_computes():
    """Hu et al. 2021, section 4.1: B is zero at the beginning, so the update is."""
    layer, x = LoRALinear(6, 4, rank=2), torch.randn(3, 6)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_rank_8_on_512_by_64_has_4608_parameters_86_percent_fewer():
    """Lecture A: A has 4,096, B 512; 86 % fewer than 32,768."""
    layer = LoRALinear(512, 64, rank=8, bias=False)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert (A.numel(), B.numel(), layer.weight.numel()) == (4096, 512, 32_768)
    assert round(100 * (1 - (A.numel() + B.numel()) / layer.weight.numel())) == 86
    assert lora_lab.count_parameters(layer).trainable == 4608


def test_only_A_and_B_receive_gradients():
    layer = random_layer()
    layer(randn(2, 64)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A.default", "lora_B.default"}


def test_gradients_are_those_of_the_dense_update():
    layer, x = random_layer(alpha=8), randn(5, 64)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A["default"], layer.lora_B["default"]))
    weight = randn(5, 128)
    (layer(x) * weight).sum().backward()
    (F.linear(x, layer.weight + 2 * B @ A, layer.bias) * weight).sum().backward()
    assert_close(layer.lora_A["default"].grad, A.grad, rtol=0, atol=1e-11)
    assert_close(layer.lora_B["default"].grad, B.grad, rtol=0, atol=1e-11)


def test_the_small_matrices_are_cast_to_x_and_x_is_never_cast_to_them():
    """PEFT saves a float32 copy of x for each adapted layer on a 16-bit base; here q, k and v share the one 16-bit x."""
    layers = [lora_lab.inject(nn.Sequential(nn.Linear(256, 256).bfloat16()), rank=4) for _ in range(3)]
    x, saved = torch.randn(32, 256).bfloat16().requires_grad_(), {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    assert layers[0][0].lora_A["default"].dtype == torch.float32
    weights = {p.untyped_storage()._cdata for layer in layers for p in layer.parameters()}
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)
    casts = 3 * 2 * (4 * 256 * 2)  # A and B of three layers in 16 bit
    assert kept - casts <= 1.1 * x.numel() * 2


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    layer, x = random_layer(dropout=0.5), randn(16, 64)
    base = F.linear(x, layer.weight, layer.bias)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert_close(mean, layer.eval()(x), rtol=0, atol=0.25 * (layer(x) - base).std().item())


@pytest.mark.parametrize("name", ["keys", "training", "forward", "values", "T-1_x", "default"])
def test_any_legal_adapter_name_works_even_those_that_are_attributes_of_modules(name):
    model = lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), rank=2, adapter=name, init="random")
    assert f"0.lora_A.{name}" in model.state_dict()
    model(torch.randn(1, 4)).sum().backward()
    assert model[0].lora_A[name].grad is not None
    fresh = lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), rank=2, adapter=name)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh[0].lora_B[name], model[0].lora_B[name])


def test_adapter_parameters_behave_like_a_dictionary():
    parameters = AdapterParameters()
    parameters["a"] = nn.Parameter(torch.zeros(2, 3))
    assert list(parameters) == ["a"] and len(parameters) == 1 and "a" in parameters and "b" not in parameters
    assert "a: [2, 3]" in repr(parameters)
    del parameters["a"]
    assert not list(parameters.parameters())


# The layer is still the layer it was --------------------------------------------------------------------------------------------


class Loud(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x, volume=1.0):
        return super().forward(x) * volume


def test_identity_keys_hooks_isinstance_and_a_subclass_forward_survive():
    """PEFT's wrappers rename keys and hide the model (its users' most repeated complaint): here the object stays itself."""
    model = nn.Sequential(Loud(4, 3)).double()
    layer, keys, calls = model[0], set(model.state_dict()), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x = randn(2, 4)
    base = layer(x, volume=3.0)
    lora_lab.inject(model, rank=2, init="random")
    assert model[0] is layer and isinstance(layer, Loud) and keys < set(model.state_dict())
    assert_close(layer(x, volume=3.0), base + F.linear(x, layer.lora_delta("default")))
    assert len(calls) == 2 and layer.in_features == 4
    lora_lab.eject(model)
    assert type(layer) is Loud and set(model.state_dict()) == keys and torch.equal(layer(x, volume=3.0), base)


@pytest.mark.parametrize("base", [nn.Linear, Loud])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_deepcopy_and_pickle_keep_the_adapter_and_are_independent(base, clone):
    model = lora_lab.inject(nn.Sequential(base(6, 5)), rank=2, alpha=6, init="random")
    x = torch.randn(3, 6)
    other = clone(model)
    assert type(other[0]) is type(model[0]) and torch.equal(other(x), model(x))
    with torch.no_grad():
        other[0].lora_B["default"].zero_()
    assert not torch.equal(other(x), model(x))
    assert type(lora_lab.eject(other)[0]) is base and "lora_A" in dict(model[0].named_children())


def test_compiles_without_a_graph_break():
    layer, x = random_layer(dtype=torch.float32), torch.randn(4, 64)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_moves_and_casts_with_the_model():
    model = lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), rank=2)
    assert model.to("meta")[0].lora_A["default"].is_meta
    assert lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), rank=2).double()[0].lora_B["default"].dtype == torch.float64


@pytest.mark.parametrize(("base", "expected"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_adapters_are_float32_on_a_16_bit_base_and_the_bases_dtype_otherwise(base, expected):
    model = lora_lab.inject(nn.Sequential(nn.Linear(4, 4, dtype=base)), rank=2)
    assert model[0].lora_A["default"].dtype == expected
    assert lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), rank=2, dtype=torch.bfloat16)[0].lora_A["default"].dtype == torch.bfloat16


def test_under_autocast_the_sum_is_in_autocasts_dtype():
    model = lora_lab.inject(nn.Sequential(nn.Linear(16, 16)), rank=2, init="random")
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), model(x), rtol=0.05, atol=0.05)


def test_an_encoder_layers_eval_fast_path_does_not_skip_the_adapter():
    """nn.TransformerEncoderLayer in eval mode reads linear1.weight itself and would silently ignore LoRA there."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = layer(x)
        lora_lab.inject(layer, rank=2, target_modules=["linear1", "linear2"], init="random")
        adapted = layer(x)
    assert not torch.allclose(adapted, base)
    assert_close(adapted, layer.requires_grad_(True)(x))  # with gradients there is no fast path
    with torch.no_grad():
        assert_close(lora_lab.eject(layer)(x), base)


def test_conv1d_is_recognised_without_importing_transformers():
    from transformers.pytorch_utils import Conv1D

    class Conv1DLookalike(nn.Module):
        pass

    conv = Conv1D(12, 4)  # [in, out] = [4, 12]
    assert is_conv1d(conv) and not is_conv1d(Conv1DLookalike()) and not is_conv1d(nn.Linear(4, 12))
    model = lora_lab.inject(nn.Sequential(conv.double()), rank=2, init="random")
    x = randn(3, 4)
    delta = model[0].lora_delta("default")
    assert delta.shape == (12, 4)
    assert_close(model(x), x @ (conv.weight + delta.T) + conv.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, -1, 2.0, "8", True])
def test_a_rank_that_is_not_a_whole_number_of_at_least_one_is_refused(rank):
    with pytest.raises(LoraLabError, match=f"rank={rank!r}"):
        LoRALinear(4, 4, rank=rank)


def test_a_layers_output_may_be_changed_in_place_under_checkpointing():
    """transformers' Falcon does: mlp_output += attention_output."""
    from torch.utils.checkpoint import checkpoint

    layer, x = random_layer(64, 64), randn(3, 64).requires_grad_()

    def block(x):
        y = layer(x)
        y += x
        return y

    block(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert_close(x.grad, expected, rtol=0, atol=1e-12)


def test_the_input_can_be_given_by_the_name_it_has_in_nn_linear():
    layer, x = random_layer(), randn(2, 64)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("wrong", [{"init": "x"}, {"dropout": 2.0}, {"dropout": "a"}, {"alpha": True}, {"alpha": float("inf")}])
def test_a_layer_made_by_hand_checks_its_numbers_at_once(wrong):
    with pytest.raises(LoraLabError, match=next(iter(wrong))):
        LoRALinear(4, 4, **wrong)
