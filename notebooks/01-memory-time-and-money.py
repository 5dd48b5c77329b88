# %% [markdown]
# # 01 · Memory, time and money
#
# > Before a training step runs, you can say whether it fits, what every byte of it is for, how long the run takes and what it costs.
#
# **What you will learn**
#
# - to write a memory calculator of twenty lines, to hold it against a measured step, and to know where such calculators go wrong
# - which knob to turn at an `OutOfMemoryError`, and what it would save, before anything is run
# - what 32, 16, 8 and 4 bits make of a number, and with which of them a model can learn
# - why training a model of 70 billion weights takes 9 large GPUs at least and thousands in practice, and adapting it takes 2
# - how many days and dollars a run takes, and which size of model a budget is best spent on
#
# **Time:** about 2 minutes on 2 cores with the real model. Offline once the model is fetched.
#
# Marks such as [A2] or [B5] are the two lectures' claims, A for *Instruction Finetuning*, B for *Lecture 10.5: Finetuning*. Each is computed here,
# not quoted, and some of them are wrong. Notebook 08 has the whole ledger.

# %%
import math
import struct

import torch
from IPython.display import SVG

import lora_lab
import memory_math
from course import figures, holds, models, pick, tables
from course.checks import memory_time_and_money as check
from lora_lab import data, training
from memory_math.architectures import architecture_of
from memory_math.scaling_laws import curve, kaplan_optimal_parameters

torch.manual_seed(0)
PRECISION = models.precision()
GIB = 2**30
ledger = memory_math.claims()                                 # every number of the lectures, computed again
print(f"precision {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}; {len(ledger)} claims")

# %% [markdown]
# ## 1. The baseline: OutOfMemoryError
#
# You have the use of an A100 with 80 GB, and want to fine-tune Llama-2-7B on texts of 1,024 tokens, one at a time, everything in 32 bit, with AdamW:
# what you get if you change no setting. Seven billion numbers of 4 bytes are 28 GB, so there is room for two of these models. **Guess first: does the
# step fit?**
#
# What a newcomer meets [A7] is `OutOfMemoryError: CUDA out of memory`, some minutes into the job. It need not be found out that way:

# %%
FIRST_TRY = {"precision": "fp32", "sequence_length": 1024}
explained = memory_math.explain_oom("llama-2-7b", "A100-80GB", **FIRST_TRY)
print(explained)

# %%
weights = explained.footprint.weights
holds("[A7] the weights alone would fit, with room for as much again", 2 * weights < explained.limit_bytes)
holds("[A7] and yet the step runs out of memory", not explained.fits)
print(f"the step needs {explained.footprint.total / weights:.1f} times its weights")

# %% [markdown]
# Nothing was run for this: `memory_math` plays a training step on *sizes* alone. At the end of section 5 you will be able to make each of these lines
# by hand.
#
# ## 2. One parameter
#
# The lecture begins: one parameter in 32 bit is 4 bytes, so a billion of them are 4 GB [A1]. True, and here is the first trap: GPUs are sold in GB
# ($10^9$ bytes), but tools print GiB ($2^{30}$ bytes), and often call both "GB".

# %%
model, tokenizer = models.load(torch.float32)
SHAPE = architecture_of(model)                                # layers, widths, heads: all that sizes depend on
ours = memory_math.count_parameters(model)
counts = {"the lecture's 1B": 10**9, "Pythia-1B, which has that name": int(memory_math.count_parameters("pythia-1b")), "our model": int(ours)}
held = sum(p.numel() * p.element_size() for p in model.parameters())

holds("[A1] 1B parameters of 4 bytes are 4 GB", 4 * counts["the lecture's 1B"] == 4e9)
holds("our own model holds exactly 4 bytes for each parameter counted", held == 4 * ours)
tables.Table(["", "parameters", "GB in 32 bit", "GiB in 32 bit"],
             [[name, n, f"{4 * n / 1e9:.3f}", f"{4 * n / GIB:.3f}"] for name, n in counts.items()])  # fmt: skip

# %% [markdown]
# ## Exercise 1. GB and GiB (*, 3 minutes)
#
# Return both for a number of parameters and the bytes of each.

# %% tags=["exercise"]
def gigabytes(parameters, bytes_each):
    ...  # your code: return GB, GiB


check.gigabytes(gigabytes)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Multiply first; then divide the bytes by `1e9`, and by `2**30`.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The bytes are `parameters * bytes_each`; divided by 1e9 they are GB, by 2**30 GiB, the larger unit and so the smaller number.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def gigabytes(parameters, bytes_each):
    return parameters * bytes_each / 1e9, parameters * bytes_each / 2**30


check.gigabytes(gigabytes)

# %% [markdown]
# ## 3. What a training step holds
#
# The lecture's table of bytes per parameter [A2], in 32 bit: weights 4, gradients 4, Adam's states 8 (two running averages for each weight), and
# *activations and temporary memory* 8: 24 GB for a model of 1B. The first three are exact:

# %%
step = memory_math.predict("llama-3.2-1b", precision="fp32", sequence_length=512)
each = {part: getattr(step, part) / step.parameters for part in ("weights", "gradients", "optimizer_states")}
holds("[A2] weights 4, gradients 4, Adam 8 bytes per parameter", [round(value, 4) for value in each.values()] == [4, 4, 8])
ledger.where(source="A2")

# %% [markdown]
# The fourth line is a rule of thumb, and it cannot be a number *per parameter*: activations grow with the text, not with the model. For which texts
# does it hold?

# %%
LENGTHS = [256, 512, 1024, 2048, 3100, 4096, 6144, 8192]


def rest(model, tokens):
    """Bytes per parameter beside weights, gradients and Adam's states."""
    found = memory_math.predict(model, precision="fp32", sequence_length=tokens)
    return found.total / found.parameters - 16


lines = {name: [rest(name, tokens) for tokens in LENGTHS] for name in ("llama-2-7b", "llama-3.2-1b", "smollm2-135m")}
(axes,) = figures.panels(1)
axes.axhline(8, color="black", linestyle="--", linewidth=1)
figures.curves({name: (LENGTHS, line) for name, line in lines.items()}, x="tokens in a step", y="bytes per parameter", log="y", dots=True, axes=axes,
               title="[A2] activations and temporary memory: the slide's 8 (dashed) is one point of each line")  # fmt: skip

