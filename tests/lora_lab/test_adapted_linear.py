"""The Function that adds LoRA's products in place is the sum ``W x + scaling * B A x``, gradients included; and where it stays out."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lora_lab
import lora_lab.layers
from lora_lab.adapted_linear import adapted_linear, is_simple


def the_sum(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, A), B)


def tensors(*shape: int, bias: bool = True) -> tuple[Any, ...]:
    """x [*shape, 6], W [5, 6] and its bias, A [3, 6], B [5, 3]."""
    torch.manual_seed(0)
    x, A, B = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((*shape, 6), (3, 6), (5, 3)))
    return x, torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if bias else None, A, B


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 3), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_sum(shape: tuple[int, ...], bias: bool) -> None:
    """Hu et al. 2021, equation 3; the gradients by autograd."""
    x, weight, b, A, B = tensors(*shape, bias=bias)
    found, wanted = (function(x, weight, b, A, B, 1.7) for function in (adapted_linear, the_sum))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    grad = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, A, B), grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives_are_the_numerical_ones() -> None:
    x, weight, bias, A, B = tensors(4)
    assert torch.autograd.gradcheck(lambda x, A, B: adapted_linear(x, weight, bias, A, B, 0.5), (x, A, B))
    assert torch.autograd.gradgradcheck(lambda x, A, B: adapted_linear(x, weight, bias, A, B, 0.5), (x, A, B))


def test_func_grad_agrees_with_backward() -> None:
    x, weight, bias, A, B = tensors(4)
    gradient = torch.func.grad(lambda A: adapted_linear(x, weight, bias, A, B, 0.5).square().sum())(A)
    (wanted,) = torch.autograd.grad(the_sum(x, weight, bias, A, B, 0.5).square().sum(), A)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("given", ["transposed x", "expanded gradient"])
def test_it_does_not_matter_how_x_and_the_gradient_lie(given: str) -> None:
    x, weight, bias, A, B = tensors(2, 3)
    x = x.detach().transpose(0, 1).requires_grad_() if given == "transposed x" else x
    grads = [torch.autograd.grad(function(x, weight, bias, A, B, 2.0).sum(), (x, A, B)) for function in (adapted_linear, the_sum)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_layer_takes_it_and_gives_what_the_sum_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = lora_lab.LoRALinear(6, 5, rank=3, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    nn.init.normal_(layer.lora_B["default"])
    taken, real = [], lora_lab.layers.adapted_linear
    monkeypatch.setattr(lora_lab.layers, "adapted_linear", lambda *inputs: taken.append(1) or real(*inputs))
    fast = layer(x)
    monkeypatch.setattr(lora_lab.layers, "is_simple", lambda *_: False)
    torch.testing.assert_close(fast, layer(x), rtol=1e-13, atol=1e-13)
    assert taken == [1]


@pytest.mark.parametrize("case", ["trained weight", "another dtype", "autocast", "trained bias"])
def test_it_stays_out_where_it_would_not_be_the_same(case: str) -> None:
    layer, x = lora_lab.LoRALinear(6, 5, rank=3), torch.randn(4, 6)
    A = layer.lora_A["default"]
    assert is_simple(x, layer.weight, layer.bias, A)
    if case == "trained weight":
        layer.weight.requires_grad_()
    if case == "trained bias":
        layer.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert not is_simple(x.double() if case == "another dtype" else x, layer.weight, layer.bias, A)


@pytest.mark.parametrize("case", ["two adapters", "dora", "dropout", "by row"])
def test_only_one_plain_adapter_takes_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("not for this layer")

    variant, dropout = "dora" if case == "dora" else "lora", 0.5 * (case == "dropout")
    model = lora_lab.inject(nn.Sequential(nn.Linear(6, 5)), 3, variant=variant, dropout=dropout).train()
    lora_lab.inject(model, 2, adapter="b")
    lora_lab.use(model, ["default", "b"] if case == "two adapters" else "default")
    monkeypatch.setattr(lora_lab.layers, "adapted_linear", refuse)
    if case == "by row":
        with lora_lab.per_sample(model, ["default", "b"]):
            model(torch.randn(2, 6))
    else:
        model(torch.randn(2, 6))


def test_kept_for_backward_are_x_once_and_small_tensors() -> None:
    layers = [lora_lab.LoRALinear(64, 32, rank=2) for _ in range(3)]
    x, sizes = torch.randn(50, 64, requires_grad=True), {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    assert len(outputs) == 3 and sum(sizes.values()) <= x.nbytes + 3 * (50 * 2 * 4) + 3 * 8  # x, each A x, stamps of the selection


# What is done to a layer ----------------------------------------------------------------------------------------------------


def a_layer(base: torch.dtype = torch.float64, bias: bool = True, **request: Any) -> Any:
    """From 6 to 5 numbers."""
    torch.manual_seed(0)
    return lora_lab.inject(nn.Sequential(nn.Linear(6, 5, bias=bias, dtype=base)), 3, init="random", **request)[0]


def sum_of(layer: Any, x: Tensor) -> Tensor:
    A, B = (container["default"].to(x.dtype) for container in (layer.lora_A, layer.lora_B))
    return the_sum(x, layer.weight, layer.bias, A, B, layer.lora_scaling["default"])


def gradients(layer: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Of a loss of run(x), with respect to A, B and, where it wants one, x."""
    wanted = [layer.lora_A["default"], layer.lora_B["default"], *([x] if x.requires_grad else [])]
    return torch.autograd.grad(run(x).abs().square().sum(), wanted)


