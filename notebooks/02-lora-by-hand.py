# %% [markdown]
# # 02 · LoRA by hand
#
# > Read this page, and you can write LoRA from memory: two small matrices beside a frozen one, in ten lines.
#
# **What you will learn**
#
# - why a layer of 32,768 weights can be tuned with 4,608, and what that saves in memory and on disk
# - to write the layer, put it into a real language model, train it, and merge it away again
# - why nothing changes at step 0, although one of the two matrices is random
# - to keep several tasks on one frozen model, and to come back to the old model bit for bit
# - to look for yourself whether the change that training makes *is* of low rank, and which rank, layers and learning rate to choose
#
# **Time:** about 15 minutes on 2 cores with the real model. Offline once the model is fetched.
#
# The paper is Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* ([arXiv:2106.09685](https://arxiv.org/abs/2106.09685)); its
# sections are named where they are used. The lectures' claims about LoRA are checked as we meet them, each with its number in the ledger of
# notebook 08, and marked ✓ when they hold in this run.

# %%
import copy
import math
from pathlib import Path

import torch
from torch import nn

import lora_lab
import memory_math
from course import figures, holds, models, pick, tables
from course.checks import lora_by_hand as check
from lora_lab import data, training

torch.manual_seed(0)
PRECISION = models.precision()
print(f"precision {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# ## 1. The baseline first
#
# SmolLM2 is a real language model of 135 million weights, small enough for a laptop. We ask it for three reviews of a product it will not see in
# training. Read what it writes: does a customer write like that?

# %%
model, tokenizer = models.load()
train_rows, held_out = data.load("reviews")
requests = [row for row in held_out if row["product"] == held_out[0]["product"]]
titles = [f"{row['instruction']} ({row['product']})" for row in requests]

WRITING = {"max_new_tokens": pick(60, 6), "temperature": 0.4, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7, "progress": False}
before = training.answers(model, requests, tokenizer, **WRITING)
tables.before_after(dict(zip(titles, zip(before), strict=True)), ["before training"])

# %% [markdown]
# Beside the texts we need a number. The *held-out loss* is how surprised the model is, in nats per token, by reviews of products that it will not
# be trained on: the mean of $-\log p(\text{next token})$. Lower is better. And we keep the model's answer to one short text exactly, to see later
# whether anything has changed.

# %%
HELD_OUT = held_out[: pick(48, 4)]


def held_out_loss(model, rows=HELD_OUT):
    return math.log(training.perplexity(model, rows, tokenizer, precision=PRECISION, progress=False))


@torch.no_grad()
def logits_of(model, text="The zip on this jacket"):
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    return model(input_ids=ids).logits.float()


loss_before, logits_before = held_out_loss(model), logits_of(model)
print(f"held-out loss before training: {loss_before:.3f}")

# %% [markdown]
# ## 2. What training adds, and how large it is
#
# A linear layer computes $y = W x$. However it is trained, afterwards it has another weight, and we may write that as the old one plus a change:
#
# $$W' = W + \Delta W$$
#
# $\Delta W$ is as large as $W$. To tune a model for one task means to learn, to store and to ship a $\Delta W$ for every layer: a second copy of
# the model.
#
# LoRA's bet (section 4.1, equation 3): the change can be *simple*. Write it as a product of two thin matrices with an inner side $r$, the **rank**:
#
# $$\Delta W = B A, \qquad A: r \times \text{in}, \quad B: \text{out} \times r$$
#
# The slides' example is a layer from 512 numbers to 64, at rank 8 [A15].

# %%
inputs, outputs, rank = 512, 64, 8
W = torch.randn(outputs, inputs)                              # PyTorch keeps a weight as [outputs, inputs]
A, B = torch.randn(rank, inputs) / 8, torch.randn(outputs, rank)

figures.matrices({"ΔW = B A": B @ A, "B": B, "A": A}, title="A large matrix out of two thin ones")

# %%
saved = 1 - (A.numel() + B.numel()) / W.numel()
print(f"W {W.numel():,}   A {A.numel():,}   B {B.numel():,}   A and B {A.numel() + B.numel():,}: {saved:.1%} fewer")
holds("[A15] 32,768 weights; A 4,096, B 512; 86 % fewer", (W.numel(), A.numel(), B.numel(), round(saved, 2)) == (32_768, 4_096, 512, 0.86))
holds("B A is as large as W, but has rank 8 only", (B @ A).shape == W.shape and torch.linalg.matrix_rank(B @ A) == 8)

# %% [markdown]
# (The slides write $A \times B$, with the input on the left: $x W$. PyTorch multiplies from the other side, $W x$, so here it is $B A$. The same
# two matrices.)
#
# The wider a layer, the more is saved: $r \times (\text{in} + \text{out})$ grows with the sum of the sides,
# $\text{in} \times \text{out}$ with their product.

# %%
SHAPES = {"the slides' layer": (512, 64), "q_proj of SmolLM2-135M": (576, 576), "q_proj of Llama-2-70B": (8192, 8192)}
tables.Table(
    ["layer", "in", "out", "W", "A and B at rank 8", "share", "as many as W at rank"],
    [[name, i, o, i * o, 8 * (i + o), f"{8 * (i + o) / (i * o):.2%}", round(i * o / (i + o))] for name, (i, o) in SHAPES.items()],
)

# %% [markdown]
# ## Exercise 1. How many weights train? (*, 3 minutes)
#
# Write the count as a function of the layer's inputs and outputs and the rank.

# %% tags=["exercise"]
def trainable_weights(inputs, outputs, rank):
    ...  # your code


check.trainable_weights(trainable_weights)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A is [rank, inputs], B is [outputs, rank]. W is frozen, so it does not count.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `rank * inputs` numbers in A and `outputs * rank` in B: `rank * (inputs + outputs)`. The folded cell below runs it.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def trainable_weights(inputs, outputs, rank):
    return rank * (inputs + outputs)


check.trainable_weights(trainable_weights)

# %% [markdown]
# ## 3. LoRA in ten lines
#
# This is all of it [A14]. Three things happen, and each has a reason:
#
# 1. the old layer is **frozen**: it gets no gradient, and the optimizer keeps nothing for it;
# 2. **B begins at zero**, so $B A = 0$ and the new layer is the old one until the first step;
# 3. the input goes through both: $y = W x + \frac{\alpha}{r}\, B\,(A x)$. It is never multiplied by a matrix as large as $\Delta W$.
#
# $\alpha / r$ is the **scaling**. It "helps to reduce the need to retune" when the rank changes (section 4.1): twice the rank, each direction half
# as loud.

# %%
class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scaling = (alpha or rank) / rank

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


base = nn.Linear(512, 64)
layer, x = LoRALinear(base, rank=8), torch.randn(5, 512)
holds("step 0: the new layer computes what the old one does, bit for bit", torch.equal(layer(x), base(x)))
print("trains:", {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad})

# %% [markdown]
# Why zero for B, and why not for A? Look at the gradients of the first step. With $\delta$ for what comes back from the loss,
#
# $$\frac{\partial L}{\partial B} = \delta\, (A x)^\top, \qquad \frac{\partial L}{\partial A} = B^\top \delta\, x^\top .$$
#
# Each gradient goes *through the other matrix*. If both are zero, both gradients are zero, for ever.

# %%
def first_gradients(A, B):
    trial = LoRALinear(base, rank=8)
    trial.A.data, trial.B.data = A.clone(), B.clone()
    (trial(x) - torch.ones(5, 64)).square().mean().backward()
    return ["yes" if torch.equal(trial(x), base(x)) else "NO", trial.A.grad.norm().item(), trial.B.grad.norm().item()]


random_A, random_B, zero_A, zero_B = layer.A.data, torch.randn(64, 8) / 8, torch.zeros(8, 512), torch.zeros(64, 8)
starts = {"A random, B zero (LoRA)": (random_A, zero_B), "both zero": (zero_A, zero_B), "both random": (random_A, random_B)}
gradients = {name: first_gradients(*start) for name, start in starts.items()}
holds("LoRA's start changes nothing and can learn", gradients["A random, B zero (LoRA)"][0] == "yes" and gradients["A random, B zero (LoRA)"][2] > 0)
holds("from zero and zero nothing ever learns", gradients["both zero"][1:] == [0, 0])
tables.Table(["start", "step 0 unchanged", "gradient of A", "gradient of B"], [[name, *row] for name, row in gradients.items()])

# %% [markdown]
# ## Exercise 2. The forward pass (**, 5 minutes)
#
# Without a class, as a formula: rows `x` [n, in], `W` [out, in], `A` [r, in], `B` [out, r], and `alpha`. The rank is in the shape of `A`.

# %% tags=["exercise"]
def forward(x, W, A, B, alpha):
    ...  # your code


check.forward(forward)

# %% [markdown]
# <details><summary>Hint</summary>
#
# For rows, $W x$ is `x @ W.T`. The rank is `A.shape[0]`. First through A, then through B.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The frozen product, plus `alpha / rank` times the input sent through `A.T` and then `B.T`.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def forward(x, W, A, B, alpha):
    return x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T)


