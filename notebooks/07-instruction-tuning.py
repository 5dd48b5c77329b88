# %% [markdown]
# # 07 · Instruction tuning
#
# > Turn rows of instructions into a model that does as it is told, and measure what that taught it and what it did not.
#
# **What you will learn**
#
# - the prompt formats of Alpaca, Dolly, Vicuna, Koala, Baize, Llama-2-chat and ChatML, and what asking in another one changes
# - to learn the answers and not the questions: labels, by hand
# - to mix tasks with weights and templates, and what one task gives and takes from the others
# - whether half of the data, clean, beats all of it with noise in it
# - to tell style from substance: endings, length and format improve; do facts?
#
# **Time:** about 10 minutes on 2 cores with the real model. Offline once the model is fetched.
#
# This is the lecture's third task, *training Alpaca/Dolly* [A20], on 228 instructions that were written for this course, and on larger sets where
# they are present.

# %%
import dataclasses
import json
import math
import random
import statistics
from collections import Counter
from importlib import resources

import torch

import lora_lab
import memory_math
from course import figures, holds, models, pick, real_data, tables, told
from course.checks import instruction_tuning as check
from lora_lab import data, training
from lora_lab.training.evaluation import clean_endings, score_choices, write

torch.manual_seed(0)
PRECISION = models.precision()
print(f"precision {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# ## 1. The data, and what the famous models had
#
# A row has three fields, Alpaca's: an **instruction**, an **input** (often empty) and the **output** that we want. Ours come in twelve kinds, from
# arithmetic to questions that should be answered by asking back.

# %%
model, tokenizer = models.load()
clean, held_out = data.load("instructions")
print(f"{len(clean)} rows to learn from, {len(held_out)} held out; kinds: {', '.join(Counter(row['category'] for row in clean))}")
learned, asked = ({(row["instruction"], row["input"]) for row in rows} for rows in (clean, held_out))
holds("no held-out instruction is learned with its input", not learned & asked)
shown = list({row["category"]: row for row in clean}.values())[:6]
tables.Table(["kind", "instruction", "input", "output"], [[row["category"], row["instruction"], row["input"], row["output"]] for row in shown])

# %% [markdown]
# The lecture lists the models that made this famous, each with its base, its data and how it was tuned [A8]: on pairs of instruction and answer
# (SFT), or beyond that on **preferences**, pairs of answers of which people liked one better (RLHF), which is no part of this course. What did the
# first part cost? We assume 300 tokens a pair, as notebook 08 does, three passes, all weights, and an A100 that reaches 35 % of its peak:

# %%
MODELS = {
    "FLAN-T5-XXL": ("t5-v1_1-xxl", 15_000_000, "SFT, 1,836 tasks"), "Falcon-40B-Instruct": ("falcon-40b", 100_000, "SFT, Baize's talks"),
    "Llama-2-70B-Chat": ("llama-2-70b", 27_500, "SFT, then RLHF on 2.9 million preferences"), "Dolly": ("pythia-12b", 15_000, "SFT"),
    "Alpaca-13B": ("llama-13b", 52_000, "SFT"), "Vicuna-13B": ("llama-13b", 70_000, "SFT"), "Koala-13B": ("llama-13b", 500_000, "SFT"),
    "this notebook": ("smollm2-135m", len(clean), "SFT"),
}  # fmt: skip
a_row = statistics.mean(len(example["input_ids"]) for example in data.encode_rows(clean, tokenizer))


def tuning(name):
    """(million tokens, A100-hours) of three passes."""
    base, pairs, _ = MODELS[name]
    tokens = 3 * pairs * (a_row if name == "this notebook" else 300)
    return tokens / 1e6, memory_math.training_time(base, tokens, gpus=1, gpu="A100-80GB", mfu=0.35).gpu_hours


print(f"a row of ours has {a_row:.0f} tokens")
print("GPT-3.5 and ChatGPT (RLHF) and Flan-PaLM (1,836 tasks, 15 million pairs) are closed: there is nothing to compute")
tables.Table(["instruction model", "base", "pairs, as stated", "tuned by", "million tokens", "A100-hours, predicted"],
             [[name, base, pairs, how, *(f"{each:,.2f}" for each in tuning(name))] for name, (base, pairs, how) in MODELS.items()])  # fmt: skip

# %%
alpaca = memory_math.count_parameters("alpaca-7b") / 1e9
print(f"Alpaca's base: this lecture says 13 billion, the other one 7; counted from the config of the original: {alpaca:.2f}")
holds("the original Alpaca has 7 billion weights: the lectures disagree, and the other one is right", round(alpaca) == 7)

# %% [markdown]
# ## 2. Formats: where does the question end?
#
# A language model continues a text. To make it *answer* one, question and answer are written in a fixed form, the same in training and ever after.
# Each of these models brought its own. Below is one row in each, up to the place where the model begins to write.

# %%
FORMATS = {name: dataclasses.replace(tokenizer, chat_template=data.chat_template(name)) for name in data.CHAT_TEMPLATES}
FORMATS["SmolLM2's own"] = tokenizer
row = {"instruction": "Name the colour.", "input": "Grass in May.", "output": "Green."}
tables.before_after({name: (data.prompt_of(row, told),) for name, told in FORMATS.items()}, ["the prompt"])

# %% [markdown]
# (Where these models wrote their own tokens for the beginning and the end of a text, the lab writes this tokenizer's, `<|im_start|>` and
# `<|im_end|>`. SmolLM2 was taught in ChatML, with a system message of its own.) The forms differ in what they cost, too: every request pays for
# them.

# %%
bare = len(tokenizer.encode("Name the colour.\n\nGrass in May.", add_special_tokens=False))
figures.bars({name: len(told.encode(data.prompt_of(row, told), add_special_tokens=False)) - bare for name, told in FORMATS.items()},
             x="tokens around the question", title=f"The question itself has {bare}")  # fmt: skip

# %% [markdown]
# ## Exercise 1. Alpaca's prompt (*, 5 minutes)
#
# Write it out, up to where the answer begins. With an input and without one it is not the same text: look at both.

# %%
without = {"instruction": "Name a colour.", "input": ""}
prompts = {name: data.prompt_of(each, FORMATS["alpaca"]).removeprefix("<|im_start|>") for name, each in (("with", row), ("without", without))}
tables.before_after({f"{name} an input": (prompt,) for name, prompt in prompts.items()}, ["Alpaca's prompt"])

# %% tags=["exercise"]
def alpaca_prompt(instruction, given):
    ...  # your code: the text; given is the input, "" where there is none


check.alpaca_prompt(alpaca_prompt)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Two things change with an input: half a sentence in the first line, and a block with its heading. The lab puts a line break behind `### Response:`;
# Stanford's own prompt has none. Both are right here.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Put the half sentence and the block into variables that are empty where there is no input, and one f-string does for both.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def alpaca_prompt(instruction, given):
    paired = ", paired with an input that provides further context" if given else ""
    block = f"### Input:\n{given}\n\n" if given else ""
    return (f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n{block}### Response:\n")  # fmt: skip


check.alpaca_prompt(alpaca_prompt)

# %% [markdown]
# Does the form matter to a model that was taught in one of them? We ask the untuned SmolLM2 in each, and look at how surprised it is by the right
# answers (the loss on the answers of the held-out rows, in nats per token: lower is better).

# %%
JUDGED = held_out[: pick(48, 4)]


def loss(model, rows, told=tokenizer):
    return math.log(training.perplexity(model, rows, told, precision=PRECISION, progress=False))


untuned = {name: loss(model, JUDGED, told) for name, told in FORMATS.items()}
figures.bars(dict(sorted(untuned.items(), key=lambda pair: pair[1])), x="loss of the right answers, nats per token",
             title="The untuned model, asked in each format")  # fmt: skip

# %% [markdown]
# The form that a model was taught in need not come first here: with it come the habits that were taught, and the right answers of these rows are
# shorter than SmolLM2's.
#
# ## 3. Learn the answers, not the questions
#
# Training shows whole rows. But nobody wants a model that writes questions, so the loss counts on the **answer** only: every token gets a *label*,
# the token it should predict, and where the label is $-100$ the loss looks away. Alpaca and Dolly did so (Dolly's trainer looks for `### Response:`
# and masks all before it). Baize learned whole conversations, questions included.
#
# ## Exercise 2. Labels (**, 6 minutes)
#
# Return the row's `input_ids` and its `labels`, from the ids of the prompt, those of the answer, and the id of the end token. PyTorch's habit here:
# a label stands at the place of its *own* token, and the model shifts them by one itself.

# %% tags=["exercise"]
def labelled(prompt_ids, answer_ids, end_id):
    ...  # your code: return input_ids, labels


check.labelled(labelled)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Both lists are as long as prompt, answer and end together. Should the end be learned?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The ids one after another; the labels are -100 for the prompt, and then the answer and the end token. A model that never learned to end does not
# end.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def labelled(prompt_ids, answer_ids, end_id):
    return [*prompt_ids, *answer_ids, end_id], [-100] * len(prompt_ids) + [*answer_ids, end_id]


check.labelled(labelled)

# %%
prompt = tokenizer.encode(data.prompt_of(row, tokenizer), add_special_tokens=False)
by_hand = labelled(prompt, tokenizer.encode(row["output"], add_special_tokens=False), tokenizer.eos_token_id)
(lab,) = data.encode_rows([row], tokenizer)
size = len(by_hand[0])                                        # behind the end ChatML has a line break more, without a label
holds("the lab's labels are ours", (lab["input_ids"][:size], lab["labels"][:size]) == by_hand and {*lab["labels"][size:]} <= {-100})
encoded = data.encode_rows(clean, tokenizer)
answers, everything = (sum(sum(label != -100 for label in each[part]) for each in encoded) for part in ("labels", "input_ids"))
print(f"{answers:,} of {everything:,} tokens are learned, {answers / everything:.0%}; the others are read all the same, and cost as much")

# %% [markdown]
# ## 4. Train it
#
# One pass over the rows, LoRA of rank 8. The same function will train everything else on this page, so that only the rows differ: as many steps, as
# many rows in each, the same seed. First its memory, predicted and then measured on two steps over the longest rows.

# %%
STEPS, BATCH = pick((30, 8), (2, 2))


def tuned(rows, steps=STEPS, batch=BATCH):
    """(model, result): the untuned model with LoRA, trained on these rows."""
    torch.manual_seed(0)
    fresh = lora_lab.inject(models.load()[0], rank=8)
    settings = {"max_steps": steps, "micro_batch_size": batch, "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": pick(3, 0),
                "precision": PRECISION, "progress": False}  # fmt: skip
    return fresh, training.fit(fresh, rows, settings, tokenizer=tokenizer)


longest = sorted(encoded, key=lambda example: len(example["input_ids"]))[-BATCH:]
labels = sum(label != -100 for example in longest for label in example["labels"][1:])
trial = lora_lab.inject(models.load()[0], rank=8)
predicted = memory_math.predict(trial, method="lora", rank=8, precision=PRECISION, batch_size=len(longest), label_tokens=labels,
                                sequence_length=len(longest[-1]["input_ids"]), implementation="lora_lab", device="cpu")  # fmt: skip
two_steps = {"max_steps": 2, "micro_batch_size": len(longest), "learning_rate": 1e-6, "precision": PRECISION, "progress": False}
measured = memory_math.measure(lambda: training.fit(trial, longest, two_steps), device="cpu")
peak = measured.peak_bytes - (measured.start_bytes - sum(weight.nbytes for weight in trial.parameters()))
trial = None
holds("predicted and measured agree within 5 %", abs(predicted.total / peak - 1) < 0.05)
tables.predicted_measured({f"a step on the {len(longest)} longest rows": (predicted.total, peak)})

# %%
model, result = tuned(clean)
print(f"{lora_lab.count_parameters(model).trainable_percent:.2f} % of the weights train")
print(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s")
figures.curves({"training": result.losses}, x="step", y="loss, nats per token", title="One pass over the instructions")

# %%
after = {name: loss(model, JUDGED, told) for name, told in FORMATS.items()}
own = "SmolLM2's own"
print(f"held-out loss {untuned[own]:.3f} -> {after[own]:.3f}")
holds("the held-out loss fell", after[own] < untuned[own])
holds("it is least surprised in the format it was tuned in", min(after, key=after.get) == own, real_only=True)
tables.Table(["asked in", "untuned", "tuned in SmolLM2's own"], [[name, f"{untuned[name]:.3f}", f"{after[name]:.3f}"] for name in FORMATS])

# %% [markdown]
# What was learned is not bound to the form: asked in forms it never saw, the tuned model is better, too, where the second number is below the
# first. It is best in its own. A model of somebody else's wants to be asked in *its* form, which stands in its tokenizer's `chat_template`.
#
# Had it been better to learn the questions as well, as Baize did? The same run with every token as its own label:

# %%
whole, _ = tuned([{"input_ids": example["input_ids"]} for example in encoded])
everything_learned = loss(whole, JUDGED)
whole = None
print(f"held-out loss of the answers: {after[own]:.3f} with the answers learned, {everything_learned:.3f} with everything learned")

# %% [markdown]
# One run each, so a small difference may be chance. What differs for certain is what the gradient is spent on: section 3 has the share of tokens that
# are answers.
#
# ## 5. Before and after
#
# The same held-out instructions, greedily. We look at four things that a reader notices at once, and call them **style**: does the answer come to
# an end by itself? Is it as short as the answers of the training rows? How many words has it? What does it share with a person's answer (ROUGE-L,
# notebook 06)?

# %%
ASKED = held_out[:: pick(2, 12)]
ROOM = max(len(row["output"].split()) for row in clean)


def answered(model, rows=ASKED):
    return write(model, rows, tokenizer, max_new_tokens=pick(96, 5), progress=False)


def style(texts, rows=ASKED):
    lengths = [len(each.text.split()) for each in texts]
    shared = training.rouge([each.text for each in texts], [row["output"] for row in rows], kinds=["rougeL"])["rougeL"].f1
    return {"ends by itself": clean_endings(texts), "short enough": sum(each <= ROOM for each in lengths) / len(lengths),
            "words": statistics.mean(lengths), "ROUGE-L": shared}  # fmt: skip


with lora_lab.disabled(model):
    old_texts = answered(model)
new_texts = answered(model)
tables.before_after({f"{row['instruction']}\n\n{row['input']}".strip(): (row["output"], old.text, new.text)
                     for row, old, new in list(zip(ASKED, old_texts, new_texts, strict=True))[:8]}, ["a person", "before", "after"])  # fmt: skip

# %%
old_style, new_style = style(old_texts), style(new_texts)
print(f"short enough is up to {ROOM} words, the longest answer of the training rows")
shares = ("ends by itself", "short enough")
tables.Table(["", "a person", "before", "after"], [
    *[[name, "100%", f"{old_style[name]:.0%}", f"{new_style[name]:.0%}"] for name in shares],
    ["words", round(statistics.mean(len(row["output"].split()) for row in ASKED)), round(old_style["words"]), round(new_style["words"])],
    ["ROUGE-L", "", f"{100 * old_style['ROUGE-L']:.1f}", f"{100 * new_style['ROUGE-L']:.1f}"],
])  # fmt: skip

# %%
holds("more answers come to an end by themselves", new_style["ends by itself"] > old_style["ends by itself"], real_only=True)
holds("more of them are as short as asked", new_style["short enough"] > old_style["short enough"], real_only=True)
holds("and they share more with a person's answers", new_style["ROUGE-L"] > old_style["ROUGE-L"], real_only=True)

# %% [markdown]
# ## 6. Style is not substance
#
# *The False Promise of Imitating Proprietary LLMs* (Gudibande et al. 2023, [arXiv:2305.15717](https://arxiv.org/abs/2305.15717)) is on the
# lecture's slides [A22]: models tuned on the answers of a better one take over its style, and raters are impressed, while what they *know* stays
# what it was. Is that so here? Sixty questions with one right and three wrong answers, none of them in the training rows. The model does not write:
# we ask which of the four it finds likeliest, so that an answer's length and ending play no part. Guessing gets a quarter. And we ask in two forms:
# in the one that it was tuned in, and as plain text. Who has learned only how one answers *here* gains in the first, and who knows more in both.

# %%
FACTS = [json.loads(line) for line in (resources.files("lora_lab.data") / "bundled" / "facts.jsonl").read_text("utf-8").splitlines()][: pick(60, 6)]
holds("none of the questions is in the training rows", not {fact["question"] for fact in FACTS} & {row["instruction"] for row in clean})
ORDERS = [random.Random(number).sample([fact["answer"], *fact["wrong"]], 4) for number, fact in enumerate(FACTS)]  # the right one anywhere


FORMS = {"in its own format": lambda question: data.prompt_of({"instruction": question}, tokenizer) + "The answer is",
         "as plain text": lambda question: f"Question: {question}\nAnswer:"}  # fmt: skip


def knows(model, form):
    """For each fact, whether the right answer is the likeliest."""
    prompts = [FORMS[form](fact["question"]) for fact in FACTS]
    choices = [[f" {choice}" for choice in order] for order in ORDERS]
    scores = score_choices(model, prompts, tokenizer, choices, normalise="tokens", precision=PRECISION, progress=False)
    return [order[best] == fact["answer"] for order, best, fact in zip(ORDERS, training.best_choices(scores), FACTS, strict=True)]


with lora_lab.disabled(model):
    knew = {form: knows(model, form) for form in FORMS}
knows_now = {form: knows(model, form) for form in FORMS}
for form in FORMS:
    print(f"{form}: {sum(knew[form])} of {len(FACTS)} right before, {sum(knows_now[form])} after")

# %% [markdown]
# ## Exercise 3. Did it learn anything? (***, 10 minutes)
#
# Both models had the same questions, so look at each question: $+1$ if it is right now and was wrong, $-1$ the other way round, $0$ if nothing
# changed. Return the mean of these numbers and its standard error, $s / \sqrt{n}$, with their standard deviation $s$. `before` and `after` are
# lists of True and False.

# %% tags=["exercise"]
def gain(before, after):
    ...  # your code: return mean, standard_error


check.gain(gain)

# %% [markdown]
# <details><summary>Hint</summary>
#
# True counts as 1 and False as 0, so `new - old` is the number for a question. `statistics.stdev` gives $s$.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# A list of differences; its mean; its standard deviation over the root of its length. Questions that both models get right, or both get wrong, say
# nothing about the difference, and that is why this error is smaller than that of two separate exams.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def gain(before, after):
    changes = [new - old for old, new in zip(before, after, strict=True)]
    return statistics.mean(changes), statistics.stdev(changes) / len(changes) ** 0.5


check.gain(gain)

# %%
changed = {form: gain(knew[form], knows_now[form]) for form in FORMS}
left, right = figures.panels(2, height=2.4)
figures.bars({f"{name}, {when}": round(100 * values[name]) for name in shares for when, values in {"before": old_style, "after": new_style}.items()},
             x="% of the answers", title="Style", colours=[figures.BLACK, figures.ORANGE] * 2, axes=left)  # fmt: skip
figures.bars({f"{form}, {when}": round(100 * statistics.mean(values[form])) for form in FORMS
              for when, values in {"before": knew, "after": knows_now}.items()},
             x="% of the facts", title="Substance", colours=[figures.BLACK, figures.ORANGE] * 2, axes=right)  # fmt: skip

# %%
for form, (learned, error) in changed.items():
    print(f"facts, {form}: {learned:+.1%} ± {error:.1%}; {len(FACTS)} questions exclude a gain above {max(learned + 2 * error, 0):.0%}")
told("the lecture: what it knows has not grown, by more than two standard errors in both forms",
     not all(learned > 2 * error for learned, error in changed.values()))  # fmt: skip

# %% [markdown]
# So do not judge an instruction-tuned model by its manners. A few hundred rows teach when to stop, how long to be, what shape an answer has, and how
# one is asked here; a score can rise by that alone, and so knowledge is asked for in more than one form, with the error of the difference beside it.
#
# ## 7. What it forgot
#
# Did the model pay for its manners elsewhere? *Catastrophic forgetting* [A9] shows on text that the training has nothing to do with: here the
# held-out dialogues of notebook 06, as plain text without any format. The adapter can be switched off, so before and after are one call:

# %%
plain = [{"input_ids": tokenizer.encode(row["dialogue"], add_special_tokens=False)} for row in data.load("dialogues")[1][: pick(24, 3)]]
forgot = training.forgetting(model, lambda each: training.perplexity(each, plain, precision=PRECISION, progress=False))
print(f"perplexity of plain dialogues: {forgot}")

# %% [markdown]
# (A plus is forgetting.) Section 9 asks the same of one task against another.
#
# ## 8. Quality against quantity
#
# The lecture's last guideline: *research proves high quality datasets performs well even if quantity is less* [A19]. We make bad data out of good:
# in half of the rows the answer is another row's, or breaks off in the middle. That is what scraped and hurried data look like.
#
# ## Exercise 4. Wrong answers on purpose (**, 8 minutes)
#
# Return new rows in which **every** row has the answer of another one. The old rows stay as they are.

# %% tags=["exercise"]
def shuffled(rows, seed):
    ...  # your code


check.shuffled(shuffled)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `random.shuffle` leaves some answers where they were. Shuffle the *order of the rows*, and then give each the answer of the next one in that
# order. `{**row, "output": other}` is a new row.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Draw an order of the places, and let each place take the answer of the place after it, the last one that of the first: a single round trip, on
# which nobody stays at home.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def shuffled(rows, seed):
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    giver = dict(zip(order, order[1:] + order[:1], strict=True))
    return [{**row, "output": rows[giver[place]]["output"]} for place, row in enumerate(rows)]


check.shuffled(shuffled)

# %%
def truncated(rows):
    """Answers that break off in the middle."""
    halves = [row["output"].split(" ")[: max(len(row["output"].split(" ")) // 2, 1)] for row in rows]
    return [{**row, "output": " ".join(half)} for row, half in zip(rows, halves, strict=True)]


half, others = clean[::2], clean[1::2]
noise = shuffled(others[::2], seed=0) + truncated(others[1::2])
SETS = {"half, clean": [*half], "all, half of it noise": [*half, *noise], "all, clean": [*clean]}
tables.Table(["noise", "instruction", "output"], [[kind, rows[1]["instruction"], rows[1]["output"]] for kind, rows in
             {"another row's answer": noise, "breaks off": noise[len(others[::2]) :]}.items()])  # fmt: skip

# %% [markdown]
# The same number of steps for each, so that nobody trains longer; the clean half comes round twice. *All, clean* is the run of section 4.

# %%
quality = {"all, clean": {"loss": after[own], **new_style}, "untuned": {"loss": untuned[own], **old_style}}
for name in ("half, clean", "all, half of it noise"):
    other, _ = tuned(SETS[name])
    quality[name] = {"loss": loss(other, JUDGED), **style(answered(other))}
    other = None
ORDER = ("untuned", *SETS)
tables.Table(["", "rows", "held-out loss", "ends by itself", "words", "ROUGE-L"],
             [[name, len(SETS.get(name, ())), f"{quality[name]['loss']:.3f}", f"{quality[name]['ends by itself']:.0%}", round(quality[name]["words"]),
               f"{100 * quality[name]['ROUGE-L']:.1f}"] for name in ORDER])  # fmt: skip

# %%
left, right = figures.panels(2, height=2.4)
figures.bars({name: round(quality[name]["loss"], 3) for name in ORDER}, x="held-out loss, lower is better", axes=left)
figures.bars({name: round(100 * quality[name]["ROUGE-L"], 1) for name in ORDER}, x="ROUGE-L, higher is better", colours=figures.ORANGE, axes=right)
right.set_yticklabels([])

# %%
bad, good = quality["all, half of it noise"]["loss"], quality["half, clean"]["loss"]
print(f"held-out loss: half, clean {good:.3f}; twice as many rows, half of them noise {bad:.3f}")
holds("the lecture: a clean half beats all of it with noise", good < bad, real_only=True)

# %% [markdown]
# The held-out loss is measured on clean answers, which is what we want the model to give. What the table also shows is how much *more* clean data
# adds to a clean half: compare its first and last line.
#
# ## 9. One task or many
#
# FLAN's idea [A21]: tune on **many tasks at once**, each put into words in several ways (*templates*), and the model learns to follow instructions
# in general, also those of tasks that it has not seen (Wei et al. 2021, [arXiv:2109.01652](https://arxiv.org/abs/2109.01652)). Four tasks are at
# hand. Two of them have no wording of their own, so we give them three each:

# %%
WORDS = {
    "dialogues": ("Summarize the following dialogue in one or two sentences.", "What was said here? Answer in two sentences.",
                  "Write a short summary of this talk."),
    "sentiment": ("Is this sentence positive or negative?", "Does the writer like it? Answer positive or negative.",
                  "Name the sentiment: positive or negative."),
}  # fmt: skip
FIELDS = {
    "dialogues": lambda row: (row["dialogue"], row["summary"]),
    "sentiment": lambda row: (row["text"], ("negative", "positive")[row["label"]]),
}


def as_instructions(name, rows):
    """Rows of a task as instructions, its templates in turn."""
    if name not in WORDS:
        return [{field: row[field] for field in ("instruction", "input", "output")} for row in rows]
    wordings = [WORDS[name][place % 3] for place in range(len(rows))]
    filled = [(words, *FIELDS[name](row)) for words, row in zip(wordings, rows, strict=True)]
    return [dict(zip(("instruction", "input", "output"), fields, strict=True)) for fields in filled]


parts = {name: data.load(name) for name in ("reviews", "dialogues", "sentiment", "instructions")}
TASKS = {name: as_instructions(name, train) for name, (train, _) in parts.items()}
TESTS = {name: as_instructions(name, test)[: pick(16, 2)] for name, (_, test) in parts.items()}
print(data.mixture(TASKS).table(tokenizer))

# %% [markdown]
# ## Exercise 5. Shares (**, 8 minutes)
#
# In that table a task counts by its size. Mixtures are usually evened out (Raffel et al. 2020,
# [arXiv:1910.10683](https://arxiv.org/abs/1910.10683), section 3.5.2): with sizes $n_i$, a limit $K$ and a temperature $T$, task $i$ gets the share
#
# $$p_i = \frac{\min(n_i, K)^{1/T}}{\sum_j \min(n_j, K)^{1/T}} .$$

# %% tags=["exercise"]
def task_shares(sizes, temperature, maximum):
    ...  # your code: sizes is {task: rows}; return {task: share}


check.task_shares(task_shares)

# %% [markdown]
# <details><summary>Hint</summary>
#
# First the limit, then the power, then divide by the sum of all.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# One dict of powers, and one that divides each by their sum. At temperature 1 a task counts by its size, and the higher it is, the more equal they
# become.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def task_shares(sizes, temperature, maximum):
    powers = {task: min(size, maximum) ** (1 / temperature) for task, size in sizes.items()}
    return {task: power / sum(powers.values()) for task, power in powers.items()}


check.task_shares(task_shares)

# %%
sizes = {"translation": 4_500_000, "questions": 88_000, "summaries": 14_000, "reviews": 240}
temperatures = (1, 1.5, 2, 4, 8, 16)
by_heat = [task_shares(sizes, temperature, 3_000_000) for temperature in temperatures]
figures.curves({f"{task}, {size:,} rows": (temperatures, [shares[task] for shares in by_heat]) for task, size in sizes.items()}, x="temperature",
               y="share of the mixture", log="x", title="Four tasks of very different size")  # fmt: skip
mixed = data.mixture({task: [{"input_ids": [1, 2]}] * rows for task, rows in (("large", 900), ("small", 90))}, temperature=2, maximum=400)
by_hand = task_shares({"large": 900, "small": 90}, 2, 400)
holds("the lab's mixture has these shares", all(abs(mixed.weights[task] - share) < 1e-9 for task, share in by_hand.items()))

# %% [markdown]
# Now the measurement. Six models with the same number of steps and rows: one for each task, one for an equal mixture of all four, and FLAN's test,
# a mixture that has *never seen* the instructions. Each is judged on all four tasks, by the change of the held-out loss against the untuned model:
# below zero is better.

# %%
untouched = models.load()[0]
base = {name: loss(untouched, rows) for name, rows in TESTS.items()}
untouched = None


def change(rows):
    """[task]: by how much training on these rows changes each task's loss."""
    other, _ = tuned(rows, steps=pick(24, 2), batch=pick(4, 2))
    return [loss(other, test) - base[name] for name, test in TESTS.items()]


seen = {name: rows for name, rows in TASKS.items() if name != "instructions"}
table = {f"{name} only": change(rows) for name, rows in TASKS.items()}
table["mixture of all"] = change(data.mixture(TASKS, "equal"))
table["all but instructions"] = change(data.mixture(seen, "equal"))
figures.heatmap(list(table.values()), list(table), list(TESTS), x="judged on", y="trained on", form="+.2f", title="Change of the loss")

# %%
singles = [table[f"{name} only"] for name in TASKS]
worse = sum(value > 0 for place, row in enumerate(singles) for other, value in enumerate(row) if other != place)
largest = max(max(row) for row in singles)
print(f"12 times a model was judged on a task it was not trained on: {worse} times it got worse, the largest change is {largest:+.2f}")
print(f"instructions, from a mixture without any: {table['all but instructions'][-1]:+.2f}")
holds("each single task improves itself", all(row[place] < 0 for place, row in enumerate(singles)), real_only=True)
home = [min(range(len(singles)), key=lambda number: singles[number][place]) == place for place in range(len(singles))]
told(f"a specialist is the best of the four at home ({sum(home)} of {len(home)} are)", all(home))
holds("the mixture improves all four, with a quarter of the rows of each", max(table["mixture of all"]) < 0, real_only=True)

# %% [markdown]
# Read a row for what a training gives and takes. (Each number is a mean over few rows, from one run.) The lecture asks *who cares, use-case
# solved*; if you do, the mixture is the cheap way out. The last row is a small version of FLAN's question. With three tasks, little can be
# expected: FLAN had sixty data sets, and found that the gain on unseen tasks comes with many tasks and large models.
#
# ## 10. Real data
#
# Two open sets: instructions under the Apache licence (from several projects), and part of Dolly's (Databricks, CC BY-SA 3.0). They are no part of
# this repository: the cell runs where `LORA_LAB_DATA` points to a folder that holds them, and shows numbers only. An equal mixture of both, one
# short run.

# %%
FILES = {"apache": ("instructions_apache", "instructions.jsonl"), "dolly": ("dolly", "derived_dolly_open_complete.jsonl")}
found = {name: path for name, parts in FILES.items() if (path := real_data.path(*parts))}
real = {}
if not found:
    print("not measured here: there is neither instructions_apache nor dolly in LORA_LAB_DATA")
for name, path in found.items():
    rows = [row for row in data.read(path) if len(row["instruction"] + row["input"] + row["output"]) < 800]
    random.Random(0).shuffle(rows)
    real[name] = (rows[60:], rows[: pick(60, 2)])
    print(f"{name}: {len(rows):,} rows of up to 800 characters, {len(real[name][1])} of them held out")

# %%
if real:
    other, run = tuned(data.mixture({name: rows for name, (rows, _) in real.items()}, "equal", size=240))
    print(f"{run.steps} steps, {run.tokens:,} tokens in {run.seconds:.0f} s")
    lines = []
    for name, (_, test) in real.items():
        with lora_lab.disabled(other):
            old = loss(other, test), answered(other, test[: pick(24, 2)])
        new = loss(other, test), answered(other, test[: pick(24, 2)])
        lines.append([name, *(f"{each[0]:.3f}" for each in (old, new)), *(f"{clean_endings(each[1]):.0%}" for each in (old, new))])
        holds(f"{name}: the held-out loss fell", new[0] < old[0], real_only=True)
    print(tables.Table(["held out", "loss, before", "after", "ends by itself, before", "after"], lines))

# %% [markdown]
# `python -m lora_lab finetune --task instruction` does this on any file of instructions or chats, and `lora_lab.data.mixture` mixes any number of
# them.
#
# One guideline of the lecture is **not measured here**: *use instruct models for fine-tuning, not base models* [A19]. It takes a base model and its
# instruction-tuned twin; this course brings the twin alone, SmolLM2-135M-*Instruct*. What the page does show is how much the twin already brings
# along: the column *untuned*.
#
# ## 11. The numbers, all together

# %%
tables.Table(["", "before", "after"], [
    ["held-out loss, nats per token", f"{untuned[own]:.3f}", f"{after[own]:.3f}"],
    *[[name, f"{old_style[name]:.0%}", f"{new_style[name]:.0%}"] for name in shares],
    ["words", round(old_style["words"]), round(new_style["words"])],
    *[[f"facts known, {form}", f"{statistics.mean(knew[form]):.0%}", f"{statistics.mean(knows_now[form]):.0%}"] for form in FORMS],
    ["perplexity of plain dialogues", f"{forgot.before:.2f}", f"{forgot.after:.2f}"],
])  # fmt: skip

# %% [markdown]
# ## Takeaways
#
# - An instruction model is a language model with a form. Ask it in the form it was taught in, which its tokenizer knows.
# - Learn the answers and their end; the question is read and not learned.
# - A few hundred clean rows change the style within minutes. What the model knows is another question: ask it apart, in more than one form.
# - Half of the data, clean, was worth more than all of it with wrong and broken answers in every second row.
# - One task makes a specialist. A mixture gives each task a share, by size, evened out by a temperature, and teaches all of them at once.
#
# ## Three questions
#
# 1. After tuning, testers prefer your model in nine of ten comparisons. What do you check before you believe it?
#    <details><summary>Answer</summary>
#
#    Whether it is right more often. Length, tone and tidy lists win comparisons. Take questions with known answers, and compare before and after on
#    each of them.
#    </details>
# 2. Your tuned model never stops writing. Where do you look first?
#    <details><summary>Answer</summary>
#
#    At the labels: is the end token behind the answer, and is it learned? Then at the form it is asked in: another end token, or none, and it waits
#    for something else.
#    </details>
# 3. You have 200 rows of your own and 50,000 from elsewhere. How do you train?
#    <details><summary>Answer</summary>
#
#    As a mixture with a limit or a temperature, so that yours are not drowned, and with yours clean. Judge on held-out rows of yours, and on
#    something else for what was forgotten.
#    </details>
