"""Inputs that are made again instead of being kept: the same gradients, fewer bytes, and nothing of it where it could not be exact."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab.models.blocks import GatedMLP, SwiGLUFunction, gated
from lora_lab.models.recompute import recomputed
from lora_lab.rematerialize import keeping_inputs, linear_rematerialized, recipe_of, rematerializable


def a_gated_mlp(dtype: torch.dtype = torch.float64, **request: Any) -> nn.Module:
    torch.manual_seed(0)
    mlp = GatedMLP(12, 40, False, dtype=dtype)
    lora_lab.inject(mlp, 3, alpha=5, init="random", **request)
    return mlp


def gradients(mlp: nn.Module, x: Tensor) -> list[Tensor]:
    mlp.zero_grad()
    mlp(x).square().sum().backward()
    return [p.grad.clone() for p in mlp.parameters() if p.requires_grad]


def saved_bytes(run: Any) -> int:
    """Of distinct storages that autograd keeps, parameters aside."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result is not None  # alive, so that no storage is used twice
    return sum(seen.values())  # stamps of a selection included, 8 bytes each


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_gradients_are_bit_for_bit_those_of_keeping_the_input(variant: str) -> None:
    mlp, x = a_gated_mlp(variant=variant), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    remade = gradients(mlp, x)
    with keeping_inputs():
        kept = gradients(mlp, x)
    assert all(map(torch.equal, remade, kept))


def test_the_product_of_gate_and_up_is_not_kept() -> None:
    mlp, x = a_gated_mlp(), torch.randn(2, 50, 12, dtype=torch.float64)

    def keeping() -> Tensor:
        with keeping_inputs():
            return mlp(x)

    kept = saved_bytes(keeping)
    assert kept - saved_bytes(lambda: mlp(x)) == pytest.approx(2 * 50 * 40 * 8, rel=0.05)


def test_second_derivatives_go_through_what_is_made_again() -> None:
    A = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    gate, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def low(gate: Tensor, up: Tensor, A: Tensor) -> Tensor:
        return linear_rematerialized(gated(SwiGLUFunction, gate, up), A)

    assert torch.autograd.gradcheck(low, (gate, up, A))
    assert torch.autograd.gradgradcheck(low, (gate, up, A))


def test_checkpointing_makes_the_recipe_anew() -> None:
    mlp, x = a_gated_mlp(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    plain = gradients(mlp, x)
    mlp.zero_grad()
    checkpoint(mlp, x, use_reentrant=False).square().sum().backward()
    assert all(map(torch.equal, plain, [p.grad for p in mlp.parameters() if p.requires_grad]))


def test_a_frozen_adapter_and_a_pass_without_gradients_remember_nothing() -> None:
    x = torch.randn(4, 6)
    assert recipe_of(gated(SwiGLUFunction, x, x)) is None
    with torch.no_grad():
        assert recipe_of(gated(SwiGLUFunction, x.requires_grad_(), x)) is None
    assert recipe_of(gated(SwiGLUFunction, x, x)) is not None
    with keeping_inputs():
        assert recipe_of(gated(SwiGLUFunction, x, x)) is None


def test_autocast_to_another_dtype_keeps_the_input_as_usual() -> None:
    """x in float32 is cast by autocast: what would be made again is not what was multiplied."""
    x, A = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    wide = rematerializable(F.silu(x), F.silu, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_rematerialized(wide, A).grad_fn.name() != "_LinearRematerializedBackward"
    assert linear_rematerialized(wide, A).grad_fn.name() == "_LinearRematerializedBackward"


def changed(x: Tensor) -> None:
    x.mul_(2)


def changed_unseen(x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(2)


@pytest.mark.parametrize("change", [changed, changed_unseen])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_input_that_was_changed_in_place_is_kept(change: Callable[[Tensor], None], variant: str) -> None:
    """By a hook, say: what would be made again is not what was multiplied."""
    mlp, x = a_gated_mlp(variant=variant), torch.randn(2, 5, 12, dtype=torch.float64)
    mlp.down_proj.register_forward_pre_hook(lambda module, args: change(args[0]))
    found = gradients(mlp, x)
    with keeping_inputs():
        wanted = gradients(mlp, x)
    assert all(map(torch.equal, found, wanted))


def test_a_source_that_was_changed_before_the_layer_makes_nothing() -> None:
    gate, up = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    made = gated(SwiGLUFunction, gate, up)
    up.mul_(2)
    assert recipe_of(made) is None


def test_a_source_that_was_changed_after_the_layer_is_noticed() -> None:
    gate, up, A = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    low = linear_rematerialized(gated(SwiGLUFunction, gate, up), A)
    up.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(low.sum(), A)


def by_pytorch(mlp: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(mlp, x, use_reentrant=False)


def by_us(mlp: nn.Module, x: Tensor) -> Tensor:
    return recomputed(mlp, mlp, x)


@pytest.mark.parametrize("again", [by_pytorch, by_us])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_checkpointing_computes_again_what_it_did_where_everything_is_kept(again: Callable[[nn.Module, Tensor], Tensor], variant: str) -> None:
    """Activations are offloaded in the forward pass alone: another choice in backward would take the gate for the product."""
    mlp, x = a_gated_mlp(variant=variant), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    plain = gradients(mlp, x)
    mlp.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor), keeping_inputs():
        loss = again(mlp, x).square().sum()
    loss.backward()
    assert all(map(torch.equal, plain, [p.grad for p in mlp.parameters() if p.requires_grad]))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_one_vector_or_none_is_an_input_too(variant: str, shape: tuple[int, ...]) -> None:
    mlp, x = a_gated_mlp(variant=variant), torch.randn(*shape, 12, dtype=torch.float64)
    found = gradients(mlp, x)
    with keeping_inputs():
        wanted = gradients(mlp, x)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_file_of_the_tensor_holds_its_numbers() -> None:
    """Functions would be refused when it is read, and the sources are three times the size."""
    made, file = gated(SwiGLUFunction, torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)), io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert torch.equal(read, made) and recipe_of(read) is None


def test_nothing_is_remembered_where_computations_are_rewritten() -> None:
    """vmap and forward mode know no rule for a Function of ours; product is F.linear there."""
    x, A = torch.randn(5, 4, 6), torch.randn(3, 6, requires_grad=True)
    rows = torch.func.vmap(torch.func.grad(lambda x: linear_rematerialized(gated(SwiGLUFunction, x, x), A).square().sum()))(x)
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(F.linear(F.silu(x) * x, A).square().sum(), x)
    torch.testing.assert_close(rows, wanted)


def test_what_is_copied_or_changed_has_no_recipe() -> None:
    """Dropout, a hook or a copy in between: another tensor, which nobody said how to make."""
    made = gated(SwiGLUFunction, torch.randn(4, 6, requires_grad=True), torch.randn(4, 6))
    assert recipe_of(made) is not None
    assert recipe_of(made * 2) is None and recipe_of(F.dropout(made, 0.5)) is None and recipe_of(made.view(24)) is None


def test_the_layer_can_be_copied_while_a_graph_is_alive() -> None:
    mlp, x = a_gated_mlp(), torch.randn(2, 5, 12, dtype=torch.float64)
    loss = mlp(x).sum()
    twin = copy.deepcopy(mlp)
    loss.backward()
    assert torch.equal(twin(x), mlp(x))
