"""The exercises of notebook 02, LoRA by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import NotYet, check, equal, expect, number, refuse, result, tensor

# 1 and 2: counting ----------------------------------------------------------------------------------------------------------------


@check
def trainable_weights(answer: Any) -> str:
    """answer(inputs, outputs, rank) -> how many weights a LoRA layer trains."""
    count = number(result(answer, 512, 64, 8), "your count for 512 -> 64 at rank 8")
    refuse(count, {
        512 * 64: "32,768 is W itself, and W is frozen: count what is in A and B",
        512 * 64 + 4_608: "that counts W as well, which is frozen: A and B alone train",
        8 * 512: "4,096 is A alone: B trains, too",
        8 * 64: "512 is B alone: A trains, too",
        8 * 512 * 64: "the sizes of A and B are multiplied with each other somewhere: two matrices beside each other add up",
        512 * 64 - 4_608: "28,160 is what is saved, not what trains",
        2 * 8 * 512: "that gives B as many weights as A: B goes from the rank to the outputs",
    })  # fmt: skip
    expect(count == 4_608, f"for 512 -> 64 at rank 8 it says {count:,.0f}: A is [rank, inputs], B is [outputs, rank]; count the numbers in both")
    other = number(result(answer, 100, 300, 4), "your count for 100 -> 300 at rank 4")
    expect(other == 1_600, f"right for 512 -> 64, but for 100 -> 300 at rank 4 it says {other:,.0f}: use the arguments, not the example's numbers")
    return "rank × (inputs + outputs): 4,608 instead of 32,768, 85.9 % fewer. It grows with the sum of the sides, W with their product."


@check
def smollm2_count(answer: Any) -> str:
    """answer: the number of weights that rank 16 on q_proj and v_proj of all 30 layers trains; q is 576 -> 576, v 576 -> 192."""
    count, query, value = number(answer, "your number"), 16 * (576 + 576), 16 * (576 + 192)
    refuse(count, {
        query + value: "that is one layer: there are 30",
        30 * query: "that is q_proj alone: v_proj has its own A and B",
        30 * value: "that is v_proj alone: q_proj has its own A and B",
        30 * 2 * query: "you took v_proj to be as large as q_proj: with grouped queries 3 heads of keys and values serve 9 of queries, "
                        "so v_proj ends in 192. (One of the lectures' slides stumbles over the same thing in Llama-2-70B.)",
        30 * (576 * 576 + 576 * 192): "those are the frozen weights of the layers: count A and B",
        30 * (query + value) // 2: "that is rank 8: here the rank is 16",
    })  # fmt: skip
    expect(count == 30 * (query + value), f"{count:,.0f} is not it: 30 layers × rank 16 × (inputs + outputs), for q_proj and for v_proj")
    return "921,600: less than 0.7 % of the model's 134.5 million."


# 3 to 5: the three formulas -----------------------------------------------------------------------------------------------------


@check
def forward(answer: Any) -> str:
    """answer(x, W, A, B, alpha) -> W x + alpha / rank * B A x, for rows x."""
    x, W, A, B = torch.randn(3, 6), torch.randn(5, 6), torch.randn(4, 6), torch.randn(5, 4)
    base, update, alpha = x @ W.T, x @ A.T @ B.T, 8.0
    y = tensor(result(answer, x, W, A, B, alpha), (3, 5), "what your function returns for x [3, 6] and W [5, 6]")
    for wrong, words in (
        (base, "that is the frozen layer alone: the path through A and B is missing"),
        (2 * update, "that is the update alone: W x belongs to it"),
        (base + update, "the scaling is missing: the update counts alpha / rank times, here 8 / 4"),
        (base + alpha * update, "the update counts alpha times: divide by the rank, so that another rank needs no other learning rate"),
        (base + update / 2, "the scaling is upside down: alpha / rank"),
        (2 * (base + update), "the scaling belongs to the update only: W x is what it was"),
        (base - 2 * update, "the update is subtracted: it is added"),
    ):
        expect(not equal(y, wrong), words)
    expect(equal(y, base + 2 * update), "the numbers are others than W x + alpha / rank * B (A x): first A, then B, then the scaling")
    return "W x + alpha / rank · B A x. The two small products never form a matrix as large as W."


@check
def begin(answer: Any) -> str:
    """answer(inputs, outputs, rank) -> (A, B), as LoRA begins."""
    pair = result(answer, 12, 7, 3)
    expect(isinstance(pair, (tuple, list)) and len(pair) == 2, "expected two tensors: return A, B")
    A, B = pair
    expect(isinstance(A, Tensor) and isinstance(B, Tensor), "expected two tensors: return A, B")
    expect(tuple(A.shape) != (7, 3) or tuple(B.shape) != (3, 12), "A and B are returned in each other's place: A reads the input, return A, B")
    expect(tuple(A.shape) != (12, 3), "A is [inputs, rank]: as PyTorch keeps weights, it is [rank, inputs]")
    A, B = tensor(A, (3, 12), "A, for 12 -> 7 at rank 3,"), tensor(B, (7, 3), "B, for 12 -> 7 at rank 3,")
    expect(A.any() or B.any(), "both are zero: then the gradient of A (which goes through B) and that of B (which goes through A) are zero, and "
                               "nothing ever learns")  # fmt: skip
    expect(A.any(), "A is zero and B is random: step 0 is right, too, but LoRA does it the other way round (section 4.1 of the paper)")
    expect(not B.any(), "B is not zero: the first step would begin from another model than the one you have")
    expect(bool(torch.isfinite(A).all()), "A holds what is no number")
    alike = equal(A[0], A[1]) and equal(A[0], A[2])
    expect(not alike, "all rows of A are alike: they get the same gradients, stay alike, and your rank 3 is a rank of 1: draw them at random")
    return "A random, B zero: B A is zero, so step 0 is the old model, and yet B has a gradient from the first step on."


@check
def merge(answer: Any) -> str:
    """answer(W, A, B, alpha) -> the weight that does all of it, a new tensor."""
    W, A, B, alpha = torch.randn(5, 6), torch.randn(4, 6), torch.randn(5, 4), 8.0
    kept = W.clone()
    merged = result(answer, W, A, B, alpha)
    expect(not (isinstance(merged, Tensor) and tuple(merged.shape) == (6, 5)), "that is the transpose: PyTorch keeps weights as [outputs, inputs]")
    merged = tensor(merged, (5, 6), "the merged weight for W [5, 6]")
    for wrong, words in (
        (W if equal(W, kept) else kept, "that is W as it was: add the update"),
        (2 * B @ A, "that is the update alone: add it to W"),
        (kept + B @ A, "the scaling alpha / rank is missing, here 8 / 4"),
        (kept + alpha * B @ A, "the update counts alpha times: divide by the rank"),
        (kept - 2 * B @ A, "that takes the update out: merging adds it"),
    ):
        expect(not equal(merged, wrong), words)
    expect(equal(merged, kept + 2 * B @ A), "the numbers are others than W + alpha / rank * B @ A")
    expect(equal(W, kept, 0.0), "right, but W itself was changed (`+=` works in place): keep it, so that the next task can start from it")
    return "W + alpha / rank · B A, one matrix as large as W: a merged model costs nothing extra."


# 6: the best two matrices --------------------------------------------------------------------------------------------------------


@check
def best_pair(answer: Any) -> str:
    """answer(delta, rank) -> (A, B), the closest to delta that this rank allows."""
    delta, rank = torch.randn(8, 10), 3
    U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
    pair = result(answer, delta, rank)
    expect(isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(each, Tensor) for each in pair), "expected two tensors: return A, B")
    expect(tuple(pair[0].shape) != (8, 3), "A and B are returned in each other's place: return A [rank, inputs], then B [outputs, rank]")
    A, B = tensor(pair[0], (3, 10), "A, for a delta [8, 10] and rank 3,"), tensor(pair[1], (8, 3), "B, for a delta [8, 10] and rank 3,")
    product = B @ A
    for weights, columns, words in (
        (values, slice(-rank, None), "those are the weakest directions: torch.linalg.svd gives the strongest first"),
        (torch.ones_like(values), slice(rank), "the singular values are missing: U and V have length 1, the values say how far to go"),
        (values.square(), slice(rank), "the singular values are in A and in B, so they come squared: give each the square root, or one all"),
        (values.sqrt(), slice(rank), "the product has the square roots of the singular values: they belong into A and into B, or whole into one"),
    ):
        expect(not equal(product, U[:, columns] * weights[columns] @ Vh[columns]), words)
    least, left = float(values[rank:].square().sum()), float((delta - product).square().sum())
    expect(left <= least * 1.001, f"B A misses delta by {left:.2f} (squares summed), the best of rank 3 by {least:.2f}: take the first 3 columns of "
                                  "U, rows of Vh and singular values")  # fmt: skip
    return "what is missed is the sum of the squares of the singular values left out, and no other pair of this rank misses less."


# 7: all of it -------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o_proj(torch.tanh(self.q_proj(x)[..., :3]) * self.v_proj(x))


class Small(nn.Module):
    """Two blocks, one of them deeper inside, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deeper, self.head = Block(), nn.ModuleDict({"second": Block()}), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deeper["second"](self.first(x)))


