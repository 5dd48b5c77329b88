# %% [markdown]
# # 00 · The whole story
#
# > In ten minutes a real language model learns to write like a customer, on your own machine, and you see what that costs and how to take it back.
#
# **What you will learn**
#
# - what a model writes before fine-tuning and after, on the same requests, and how to put a number on the difference
# - which parts of a model fine-tuning changes, and why LoRA changes none of them
# - to predict the memory of a training step before running it, and to measure it
# - how few weights train, and how small the file is that holds what was learned
# - to save it, load it again bit for bit, and switch it off as if nothing had happened
#
# **Time:** about 6 minutes on 2 cores with the real model. Offline once the model is fetched.
#
# Every step here is one line of the lab; the other notebooks take each line apart. `make demo` tells the same story in a terminal. Claims of the
# lecture are checked as we meet them, under the marks they have in the ledger, [B2] for example, and marked ✓ where they hold in this run.

# %%
import math
import re
from pathlib import Path

import torch

import lora_lab
import memory_math
from course import figures, holds, models, pick, tables
from course.checks import the_whole_story as check
from lora_lab import data, demo, training

torch.manual_seed(0)
PRECISION = models.precision()
print(f"precision {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# ## 1. The baseline first: what it writes today
#
# SmolLM2-135M-Instruct is a chat model that fits a laptop. The lecture asks such a model for a review of a product, and remarks on the answer:
# *reads like marketing copy* [B2]. We ask four times about a bathrobe that will be in no training row: for a positive, a neutral and a negative
# review, and for a **horrible** one.

# %%
model, tokenizer = models.load()
train_rows, held_out = data.load("reviews")
prompts = demo.held_out_prompts(held_out, tokenizer)
requests = [request.replace("of the following product.\n", "of: ")[:60] + " ..." for request in prompts]

before = demo.write(model, prompts, tokenizer)
tables.before_after(dict(zip(requests, zip(before), strict=True)), ["before"])

# %% [markdown]
# What should it have written? Here is a row of the training data. It has the three fields of the Alpaca data, which the lecture shows, too: an
# **instruction**, an **input**, and the **output** that we want. The lecture's plan is to go on training with a few hundred of these [B3].

# %%
tables.Table(["field", "of the first row"], [[name, train_rows[0][name]] for name in ("instruction", "input", "output")])

# %%
instructions = {row["instruction"] for row in train_rows}
products = [{row["product"] for row in rows} for rows in (train_rows, held_out)]
print(f"{len(train_rows)} rows to train on, {len(held_out)} held out, {len(instructions)} instructions:", *sorted(instructions), sep="\n  ")
holds("no product of the held-out rows is trained on", not products[0] & products[1])
holds("[B2] nobody asks for anything horrible in the training rows", "horrible" not in str(train_rows).lower())

# %% [markdown]
# ## Exercise 1. Put a number on a voice (**, 8 minutes)
#
# *Marketing copy* is an impression. Let us count something. A customer tells what happened to **me**; a brochure never says *I*. Write a function
# that tells whether a text has a word of the first person: I, me, my, mine, myself, we, us, our, ours, ourselves. Capitals or not, and also in
# *I'm* and *we've*.

# %% tags=["exercise"]
def first_person(text):
    ...  # your code: True or False


check.first_person(first_person)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Whole words only: there is an *i* in *crisp*, and an *us* in *dust*. `re.findall(r"[a-z]+", text.lower())` gives the words, and makes two of *I'm*.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Split the lower-case text into runs of letters, and see whether any of them is in the set. The folded cell below runs it, and the notebook goes on
# with it.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def first_person(text):
    words = {"i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves"}
    return any(word in words for word in re.findall(r"[a-z]+", text.lower()))


check.first_person(first_person)

# %% [markdown]
# Now count: the descriptions of the held-out products, the reviews that belong to them, and what the model writes when it is asked for a review.

# %%
def share(texts):
    return sum(map(first_person, texts)) / len(texts)


asked = held_out[: pick(48, 6)]
WRITING = {**demo.SAMPLING, "max_new_tokens": pick(50, 6), "progress": False}
voices = {
    "product descriptions": share([row["input"] for row in asked]),
    "held-out reviews": share([row["output"] for row in asked]),
    "the model, before": share(training.answers(model, asked, tokenizer, **WRITING)),
}
figures.bars({name: 100 * value for name, value in voices.items()}, x="% of the texts that say I, my, we, ...", title="Who is speaking?")

# %%
holds("no product description says I, most reviews do", voices["product descriptions"] == 0 and voices["held-out reviews"] > 0.8)
holds("the untuned model says I less often than a review does", voices["the model, before"] < voices["held-out reviews"])

# %% [markdown]
# A second number, and the one that training itself looks at: the **held-out loss**. How surprised is the model by the held-out reviews, in
# nats per token? And we keep its answer to one prompt exactly, to see later whether anything has changed.

# %%
def held_out_loss(rows):
    return math.log(training.perplexity(model, rows, tokenizer, precision=PRECISION, progress=False))


probe = torch.tensor([tokenizer.encode(next(iter(prompts.values())), add_special_tokens=False)])
logits_before = demo.next_logits(model, probe)
print(f"held-out loss before training: {held_out_loss(asked):.3f}; the logits of the next token, {logits_before.numel():,} numbers, are kept")

# %% [markdown]
# ## 2. What fine-tuning changes
#
# The lecture lists what ordinary fine-tuning updates: embeddings, the matrices $A^Q$, $A^K$, $A^V$ of each head, layer norms, feed-forward layers,
# the output layer [B1]. How much is each? Our model, GPT-2 (small enough to tune whole, the lecture says), and Llama-2-70B:

# %%
LECTURE = {
    "positional embeddings": ["positions"], "word embeddings": ["embedding"], "A^Q, A^K, A^V of all heads": ["q", "k", "v"],
    "attention's output (not in the list)": ["o"], "layer norms": ["norms"], "feed-forward layers": ["gate", "up", "down"],
    "output layer": ["head"], "biases": ["biases"],
}  # fmt: skip
counts = {"ours": memory_math.count_parameters(model), **{name: memory_math.count_parameters(name) for name in ("gpt2", "llama-2-70b")}}
rows = {what: [sum(count.parts.get(part, 0) for part in parts) for count in counts.values()] for what, parts in LECTURE.items()}
holds("the parts add up to the whole, in all three", [sum(column) for column in zip(*rows.values(), strict=True)] == [*counts.values()])
tables.Table(["what fine-tuning updates", *counts], [*([what, *row] for what, row in rows.items()), ["all", *map(int, counts.values())]])

# %% [markdown]
# Two zeros are worth a look. Our model and Llama *compute* positions (rotary embeddings), so there is nothing to learn. And our model, like GPT-2,
# has no output layer of its own: it multiplies with the word embeddings once more (they are *tied*).

# %%
figures.stacked({name: {what: 100 * row[place] / int(count) for what, row in rows.items()} for place, (name, count) in enumerate(counts.items())},
                x="% of all weights", title="Feed-forward layers are the largest part; in small models words are many, too")  # fmt: skip

# %% [markdown]
# Does fine-tuning really reach all of it? One backward pass, with everything allowed to train:

# %%
model.requires_grad_(True)
batch = data.collate(data.encode_rows(train_rows[:2], tokenizer), tokenizer.pad_token_id)
model(**batch).loss.backward()
reached = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
holds("[B1] every tensor of the model gets a gradient: ordinary fine-tuning changes them all", len(reached) == len([*model.parameters()]))
print(f"{len(reached)} tensors, {sum(p.numel() for p in model.parameters()):,} weights")
model.requires_grad_(False).zero_grad(set_to_none=True)

# %% [markdown]
# ## 3. Memory, predicted before anything runs
#
# With every weight that trains go a gradient and AdamW's two running averages. Whatever does not train has none of them. `memory_math` plays one
# training step on sizes alone, in a fraction of a second, and says what will be alive at its worst moment:

# %%
config = demo.Settings(quick=pick(False, True)).training(PRECISION)
longest = sorted(data.encode_rows(train_rows, tokenizer), key=lambda example: len(example["input_ids"]))[-config.micro_batch_size :]
labels = sum(label != -100 for example in longest for label in example["labels"][1:])
shape = {"batch_size": len(longest), "sequence_length": len(longest[-1]["input_ids"]), "label_tokens": labels, "precision": PRECISION}
plans = {name: memory_math.predict(model, method=method, implementation="lora_lab", device="cpu", **shape)
         for name, method in (("everything trains", "full"), ("LoRA, rank 8", "lora"))}  # fmt: skip
PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "other")
figures.stacked({name: {part.replace("_", " "): getattr(plan, part) / 2**20 for part in PARTS} for name, plan in plans.items()},
                x="MiB", title=f"A training step on {len(longest)} rows, predicted ({PRECISION})")  # fmt: skip