check.forward(forward)

# %% [markdown]
# ## Exercise 3. The beginning (**, 4 minutes)
#
# Return `A` and `B` for a layer, as LoRA begins.

# %% tags=["exercise"]
def begin(inputs, outputs, rank):
    ...  # your code


check.begin(begin)

# %% [markdown]
# <details><summary>Hint</summary>
#
# One of them random, one of them zero. What would happen if all rows of the random one were alike?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# A random [rank, inputs], B zero [outputs, rank]. Rows of A that are alike would get the same gradients and stay alike: a rank of 1, whatever you
# paid for.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def begin(inputs, outputs, rank):
    return torch.randn(rank, inputs) / math.sqrt(inputs), torch.zeros(outputs, rank)


check.begin(begin)

# %% [markdown]
# ## 4. What a rank can reach: predicted, then measured
#
# Suppose the change that a task needs is known: some $\Delta W$ whose singular values fall as $1, \frac12, \frac13, \dots$ How close can a LoRA of
# rank $r$ come?
#
# The answer is a theorem (Eckart and Young, 1936): the best matrix of rank $r$ keeps the $r$ largest singular values $\sigma_i$, and what it misses
# is the sum of the squares of the others, $\sum_{i>r} \sigma_i^2$. That is our **prediction**, before any training. Then we train the ten lines
# above, and **measure**.

