# %% [markdown]
# # 03 · The training loop
#
# > Ten lines train a model. Then you turn each knob that people turn when memory or patience runs out, and see what it costs and what it saves.
#
# **What you will learn**
#
# - to write the loop by hand, and what `fit` adds to it
# - what fp32, bf16, bf16-mixed and fp16 store and multiply; why fp16 needs a loss scaler, and weights in pure bf16 stand still at small rates
# - what gradient checkpointing, accumulation, a 4-bit base (QLoRA) and packing save, and what each costs
# - to predict the memory of all of these before running them
# - to read a validation curve, and to see overfitting and a missing warm-up in it
#
# **Time:** about 8 minutes on 2 cores with the real model. Offline once the model is fetched.
#
# Notebook 02 says what LoRA is; here it is simply the thing that trains. Claims of the lectures, [A12] for example, are checked as we meet them,
# and marked ✓ where they hold in this run.

# %%
import copy
import functools
import math
import statistics

import torch
from torch import nn

import lora_lab
import memory_math
from course import figures, holds, models, pick, tables
from course.checks import the_training_loop as check
from lora_lab import data, training
from lora_lab.training.optimizers import learning_rate_share, make_optimizer
from lora_lab.training.precision import storage_dtype
from lora_lab.training.report import read_run
from lora_lab.training.rounding import round_stochastically

print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; the fastest precision of this machine: {models.precision()}")

# %% [markdown]
# ## 1. The baseline first: a loop in ten lines
#
# A model, four reviews of quite different length, and their loss: the mean of $-\log p(\text{next token})$ over the tokens that have a label, which
# are those of the answers.

# %%
base, tokenizer = models.load(torch.float32)
train_rows, held_out = data.load("reviews")
by_length = sorted(data.encode_rows(train_rows, tokenizer), key=lambda example: len(example["input_ids"]))
rows = [by_length[place] for place in pick((0, 100, 200, -1), (0, 20, 40, 90))]
batch = data.collate(rows, tokenizer.pad_token_id)


def labels_of(rows):
    return [sum(label != -100 for label in row["labels"][1:]) for row in rows]


print("tokens", [len(row["input_ids"]) for row in rows], " with a label", labels_of(rows), " as a batch", tuple(batch["input_ids"].shape))
with torch.no_grad():
    print(f"loss before training: {base(**batch).loss.item():.4f}")

# %% [markdown]
# Every training loop is this one. Forward makes the loss, backward fills in `.grad` of all that trains, the optimizer steps, and the gradients go,
# because the next `backward()` would *add* to them.

# %%
def train(model, batches, optimizer):
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fresh(method="lora", precision="fp32", quantization="none"):
    """The untrained model, stored as this precision stores it; LoRA always begins with the same A."""
    model = copy.deepcopy(base)
    if method == "full":
        return model.to(torch.bfloat16) if precision == "bf16" else model
    torch.manual_seed(0)
    model = model.to(storage_dtype(precision))
    return lora_lab.inject(model if quantization == "none" else lora_lab.quantize(model, quantization), rank=8)


def trained_weights(model):
    return [p for p in model.parameters() if p.requires_grad]


STEPS = pick(5, 3)
model = fresh()
by_hand = train(model, [batch] * STEPS, torch.optim.AdamW(trained_weights(model), lr=1e-3, weight_decay=0.0))
print("by hand:", [f"{loss:.4f}" for loss in by_hand])
holds("the loss of these four rows falls", by_hand[-1] < by_hand[0])

# %% [markdown]
# `lora_lab.training.fit` is this loop with what a long run needs: batches of like length, precisions, clipping, warm-up, evaluation, snapshots.
# With all of it switched off it must give the same losses.

# %%
PLAIN = {"max_steps": STEPS, "micro_batch_size": len(rows), "learning_rate": 1e-3, "schedule": "constant", "max_grad_norm": None, "progress": False}
by_fit = training.fit(fresh(), rows, PLAIN).losses
print("by fit: ", [f"{loss:.4f}" for loss in by_fit])
holds("the same losses, but for rounding", all(abs(a - b) < 1e-2 for a, b in zip(by_hand, by_fit, strict=True)))

# %% [markdown]
# ## Exercise 1. One step (*, 5 minutes)
#
# Write one step: from a batch to moved weights. Return the loss as a number. The check calls it several times in a row.

# %% tags=["exercise"]
def one_step(model, batch, optimizer):
    ...  # your code: model(**batch).loss is the loss


check.one_step(one_step)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Four things happen: forward, backward, step, and the gradients go. `.item()` makes a number of a loss; the loss itself would hold on to the whole
# graph.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The inside of the loop above, with `return loss.item()`.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def one_step(model, batch, optimizer):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


check.one_step(one_step)

# %% [markdown]
# ## 2. What a step holds in memory, predicted and measured
#
# From here on we turn one knob at a time. For each we write down three things: the **memory** of a step at its worst moment, predicted by
# `memory_math` and then measured, tensor by tensor; the **speed**; and the **loss** after a few steps on our four rows. The helper below does that,
# and keeps everything for a table at the end.

