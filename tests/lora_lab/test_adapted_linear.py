"""The Function that adds LoRA's products in place is the sum ``W x + scaling * B A x``, gradients included; and where it stays out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    assert is_simple(layer, x)
    if case == "trained weight":
        layer.weight.requires_grad_()
    if case == "trained bias":
        layer.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert not is_simple(layer, x.double() if case == "another dtype" else x)


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