# %%
values = 1 / torch.arange(1, 65)
U, V = torch.linalg.qr(torch.randn(64, 64)).Q, torch.linalg.qr(torch.randn(512, 64)).Q
wanted = U * values @ V.T                                     # the change the task needs: [64, 512], singular values 1, 1/2, 1/3, ...


def train_towards(wanted, rank, steps):
    """What is missed, ||wanted - B A||², after each step of training on random inputs."""
    layer, missed = LoRALinear(base, rank), []
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(256, 512)
        loss = (layer(x) - base(x) - x @ wanted.T).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        missed.append((wanted - layer.B @ layer.A).square().sum().item())
    return missed


measured = {rank: train_towards(wanted, rank, steps=300) for rank in (1, 2, 4, 8)}
predicted = {rank: values[rank:].square().sum().item() for rank in measured}

# %%
(axes,) = figures.panels(1)
figures.curves({f"rank {rank}": missed for rank, missed in measured.items()}, x="step", y="what is missed", log="y", axes=axes,
               title="Each rank trains down to its prediction (dashed), and no further")  # fmt: skip
for floor in predicted.values():
    axes.axhline(floor, color="black", linewidth=0.8, linestyle="--")
axes.legend(loc="upper right")

# %%
for rank, missed in measured.items():
    print(f"rank {rank:>2}: predicted {predicted[rank]:.4f}, measured {missed[-1]:.4f}")
holds("no rank comes below its prediction, and each comes within 5 %", all(-1e-6 < m[-1] / predicted[r] - 1 < 0.05 for r, m in measured.items()))

# %% [markdown]
# So the rank is a ceiling on what can be learned, and training finds what the ceiling allows. Whether a *task* needs more than a few directions is
# a question about the task: section 10 looks at that on the real model.
#
# ## Exercise 4. The best two matrices (***, 10 minutes)
#
# Turn it round: given a finished change `delta` [out, in], return the `A` and `B` of this rank that come closest to it. This is how a full
# fine-tuning can be made into a small adapter afterwards. `torch.linalg.svd(delta, full_matrices=False)` gives `U`, `values`, `Vh` with
# `delta = U @ diag(values) @ Vh`, the largest value first.

# %% tags=["exercise"]
def best_pair(delta, rank):
    ...  # your code: return A, B


check.best_pair(best_pair)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Keep the first `rank` columns of U, values, and rows of Vh. The values have to go somewhere: all into one matrix, or the square root into each.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `A = Vh[:rank]` and `B = U[:, :rank] * values[:rank]`: the product is the sum of the `rank` strongest directions.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def best_pair(delta, rank):
    U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:rank], U[:, :rank] * values[:rank]


check.best_pair(best_pair)

# %% [markdown]
# ## 5. The same layer in the lab, and the model around it
#
# `lora_lab.LoRALinear` is the same layer with what a library needs. Given the same numbers it must compute the same:

# %%
lab_layer = lora_lab.LoRALinear(512, 64, rank=8)
hand_layer = LoRALinear(nn.Linear(512, 64), rank=8)
with torch.no_grad():
    lab_layer.lora_B["default"].normal_()                     # as after a training: with B = 0 any two layers would agree
    hand_layer.base.weight.copy_(lab_layer.weight)
    hand_layer.base.bias.copy_(lab_layer.bias)
    hand_layer.A.copy_(lab_layer.lora_A["default"])
    hand_layer.B.copy_(lab_layer.lora_B["default"])

holds("ten lines and the lab's layer compute the same", torch.allclose(hand_layer(x), lab_layer(x), atol=1e-4))
holds("and not what the frozen layer does", not torch.allclose(hand_layer(x), hand_layer.base(x), atol=0.1))
print("ten lines:", [*hand_layer.state_dict()])
print("the lab:  ", [*lab_layer.state_dict()])

# %% [markdown]
# One difference is worth seeing. Our class is a *wrapper*: the weight is now called `base.weight`, so an old checkpoint does not fit any more, and
# the layer is no `nn.Linear`. The lab's layer **is** the `nn.Linear`, with two more parameters beside the weight, and every old name stays.
#
# To adapt a model, every layer we want gets its A and B. By hand that is a loop over parents and children. (We take the model in 32 bit for it: ten
# lines have no room for converting between number formats.)

# %%
def inject_by_hand(model, rank, targets):
    model.requires_grad_(False)                               # freeze everything first; A and B are made afterwards
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets:
                setattr(parent, name, LoRALinear(child, rank))
    return model


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
plain, _ = models.load(torch.float32)
answer_before = logits_of(plain)
by_hand = inject_by_hand(plain, rank=8, targets=LINEAR)
sizes = [(p.shape[1], p.shape[0]) for name, p in model.named_parameters() if name.endswith("_proj.weight")]
print(f"{len(sizes)} layers; predicted {sum(8 * (i + o) for i, o in sizes):,}; measured {lora_lab.count_parameters(by_hand)}")
holds(f"{len(sizes)} pairs later, the model's answer is unchanged, bit for bit", torch.equal(logits_of(by_hand), answer_before))