# %% [markdown]
# The flat part on the left is not activations at all: it is the optimizer's step, which for a moment needs temporaries as large as the model. The
# slide's 8 holds for a model of 1B at about 3,100 tokens. For ours, which is small, it is passed much earlier; for larger models, much later.

# %%
at_8 = {name: next(tokens for tokens, value in zip(LENGTHS, line, strict=True) if value > 8) for name, line in lines.items()}
holds("[A2] for Llama-3.2-1B the rule of thumb holds at 1 x 3,100 tokens", round(rest("llama-3.2-1b", 3100)) == 8)
holds("the smaller the model, the sooner activations pass 8 bytes per parameter", at_8["smollm2-135m"] < at_8["llama-3.2-1b"] < at_8["llama-2-7b"])

# %% [markdown]
# ## 4. Where activations come from
#
# Backward needs what forward has computed, so autograd *keeps* it: each operation what its own gradient is made of. In this laboratory's Llama block:
#
# | operation | keeps, for each token |
# |---|---|
# | norm before attention | its input, `hidden` |
# | q, k and v, three linear layers | the input that they share, `hidden` |
# | attention | queries and its own output, `query` each; keys and values, `key_value` each; one number for each head |
# | o, a linear layer | its input, which is attention's output |
# | norm before the MLP | its input, `hidden` |
# | gate and up, two linear layers | the input that they share, `hidden` |
# | silu(gate) · up | gate and up, `mlp` each |
# | down, a linear layer | its input, the product, `mlp` |
#
# ## Exercise 2. What does a block keep? (**, 8 minutes)
#
# Count the numbers kept for one token. A tensor that two operations have in common is kept once.

# %% tags=["exercise"]
def kept(hidden, query, key_value, mlp, heads):
    ...  # your code


check.kept(kept)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Four tensors are as wide as `hidden`, two as wide as `query`, two as wide as `key_value`, three as wide as `mlp`.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `4 * hidden + 2 * query + 2 * key_value + 3 * mlp + heads`. The input of o is not counted again: it is attention's output.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def kept(hidden, query, key_value, mlp, heads):
    return 4 * hidden + 2 * query + 2 * key_value + 3 * mlp + heads


check.kept(kept)

# %% [markdown]
# Is that true of the real model? PyTorch tells what it keeps (`torch.autograd.graph.saved_tensors_hooks`), and `memory_math.saved_bytes` adds it up.

# %%
def sizes_of(shape):
    return {"hidden": shape.hidden, "query": shape.query_width, "key_value": shape.kv_width, "mlp": shape.mlp_width, "heads": shape.heads}


def some_ids(rows, tokens):
    return torch.randint(3, SHAPE.vocabulary, (rows, tokens))


def kept_by_hand(rows, tokens):
    return SHAPE.layers * rows * tokens * kept(**sizes_of(SHAPE)) * 4


model.requires_grad_(True)
SHAPES = [(1, 64), (1, 256), (2, 256)]
counted = {}
for rows, tokens in SHAPES:
    ids = some_ids(rows, tokens)
    found = memory_math.saved_bytes(lambda model=model, ids=ids: model(input_ids=ids).logits.sum())
    counted[f"{rows} x {tokens} tokens"] = (kept_by_hand(rows, tokens), found)
holds("by hand, within 5 % of what autograd keeps", all(0.95 < hand / found < 1 for hand, found in counted.values()))
tables.predicted_measured(counted)

# %% [markdown]
# What is missing by hand is the little that is no part of a block: the embedding, the last norm, the head. Twice the rows or twice the tokens keep
# twice as much; twice the *layers* would, too. The number of heads and the vocabulary hardly matter here. In formulas, `memory_math` derives the
# same:

# %%
FORMULAS = {
    "ours, 32 bit": {"precision": "fp32"},
    "ours, mixed 16 bit": {"precision": "bf16-mixed"},
    "ours, 32 bit, LoRA": {"precision": "fp32", "method": "lora"},
    "transformers, 32 bit": {"precision": "fp32", "implementation": "transformers"},
}
for name, how in FORMULAS.items():
    print(f"{name:<22}{memory_math.activation_formula(SHAPE, **{'implementation': 'lora_lab', **how})}")

# %% [markdown]
# (h hidden, q query, kv key/value, f mlp, a heads, r rank; bytes, so divide by 4 in 32 bit.) Two readings: half the bytes for each number halve the
# activations, and *LoRA does not make them go away*: the way back passes through every frozen layer.
#
# ## 5. The calculator, by hand
#
# Twenty lines. Weights; a gradient and two averages for each weight that trains; activations. With **gradient checkpointing** each block keeps its
# input only, and runs once more on the way back: then there are all blocks' inputs, and everything of the one block that is just being run again.

# %%
def by_hand(shape, rows, tokens, trained=None, weight_bytes=4, number_bytes=4, averages=2, checkpointing=False):
    """Bytes of a training step, part by part. trained: how many weights train, None is all; number_bytes: of each activation."""
    parameters = memory_math.count_parameters(shape).total
    trained = parameters if trained is None else trained
    block = kept(**sizes_of(shape))
    numbers = shape.layers * shape.hidden + block if checkpointing else shape.layers * block
    return {
        "weights": parameters * weight_bytes,
        "gradients": trained * 4,
        "optimizer states": averages * trained * 4,
        "activations": rows * tokens * numbers * number_bytes,
    }


guess = by_hand(architecture_of("llama-2-7b"), 1, 1024)
print({part: f"{nbytes / GIB:.1f} GiB" for part, nbytes in guess.items()})
print(f"by hand {sum(guess.values()) / GIB:.1f} GiB, memory_math {explained.footprint.gib():.1f} GiB")
holds("the calculator, too, says that the first try does not fit", sum(guess.values()) > explained.limit_bytes)

# %% [markdown]
# The two differ, and not by a constant. Adding the parts up assumes that they are all there **at once**, and they never are: when the first gradients
# appear, the activations behind them are already gone. A step has *phases*; its peak is the highest of them. `memory_math` plays them:

