"""The loss on labelled tokens only, chunk by chunk: the same number and the same gradients as cross-entropy over everything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from llama_tools import saved_for_backward
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError
from lora_lab.models import losses
from lora_lab.models.blocks import is_plain
from lora_lab.models.losses import LinearCrossEntropy, next_token_loss

B, T, H, V = 3, 7, 8, 20


def setup(bias=True, dtype=torch.float64):
    """hidden [B, T, H], labels [B, T] with some at -100, a head."""
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) < 0.4] = losses.IGNORE
    labels[0, 0] = 5  # the first label is never predicted
    return torch.randn(B, T, H, dtype=dtype, requires_grad=True), labels, nn.Linear(H, V, bias=bias, dtype=dtype)


def reference(hidden, labels, head):
    """transformers' ForCausalLMLoss: shift, flatten, mean over labels that are not -100."""
    return F.cross_entropy(head(hidden)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100)


def with_gradients(loss, hidden, head):
    return (loss, *torch.autograd.grad(loss, [hidden, *head.parameters()]))


@pytest.fixture(params=[1, 3, 1000], ids="{} rows a chunk".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", request.param * 4 * V)
    return request.param


def lora_head(head):
    model = nn.Module()
    model.lm_head = head
    lora_lab.inject(model, rank=2, target_modules=["lm_head"], init="random")
    assert not is_plain(head)
    return head


def hooked_head(head):
    head.register_forward_hook(lambda module, inputs, output: output * 2)
    return head


def patched_head(head):
    plain = head.forward
    head.forward = lambda x: plain(x).tanh()
    return head


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_cross_entropy(chunk, bias):
    hidden, labels, head = setup(bias)
    assert is_plain(head)
    actual = with_gradients(next_token_loss(hidden, labels, head), hidden, head)
    assert_close(actual, with_gradients(reference(hidden, labels, head), hidden, head), rtol=0, atol=1e-13)
    assert actual[1].abs().max() > 1e-3


@pytest.mark.parametrize("change", [lora_head, hooked_head, patched_head])
def test_a_head_that_is_more_than_a_matrix_is_called_as_it_is(chunk, change):
    hidden, labels, head = setup()
    plain = float(reference(hidden, labels, head).detach())
    head = change(head)
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    actual = with_gradients(next_token_loss(hidden, labels, head), hidden, head)
    assert_close(actual, with_gradients(reference(hidden, labels, head), hidden, head), rtol=0, atol=1e-13)
    assert abs(float(actual[0].detach()) - plain) > 1e-3  # the change matters


def test_backward_hooks_on_the_head_run():
    hidden, labels, head = setup()
    seen = []
    head.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(True))
    next_token_loss(hidden, labels, head).backward()
    assert seen