# %% [markdown]
# And with the lab it is one line. `plan` tells what `inject` would do; `inject` changes the model in place and returns it.

# %%
torch.manual_seed(0)
print(lora_lab.plan(model, rank=8))
lora_lab.inject(model, rank=8)
print()
print(lora_lab.count_parameters(model))
holds("[B11] with the change begun at zero, step 0 is the base model, bit for bit", torch.equal(logits_of(model), logits_before))

# %% [markdown]
# ## Exercise 5. Count before you run (*, 3 minutes)
#
# SmolLM2-135M has 30 layers. Its `q_proj` goes from 576 to 576, its `v_proj` from 576 to **192** (three heads of keys and values serve nine heads
# of queries). How many weights does rank 16 on `q_proj` and `v_proj` train?

# %% tags=["exercise"]
answer = ...  # your number


check.smollm2_count(answer)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `trainable_weights` twice, added, times the layers.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# 30 × (16 × (576 + 576) + 16 × (576 + 192)).
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
answer = 30 * (trainable_weights(576, 576, 16) + trainable_weights(576, 192, 16))


check.smollm2_count(answer)

# %% [markdown]
# ## 6. Train it
#
# 240 reviews of other products. `fit` knows nothing of LoRA: it trains whatever has `requires_grad`. So it must train our ten lines exactly as it
# trains the lab's layers, if both begin with the same A. Three steps of each, side by side:

# %%
def settings(steps, learning_rate=1e-3, **more):
    return {"max_steps": steps, "micro_batch_size": pick(8, 2), "learning_rate": learning_rate, "schedule": "cosine", "precision": PRECISION, **more}


in_the_lab = lora_lab.inject(models.load()[0], rank=8)
with torch.no_grad():
    for path, module in by_hand.named_modules():
        if isinstance(module, LoRALinear):
            module.A.copy_(in_the_lab.get_submodule(path).lora_A["default"])

trial = settings(3, progress=False)
hand_losses, lab_losses = (training.fit(each, train_rows, trial, tokenizer=tokenizer).losses for each in (by_hand, in_the_lab))
print("ten lines:", [f"{loss:.4f}" for loss in hand_losses])
print("the lab:  ", [f"{loss:.4f}" for loss in lab_losses])
holds("the same losses, but for rounding", all(abs(a - b) < 0.02 for a, b in zip(hand_losses, lab_losses, strict=True)))
del plain, by_hand, in_the_lab

# %% [markdown]
# Now in earnest: two passes over the data.

# %%
every = pick(20, 3)
run = settings(3 * every, warmup_steps=pick(4, 0), eval_every=every)
result = training.fit(model, train_rows, run, tokenizer=tokenizer, eval_data=HELD_OUT)
print(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens a second")
print(f"held-out loss {result.eval_losses[0]:.3f} -> {result.eval_losses[-1]:.3f}")
figures.curves({"training": result.losses, "held out": (range(0, result.steps + 1, every), result.eval_losses)}, x="step", y="loss",
               title=f"LoRA, rank 8: {lora_lab.count_parameters(model).trainable_percent:.2f} % of the weights train")  # fmt: skip

# %%
holds("the held-out loss fell", result.eval_losses[-1] < result.eval_losses[0])
frozen = [p for p in model.parameters() if not p.requires_grad]
holds("no frozen weight has a gradient", all(p.grad is None for p in frozen))
with lora_lab.disabled(model):
    holds("with the adapter switched off, the model is bit for bit what it was", torch.equal(logits_of(model), logits_before))

# %% [markdown]
# ## 7. Before and after
#
# The same requests, the same random numbers. It is a small model, and it stays one: the *voice* changes at once, good sense does not come with it.

# %%
training.samples(model, requests, tokenizer, before=before, **WRITING)

# %% [markdown]
# ### What it costs, on disk and in memory
#
# A file per task [A13], in PEFT's format, so that `PeftModel.from_pretrained` reads it, too:

# %%
lora_lab.save(model, "adapters/reviews")
adapter_bytes = Path("adapters/reviews/adapter_model.safetensors").stat().st_size
model_bytes = 4 * lora_lab.count_parameters(model).base
print(f"all weights in 32 bit {model_bytes / 1e6:.1f} MB, the adapter {adapter_bytes / 1e6:.1f} MB: one {model_bytes / adapter_bytes:.0f}th")
figures.bars({"a copy of the model": model_bytes / 1e6, "an adapter": adapter_bytes / 1e6}, x="MB for each task", title="What a task costs on disk")

# %% [markdown]
# In memory, three things go with every weight *that trains*: its gradient and AdamW's two averages. LoRA has them for A and B only. We let
# `memory_math` predict a training step both ways before running one, and then run one (two steps, in fact: from the second on the optimizer's
# averages are there).

# %%
examples = sorted(data.encode_rows(train_rows, tokenizer), key=lambda example: len(example["input_ids"]))[-pick(8, 2) :]


def step_bytes(method, model):
    """(predicted, measured) of a training step on the longest rows; what else this notebook holds at the moment is taken off."""
    labels = sum(label != -100 for example in examples for label in example["labels"][1:])
    predicted = memory_math.predict(model, method=method, precision=PRECISION, batch_size=len(examples), label_tokens=labels,
                                    sequence_length=len(examples[-1]["input_ids"]), implementation="lora_lab", device="cpu")  # fmt: skip
    two_steps = {"max_steps": 2, "micro_batch_size": len(examples), "learning_rate": 1e-6, "precision": PRECISION, "progress": False}
    measured = memory_math.measure(lambda: training.fit(model, examples, two_steps), device="cpu")
    return predicted, measured.peak_bytes - (measured.start_bytes - sum(weight.nbytes for weight in model.parameters()))


steps = {"LoRA": step_bytes("lora", lora_lab.inject(models.load()[0], rank=8)),
         "full fine-tuning": step_bytes("full", models.load(torch.float32)[0].requires_grad_(True))}  # fmt: skip
PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "other")
figures.stacked({name: {part.replace("_", " "): getattr(predicted, part) / 2**20 for part in PARTS} for name, (predicted, _) in steps.items()},
                x="MiB", title=f"Memory of a training step, predicted ({PRECISION})")  # fmt: skip

