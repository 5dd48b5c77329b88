"""Norm, gated MLP, rotary positions, masks and the cache: equal to plain PyTorch, and keeping no more than they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llama_tools import compiled, saved_for_backward
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import few_rows
from lora_lab.models.attention import Attention, attention_mask
from lora_lab.models.blocks import GatedMLP, RMSNorm, RMSNormFunction, SwiGLUFunction, compute_dtype, project, rotate
from lora_lab.models.cache import KVCache, LayerCache

EPS = 1e-5


def randn(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def plain_norm(x, weight):
    """Zhang & Sennrich 2019, equation 4, as transformers writes it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def norm(x, weight):
    return RMSNormFunction.apply(x, weight, EPS, x.dtype)


def plain_swiglu(gate, up):
    return F.silu(gate) * up


# Norm and gate ----------------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "norm": (norm, plain_norm, lambda **kind: (randn(2, 3, 8, **kind), randn(8, **kind))),
    "swiglu": (SwiGLUFunction.apply, plain_swiglu, lambda **kind: (randn(2, 3, 8, **kind), randn(2, 3, 8, **kind))),
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    """(ours, plain PyTorch, a maker of inputs)"""
    return FUNCTIONS[request.param]


def test_gradients_of_first_and_second_order_are_the_numerical_ones(function):
    run, _, make = function
    assert torch.autograd.gradcheck(run, make())
    assert torch.autograd.gradgradcheck(run, make())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_plain_pytorchs(function, dtype, tolerance):
    run, plain, make = function
    inputs = make(dtype=dtype)
    upstream = torch.randn(2, 3, 8, dtype=dtype)
    values = [make_y(*inputs) for make_y in (run, plain)]
    slopes = [torch.autograd.grad(y, inputs, upstream) for y in values]
    assert values[0].dtype == values[1].dtype == dtype
    for mine, expected in zip((values[0], *slopes[0]), (values[1], *slopes[1]), strict=True):
        assert mine.dtype == expected.dtype
        assert_close(mine, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def test_nothing_but_the_inputs_is_kept_for_backward(function):
    """What plain PyTorch keeps on top of them is most of a transformer's activation memory."""
    run, plain, make = function
    inputs = make(dtype=torch.float32)
    with saved_for_backward() as kept:
        y = run(*inputs)
    with saved_for_backward() as kept_by_plain:
        plain(*inputs)
    assert set(kept) == {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert sum(kept_by_plain.values()) > sum(kept.values())
    assert y.requires_grad


def test_frozen_inputs_get_no_gradient(function):
    run, plain, make = function
    first, second = make()
    for frozen in (0, 1):
        tensors = [first.detach() if frozen == 0 else first, second.detach() if frozen == 1 else second]
        wanted = tensors[1 - frozen]
        assert_close(*(torch.autograd.grad(f(*tensors).square().sum(), wanted)[0] for f in (run, plain)), rtol=1e-12, atol=1e-12)
        assert tensors[frozen].grad is None


def test_func_grad_agrees_with_backward(function):
    run, _, make = function
    inputs = make()
    expected = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    actual = torch.func.grad(lambda a, b: run(a, b).square().sum(), argnums=(0, 1))(*(tensor.detach() for tensor in inputs))
    assert_close(actual, expected)


def test_gradients_of_every_row_by_vmap(function):
    """Per-sample gradients, as influence functions and private training want them."""
    run, _, make = function
    rows, other = (tensor.detach() for tensor in make())
    other = other[0] if other.ndim == rows.ndim else other  # the gate's second input; the norm's weight
    actual = torch.func.vmap(torch.func.grad(lambda row: run(row, other).square().sum()))(rows)
    rows.requires_grad_()
    assert_close(actual, *torch.autograd.grad(sum(run(row, other).square().sum() for row in rows), rows))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8)])
def test_norm_takes_any_number_of_leading_dimensions(shape):
    x, weight = randn(*shape), randn(8)
    assert_close(*(torch.autograd.grad(f(x, weight).square().sum(), (x, weight)) for f in (norm, plain_norm)))