# %%
phases = {name: nbytes / GIB for name, nbytes in explained.footprint.phases.items()}
figures.bars(phases, x="GiB", title="Llama-2-7B, 32 bit, one row of 1,024 tokens: the peak of each phase")

# %% [markdown]
# ## 6. Predicted against measured
#
# Now for real, on our model: full fine-tuning and LoRA, 32 and 16 bit, long and short, with and without checkpointing, with and without Adam's
# averages. Each setting is predicted by hand and by `memory_math`, **then** run for two steps, while every tensor is followed from its making until
# it is let go.

# %%
SETTINGS = {  # name: method, precision, rows, tokens, checkpointing, optimizer
    "full, 32 bit": ("full", "fp32", 1, 128, False, "adamw"),
    "full, mixed": ("full", PRECISION, 2, 128, False, "adamw"),
    "full, mixed, SGD": ("full", PRECISION, 2, 128, False, "sgd"),
    "full, mixed, checkpointed": ("full", PRECISION, 4, 128, True, "adamw"),
    "LoRA, 32 bit": ("lora", "fp32", 2, 256, False, "adamw"),
    "LoRA, short rows": ("lora", PRECISION, 4, 64, False, "adamw"),
    "LoRA, long rows": ("lora", PRECISION, 4, 256, False, "adamw"),
    "LoRA, long rows, checkpointed": ("lora", PRECISION, 4, 256, True, "adamw"),
}
BYTES = {"fp32": 4, "bf16-mixed": 2}


def fresh(method, precision):
    """The model, begun anew, with what the method trains."""
    fresh_model = models.load(torch.float32 if method == "full" or precision == "fp32" else torch.bfloat16)[0]
    return lora_lab.inject(fresh_model, rank=8) if method == "lora" else fresh_model.requires_grad_(True)


def try_out(method, precision, rows, tokens, checkpointing, optimizer):
    """(bytes by hand, the prediction, the measurement)."""
    adapted = fresh(method, precision)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    hand = by_hand(SHAPE, rows, tokens, trained, 4 if method == "full" else BYTES[precision], BYTES[precision],
                   2 if optimizer == "adamw" else 0, checkpointing)  # fmt: skip
    predicted = memory_math.predict(
        adapted, method=method, precision=precision, batch_size=rows, sequence_length=tokens, gradient_checkpointing=checkpointing,
        optimizer=optimizer, device="cpu",
    )  # fmt: skip
    texts = [{"input_ids": ids, "labels": ids} for ids in some_ids(rows, tokens).tolist()]
    run = {"max_steps": 2, "micro_batch_size": rows, "learning_rate": 1e-6, "precision": precision, "optimizer": optimizer,
           "gradient_checkpointing": checkpointing, "progress": False}  # fmt: skip
    with memory_math.measure(device="cpu") as measured:
        training.fit(adapted, texts, run)
    return sum(hand.values()), predicted, measured


del model                                                     # each setting loads its own, and whatever is alive would be measured
tried = {name: try_out(*setting) for name, setting in SETTINGS.items()}

# %%
(axes,) = figures.panels(1, height=4.2)
measured = [found.peak_bytes / 2**20 for _, _, found in tried.values()]
axes.plot(measured, [predicted.total / 2**20 for _, predicted, _ in tried.values()], "o", color=figures.GREEN, label="memory_math")
axes.plot(measured, [hand / 2**20 for hand, _, _ in tried.values()], "x", color=figures.RED, label="by hand", markersize=9)
ends = [min(measured) / 1.4, max(measured) * 1.4]
figures.curves({"as predicted": (ends, ends)}, x="measured, MiB", y="predicted, MiB", axes=axes,
               title="Eight training steps, predicted before they ran")  # fmt: skip

# %%
off = {name: (hand / found.peak_bytes - 1, predicted.total / found.peak_bytes - 1) for name, (hand, predicted, found) in tried.items()}
tables.Table(
    ["setting", "by hand, MiB", "memory_math, MiB", "measured, MiB", "by hand off by", "memory_math off by"],
    [[name, *(f"{nbytes / 2**20:,.1f}" for nbytes in (hand, predicted.total, found.peak_bytes)), *(f"{share:+.1%}" for share in off[name])]
     for name, (hand, predicted, found) in tried.items()],
)  # fmt: skip

# %%
embedding = 4 * ours.parts["embedding"]
holds("memory_math is within 1 % for every LoRA step", all(abs(share) < 0.01 for name, (_, share) in off.items() if "LoRA" in name))
gaps = [abs(found.peak_bytes - predicted.total) for name, (_, predicted, found) in tried.items() if "full" in name]
holds("and within one embedding for every full step", max(gaps) < 1.05 * embedding)
holds("the calculator by hand is within 30 %", all(abs(hand) < 0.3 for hand, _ in off.values()))
print(f"the embedding's gradient: {embedding / 2**20:.1f} MiB")

# %% [markdown]
# Where the full steps differ, it is the *measuring* that costs: our model uses its embedding twice (the head is the same tensor), so its two
# gradients are added, and while every operation is watched autograd adds them into a third tensor instead of in place. Nothing is measured for free;
# `measure`'s own documentation says so.
#
# Look at one step phase by phase, the long LoRA rows. (At the *start* the prediction has Adam's averages already, which the first of the two steps
# has yet to make.)

# %%
_, predicted, found = tried["LoRA, long rows"]
print(found.against(predicted))

# %% [markdown]
# ### What each knob saves
#
# The same, asked the other way round: which knob would help most, and what does it cost? For the first try of section 1:

# %%
memory_math.savings("llama-2-7b", **FIRST_TRY)

# %% [markdown]
# Savings do not add up. A knob that lowers one phase is worth nothing while another phase is the peak. So `explain_oom` tries them together, cheapest
# first. Your turn:
#
# ## Exercise 3. Make it fit (**, 8 minutes)
#
# Llama-3-8B, four rows of 2,048 tokens in a step, mixed 16 bit, on a graphics card of 24 GB (an RTX-4090). Give keywords of `memory_math.predict`
# with which it fits. Model, rows and length stay. There is more than one way; begin with `dict()` and read what the check says.

# %% tags=["exercise"]
keywords = ...  # your dict, such as dict(method="lora")


