"""The checks of notebook 03: right answers pass, the stub and each wrong one hear their own mistake."""

from __future__ import annotations

import torch
from check_tools import each_gets_its_own

from course.checks import the_training_loop as check

# One step ------------------------------------------------------------------------------------------------------------------------


def one_step(model, batch, optimizer):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def gradients_go_first(model, batch, optimizer):
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def keeps_gradients(model, batch, optimizer):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def steps_without_gradients(model, batch, optimizer):
    loss = model(**batch).loss
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


def uphill(model, batch, optimizer):
    loss = model(**batch).loss
    (-loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def holds_the_graph(model, batch, optimizer):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def twice(model, batch, optimizer):
    one_step(model, batch, optimizer)
    return one_step(model, batch, optimizer)


def loss_afterwards(model, batch, optimizer):
    one_step(model, batch, optimizer)
    return model(**batch).loss.item()


def returns_nothing(model, batch, optimizer):
    one_step(model, batch, optimizer)


def test_one_step():
    each_gets_its_own(
        check.one_step,
        right=[one_step, gradients_go_first],
        wrong={
            "backward() adds": keeps_gradients,
            "no weight has moved": steps_without_gradients,
            "uphill": uphill,
            "holds on to everything": holds_the_graph,
            "one call is one step": twice,
            "is not the loss of this step": loss_afterwards,
            "returns nothing": returns_nothing,
            "AttributeError": lambda model, batch, optimizer: optimizer.go(),
        },
    )


# Loss scaling --------------------------------------------------------------------------------------------------------------------


def not_finite(gradient):
    return not bool(torch.isfinite(gradient).all())


def scaler(bad=not_finite, divide=lambda g, s: g / s, skipped=lambda s: s / 2, kept=lambda s: s, looked_at=slice(None)):
    def unscale(gradients, scale):
        if any(bad(gradient) for gradient in gradients[looked_at]):
            return None, skipped(scale)
        return [divide(gradient, scale) for gradient in gradients], kept(scale)

    return unscale


def test_unscale():
    each_gets_its_own(
        check.unscale,
        right=[scaler(), scaler(bad=lambda g: bool((g.isnan() | g.isinf()).any()))],
        wrong={
            "still times the scale": scaler(divide=lambda g, s: g),
            "multiplied once more": scaler(divide=lambda g, s: g * s),
            "these are not the gradients": scaler(divide=lambda g, s: g / s**2),
            "one gradient is nan": scaler(bad=lambda g: bool(g.isinf().any())),
            "one gradient is infinite": scaler(bad=lambda g: bool(g.isnan().any())),
            "minus infinity": scaler(bad=lambda g: bool((g == torch.inf).any() or g.isnan().any())),
            "first tensor only": scaler(looked_at=slice(1)),
            "the scale stays": scaler(skipped=lambda s: s),
            "is doubled": scaler(skipped=lambda s: 2 * s),
            "should be 512": scaler(skipped=lambda s: s / 10),
            "so the scale stays 1024": scaler(kept=lambda s: 2 * s),
            "the step is skipped: skip only": scaler(bad=lambda g: True),
            "expected two things": lambda gradients, scale: [gradient / scale for gradient in gradients] * 2,
        },
    )


# Rounding ------------------------------------------------------------------------------------------------------------------------


def by_chance(x, step):
    lower = torch.floor(x / step)
    return (lower + (torch.rand_like(x) < x / step - lower)) * step


def in_place(x, step):
    return x.copy_(by_chance(x, step))


def with_chances(chance):
    def rounded(x, step):
        lower = torch.floor(x / step)
        return (lower + (torch.rand_like(x) < chance(x / step - lower))) * step

    return rounded


def test_round_by_chance():
    each_gets_its_own(
        check.round_by_chance,
        right=[by_chance, lambda x, step: torch.floor(x / step + torch.rand_like(x)) * step, lambda x, step: by_chance(x.double(), step).float()],
        wrong={
            "0.3 always becomes 0: that is rounding to the nearest": lambda x, step: torch.round(x / step) * step,
            "0.3 always becomes 1: that is rounding always": lambda x, step: torch.ceil(x / step) * step,
            "2.75 always becomes 2": lambda x, step: torch.floor(x / step) * step if float(x[0]) > 1 else by_chance(x, step),
            "equally often": with_chances(lambda share: torch.full_like(share, 0.5)),
            "chances are exchanged": with_chances(lambda share: 1 - share),
            "not multiples of 1: the result": lambda x, step: x + torch.rand_like(x) - 0.5,
            "not multiples of 0.5: divide by the step": lambda x, step: torch.floor(x + torch.rand_like(x)) + (0.25 if step == 0.5 else 0),
            "only its two neighbours": lambda x, step: torch.trunc(x / step + torch.randn_like(x)) * step,
            "the same chance": lambda x, step: torch.floor(x / step + (torch.rand_like(x) if len(x) > 1000 else torch.rand(()))) * step,
            "it changes x itself": in_place,
            "for 20,000 numbers has the shape [1]": lambda x, step: by_chance(x[:1], step),
            "share that is left over": with_chances(lambda share: share.square()),
        },
    )


# Numbers -------------------------------------------------------------------------------------------------------------------------


def test_kept_bytes():
    each_gets_its_own(
        check.kept_bytes,
        right=[lambda blocks, inputs, inside: blocks * inputs + inside],
        wrong={
            "without checkpointing: the inside": lambda blocks, inputs, inside: blocks * (inputs + inside),
            "and without the inputs": lambda blocks, inputs, inside: blocks * inside,
            "one of them belongs to it": lambda blocks, inputs, inside: blocks * inputs,
            "wait all the time": lambda blocks, inputs, inside: inside,
            "that is one block": lambda blocks, inputs, inside: inputs + inside,
            "nearly": lambda blocks, inputs, inside: (blocks - 1) * inputs + inside,
            "backward starts somewhere": lambda blocks, inputs, inside: 0,
            "use the arguments": lambda blocks, inputs, inside: 50_000,
            "it says 7,300,000": lambda blocks, inputs, inside: 365 * inside,
        },
    )


def test_whole_loss():
    each_gets_its_own(
        check.whole_loss,
        right=[lambda means, counts: sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts),
               lambda means, counts: (torch.tensor(means) * torch.tensor(counts)).sum() / sum(counts)],
        wrong={
            "average of the averages": lambda means, counts: sum(means) / len(means),
            "losses are added": lambda means, counts: sum(means),
            "sum over all tokens": lambda means, counts: sum(m * c for m, c in zip(means, counts, strict=True)),
            "number of micro-batches": lambda means, counts: sum(m * c for m, c in zip(means, counts, strict=True)) / len(means),
            "harmonic": lambda means, counts: sum(counts) / sum(c / m for m, c in zip(means, counts, strict=True)),
            "do not divide": lambda means, counts: sum(m / c for m, c in zip(means, counts, strict=True)) / sum(1 / c for c in counts),
            "use the arguments": lambda means, counts: 2.8,
            "over 10, 30 and 60 tokens it says 2:": lambda means, counts: min(means),
            "expected a number": lambda means, counts: means,
        },
    )  # fmt: skip