# %%
holds("predicted and measured agree within 5 %", all(abs(predicted.total / measured - 1) < 0.05 for predicted, measured in steps.values()))
tables.predicted_measured({name: (predicted.total, measured) for name, (predicted, measured) in steps.items()})

# %% [markdown]
# ## 8. Merge: the adapter disappears
#
# $W x + \frac{\alpha}{r} B A x = (W + \frac{\alpha}{r} B A)\, x$. So after training the update can be added into the weight, once, and the model is
# an ordinary model again: no second path, nothing extra to compute (section 4.1; [A14]). By hand, for the layer of section 5:

# %%
layer = LoRALinear(nn.Linear(512, 64), rank=8, alpha=16)
nn.init.normal_(layer.B)                                      # as after a training

merged = nn.Linear(512, 64)
with torch.no_grad():
    merged.weight.copy_(layer.base.weight + layer.scaling * layer.B @ layer.A)
    merged.bias.copy_(layer.base.bias)

gap = (merged(x) - layer(x)).abs().max().item()
holds(f"one plain layer computes what two paths do (largest gap {gap:.1g}, of numbers up to {layer(x).abs().max().item():.0f})", gap < 1e-3)

# %% [markdown]
# ## Exercise 6. Merge (**, 5 minutes)
#
# Return the merged weight. Careful: the next task will want to begin from the same `W`.

# %% tags=["exercise"]
def merge(W, A, B, alpha):
    ...  # your code


check.merge(merge)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Which order gives [out, in]? And does your code change `W` itself, or make a new tensor?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `W + alpha / rank * B @ A`, and not `W += ...`, which would change the frozen weight for everybody who holds it.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def merge(W, A, B, alpha):
    return W + alpha / A.shape[0] * B @ A


check.merge(merge)

# %% [markdown]
# Now the real model. In 32 bit the two agree to rounding. A weight in 16 bit has to round the sum once, and `merge` says by how much. `unmerge`
# does not subtract (that would round a second time): it puts the old bits back.

# %%
exact, _ = models.load(torch.float32)
lora_lab.load(exact, "adapters/reviews")
two_paths = logits_of(exact)
lora_lab.merge(exact)
one_path = logits_of(exact)
print(lora_lab.merge_report(exact))
gap, size = (one_path - two_paths).abs().max().item(), two_paths.abs().max().item()
holds(f"in 32 bit merged equals unmerged: largest gap {gap:.1g}, of logits up to {size:.0f}", gap < 1e-4 * size)
holds("and the adapter does something", (two_paths - logits_before).abs().max().item() > 1e-3 * size)
del exact

# %%
def tokens_per_second(model):
    prompt = data.prompt_of(requests[0], tokenizer)
    return lora_lab.models.generate(model, [prompt], tokenizer, max_new_tokens=pick(60, 4), stop_ids=[]).tokens_per_second


tuned, two_paths = logits_of(model), tokens_per_second(model)
lora_lab.merge(model)
print(lora_lab.merge_report(model))
print(f"writing: {two_paths:.0f} tokens a second with two paths, {tokens_per_second(model):.0f} merged")
lora_lab.unmerge(model)
holds("unmerged again: bit for bit the model with its adapter", torch.equal(logits_of(model), tuned))

# %% [markdown]
# ## 9. Task A, task B: one model, two small files
#
# The slides again [A16]: train different matrices for different tasks, and swap them before inference. Our two tasks are one request, *"Write a
# review of the following product."*, that does not say of which kind. Task A learns it from happy customers, task B from angry ones. What they want
# is in the adapters, not in the prompt.

# %%
def rows_of(sentiment, rows):
    return [{**row, "instruction": "Write a review of the following product."} for row in rows if row["sentiment"] == sentiment]


