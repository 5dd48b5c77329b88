# %% [markdown]
# # 04 · Prompt tuning by hand
#
# > Teach a frozen model a task with a few trained vectors in front of the text, and let it do many tasks in one batch.
#
# **What you will learn**
#
# - to put trained vectors before a text in ten lines: embeddings, mask, labels, and the position ids that are easily forgotten
# - what a task costs then: 20,480 numbers for a model of 11 billion, and a file of a few kilobytes
# - how a prompt should begin, how long it should be, and why its learning rate goes with the size of the model's words
# - what a prefix adds, which speaks to every layer
# - to run a batch in which each row has a task of its own, to let prompts vote, and to read a prompt
#
# **Time:** about 8 minutes on 2 cores with the real model. Offline once the model is fetched.
#
# The paper is Lester et al. 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*
# ([arXiv:2104.08691](https://arxiv.org/abs/2104.08691)); its sections and tables are named where they are used. The lecture's claims are
# checked as we meet them, marked with their row such as [A17], and with ✓ when they hold in this run.

# %%
import hashlib
import math
import time
from pathlib import Path

import torch
from IPython.display import SVG
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import memory_math
import prompt_tuning_lab as ptl
from course import figures, holds, models, pick, tables
from course.checks import prompt_tuning_by_hand as check
from lora_lab import data, training
from lora_lab.models import generate