def scheduled(step, steps, warmup, peak):
    return peak * (step + 1) / warmup if step < warmup else peak * (steps - step) / (steps - warmup)


def after(share):
    return lambda step, steps, warmup, peak: peak * ((step + 1) / warmup if step < warmup else share(step, steps, warmup))


def test_learning_rate():
    each_gets_its_own(
        check.learning_rate,
        right=[scheduled, lambda step, steps, warmup, peak: peak * min((step + 1) / max(warmup, 1e-9), (steps - step) / (steps - warmup))],
        wrong={
            "shares of the peak": lambda step, steps, warmup, peak: scheduled(step, steps, warmup, 1.0),
            "the first step has a rate of zero": lambda step, steps, warmup, peak: peak * step / warmup if step < warmup else
                scheduled(step, steps, warmup, peak),
            "always the peak": lambda step, steps, warmup, peak: peak,
            "there is no warm-up": lambda step, steps, warmup, peak: peak * (1 - step / steps),
            "and then stays": after(lambda step, steps, warmup: 1.0),
            "jumps down": after(lambda step, steps, warmup: 1 - step / steps),
            "the last step": after(lambda step, steps, warmup: (steps - 1 - step) / (steps - 1 - warmup)),
            "below zero": after(lambda step, steps, warmup: 1 - 0.5 * (step - warmup)),
            "it should go 0.05": after(lambda step, steps, warmup: 0.5 ** (step - warmup)),
            "ZeroDivisionError": lambda step, steps, warmup, peak: min(peak * (step + 1) / warmup, peak * (steps - step) / (steps - warmup)),
        },
    )  # fmt: skip