# %%
RATES = {"lora": 1e-3, "full": 5e-5}
trials = {}


def trial(name, method="lora", precision="bf16-mixed", quantization="none", **settings):
    """Predict, measure, then time STEPS steps. settings: of TrainConfig."""
    config = {**PLAIN, "precision": precision, "learning_rate": RATES[method], **settings}
    at_once = rows if config["micro_batch_size"] == len(rows) else rows[-1:]
    lengths = [len(row["input_ids"]) for row in at_once]
    batch_size, sequence_length = (1, sum(lengths)) if config.get("packing") else (len(at_once), max(lengths))
    predicted = memory_math.predict(
        base, method=method, precision=precision, quantization=quantization, implementation="lora_lab", device="cpu",
        batch_size=batch_size, sequence_length=sequence_length, label_tokens=sum(labels_of(at_once)),
        gradient_checkpointing=config.get("gradient_checkpointing", False), grad_accum_steps=config.get("grad_accum_steps", 1),
    )  # fmt: skip
    model = fresh(method, precision, quantization)
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    measured = memory_math.measure(lambda: training.fit(model, rows, {**config, "max_steps": 2}), device="cpu")
    folder = f"runs/{len(trials)}"
    run = training.fit(fresh(method, precision, quantization), rows, {**config, "output_dir": folder})
    middle = statistics.median(speed for _, speed in read_run(folder).speed())   # the first step takes longer: all of its memory is new
    trials[name] = {"predicted": predicted, "measured": measured.peak_bytes - (measured.start_bytes - own), "run": run, "speed": middle}
    print(f"{name:<44} {predicted.total / 2**20:7.1f} MiB predicted, {trials[name]['measured'] / 2**20:7.1f} measured, "
          f"{trials[name]['speed']:5.0f} tokens/s, loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}")  # fmt: skip


trial("full, fp32", "full", "fp32")
trial("LoRA, fp32", "lora", "fp32")

# %%
PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "other")


def parts(*names):
    figures.stacked({name: {part.replace("_", " "): getattr(trials[name]["predicted"], part) / 2**20 for part in PARTS} for name in names}, x="MiB")


def measured(name):
    return trials[name]["measured"]


def speed(name):
    return trials[name]["speed"]


parts("full, fp32", "LoRA, fp32")

# %% [markdown]
# Full fine-tuning pays for each weight four times: the weight, its gradient, AdamW's two averages. LoRA pays for the frozen weights once, and what
# is left is mostly **activations**: what forward keeps so that backward can use it.
#
# ## 3. Sixteen bits
#
# A number in 32 bit has 8 bits of exponent (how large) and 23 of fraction (how exact). There are two ways to halve it. **bfloat16** keeps the
# exponent and cuts the fraction to 7 bits; **float16** keeps 10 bits of fraction, and cuts the exponent to 5.

