# %% [markdown]
# # 05 · Sentiment analysis
#
# > Five ways to one classifier, from asking nicely to training every weight, and what each costs: per task, per answer, and in what is forgotten.
#
# **What you will learn**
#
# - to ask a language model for a class, without training and with a few examples, and why examples can make a small model worse
# - to tell what a model knows from which word it leans to: accuracy, AUC, calibration, and the error of all of them
# - to train a prompt, LoRA and all weights on the same rows, and to see what each makes the model forget
# - how many labelled examples each of them needs, from 50 to 5,000
# - what a task takes on disk and a request in time and money, and after how many requests tuning has paid off
#
# **Time:** about 14 minutes on 2 cores with the real model. Offline once the models are fetched.
#
# It is the lecture's first implementation [A20]: sentiment analysis as text classification. Its claims about the methods are checked as
# we meet them, and marked ✓ when they hold in this run, or told as they came out when nobody can know them beforehand.

# %%
import gc
import math
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import lora_lab
import memory_math
import prompt_tuning_lab as ptl
from course import figures, holds, models, movie_reviews, pick, tables, told
from course.checks import sentiment_analysis as check
from lora_lab import data, training
from lora_lab.models.embedding import embed, pooling_of
from lora_lab.models.pooled_classifier import with_pooled_head
from lora_lab.training.evaluation import class_logits
from lora_lab.training.probing import linear_probe

