"""The checks of notebook 02: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import torch
from check_tools import each_gets_its_own
from torch import nn

from course.checks import lora_by_hand as check


def test_trainable_weights():
    each_gets_its_own(
        check.trainable_weights,
        right=[lambda i, o, r: r * (i + o), lambda i, o, r: float(i * r + r * o)],
        wrong={
            "is W itself": lambda i, o, r: i * o,
            "counts W as well": lambda i, o, r: i * o + r * (i + o),
            "A alone": lambda i, o, r: r * i,
            "B alone": lambda i, o, r: r * o,
            "multiplied": lambda i, o, r: i * r * o,
            "is saved": lambda i, o, r: i * o - r * (i + o),
            "as many weights as A": lambda i, o, r: 2 * r * i,
            "use the arguments": lambda i, o, r: 4_608,
            "it says 72": lambda i, o, r: o + r,
            "NameError": lambda i, o, r: rank * (i + o),  # noqa: F821
            "without calling it": 4_608,
        },
    )


def test_smollm2_count():
    each_gets_its_own(
        check.smollm2_count,
        right=[921_600, torch.tensor(921_600), 30 * 16 * (576 + 576) + 30 * 16 * (576 + 192)],
        wrong={"one layer": 30_720, "q_proj alone": 552_960, "v_proj alone": 368_640, "grouped queries": 1_105_920, "frozen weights": 13_271_040,
               "rank 8": 460_800, "is not it": 900_000},
    )  # fmt: skip


def test_forward():
    each_gets_its_own(
        check.forward,
        right=[lambda x, W, A, B, a: x @ W.T + a / len(A) * x @ A.T @ B.T, lambda x, W, A, B, a: nn.functional.linear(x, W + a / len(A) * B @ A)],
        wrong={
            "frozen layer alone": lambda x, W, A, B, a: x @ W.T,
            "update alone": lambda x, W, A, B, a: a / len(A) * x @ A.T @ B.T,
            "scaling is missing": lambda x, W, A, B, a: x @ W.T + x @ A.T @ B.T,
            "divide by the rank": lambda x, W, A, B, a: x @ W.T + a * x @ A.T @ B.T,
            "upside down": lambda x, W, A, B, a: x @ W.T + len(A) / a * x @ A.T @ B.T,
            "belongs to the update only": lambda x, W, A, B, a: a / len(A) * (x @ W.T + x @ A.T @ B.T),
            "subtracted": lambda x, W, A, B, a: x @ W.T - a / len(A) * x @ A.T @ B.T,
            "RuntimeError": lambda x, W, A, B, a: x @ W + x @ A @ B,
            "the shape [5, 3]": lambda x, W, A, B, a: W @ x.T,
        },
    )


def test_begin():
    each_gets_its_own(
        check.begin,
        right=[lambda i, o, r: (torch.randn(r, i), torch.zeros(o, r)), lambda i, o, r: [nn.Parameter(torch.rand(r, i)), torch.zeros(o, r)]],
        wrong={
            "both are zero": lambda i, o, r: (torch.zeros(r, i), torch.zeros(o, r)),
            "other way round": lambda i, o, r: (torch.zeros(r, i), torch.randn(o, r)),
            "B is not zero": lambda i, o, r: (torch.randn(r, i), torch.randn(o, r)),
            "rows of A are alike": lambda i, o, r: (torch.ones(r, i), torch.zeros(o, r)),
            "each other's place": lambda i, o, r: (torch.zeros(o, r), torch.randn(r, i)),
            "[inputs, rank]": lambda i, o, r: (torch.randn(i, r), torch.zeros(r, o)),
            "two tensors": lambda i, o, r: torch.randn(r, i),
            "no number": lambda i, o, r: (torch.full((r, i), torch.nan), torch.zeros(o, r)),
        },
    )


def in_place(W, A, B, alpha):
    W += alpha / len(A) * B @ A
    return W


def test_merge():
    each_gets_its_own(
        check.merge,
        right=[lambda W, A, B, a: W + a / len(A) * B @ A],
        wrong={
            "as it was": lambda W, A, B, a: W,
            "update alone": lambda W, A, B, a: a / len(A) * B @ A,
            "is missing": lambda W, A, B, a: W + B @ A,
            "divide by the rank": lambda W, A, B, a: W + a * B @ A,
            "takes the update out": lambda W, A, B, a: W - a / len(A) * B @ A,
            "in place": in_place,
            "the transpose": lambda W, A, B, a: (W + a / len(A) * B @ A).T,
            "RuntimeError": lambda W, A, B, a: W + A @ B,
        },
    )


def by_svd(columns=slice, power=1.0):
    def pair(delta, rank):
        U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
        return Vh[columns(rank)], U[:, columns(rank)] * values[columns(rank)] ** power

    return pair


def balanced(delta, rank):
    U, values, Vh = torch.linalg.svd(delta)
    return values[:rank, None].sqrt() * Vh[:rank], U[:, :rank] * values[:rank].sqrt()


def test_best_pair():
    each_gets_its_own(
        check.best_pair,
        right=[by_svd(), balanced],
        wrong={
            "weakest": by_svd(lambda rank: slice(-rank, None)),
            "are missing": by_svd(power=0.0),
            "squared": by_svd(power=2.0),
            "square roots": by_svd(power=0.5),
            "each other's place": lambda delta, rank: by_svd()(delta, rank)[::-1],
            "misses delta by": lambda delta, rank: (torch.randn(rank, 10), torch.zeros(8, rank)),
            "the shape [4, 10]": lambda delta, rank: by_svd()(delta, rank + 1),
        },
    )


class Layer(nn.Module):
    def __init__(self, base, rank, scaling=1.0, fill=0.0, used=True):
        super().__init__()
        self.base, self.scaling, self.used = base, scaling, used
        self.A = nn.Parameter(torch.randn(rank, base.in_features))
        self.B = nn.Parameter(torch.full((base.out_features, rank), fill))

    def forward(self, x):
        return self.base(x) + (self.scaling * x @ self.A.T @ self.B.T if self.used else 0)


def injecting(freeze=True, nested=True, everything=False, rank=None, **layer):
    def inject(model, given, targets):
        model.requires_grad_(not freeze)
        for parent in list(model.modules()) if nested else [model.first]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and name != "base" and (everything or name in targets):
                    setattr(parent, name, Layer(child, rank or given, **layer))
        return model

    return inject


def no_setattr(model, rank, targets):
    """What many write first: the loop variable is replaced, the model is not."""
    model.requires_grad_(False)
    for name, child in model.named_modules():
        if name.endswith(tuple(targets)):
            child = Layer(child, rank)
    return model


def test_inject():
    each_gets_its_own(
        check.inject,
        right=[injecting()],
        wrong={
            "must begin at zero": injecting(fill=0.5),
            "still trains": injecting(freeze=False),
            "only first.q_proj, first.v_proj were": injecting(nested=False),
            "only the targets": injecting(everything=True),
            "nothing trains": no_setattr,
            "should train 24": injecting(rank=3),
            "does not use them": injecting(used=False),
            "another function": injecting(scaling=2.0),
            "return model": lambda model, rank, targets: "model",
        },
    )