def test_the_recompute_of_an_adapted_head_sees_the_selection_of_its_forward():
    """`with disabled(model)` left before backward() must not change the gradients."""
    hidden, labels, head = setup()
    expected = torch.autograd.grad(reference(hidden, labels, head), hidden)[0]
    model = nn.Module()
    model.lm_head = head
    lora_lab.inject(model, rank=2, target_modules=["lm_head"], init="random")
    with lora_lab.disabled(model):
        loss = next_token_loss(hidden, labels, head)
    assert_close(torch.autograd.grad(loss, hidden)[0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("where", ["nowhere", "everywhere", "first only", "last only", "one row"])
def test_labels_may_be_missing_anywhere(where, chunk):
    hidden, _, head = setup()
    labels = torch.full((B, T), losses.IGNORE)
    places = {"nowhere": (slice(0), slice(0)), "everywhere": (slice(None), slice(None)), "first only": (slice(None), slice(0, 1)),
              "last only": (slice(None), slice(-1, None)), "one row": (slice(1, 2), slice(None))}  # fmt: skip
    labels[places[where]] = 3
    actual = with_gradients(next_token_loss(hidden, labels, head), hidden, head)
    if where in ("nowhere", "first only"):  # nothing to predict: PyTorch's mean would be NaN
        assert all(torch.equal(value, torch.zeros_like(value)) for value in actual)
    else:
        assert_close(actual, with_gradients(reference(hidden, labels, head), hidden, head), rtol=0, atol=1e-13)


def test_a_called_head_without_labels_gives_zero_too():
    hidden, _, head = setup()
    loss = next_token_loss(hidden, torch.full((B, T), losses.IGNORE), hooked_head(head))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_a_sequence_of_one_token_has_nothing_to_predict():
    hidden, _, head = setup()
    assert float(next_token_loss(hidden[:, :1], torch.ones(B, 1, dtype=torch.long), head).detach()) == 0.0


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_only_what_trains_gets_a_gradient(frozen):
    hidden, labels, head = setup(bias=False)
    head.requires_grad_(frozen == "hidden")
    hidden = hidden.detach().requires_grad_(frozen == "weight")
    loss = next_token_loss(hidden, labels, head)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        assert (head.weight.grad is None, hidden.grad is None) == (frozen == "weight", frozen == "hidden")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_16_bit_is_close_to_float64_and_the_loss_is_float32(dtype, how, chunk):
    hidden, labels, head = setup(dtype=torch.float32)
    expected = with_gradients(reference(hidden.double(), labels, head.double()), hidden, head)
    head.float()
    if how == "weights":
        head, hidden = head.to(dtype), hidden.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        loss = next_token_loss(hidden, labels, head)
    assert loss.dtype == torch.float32
    for mine, exact in zip(with_gradients(loss, hidden, head), expected, strict=True):
        assert float(((mine.double() - exact).norm() / exact.norm()).detach()) < 0.02


def test_the_upstream_gradient_multiplies():
    """Gradient accumulation divides the loss; a chunked gradient made in forward must follow."""
    hidden, labels, head = setup()
    whole = torch.autograd.grad(next_token_loss(hidden, labels, head), hidden)[0]
    assert_close(torch.autograd.grad(next_token_loss(hidden, labels, head) * -0.25, hidden)[0], -0.25 * whole)


@pytest.mark.parametrize("change", [None, hooked_head])
def test_no_logits_are_kept_for_backward(change, monkeypatch):
    """What is kept grows with the hidden size, not with the vocabulary."""
    wide, rows = 5000, 7 * 8
    hidden, head = torch.randn(8, 8, H, requires_grad=True), nn.Linear(H, wide)
    head.requires_grad_(False)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * wide * 5)
    with saved_for_backward() as kept:
        next_token_loss(hidden, torch.randint(0, wide, (8, 8)), change(head) if change else head)
    largest = max((size for address, size in kept.items() if address != head.weight.data_ptr()), default=0)
    assert largest <= 4 * max(rows * H, 8 * 8 * H, wide) < 4 * rows * wide / 10


def test_no_gradients_are_made_where_none_are_wanted(monkeypatch):
    """ctx.needs_input_grad is true under no_grad, too: evaluating a model whose head trains must not pay for two more products."""
    asked = []
    original = LinearCrossEntropy.forward
    monkeypatch.setattr(LinearCrossEntropy, "forward", staticmethod(lambda ctx, *a: asked.append(ctx.needs_input_grad[:3]) or original(ctx, *a)))
    hidden, labels, head = setup()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            next_token_loss(hidden, labels, head)
    assert asked == [(False,) * 3, (False,) * 3, (True,) * 3]


def test_differentiating_twice_is_refused_rather_than_wrong():
    hidden, labels, head = setup()
    slope = torch.autograd.grad(next_token_loss(hidden, labels, head), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiat|does not require grad"):
        torch.autograd.grad(slope.sum(), hidden)


def test_a_label_outside_the_vocabulary_is_an_error_of_the_model():
    model = lora_lab.models.LlamaForCausalLM(lora_lab.models.LlamaConfig.from_dict(
        {"vocab_size": V, "hidden_size": H, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}))  # fmt: skip
    tokens = torch.zeros(1, 4, dtype=torch.long)
    for wrong in (V, -1):
        with pytest.raises(LoraLabError, match=f"labels has the id {wrong}"):
            model(input_ids=tokens, labels=torch.full_like(tokens, wrong))