torch.manual_seed(0)
PRECISION = models.precision()
print(f"precision {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# ## 1. The data, and the baseline first
#
# Snippets of movie reviews, each positive or negative, in three parts: to learn from, to choose on (the *validation* rows), and to be
# judged by (the *test* rows, which nothing is chosen on). The rows of rotten_tomatoes are used where they are; where they are not, the
# sentences that come with this repository.

# %%
parts = movie_reviews.load()
train_rows = parts.train
validation, test = parts.validation[: pick(120, 12)], parts.test[: pick(400, 16)]
truth = torch.tensor([row["label"] for row in test])
print(parts.source)
print(f"{len(train_rows):,} rows to learn from, {len(validation)} to choose on, {len(test)} to be judged by; half of each positive")
sentences = movie_reviews.balanced(data.load("sentiment")[1])[:6]                           # to look at: those that come with the repository
tables.Table(["opinion", "is"], [[row["text"], movie_reviews.LABELS[row["label"]]] for row in sentences])

# %% [markdown]
# Who always gives the same answer is right half of the time: that is the baseline. And how exact is an accuracy that was measured on so
# few rows? A share $p$ measured on $n$ rows has the **standard error** $\sqrt{p(1-p)/n}$; it is two of them away from the truth one time in
# twenty. Two accuracies each have an error, so their difference has a larger one; where both are of the same rows, section 3 compares row by row.
#
# ## Exercise 1. How sure is an accuracy? (*, 4 minutes)

# %% tags=["exercise"]
def standard_error(accuracy, rows):
    ...  # your code


check.standard_error(standard_error)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `math.sqrt`. Four times as many rows halve it.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The root of accuracy × (1 − accuracy) / rows.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def standard_error(accuracy, rows):
    return math.sqrt(accuracy * (1 - accuracy) / rows)


check.standard_error(standard_error)

# %% [markdown]
# ## 2. Zero-shot: only ask
#
# A language model classifies by continuing. We write the review into a template and compare the probabilities of " positive" and "
# negative" behind it. But which template? We try five on the validation rows. Two numbers for each: the accuracy, and the **AUC**, the
# share of pairs of a positive and a negative review in which the positive one leans more to " positive". The AUC does not mind where the
# line between the two answers is drawn.

# %%
model, tokenizer = models.load()
model.requires_grad_(False)
ANSWERS = tuple(f" {label}" for label in movie_reviews.LABELS)
TEMPLATES = (
    "Review: {text}\nSentiment:",
    "{text}\nThe sentiment of this review is",
    "Movie review: {text}\nIs this review positive or negative? It is",
    "Classify the review as positive or negative.\nReview: {text}\nAnswer:",
    data.prompt_of({"instruction": "Is this movie review positive or negative?\n{text}"}, tokenizer) + "The review is",
)


def scores_of(model, rows, template=TEMPLATES[0]):
    """log P of " negative" and " positive" behind each review, [rows, 2]."""
    asked = [data.filled(template, row) for row in rows]
    return training.score_choices(model, asked, tokenizer, ANSWERS, batch_size=pick(32, 8), precision=PRECISION, use_cache=False, progress=False)


def judged(scores, rows):
    """accuracy, AUC, and how often it says positive."""
    labels, margins = [row["label"] for row in rows], scores[:, 1] - scores[:, 0]
    return (training.accuracy(training.best_choices(scores), labels), training.evaluation.auc(margins, labels), (margins > 0).double().mean().item())


plain = [scores_of(model, validation, template) for template in TEMPLATES]
chosen_on = [judged(scores, validation) for scores in plain]
tables.Table(["template", "right", "AUC", "says positive"],
             [[repr(template)[1:-1], f"{right:.1%}", f"{area:.3f}", f"{says:.0%}"]
              for template, (right, area, says) in zip(TEMPLATES, chosen_on, strict=True)])  # fmt: skip

# %% [markdown]
# The same question in other words, and another accuracy. Look at the last column, too: a template can fail because the model gives nearly
# everything one answer, although its AUC says that it can tell the reviews apart. We go on with the best template on the validation rows.

# %%
template = TEMPLATES[max(range(len(TEMPLATES)), key=lambda number: chosen_on[number][0])]                # of zero-shot, and of all training below
found = {"zero-shot": scores_of(model, test, template)}


def shown(name, scores):
    right, area, says = judged(scores, test)
    return [name, f"{right:.1%} ± {standard_error(right, len(test)):.1%}", f"{area:.3f}", f"{says:.0%}"]


print(f"the template: {template!r}")
spread = max(right for right, _, _ in chosen_on) - min(right for right, _, _ in chosen_on)
print(f"between the best and the worst template: {spread:.0%} points of accuracy")
tables.Table(["", "right (± standard error)", "AUC", "says positive"], [shown("zero-shot, the test rows", found["zero-shot"])])

# %% [markdown]
# ## Exercise 2. The area under the curve (**, 8 minutes)
#
# `margins` [n] is log P(positive) − log P(negative), `labels` [n] is 1 for positive. Return the share of all pairs of a positive and a
# negative row in which the positive one has the larger margin; equal margins count half.

# %% tags=["exercise"]
def auc(margins, labels):
    ...  # your code


check.auc(auc)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `margins[labels == 1][:, None]` beside `margins[labels == 0][None]`: comparing the two gives a table of all pairs.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Compare each positive row with each negative one; one point for larger, half for equal; the mean.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def auc(margins, labels):
    ones, zeros = margins[labels == 1][:, None], margins[labels == 0][None]
    return ((ones > zeros).double() + 0.5 * (ones == zeros)).mean().item()


check.auc(auc)

# %% [markdown]
# ## 3. Few-shot: show examples
#
# "In-context learning may not work for smaller models", says the lecture [A11]. We put four reviews with their answers before the
# question, in three draws of examples, for the three best templates, still on the validation rows. (The examples are the same for all
# questions, so the lab reads them once, and keeps what the model makes of them as a prefix: notebook 04, section 10.)

# %%
SHOTS, DRAWS = 4, pick(3, 2)
BEST = sorted(range(len(TEMPLATES)), key=lambda number: -chosen_on[number][0])[: pick(3, 2)]


def draw(count, seed):
    """So many training rows, half of them positive, in an order of chance."""
    chance = random.Random(f"draw {seed}")
    rows = [train_rows[2 * pair + side] for pair in chance.sample(range(len(train_rows) // 2), count // 2) for side in (0, 1)]
    return chance.sample(rows, len(rows))


def examples_text(rows, template):
    return "".join(data.filled(template, row) + ANSWERS[row["label"]] + "\n\n" for row in rows)


def few_shot(examples, rows, template):
    text = examples_text(examples, template)
    length = len(tokenizer.encode(text, add_special_tokens=False))
    reader = ptl.inject(model, length, method="prefix", init="text", text=text, tokenizer=tokenizer)
    return scores_of(reader, rows, template)


few = {(number, seed): few_shot(draw(SHOTS, seed), validation, TEMPLATES[number]) for number in BEST for seed in range(DRAWS)}
shares = {place: judged(scores, validation)[0] for place, scores in few.items()}
figures.heatmap([[chosen_on[number][0], *(shares[number, seed] for seed in range(DRAWS))] for number in BEST],
                [repr(TEMPLATES[number])[1:-1][-38:] for number in BEST], ["no example", *(f"draw {seed + 1}" for seed in range(DRAWS))], form=".1%",
                title=f"Right on the validation rows, with {SHOTS} examples and without")  # fmt: skip

# %% [markdown]
# More than chance? Both ways had the same rows, so we look at each row: $+1$ where it has become right, $-1$ where it has become wrong, $0$
# where nothing changed. The mean of these is the difference of the accuracies, and its standard error is smaller than that of two separate
# exams.

# %%
def on_rotten_tomatoes(claim, truth):
    """A claim about the real model on these rows; on others it is told, and not demanded."""
    if parts.source.startswith("rotten"):
        holds(claim, truth, real_only=True)
    else:
        told(claim, truth)


def gained(new, old, rows):
    """By how much the accuracy of one way is above that of another on the same rows, and the standard error of that."""
    labels = torch.tensor([row["label"] for row in rows])
    changes = (new.argmax(1) == labels).double() - (old.argmax(1) == labels).double()
    return changes.mean().item(), changes.std().item() / math.sqrt(len(rows))


effects = {place: gained(scores, plain[place[0]], validation) for place, scores in few.items()}
harm = [place for place, (gain, error) in effects.items() if gain < -2 * error]
help_ = [place for place, (gain, error) in effects.items() if gain > 2 * error]
print(f"of {len(effects)} draws {len(harm)} do harm and {len(help_)} help, by more than two standard errors")
print(f"with examples: from {min(shares.values()):.1%} to {max(shares.values()):.1%} right; "
      f"{statistics.mean(gain for gain, _ in effects.values()):+.1%} on average")  # fmt: skip
told("[A11] examples may not work for this small model: some draws do harm", harm)

# %%
worst = min(shares, key=lambda place: shares[place] - chosen_on[place[0]][0])
pair = {"no example": scores_of(model, validation, TEMPLATES[worst[0]]), f"{SHOTS} examples, draw {worst[1] + 1}": few[worst]}
labels = torch.tensor([row["label"] for row in validation])
for axes, (name, scores) in zip(figures.panels(2), pair.items(), strict=True):
    for label, colour in ((0, figures.ORANGE), (1, figures.BLUE)):
        axes.hist((scores[:, 1] - scores[:, 0])[labels == label].tolist(), bins=20, alpha=0.6, color=colour, label=movie_reviews.LABELS[label])
    axes.axvline(0, color="black", linewidth=1)
    share, area, _ = judged(scores, validation)
    axes.set(xlabel="log P(positive) − log P(negative)", title=f"{name}: {share:.0%} right, AUC {area:.2f}")
    axes.legend(fontsize="small")

# %% [markdown]
# That is the draw which did most harm. As far as the two hills are apart, the model can tell the reviews, which is what the AUC says; but
# the examples can push them *all* to one side of the line. Zhao et al. 2021 ([arXiv:2102.09690](https://arxiv.org/abs/2102.09690), section 4)
# find three such leans: to the label that most of the examples have, to that of the last one, and to the word that is common anyway.
#
# ## Exercise 3. Take the lean away (**, 6 minutes)
#
# The remedy of that paper (section 5): ask with an empty review, and see what the words before it do by themselves. `scores` [rows, 2]
# and `blank` [2] are log-probabilities. Return the scores without the lean.

# %% tags=["exercise"]
def calibrated(scores, blank):
    ...  # your code


check.calibrated(calibrated)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Divide each probability by that of the blank. What is that for logarithms?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# `scores - blank`: how much likelier the word became by the review.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def calibrated(scores, blank):
    return scores - blank


check.calibrated(calibrated)

# %%
(asked_right, asked_area, _), (worst_right, worst_area, _) = (judged(scores, validation) for scores in pair.values())
print(f"the worst draw costs {asked_right - worst_right:.1%} of the answers, and {asked_area - worst_area:.3f} of the AUC")
told("in the worst draw the model still tells the reviews apart: it has lost less in AUC than in answers",
     asked_area - worst_area < asked_right - worst_right)  # fmt: skip
their, examples = TEMPLATES[worst[0]], draw(SHOTS, worst[1])
BLANKS = [{"text": "N/A"}, {"text": "[MASK]"}, {"text": " "}]                            # those of the paper
by_blanks = calibrated(few[worst], few_shot(examples, BLANKS, their).mean(0))

# %% [markdown]
# How well that works depends on how much an empty review is like a real one: the lean may be gone, or be there still, or turned over.
# Real reviews *without* their labels are a better measure, if we know that half of them are positive: then the line goes through the
# middle of them.

# %%
unlabelled = few_shot(examples, draw(pick(60, 8), seed="unlabelled"), their)
middle = (unlabelled[:, 1] - unlabelled[:, 0]).median()
moved = torch.stack([few[worst][:, 0] + middle, few[worst][:, 1]], 1)
repairs = {"no example": pair["no example"], "the worst draw": few[worst], "calibrated by blanks": by_blanks, "the line in the middle": moved}
ways = {name: judged(scores, validation) for name, scores in repairs.items()}
gain, error = gained(moved, few[worst], validation)
told(f"it was the lean: with the line in the middle the worst draw is better, {gain:+.1%} ± {error:.1%}", gain > 2 * error)
tables.Table(["", "right", "AUC", "says positive"],
             [[name, f"{share:.1%}", f"{area:.3f}", f"{says:.0%}"] for name, (share, area, says) in ways.items()])  # fmt: skip

# %% [markdown]
# Now the test rows, with the template whose draws are best on the validation rows:

# %%
few_template = TEMPLATES[max(BEST, key=lambda number: sum(shares[number, seed] for seed in range(DRAWS)))]
tested = [few_shot(draw(SHOTS, seed), test, few_template) for seed in range(DRAWS)]
few_right = [judged(scores, test)[0] for scores in tested]
found["few-shot"] = tested[0]
tables.Table(["", "right (± standard error)", "AUC", "says positive"],
             [shown("zero-shot", found["zero-shot"]),
              *(shown(f"{SHOTS} examples, draw {seed + 1}", scores) for seed, scores in enumerate(tested))])  # fmt: skip

# %% [markdown]
# ## 4. Train: a prompt, LoRA, all weights
#
# Now from labelled rows. As text, a row is the filled template and the answer behind it; the answer alone is learned.
#
# ## Exercise 4. What is learned of a row (**, 5 minutes)
#
# From the ids of the filled template and of the answer to `input_ids` and `labels`.

# %% tags=["exercise"]
def verbalized(prompt_ids, answer_ids):
    ...  # your code: return input_ids, labels


check.verbalized(verbalized)

# %% [markdown]
# <details><summary>Hint</summary>
#
# $-100$ is the label that the loss leaves out. The model compares what stands at a place with its prediction one place before, so nothing
# has to be moved.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Both lists one after the other; $-100$ for each id of the template, then the ids of the answer.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def verbalized(prompt_ids, answer_ids):
    return prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids


check.verbalized(verbalized)

# %% [markdown]
# Three methods, the same rows, one pass over them, and for each the learning rate that the long study of section 9 chose on validation rows.
# Beside the test rows we measure something else: the **perplexity** on texts that have nothing to do
# with movies, before and after. That is where forgetting shows (section 5).

# %%
LEARN = draw(min(pick(600, 8), len(train_rows) // 2 * 2), seed=0)
OTHER = {"product reviews": data.load("reviews")[1][: pick(24, 2)], "instructions": data.load("instructions")[1][: pick(24, 2)]}
INSTRUCTION = "Is this movie review positive or negative? Answer positive if the critic likes the film."


def perplexities(model):
    return [training.perplexity(model, rows, tokenizer, precision=PRECISION, progress=False) for rows in OTHER.values()]


def teach(model, rate, rows=LEARN):
    steps = math.ceil(len(rows) / 8)
    config = {"epochs": 1, "micro_batch_size": 8, "learning_rate": rate, "warmup_steps": steps // 16, "precision": PRECISION, "progress": False}
    return training.fit(model, data.verbalize(rows, tokenizer, template, ANSWERS, end=False), config)


def bytes_of(save, model, folder):
    save(model, folder)
    return sum(path.stat().st_size for path in Path(folder).glob("*model.safetensors"))


forgotten, trained, on_disk, seconds = {"untuned": perplexities(model)}, {}, {}, {}


def account(name, model, save, result):
    """What became of it: test scores, other texts, parameters, bytes, seconds."""
    found[name], forgotten[name], seconds[name] = scores_of(model, test, template), perplexities(model), result.seconds
    trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    on_disk[name] = bytes_of(save, model, f"tasks/{name}")


# %%
VIRTUAL = pick(20, 32)
prompted = ptl.inject(models.load()[0], VIRTUAL, init="text", text=INSTRUCTION, tokenizer=tokenizer, task="film", seed=0)
result = teach(prompted, ptl.learning_rate(prompted, 0.03))
account("prompt", prompted, ptl.save, result)
ptl.use(prompted, None)
prompt_off = perplexities(prompted)

torch.manual_seed(0)
adapted = lora_lab.inject(models.load()[0], rank=8)
result = teach(adapted, 1e-3)
account("LoRA", adapted, lora_lab.save, result)
with lora_lab.disabled(adapted):
    lora_off = perplexities(adapted)

full = models.load(torch.float32)[0].requires_grad_(True)
result = teach(full, 1e-4)
account("full", full, lora_lab.models.save, result)
del full, prompted, adapted
gc.collect()

METHODS = ("prompt", "LoRA", "full")
draws = [judged(scores, test) for scores in tested]
few_row = [f"few-shot (± spread of {DRAWS} draws)", 0, f"{statistics.mean(few_right):.1%} ± {statistics.stdev(few_right):.1%}",
           *(form.format(statistics.mean(draw[place] for draw in draws)) for place, form in ((1, "{:.3f}"), (2, "{:.0%}"))), 0]  # fmt: skip
rows = {name: [name, trained.get(name, 0), *shown(name, found[name])[1:], round(seconds.get(name, 0))] for name in ("zero-shot", *METHODS)}
tables.Table(["", "trained", "right (± standard error)", "AUC", "says positive", "seconds"], [rows.pop("zero-shot"), few_row, *rows.values()])

# %%
right = {name: judged(scores, test)[0] for name, scores in found.items()}
right["few-shot"] = statistics.mean(few_right)
error = {name: standard_error(share, len(test)) for name, share in right.items()} | {"few-shot": statistics.stdev(few_right)}
figures.bars(right, x="right", spread=error, texts={name: f"  {share:.1%}" for name, share in right.items()},
             colours=[figures.SKY, figures.SKY, figures.ORANGE, figures.GREEN, figures.PURPLE],
             title=f"Five ways, {len(LEARN)} labelled rows for the last three (bars: standard errors; few-shot: spread)")  # fmt: skip

# %%
gains = {(name, other): gained(found[name], scores, test) for name in METHODS
         for other, scores in {"zero-shot": found["zero-shot"], "few-shot": tested[0]}.items()}  # fmt: skip
gains["LoRA", "full"] = gained(found["LoRA"], found["full"], test)
for (name, other), (gain, spread) in gains.items():
    print(f"{name} against {other}{', draw 1' * (other == 'few-shot')}: {100 * gain:+.1f} ± {100 * spread:.1f} points")
gain, spread = gains["LoRA", "zero-shot"]
on_rotten_tomatoes("LoRA is better than the best template by more than two standard errors", gain > 2 * spread)
told("... and better than the mean of the draws of examples", right["LoRA"] > right["few-shot"])

# %% [markdown]
# The lecture's Figure 1 [A18] says that prompt tuning beats prompt *design*, and reaches model tuning **as size increases**. Ours is a
# very small model, at the left end of that figure, where prompts are behind tuned models in the paper, too. One pass over these rows is
# short for all three; the long study of section 9 has more rows and passes. What becomes of it with size is for notebook 08.
#
# ## 5. What is forgotten
#
# "Fine-tuning can significantly increase the performance on a specific task, but can lead to reduction in ability on other tasks.
# Phenomenon called catastrophic forgetting", says the lecture [A9]; and of frozen weights: "less prone to catastrophic forgetting" [A13].
# Perplexity on other texts, before and after:

# %%
def changes(name):
    return [f"{after / before - 1:+.1%}" for before, after in zip(forgotten["untuned"], forgotten[name], strict=True)]


rows = [["untuned", *(f"{value:.1f}" for value in forgotten["untuned"]), "", ""]]
rows += [[name, *(f"{value:.1f}" for value in forgotten[name]), *changes(name)] for name in METHODS]
rows += [[f"{name}, switched off", *(f"{value:.1f}" for value in off), "", ""] for name, off in (("prompt", prompt_off), ("LoRA", lora_off))]
holds("[A13] frozen weights: switched off, prompt and LoRA give the untuned model's numbers exactly", prompt_off == lora_off == forgotten["untuned"])
tables.Table(["perplexity on", *OTHER, *(f"{name}: change" for name in OTHER)], rows)

# %% [markdown]
# Those were rates that had been chosen with care. All weights once more, at three times the rate, and on far fewer rows:

# %%
harsh = models.load(torch.float32)[0].requires_grad_(True)
teach(harsh, 3e-4, LEARN[: pick(160, 8)])
forgotten["full, 3 × the rate"], harsh_right = perplexities(harsh), judged(scores_of(harsh, test, template), test)[0]
del harsh
gc.collect()
print(f"other texts: {', '.join(changes('full, 3 × the rate'))}; the task: {harsh_right:.1%} right")
gain, spread = gains["full", "zero-shot"]
on_rotten_tomatoes("[A9] tuning raises the task it is for, by more than two standard errors", gain > 2 * spread)
on_rotten_tomatoes("[A9] and can lower others: product reviews have become less likely by more than a fifth",
                   forgotten["full, 3 × the rate"][0] > 1.2 * forgotten["untuned"][0])  # fmt: skip
for axes, (place, name) in zip(figures.panels(2, height=2.6), enumerate(OTHER), strict=True):
    figures.bars({method: values[place] for method, values in forgotten.items()}, x=f"perplexity on {name}", axes=axes,
                 colours=[figures.SKY, figures.ORANGE, figures.GREEN, figures.PURPLE, figures.RED], title="Lower is better")  # fmt: skip

# %% [markdown]
# Read it with care. With its adapter or prompt *on*, a model is a specialist whatever way it became one: LoRA's frozen weights do not
# save it from speaking like one, and at LoRA's higher learning rate it may well do so more. What frozen weights give is the way back:
# switched off, the old model is there, exactly, and all other tasks have it. A fully tuned model has no such switch.
#
# ## 6. How many examples does it take?
#
# The lecture: "500-1000 examples needed to fine-tune a single task" [A12], and about 100 to 1,000 for parameter-efficient methods [A23].
# We measure it where it is cheap, on the small encoder all-MiniLM: a linear head on the mean of its hidden states. The head begins as the
# **linear probe**, a logistic regression on what the frozen encoder makes of the same rows; it is also the baseline. Then a soft prompt,
# LoRA, and all weights, the head training along.

# %%
SIZES = [n for n in pick((50, 200, 500, 1000, 5000), (8, 16)) if n <= len(train_rows)]
EPOCHS = {50: 4, 200: 3, 500: 2, 1000: 2, 5000: 1}                                       # passes over the rows
SEEDS = {50: (0, 1, 2), 200: (0, 1, 2)}                                                  # other rows for each; the long runs have one
encoder, words = models.load_encoder()
POOLING = replace(pooling_of(encoder), normalize=False)
features = {}


def features_of(rows):
    """What the frozen encoder makes of each row, [rows, width]; each text is read once."""
    if new := [row["text"] for row in rows if row["text"] not in features]:
        features.update(zip(new, embed(encoder, words, new, pooling=POOLING), strict=True))
    return torch.stack([features[row["text"]] for row in rows])


def probe(rows):
    return linear_probe(features_of(rows), torch.tensor([row["label"] for row in rows]), 2)


# %% [markdown]
# Each method gets a fresh encoder with that head, and its own learning rate, higher than the long study's, as these runs are short. What a
# frozen encoder is stored in, the precision of the run decides.

# %%
FROZEN = torch.bfloat16 if PRECISION == "bf16-mixed" else torch.float32


def with_head(rows, dtype):
    return with_pooled_head(models.load_encoder(dtype)[0], probe(rows))


def class_prompt(rows, seed):
    base = with_head(rows, FROZEN)
    prompted = ptl.inject(base, 20, init="vocab", tokenizer=words, seed=seed)
    base.classifier.requires_grad_(True)
    return prompted, ptl.learning_rate(prompted)


def class_lora(rows, seed):
    torch.manual_seed(seed)
    return lora_lab.inject(with_head(rows, FROZEN), rank=8, modules_to_save=["classifier"]), 2e-3


def class_full(rows, seed):
    return with_head(rows, torch.float32).requires_grad_(True), 1e-4


MAKE = {"prompt": class_prompt, "LoRA": class_lora, "full": class_full}


# %%
def accuracy_of(logits):
    return (logits.argmax(1) == truth).double().mean().item()


def fitted(make, rows, seed, epochs, **more):
    model, rate = make(rows, seed)
    steps = math.ceil(len(rows) / 8) * epochs
    config = {"epochs": epochs, "micro_batch_size": 8, "learning_rate": rate, "warmup_steps": steps // 16, "precision": PRECISION, "seed": seed,
              "progress": False} | more.pop("config", {})  # fmt: skip
    return model, training.fit(model, rows, config, tokenizer=words, **more)


def learned(make, count, seed):
    model, _ = fitted(make, draw(count, seed), seed, EPOCHS.get(count, 1))
    return accuracy_of(class_logits(model, test, words, precision=PRECISION, progress=False))


# %%
needs = {name: {} for name in ("linear probe", *MAKE)}
for count in SIZES:
    seeds = SEEDS.get(count, (0,))
    needs["linear probe"][count] = [accuracy_of(probe(draw(count, seed))(features_of(test))) for seed in seeds]
    for name, make in MAKE.items():
        needs[name][count] = [learned(make, count, seed) for seed in seeds]

lines = {}
for name, measured in needs.items():
    means = [statistics.mean(shares) for shares in measured.values()]
    spreads = [statistics.stdev(shares) if len(shares) > 1 else standard_error(shares[0], len(test)) for shares in measured.values()]
    lines[name] = (SIZES, means, spreads)
(axes,) = figures.panels(1, height=3.8)
axes.axhline(right["zero-shot"], color="black", linewidth=0.8, linestyle="--", label="SmolLM2, only asked")
figures.curves(lines, x="labelled rows", y="right on the test rows", log="x", dots=True, axes=axes,
               title="How many examples does it take? (all-MiniLM)")  # fmt: skip
_ = axes.set_xticks(SIZES, [f"{count:,}" for count in SIZES])

# %%
mean = {name: {count: statistics.mean(shares) for count, shares in measured.items()} for name, measured in needs.items()}
first, most = SIZES[0], SIZES[-1]
on_rotten_tomatoes(f"from {first} rows to {most:,}, LoRA and full fine-tuning gain at least five points",
                   all(mean[name][most] - mean[name][first] > 0.05 for name in ("LoRA", "full")))  # fmt: skip
print(f"of what {most:,} rows bring above {first}, there is")
for name, by_count in mean.items():
    reached = {count: (by_count[count] - by_count[first]) / (by_count[most] - by_count[first] or 1) for count in SIZES[1:-1]}
    print(f"  {name}: " + ", ".join(f"{share:.0%} with {count:,}" for count, share in reached.items()))
enough = [count for count in (500, 1000) if count in SIZES and all(mean[name][most] - mean[name][count] < 0.02 for name in ("LoRA", "full"))]
told("[A12, A23] 500 to 1,000 examples are enough: LoRA and full fine-tuning come within two points of what the most rows give", enough)


def with_spread(shares):
    return f"{statistics.mean(shares):.1%}" + (f" ± {statistics.stdev(shares):.1%}" if len(shares) > 1 else "")


tables.Table(["", *(f"{count:,} rows" for count in SIZES)], [[name, *map(with_spread, measured.values())] for name, measured in needs.items()])

# %% [markdown]
# (The spread of the short runs is over three draws of the rows, the error bars of the long ones are standard errors of the test rows.)
#
# ### Too long on too little: overfitting
#
# The other thing that the lecture names is overfitting [A12]. All weights, 200 rows, many passes; after each pass the loss on the
# validation rows:

# %%
PASSES = pick(8, 2)
small = draw(min(pick(200, 8), len(train_rows) // 2 * 2), seed=0)
watch = {"eval_every": math.ceil(len(small) / 8), "schedule": "constant"}
_, result = fitted(class_full, small, 0, PASSES, eval_data=validation, config=watch)
per_pass = [statistics.mean(result.losses[i : i + watch["eval_every"]]) for i in range(0, len(result.losses), watch["eval_every"])]
figures.curves({"training": (range(1, len(per_pass) + 1), per_pass), "validation": (range(len(result.eval_losses)), result.eval_losses)},
               x="passes over the rows", y="loss", dots=True, title=f"{len(small)} rows, all weights: the training loss goes to nothing")  # fmt: skip

# %%
best_pass = min(range(len(result.eval_losses)), key=result.eval_losses.__getitem__)
print(f"validation loss: {result.eval_losses[0]:.3f} before, {result.eval_losses[best_pass]:.3f} at its best, after pass {best_pass}, "
      f"{result.eval_losses[-1]:.3f} at the end")  # fmt: skip
still_falls, rises = per_pass[-1] < per_pass[max(best_pass - 1, 0)], result.eval_losses[-1] > result.eval_losses[best_pass]
holds("overfitting: the training loss still falls when the validation loss has begun to rise", still_falls and rises, real_only=True)

# %% [markdown]
# That is what a validation split is for: `fit(..., early_stopping=..., keep_best=True)` ends with the weights of the best pass.
#
# ## 7. What a task takes on disk
#
# "Full fine-tuning creates a full copy of the original LLM per task", says the lecture [A13]. **Predicted** from the number of
# parameters, four bytes each, and **measured** in the files of section 4:

# %%
tables.predicted_measured({name: (4 * trained[name], on_disk[name]) for name in METHODS}, unit="kB", bytes_per_unit=1e3)

# %%
on_disk["few-shot"] = len(examples_text(draw(SHOTS, 0), few_template).encode())
figures.bars({name: on_disk[name] for name in ("full", "LoRA", "prompt", "few-shot")}, x="bytes for each task (logarithmic)", log=True,
             texts={name: f"  {on_disk[name] / 1e3:,.1f} kB" for name in on_disk}, title="What a task takes on disk")  # fmt: skip
holds("[A13] a copy for each task with full fine-tuning, and little with the others",
      on_disk["full"] > 20 * on_disk["LoRA"] > 20 * on_disk["prompt"], real_only=True)  # fmt: skip

# %% [markdown]
# ## 8. What a request takes
#
# The examples of few-shot are cheap on disk, and they are read again with every request. "Examples take up space in the context window",
# and "larger prompts lead to slow inferencing", says the lecture [A10]. The tokens of a request, the keys and values that the model keeps
# of them (predicted and measured), and the time to read them:

# %%
def tokens(text):
    return len(tokenizer.encode(text, add_special_tokens=False))


question = statistics.mean(tokens(data.filled(template, row)) for row in test)
shot = tokens(examples_text(draw(16, 0), template)) / 16
requests = {"only asked, or LoRA, or full": round(question), f"a prompt of {VIRTUAL}": round(question) + VIRTUAL,
            f"{SHOTS} examples": round(question + SHOTS * shot), "16 examples": round(question + 16 * shot)}  # fmt: skip


@torch.no_grad()
def read(count):
    """(seconds, bytes of keys and values) of reading so many tokens; the median of several times."""
    ids, times = torch.randint(100, 1000, (1, count), generator=torch.Generator().manual_seed(0)), []
    for _ in range(pick(5, 2)):
        begun = time.perf_counter()
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        times.append(time.perf_counter() - begun)
    return statistics.median(times), sum(part.nbytes for layer in cache for part in layer)


read(8)
measured = {name: read(count) for name, count in requests.items()}
item = next(model.parameters()).element_size()
predicted = {name: memory_math.kv_cache_bytes(models.name(), count, bytes_per_element=item) for name, count in requests.items()}
holds("keys and values: predicted to the byte", all(predicted[name] == measured[name][1] for name in requests))
times = [measured[name][0] for name in requests]
holds("[A10] larger prompts are slower, 16 examples more than none", times[-1] > times[0], real_only=True)
tables.Table(["a request", "tokens", "keys and values, kB", "time to read, ms", "as many times as long"],
             [[name, count, round(measured[name][1] / 1e3), round(1e3 * measured[name][0], 1), f"{measured[name][0] / times[0]:.1f}"]
              for name, count in requests.items()])  # fmt: skip

# %% [markdown]
# All examples are read again with every request; unless they are read *once*, and their keys and values are kept, as we did in section 3. That
# takes the time away, though neither the memory nor the room in the window:

# %%
shots_text = examples_text(draw(SHOTS, 0), template)
kept = ptl.inject(model, tokens(shots_text), method="prefix", init="text", text=shots_text, tokenizer=tokenizer)


@torch.no_grad()
def seconds_of(reader, count):
    """Of reading so many tokens behind what the reader keeps; the median of several times."""
    ids, times = torch.randint(100, 1000, (1, count), generator=torch.Generator().manual_seed(0)), []
    for _ in range(pick(7, 2)):
        begun = time.perf_counter()
        reader(input_ids=ids, use_cache=False, logits_to_keep=1)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


shot_tokens = requests[f"{SHOTS} examples"]
a_request = {f"{SHOTS} examples, read each time": seconds_of(model, shot_tokens), f"{SHOTS} examples, kept": seconds_of(kept, round(question)),
             "LoRA, merged": seconds_of(model, round(question))}  # fmt: skip
kept = None
counts = [round(10 ** (power / 4)) for power in range(17)]
figures.curves({name: (counts, [(seconds["LoRA"] if "LoRA" in name else 0) + count * each for count in counts]) for name, each in a_request.items()},
               x="requests", y="seconds, tuning included", log="xy", title="Paid once, or with every request")  # fmt: skip

# %% [markdown]
# The lecture points at Llama-2-70B-Chat [A10]. `memory_math` does the arithmetic: the same reviews with four examples, or a tuned model
# that needs none, on four A100 at \$2.50 an hour; the tuning reads what ours of section 4 read.

# %%
learned_tokens = sum(len(row["input_ids"]) for row in data.verbalize(LEARN, tokenizer, template, ANSWERS, end=False))
llama = memory_math.in_context("llama-2-70b-chat", shots=SHOTS, tokens_per_shot=round(shot), question_tokens=round(question), answer_tokens=1,
                               gpu="A100-80GB", gpus=4, mfu=0.4, price=2.5, tuning_tokens=learned_tokens)  # fmt: skip
print(llama)

# %% [markdown]
# ## Exercise 5. When has tuning paid off? (*, 4 minutes)
#
# From the seconds of the tuning, of a request with examples and of a request to the tuned model, to the number of requests after which
# tuning has cost no more.

# %% tags=["exercise"]
def break_even(tuning, few_shot, tuned):
    ...  # your code


check.break_even(break_even)

# %% [markdown]
# <details><summary>Hint</summary>
#
# What does one request save? A third of a request is none: `math.ceil`.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# The tuning divided by the difference of the two, rounded up.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def break_even(tuning, few_shot, tuned):
    return math.ceil(tuning / (few_shot - tuned))


check.break_even(break_even)

# %%
merged = a_request.pop("LoRA, merged")
print(f"here LoRA took {seconds['LoRA']:.0f} s, and has paid off, by time alone, against")
for name, each in a_request.items():
    print(f"  {name}: " + (f"after {break_even(seconds['LoRA'], each, merged):,} requests" if each > merged else "never"))
print(f"Llama-2-70B-Chat on four A100: after {llama.break_even_requests:,} requests against examples that are read each time")
print(f"right on the test rows: LoRA {right['LoRA']:.1%}, {SHOTS} examples {right['few-shot']:.1%} on average")

# %% [markdown]
# That only counts the time. Which of the two is right more often, the last line says for these few training rows, and the long study for more:
#
# ## 9. The long study
#
# One seed and one pass are a first look. `benchmarks/sentiment.py` takes hours: each method's learning rate chosen on validation rows,
# three seeds, 2,000 rows, all 1,066 test rows, looked at once. If it has been run on this machine, here is its table (`python
# benchmarks/sentiment.py`; `--table` prints it):

# %%
study = {name: movie_reviews.study(name) for name in ("smollm2-135m-instruct-q4", "all-minilm-l6-v2")}
print({name: f"{len(lines) - 1} methods" if lines else "not run yet: python benchmarks/sentiment.py" for name, lines in study.items()})
lines = study["smollm2-135m-instruct-q4"] or [["SmolLM2-135M: not run yet"]]
tables.Table(lines[0], lines[1:])

# %%
lines = study["all-minilm-l6-v2"] or [["all-MiniLM: not run yet"]]
tables.Table(lines[0], lines[1:])

# %% [markdown]
# ## 10. Before and after
#
# The opinions of section 1 once more, which no method has seen: what the model made of them when it was only asked, and with LoRA, from the
# file that section 4 left.

# %%
def leans(scores):
    share = (scores[:, 1] - scores[:, 0]).sigmoid().tolist()
    return [f"{movie_reviews.LABELS[value > 0.5]}, {max(value, 1 - value):.0%}" for value in share]


before = leans(scores_of(model, sentences, template))
tuned = lora_lab.load(models.load()[0], "tasks/LoRA")
after = leans(scores_of(tuned, sentences, template))
answers = zip(sentences, before, after, strict=True)
tables.Table(["opinion", "is", "before", "after"], [[row["text"], movie_reviews.LABELS[row["label"]], old, new] for row, old, new in answers])

# %% [markdown]
# ## Takeaways
#
# - A language model is a classifier as soon as you compare two words; which words stand before them matters as much as the method.
# - Accuracy alone misleads: a model may know (AUC) and lean to one answer all the same. Examples in the prompt can make a small model
#   lean more.
# - Give every accuracy its standard error, compare two ways row by row, choose on validation rows, and look at the test rows once.
# - In the long study LoRA gets what full fine-tuning gets, at a small part of the bytes, and a prompt a little less, at a small part of LoRA's.
# - Whatever trains, other texts can pay for it, and a careless rate makes them pay much. Frozen weights make it possible to go back.
# - Examples that are read with every request are paid for with every request; tuning is paid for once.
#
# ## Three questions
#
# 1. A template is right for 50 % of balanced rows, with an AUC of 0.8. What is wrong, and what would you do?
#
#    <details><summary>Answer</summary>
#
#    It gives nearly one answer to all: label bias. It ranks the rows well, so move the line: subtract what an empty text scores, or
#    choose another template on validation rows.
#    </details>
# 2. You compare ten learning rates on the test rows and report the best. Why is that number too good?
#
#    <details><summary>Answer</summary>
#
#    Each of the ten has its error of a few points, and the best of ten is the one with the luckiest. Choose on validation rows, then read
#    the test rows once.
#    </details>
# 3. Ten thousand requests a day, four examples in each. What are three reasons to tune instead, and one not to?
#
#    <details><summary>Answer</summary>
#
#    It is cheaper after a number of requests that you can compute (exercise 5), it leaves the context window free, and with enough rows it
#    is right more often. One not to: the task changes every day, or there are no labelled rows.
#    </details>