check.make_it_fit(keywords)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Three things are in the way, one after the other: what trains (`method`), activations (`gradient_checkpointing`), and the logits over 128,256 words
# (`loss`, or fewer rows at a time: `batch_size` and `grad_accum_steps`).
# </details>
#
# <details><summary>Solution, in words</summary>
#
# LoRA, gradient checkpointing, and a loss in chunks. Or QLoRA and checkpointing; or LoRA, checkpointing, and one row at a time, four times.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
keywords = {"method": "lora", "gradient_checkpointing": True, "loss": "chunked"}


check.make_it_fit(keywords)

# %%
ROAD = {"everything trains": {}, "LoRA": {"method": "lora"}, "+ checkpointing": {"method": "lora", "gradient_checkpointing": True},
        "+ loss in chunks": {"method": "lora", "gradient_checkpointing": True, "loss": "chunked"}}  # fmt: skip
road = memory_math.compare_requests("llama-3-8b", ROAD, precision="bf16-mixed", batch_size=4, sequence_length=2048, gpu="RTX-4090")
PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace")
(axes,) = figures.panels(1, height=2.9)
axes.axvline(memory_math.hardware.gpu_of("RTX-4090").usable_bytes / GIB, color="black", linestyle="--", linewidth=1)
figures.stacked({row.name: {part.replace("_", " "): row.footprint.gib(part) for part in PARTS} for row in road.rows}, x="GiB", axes=axes,
                title="Llama-3-8B, 4 x 2,048 tokens: one knob after the other, and 24 GB (dashed)")  # fmt: skip
fitting = [row.footprint.fits("RTX-4090") for row in road.rows]
holds("[A7] predicted before running: the first three do not fit, the last does", fitting == [False, False, False, True])

# %% [markdown]
# Checkpointing costs time: one more forward pass. In operations, a third more where all weights train, half more where they are frozen. And measured?

# %%
def seconds(checkpointing):
    adapted = fresh("lora", PRECISION)
    texts = [{"input_ids": ids, "labels": ids} for ids in some_ids(4, pick(256, 64)).tolist()] * pick(5, 2)
    run = {"micro_batch_size": 4, "precision": PRECISION, "gradient_checkpointing": checkpointing, "progress": False}
    training.fit(adapted, texts[:4], run)                     # the first step takes longer: all of its memory is new
    return training.fit(adapted, texts, run).seconds


flops = [memory_math.training_flops("smollm2-135m", 1, method="lora", gradient_checkpointing=again).hardware for again in (False, True)]
plain, again = seconds(False), seconds(True)
print(f"checkpointing, predicted from operations: {flops[1] / flops[0]:.2f} times as long; measured here: {again / plain:.2f}")

# %% [markdown]
# ## 7. What 32, 16, 8 and 4 bits make of a number
#
# Fewer bytes for each number is the other great saving. A floating-point number is a sign, an **exponent** (how large) and a **fraction** (how
# exact). The slide shows $\pi$ in four formats [A4]. Computed, with every digit that is really stored:

# %%
formats = memory_math.number_formats(math.pi)
tables.Table(
    ["format", "exponent bits", "fraction bits", "stored bits", "pi becomes", "off by", "largest number"],
    [[row.name, row.exponent_bits, row.fraction_bits, row.bits, row.exact, f"{row.absolute_error:.1e}", f"{row.largest:.3g}"] for row in formats],
)  # fmt: skip

# %%
SVG(formats.svg())

# %%
slide = "3.1415920257568359375"
fp32, step_size = formats["fp32"], formats["fp32"].spacing
pi = {name: formats[name].nearest for name in ("fp16", "bf16", "int8")}
bits = {name: (formats[name].exponent_bits, formats[name].fraction_bits) for name in ("fp32", "fp16", "bf16", "int8")}
holds("[A4] FP16 and BF16 both make it 3.140625, INT8 makes it 3", [*pi.values()] == [3.140625, 3.140625, 3])
holds("[A4] bits: FP32 8 + 23, FP16 5 + 10, BF16 8 + 7, INT8 0 + 7", [*bits.values()] == [(8, 23), (5, 10), (8, 7), (0, 7)])
holds("[A4] the slide's FP32 is not the nearest to pi", fp32.exact != slide)
holds("[A4] it is what 3.141592 becomes: pi was cut to six decimals first", memory_math.number_formats(3.141592)["fp32"].exact == slide)
print(f"the slide {slide}\nnearest   {fp32.exact}: the slide's is {(fp32.nearest - float(slide)) / step_size:.0f} steps below")

# %% [markdown]
# ## Exercise 4. A number in bfloat16 (***, 10 minutes)
#
# bfloat16 is the upper half of a float32: sign, 8 exponent bits, and the first 7 of the 23 fraction bits, *rounded*. Write it. `struct` turns a float
# into its 32 bits and back: `struct.unpack("<I", struct.pack("<f", x))[0]`.

# %% tags=["exercise"]
def bfloat16(x):
    ...  # your code: the nearest bfloat16, as a float


check.bfloat16(bfloat16)

# %% [markdown]
# <details><summary>Hint</summary>
#
# To round a whole number to a multiple of 16: add 8, then cut the last four bits off. Here it is 16 bits instead of four. What lies exactly in the
# middle goes to the neighbour whose last kept bit is 0, so add one less where that bit is 0.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Add `0x7FFF`, and 1 more where bit 16 is set; set the lower 16 bits to zero; read the result as a float again.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def bfloat16(x):
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


check.bfloat16(bfloat16)

# %% [markdown]
# ### With which of them can a model learn?
#
# Training adds small steps to weights. A step that is smaller than half the distance to the next number is rounded away. A weight of 1.0, and a
# thousand steps of 0.001:

# %%
def after_steps(dtype, steps=1000, size=0.001):
    weight = torch.tensor(1.0, dtype=dtype)
    for _ in range(steps):
        weight = (weight.double() + size).to(dtype)           # the exact sum, rounded to what can be stored
    return weight.item()