# %%
def formats(dtype):
    info = torch.finfo(dtype)
    pi = torch.tensor(math.pi, dtype=dtype).item()
    return [str(dtype).removeprefix("torch."), info.bits // 8, f"{info.max:.3g}", f"{info.tiny:.2g}", f"{info.eps:.2g}", f"{pi:.7f}"]


tables.Table(["format", "bytes", "largest", "smallest normal", "step above 1", "pi"],
             [formats(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)])  # fmt: skip

# %% [markdown]
# Which numbers are stored, and which are multiplied? That is what the words mean:
#
# | | frozen weights | weights that train, and their averages | products |
# |---|---|---|---|
# | `fp32` | 32 bit | 32 bit | 32 bit |
# | `bf16` | bfloat16 | bfloat16 | bfloat16 |
# | `bf16-mixed` | bfloat16 | 32 bit | bfloat16 |
# | `fp16-mixed` | float16 | 32 bit | float16, and the loss is scaled |
#
# LoRA's A and B are 32 bit in all of them: they are few.

# %%
trial("full, bf16-mixed", "full", "bf16-mixed")
trial("full, bf16", "full", "bf16")
trial("LoRA, bf16-mixed", "lora", "bf16-mixed")

# %%
parts("full, fp32", "full, bf16-mixed", "full, bf16", "LoRA, fp32", "LoRA, bf16-mixed")

# %%
losses = {name: trials[name]["run"].losses for name in ("LoRA, fp32", "LoRA, bf16-mixed")}
figures.curves(losses, x="step", y="loss", title="Half the bytes, and a loss that follows", dots=True)
wide, narrow = losses.values()
holds("at step 1 the two losses agree within a hundredth", abs(wide[0] - narrow[0]) < 0.01)
holds("and bfloat16 learns at least three quarters of what 32 bit learns in these few steps", narrow[0] - narrow[-1] > 0.75 * (wide[0] - wide[-1]))
holds("LoRA in bf16-mixed needs less than two thirds of the memory", measured("LoRA, bf16-mixed") < measured("LoRA, fp32") * 2 / 3, real_only=True)

# %% [markdown]
# bfloat16 may lag a little in the first steps. A change that is smaller than its coarse steps is not *seen* by its products until several have added
# up. That they do add up is what the 32-bit weights are for; section 5 shows what happens without them.
#
# Look at *full, bf16-mixed*: it saves little. The 32-bit masters, gradients and averages are all still there. Mixed precision is about speed and
# activations; the halved weights come with freezing them.
#
# ## 4. float16, and why its loss is scaled
#
# With 5 bits of exponent, float16 ends early: below about 6e-8 there is only zero. Gradients are small numbers.

# %%
def shown(value):
    number = torch.tensor(value)
    return [f"{value:.0e}", f"{number.bfloat16().item():.3g}", f"{number.half().item():.3g}", f"{(number * 2**16).half().item():.3g}"]


tables.Table(["a gradient", "in bfloat16", "in float16", "times 65,536, in float16"], [shown(value) for value in (1e-3, 1e-5, 1e-7, 1e-8, 1e-10)])

# %% [markdown]
# The way out (Micikevicius et al. 2018, section 3.2): multiply the *loss* by a large number before backward. By the chain rule every gradient is
# multiplied with it. Then divide the finished gradients, in 32 bit, before the optimizer sees them. First look at the numbers that flow back
# through our model, in 32 bit:

# %%
flowing = []


def note(block, inputs, output):
    output.register_hook(lambda gradient: flowing.append(gradient[gradient != 0].abs().log2().flatten()))


model = fresh().train()
hooks = [block.register_forward_hook(note) for block in model.get_submodule("model.layers")]
model(**batch).loss.backward()
for hook in hooks:
    hook.remove()
exponents = torch.cat(flowing)
cases = {"the four rows alone": 0, "as 1 part of 32,768 of a step": -15, "the same, the loss times 65,536": -15 + 16}

(axes,) = figures.panels(1)
for colour, (name, shift) in zip(figures.COLOURS, cases.items(), strict=False):
    heights, edges = torch.histogram(exponents + shift, bins=80, range=(-60.0, 17.0), density=True)
    axes.stairs(heights, edges, fill=True, alpha=0.5, color=colour, label=name)
axes.axvspan(-60, -25, color="black", alpha=0.12, label="zero in float16")
axes.axvline(16, color="black", linestyle="--", linewidth=1, label="infinity in float16")
axes.legend(fontsize="small", loc="upper left")
axes.set(xlabel="size of a gradient between two blocks, as a power of two", ylabel="share", yticks=[])
axes.margins(x=0)

# %%
lost = {name: (exponents + shift < -25).float().mean().item() for name, shift in cases.items()}   # half the smallest number is zero
print("zero in float16 would be:", {name: f"{value:.1%}" for name, value in lost.items()})
holds("in a large step, most would be", lost["as 1 part of 32,768 of a step"] > 0.5)
holds("with the loss times 65,536, few are", lost["the same, the loss times 65,536"] < 0.05)

# %% [markdown]
# Four rows alone get through. But in a large step, accumulated over many micro-batches (section 7) or spread over many GPUs, the loss of each
# counts by its share, and so do the numbers that flow back.
#
# Does it matter that they are lost? By hand, on the shortest row: float16 products, a loss times its share of the step and times some scale, and the
# finished gradients divided again. How far are they from those in 32 bit?

# %%
short = data.collate(rows[:1], tokenizer.pad_token_id)


def gradients(model, share=1.0, scale=1.0, autocast=None):
    model.train()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = model(**short).loss * share
    (loss * scale).backward()
    return torch.cat([p.grad.flatten() for p in trained_weights(model)]) / scale


exact, half, comparison = gradients(fresh()), fresh("lora", "fp16-mixed"), []
for share, scale in ((1.0, 1.0), (2.0**-15, 1.0), (2.0**-15, 2.0**16), (2.0**-15, 2.0**50)):
    half.zero_grad()
    found = gradients(half, share, scale, torch.float16) / share
    finite = found.isfinite().all().item()
    off = ((found - exact).norm() / exact.norm()).item() if finite else math.inf
    comparison.append([f"{1 / share:,.0f}", f"2^{math.log2(scale):.0f}", "yes" if finite else "NO", f"{off:.1%}" if finite else "-", off])
tables.Table(["parts of the step", "scale", "all finite", "off by"], [row[:-1] for row in comparison])

# %%
alone, unscaled, scaled, too_much = (row[-1] for row in comparison)
holds("without scaling, a small part of a step comes out wrong", unscaled > 2 * alone)
holds("with the loss times 65,536 it is as exact as if it were alone", scaled < 1.5 * alone)
holds("a scale that is too large ends in infinity", too_much == math.inf)

# %% [markdown]
# Nobody knows the right scale beforehand. So a **GradScaler** looks for it. It begins high (65,536). If any gradient is infinite or not a number,
# the step is *skipped* and the scale halved; after a long time without such a step (2,000), it is doubled. `fit` does that with
# `precision="fp16-mixed"`.
#
# Few CPUs have hardware for float16, and on the others it is slow; on GPUs that are older than bfloat16 it is the fast one. bfloat16 has the
# exponents of 32 bit, and needs none of this.

# %%
trial("LoRA, fp16-mixed", "lora", "fp16-mixed")
print(f"steps skipped by the scaler: {trials['LoRA, fp16-mixed']['run'].skipped_steps}")

# %% [markdown]
# ## Exercise 2. A GradScaler (**, 8 minutes)
#
# `gradients` is a list of tensors, made by a loss that was multiplied by `scale`. Return `(gradients, scale)` for the optimizer and for the next
# step: the true gradients and the same scale, or, if any number is infinite or not a number, `None` and half the scale.

# %% tags=["exercise"]
def unscale(gradients, scale):
    ...  # your code


check.unscale(unscale)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.isfinite(g).all()` is false for infinity and for nan. All tensors count: one bad one spoils the step.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# If every tensor is finite, divide each by the scale. Otherwise skip: no gradients, half the scale.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def unscale(gradients, scale):
    if all(torch.isfinite(gradient).all() for gradient in gradients):
        return [gradient / scale for gradient in gradients], scale
    return None, scale / 2


check.unscale(unscale)

# %% [markdown]
# ## 5. Weights in pure bfloat16 stand still
#
# `bf16` without masters is the thriftiest: weight, gradient and both averages, two bytes each. But a bfloat16 has 8 significant bits. Between 1 and
# 2 its numbers are 1/128 apart, and a sum is rounded to the *nearest*. An update that is smaller than half a step leaves the weight where it was,
# however often it comes.
#
# The way out (Gupta et al. 2015): round up or down **by chance**, up the more often the nearer the upper number is. Each single result is as coarse
# as before, but the *mean* is right.

# %%
torch.manual_seed(0)
exact, nearest, chance = torch.ones(()), torch.ones((), dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bfloat16)
paths = {"32 bit": [], "bfloat16, to the nearest": [], "bfloat16, by chance, one weight": [], "by chance, mean of 1,000 weights": []}
for _ in range(200):
    exact, nearest, chance = exact + 1e-3, nearest + 1e-3, round_stochastically(chance.float() + 1e-3, torch.bfloat16)
    for path, value in zip(paths.values(), (exact, nearest, chance[0], chance.float().mean()), strict=True):
        path.append(value.item())
figures.curves(paths, x="updates of 0.001", y="weight", title="A weight of 1, and two hundred small updates")

# %%
print({name: round(path[-1], 3) for name, path in paths.items()})
holds("to the nearest, it never moves", paths["bfloat16, to the nearest"][-1] == 1.0)
holds("by chance, the mean arrives", abs(paths["by chance, mean of 1,000 weights"][-1] - 1.2) < 0.005)

# %% [markdown]
# Is that a problem of toy examples? Take the whole model, one real gradient, and one step of AdamW at a learning rate that is usual for full
# fine-tuning.

# %%
def one_bf16_step(rate, by_chance):
    """(share of the weights that moved, share of the wanted movement that arrived), after one step on the four rows."""
    model = fresh("full", "bf16").train()
    model(**batch).loss.backward()
    made = make_optimizer if by_chance else lambda name, weights, lr, decay: torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
    old = [p.detach().clone() for p in model.parameters()]
    wanted = [-rate * p.grad.float() / (p.grad.float().abs() + 1e-8) for p in model.parameters()]   # Adam's first step: the rate, up or down
    made("adamw", [*model.parameters()], rate, 0.0).step()
    moved = [p.detach().float() - q.float() for p, q in zip(model.parameters(), old, strict=True)]
    share = sum((m != 0).sum().item() for m in moved) / sum((w != 0).sum().item() for w in wanted)
    arrived = sum((m * w).sum().item() for m, w in zip(moved, wanted, strict=True)) / sum(w.square().sum().item() for w in wanted)
    return share, arrived


steps = {(rate, how): one_bf16_step(rate, how) for rate in (2e-5, 1e-6) for how in (False, True)}
tables.Table(["learning rate", "rounded", "weights that moved", "movement that arrived"],
             [[f"{rate:.0e}", "by chance" if how else "to the nearest", f"{share:.1%}", f"{arrived:.2f}"]
              for (rate, how), (share, arrived) in steps.items()])  # fmt: skip

# %%
holds("to the nearest, at 2e-5, most weights stay where they are", steps[2e-5, False][0] < 0.5)
holds("the smaller the rate, the fewer move", steps[1e-6, False][0] < steps[2e-5, False][0])
holds("by chance, the movement arrives on average", all(abs(steps[rate, True][1] - 1) < 0.05 for rate in (2e-5, 1e-6)))

# %% [markdown]
# And over several steps? The same loop, full fine-tuning, three ways to keep the weights:

# %%
SLOW, FEW = pick(2e-6, 1e-5), pick(5, 6)
model = fresh("full")
curves = {"32 bit": train(model, [batch] * FEW, torch.optim.AdamW(model.parameters(), lr=SLOW, weight_decay=0.0))}
for name, made in (("bfloat16, to the nearest", torch.optim.AdamW), ("bfloat16, by chance", None)):
    model = fresh("full", "bf16")
    optimizer = made(model.parameters(), lr=SLOW, weight_decay=0.0) if made else make_optimizer("adamw", [*model.parameters()], SLOW, 0.0)
    curves[name] = train(model, [batch] * FEW, optimizer)
del model, optimizer
figures.curves(curves, x="step", y="loss", title=f"Full fine-tuning at a learning rate of {SLOW:.0e}", dots=True)

# %%
fell = {name: losses[0] - losses[-1] for name, losses in curves.items()}
print({name: round(value, 4) for name, value in fell.items()})
holds("by chance, bfloat16 learns most of what 32 bit learns", fell["bfloat16, by chance"] > 0.7 * fell["32 bit"], real_only=True)
holds("to the nearest, it learns less", fell["bfloat16, to the nearest"] < fell["bfloat16, by chance"], real_only=True)

# %% [markdown]
# `fit(..., precision="bf16")` rounds by chance, averages included. LoRA has no such trouble: A and B are in 32 bit.
#
# ## Exercise 3. Round by chance (***, 12 minutes)
#
# Round each number of `x` to a multiple of `step`, up or down at random, so that the mean of many roundings is `x`.

# %% tags=["exercise"]
def round_by_chance(x, step):
    ...  # your code


check.round_by_chance(round_by_chance)

# %% [markdown]
# <details><summary>Hint</summary>
#
# How many whole steps are below `x`? What is left over is a share between 0 and 1: that is how often it should go up. `torch.rand_like(x)` is below
# a share of 0.3 in three of ten cases.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `lower = floor(x / step)`; the rest `x / step - lower` is the probability of one step more.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def round_by_chance(x, step):
    lower = torch.floor(x / step)
    up = torch.rand_like(x) < x / step - lower
    return (lower + up) * step


check.round_by_chance(round_by_chance)

# %% [markdown]
# ## 6. Gradient checkpointing: keep less, compute it again
#
# Backward needs what forward computed: the activations of every block. Checkpointing (Chen et al. 2016) keeps only the *input* of each block, and
# runs the block again when backward comes to it. The numbers are the same, so the gradients are. By hand, in a stack of small blocks:

# %%
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


torch.manual_seed(0)
DEPTH, WIDTH = 12, 64
stack, x = nn.ModuleList(Block(WIDTH) for _ in range(DEPTH)), torch.randn(256, WIDTH)


def through(checkpointing):
    h = x
    for block in stack:
        h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False) if checkpointing else block(h)
    return h.square().mean()


kept, found = {}, {}
for how in (False, True):
    stack.zero_grad()
    kept[how] = memory_math.saved_bytes(functools.partial(through, how))
    through(how).backward()
    found[how] = [p.grad.clone() for p in stack.parameters()]
print(f"kept for backward: {kept[False]:,} bytes, with checkpointing {kept[True]:,}: {kept[False] / kept[True]:.1f} times less")
holds("the gradients are the same, bit for bit", all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True)))

# %% [markdown]
# ## Exercise 4. What is left to keep (**, 6 minutes)
#
# Predict it: with checkpointing, how many bytes are alive at the worst moment of backward? `blocks` blocks, each with an input of `input_bytes` and
# with `inside_bytes` more that its own forward pass keeps.

# %% tags=["exercise"]
def kept_bytes(blocks, input_bytes, inside_bytes):
    ...  # your code


check.kept_bytes(kept_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Every block's input waits. How many blocks are run again at the same time?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# All inputs, and the inside of the one block that is being run again.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def kept_bytes(blocks, input_bytes, inside_bytes):
    return blocks * input_bytes + inside_bytes


check.kept_bytes(kept_bytes)

# %% [markdown]
# Now the real thing. `True` is every block, `2` every second one, and `"attention"` runs only attention's core again.

# %%
def gradient_of(mode):
    model = fresh()
    model.gradient_checkpointing_enable(mode)
    return gradients(model)


holds("in the real model, too, the gradients are the same, bit for bit", torch.equal(gradient_of(False), gradient_of(True)))
MODES = {"LoRA, checkpointing: attention": "attention", "LoRA, checkpointing: every 2nd block": 2, "LoRA, checkpointing: every block": True}
for name, mode in MODES.items():
    trial(name, gradient_checkpointing=mode)

# %%
left, right = figures.panels(2, height=2.6)
ladder = {name.removeprefix("LoRA, checkpointing: ").replace("LoRA, bf16-mixed", "none"): name for name in ("LoRA, bf16-mixed", *MODES)}
figures.bars({short: measured(name) / 2**20 for short, name in ladder.items()}, x="MiB at the peak", title="checkpointing", axes=left)
figures.bars({short: 1000 / speed(name) for short, name in ladder.items()}, x="ms for a token", title="and its price", axes=right)

# %%
holds("memory falls", measured("LoRA, checkpointing: every block") < measured("LoRA, bf16-mixed"))
holds("and time rises", speed("LoRA, checkpointing: every block") < speed("LoRA, bf16-mixed"), real_only=True)

# %% [markdown]
# One of the lecture's slides [B8] says that checkpointing makes *gradients* vanish, "just in time". It is activations that it saves: compare the
# parts. Gradients and optimizer states are LoRA's doing.

# %%
parts("full, bf16-mixed", "LoRA, bf16-mixed", "LoRA, checkpointing: every block")
before_and_after = [trials[name]["predicted"] for name in ("LoRA, bf16-mixed", "LoRA, checkpointing: every block")]
holds("[B8] checkpointing: fewer activations, the same gradients and states", before_and_after[1].activations < before_and_after[0].activations / 2
      and before_and_after[0].optimizer_states == before_and_after[1].optimizer_states)  # fmt: skip

# %% [markdown]
# ## 7. Accumulation: a big batch in small pieces
#
# `backward()` *adds* to `.grad`. So four rows one after another give the gradient of all four, with the activations of one. There is one trap, and
# many well-known loops have fallen into it: the loss of a micro-batch is a **mean** over its labelled tokens, and micro-batches have different
# numbers of them. The mean of the four means is not the mean over all tokens: a token in a short answer would count more than one in a long answer.
#
# Right is to weigh each micro-batch by its share of the labelled tokens.

# %%
counts = labels_of(rows)
pieces = [data.collate([row], tokenizer.pad_token_id) for row in rows]


def accumulated(weights):
    model = fresh().train()
    total = 0.0
    for piece, weight in zip(pieces, weights, strict=True):
        loss = model(**piece).loss * weight
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in trained_weights(model)])


model = fresh().train()
whole = model(**batch).loss
whole.backward()
whole_gradient = torch.cat([p.grad.flatten() for p in trained_weights(model)])
by_tokens, of_means = accumulated([count / sum(counts) for count in counts]), accumulated([1 / len(counts)] * len(counts))


def distance(gradient):
    return ((gradient - whole_gradient).norm() / whole_gradient.norm()).item()


print("labelled tokens", counts)
tables.Table(["", "loss", "gradient is off by"], [
    ["the big batch", f"{whole.item():.4f}", "-"],
    ["accumulated, weighted by tokens", f"{by_tokens[0]:.4f}", f"{distance(by_tokens[1]):.1e}"],
    ["accumulated, average of averages", f"{of_means[0]:.4f}", f"{distance(of_means[1]):.1e}"],
])  # fmt: skip

# %%
holds("weighted by tokens: the gradient of the big batch, but for rounding", distance(by_tokens[1]) < 1e-3)
holds("the average of averages is another gradient", distance(of_means[1]) > 0.03)
trial("LoRA, four micro-batches of one row", micro_batch_size=1, grad_accum_steps=len(rows))
small_and_big = [trials[name]["run"].losses for name in ("LoRA, four micro-batches of one row", "LoRA, bf16-mixed")]
holds("fit weighs by tokens: the same losses as with the big batch", all(abs(a - b) < 0.05 for a, b in zip(*small_and_big, strict=True)))

# %% [markdown]
# ## Exercise 5. The loss of the whole (*, 4 minutes)
#
# Given the mean loss of each micro-batch and how many labelled tokens it has: what is the mean loss over all of them?

# %% tags=["exercise"]
def whole_loss(means, counts):
    ...  # your code


check.whole_loss(whole_loss)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A mean times its count is a sum. Sums may be added.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Add up mean times count, and divide by all tokens.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def whole_loss(means, counts):
    return sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)


check.whole_loss(whole_loss)

# %% [markdown]
# ## 8. QLoRA: the frozen weights in four bits
#
# What is left is the frozen base. It never changes, so it may be stored coarsely: **nf4** keeps 4 bits for each weight (one of 16 levels that suit
# a normal distribution) and a scale for each block of 64; **nf4-dq** stores the scales in 8 bits, too (Dettmers et al. 2023). A product makes the
# matrix anew from its codes.
#
# One of the lectures says that INT8 and INT4 serve inference only [A5]. A codebook of 16 levels cannot take a small step, that is true. But the
# adapters over it can.

# %%
four_bits = lora_lab.quantize(copy.deepcopy(base), "nf4-dq")
report = lora_lab.quantization_report(four_bits)
with torch.no_grad():
    print(f"loss of the four rows: {base(**batch).loss.item():.3f}, with the base in nf4: {four_bits(**batch).loss.item():.3f}")
print(report)
holds("about four bits a weight, double quantisation", 4.1 < report.bits_per_parameter < 4.2, real_only=True)
del four_bits
trial("QLoRA, nf4-dq", quantization="nf4-dq")
trial("QLoRA, nf4-dq, checkpointing", quantization="nf4-dq", gradient_checkpointing=True)

# %%
parts("LoRA, bf16-mixed", "QLoRA, nf4-dq", "QLoRA, nf4-dq, checkpointing")
learned = trials["QLoRA, nf4-dq"]["run"].losses
holds("[A5] adapters over four bits learn", learned[-1] < learned[0])
holds("and the base takes less memory", trials["QLoRA, nf4-dq"]["predicted"].weights < trials["LoRA, bf16-mixed"]["predicted"].weights)

# %% [markdown]
# ## 9. Packing instead of padding
#
# A batch is a rectangle, texts are not. What is left over is padding: computed, and thrown away. **Packing** puts the rows one after another into a
# single one, and lets each see itself only (Krell et al. 2021).

# %%
packed = data.collate_packed(rows)
picture = batch["attention_mask"] * torch.arange(1, len(rows) + 1)[:, None]
line = torch.cat([torch.full((len(row["input_ids"]),), place) for place, row in enumerate(rows, start=1)])[None]
top, bottom = figures.panels(1, 2, height=1.5)
for axes, image, title in ((top, picture, "padded: white is computed for nothing"), (bottom, line, "packed: one row, no padding")):
    axes.imshow(torch.where(image == 0, torch.nan, image.float()), aspect="auto", cmap="viridis", vmin=0, vmax=5, interpolation="nearest")
    axes.set(yticks=[], xlabel="position")
    axes.set_title(f"{title} ({image.shape[0]} × {image.shape[1]} = {image.numel()} positions)", loc="left")
    axes.grid(visible=False)

# %%
model = fresh().train()
model(**packed).loss.backward()
packed_gradient = torch.cat([p.grad.flatten() for p in trained_weights(model)])
print(f"packed and padded: the gradient differs by {distance(packed_gradient):.1e}")
holds("packed, the loss and the gradient are those of the padded batch", distance(packed_gradient) < 1e-3)
trial("LoRA, packed", packing=True)
print(data.padding_report(train_rows, micro_batch_size=8, tokenizer=tokenizer))

# %% [markdown]
# The report shows the third way, which `fit` takes by default: batches of like length (*length buckets*). With them there is little padding left to
# save. Packing is for rows of very different length, and it makes the *largest* batch smaller, which decides about memory.
#
# ## 10. All knobs in one table

# %%
off = {name: abs(t["predicted"].total / t["measured"] - 1) for name, t in trials.items()}
holds("all predictions but one are within 1 % of what was measured", all(value < 0.01 for name, value in off.items() if "packed" not in name))
holds("the packed batch, predicted as if it were a single long text, is within 5 %", off["LoRA, packed"] < 0.05)
tables.Table(["", "MiB predicted", "measured", "off by", "tokens/s", f"loss after {STEPS} steps"], [
    [name, f"{t['predicted'].total / 2**20:,.0f}", f"{t['measured'] / 2**20:,.0f}", f"{t['predicted'].total / t['measured'] - 1:+.1%}",
     f"{t['speed']:,.0f}", f"{t['run'].losses[-1]:.3f}"] for name, t in trials.items()
])  # fmt: skip

# %%
by_memory = sorted(trials, key=measured, reverse=True)
colours = [{"full": figures.BLUE, "LoRA": figures.ORANGE, "QLoRA": figures.GREEN}[name.split(",")[0]] for name in by_memory]
left, right = figures.panels(2, height=4.6)
figures.bars({name: measured(name) / 2**20 for name in by_memory}, x="MiB at the peak", title="memory", colours=colours, axes=left)
figures.bars({name: round(speed(name)) for name in by_memory}, x="tokens a second", title="speed", colours=colours, axes=right)
right.set(yticklabels=[])
left.margins(x=0.3)

# %% [markdown]
# Speeds of so few steps are rough, and they are this machine's. The order of the memory column is not: it was predicted.
#
# ## 11. The validation curve: when to stop
#
# The training loss says how well the model knows its rows, and nothing else. A lecture names **overfitting** [A12] among the troubles of full
# fine-tuning. Here it is, on purpose: a dozen rows, again and again, with a held-out loss every few steps.

# %%
SMALL, UNSEEN = by_length[: pick(12, 8)], data.encode_rows(held_out[: pick(16, 4)], tokenizer)
LONG, EVERY = pick(18, 8), pick(3, 2)
OVER = {"max_steps": LONG, "micro_batch_size": 4, "schedule": "constant", "eval_every": EVERY, "precision": models.precision(), "progress": False}
fits = {
    "full": training.fit(fresh("full"), SMALL, {**OVER, "learning_rate": pick(1e-4, 3e-3)}, eval_data=UNSEEN),
    "LoRA": training.fit(fresh("lora", models.precision()), SMALL, {**OVER, "learning_rate": pick(2e-3, 1e-2)}, eval_data=UNSEEN),
}
for axes, (name, run) in zip(figures.panels(2), fits.items(), strict=True):
    figures.curves({"training": run.losses, "held out": (range(0, LONG + 1, EVERY), run.eval_losses)}, x="step", y="loss", title=name, axes=axes)

# %%
for name, run in fits.items():
    best = min(range(len(run.eval_losses)), key=run.eval_losses.__getitem__)
    loss = run.eval_losses
    print(f"{name}: held-out loss {loss[0]:.3f}, best {loss[best]:.3f} at step {best * EVERY}, {loss[-1]:.3f} at the end")
overfits = {name: run.eval_losses[-1] > min(run.eval_losses) + 0.05 and run.losses[-1] < run.losses[0] for name, run in fits.items()}
holds("[A12] full fine-tuning overfits: the held-out loss rises while the training loss falls", overfits["full"], real_only=True)
holds("and LoRA on a dozen rows does so, too", overfits["LoRA"], real_only=True)

# %% [markdown]
# Both go down together for a few steps. Then the model begins to learn the dozen rows by heart, and what it learns is of no use elsewhere. Few
# trained weights are no protection from that: LoRA has more than enough for twelve rows.
#
# The remedy is to look, and to keep the best: `fit(..., eval_every=..., keep_best=True, early_stopping=2)` ends with the weights of the lowest
# held-out loss. The rows that choose the best step must not be those that report the result in the end: that is what a test split is for.
#
# ## 12. Warm-up
#
# Adam divides each weight's mean gradient by its mean size, so in the first step, when it has seen one gradient only, *every* weight moves by the
# full learning rate, whatever the gradient is. A warm-up lets the rate rise over the first steps.

# %%
schedules = {f"{schedule}, warm-up {warmup}": [learning_rate_share(step, 60, warmup, schedule) for step in range(60)]
             for schedule, warmup in (("constant", 0), ("linear", 6), ("cosine", 6))}  # fmt: skip
figures.curves(schedules, x="step", y="share of the learning rate", title="Schedules")

# %%
weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
weight.grad = torch.tensor([1e-6, 1.0, 1e6])
optimizer.step()
print(f"gradients 1e-6, 1 and 1e6; the first step moves the weights by {[round(1 - w, 3) for w in weight.tolist()]}")
holds("Adam's first step is the learning rate, whatever the gradient", torch.allclose(1 - weight.detach(), torch.full((3,), 0.1), atol=2e-3))

# %% [markdown]
# What that does to a model, at a rate that is too high for the beginning:

# %%
HIGH, WARM = pick(1e-3, 3e-2), pick(8, 6)
RISE = {"max_steps": WARM, "micro_batch_size": 4, "schedule": "constant", "learning_rate": HIGH, "precision": models.precision(), "progress": False}
warmed = {f"warm-up {warmup}": training.fit(fresh("full"), by_length[:40], {**RISE, "warmup_steps": warmup}).losses for warmup in (0, pick(6, 4))}
figures.curves(warmed, x="step", y="training loss", title=f"Full fine-tuning at {HIGH:.0e}", dots=True)

# %%
cold, warm = warmed.values()
print(f"highest loss: without warm-up {max(cold):.2f}, with it {max(warm):.2f}")
holds("without a warm-up the loss jumps first", max(cold) > max(warm) + 0.3, real_only=True)

# %% [markdown]
# ## Exercise 6. A schedule (**, 5 minutes)
#
# The learning rate of step `step` (0 is the first) of `steps`: rising in equal parts over the first `warmup` steps up to `peak`, which the last of
# them has, then falling on a straight line that would reach zero at step `steps`. The first step is not zero: it would be wasted.

# %% tags=["exercise"]
def learning_rate(step, steps, warmup, peak):
    ...  # your code


check.learning_rate(learning_rate)

# %% [markdown]
# <details><summary>Hint</summary>
#
# With a warm-up of 2 and a peak of 1, six steps have the rates 0.5, 1, 1, 0.75, 0.5, 0.25.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# While `step < warmup` it is `peak * (step + 1) / warmup`; afterwards `peak` times the share of the steps after the warm-up that are still to come.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def learning_rate(step, steps, warmup, peak):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


check.learning_rate(learning_rate)

# %% [markdown]
# ## Takeaways
#
# - The loop is ten lines. Everything else serves memory, speed, or the night's sleep of whoever waits for it.
# - bf16-mixed is the default where the hardware has it: faster, half the activations, nearly the same losses. float16 needs a scaler, pure
#   bfloat16 weights need rounding by chance.
# - Checkpointing and accumulation buy memory with time, and change no gradient. Weigh micro-batches by their tokens.
# - LoRA takes away gradients and optimizer states, QLoRA most of the frozen weights, checkpointing most activations: each shrinks another part.
# - All of it can be predicted before it runs.
# - A training loss that falls says little. Hold rows out, look at their loss, keep the best.
#
# ## Three questions
#
# 1. Someone accumulates over four micro-batches and divides each loss by four. When is that right?
#    <details><summary>Answer</summary>
#
#    When all four have the same number of labelled tokens. Otherwise tokens in short answers count more than tokens in long ones.
#    </details>
# 2. Why does bfloat16 need no loss scaler, although it is less exact than float16?
#    <details><summary>Answer</summary>
#
#    A scaler is against numbers that are too *small*, and that is a matter of the exponent. bfloat16 has the 8 bits of exponent that 32 bit has; it
#    saves on exactness, and gradients need not be exact, only right on average.
#    </details>
# 3. A step runs out of memory with LoRA in bf16-mixed. Would a lower rank help?
#    <details><summary>Answer</summary>
#
#    Hardly: gradients and states of the adapters are small already. The parts that are left are activations (smaller micro-batches with
#    accumulation, shorter rows, checkpointing) and the frozen weights (QLoRA). The stacked bars say which of them is the larger.
#    </details>