torch.manual_seed(0)
PRECISION = models.precision()
print(f"precision {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# ## 1. The baseline first
#
# The task: is a review positive or negative? The model is to say so with its next word. We write the review into a template and look at
# the probability of the two words " positive" and " negative" behind it. Some of these reviews mean the opposite of what their words say,
# so do not expect too much of a small model.

# %%
model, tokenizer = models.load()
model.requires_grad_(False)                                   # frozen, from here to the end
train_rows, held_out = data.load("sentiment")
held_out = held_out[: pick(120, 8)]
TEMPLATE, ANSWERS = "Review: {text}\nSentiment:", (" negative", " positive")
truth = torch.tensor([row["label"] for row in held_out])
tables.Table(["review", "is"], [[row["text"], ANSWERS[row["label"]]] for row in held_out[:6]])

# %% [markdown]
# Three numbers, all from the same log-probabilities. The **loss** is $-\log p(\text{the right word})$, the mean over the reviews; it is
# what training brings down. **Right**: how often the right one of the two words is the likelier. And **says one of the two**: the
# probability that the next word is one of them at all.

# %%
def scores_of(model, rows=held_out):
    """log P of " negative" and " positive" behind each review, [rows, 2]."""
    asked = [data.filled(TEMPLATE, row) for row in rows]
    return training.score_choices(model, asked, tokenizer, ANSWERS, batch_size=32, precision=PRECISION, use_cache=False, progress=False)


def numbers(scores):
    loss = -scores[torch.arange(len(scores)), truth].mean().item()
    return [round(loss, 3), f"{training.accuracy(training.best_choices(scores), truth.tolist()):.1%}", f"{scores.exp().sum(1).mean():.1%}"]


def writes(model, rows=held_out[:5]):
    return generate(model, [data.filled(TEMPLATE, row) for row in rows], tokenizer, max_new_tokens=pick(5, 2)).texts


HEADINGS = ["", "loss", "right", "says one of the two"]
found = {"no prompt": scores_of(model)}
written_before = writes(model)
tables.Table(HEADINGS, [["no prompt", *numbers(found["no prompt"])]])

# %% [markdown]
# The model knows something about sentiment, and hardly ever answers with one of our two words: nobody told it to. Before we tell it, its
# fingerprint: one hash over all weights, to see at the end whether anybody has touched them.

# %%
def fingerprint(model):
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


untouched = fingerprint(model)
print(untouched[:16], "...")

# %% [markdown]
# ## 2. Words that are no words, and how many numbers they are
#
# We could tell the model by writing instructions before the review. Each word of them becomes a vector, a row of the embedding table, and
# the vectors are all that the model sees. So why only vectors that belong to words? A **soft prompt** is $P$ vectors that may be
# anything, and gradient descent finds them (section 2 of the paper):
#
# $$[\,P_e ; X_e\,] \in \mathbb{R}^{(p + n) \times e}, \qquad \text{only } P_e \text{ trains.}$$
#
# A task is a matrix of $p$ rows, as wide as the model. The lecture's example is T5-XXL with five of them.

# %%
whole = memory_math.count_parameters("t5-v1_1-xxl")
prompt = 5 * 4096
print(f"T5-XXL {whole:,}, a prompt of 5 virtual tokens {prompt:,}: 1 in {whole / prompt:,.0f}")
holds("[A17] 20,480 parameters per task, against 11 billion", prompt == 20_480 and round(whole / 1e9) == 11)
holds("[A17] over five orders of magnitude fewer", 5 < math.log10(whole / prompt) < 6)
figures.bars({"the whole model": whole, "prompt, 100 tokens": 100 * 4096, "prompt, 5 tokens": prompt}, x="numbers for each task (logarithmic)",
             log=True, title="T5-XXL, 11 billion parameters")  # fmt: skip

# %% [markdown]
# Table 4 of the paper has these counts for all sizes. `memory_math` has recomputed it, and one of its printed counts is a slip of the
# pen:

# %%
counts = [claim for claim in memory_math.claims() if claim.source.startswith("Lester") and claim.claim.endswith("trained")]
by_size = {}
for claim in counts:
    size, length = claim.claim.removesuffix(" tokens: trained").split(", ")
    printed = "" if claim.stated == claim.computed else f" (printed: {claim.stated:,.0f})"
    by_size.setdefault(size, {})[length] = f"{claim.computed:,}{printed}"
wrong = [claim for claim in counts if claim.verdict == "wrong"]
holds("29 of the 30 counts are as printed", (len(counts), len(wrong)) == (30, 1))
tables.Table(["tokens", *by_size["t5-v1_1-xxl"]], [[size, *lengths.values()] for size, lengths in by_size.items()])

# %% [markdown]
# ## Exercise 1. How many numbers is a task? (*, 3 minutes)
#
# As a function of the number of virtual tokens and the model's width.

# %% tags=["exercise"]
def prompt_numbers(virtual_tokens, width):
    ...  # your code


check.prompt_numbers(prompt_numbers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A matrix with a row for each virtual token. The model's layers and its vocabulary are frozen.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `virtual_tokens * width`.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def prompt_numbers(virtual_tokens, width):
    return virtual_tokens * width


check.prompt_numbers(prompt_numbers)

# %% [markdown]
# ## 3. A soft prompt in ten lines
#
# Three things go in front of the text, $P$ of each, and each has a reason:
#
# 1. the vectors themselves, before the **embeddings** of the text;
# 2. ones in the **mask**, so that the text looks at them;
# 3. $-100$ in the **labels**: no word stands there that could be right, and $-100$ is what the loss leaves out.

# %%
def with_prompt(model, prompt, ids, mask, labels=None):
    """What to call the model with, so that each row reads the prompt first. prompt: [P, H].  ids, mask, labels: [B, T]."""
    text, rows, virtual = model.get_input_embeddings()(ids), len(ids), len(prompt)
    front = prompt.to(text.dtype).expand(rows, -1, -1)                                   # [B, P, H]
    inputs = {"inputs_embeds": torch.cat([front, text], 1),                              # [B, P + T, H]
              "attention_mask": torch.cat([mask.new_ones(rows, virtual), mask], 1)}      # [B, P + T]
    if labels is not None:
        inputs["labels"] = torch.cat([labels.new_full((rows, virtual), -100), labels], 1)
    return inputs


# %% [markdown]
# Is it right? If the vectors are those of words, the model must answer as if the words were there:

# %%
def ids_of(text):
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


exact, _ = models.load(torch.float32)                         # 32 bit, where a cell compares closely
embedding = exact.get_input_embeddings()
words, text = ids_of("I tell positive from negative reviews."), ids_of(data.filled(TEMPLATE, held_out[0]))
with torch.no_grad():
    as_words = exact(input_ids=torch.cat([words, text], 1)).logits[:, words.shape[1] :]
    as_vectors = exact(**with_prompt(exact, embedding(words[0]), text, torch.ones_like(text))).logits[:, words.shape[1] :]
    without = exact(input_ids=text).logits
holds("vectors of words in front are the words in front", torch.allclose(as_words, as_vectors, atol=1e-3))
holds("... and they make a difference", not torch.allclose(as_vectors, without, atol=1e-2))

# %% [markdown]
# So whatever a written instruction can do, a soft prompt of the same length can do, too; and it may do more, as it is not bound to the
# words there are.
#
# ## Exercise 2. In front of it all (**, 8 minutes)
#
# From memory, and from embeddings: `prompt` [P, H], `embeds` [B, T, H], `mask` and `labels` [B, T]. Return all three with the prompt in
# front.

# %% tags=["exercise"]
def insert(prompt, embeds, mask, labels):
    ...  # your code: return embeds, mask, labels


check.insert(insert)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.cat([..., ...], dim=1)` three times. `prompt.expand(B, -1, -1)` gives every row the same prompt without copying it;
# `mask.new_ones(B, P)` and `labels.new_full((B, P), -100)` make the rest.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# As above. The one thing to be careful with: the prompt must stay connected to the gradient, so no `.data` and no `.detach()`.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def insert(prompt, embeds, mask, labels):
    rows, virtual = len(embeds), len(prompt)
    return (torch.cat([prompt.expand(rows, -1, -1), embeds], 1), torch.cat([mask.new_ones(rows, virtual), mask], 1),
            torch.cat([labels.new_full((rows, virtual), -100), labels], 1))  # fmt: skip


check.insert(insert)

# %% [markdown]
# ## 4. Train it by hand, and the same in the lab
#
# The training loop is the usual one. All that is special: the optimizer is given one parameter, the prompt. `data.verbalize` writes the
# reviews into the template; the answer alone has labels, and the stop token behind it, so that the model learns to end there.

# %%
rows = data.verbalize(train_rows, tokenizer, TEMPLATE, ANSWERS)


def collate(rows):
    """ids, mask, labels: [B, T], padded on the right."""
    def pad(name, value):
        return pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)

    labels = pad("labels", -100)
    mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], batch_first=True)
    return pad("input_ids", 0), mask, labels


def train_by_hand(model, prompt, rows, steps, rate):
    prompt = nn.Parameter(prompt.clone())
    optimizer, losses = torch.optim.AdamW([prompt], lr=rate, weight_decay=0.0), []
    for _ in range(steps):
        loss = model(**with_prompt(model, prompt, *collate(rows))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


start = embedding(ids_of("I tell positive from negative reviews.")[0]).detach()
exact.requires_grad_(False)
by_hand = train_by_hand(exact, start, rows[: pick(8, 2)], steps=3, rate=0.01)

# %% [markdown]
# And in the lab: `inject` freezes the model and puts a prompt before it; `fit` trains whatever has `requires_grad`.

# %%
lab = ptl.inject(exact, len(start), init=start, task="trial")
settings = {"max_steps": 3, "micro_batch_size": pick(8, 2), "learning_rate": 0.01, "schedule": "constant", "max_grad_norm": None, "progress": False}
in_the_lab = training.fit(lab, rows[: pick(8, 2)], settings).losses
print("ten lines:", [f"{loss:.4f}" for loss in by_hand])
print("the lab:  ", [f"{loss:.4f}" for loss in in_the_lab])
holds("the same losses, but for rounding", all(abs(a - b) < 2e-3 for a, b in zip(by_hand, in_the_lab, strict=True)))
holds("three steps, and the loss has fallen", by_hand[2] < by_hand[0])

# %% [markdown]
# Now in earnest. One model, `prompted`, will hold all tasks of this notebook side by side. The first prompt begins as the words of an
# instruction, filled up with other words to 20 virtual tokens.

# %%
VIRTUAL, STEPS, BATCH = pick(20, 24), pick(48, 4), pick(8, 2)
INSTRUCTION = "Is this review positive or negative? Answer positive if the writer liked it."

prompted = ptl.inject(model, VIRTUAL, init="text", text=INSTRUCTION, tokenizer=tokenizer, task="from-text", seed=0)
print(ptl.count_parameters(prompted))
print(prompted.prompt("from-text").initialization)
at_step_0 = scores_of(prompted)
holds("unlike LoRA, a prompt changes the answers from the first moment on", not torch.allclose(at_step_0, found["no prompt"], atol=1e-3))
ptl.use(prompted, None)
holds("switched off, the model is bit for bit what it was", torch.equal(scores_of(prompted), found["no prompt"]))

# %%
def train(task, steps=STEPS, rows=rows, **settings):
    """Train the task that was added last; the others, and the model, are frozen. Returns what `fit` does."""
    ptl.use(prompted, task)
    config = ptl.training_config(prompted, rows, max_steps=steps, micro_batch_size=BATCH, precision=PRECISION, progress=False, **settings)
    return training.fit(prompted, rows, config)


result = train("from-text")
found["from-text"] = scores_of(prompted)
losses = {"from-text": result.losses}
print(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s")
holds("the loss on held-out reviews fell", numbers(found["from-text"])[0] < numbers(found["no prompt"])[0], real_only=True)
holds("the model now says one of the two words nearly always", found["from-text"].exp().sum(1).mean() > 0.9, real_only=True)
tables.Table(HEADINGS, [["no prompt", *numbers(found["no prompt"])], ["the instruction, as words", *numbers(at_step_0)],
                        ["the same, trained", *numbers(found["from-text"])]])  # fmt: skip

# %% [markdown]
# What it writes, before and after (greedily, a few words):

# %%
asked = [row["text"] for row in held_out[:5]]
tables.before_after(dict(zip(asked, zip(written_before, writes(prompted), strict=True), strict=True)), ["no prompt", "the trained prompt"])

# %% [markdown]
# ## 5. What a task costs: predicted, then measured
#
# On disk, a number takes 4 bytes. In memory, the prompt needs next to nothing, but the step still goes forward and backward through the
# whole model, and keeps what it needs for the way back.

# %%
def tensors(folder):
    return Path(folder, "adapter_model.safetensors").stat().st_size


ptl.save(prompted, "tasks/from-text", task="from-text")
width = model.get_input_embeddings().embedding_dim
print(f"predicted {4 * prompt_numbers(VIRTUAL, width):,} bytes of numbers; measured {tensors('tasks/from-text'):,}, with the file's header")

longest = sorted(rows, key=lambda row: len(row["input_ids"]))[-BATCH:]
shape = {"batch_size": BATCH, "sequence_length": max(len(row["input_ids"]) for row in longest)}
labels = sum(label != -100 for row in longest for label in row["labels"])
on_this = {"precision": PRECISION, "label_tokens": labels, "implementation": "lora_lab", "device": "cpu", **shape}
predicted = {method: memory_math.predict(models.name(), method=method, **more, **on_this)
             for method, more in (("full", {}), ("lora", {"rank": 8}), ("prompt", {"num_virtual_tokens": VIRTUAL}))}  # fmt: skip
kept = prompted.prompt("from-text").weight.detach().clone()
step = {"max_steps": 2, "micro_batch_size": BATCH, "learning_rate": 1e-6, "precision": PRECISION, "progress": False}
measured = memory_math.measure(lambda: training.fit(prompted, longest, step), device="cpu")
with torch.no_grad():
    prompted.prompt("from-text").weight.copy_(kept)
others = measured.start_bytes - sum(p.nbytes for p in prompted.parameters())             # the second model, and what else this notebook keeps
tables.predicted_measured({"a training step with the prompt": (predicted["prompt"].total, measured.peak_bytes - others)})

# %%
PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "other")
figures.stacked({name: {part.replace("_", " "): getattr(footprint, part) / 2**20 for part in PARTS} for name, footprint in predicted.items()},
                x="MiB", title=f"Memory of a training step, predicted ({PRECISION})")  # fmt: skip

# %% [markdown]
# ## 6. How should it begin?
#
# Section 3.2 of the paper tries three beginnings: random numbers, words drawn from the vocabulary, and the words for the classes. We add
# the instruction from above. The same rows, the same number of steps, the same learning rate for all.

# %%
BEGINNINGS = {"random": {}, "vocab": {}, "labels": {"labels": ["negative", "positive"]}}
for init, more in BEGINNINGS.items():
    task = f"from-{init}"
    ptl.inject(prompted, VIRTUAL, init=init, tokenizer=tokenizer, task=task, seed=0, **more)
    losses[task] = train(task).losses
    found[task] = scores_of(prompted)
FOUR = ["from-random", "from-vocab", "from-labels", "from-text"]


def smooth(losses, over=6):
    return [sum(losses[max(0, i - over + 1) : i + 1]) / min(i + 1, over) for i in range(len(losses))]


figures.curves({name: smooth(losses[name]) for name in FOUR}, x="step", y="training loss (mean of 6)", log="y",
               title="Four beginnings")  # fmt: skip

# %%
sizes = {name: prompted.prompt(name).initialization for name in FOUR}
first_steps = {name: sum(losses[name][:8]) / len(losses[name][:8]) for name in FOUR}
holds("in the first steps the instruction is ahead of all others", first_steps["from-text"] == min(first_steps.values()), real_only=True)
right_ones = {name: found[name][torch.arange(len(truth)), truth] for name in FOUR}
chance = (right_ones["from-text"] - right_ones["from-random"]).std().item() / len(truth) ** 0.5
print(f"after training, losses that differ by less than about {2 * chance:.3f} may do so by chance")
tables.Table(["begins as", "size of its numbers then", "a word's", "loss of the first steps", *(f"{heading}, trained" for heading in HEADINGS[1:])],
             [[str(record).partition(";")[0], record.rms, record.embedding_rms, round(first_steps[name], 2), *numbers(found[name])]
              for name, record in sizes.items()])  # fmt: skip

# %% [markdown]
# The random beginning, uniform in $[-0.5, 0.5]$, is the paper's default for T5. Here its numbers are larger than those of words, and its
# directions are none of theirs, so it begins farther from all that the model has ever read than the others do. Section 3.2 of the paper
# finds random numbers behind words, and words behind those of the classes, with large gaps for small models. Here an instruction is far
# ahead in the first steps; then the others catch up, as there is little more to learn than which words to say. Look whether what is left
# of the gaps is more than chance.
#
# ## 7. The learning rate is a distance
#
# Adam divides each gradient by its own size, so in a step every number moves by about the learning rate, whatever the loss is.
# **Predicted** for the first step: exactly the rate. **Measured:**

# %%
def begin(task):
    """One more task that begins as the instruction."""
    ptl.inject(prompted, VIRTUAL, init="text", text=INSTRUCTION, tokenizer=tokenizer, task=task, seed=0)
    return prompted.prompt(task)


def moved(prompt):
    """How far its numbers are from where they began, root mean square."""
    return (prompt.weight - prompt.initial).detach().square().mean().sqrt().item()


one = begin("one-step")
train("one-step", steps=1, learning_rate=0.01, warmup_steps=0)
print(f"predicted 0.01, measured {moved(one):.5f}; a word's numbers have the size {one.initialization.embedding_rms:.3f}")
holds("the first step goes as far as the learning rate says", abs(moved(one) / 0.01 - 1) < 0.05)

# %% [markdown]
# A distance has to be seen beside other distances. The numbers of a word in this model have the root mean square (RMS), the *size*, that
# is told above. A step of a tenth of that is bold; after thousandths of it, a run is over before it has come anywhere. Other models have
# words of another size, and so another rate for the same *share*:

# %%
encoder, _ = models.load_encoder()
SIZES = {"this model": one.initialization.embedding_rms,
         "the encoder all-MiniLM": encoder.get_input_embeddings().weight.detach().square().mean().sqrt().item()}  # fmt: skip
del encoder
tables.Table(["", "size of a word's numbers", "a tenth of it", "fine-tuning's 0.0001, in words", "the paper's 0.3, in words"],
             [[name, size, size / 10, f"{1e-4 / size:.4f}", f"{0.3 / size:.1f}"] for name, size in SIZES.items()])  # fmt: skip

# %% [markdown]
# ## Exercise 3. A rate for any model (**, 5 minutes)
#
# From the embedding table [words, width] and the share that a step may move.

# %% tags=["exercise"]
def learning_rate(embedding, share):
    ...  # your code


check.learning_rate(learning_rate)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Root mean square: square all numbers, take the mean of all of them, then the root.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The share times the root of the mean of the squares. The mean itself would be near zero, as positive and negative numbers cancel.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def learning_rate(embedding, share):
    return share * embedding.square().mean().sqrt().item()


check.learning_rate(learning_rate)

# %% [markdown]
# Does it matter? The same beginning at four more rates: a usual one of fine-tuning, a usual one of LoRA, the paper's for T5, and one that
# is beyond all reason. How far can a run go? At most the sum of its rates, which with a linear decay is about **rate × steps / 2**: that
# is the prediction, in words' sizes.

# %%
table, RATES = model.get_input_embeddings().weight.detach().float(), (1e-4, 1e-3, 0.3, 30.0)
runs = {learning_rate(table, 0.1): (moved(prompted.prompt("from-text")), numbers(found["from-text"])[0])}
for rate in RATES:
    task = f"rate-{rate:g}".replace(".", "_")
    prompt = begin(task)
    train(task, learning_rate=rate)
    runs[rate] = (moved(prompt), numbers(scores_of(prompted))[0])
runs, size = dict(sorted(runs.items())), SIZES["this model"]

(axes,) = figures.panels(1)
axes.axvline(size, color="black", linewidth=0.8, linestyle="--", label="a word's size")
figures.curves({"after training": (list(runs), [loss for _, loss in runs.values()])}, x="learning rate", y="loss on held-out reviews", log="x",
               dots=True, axes=axes, title="Too slow never arrives, too fast overshoots")  # fmt: skip

# %%
holds("no run went farther than its rates allow", all(distance < rate * STEPS / 2 * 1.2 for rate, (distance, _) in runs.items()))
holds("at a rate of fine-tuning the prompt stays where it was, and learns little", runs[1e-4][1] > runs[0.3][1] + 0.3, real_only=True)
holds("and beyond all reason it is worse again", runs[30.0][1] > runs[0.3][1] + 0.05, real_only=True)
tables.Table(["learning rate", "a step, in words' sizes", "it can go at most", "it went", "loss"],
             [[f"{rate:.4g}", rate / size, rate * STEPS / 2 / size, distance / size, loss] for rate, (distance, loss) in runs.items()])  # fmt: skip

# %% [markdown]
# The mistake to avoid is on the left: a learning rate that was right for weights is too small for a prompt. To the right the valley is
# wide, wider than one would think. Each block of this model first divides a vector by its size (RMSNorm), so that once a prompt has
# become long, only its direction counts; the lab's usual share of a tenth is a cautious choice near the left edge of what works, and
# keeps the prompt among the words.
#
# ## 8. How long should it be?
#
# Section 3.2 and Figure 3 of the paper: a single token is too few for all but the largest models, twenty are nearly as good as more, and
# beyond a hundred it gets worse. Our small model, from words of the vocabulary:

# %%
LENGTHS = pick((1, 5, 20, 50), (1, 3, 24))
for length in LENGTHS:
    if length != VIRTUAL:
        ptl.inject(prompted, length, init="vocab", tokenizer=tokenizer, task=f"length-{length}", seed=0)
        train(f"length-{length}")
        found[f"length-{length}"] = scores_of(prompted)
found[f"length-{VIRTUAL}"] = found["from-vocab"]
by_length = [numbers(found[f"length-{length}"])[0] for length in LENGTHS]
left, right = figures.panels(2)
counts = [prompt_numbers(length, width) for length in LENGTHS]
figures.curves({"held out": (LENGTHS, by_length)}, x="virtual tokens", y="loss", dots=True, axes=left, title="What a longer prompt brings")
figures.curves({"numbers": (LENGTHS, counts)}, x="virtual tokens", y="numbers that train", dots=True, axes=right, title="What it costs")

# %%
print(dict(zip(LENGTHS, by_length, strict=True)))
holds("one virtual token is too few for this model", by_length[0] > max(by_length[1:]) + 0.05, real_only=True)
holds("the paper: beyond twenty little is gained", by_length[-2] - by_length[-1] < 0.05, real_only=True)

# %% [markdown]
# What a longer prompt costs besides: every request reads it again, and it takes its place in the context window.
#
# ## 9. Left padding, and the bug that everybody writes once
#
# Rows of a batch differ in length. For generation they are padded on the *left*, so that all end in the same column. With a prompt in
# front, the naive row is
#
#     [prompt][padding][text]
#
# The mask hides the padding. But the model also counts **positions**, by columns unless it is told otherwise, and so it sees the text
# farther from its prompt than it ever was in training. Nothing fails; the numbers are only wrong, the more so the shorter the text is
# beside its neighbours.

# %%
SHOWN = sorted(held_out[: pick(24, 8)], key=lambda row: len(row["text"]))[:: pick(8, 3)]
trained = prompted.prompt("from-text")().detach()
texts = [ids_of(data.filled(TEMPLATE, row))[0] for row in SHOWN]
longest_text = max(map(len, texts))
ids = torch.stack([torch.cat([torch.zeros(longest_text - len(each), dtype=torch.long), each]) for each in texts])
mask = torch.stack([torch.cat([torch.zeros(longest_text - len(each), dtype=torch.long), torch.ones(len(each), dtype=torch.long)]) for each in texts])


@torch.no_grad()
def next_words(**inputs):
    return exact(**inputs).logits[:, -1].log_softmax(-1)


alone = torch.cat([next_words(**with_prompt(exact, trained, each[None], torch.ones_like(each[None]))) for each in texts])
naive = next_words(**with_prompt(exact, trained, ids, mask))
inputs = with_prompt(exact, trained, ids, mask)
inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)           # the number of real tokens before
counted = next_words(**inputs)


def off(these, row):
    return (these[row] - alone[row]).abs().max().item()


holds("with counted positions, a row in the batch is the row alone", all(off(counted, row) < 5e-3 for row in range(len(texts))))
holds("naively, a padded row is not", max(off(naive, row) for row in range(len(texts))) > 0.05, real_only=True)
word = ids_of(ANSWERS[1])[0, 0]
tables.Table(["tokens", "padding", "p(positive) alone", "naive", "counted", "largest error of log p, naive", "counted"],
             [[len(each), longest_text - len(each), *(f"{these[row, word].exp():.2%}" for these in (alone, naive, counted)),
               f"{off(naive, row):.3f}", f"{off(counted, row):.1e}"] for row, each in enumerate(texts)])  # fmt: skip

# %% [markdown]
# The lab does this by itself, and puts the padding before the prompt besides: `[padding][prompt][text]`, so that prompt and text are
# neighbours for models that measure distances in columns, too.
#
# ## Exercise 4. Count positions (**, 5 minutes)
#
# From a `mask` [B, T] with ones for real tokens and zeros for padding, wherever it stands, to `position_ids` [B, T]. What padding gets
# does not matter, as long as a table of positions has such a row.

# %% tags=["exercise"]
def positions(mask):
    ...  # your code


check.positions(positions)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `mask.cumsum(1)` counts the real tokens up to and with each column. The first should be 0.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The cumulative sum minus one, and padding clamped at 0.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


check.positions(positions)

# %% [markdown]
# ## 10. A prefix: a word with every layer
#
# A soft prompt is read by the first layer, and the others see what becomes of it. **Prefix tuning** (Li & Liang 2021,
# [arXiv:2101.00190](https://arxiv.org/abs/2101.00190), section 4) trains what attention finds there in *every* layer, a key and a value for each
# virtual token:
#
# $$\text{attention}(q, [k_P ; K], [v_P ; V])$$
#
# How many numbers is that? With grouped queries, there are fewer heads of keys and values than of queries.
#
# ## Exercise 5. How many numbers is a prefix? (*, 4 minutes)

# %% tags=["exercise"]
def prefix_numbers(virtual_tokens, layers, kv_heads, head_dim):
    ...  # your code


check.prefix_numbers(prefix_numbers)

# %% [markdown]
# <details><summary>Hint</summary>
#
# In each layer, each head of keys and values keeps two vectors of head_dim numbers for each token.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `virtual_tokens * 2 * layers * kv_heads * head_dim`.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def prefix_numbers(virtual_tokens, layers, kv_heads, head_dim):
    return virtual_tokens * 2 * layers * kv_heads * head_dim


check.prefix_numbers(prefix_numbers)

# %% [markdown]
# A prefix begins best as the keys and values that the model itself makes of a text. Then it *is* that text, word for word:

# %%
ids_of_words = ids_of(INSTRUCTION)
as_prefix = ptl.inject(exact, ids_of_words.shape[1], method="prefix", init="text", text=INSTRUCTION, tokenizer=tokenizer, task="as-text")
with torch.no_grad():
    in_front = exact(input_ids=torch.cat([ids_of_words, text], 1)).logits[:, ids_of_words.shape[1] :]
    holds("a prefix made of a text is that text in front", torch.allclose(as_prefix(input_ids=text).logits, in_front, atol=5e-3))

ptl.inject(prompted, VIRTUAL, method="prefix", init="text", text=INSTRUCTION, tokenizer=tokenizer, task="prefix", seed=0)
losses["prefix"] = train("prefix").losses
found["prefix"] = scores_of(prompted)
config = model.config
count = prefix_numbers(VIRTUAL, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
ptl.save(prompted, "tasks/prefix", task="prefix")
holds("counted, and found", count == prompted.prompt("prefix").weight.numel())
tables.Table(["from the same text", "numbers", "bytes in a file", *HEADINGS[1:]],
             [["soft prompt", prompt_numbers(VIRTUAL, width), tensors("tasks/from-text"), *numbers(found["from-text"])],
              ["prefix", count, tensors("tasks/prefix"), *numbers(found["prefix"])]])  # fmt: skip

# %% [markdown]
# ## 11. Save, load, and a batch of many tasks
#
# First something that is no classification: a few steps on reviews, so that there is a task that *writes*. Then all tasks are saved, and
# loaded beside a fresh model.

# %%
reviews, _ = data.load("reviews")
OPINION = "I bought this and here is what I honestly think of it."
ptl.inject(prompted, VIRTUAL, init="text", text=OPINION, tokenizer=tokenizer, task="writer", seed=0)
written = data.encode_rows(reviews[: pick(96, 4)], tokenizer)
losses["writer"] = train("writer", rows=written, steps=pick(24, 2)).losses

TASKS = ["from-text", f"length-{LENGTHS[1]}", "prefix", "writer"]
for task in TASKS:
    ptl.save(prompted, f"tasks/{task}", task=task)

fresh = ptl.load(models.load(torch.float32)[0], f"tasks/{TASKS[0]}", task=TASKS[0])
for task in TASKS[1:]:
    ptl.load(fresh, f"tasks/{task}", task=task)
holds("what comes back is what was saved, bit for bit", all(torch.equal(fresh.prompt(task)(), prompted.prompt(task)()) for task in TASKS))
print(ptl.summary(fresh))

# %% [markdown]
# One frozen model, a small prompt for each task, batches of mixed tasks: the lecture's picture of prompt tuning [A17]. Six rows: soft
# prompts of different lengths, a prefix, and rows with nothing at all. Each must come out as if it were alone.

# %%
names = ["from-text", None, "prefix", f"length-{LENGTHS[1]}", "writer", "from-text"]
asked = [data.filled(TEMPLATE, row) for row in held_out[: len(names)]]
encoded = [ids_of(each)[0] for each in asked]
most = max(map(len, encoded))
ids = torch.stack([torch.cat([torch.zeros(most - len(each), dtype=torch.long), each]) for each in encoded])
mask = torch.stack([torch.cat([torch.zeros(most - len(each), dtype=torch.long), torch.ones(len(each), dtype=torch.long)]) for each in encoded])

with torch.no_grad():
    begun = time.perf_counter()
    with ptl.per_sample(fresh, names):
        together = fresh(input_ids=ids, attention_mask=mask).logits[:, -1]
    seconds_together = time.perf_counter() - begun
    begun = time.perf_counter()
    one_by_one = []
    for task, each in zip(names, encoded, strict=True):
        ptl.use(fresh, task)
        one_by_one.append(fresh(input_ids=each[None]).logits[:, -1])
    seconds_alone = time.perf_counter() - begun
errors = [(a - b).abs().max().item() for a, b in zip(together, torch.cat(one_by_one), strict=True)]
print(f"largest difference of a logit: {max(errors):.1e}; one batch {seconds_together:.2f} s, {len(names)} calls {seconds_alone:.2f} s")
holds("a mixed batch: each row is what it is alone", max(errors) < 5e-3)
holds("[A17] different tasks in one batch, on one frozen model, and each row has its own",
      not torch.allclose(together[0], fresh.base(input_ids=encoded[0][None]).logits[0, -1], atol=0.1))  # fmt: skip

# %% [markdown]
# The same for generation. The request for a review stands in the batch twice, once with the writer and once with nothing:

# %%
WISH = "Write a negative review of a toaster."
request = data.prompt_of({"instruction": WISH}, tokenizer)
mixed = [request, request, asked[0], asked[1]]
who = ["writer", None, "from-text", "prefix"]
with ptl.per_sample(prompted, who):
    texts = generate(prompted, mixed, tokenizer, max_new_tokens=pick(40, 4), temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=3).texts
tables.Table(["asked", "task", "written in one batch"],
             [[WISH if each == request else each, name or "none", text] for each, name, text in zip(mixed, who, texts, strict=True)])  # fmt: skip

# %% [markdown]
# ## 12. Let them vote
#
# Several prompts for one task are as many opinions, for the price of a batch that is as many times as wide: one model, a few kilobytes
# each (section 6 of the paper, Table 3: five prompts by majority vote beat their mean, and usually the best of them).

# %%
members = torch.stack([found[name] for name in FOUR])                                 # [4, rows, 2]


def right(answers):
    return (torch.as_tensor(answers) == truth).double().mean().item()

# %% [markdown]
# ## Exercise 6. A majority (***, 10 minutes)
#
# `scores` [members, rows, classes] are log-probabilities. Return the class of each row: the one that most members answer, and where
# several have equally many votes, the one of these with the higher mean of the scores.

# %% tags=["exercise"]
def vote(scores):
    ...  # your code


check.vote(vote)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.nn.functional.one_hot(scores.argmax(-1), classes).sum(0)` counts the votes. For the draw: take the mean of the scores, set those
# of the classes with fewer votes to `-inf` (`masked_fill`), then `argmax`.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Count the votes of each class; hide all classes with fewer than the most; of the others the higher mean score.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def vote(scores):
    votes = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).sum(0)
    return scores.mean(0).masked_fill(votes < votes.amax(-1, keepdim=True), -torch.inf).argmax(-1)


check.vote(vote)

# %%
shares = {name: right(found[name].argmax(-1)) for name in FOUR}
mean_of_all = sum(shares.values()) / len(shares)
figures.bars({**shares, "mean of the four": mean_of_all, "majority vote": right(vote(members))}, x="right",
             colours=[figures.SKY] * 4 + [figures.BLUE, figures.ORANGE], title="Four prompts, and their vote")  # fmt: skip

# %% [markdown]
# In the lab, `ensemble` asks all members about a batch in one call:

# %%
few = ids[: pick(4, 2)]
with torch.no_grad():
    answer = ptl.ensemble(prompted, FOUR, "vote", input_ids=few, attention_mask=mask[: len(few)], logits_to_keep=1)
print("members, rows, columns, words:", tuple(answer.members.shape))
print("the words with the most votes:", [tokenizer.decode([i]) for i in answer.predictions[:, -1].tolist()])

# %% [markdown]
# ## 13. Read a prompt
#
# What do the trained vectors say? We look up the nearest words of the vocabulary (section 7 of the paper), nearest by **direction**, the
# cosine.
#
# ## Exercise 7. The nearest word (**, 5 minutes)
#
# From one `row` of a prompt [H] and the embedding table [V, H] to the id of the word with the largest cosine.

# %% tags=["exercise"]
def nearest(row, embedding):
    ...  # your code


check.nearest(nearest)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.nn.functional.cosine_similarity(row[None], embedding)` is [V].
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The argmax of the cosines. By distance the longest words would win, and by the product without the lengths as well.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def nearest(row, embedding):
    return int(torch.nn.functional.cosine_similarity(row[None], embedding).argmax())


check.nearest(nearest)

# %%
now, began = prompted.prompt("from-labels").weight.detach(), prompted.prompt("from-labels").initial
near = ptl.nearest_tokens(prompted, tokenizer, k=3, task="from-labels")
holds("the lab finds the same words", [nearest(row, table) for row in now] == [first.id for first, *_ in near])
kept = [nearest(row, table) == nearest(start, table) for row, start in zip(now[:2], began[:2], strict=True)]
holds("the paper: the words for the classes are still the nearest to where they stood", all(kept), real_only=True)
travelled = ptl.drift(prompted, "from-labels")
tables.Table(["began as", "nearest words now", "cosine to the first", "cosine to where it began", "moved, in words' sizes"],
             [[repr(tokenizer.decode([nearest(start, table)])), ", ".join(repr(each.token) for each in words), 1 - words[0].distance, moved.cosine,
               moved.relative] for start, words, moved in list(zip(began, near, travelled, strict=True))[:8]])  # fmt: skip

# %%
def closeness(task):
    return sum(1 - first.distance for first, *_ in ptl.nearest_tokens(prompted, tokenizer, k=1, task=task)) / VIRTUAL


close = {name: closeness(name) for name in reversed(FOUR)}
holds("prompts that began as words are still near words; one that began as noise never came near any",
      close.pop("from-random") < min(close.values()) - 0.2, real_only=True)  # fmt: skip
figures.bars({**close, "from-random": closeness("from-random")}, x="mean cosine to the nearest word", title="Near words, or not")

# %% [markdown]
# And as a map: where each virtual token began (hollow), where it is now, and the word it is nearest to. Two of many dimensions, so near
# on the map need not be near; the caption says how much of it two dimensions show.

# %%
SVG(ptl.picture(prompted, tokenizer, task="from-labels", title="A prompt that began as the words for the classes"))

# %% [markdown]
# ## 14. And the model?

# %%
ptl.use(prompted, None)
names = list(prompted.tasks)
print(f"{len(names)} tasks were trained on it: {', '.join(names)}")
holds("not one bit of it has changed", fingerprint(model) == untouched)
holds("and without a prompt it answers as it did", torch.equal(scores_of(prompted, held_out[:4]), scores_of(model, held_out[:4])))
copies = 4 * sum(p.numel() for p in model.parameters())
task = tensors("tasks/from-text")
print(f"a copy of the model in 32 bit: {copies / 1e6:.1f} MB; a task of {VIRTUAL} virtual tokens: {task / 1e3:.1f} kB, one {copies / task:,.0f}th")

# %% [markdown]
# ## Takeaways
#
# - A soft prompt is a matrix of trained vectors before the text: embeddings, ones in the mask, $-100$ in the labels, and positions that
#   count real tokens.
# - It costs virtual tokens × width numbers: kilobytes for each task, however deep the model is. A prefix costs more and speaks to every
#   layer.
# - Begin with words, not with noise, and tell the learning rate as a share of a word's size: Adam's steps are distances, and too small
#   ones never arrive.
# - The model is not touched, so any number of tasks share it, row by row in one batch.
# - A training step still goes through the whole model: what is saved is storage and optimizer states, not time.
# - With a small model and few steps a prompt teaches above all *how to answer*. What it knows about the matter is the model's; notebook
#   05 compares it with LoRA and full fine-tuning, and notebook 08 asks what becomes of that as models grow.
#
# ## Three questions
#
# 1. Why do virtual tokens get the label $-100$, and not 0?
#
#    <details><summary>Answer</summary>
#
#    0 is the id of a word: the model would be trained to say it. $-100$ is the number that the loss leaves out, as no word stands there.
#    </details>
# 2. A colleague tunes a prompt at the learning rate that was right for full fine-tuning, and after hundreds of steps little is learned.
#    Why?
#
#    <details><summary>Answer</summary>
#
#    Adam moves each number by about the rate in each step, so rate × steps / 2 is all the way it can go; beside the size of a word that
#    may be nothing (section 7). Tell the rate as a share of the words' size.
#    </details>
# 3. Each of a thousand customers has a task. What do you keep for each with full fine-tuning, with LoRA, with a prompt, and which of them
#    can share a batch?
#
#    <details><summary>Answer</summary>
#
#    A copy of the model, megabytes, kilobytes. Copies cannot share a batch: they are different models. LoRA's adapters can, with a
#    product of their own for each row (notebook 02); prompts do by themselves, they are only a part of the input.
#    </details>