def test_under_autocast_the_norm_gives_16_bit_once_for_q_k_and_v():
    """Autocast would otherwise cast x in float32 again for each product of it."""
    layer, x = RMSNorm(8, EPS), randn(2, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == compute_dtype(x) == torch.bfloat16
        assert compute_dtype(x.double()) == torch.float64  # autocast leaves float64 alone
    assert_close(y.float(), plain_norm(x, layer.weight), rtol=1e-2, atol=1e-2)
    y.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_gated_mlp_under_autocast_is_close_to_float32():
    mlp, x = GatedMLP(16, 24, bias=True), randn(4, 16, dtype=torch.float32)
    expected = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x)
    assert y.dtype == torch.bfloat16
    assert_close(mlp(x), mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    for mine, theirs in zip(torch.autograd.grad(y.float().square().sum(), [x, *mlp.parameters()]), expected, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.05


def test_a_block_compiles_without_a_graph_break():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = RMSNorm(8, EPS), GatedMLP(8, 16, bias=False)

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    block, x = Block(), randn(2, 3, 8, dtype=torch.float32)
    parameters = list(block.parameters())
    with compiled(block) as fast:
        assert_close(fast(x), block(x))
        assert_close(*(torch.autograd.grad(f(x).square().sum(), [x, *parameters]) for f in (fast, block)))


# Rotary positions -------------------------------------------------------------------------------------------------------------


def test_rotation_is_multiplication_of_complex_numbers_by_a_phase():
    """Su et al. 2021, equation 13, with the pairs (i, i + D/2) of GPT-NeoX."""
    x, angles = randn(2, 3, 5, 8, grad=False), randn(1, 1, 5, 4, grad=False)
    left, right = x.chunk(2, -1)
    turned = torch.complex(left, right) * torch.polar(torch.ones_like(angles), angles)
    assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat((turned.real, turned.imag), -1))


def test_scores_of_rotated_vectors_depend_on_the_distance_only():
    """Su et al. 2021, section 3.2.1: the reason for rotating at all."""
    q, k, frequencies = randn(1, 1, 1, 8, grad=False), randn(1, 1, 1, 8, grad=False), randn(4, grad=False)

    def score(m, n):
        turned = [rotate(x, (p * frequencies).cos(), (p * frequencies).sin()) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()

    assert_close(score(7, 3), score(107, 103))
    assert not torch.isclose(score(7, 3), score(7, 4))


# Masks ------------------------------------------------------------------------------------------------------------------------


def allowed(padding, past, batch, length):
    """The definition, position by position: text at or before the query, and itself."""
    total = past + length
    rows = [[[(s <= past + t and bool(padding[b][s])) or s == past + t for s in range(total)] for t in range(length)] for b in range(batch)]
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize(("past", "length"), [(0, 1), (0, 5), (3, 1)])
@pytest.mark.parametrize("padding", [None, "all ones"])
def test_no_mask_is_made_where_plain_causality_says_it_all(past, length, padding):
    mask = None if padding is None else torch.ones(2, past + length, dtype=torch.long)
    assert attention_mask(mask, 2, length, past, torch.device("cpu")) is None


@pytest.mark.parametrize("padding", [[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]])
@pytest.mark.parametrize("past", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_the_mask_is_causality_and_padding_on_either_side(padding, past, dtype):
    mask = attention_mask(torch.tensor(padding, dtype=dtype), 2, 5 - past, past, torch.device("cpu"))
    assert torch.equal(mask, allowed(padding, past, 2, 5 - past))
    assert mask.any(-1).all()  # an empty row of the softmax would be NaN


def test_several_new_positions_after_a_cache_need_a_mask_even_without_padding():
    mask = attention_mask(None, 2, 3, 4, torch.device("cpu"))
    assert torch.equal(mask, allowed([[1] * 7], 4, 1, 3))


# Attention --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_of_scaled_scores_with_repeated_keys(kv_heads, masked):
    """Vaswani et al. 2017, equation 1; Ainslie et al. 2023, section 2.2: groups of queries share a key."""
    layer, x = Attention(12, 4, kv_heads, 6, bias=True, dtype=torch.float64), randn(2, 5, 12)
    angles = randn(1, 5, 1, 3, grad=False)
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]) if masked else None
    mask = attention_mask(padding, 2, 5, 0, x.device)
    q, k, v = (proj(x).view(2, 5, -1, 6) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v))
    visible = torch.ones(5, 5).tril().bool() if mask is None else mask
    weights = (q @ k.transpose(2, 3) / 6**0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    expected = layer.o_proj((weights @ v).transpose(1, 2).reshape(2, 5, -1))
    assert_close(layer(x, (angles.cos(), angles.sin()), mask, None), expected)


# Cache ------------------------------------------------------------------------------------------------------------------------


def pieces(lengths, grad=False):
    return [(randn(2, 3, length, 4, grad=grad), randn(2, 3, length, 4, grad=grad)) for length in lengths]


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_cache_returns_everything_so_far(with_gradients):
    parts, cache = pieces([5, 1, 1, 4, 1, 30, 1]), LayerCache()
    with torch.set_grad_enabled(with_gradients):
        for count in range(1, len(parts) + 1):
            seen = cache.append(*parts[count - 1])
            assert_close(seen, tuple(torch.cat([part[which] for part in parts[:count]], dim=2) for which in (0, 1)))
    assert cache.length == 43


def test_without_gradients_a_token_is_written_in_place():
    cache, buffers = LayerCache(), set()
    with torch.no_grad():
        for key, value in pieces([1] * 64):
            cache.append(key, value)
            buffers.add(cache.keys.data_ptr())
    assert cache.keys.shape[2] == 64
    assert len(buffers) <= 7  # 1, 2, 4, ... 64: doubled, not copied 64 times


def test_gradients_flow_through_the_cache_and_nothing_is_overwritten():
    parts, cache = pieces([2, 1], grad=True), LayerCache()
    for part in parts:
        keys, values = cache.append(*part)
    with torch.no_grad():
        cache.append(*pieces([1])[0])
    (keys.square().sum() + values.sum()).backward()
    assert_close(parts[0][0].grad, 2 * parts[0][0])
    assert_close(parts[1][1].grad, torch.ones_like(parts[1][1]))


def test_a_fork_grows_apart_from_its_origin():
    parts, cache = pieces([2, 1, 1]), LayerCache()
    with torch.no_grad():
        cache.append(*parts[0])
        cache.append(*parts[1])
        fork = cache.fork()
        fork.append(*parts[2])
        cache.append(*parts[0])
    assert (cache.length, fork.length, LayerCache().fork().length) == (5, 4, 0)
    assert_close(fork.keys[:, :, :4], torch.cat([key for key, _ in parts], dim=2))


@pytest.mark.parametrize("rows", [torch.tensor([False, True]), torch.tensor([1]), torch.tensor([1, 1, 0])])
def test_keep_selects_rows_of_every_layer(rows):
    parts = pieces([3, 3])
    cache = KVCache(parts)
    cache.keep(rows)
    assert (len(cache), cache.length) == (2, 3)
    assert_close(list(cache), [(key[rows], value[rows]) for key, value in parts])


def test_a_cache_of_pairs_does_not_write_into_the_pairs():
    parts = pieces([3])
    before, cache = parts[0][0].clone(), KVCache(parts)
    with torch.no_grad():
        cache.layers[0].append(*pieces([1])[0])
    assert torch.equal(parts[0][0], before)
    assert parts[0][0].shape[2] == 3


# Linear layers of a few rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_rows_are_what_the_layer_makes_of_them(rows: int, bias: bool) -> None:
    """W x^T reads W as it lies; the sums are the same, in another order."""
    layer, x = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16), torch.randn(rows, 1, 64).bfloat16()
    with torch.no_grad():
        found, wanted = project(layer, x), layer(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (2, 3), (4, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_rows_lie_as_the_layer_would_put_them(shape: tuple[int, ...], bias: bool) -> None:
    """view(-1) of a layer's output works for every shape, none at all included."""
    layer, x = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16), torch.randn(*shape, 64).bfloat16()
    with torch.no_grad():
        y = project(layer, x)
        assert y.is_contiguous() and y.view(-1).shape == layer(x).view(-1).shape


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_under_autocast_a_few_rows_are_what_the_layer_makes_of_them(rows: int, compute: torch.dtype, stored: torch.dtype) -> None:
    """A model stored in float32 generates under autocast: its norms give 16 bit, its weights are cast."""
    layer, x = nn.Linear(64, 48, dtype=stored), torch.randn(rows, 64).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", compute):
        found, wanted = project(layer, x), layer(x)
    assert found.dtype == wanted.dtype == compute
    assert_close(found, wanted, rtol=2e-2, atol=2e-2)


class OnlyLinear(torch.Tensor):
    """A packed weight, of which one operation is known."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.mv, torch.mm, torch.Tensor.mv, torch.Tensor.mm):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_of_somebodys_own_class_is_left_to_f_linear() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(OnlyLinear), requires_grad=False)
    with torch.no_grad():
        assert project(layer, torch.randn(1, 8).bfloat16()).shape == (1, 8)


def test_a_hook_on_all_modules_hears_every_layer() -> None:
    mlp, heard = GatedMLP(8, 16, bias=False, dtype=torch.bfloat16), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    with torch.no_grad():
        mlp(torch.randn(1, 8).bfloat16())
    handle.remove()
    assert heard == [mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp]


def test_a_layer_that_somebody_listens_to_is_called() -> None:
    layer, x, heard = nn.Linear(8, 8, dtype=torch.bfloat16), torch.randn(1, 8).bfloat16(), []
    handle = layer.register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad():
        project(layer, x)
        assert heard
        handle.remove()
        project(layer, x)
    assert len(heard) == 1


def test_an_adapter_is_not_passed_by() -> None:
    layer, x = lora_lab.inject(nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16)), 2, init="random")[0], torch.randn(1, 8).bfloat16()
    with torch.no_grad():
        assert torch.equal(project(layer, x), layer(x))
        assert not torch.allclose(project(layer, x), F.linear(x, layer.weight, layer.bias), atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_few_rows_go_through_the_adapter_in_float32(rows: int) -> None:
    """Where x is smaller than A, x is cast instead: exact but for the base's own 16 bits, and cheaper."""
    layer = lora_lab.inject(nn.Sequential(nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)), 8, init="random")[0]
    x = torch.randn(rows, 64).bfloat16()
    with torch.no_grad():
        update = F.linear(F.linear(x.float(), layer.lora_A["default"]), layer.lora_B["default"])
        wanted = few_rows.product(x, layer.weight, None).float() + update
        torch.testing.assert_close(layer(x), wanted.bfloat16(), rtol=2**-8, atol=0)  # the last bit: sums in another order
        assert (layer(x) - wanted).abs().mean() < 2**-9 * wanted.abs().mean()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_few_rows_go_through_a_quantised_layer_as_it_is(adapted: bool) -> None:
    """It has codes and no weight."""
    model = lora_lab.quantize(nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16)), "nf4")
    model, x = lora_lab.inject(model, 8, init="random") if adapted else model, torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(project(model[0], x), model(x))
