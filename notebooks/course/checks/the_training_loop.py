"""The exercises of notebook 03, the training loop."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import NotYet, check, equal, expect, number, refuse, result, tensor

# 1: a step -----------------------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """A model with the arguments and the output of a language model, and a loss that one weight decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=(self.weight * x - labels).square().mean())


@check
def one_step(answer: Any) -> str:
    """answer(model, batch, optimizer) -> the loss, after one step of the optimizer."""
    batch, rate = {"x": torch.tensor([1.0, 2.0]), "labels": torch.tensor([1.0, 1.0])}, 0.1
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    weights, losses, returned = [2.0], [], []
    for _ in range(3):
        returned.append(result(answer, model, batch, optimizer))
        weights.append(model.weight.item())
        losses.append((weights[-2] * batch["x"] - batch["labels"]).square().mean().item())
    right = [2.0]
    for _ in range(3):
        right.append(right[-1] - rate * (5 * right[-1] - 3))
    added = [2.0, 1.3, 1.3 - 0.1 * (7 + 3.5)]
    expect(weights[1] != 2.0, "no weight has moved: does backward come before optimizer.step(), and are the gradients still there when it steps?")
    expect(not equal(weights[1], 2.7), "the weight goes uphill: optimizer.step() subtracts already, so the loss is not to be turned round")
    expect(not equal(weights[2], added[2]), "the second step used the first one's gradient as well: backward() adds, so call optimizer.zero_grad()")
    expect(not equal(weights[1], right[2]), "it steps twice: one call is one step")
    expect(all(equal(a, b) for a, b in zip(weights, right, strict=True)), f"the weight goes {_list(weights)}, it should go {_list(right)}: forward, "
                                                                         "backward, step, and the gradients go")  # fmt: skip
    expect(not (isinstance(returned[0], Tensor) and returned[0].requires_grad), "right, but the loss you return holds on to everything that backward "
                                                                                "needs: return loss.item()")  # fmt: skip
    found = [number(value, "what it returns") for value in returned]
    expect(all(equal(a, b) for a, b in zip(found, losses, strict=True)), "the weight is right, but what it returns is not the loss of this step")
    return "forward, backward, step, and the gradients go. Every trainer is made of this."


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


# 2: loss scaling ------------------------------------------------------------------------------------------------------------------


BAD = {
    torch.inf: "one gradient is infinite, and the step is taken: every weight would be infinite after it",
    -torch.inf: "a gradient of minus infinity gets through: torch.isfinite knows both signs",
    torch.nan: "one gradient is nan, and the step is taken: infinity minus infinity gives that, so look for both (torch.isfinite)",
}


@check
def unscale(answer: Any) -> str:
    """answer(gradients, scale) -> (gradients, scale): divided and unchanged, or None and halved."""
    scale, gradients = 1024.0, [torch.tensor([512.0, -2048.0]), torch.tensor([[1024.0]])]
    true = [gradient / scale for gradient in gradients]
    found, kept = _pair(result(answer, [g.clone() for g in gradients], scale))
    expect(found is not None, "these gradients are all finite, and the step is skipped: skip only for infinity and nan")
    expect(isinstance(found, (list, tuple)) and len(found) == 2, "expected a list with as many gradients as there were")
    values = [tensor(value, tuple(g.shape), "a gradient that you return") for value, g in zip(found, gradients, strict=True)]
    expect(not all(equal(v, g) for v, g in zip(values, gradients, strict=True)), "the gradients are still times the scale: divide them by it")
    expect(not all(equal(v, g * scale) for v, g in zip(values, gradients, strict=True)), "multiplied once more: divide by the scale")
    right = all(equal(v, t) for v, t in zip(values, true, strict=True))
    expect(right, "these are not the gradients of the loss without its scale: divide each by it")
    expect(equal(number(kept, "the scale"), scale), f"all is finite, so the scale stays {scale:g}; it returns {float(kept):g}")
    _overflow(answer, gradients, scale)
    return "divide, or skip and halve. PyTorch's GradScaler does the same, and doubles the scale again after 2,000 good steps."