TARGETS = ("q_proj", "v_proj")
PATHS = ("first.q_proj", "first.v_proj", "deeper.second.q_proj", "deeper.second.v_proj")


@check
def inject(answer: Any) -> str:
    """answer(model, rank, targets) -> the model, its layers of these names with LoRA of scaling 1, all else frozen."""
    base, x = Small(), torch.randn(5, 6)
    model = result(answer, copy.deepcopy(base), 2, TARGETS)
    expect(isinstance(model, nn.Module), "expected the model back: return model")
    expect(equal(model(x), base(x), 1e-6), "the model computes something else already: B must begin at zero, and the bias must stay")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expect(trained, "nothing trains: are A and B nn.Parameters, made after the freezing?")
    _frozen(trained, base)
    reached = {path for path in PATHS if any(name.startswith(path + ".") for name in trained)}
    others = [name for name in trained if name.startswith("head") or "o_proj" in name]
    expect(not others, "the head or o_proj has LoRA, too: only the targets were asked for")
    expect(reached, "no layer was reached: put the new module in its parent's place with setattr(parent, name, new)")
    expect(len(reached) == len(PATHS), f"only {', '.join(sorted(reached))} {'was' if len(reached) == 1 else 'were'} reached: the model is nested, "
                                       "go through model.modules(), and through the children of each")  # fmt: skip
    counts = {path: sum(parameter.numel() for name, parameter in trained.items() if name.startswith(path + ".")) for path in PATHS}
    expected = {path: 2 * (6 + (6 if path.endswith("q_proj") else 3)) for path in PATHS}
    expect(counts == expected, f"at rank 2 {PATHS[0]} should train {expected[PATHS[0]]} weights and {PATHS[1]} {expected[PATHS[1]]}; here it is "
                               f"{counts[PATHS[0]]} and {counts[PATHS[1]]}")  # fmt: skip
    _same_as_sum(model, base, trained, x)
    return "frozen, two small matrices in each target, nothing changed at step 0, and the update is B A. That is LoRA, from memory."