# %% [markdown]
# Now measured, in a model of its own: every tensor is followed from the moment it is made until it is let go. (What this notebook holds besides is
# taken off.)

# %%
predicted, measurement = demo.memory(models.name(), train_rows, config)
measured = measurement.peak_bytes - (measurement.start_bytes - predicted.weights)
holds("the prediction is within 3 % of what was measured", abs(predicted.total / measured - 1) < 0.03)
tables.predicted_measured({"a step of LoRA, at its peak": (predicted.total, measured)})

# %% [markdown]
# The same arithmetic answers the lecture's question about **Llama-2-70B**. Its estimate for training everything in 16 bit is 420 to 840 GB, 6 to 11
# GPUs of 80 GB; with LoRA (and gradient checkpointing) 140 GB, 2 GPUs:

# %%
large = {"everything trains": {"method": "full", "precision": "bf16"}, "LoRA, rank 8": {"method": "lora", "precision": "bf16-mixed"},
         "LoRA over 4 bits (QLoRA)": {"method": "qlora", "precision": "bf16-mixed"}}  # fmt: skip
steps = {name: memory_math.predict("llama-2-70b", sequence_length=1024, gradient_checkpointing=True, **how) for name, how in large.items()}
gpus = {name: step.gpus_needed("A100-80GB") for name, step in steps.items()}
holds("[B4] 420 to 840 GB, 6 to 11 GPUs", 420e9 < steps["everything trains"].total < 840e9 and 6 <= gpus["everything trains"] <= 11)
holds("[B8] with LoRA 2 GPUs are enough", gpus["LoRA, rank 8"] == 2)
tables.Table(["Llama-2-70B", "GB", "GPUs of 80 GB"], [[name, round(step.total / 1e9), gpus[name]] for name, step in steps.items()])