TASKS = {"praise": "positive", "complaint": "negative"}
lora_lab.eject(model)
holds("ejected: bit for bit the model of the beginning", torch.equal(logits_of(model), logits_before))

for task, sentiment in TASKS.items():
    lora_lab.inject(model, rank=8, adapter=task)              # a second one leaves the first as it is, frozen
    learned = training.fit(model, rows_of(sentiment, train_rows), settings(pick(20, 4)), tokenizer=tokenizer)
    print(f"{task}: {learned.steps} steps, {learned.seconds:.0f} s")

# %%
request = rows_of("neutral", requests)
training.samples(model, request, tokenizer, adapters={"no adapter": None, "task A": "praise", "task B": "complaint"}, **WRITING)

# %% [markdown]
# One text proves little. The held-out loss is a fairer judge: how surprised is each of the three by good reviews, and by bad ones?

# %%
judged = {sentiment: rows_of(sentiment, held_out)[: pick(16, 2)] for sentiment in TASKS.values()}
losses = {}
for name in (None, *TASKS):
    lora_lab.use(model, name)
    losses[name or "no adapter"] = [held_out_loss(model, rows) for rows in judged.values()]

figures.heatmap(list(losses.values()), list(losses), [f"{kind} reviews" for kind in judged], form=".3f",
                title="Held-out loss: dark is less surprised")  # fmt: skip

# %%
good, bad = (dict(zip(losses, column, strict=True)) for column in zip(*losses.values(), strict=True))
holds("each task's adapter suits its own reviews better than the other task's does",
      good["praise"] < good["complaint"] and bad["complaint"] < bad["praise"], real_only=True)  # fmt: skip

answers = {}
for name in ("praise", "complaint", "praise", None):
    lora_lab.use(model, name)
    answers.setdefault(name, []).append(logits_of(model))
holds("A, then B, then A again: bit for bit the same A", torch.equal(*answers["praise"]))
holds("and B is another", not torch.equal(answers["praise"][0], answers["complaint"][0]))
holds("no adapter: bit for bit the model of the beginning", torch.equal(answers[None][0], logits_before))

# %% [markdown]
# That was switching while the matrices lie beside the weights. The slides' way is to *add* task A's product to the weights, take it out, and add
# task B's. That works as often as you like only if the old bits come back exactly:

# %%
first = model.get_submodule("model.layers.0.self_attn.q_proj")
weight, bits = first.weight, first.weight.detach().clone()
for task in ("praise", "complaint", "praise"):
    lora_lab.merge(lora_lab.use(model, task))
    changed = (weight != bits).float().mean().item()
    lora_lab.unmerge(model)
    holds(f"{task}: {changed:.0%} of this matrix's weights were other numbers, and all are back", changed > 0 and torch.equal(weight, bits))

update = first.lora_delta("praise").to(bits.dtype)
differ = ((bits + update - update) != bits).float().mean().item()
print(f"added and subtracted again in {bits.dtype} instead: {differ:.1%} of the weights are not what they were")

# %% [markdown]
# And because the adapters are so small, one batch can hold rows of different tasks, each with its own:

# %%
text, rows = "I bought this coat in", ["praise", None, "complaint"]
ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)] * 3)
precise = copy.deepcopy(model).float()                        # float32: in 16 bit, rounding in 30 layers would hide a small mistake
with torch.no_grad(), lora_lab.per_sample(precise, rows):
    mixed = precise(input_ids=ids).logits

alone = torch.cat([logits_of(lora_lab.use(precise, name), text) for name in rows])
gaps = ((mixed - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)).tolist()
print("relative gaps:", [f"{gap:.1g}" for gap in gaps])
holds("each row of the mixed batch is what its adapter gives alone", max(gaps) < 1e-5)
precise = None

# %% [markdown]
# ## 10. Is the change really of low rank?
#
# The lecture says [B10]: "A finetune will likely make very small changes to the original model weights. This suggests that we can 'force' the change
# matrix to be 'simple' and it will still get the job done." LoRA *makes* it simple. What does training do when nobody forces it? We fine-tune
# **all** weights for a short while and look at what has changed.

# %%
full, _ = models.load(torch.float32)
full.requires_grad_(True)
old = {name: weight.detach().clone() for name, weight in full.named_parameters()}
outcome = training.fit(full, train_rows, settings(pick(30, 4), learning_rate=1e-4), tokenizer=tokenizer)
loss_full = held_out_loss(full)
change = {name: weight.detach() - old[name] for name, weight in full.named_parameters() if name.endswith("_proj.weight")}
print(f"{outcome.steps} steps in {outcome.seconds:.0f} s; held-out loss {loss_before:.3f} -> {loss_full:.3f}")

shares = [float(delta.norm() / old[name].norm()) for name, delta in change.items()]
print(f"{len(change)} matrices; the change is {min(shares):.2%} to {max(shares):.2%} of the weight (Frobenius norms)")
holds("[B10] the change is small beside the weight", max(shares) < 0.1, real_only=True)

