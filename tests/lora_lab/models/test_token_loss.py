"""The loss of our own models, from hidden states and a head that takes trained rows, chunk by chunk; and training by it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from token_tools import trained
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lab
from lora_lab import LoraLabError
from lora_lab.models import LlamaConfig, LlamaForCausalLM, losses


def ours(tied=True):
    torch.manual_seed(3)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig.from_dict({**shape, "tie_word_embeddings": tied})).double().train()
    return trained(lora_lab.inject(model, rank=2, target_modules=["q_proj"], trainable_token_indices=[9, 4, 60]))


def batch(rows=4):
    ids = torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(5))
    ids[:, ::3] = torch.tensor([9, 4, 60, 9])
    return ids, torch.where(ids % 5 == 0, losses.IGNORE, ids)


def loss_of_logits(model, ids, labels):
    """The same, from all the logits."""
    y = model.eval()(ids).logits[:, :-1]
    model.train()
    return F.cross_entropy(y.reshape(-1, 64), labels[:, 1:].reshape(-1), ignore_index=losses.IGNORE)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [2, 1000])
def test_the_chunked_loss_takes_the_rows_of_a_tied_head(tied, hooked, chunk, monkeypatch):
    """With a hook on the head it is called, chunk by chunk; without one the rows go in beside the frozen weight."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", chunk * 4 * 64)
    model, (ids, labels) = ours(tied), batch()
    if hooked:
        model.lm_head.register_forward_hook(lambda *_: None)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine, exact = model(ids, labels=labels).loss, loss_of_logits(model, ids, labels)
    assert_close(mine, exact, rtol=0, atol=1e-13)
    assert_close(torch.autograd.grad(mine, parameters), torch.autograd.grad(exact, parameters), rtol=0, atol=1e-13)
    with lora_lab.disabled(model):
        assert abs(float((model(ids, labels=labels).loss - mine).detach())) > 0.01


class Largest(TorchDispatchMode):
    """The largest tensor an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_makes_nothing_of_the_size_of_the_embedding(tied, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2 * 4 * 5000)
    shape = {"vocab_size": 5000, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig.from_dict({**shape, "tie_word_embeddings": tied})).train()
    lora_lab.inject(model, target_modules=[], trainable_token_indices=[7, 9])
    ids = torch.full((2, 8), 9)
    with Largest() as largest:
        model(ids, labels=ids).loss.backward()
    assert 0 < largest.numel <= 2 * 5000 < 5000 * 64
    assert model.model.embed_tokens.lora_tokens["default"].grad.abs().max() > 0


@pytest.mark.parametrize("head", ["tied rows", "LoRA"])
def test_per_sample_loss_is_that_of_the_rows_one_by_one(head):
    """Labelled positions of all rows lie one after the other there: each still has its own row's adapter."""
    model = ours()
    more = {"trainable_token_indices": [9, 5]} if head == "tied rows" else {}
    trained(lora_lab.inject(model, rank=2, target_modules=["q_proj", *([] if more else ["lm_head"])], adapter="b", **more), "b")
    ids, labels = batch()
    names, parameters = ["b", "default", None, "b"], [p for n, p in model.named_parameters() if ".lora_" in n]
    for p in parameters:
        p.requires_grad_(True)
    with lora_lab.per_sample(model, names):
        together = model(ids, labels=labels).loss
        gradients = torch.autograd.grad(together, parameters)
    parts = []
    for name, row, label in zip(names, ids, labels, strict=True):
        lora_lab.use(model, name)
        parts.append(loss_of_logits(model, row[None], label[None]) * (label[1:] != losses.IGNORE).sum())
    exact = sum(parts) / (labels[:, 1:] != losses.IGNORE).sum()
    assert_close(together, exact, rtol=0, atol=1e-13)
    assert_close(gradients, torch.autograd.grad(exact, parameters), rtol=0, atol=1e-13)


def test_fit_trains_rows():
    model = lora_lab.inject(lora_lab.eject(ours()).float(), target_modules=[], trainable_token_indices=[9, 4, 60])
    frozen, (ids, labels) = copy.deepcopy(model.model.embed_tokens.weight), batch()
    rows = [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in zip(ids, labels, strict=True)]
    result = lora_lab.training.fit(model, rows, {"max_steps": 20, "learning_rate": 0.05, "micro_batch_size": 4})
    assert result.losses[-1] < result.losses[0] - 0.05 and torch.equal(model.model.embed_tokens.weight, frozen)


def test_fit_stops_where_rows_get_no_gradient():
    model = ours(tied=False).float()
    model.model.embed_tokens.register_forward_hook(lambda module, ids, output: output.detach())
    rows = [{"input_ids": i.tolist(), "labels": i.tolist()} for i in batch()[0]]
    with pytest.raises(LoraLabError, match=r"'model.embed_tokens' ran, but its lora_tokens got no gradient"):
        lora_lab.training.fit(model, rows, {"max_steps": 2, "micro_batch_size": 4})
