"""A small model with an embedding and a head that may be tied, and token rows in it."""

from __future__ import annotations

import copy

import torch
from torch import nn

import lora_lab

V, H, WORDS = 20, 8, (7, 2, 11)  # in this order: row 0 is word 7's
IDS = torch.tensor([[2, 7, 7, 3, 0], [11, 5, 2, 19, 7], [1, 3, 5, 0, 9]])


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is multiplied, by a buffer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.embed_scale = nn.Buffer(torch.tensor(2.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Toy(nn.Module):
    """An embedding, a layer, a head that may have the embedding's weight."""

    def __init__(self, tied=False, embedding=nn.Embedding, bias=False, **kwargs):
        super().__init__()
        self.config = {"tie_word_embeddings": tied}
        self.embed = embedding(V, H, **kwargs)
        self.proj = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.proj(self.embed(ids)).tanh())


def toy(tied=False, dtype=torch.float64, **kwargs):
    return Toy(tied, **kwargs).to(dtype)


def trained(model, adapter="default"):
    """The adapter's tensors as after a training: all of them random."""
    for name, parameter in model.named_parameters():
        if name.endswith(f".{adapter}"):
            nn.init.normal_(parameter)
    return model


def with_rows(model, request=WORDS, adapter="default", **kwargs):
    kwargs = {"target_modules": ["proj"], "rank": 2, **kwargs}
    return trained(lora_lab.inject(model, trainable_token_indices=list(request) if isinstance(request, tuple) else request,
                                   adapter=adapter, **kwargs), adapter)  # fmt: skip


def replaced(base, rows, words=WORDS):
    """A copy of a model without adapters whose embedding has these rows, and all of it trains: what the adapter stands for."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.embed.weight[list(words)] = rows.to(model.embed.weight.dtype)
    return model


KINDS = {
    "untied": {}, "tied": {"tied": True}, "tied with a bias": {"tied": True, "bias": True},
    "a padding word": {"padding_idx": 2}, "tied, a padding word": {"tied": True, "padding_idx": 2},
    "scaled": {"embedding": Scaled}, "scaled and tied": {"embedding": Scaled, "tied": True},
    "scaled by frequency": {"scale_grad_by_freq": True},
}  # fmt: skip


def several(tied=False, dtype=torch.float64):
    """rows: rows and LoRA; pair: LoRA on the embedding; more: rows of other words alone."""
    model = with_rows(toy(tied, dtype), adapter="rows")
    trained(lora_lab.inject(model, rank=2, target_modules=["embed", "proj", "lm_head"], adapter="pair"), "pair")
    return with_rows(model, (3, 5), adapter="more", target_modules=[])
