"""Activations in main memory and steps in backward: the same training, with less kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lora_lab import LoraLabError
from lora_lab.training import memory_saving
from lora_lab.training.memory_saving import StepsInBackward, offloaded_activations
from lora_lab.training.optimizers import OPTIMIZERS


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 8))


def test_offloading_on_a_cpu_is_refused() -> None:
    with pytest.raises(LoraLabError, match="activations are in main memory already"), offloaded_activations(build()):
        pass


def test_large_activations_move_and_weights_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the move is a copy, by which it can be told; the gradients are the same."""
    model, x, moved = build(), torch.randn(4096, 64), []
    monkeypatch.setattr(memory_saving, "_to_main_memory", lambda tensor: moved.append(tensor.shape) or tensor.clone())
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(*memory_saving._hooks(model)):
        loss = model(x).square().mean()
    loss.backward()
    assert_close([p.grad for p in model.parameters()], expected)
    assert moved and all(shape[0] == 4096 for shape in moved) and torch.Size([96, 64]) not in moved and torch.Size([4096, 8]) not in moved


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_in_backward_are_the_steps_after_it_and_no_gradient_is_left(name: str) -> None:
    model, reference, x = build(), build(), torch.randn(5, 64)
    stepping = StepsInBackward({p: OPTIMIZERS[name]([p], 0.01, 0.1) for p in model.parameters()})
    optimizer = OPTIMIZERS[name](list(reference.parameters()), 0.01, 0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        reference(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), float("inf"))
        assert stepping.norm() == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert_close(list(model.parameters()), list(reference.parameters()))
    stepping.remove()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