def _frozen(trained: dict[str, nn.Parameter], base: nn.Module) -> None:
    frozen_shapes = {tuple(parameter.shape) for parameter in base.parameters()}
    heavy = [name for name, parameter in trained.items() if name.endswith(("weight", "bias")) and tuple(parameter.shape) in frozen_shapes]
    if heavy:
        raise NotYet(f"{heavy[0]} still trains: freeze the model first, model.requires_grad_(False), then add A and B")


@torch.no_grad()
def _same_as_sum(model: nn.Module, base: nn.Module, trained: dict[str, nn.Parameter], x: Tensor) -> None:
    """With B at random the model must be the base with W + B A."""
    wanted = copy.deepcopy(base)
    for path in PATHS:
        outputs, inputs = wanted.get_submodule(path).weight.shape  # type: ignore[union-attr]
        pair = [parameter for name, parameter in trained.items() if name.startswith(path + ".")]
        A = next((each for each in pair if tuple(each.shape) == (2, inputs)), None)
        B = next((each for each in pair if tuple(each.shape) == (outputs, 2) and each is not A), None)
        if A is None or B is None:
            raise NotYet(f"{path} has the shapes {[list(each.shape) for each in pair]}: expected A [2, {inputs}] and B [{outputs}, 2]")
        B.copy_(torch.randn_like(B))
        wanted.get_submodule(path).weight += B @ A  # type: ignore[operator, union-attr]
    expect(not equal(model(x), base(x)), "training would change nothing: A and B are there, but forward does not use them")
    expect(equal(model(x), wanted(x)), "with B at random it is another function than with W + B @ A: scaling 1, first A, then B, and the base beside")