reached = {name: after_steps(dtype) for name, dtype in {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.items()}
scale = 1 / 64                                                # an int8 code counts 64ths here
code = 64
for _ in range(1000):
    code = round((code * scale + 0.001) / scale)
reached["int8, in steps of 1/64"] = code * scale
holds("[A5] in int8 nothing is learned: every step is rounded away", reached["int8, in steps of 1/64"] == 1)
apart = memory_math.number_formats(1.0)["bf16"].spacing
holds("nor in bf16, in which 1.0 and its neighbour are nearly eight steps apart", reached["bf16"] == 1 and 0.007 < apart < 0.008)
figures.bars(reached, x="the weight, which should be 2.0", title="1.0, after a thousand steps of 0.001")

# %% [markdown]
# That is why mixed precision keeps a 32-bit *master* of each weight that trains. And it is why the lecture says that INT8 and INT4 are for inference
# only [A5]. Of the codes themselves that is true, and PyTorch refuses at once:

# %%
try:
    torch.tensor([64, -7], dtype=torch.int8).requires_grad_()
    refused = False
except RuntimeError as error:
    refused = True
    print(f"RuntimeError: {error}")
holds("[A5] integers have no gradient", refused)

# %% [markdown]
# But a model whose weights are 4-bit codes *can* be fine-tuned: QLoRA (Dettmers et al. 2023, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314),
# section 3) freezes the codes and trains adapters in 32 bit beside them. Gradients pass *through* the codes; they need none of their own.

# %%
quantized, tokenizer = models.load()
lora_lab.quantize(quantized, "nf4")
lora_lab.inject(quantized, rank=8)
codes_before = {name: buffer.clone() for name, buffer in quantized.named_buffers() if not buffer.is_floating_point()}
four = {"epochs": pick(6, 4), "micro_batch_size": 4, "learning_rate": 1e-3, "precision": PRECISION, "progress": False}
losses = training.fit(quantized, data.load("reviews")[0][:4], four, tokenizer=tokenizer).losses
print("loss of the same four reviews, again and again:", " ".join(f"{loss:.2f}" for loss in losses))
holds("[A5] the model learns over 4-bit weights", losses[-1] < losses[0])
holds("[A5] and not one of the codes has changed", bool(codes_before) and all(torch.equal(quantized.get_buffer(name), codes)
                                                                           for name, codes in codes_before.items()))  # fmt: skip
print(lora_lab.quantization_report(quantized))
del quantized

# %% [markdown]
# ### The table of bytes per parameter, with quantization
#
# The slide has the table once more "with quantization", its numbers lost [A3]. Here it is, for Llama-2-7B and nearly empty texts, so that activations
# do not hide it. Bytes per parameter are at the same time GB for a model of 1B:

# %%
RECIPES = {
    "32 bit, training": {"precision": "fp32"},
    "16 bit with 32-bit masters, training": {"precision": "bf16-mixed"},
    "16 bit alone, training": {"precision": "bf16"},
    "8 bit, inference only": {"method": "inference", "precision": "bf16", "quantization": "int8"},
    "4 bit, inference only": {"method": "inference", "precision": "bf16", "quantization": "nf4-dq"},
    "4 bit and adapters (QLoRA), training": {"method": "qlora", "precision": "bf16", "quantization": "nf4-dq"},
}
recipes = {name: memory_math.predict("llama-2-7b", sequence_length=1, optimizer_implementation="fused", **how) for name, how in RECIPES.items()}
STATIC = {"weights": "weights", "gradients": "gradients", "optimizer_states": "optimizer states", "workspace": "temporaries"}
figures.stacked({name: {word: getattr(found, part) / found.parameters for part, word in STATIC.items()} for name, found in recipes.items()},
                x="bytes per parameter", title="[A3] Llama-2-7B, a step of one token")  # fmt: skip

# %%
per = {name: {part: getattr(found, part) / found.parameters for part in STATIC} for name, found in recipes.items()}
sums = {name: round(sum(row.values())) for name, row in per.items()}
holds("[A3] 16 bytes in 32 bit, 8 in 16 bit alone", (sums["32 bit, training"], sums["16 bit alone, training"]) == (16, 8))
holds("[A3] and with 32-bit masters mixed precision saves nothing of these 16", sums["16 bit with 32-bit masters, training"] == 16)
inference = [round(per[f"{width} bit, inference only"]["weights"], 1) for width in (8, 4)]
holds("[A3] inference in 8 and 4 bit: about 1.0 and 0.6 bytes", inference == [1.0, 0.6])
tables.Table(["recipe", *STATIC.values(), "trains"],
             [[name, *(f"{value:.2f}" for value in row.values()), f"{recipes[name].trained:,}"] for name, row in per.items()])  # fmt: skip

# %% [markdown]
# Not exactly 1 and 0.5: embeddings, norms and the head stay in 16 bit, and blocks of codes have scales. Every precision with every optimizer at once
# is one call:

# %%
memory_math.table("llama-2-7b", sequence_length=512)

# %% [markdown]
# ## 8. Seventy billion parameters: from scratch, and fine-tuned
#
# Lecture B asks how hard it is to train Llama-2-70B. Its estimate [B4]: $70\text{B} \times 2\text{ bytes} \times (3 \text{ to } 6) = 420 \text{ to }
# 840$ GB, so 6 to 11 GPUs of 80 GB. What are the 3 and the 6 made of? In units of the 16-bit weights:

# %%
B70 = memory_math.count_parameters("llama-2-70b")
MULTIPLIERS = {"16 bit, SGD with momentum": (1, 1, 1), "16 bit, Adam's averages in 16 bit": (1, 1, 2), "16 bit, Adam's averages in 32 bit": (1, 1, 4),
               "mixed precision, with 32-bit masters": (1, 1, 6)}  # fmt: skip
rows = [[name, *parts, sum(parts), round(70 * 2 * sum(parts)), -(-70 * 2 * sum(parts) // 80), -(-70 * 2 * 10**9 * sum(parts) // (80 * GIB))]
        for name, parts in MULTIPLIERS.items()]  # fmt: skip
holds("[B4] 420 to 840 GB and 6 to 11 GPUs, at 80e9 bytes each", (rows[0][5:7], rows[2][5:7]) == ([420, 6], [840, 11]))
holds("[B4] an A100-80GB has 80 GiB, so it is 5 to 10 of those", (rows[0][7], rows[2][7]) == (5, 10))
print(f"exactly {B70:,} parameters")
tables.Table(["", "weights", "gradients", "optimizer", "all", "GB", "GPUs of 80e9 bytes", "GPUs of 80 GiB"], rows)

# %% [markdown]
# So the 6 is a mixture: averages in 32 bit, and no masters. The mixed precision that nearly everybody uses keeps masters, too, and is 8. Activations
# are in none of it.
#
# The lecture's tables of what consumes memory, naive [B7] and optimized [B8], for one row of 4,096 tokens. The second one lets two things vanish:
# gradients, "by computing just in time", with gradient checkpointing; and optimizer states, with LoRA. We turn the two knobs one by one:

# %%
KNOBS = {"naive": ("full", False), "checkpointing alone": ("full", True), "LoRA alone": ("lora", False), "both": ("lora", True)}
SKINNY = ["q_proj", "k_proj", "v_proj"]                       # what the lecture adapts
llama = {name: memory_math.predict("llama-2-70b", method=method, precision="bf16", sequence_length=4096, gradient_checkpointing=checkpointing,
                                   target_modules=SKINNY) for name, (method, checkpointing) in KNOBS.items()}  # fmt: skip
gradients = {name: found.trained * (2 if "LoRA" not in name and name != "both" else 4) for name, found in llama.items()}
figures.stacked({name: {"weights": found.weights / 1e9, "gradients": gradients[name] / 1e9, "optimizer states": found.optimizer_states / 1e9,
                        "activations": found.saved_bytes / 1e9} for name, found in llama.items()},
                x="GB", title="[B7, B8] Llama-2-70B in 16 bit: which knob makes what vanish?")  # fmt: skip

# %%
naive, alone, lora, both = llama.values()
holds("[B7] naive: parameters 140 GB, gradients 140 GB (of 70e9; counted exactly, 138 each)",
      round(naive.weights / 1e9) == round(naive.gradients / 1e9) == 138)  # fmt: skip
holds("[B7] naive: optimizer 140 to 560 GB; Adam in 16 bit lies between", 140 < naive.optimizer_states / 1e9 < 560)
holds("[B8] checkpointing does NOT make gradients vanish", alone.gradients == naive.gradients)
holds("[B8] it makes activations small", alone.saved_bytes < naive.saved_bytes / 20)
holds("[B8] LoRA makes gradients and optimizer states vanish", gradients["LoRA alone"] + lora.optimizer_states < 0.5e9)
holds("[B8] but leaves nearly all activations", lora.saved_bytes > 0.9 * naive.saved_bytes)
holds("[B8] both together: 140 GB and a little more, 2 GPUs instead of 9", 140e9 < both.total < 150e9
      and [found.gpus_needed("A100-80GB") for found in (naive, both)] == [9, 2])  # fmt: skip
tables.Table(["16 bit, one row of 4,096 tokens", "GB at the peak", "GPUs of 80 GB"], [[name, round(found.total / 1e9), found.gpus_needed("A100-80GB")]
                                                                                     for name, found in llama.items()])  # fmt: skip

# %% [markdown]
# The lecture is right about the result and swaps the reasons. The tool of each saving:
#
# | what vanishes | because of |
# |---|---|
# | gradients, optimizer states | LoRA: what does not train has none |
# | activations | gradient checkpointing: each block keeps its input |
#
# The second table writes gradients as "~ #Neurons ~ #Params" [B7b]. But neurons are activations: their number grows with the text, and that of the
# gradients does not.

# %%
ROWS = [1, 2, 4]
texts = [memory_math.predict("llama-2-70b", precision="bf16", sequence_length=4096, batch_size=rows) for rows in ROWS]
figures.curves({"gradients: one for each parameter": (ROWS, [found.trained * 2 / 1e9 for found in texts]),
                "activations: the neurons": (ROWS, [found.saved_bytes / 1e9 for found in texts])},
               x="rows of 4,096 tokens", y="GB", dots=True, title="[B7b] Llama-2-70B: parameters are not neurons")  # fmt: skip

# %%
holds("[B7b] gradients do not grow with the batch; activations double", texts[1].trained == texts[0].trained
      and round(texts[1].saved_bytes / texts[0].saved_bytes, 2) == 2)  # fmt: skip
SIZES = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
needed = {name: memory_math.predict(name, method="lora", precision="bf16", sequence_length=4096, gradient_checkpointing=True, target_modules=SKINNY)
          for name in SIZES}  # fmt: skip
holds("[B8] 1 GPU for 7B and for 13B, 2 for 70B", [found.gpus_needed("A100-80GB") for found in needed.values()] == [1, 1, 2])
tables.Table(["LoRA, checkpointed, 4,096 tokens", "GB", "A100-80GB"], [[name, f"{found.total / 1e9:.1f}", found.gpus_needed("A100-80GB")]
                                                                       for name, found in needed.items()])  # fmt: skip

# %% [markdown]
# ## Exercise 5. How large is $A^K$? (*, 5 minutes)
#
# The lecture adapts $A^K$, "in Llama-2-70B a 8096 × 8096 matrix, about 64M parameters" [B9]. The model's config says: hidden size 8,192, 64 heads of
# queries, **8** heads of keys and values (grouped queries). Count the weights of one layer's $A^K$.

# %% tags=["exercise"]
def weights_of_k(hidden, heads, kv_heads):
    ...  # your code


check.weights_of_k(weights_of_k)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A head is `hidden / heads` wide. $A^K$ reads the whole hidden state and writes the keys of `kv_heads` heads.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `hidden` inputs times `kv_heads * hidden // heads` outputs.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def weights_of_k(hidden, heads, kv_heads):
    return hidden * (kv_heads * hidden // heads)


check.weights_of_k(weights_of_k)

# %%
layer = {layer.name: layer for layer in architecture_of("llama-2-70b").linears()}
key, query = layer["model.layers.0.self_attn.k_proj"], layer["model.layers.0.self_attn.q_proj"]
holds("[B9] A^K is 8,192 x 1,024, 8.4 million: not 8096 x 8096, and not 64 million",
      (key.inputs, key.outputs, key.weights) == (8192, 1024, 8_388_608))  # fmt: skip
holds("[B9] and the slide's own product is 65.5 million", round(8096 * 8096 / 1e6, 1) == 65.5)
print(f"A^Q is {query.inputs:,} x {query.outputs:,} = {query.weights / 1e6:.1f} million: what the slide says is nearly true of that one")

# %% [markdown]
# ## 9. Time and money
#
# Reading a token forward takes 2 operations for each parameter, a product and a sum; backward takes twice that: $6 N$ for each token (Kaplan et al.
# 2020, [arXiv:2001.08361](https://arxiv.org/abs/2001.08361), section 2.1). Where the weights are frozen, half of backward is not needed: $4 N$.
#
# The lecture's rate is 400 tokens for each A100 and second, "optimistically", and its price \$2.50 an hour [B5]:

# %%
runs = {
    "11 GPUs": memory_math.training_time("llama-2-70b", 2e12, gpus=11, tokens_per_gpu_second=400, gpu="A100-80GB", price=2.5),
    "2,048 GPUs": memory_math.training_time("llama-2-70b", 2e12, gpus=2048, tokens_per_gpu_second=400, gpu="A100-80GB", price=2.5),
    "2,048 GPUs, Meta's own GPU-hours": memory_math.training_time("llama-2-70b", 2e12, gpus=2048, tokens_per_gpu_second=2e12 / (1_720_320 * 3600),
                                                                  gpu="A100-80GB", price=2.5),
}  # fmt: skip
holds("[B5] 5,261 days on 11 GPUs, 28 on 2,048", [round(run.days) for run in runs.values()][:2] == [5261, 28])
millions = [round(run.dollars / 1e6, 2) for run in runs.values()]
holds("[B5] $4M holds for the hours that Meta published; at 400 tokens it is $3.47M", millions[1:] == [3.47, 4.30])
tables.Table(["Llama-2-70B, 2T tokens", "tokens/GPU/s", "share of the A100's peak", "days", "GPU-hours", "million dollars"],
             [[name, round(run.tokens_per_gpu_second), f"{run.mfu:.0%}", round(run.days, 1), round(run.gpu_hours), round(run.dollars / 1e6, 2)]
              for name, run in runs.items()])  # fmt: skip

# %% [markdown]
# ## Exercise 6. Days and dollars (*, 5 minutes)
#
# Do the lecture's sum yourself.

# %% tags=["exercise"]
def days_and_dollars(tokens, gpus, tokens_per_gpu_second, dollars_per_gpu_hour):
    ...  # your code: return days, dollars


check.days_and_dollars(days_and_dollars)

# %% [markdown]
# <details><summary>Hint</summary>
#
# All GPUs together read `gpus * tokens_per_gpu_second` tokens a second. Every one of them is paid for, by the hour.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `tokens / (gpus * tokens_per_gpu_second)` seconds; 86,400 of them are a day; the dollars are hours times GPUs times the price.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def days_and_dollars(tokens, gpus, tokens_per_gpu_second, dollars_per_gpu_hour):
    seconds = tokens / (gpus * tokens_per_gpu_second)
    return seconds / 86_400, seconds / 3600 * gpus * dollars_per_gpu_hour


check.days_and_dollars(days_and_dollars)

# %% [markdown]
# ### Fine-tuning instead
#
# The lecture's way out: smaller data. "50k pairs at 4,096 tokens each, so 200M tokens; 7 GPUs take about 20 hours" [B6]. But 4,096 is the model's
# *window*, the most a pair could have. How long are such pairs really? Our bundled instructions have the form of Alpaca's:

# %%
train_rows, _ = data.load("instructions")
lengths = [len(example["input_ids"]) for example in data.encode_rows(train_rows, tokenizer)]
mean = sum(lengths) / len(lengths)
window, true = (memory_math.training_time("llama-2-70b", 50_000 * tokens, gpus=7, tokens_per_gpu_second=400, price=2.5) for tokens in (4096, mean))
stated = memory_math.training_time("llama-2-70b", 2e8, gpus=7, tokens_per_gpu_second=400)
holds("[B6] 2e8 tokens on 7 GPUs take about 20 hours", round(stated.hours, 1) == 19.8)
holds("[B6] real pairs are far shorter than the window", max(lengths) < 4096 / 4)
figures.bars({"as the slide counts, 4,096 each": window.hours, f"as they are, {mean:.0f} each": true.hours}, x="hours on 7 GPUs",
             title="[B6] 50,000 instructions, once through Llama-2-70B")  # fmt: skip

# %% [markdown]
# And here, on this machine? What was measured above gives its speed, and the speed gives the time of any other run:

# %%
speed = pick(5, 2) * 4 * pick(256, 64) / plain                # tokens a second, LoRA, without checkpointing
small = int(ours)
reached = speed * memory_math.training_flops(small, 1, method="lora").model
review_tokens = sum(len(example["input_ids"]) for example in data.encode_rows(data.load("reviews")[0], tokenizer))
everything = reached / (6 * small)                            # tokens a second in full training, at the same operations a second
peak = memory_math.hardware.gpu_of("A100-80GB").flops_per_second
print(f"{speed:,.0f} tokens a second with LoRA: {reached / 1e9:.0f} billion operations a second; an A100 has up to {peak / reached:,.0f} times that")
print(f"one pass over the 240 reviews, {review_tokens:,} tokens: {review_tokens / speed / 60:.1f} minutes")
print(f"SmolLM2's own training, 2T tokens (arXiv:2502.02737): {2e12 / everything / 86_400 / 365:,.0f} years")

# %% [markdown]
# ## 10. Which size for which budget? Scaling laws
#
# A budget of $C$ operations can train a large model on few tokens or a small one on many: $C = 6 N D$. Which is best? The slide's answer is lost
# [A6]; these are the published ones:
#
# - **Kaplan et al. 2020** ([arXiv:2001.08361](https://arxiv.org/abs/2001.08361), figure 14): $N \propto C^{0.73}$. Make models large, and stop early.
# - **Hoffmann et al. 2022**, "Chinchilla" ([arXiv:2203.15556](https://arxiv.org/abs/2203.15556)): $N \propto C^{0.5}$, about 20 tokens for each
#   parameter. Their law is $L(N, D) = E + A / N^{\alpha} + B / D^{\beta}$, but the constants they printed for it do not give the 20.
# - **Besiroglu et al. 2024** ([arXiv:2404.10102](https://arxiv.org/abs/2404.10102)) fitted the same data again, and theirs do.

# %%
LAWS = {"20 tokens each": "rule", "Chinchilla as printed": "published", "refitted": "refit"}
best = {name: curve(constants) for name, constants in LAWS.items()}
budgets = [found.flops for found in best["refitted"]]
kaplan = [kaplan_optimal_parameters(flops) for flops in budgets]
left, right = figures.panels(2, height=3.6)
figures.curves({**{name: (budgets, [found.parameters for found in line]) for name, line in best.items()}, "Kaplan": (budgets, kaplan)},
               x="operations", y="best number of parameters", log="xy", axes=left)  # fmt: skip
figures.curves({**{name: (budgets, [found.tokens for found in line]) for name, line in best.items()},
                "Kaplan": (budgets, [flops / 6 / n for flops, n in zip(budgets, kaplan, strict=True)])},
               x="operations", y="best number of tokens", log="xy", axes=right)  # fmt: skip

# %%
BUDGET = 5.76e23                                              # with which Gopher was trained, and then Chinchilla
print(memory_math.chinchilla(BUDGET))
rule, refit = memory_math.chinchilla(BUDGET), memory_math.chinchilla(BUDGET, "refit")
holds("[A6] the rule gives Chinchilla: 70B parameters on 1.4T tokens", (round(rule.parameters / 1e9, -1), round(rule.tokens / 1e12, 1)) == (70, 1.4))
holds("[A6] the refitted constants agree with it", 17 < refit.tokens_per_parameter < 20)
holds("[A6] the printed ones do not", memory_math.chinchilla(BUDGET, "published").tokens_per_parameter > 90)
holds("[A6] Kaplan's model would have been ten times as large", kaplan_optimal_parameters(BUDGET) / refit.parameters > 10)

# %% [markdown]
# ## Exercise 7. The best model for a budget (**, 6 minutes)
#
# Return parameters and tokens for a budget of operations: $C = 6 N D$, and 20 tokens for each parameter.

# %% tags=["exercise"]
def compute_optimal(flops):
    ...  # your code: return parameters, tokens


check.compute_optimal(compute_optimal)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Put $D = 20 N$ into $C = 6 N D$. What is $N^2$?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# $N = \sqrt{C / 120}$, and $D = 20 N$.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def compute_optimal(flops):
    parameters = math.sqrt(flops / 120)
    return parameters, 20 * parameters


check.compute_optimal(compute_optimal)

# %% [markdown]
# With the same two lines: which model would this machine train best in a day, and in a year? And were Llama-2-70B and SmolLM2 trained "optimally"?

# %%
rows = []
for name, budget in {"this machine, a day": reached * 86_400, "this machine, a year": reached * 86_400 * 365}.items():
    parameters, tokens = compute_optimal(budget)
    rows.append([name, f"{budget:.2g}", f"{parameters / 1e6:,.1f}M", f"{tokens / 1e9:,.3f}B", 20])
for name, preset, tokens in (("Llama-2-70B, as it was trained", "llama-2-70b", 2e12), ("SmolLM2-135M, as it was trained", "smollm2-135m", 2e12)):
    parameters = memory_math.count_parameters(preset).total
    rows.append([name, f"{6 * parameters * tokens:.2g}", f"{parameters / 1e6:,.1f}M", f"{tokens / 1e9:,.0f}B", round(tokens / parameters)])
tables.Table(["", "operations", "parameters", "tokens", "tokens per parameter"], rows)

# %% [markdown]
# SmolLM2 read hundreds of times more than "optimal": the law minds the cost of *training* only, and a small model that was trained for long is cheap
# each time it is used. Optimal for whom? is a question about who pays for the answers, which notebook 08 takes up.
#
# ## Before and after
#
# The first try of section 1, and the same wish with three knobs turned. Same model, same text, same GPU:

# %%
after = memory_math.predict("llama-2-7b", method="lora", gradient_checkpointing=True, precision="bf16-mixed", sequence_length=1024)
holds("it fits, eight times over", not explained.fits and explained.footprint.total > 8 * after.total and after.fits("A100-80GB"))
holds("it even fits a graphics card of 24 GB", after.fits("RTX-4090"))
SVG(after.svg("RTX-4090"))

# %% [markdown]
# ## Takeaways
#
# - A step holds weights, a gradient and two averages for each weight that trains, and activations for each token. Its peak is the highest of its
#   *phases*, not their sum.
# - LoRA takes away gradients and optimizer states; checkpointing takes away activations; fewer bits take a share of everything. They are three knobs,
#   not one.
# - A step smaller than half the distance between two numbers is lost: what learns is kept in 32 bit, what is frozen may be kept in 4.
# - Time is tokens over tokens a second; money is GPU-hours times a price. Both are known before you start, within the error of the speed you assume.
# - Numbers on slides deserve the same arithmetic. Several of those here were wrong, and each took one line to find out.
#
# ## Three questions
#
# 1. A colleague's job runs out of memory in the *optimizer step*. She halves the batch. Does it help?
#
#    <details><summary>Answer</summary>
#
#    No. In that phase activations are gone already; what is there is weights, gradients, averages and the step's temporaries, and none of them
#    depends on the batch. Train fewer weights, use a fused or an 8-bit optimizer, or keep the averages elsewhere.
#    </details>
# 2. LoRA with rank 8 and LoRA with rank 64: how much more memory does the second one take?
#
#    <details><summary>Answer</summary>
#
#    Hardly any, beside the rest: adapters, gradients and averages grow eightfold, from nearly nothing. Weights and activations, which are nearly all
#    of a LoRA step, stay.
#    </details>
# 3. A model was trained on a hundred times more tokens than Chinchilla's rule asks for. Was that a mistake?
#
#    <details><summary>Answer</summary>
#
#    Only if it is never used. The rule spends a *training* budget best. A smaller model trained for longer reaches the same loss at a higher training
#    cost, and is cheaper for each answer ever after.
#    </details>
