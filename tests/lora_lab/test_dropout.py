"""The one autograd Function of LoRA itself: its gradients, of first and second order, and what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab.dropout import _DroppedUpdate, dropped_update, pack, unpack


def operands(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((*shape, 6), (3, 6), (5, 3))]


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_gradients_of_first_and_second_order_are_right(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, A, B = operands(*(shape or (1,)))
    packed = pack(torch.rand(x.shape) < 0.6)
    assert gradcheck(lambda *tensors: _DroppedUpdate.apply(*tensors, packed, 0.7, 1.5), (x, A, B))
    assert gradgradcheck(lambda *tensors: _DroppedUpdate.apply(*tensors, packed, 0.7, 1.5), (x, A, B))


def test_it_is_the_update_of_the_dropped_input() -> None:
    x, A, B = operands(4, 7)
    mask = torch.rand(x.shape) < 0.5
    wanted = 0.7 * ((x * mask * 2) @ A.T) @ B.T
    assert_close(_DroppedUpdate.apply(x, A, B, pack(mask), 0.7, 2.0), wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(wanted, 0.7 * (x @ A.T) @ B.T)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_bits_pack_and_unpack(count: int) -> None:
    mask = torch.rand(count) < 0.5
    assert torch.equal(unpack(pack(mask), mask.shape), mask) and pack(mask).numel() == -(-count // 8)


def test_torch_func_grad_and_compile_agree_with_autograd() -> None:
    x, A, B = (tensor.detach() for tensor in operands(4))
    packed = pack(torch.rand(x.shape) < 0.6)

    def loss(A: torch.Tensor) -> torch.Tensor:
        return _DroppedUpdate.apply(x, A, B, packed, 0.7, 1.5).square().sum()

    own = A.clone().requires_grad_()
    loss(own).backward()
    assert_close(torch.func.grad(loss)(A), own.grad)
    compiled = A.clone().requires_grad_()
    torch.compile(loss, backend="eager", fullgraph=True)(compiled).backward()
    assert_close(compiled.grad, own.grad)


def test_the_expected_update_is_the_one_without_dropout() -> None:
    torch.manual_seed(0)
    x, A, B = (tensor.detach() for tensor in operands(2))
    mean = torch.stack([dropped_update(x, A, B, 1.0, 0.3) for _ in range(4000)]).mean(0)
    assert_close(mean, x @ A.T @ B.T, rtol=0, atol=0.35)
    share = torch.stack([dropped_update(torch.ones(64, 64), torch.eye(64), torch.eye(64), 1.0, 0.3) == 0 for _ in range(20)]).float().mean()
    assert share == pytest.approx(0.3, abs=0.01)


def test_q_k_and_v_keep_their_input_once_and_a_bit_per_element() -> None:
    """PEFT keeps 12.4 copies of a 16-bit x for q, k and v with dropout 0.1."""
    x = torch.randn(256, 512).bfloat16().requires_grad_()
    layers = [lora_lab.inject(nn.Sequential(nn.Linear(512, 512).bfloat16()), rank=4, dropout=0.1) for _ in range(3)]
    kept: dict[int, int] = {}
    owned = {p.untyped_storage()._cdata for layer in layers for p in layer.parameters()}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    assert sum(kept.values()) / (x.numel() * 2) < 1.3 and outputs[0].requires_grad


def test_a_checkpointed_recompute_drops_the_same_elements() -> None:
    torch.manual_seed(0)
    model = lora_lab.inject(nn.Sequential(nn.Linear(16, 16)), rank=4, dropout=0.5, init="random")
    again, x = copy.deepcopy(model), torch.randn(8, 16, requires_grad=True)
    torch.manual_seed(1)
    model(x).sum().backward()
    torch.manual_seed(1)
    checkpoint(again, x, use_reentrant=False).sum().backward()
    for (name, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if one.requires_grad:
            assert_close(one.grad, two.grad, msg=name)


def test_in_eval_mode_nothing_is_dropped() -> None:
    model = lora_lab.inject(nn.Sequential(nn.Linear(16, 16)), rank=4, dropout=0.5, init="random").eval()
    x = torch.randn(8, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_autocast_computes_in_16_bits() -> None:
    model = lora_lab.inject(nn.Sequential(nn.Linear(16, 16)), rank=4, dropout=0.1, init="random")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(8, 16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and model[0].lora_A["default"].grad.dtype == torch.float32