def _overflow(answer: Any, gradients: list[Tensor], scale: float) -> None:
    """With one bad number in either tensor the step is skipped."""
    for bad, words in BAD.items():
        for place in (0, 1):
            spoiled = [g.clone() for g in gradients]
            spoiled[place].view(-1)[-1] = bad
            found, lower = _pair(result(answer, spoiled, scale))
            expect(found is None, words if place == 0 else "it looks at the first tensor only: one bad tensor anywhere spoils the step")
            refuse(number(lower, "the scale"), {
                scale: "the step is skipped, but the scale stays: the next one would overflow, too; halve it",
                2 * scale: "the scale is doubled after an overflow: it was too large already, halve it",
            })  # fmt: skip
            expect(equal(lower, scale / 2), f"after an overflow the scale should be {scale / 2:g}, it is {float(lower):g}")


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise NotYet("expected two things: return gradients, scale")
    return value[0], value[1]


# 3: rounding ----------------------------------------------------------------------------------------------------------------------


COUNT = 20_000


@check
def round_by_chance(answer: Any) -> str:
    """answer(x, step) -> multiples of step next to x, right on average."""
    for value, step in ((0.3, 1.0), (2.75, 1.0), (-0.4, 1.0), (0.6, 0.5)):
        x = torch.full((COUNT,), value)
        y = tensor(result(answer, x, step), (COUNT,), f"what it returns for {COUNT:,} numbers").double()
        expect(bool((x == torch.full_like(x, value)).all()), "right or not, it changes x itself: make a new tensor")
        _neighbours(y, value, step)
        _chances(y, value, step)
    exact = tensor(result(answer, torch.tensor([3.0, -2.0]), 1.0), (2,), "what it returns for two numbers")
    expect(equal(exact.double(), torch.tensor([3.0, -2.0])), "a number that is a multiple already has to stay what it is")
    drawn = tensor(result(answer, torch.full((200,), 0.5), 1.0), (200,)).double()
    expect(0 < float(drawn.mean()) < 1, "all numbers of a tensor are rounded by the same chance: draw one for each (torch.rand_like)")
    return "each result is coarse, and the mean is right: small updates arrive, now and then a whole step at once."


def _neighbours(y: Tensor, value: float, step: float) -> None:
    """Every y is one of the two multiples next to the value, and both are there."""
    whole, lower = y / step, math.floor(value / step)
    found = ", ".join(f"{each:g}" for each in sorted({round(each, 3) for each in y.tolist()})[:3])
    why = "the result has to be rounded" if step == 1.0 else "divide by the step before rounding, and multiply after it"
    expect(float((whole - whole.round()).abs().max()) < 1e-4, f"{found} are not multiples of {step:g}: {why}")
    kinds = {int(each) for each in whole.round().tolist()}
    allowed = f"only its two neighbours are allowed, {lower * step:g} and {(lower + 1) * step:g}"
    expect(kinds <= {lower, lower + 1}, f"{value:g} becomes {found} at a step of {step:g}: {allowed}")
    only = min(kinds)
    why = "to the nearest, by which small updates are lost" if only == round(value / step) else "always in one direction, which drifts"
    expect(len(kinds) == 2, f"{value:g} always becomes {only * step:g}: that is rounding {why}")


def _chances(y: Tensor, value: float, step: float) -> None:
    """The mean of y is the value."""
    mean, lower = float(y.mean()), math.floor(value / step)
    share = value / step - lower
    near = 0.02 * step
    expect(abs(mean - (lower + 0.5) * step) > near, f"{value:g} goes up and down equally often: up must come the more often the nearer it is")
    expect(abs(mean - (lower + 1 - share) * step) > near, f"the mean of {value:g} is {mean:.2f}: the chances are exchanged, the nearer number must "
                                                          "come more often")  # fmt: skip
    expect(abs(mean - value) < near, f"the mean of many roundings of {value:g} is {mean:.3f}: the share that is left over is the chance to go up")


# 4 and 5: numbers -----------------------------------------------------------------------------------------------------------------