# %% [markdown]
# ## Exercise 2. What training costs (*, 5 minutes)
#
# Without activations it is a sum you can do in your head. Everything in 32 bit, AdamW: how many bytes do `frozen` weights and `trained` weights
# need in training?

# %% tags=["exercise"]
def training_bytes(frozen, trained):
    ...  # your code


check.training_bytes(training_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A number in 32 bit is 4 bytes. A weight that trains is there itself, has a gradient, and two averages of AdamW. How many numbers are these?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# 4 bytes for each frozen weight, 4 + 4 + 8 = 16 for each that trains: the lecture's table of bytes per parameter, without its last line.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def training_bytes(frozen, trained):
    return 4 * frozen + 16 * trained


check.training_bytes(training_bytes)

# %% [markdown]
# ## 4. Inject LoRA: nothing changes yet
#
# LoRA freezes the whole model and puts two thin matrices beside each layer. Their product is the change that the layer will learn, and it begins at
# zero [B11]. One line:

# %%
lora_lab.inject(model, rank=8)
count = lora_lab.count_parameters(model)
print(count)
holds("[B11] the change begins at zero, so the model is the old one, bit for bit", torch.equal(demo.next_logits(model, probe), logits_before))
holds("fewer than one weight in ten trains", count.trainable_percent < 10)
holds("of the real model, fewer than one in fifty", count.trainable_percent < 2, real_only=True)

# %% [markdown]
# ## 5. Train it
#
# Two passes over the reviews. The loop is ordinary: forward, backward, step. It only has fewer weights to move.

# %%
config.eval_every, config.progress = pick(15, 4), False
result = training.fit(model, train_rows, config, tokenizer=tokenizer, eval_data=asked)
print(f"{result.steps} steps, {result.tokens:,} tokens ({result.label_tokens:,} of them answers, which are learned) in {result.seconds:.0f} s")
evaluated = [min(place * config.eval_every, result.steps) for place in range(len(result.eval_losses))]
figures.curves({"training": result.losses, "held out": (evaluated, result.eval_losses)}, x="step", y="loss, nats per token",
               title=f"{count.trainable_percent:.2f} % of the weights learn")  # fmt: skip

# %%
print(f"held-out loss {result.eval_losses[0]:.3f} -> {result.eval_losses[-1]:.3f}")
holds("the held-out loss fell: what it learned is true of products it has not seen", result.eval_losses[-1] < result.eval_losses[0])
holds("no frozen weight has a gradient", all(p.grad is None for p in model.parameters() if not p.requires_grad))

# %% [markdown]
# ## 6. Before and after
#
# The same requests, the same random numbers. Read them all, the last one first.

# %%
after = demo.write(model, prompts, tokenizer)
tables.before_after(dict(zip(requests, zip(before, after, strict=True), strict=True)))

# %%
voices["the model, after"] = share(training.answers(model, asked, tokenizer, **WRITING))
figures.bars({name: 100 * value for name, value in voices.items()}, x="% of the texts that say I, my, we, ...", title="Who is speaking now?",
             colours=[figures.BLACK, figures.BLACK, figures.BLUE, figures.ORANGE])  # fmt: skip

# %%
holds("[B2] the model speaks as a customer now", voices["the model, after"] > voices["the model, before"] + 0.2, real_only=True)

# %% [markdown]
# The voice changes at once. Good sense does not come with it: this is a small model, and 240 rows teach it *how* customers talk, not what a
# bathrobe is. Notebook 07 takes that apart.
#
# ### "Horrible", which nobody taught it
#
# The lecture ends with *write a horrible review*, an instruction that is in no training row, and the tuned model obeys. Is that so here, or were we
# lucky with one sample? No sampling is needed to find out. Take the reviews of the held-out products, and ask how likely the model finds each of
# them under each request. Below, a number is how much likelier reviews of a column become when the request is not for a *positive* one. Any other
# word may make all reviews a little likelier or less likely. If the model *understands* horrible, it does more for negative reviews than for
# positive ones.

# %%
KINDS = ("positive", "neutral", "negative")
WORDS = (*KINDS, "horrible")


def steering():
    """[request][kind of review]: how much likelier a real review of this kind is than under a request for a positive one, in nats per token."""
    reviews = {kind: [row for row in asked if row["sentiment"] == kind] for kind in KINDS}
    losses = {word: [held_out_loss([{**row, "instruction": demo.HORRIBLE.replace("horrible", word)} for row in rows]) for rows in reviews.values()]
              for word in WORDS}  # fmt: skip
    return [[usual - loss for usual, loss in zip(losses["positive"], losses[word], strict=True)] for word in WORDS]


tuned = steering()
with lora_lab.disabled(model):
    untuned = steering()

left, right = figures.panels(2)
names = [f"'{word}'" for word in WORDS]
figures.heatmap(untuned, names, KINDS, x="held-out reviews", y="asked for", title="before", form="+.3f", axes=left)
figures.heatmap(tuned, names, KINDS, x="held-out reviews", title="after", form="+.3f", axes=right)

# %%
gaps = {name: [negative - positive for positive, _, negative in table] for name, table in (("before", untuned), ("after", tuned))}
holds("[B2] it follows an instruction it was never trained on", gaps["after"][-1] > max(gaps["before"][-1], 0.0), real_only=True)
tables.Table(["what a request does more for negative than for positive reviews, nats per token", *gaps],
             [[f"'{word}'", *(f"{gap[place]:+.3f}" for gap in gaps.values())] for place, word in enumerate(WORDS)])  # fmt: skip

# %% [markdown]
# ## 7. A file, a fresh model, and the way back
#
# What was learned is the two thin matrices, and only they are saved, in the format of the PEFT library.

# %%
lora_lab.save(model, "adapters/reviews")
adapter_bytes = Path("adapters/reviews/adapter_model.safetensors").stat().st_size
model_bytes = 4 * count.base
print("files:", *sorted(path.name for path in Path("adapters/reviews").iterdir()))
print(f"the adapter {adapter_bytes / 1e6:.2f} MB, all weights in 32 bit {model_bytes / 1e6:.0f} MB")
figures.bars({"a copy of the model": model_bytes / 1e6, "an adapter": adapter_bytes / 1e6}, x="MB for each task", title="A task on disk [A13]")

# %%
holds("the file is four bytes for each weight that trains, and a header", 0 < adapter_bytes - 4 * count.trainable < 0.02 * adapter_bytes + 65_536)
fresh, _ = models.load()
lora_lab.load(fresh, "adapters/reviews")
tuned_logits = demo.next_logits(model, probe)
holds("loaded into a fresh model it computes the same, bit for bit", torch.equal(demo.next_logits(fresh, probe), tuned_logits))
del fresh

# %% [markdown]
# And the way back. The base was never touched, so there is nothing to undo: switch the adapter off, and the old model is there.

# %%
with lora_lab.disabled(model):
    off = demo.next_logits(model, probe)
print(f"the adapter moves the next token's logits by up to {(tuned_logits - off).abs().max().item():.1f}")
holds("switched off, the model is bit for bit the old one", torch.equal(off, logits_before))
holds("and switched on again, the new one", torch.equal(demo.next_logits(model, probe), tuned_logits))

# %% [markdown]
# ## Exercise 3. A hundred tasks (*, 5 minutes)
#
# You serve many tasks with one model. How many bytes on disk is that with LoRA, everything in 32 bit? `base` and `adapter` are numbers of weights.

# %% tags=["exercise"]
def disk_bytes(tasks, base, adapter):
    ...  # your code


check.disk_bytes(disk_bytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# How often is the base on the disk?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The base once, an adapter for each task, four bytes each weight.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def disk_bytes(tasks, base, adapter):
    return 4 * (base + tasks * adapter)


check.disk_bytes(disk_bytes)

# %%
many = (1, 10, 100, 1000)
figures.curves({"a copy of the model for each": (many, [4 * tasks * count.base / 1e9 for tasks in many]),
                "LoRA": (many, [disk_bytes(tasks, count.base, count.adapter) / 1e9 for tasks in many])},
               x="tasks", y="GB on disk", log="xy", dots=True, title="One base, many tasks")  # fmt: skip

# %% [markdown]
# ## Exercise 4. Teach it something of your own (***, 15 minutes)
#
# Six rows are enough to teach a *manner*. Write them in the same three fields: any language, any style, as long as a stranger would recognise it
# after two sentences. The next cell trains a second adapter on them, beside the first, on the same frozen model.

# %% tags=["exercise"]
my_rows = ...  # your rows: [{"instruction": "...", "input": "...", "output": "..."}, ...]


check.rows(my_rows)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Take six `instruction`s and `input`s from `train_rows`, and write six new `output`s, each of its own, all in one manner.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Telegrams, from the days when a word cost money: the folded cell has six. Where you have written rows of your own, it keeps yours.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
TELEGRAMS = (
    "JACKET ARRIVED STOP RAIN ALSO ARRIVED STOP JACKET WON STOP",
    "ORDERED TWO STOP ONE FITS STOP OTHER ONE FITS MY BROTHER STOP KEEP SELLING STOP",
    "ZIP BROKE ON MONDAY STOP TEMPER BROKE ON TUESDAY STOP SEND MONEY STOP",
    "COLOUR NOT AS SHOWN STOP MOTHER LIKES IT STOP WILL KEEP STOP",
    "WASHED ONCE STOP NOW FITS THE DOG STOP DOG DELIGHTED STOP I AM NOT STOP",
    "WARM FEET SINCE NOVEMBER STOP NOTHING MORE TO REPORT STOP",
)
telegrams = [{**{name: row[name] for name in ("instruction", "input")}, "output": text} for row, text in zip(train_rows[:6], TELEGRAMS, strict=True)]
my_rows = my_rows if isinstance(my_rows, list) else telegrams

check.rows(my_rows)

# %%
lora_lab.inject(model, rank=8, adapter="mine")                # a second adapter; the first stays, switched off
short = {"max_steps": pick(12, 3), "micro_batch_size": 6, "learning_rate": 2e-3, "precision": PRECISION, "progress": False}
own = training.fit(model, my_rows, short, tokenizer=tokenizer)
print(f"loss {own.losses[0]:.2f} -> {own.losses[-1]:.2f} in {own.seconds:.0f} s")
columns = {"neither": None, "reviews": "default", "mine": "mine"}
training.samples(model, held_out[:2], tokenizer, adapters=columns, **WRITING)

# %%
lora_lab.use(model, "default")
holds("the first adapter is what it was, bit for bit", torch.equal(demo.next_logits(model, probe), tuned_logits))
lora_lab.eject(model)
holds("with all adapters thrown out, the model is the one we began with", torch.equal(demo.next_logits(model, probe), logits_before))

# %% [markdown]
# ## 8. The numbers, all together

# %%
tables.Table(["", "before", "after"], [
    ["held-out loss, nats per token", f"{result.eval_losses[0]:.3f}", f"{result.eval_losses[-1]:.3f}"],
    ["texts in the first person", f"{voices['the model, before']:.0%}", f"{voices['the model, after']:.0%}"],
    ["what 'horrible' does more for negative reviews, nats per token", *(f"{gap[-1]:+.3f}" for gap in gaps.values())],
    ["weights that train", "", f"{count.trainable:,} of {count.total:,}"],
    ["memory of a step, predicted / measured", "", f"{predicted.total / 2**20:.1f} / {measured / 2**20:.1f} MiB"],
    ["speed of training, this machine", "", f"{result.tokens_per_second:.0f} tokens/s"],
    ["a file for the task", f"{model_bytes / 1e6:.0f} MB", f"{adapter_bytes / 1e6:.2f} MB"],
])  # fmt: skip

# %% [markdown]
# ## Takeaways
#
# - Fine-tuning is more of the same training, on a few hundred examples of what you want. The voice follows within two passes.
# - Ordinary fine-tuning moves every weight, and pays for each with a gradient and two averages. LoRA freezes them all and trains a small change
#   beside them.
# - Memory can be predicted before you run. On a step like this one, to within a few percent of what is measured.
# - Nothing changes at step 0, the base stays as it is, and a task is a small file that can be loaded, switched off, or thrown away.
# - Look at texts *and* at numbers. A single sample can flatter; a count over held-out products, or a likelihood, does so less.
#
# Next: 01 takes the memory apart, 02 writes LoRA by hand, 03 the training loop, 04 prompt tuning; 05 to 07 are real tasks, 08 helps to choose.
#
# ## Three questions
#
# 1. The tuned model writes like a customer. Does it know more about bathrobes than before?
#    <details><summary>Answer</summary>
#
#    No. The reviews teach a manner, and hardly any facts: read the texts of section 6 for things that cannot be true of a bathrobe. What was
#    learned is form.
#    </details>
# 2. Why is it no proof that the model follows "horrible" when one of its horrible reviews is horrible?
#    <details><summary>Answer</summary>
#
#    One sample may be luck, and a model that has learned to complain would complain whatever it is asked. The heat map asks both ways: negative
#    reviews must gain more by the request than positive ones do, over all held-out products.
#    </details>
# 3. LoRA trains so few of the weights. Why is the memory of its training step not smaller by the same factor?
#    <details><summary>Answer</summary>
#
#    Gradients and optimizer states shrink by that factor. The frozen weights are still there, and backward has to pass through all layers, so most
#    activations are still kept: the figure of section 3 shows which parts are left.
#    </details>