def assert_same_gradients(layer: Any, x: Tensor, run: Callable[[Tensor], Tensor], wanted: Callable[[Tensor], Tensor]) -> None:
    for ours, theirs in zip(gradients(layer, x, run), gradients(layer, x, wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_output_can_be_changed_in_place(shape: tuple[int, ...], bias: bool, first: bool) -> None:
    """nn.ReLU(inplace=True) behind a layer. first: x has no gradient, as that of a first layer."""
    layer, x = a_layer(bias=bias), torch.randn(*shape, 6, dtype=torch.float64, requires_grad=not first)
    assert_same_gradients(layer, x, lambda x: F.relu(layer(x), inplace=True), lambda x: F.relu(sum_of(layer, x)))
    assert_same_gradients(layer, x, lambda x: layer(x).mul_(2).add_(1), lambda x: sum_of(layer, x) * 2 + 1)


@pytest.mark.parametrize("first", [True, False])
def test_so_it_can_under_checkpointing(first: bool) -> None:
    layer, x = a_layer(), torch.randn(4, 6, dtype=torch.float64, requires_grad=not first)
    again = functools.partial(checkpoint, lambda x: F.relu(layer(x), inplace=True), use_reentrant=False)
    assert_same_gradients(layer, x, again, lambda x: F.relu(sum_of(layer, x)))


def test_selective_checkpointing_may_keep_the_products() -> None:
    """It refuses results of operations that are changed afterwards."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    layer, x = a_layer(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    assert_same_gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts), lambda x: sum_of(layer, x))


def test_gradients_of_every_row_and_of_every_adapter_by_vmap() -> None:
    layer, x = a_layer(), torch.randn(4, 6, dtype=torch.float64)
    adapter = {name: tensor.detach() for name, tensor in layer.named_parameters() if "lora" in name}

    def loss(adapter: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, adapter, (x,)).square().sum()

    by_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapter, x)
    for row in range(4):
        for name, wanted in zip(("lora_A.default", "lora_B.default"), gradients(layer, x[row], lambda x: sum_of(layer, x)), strict=True):
            torch.testing.assert_close(by_row[name][row], wanted)
    two = {name: torch.stack((tensor, 2 * tensor)) for name, tensor in adapter.items()}
    losses = torch.func.vmap(loss, in_dims=(0, None))(two, x)
    torch.testing.assert_close(losses[0], sum_of(layer, x).square().sum())


def test_forward_mode_derivatives_are_those_of_the_sum() -> None:
    layer, x, change = a_layer(), *torch.randn(2, 4, 6, dtype=torch.float64)
    wanted = sum_of(layer, change) - sum_of(layer, torch.zeros_like(change))
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (change,))[1], wanted)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, change))).tangent, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_layer_can_be_saved() -> None:
    layer, x, file = a_layer(), torch.randn(4, 6, dtype=torch.float64), io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x[:2]), sum_of(layer, x[:2]))


def test_backward_inside_autocast_is_in_the_dtype_of_forward() -> None:
    layer, x = a_layer(torch.float32), torch.randn(4, 6, requires_grad=True)
    y, wanted = layer(x), gradients(layer, x, lambda x: sum_of(layer, x))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.square().sum(), [layer.lora_A["default"], layer.lora_B["default"], x])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_complex_gradients_are_those_of_the_sum() -> None:
    """They need conjugates."""
    layer, x = a_layer(torch.complex128, dtype=torch.float64), torch.randn(4, 6, dtype=torch.complex128, requires_grad=True)
    assert_same_gradients(layer, x, layer, lambda x: sum_of(layer, x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_goes_through() -> None:
    parts = [torch.randn(rows, 6, dtype=torch.float64) for rows in (2, 3)]
    layer = a_layer()
    for part, y in zip(parts, layer(torch.nested.nested_tensor(parts)).unbind(), strict=True):
        torch.testing.assert_close(y, sum_of(layer, part))


# What is kept ---------------------------------------------------------------------------------------------------------------


def kept_by(run: Callable[[], Tensor]) -> set[int]:
    """Where the tensors lie that autograd keeps."""
    places: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: places.add(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return places


def test_with_freeze_A_no_input_is_kept() -> None:
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303), section 3: what makes it small is that x is not needed."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert x.data_ptr() in kept_by(lambda: a_layer()(x))
    assert x.data_ptr() not in kept_by(lambda: a_layer(freeze_A=True)(x))


def test_the_frozen_weight_is_kept_for_the_gradient_of_x_only() -> None:
    """A weight that is fetched for each call, or was made in inference_mode, is no business of a first layer's backward."""
    layer, x = a_layer(), torch.randn(4, 6, dtype=torch.float64)
    assert layer.weight.data_ptr() not in kept_by(lambda: layer(x))
    assert layer.weight.data_ptr() in kept_by(lambda: layer(x.clone().requires_grad_()))


def test_the_input_is_never_rounded_to_a_narrower_adapter() -> None:
    """Of few rows x is the smaller one to cast, but its digits are those of the base."""
    layer, x = a_layer(torch.float32, dtype=torch.bfloat16), torch.randn(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), sum_of(layer, x))