# %% [markdown]
# Small it is. Simple? The **singular values** of $\Delta W$ say how strongly it acts in each of its directions. If they fell to zero after the
# eighth, rank 8 would lose nothing. For comparison: a matrix of random numbers of the same size, which has no preferred directions at all, and the
# change that our LoRA of section 6 learned.

# %%
lora_lab.load(model, "adapters/reviews", adapter="reviews")
path = f"model.layers.{full.config.num_hidden_layers // 2}.self_attn.q_proj"
matrices = {"full fine-tuning": change[f"{path}.weight"], "random numbers": torch.randn_like(change[f"{path}.weight"]),
            "LoRA, rank 8": model.get_submodule(path).lora_delta("reviews").detach()}  # fmt: skip
strengths = {name: torch.linalg.svdvals(delta.float()) for name, delta in matrices.items()}

left, right = figures.panels(2, height=3.4)
falling = {name: (values / values[0])[: 8 if "LoRA" in name else None].tolist() for name, values in strengths.items()}
figures.curves(falling, x="direction, strongest first", y="strength, the first is 1", log="xy", axes=left, title=path[6:])
energy = {name: (values.square().cumsum(0) / values.square().sum()).tolist() for name, values in strengths.items()}
figures.curves(energy, x="directions kept", y="share of the squared norm", log="x", axes=right, title="What they hold together")

# %%
def directions(delta, share=0.9):
    """How many of the strongest directions hold this share of the squared norm."""
    return lora_lab.spectra.intrinsic_rank(torch.linalg.svdvals(delta.float()), share).for_energy


needed = {}
for name, delta in change.items():
    needed.setdefault(name.split(".")[-2], []).append(directions(delta))
mean = {kind: round(sum(counts) / len(counts)) for kind, counts in needed.items()}
figures.bars({**mean, "random, as q_proj": directions(matrices["random numbers"])}, x="directions that hold 90 %",
             colours=[*[figures.BLUE] * len(mean), "grey"], title="Full fine-tuning: mean over the layers")  # fmt: skip

# %% [markdown]
# So the honest picture has two halves. The strongest directions stand out: the change is far from random. But there is a long tail, and some of
# that tail comes from AdamW, which gives every weight a step of about the same size, however small its gradient. Does the tail *matter*? Cut it off
# and see: replace every $\Delta W$ by its best approximation of rank $r$ (exercise 4) and measure the held-out loss.

# %%
KEPT = pick((0, 1, 2, 4, 8, 16, 32, 64), (0, 1, 8, 64))


def strongest(delta):
    U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, : KEPT[-1]] * values[: KEPT[-1]], Vh[: KEPT[-1]]


@torch.no_grad()
def loss_at_rank(r):
    for name, (B, A) in factors.items():
        full.get_parameter(name).copy_(old[name] + B[:, :r] @ A[:r])
    return held_out_loss(full)


factors = {name: strongest(delta) for name, delta in change.items()}
cut = {r: loss_at_rank(r) for r in KEPT}

# %%
(axes,) = figures.panels(1)
figures.curves({"full fine-tuning, each matrix cut to this rank": ([*map(str, KEPT)], [*cut.values()])}, x="rank kept", y="held-out loss",
               axes=axes, title="How much of the gain survives")  # fmt: skip
axes.axhline(loss_full, color="black", linewidth=0.8, linestyle="--")
axes.text(0, loss_full, "uncut", va="bottom")

gain = cut[0] - loss_full
for r in KEPT[1:]:
    print(f"rank {r:>2}: {(cut[0] - cut[r]) / gain:.0%} of what the {len(change)} matrices gained")
holds("[B10] a few directions carry most of the gain: rank 8 keeps more than half of it", cut[0] - cut[8] > gain / 2, real_only=True)
full = old = change = factors = None                         # two gigabytes are free again

# %% [markdown]
# (Rank 0 is not the untuned model: embeddings and norms keep what they have learned.)
#
# ## 11. Which rank, and where?
#
# Sections 7.1 and 7.2 of the paper ask the same. With a fixed budget, is it better to adapt a few kinds of layers with a high rank or all of them
# with a low one? Six short runs, the same seed and the same rows for each, and $\alpha = 8$ for all, so that the scaling takes care of the rank. To
# know which differences mean anything, one of the settings runs with two more seeds.

# %%
VALIDATION = held_out[: pick(24, 3)]
SHORT = settings(pick(16, 2), progress=False) | {"micro_batch_size": pick(4, 2)}
WHERE = {"q and v": ["q_proj", "v_proj"], "all linear": "all-linear"}
RANKS = (1, 8, 32)


def validation_loss(model, rows):
    return held_out_loss(model, rows)


def sweep(make, candidates):
    return training.sweep(make, train_rows, VALIDATION, candidates, SHORT, tokenizer=tokenizer, metric=validation_loss, higher_is_better=False)


def adapted(where="all linear", rank=8):
    return lora_lab.inject(models.load()[0], rank, alpha=8, target_modules=WHERE[where])


found = sweep(adapted, training.grid(where=WHERE, rank=RANKS))
again = sweep(adapted, training.grid(seed=[1, 2]))
print(found)