@check
def kept_bytes(answer: Any) -> str:
    """answer(blocks, input_bytes, inside_bytes) -> alive at the worst moment of backward, with every block checkpointed."""
    size = number(result(answer, 30, 1_000, 20_000), "your number of bytes for 30 blocks")
    refuse(size, {
        30 * (1_000 + 20_000): "that is without checkpointing: the inside of a block is kept only while that block is run again",
        30 * 20_000: "that is without checkpointing, and without the inputs",
        30 * 1_000: "while a block is run again, its inside is there: one of them belongs to it",
        20_000: "the inputs wait all the time, one for each block",
        1_000 + 20_000: "that is one block: the inputs of all 30 wait",
        20_000 + 1_000 * 29: "nearly: the block that is run again needs its input, too",
        0: "backward starts somewhere: the inputs of the blocks are kept",
    }, relative=1e-6)  # fmt: skip
    expect(equal(size, 50_000, 1e-6), f"for 30 blocks, inputs of 1,000 bytes and insides of 20,000 it says {size:,.0f}: all inputs, and one inside")
    other = number(result(answer, 4, 7, 10), "your number of bytes for 4 blocks")
    expect(equal(other, 38, 1e-6), f"right for 30 blocks, but for 4 blocks of 7 and 10 it says {other:g}: use the arguments")
    return "50,000 instead of 630,000 bytes in that example: all inputs, and the inside of one block. The price is one more forward pass."


@check
def whole_loss(answer: Any) -> str:
    """answer(means, counts) -> the mean loss over all labelled tokens."""
    means, counts = [4.0, 2.0, 3.0], [10, 30, 60]
    loss = number(result(answer, list(means), list(counts)), "your loss")
    refuse(loss, {
        3.0: "that is the average of the averages: the ten tokens of the first micro-batch count as much as the sixty of the last",
        9.0: "the losses are added: a mean over all tokens lies between the smallest and the largest",
        280.0: "that is the sum over all tokens: divide by how many there are",
        280 / 3: "you divide by the number of micro-batches: divide by the number of tokens",
        100 / (10 / 4 + 30 / 2 + 60 / 3): "tokens divided by the loss give another mean, the harmonic one: multiply",
        (4 / 10 + 2 / 30 + 3 / 60) / (1 / 10 + 1 / 30 + 1 / 60): "small micro-batches count more in that: multiply by the counts, do not divide",
    })  # fmt: skip
    expect(equal(loss, 2.8), f"for means 4, 2, 3 over 10, 30 and 60 tokens it says {loss:.4g}: add each mean times its count, divide by all tokens")
    other = number(result(answer, [1.0, 5.0], [3, 1]), "your loss")
    expect(equal(other, 2.0), f"right for three micro-batches, but for means 1 and 5 over 3 and 1 tokens it says {other:.4g}: use the arguments")
    return "2.8, where the average of averages says 3.0. The same weights, counts / all tokens, make the gradients right."


# 6: a schedule --------------------------------------------------------------------------------------------------------------------


@check
def learning_rate(answer: Any) -> str:
    """answer(step, steps, warmup, peak) -> the rate of that step, 0 the first."""
    rates = [number(result(answer, step, 6, 2, 0.1), f"the rate of step {step}") for step in range(6)]
    shares = [rate / 0.1 for rate in rates]
    right = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    expect(not _alike(rates, right), "these are shares of the peak: multiply by it")
    expect(rates[0] != 0, "the first step has a rate of zero, and is wasted: step counts from 0, the warm-up from 1")
    expect(not _alike(shares, [1.0] * 6), "it is always the peak: it should rise at first, and fall afterwards")
    expect(not _alike(shares, [1 - step / 6 for step in range(6)]), "there is no warm-up: the first two steps should rise to the peak")
    expect(not _alike(shares[2:], [1.0] * 4), "it rises, and then stays: after the warm-up it should fall")
    falls = [1 - step / 6 for step in range(2, 6)]
    expect(not _alike(shares[2:], falls), "it falls from the first step on, and jumps down after the warm-up: the way down begins at the peak")
    expect(abs(rates[-1]) > 1e-9, "the last step has a rate of zero, and is wasted: zero would come one step later")
    expect(all(rate >= 0 for rate in rates), f"a rate below zero climbs: {_list(rates)}")
    wanted = _list([share / 10 for share in right])
    expect(_alike(shares, right), f"for 6 steps with a warm-up of 2 and a peak of 0.1 it goes {_list(rates)}, it should go {wanted}")
    without = [number(result(answer, step, 4, 0, 1.0), "the rate without a warm-up") for step in range(4)]
    expect(_alike(without, [1.0, 0.75, 0.5, 0.25]), f"without a warm-up, 4 steps should go 1, 0.75, 0.5, 0.25; it goes {_list(without)}")
    return "up in equal parts, then down on a line: `fit` does the same with schedule='linear' and warmup_steps."


def _alike(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(abs(a - b) < 1e-6 for a, b in zip(left, right, strict=True))