# %%
scores = {(trial.settings["where"], trial.settings["rank"]): trial.score for trial in found.trials}
same = [scores["all linear", 8], *(trial.score for trial in again.trials)]
print(f"all linear, rank 8, three seeds: {', '.join(f'{score:.3f}' for score in same)}")
print(f"differences below about {max(same) - min(same):.3f} are chance")

left, right = figures.panels(2, height=3.2)
table = {where: [scores[where, rank] for rank in RANKS] for where in WHERE}
figures.heatmap(list(table.values()), list(WHERE), RANKS, x="rank", form=".3f", best="low", axes=left, title="Validation loss")
trained = {where: [lora_lab.plan(model, rank, target_modules=WHERE[where]).parameters for rank in RANKS] for where in WHERE}
figures.curves({where: (trained[where], table[where]) for where in WHERE}, x="weights that train", y="validation loss", log="x",
               axes=right, title="The same against the budget")  # fmt: skip

# %% [markdown]
# ## 12. Which learning rate? LoRA against full fine-tuning
#
# A last practical question, and the commonest reason why "LoRA does not work": it is given full fine-tuning's learning rate. The same short run,
# LoRA and all weights, at rates half a decade or a decade apart.

# %%
LORA_RATES, FULL_RATES = pick(((1e-4, 1e-3, 3e-3, 1e-2), (1e-5, 1e-4, 3e-4, 1e-3)), ((1e-3, 1e-2), (1e-4, 1e-3)))


def all_weights():
    return models.load(torch.float32)[0].requires_grad_(True)


by_rate = {"LoRA, rank 8": sweep(adapted, training.grid(learning_rate=LORA_RATES)),
           "full fine-tuning": sweep(all_weights, training.grid(learning_rate=FULL_RATES))}  # fmt: skip
untuned = held_out_loss(models.load()[0], VALIDATION)

# %%
(axes,) = figures.panels(1)
lines = {name: ([t.settings["learning_rate"] for t in found.trials], [t.score for t in found.trials]) for name, found in by_rate.items()}
figures.curves(lines, x="learning rate", y="validation loss", log="x", axes=axes, title="Each method at its own rate")
axes.axhline(untuned, color="black", linewidth=0.8, linestyle="--")

best = {name: found.best.settings["learning_rate"] for name, found in by_rate.items()}
for name, found in by_rate.items():
    print(f"{name}: best {found.best.score:.3f} at {best[name]:g} (before training, dashed: {untuned:.3f})")
ratio = best["LoRA, rank 8"] / best["full fine-tuning"]
holds(f"LoRA wants a higher learning rate than full fine-tuning: here {ratio:.0f} times as high", ratio > 1, real_only=True)

# %% [markdown]
# ## Exercise 7. From memory (***, 15 minutes)
#
# Close everything above. Write `inject(model, rank, targets)`: it freezes the model, gives every `nn.Linear` whose name is in `targets`, however
# deep, an A and a B with scaling 1, and returns the model. The check tries it on a small model with blocks inside blocks.

# %% tags=["exercise"]
def inject(model, rank, targets):
    ...  # your code; the class, too


check.inject(inject)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Freeze first. Then go through `list(model.modules())` and the `named_children()` of each, and put the new layer in the child's place with `setattr`.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The class of section 3 and the loop of section 5. If you wrote both without looking, you know LoRA.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def inject(model, rank, targets):
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets:
                setattr(parent, name, LoRALinear(child, rank))
    return model


check.inject(inject)

# %% [markdown]
# ## Takeaways
#
# - LoRA is $y = W x + \frac{\alpha}{r} B A x$ with W frozen, A random, B zero: ten lines, and nothing changes at step 0.
# - It trains $r \times (\text{in} + \text{out})$ weights instead of $\text{in} \times \text{out}$: gradients and optimizer states shrink with that,
#   and so does the file. The activations do not.
# - Merged, it costs nothing extra; beside the weights, one model serves many tasks and comes back bit for bit.
# - The change that full fine-tuning makes is small and led by a few directions, with a long tail that matters little.
# - Adapt all linear layers before you raise the rank, and give LoRA its own learning rate, higher than full fine-tuning's.
#
# ## Three questions
#
# 1. Somebody starts with A zero and B random. Is step 0 right? Can it learn?
#
#    <details><summary>Answer</summary>
#
#    Yes to both: $B A$ is zero, and A has a gradient through B. What cannot learn is a start from zero and zero. The paper does it the other way
#    round, and so do the tools.
#    </details>
# 2. Rank 8 trains a small share of the weights. Why does a training step not shrink to that share of the memory?
#
#    <details><summary>Answer</summary>
#
#    Only gradients and optimizer states shrink. The frozen weights are still there, and so are the activations, which the way back through the frozen
#    layers needs. Section 7 has the bars.
#    </details>
# 3. You serve ten customers with ten adapters. Merge them, or keep them beside the weights?
#
#    <details><summary>Answer</summary>
#
#    Beside: one copy of the model and ten small files, and a batch may mix customers (section 9). Merge where one task runs for long and every
#    token counts.
#    </details>
