# %% [markdown]
# # 06 · Dialogue summarisation
#
# > Teach a small model to say in two sentences what was said in twelve lines, and find out what it gets right: by a score, a count and your own eyes.
#
# **What you will learn**
#
# - to compute ROUGE by hand, and to fool it
# - which baselines a summary has to beat: copying everything, the first and the last lines, the untuned model
# - to train LoRA on 128 dialogues, and to put before and after beside each other
# - to count the facts that are missing and those that are invented, which no score does for you
# - what greedy writing, sampling and a repetition penalty change, and what carries over to real data and to an encoder-decoder
#
# **Time:** about 8 minutes on 2 cores with the real model. Offline once the model is fetched.
#
# The lecture names three tasks to implement, and this is the second: *dialogue summarisation* [A20]. It is a harder test than sentiment: the answer
# is a text, there are many right ones, and no two people would write the same.

# %%
import re
import statistics
from collections import Counter

import torch

import lora_lab
import memory_math
from course import figures, holds, models, pick, real_data, tables, told
from course.checks import dialogue_summarisation as check
from lora_lab import data, training
from lora_lab.training.evaluation import clean_endings, write

torch.manual_seed(0)
PRECISION = models.precision()
print(f"precision {PRECISION}, {torch.get_num_threads()} threads, torch {torch.__version__}")

# %% [markdown]
# ## 1. The data
#
# Dialogues, each with a summary by a person, who also noted two to four **facts**: words that a summary had better say. They were written for this
# course; DialogSum and SAMSum have the same two fields. The last training dialogues are set apart as a **validation** part, on which the wording and
# the way of writing are chosen. The held-out ones are for the final numbers.

# %%
rows, held_out = data.load("dialogues")
train, validation = rows[:-16], rows[-16:]
print(f"{len(train)} dialogues to train on, {len(validation)} to choose with, {len(held_out)} held out")
tables.Table(["field", "of a held-out row"], [[field, str(held_out[0][field])] for field in ("dialogue", "summary", "facts")])

# %%
def speakers(rows):
    return {line.split(":")[0] for row in rows for line in row["dialogue"].splitlines()}


length = {field: statistics.mean(len(row[field].split()) for row in rows) for field in ("dialogue", "summary")}
print(f"a dialogue has {length['dialogue']:.0f} words on average, a summary {length['summary']:.0f}")
holds("nobody who speaks in a held-out dialogue was heard in training", not speakers(rows) & speakers(held_out))

# %% [markdown]
# ## 2. ROUGE, by hand
#
# How good is a summary? ROUGE (Lin 2004, [aclanthology.org/W04-1013](https://aclanthology.org/W04-1013)) asks how much it shares with one that a
# person wrote, the **reference**. Three versions are in use:
#
# - **ROUGE-1** counts words that both have, **ROUGE-2** pairs of neighbouring words, ROUGE-N runs of $n$ words (section 2);
# - **ROUGE-L** takes the *longest common subsequence*: the same words in the same order, with gaps (section 3).
#
# Each gives two shares. Of $c$ common runs, an answer with $a$ runs and a reference with $r$ has
#
# $$P = \frac{c}{a} \quad\text{(precision)}, \qquad R = \frac{c}{r} \quad\text{(recall)}, \qquad F_1 = \frac{2 P R}{P + R}.$$
#
# Words are runs of letters and digits, capitals or not:

# %%
def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


words("The cat's 2 toys!")

# %% [markdown]
# ## Exercise 1. ROUGE-N (**, 10 minutes)
#
# Return precision, recall and F1 of two texts for runs of `n` words. A run that the answer has three times and the reference once is common *once*.
# What is common to nothing gets 0.

# %% tags=["exercise"]
def rouge_n(answer, reference, n):
    ...  # your code: return precision, recall, f1


check.rouge_n(rouge_n)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `zip(found, found[1:])` gives the pairs of a list, `zip(*(found[i:] for i in range(n)))` its runs of n. `collections.Counter` counts them, and
# `(left & right).total()` is how many two Counters share.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Two Counters of runs. What is common is the sum of the smaller counts. Divide by the runs of each side, and take care of zeros.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def rouge_n(answer, reference, n):
    ours, theirs = (Counter(zip(*(words(text)[i:] for i in range(n)), strict=False)) for text in (answer, reference))
    return shares((ours & theirs).total(), ours.total(), theirs.total())


def shares(common, answer, reference):
    """Precision, recall, F1."""
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / answer, common / reference
    return precision, recall, 2 * precision * recall / (precision + recall)


check.rouge_n(rouge_n)

# %% [markdown]
# ## Exercise 2. The longest common subsequence (***, 15 minutes)
#
# Return its length for two lists of words. The idea is a table: `table[i][j]` is the answer for the first `i` words of one and the first `j` of the
# other, and each entry follows from its neighbours. What if the two last words are equal? What if they are not?

# %% tags=["exercise"]
def lcs(left, right):
    ...  # your code


check.lcs(lcs)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Equal last words: one more than without both of them, `table[i - 1][j - 1] + 1`. Otherwise one of the two is of no use: the larger of `table[i -
# 1][j]` and `table[i][j - 1]`.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# A table with a row and a column of zeros, filled row by row; the last entry is the answer. Two rows are enough, since each needs only the one
# above.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def lcs(left, right):
    above = [0] * (len(right) + 1)
    for word in left:
        row = [0]
        for j, other in enumerate(right):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


check.lcs(lcs)

# %% [markdown]
# The table itself, for the example of the paper (section 3.1). It grows by one wherever two words agree, and the last corner is the length:

# %%
left, right = words("Police killed the gunman"), words("The gunman police killed")
table = [[lcs(left[:i], right[:j]) for j in range(1, len(right) + 1)] for i in range(1, len(left) + 1)]
figures.heatmap(table, left, right, form="d", title=f"Length of the longest common subsequence so far: {table[-1][-1]} at the end")

# %% [markdown]
# Is it the ROUGE that papers report? The lab's gives the numbers of Google's `rouge-score` package. (Many papers cut words to their stems first,
# `stem=True` in the lab, which gives a point or so more: numbers compare with their own kind only.) Ours, on every held-out dialogue against its
# summary:

# %%
def rouge_by_hand(answer, reference):
    ours, theirs = words(answer), words(reference)
    return [rouge_n(answer, reference, 1), rouge_n(answer, reference, 2), shares(lcs(ours, theirs), len(ours), len(theirs))]


KINDS = ("rouge1", "rouge2", "rougeL")
gaps = []
for row in held_out:
    lab = training.rouge([row["dialogue"]], [row["summary"]], kinds=KINDS)
    hand = rouge_by_hand(row["dialogue"], row["summary"])
    gaps += [abs(mine - theirs) for kind, three in zip(KINDS, hand, strict=True)
             for mine, theirs in zip(three, vars(lab[kind]).values(), strict=True)]  # fmt: skip
print(f"{len(gaps)} numbers, the largest gap is {max(gaps):.1g}")
holds("ROUGE by hand is the lab's ROUGE", max(gaps) < 1e-12)

# %% [markdown]
# ## 3. Baselines that need no model
#
# A score says nothing until you know what doing nothing gives. Two ways to *summarise* without reading: copy the whole dialogue, or its first two
# and last two lines.

# %%
def ends(row):
    lines = row["dialogue"].splitlines()
    return "\n".join([*lines[:2], *lines[-2:]])


summaries = {"the whole dialogue": [row["dialogue"] for row in held_out], "first two, last two lines": [ends(row) for row in held_out]}


def score(texts, rows, kind="rougeL"):
    return training.rouge(texts, [row["summary"] for row in rows], kinds=[kind])[kind]


sides = {name: score(texts, held_out) for name, texts in summaries.items()}
percent = {name: [f"{100 * part:.1f}" for part in vars(each).values()] for name, each in sides.items()}
tables.Table(["ROUGE-L of", "precision", "recall", "F1"], [[name, *three] for name, three in percent.items()])

# %%
copied, short = sides.values()
holds("whoever copies everything has the most recall and the least precision", copied.recall > short.recall and copied.precision < short.precision)

# %% [markdown]
# That is why F1 is reported: recall alone is won by copying, precision alone by writing one safe word. And mind the number for copying: anything
# near it is *no* evidence that a model has understood a dialogue.
#
# ## Exercise 3. Fool ROUGE (**, 10 minutes)
#
# Below is a dialogue with its summary and facts. Write two texts about it: a **false** one that ROUGE-L likes (0.8 or more), in which one of the four
# facts is another, and a **true** one, with all four facts in it, that it does not (0.35 or less).

# %%
fooled = check.FOOLED
tables.Table(["field", "of the row"], [[field, str(fooled[field])] for field in ("dialogue", "summary", "facts")])

# %% tags=["exercise"]
false_summary = ...  # your text
true_summary = ...  # your text


check.fool_rouge(false_summary, true_summary)

# %% [markdown]
# <details><summary>Hint</summary>
#
# For the false one copy the reference and change a day or a price. For the true one begin at the end of the story, and make nouns of the verbs.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# One wrong word costs one word of the whole summary. Other words in another order cost nearly everything, whatever they say.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
false_summary = fooled["summary"].replace("Friday", "Monday").replace("30", "80")
true_summary = (
    "30 less to pay, plus a case thrown in: so much for a pair of spectacles whose lenses sat on opposite sides, and which come home on Friday. "
    "Meanwhile Ferdinand reads with what he wore before, bent back into shape by Ayumi free of charge."
)


check.fool_rouge(false_summary, true_summary)

# %% [markdown]
# ## 4. Counting facts
#
# So we count what readers care about. A fact of the row that the summary does not say is **missing**. For that we need to know whether a text says
# something:
#
# ## Exercise 4. Does it say so? (*, 5 minutes)
#
# Whether the fact stands in the text, in whole words, capitals or not. *5 euros* is not said by *15 euros*.

# %% tags=["exercise"]
def says(text, fact):
    ...  # your code: True or False


check.says(says)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `re.escape(fact)` makes a pattern of any text. `(?<!\w)` before it means *no letter or digit stands before*, and `(?!\w)` behind it *none
# follows*.
# </details>
#
# <details><summary>Solution, in words</summary>
#
# Search for the escaped fact between the two conditions, with `re.IGNORECASE`, and return whether something was found.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def says(text, fact):
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) is not None


check.says(says)

# %% [markdown]
# A fact that the summary has and the dialogue has not is **wrong**. To see that in general one must understand both. Two kinds can be seen by code:
# **numbers** that nobody said, and **names** that nobody bears. *Twelve* and *12* are the same number; a capital at the beginning of a sentence
# makes no name of an ordinary word, which is one that stands in small letters somewhere in the bundled data.

# %%
SMALL = words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
NUMBERS = {**{word: value for value, word in enumerate(SMALL)}, **{word: 10 * value for value, word in enumerate(TENS, start=2)}}
EVERYTHING = " ".join(str(row) for name in ("dialogues", "instructions", "reviews", "sentiment") for part in data.load(name) for row in part)
ORDINARY = {*re.findall(r"\b[a-z]+\b", EVERYTHING)}


def numbers(text):
    """In digits. "one" alone is left out: it is seldom a number."""
    found, before = [], ""
    for word in re.findall(r"\d+(?:[.,:]\d+)*|[a-z]+", text.lower()):
        if NUMBERS.get(before, 0) >= 20 and 0 < NUMBERS.get(word, 0) < 10:
            found[-1] = str(NUMBERS[before] + NUMBERS[word])
        elif word[0].isdigit() or NUMBERS.get(word, 1) != 1:
            found.append(str(NUMBERS.get(word, word)))
        before = word
    return {*found}


def wrong(text, row):
    names = {name for name in re.findall(r"\b[A-Z][a-z]+\b", text) if name.lower() not in ORDINARY and not says(row["dialogue"], name)}
    return sorted(numbers(text) - numbers(row["dialogue"])) + sorted(names)


def missing(text, row):
    return [fact for fact in row["facts"] if not says(text, fact)]


print(numbers("Half past ten, 12.50, twenty-six, and one more"), wrong("Zora bought 3 spiders from Waldemar.", held_out[0]))

# %% [markdown]
# A count by code has to be counted itself. Does it raise false alarms, on summaries that are right? Does it raise true ones, on summaries of
# *another* dialogue?

# %%
right = [wrong(row["summary"], row) for row in held_out]
others = [wrong(other["summary"], row) for row, other in zip(held_out, [*held_out[1:], held_out[0]], strict=True)]
print(f"of {len(held_out)} right summaries {sum(map(bool, right))} raise an alarm, of as many of another dialogue {sum(map(bool, others))}")
print("false alarms:", [each for each in right if each])
holds("few false alarms: fewer than one right summary in ten", sum(map(bool, right)) < 0.1 * len(held_out))
holds("a summary of another dialogue is always noticed", all(others))
holds("the facts are in every right summary", not any(missing(row["summary"], row) for row in held_out))

# %% [markdown]
# The false alarms are sums that the writer did in her head (*two groups*, where the dialogue names both). What the count cannot see is who did what
# to whom: *Zora told Ignacio* and *Ignacio told Zora* have the same names. It is a lower bound on what is wrong.
#
# ## 5. The baseline that needs a model: ask it
#
# SmolLM2-135M-Instruct has read more dialogues than we ever shall. Let us ask for a summary, and be fair: three wordings, the best of which is
# chosen on the validation part.

# %%
ASK = "Summarize the following dialogue in one or two sentences."
WAYS = {
    "asked before": lambda dialogue: {"instruction": ASK, "input": dialogue},
    "asked behind": lambda dialogue: {"instruction": f"{dialogue}\n\nSummarize this dialogue in one or two sentences."},
    "asked what it is about": lambda dialogue: {"instruction": f"{dialogue}\n\nWhat is this conversation about? Answer in the third person."},
}


def requests(rows, way):
    return [{**WAYS[way](row["dialogue"]), "output": row["summary"]} for row in rows]


def summarise(model, rows, way, **generation):
    """What it writes, greedily unless told otherwise; each knows whether it ended by itself."""
    return write(model, requests(rows, way), tokenizer, **{"max_new_tokens": pick(80, 5), "progress": False, **generation})


model, tokenizer = models.load()
tried = validation[: pick(16, 2)]
untuned = {way: summarise(model, tried, way) for way in WAYS}
scores = {way: score([each.text for each in texts], tried).f1 for way, texts in untuned.items()}
WAY = max(scores, key=scores.get)
figures.bars({**{way: 100 * value for way, value in scores.items()}, "the whole dialogue": 100 * score([row["dialogue"] for row in tried], tried).f1},
             x="ROUGE-L on the validation part", title=f"The untuned model: best when {WAY}")  # fmt: skip

# %%
JUDGED = held_out[: pick(43, 3)]
before = summarise(model, JUDGED, WAY)
print(f"{clean_endings(before):.0%} of its texts come to an end by themselves within the room they have")
print(f"{statistics.mean(len(each.text.split()) for each in before):.0f} words on average, where people wrote {length['summary']:.0f}")
tables.before_after({row["dialogue"]: (row["summary"], text.text) for row, text in zip(JUDGED[:2], before[:2], strict=True)},
                    ["a person", "the untuned model"])  # fmt: skip

# %% [markdown]
# Could we show it examples in the prompt instead of training? The lecture warns that *examples take up space in the context window* [A10]. Here is
# how much. A tuned model is asked with the shortest of these prompts, forever after.

# %%
def prompt_tokens(shots):
    """Of a request with so many dialogues and their summaries before it."""
    turns = [turn for row in requests(train[:shots], WAY) for turn in data.messages_of(row)]
    asked = data.messages_of(requests(JUDGED[:1], WAY)[0])[:1]
    return len(tokenizer.encode(data.prompt_of({"messages": [*turns, *asked]}, tokenizer), add_special_tokens=False))


figures.bars({f"{shots} examples": prompt_tokens(shots) for shots in (0, 1, 3, 5)}, x="tokens of one request")

# %% [markdown]
# ## 6. Train LoRA
#
# Two passes over 128 dialogues. Only the summary is learned: the tokens of the dialogue have no label. First the memory, since dialogues are long:

# %%
torch.manual_seed(0)
lora_lab.inject(model, rank=8)
print(lora_lab.count_parameters(model))
examples = sorted(data.encode_rows(requests(train, WAY), tokenizer), key=lambda example: len(example["input_ids"]))
tokens = [len(example["input_ids"]) for example in examples]
learned = sum(label != -100 for example in examples for label in example["labels"])
print(f"{sum(tokens):,} tokens, the longest row has {tokens[-1]}; {learned:,} are learned")

# %%
longest = examples[-pick(4, 2) :]
labels = sum(label != -100 for example in longest for label in example["labels"][1:])
shape = {"method": "lora", "rank": 8, "precision": PRECISION, "batch_size": len(longest), "implementation": "lora_lab", "device": "cpu"}
predicted = memory_math.predict(model, sequence_length=tokens[-1], label_tokens=labels, **shape)
trial = lora_lab.inject(models.load()[0], rank=8)
two_steps = {"max_steps": 2, "micro_batch_size": len(longest), "learning_rate": 1e-6, "precision": PRECISION, "progress": False}
measured = memory_math.measure(lambda: training.fit(trial, longest, two_steps), device="cpu")
peak = measured.peak_bytes - (measured.start_bytes - sum(weight.nbytes for weight in trial.parameters()))
trial = None
holds("predicted and measured agree within 5 %", abs(predicted.total / peak - 1) < 0.05)
tables.predicted_measured({f"a step on the {len(longest)} longest dialogues": (predicted.total, peak)})

# %%
PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "other")
lengths = {f"{size} tokens": memory_math.predict(model, sequence_length=size, label_tokens=labels, **shape) for size in (128, 256, 512, 1024)}
figures.stacked({name: {part.replace("_", " "): getattr(step, part) / 2**20 for part in PARTS} for name, step in lengths.items()},
                x="MiB", title="Predicted: what longer dialogues would cost, in activations")  # fmt: skip

# %%
every = pick(8, 2)
settings = {"max_steps": 4 * every, "micro_batch_size": pick(8, 2), "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": pick(3, 0),
            "eval_every": every, "precision": PRECISION, "progress": False}  # fmt: skip
result = training.fit(model, requests(train, WAY), settings, tokenizer=tokenizer, eval_data=requests(tried, WAY))
print(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s")
figures.curves({"training": result.losses, "validation": (range(0, result.steps + 1, every), result.eval_losses)}, x="step", y="loss, nats per token")

# %%
print(f"validation loss {result.eval_losses[0]:.3f} -> {result.eval_losses[-1]:.3f}")
holds("the validation loss fell", result.eval_losses[-1] < result.eval_losses[0])

# %% [markdown]
# ## 7. Before and after

# %%
after = summarise(model, JUDGED, WAY)
results = {"a person": [row["summary"] for row in JUDGED], **{name: texts[: len(JUDGED)] for name, texts in summaries.items()},
           "the untuned model": [each.text for each in before], "LoRA": [each.text for each in after]}  # fmt: skip


def judged(texts, rows):
    """ROUGE-1, -2, -L; words; the share of facts missing; wrong numbers and names a summary; the share with none."""
    facts, found = sum(len(row["facts"]) for row in rows), [wrong(text, row) for text, row in zip(texts, rows, strict=True)]
    return [*(100 * score(texts, rows, kind).f1 for kind in KINDS), statistics.mean(len(text.split()) for text in texts),
            sum(len(missing(text, row)) for text, row in zip(texts, rows, strict=True)) / facts,
            sum(map(len, found)) / len(rows), sum(not each for each in found) / len(rows)]  # fmt: skip


def shown(values):
    return [*(f"{value:.1f}" for value in values[:3]), f"{values[3]:.0f}", f"{values[4]:.0%}", f"{values[5]:.2f}", f"{values[6]:.0%}"]


HEADINGS = ["ROUGE-1", "ROUGE-2", "ROUGE-L", "words", "facts missing", "wrong, each", "nothing wrong"]
verdicts = {name: judged(texts, JUDGED) for name, texts in results.items()}
tables.Table(["", *HEADINGS], [[name, *shown(values)] for name, values in verdicts.items()])

# %%
left, right = figures.panels(2, height=2.6)
names = list(verdicts)[1:]
figures.bars({name: round(verdicts[name][2], 1) for name in names}, x="ROUGE-L, higher is better", axes=left)
figures.bars({name: round(100 * verdicts[name][4]) for name in names}, x="% of the facts missing, lower is better", colours=figures.ORANGE,
             axes=right)  # fmt: skip
right.set_yticklabels([])

# %% [markdown]
# Are these differences chance? Both models summarised the same dialogues, so we look at the difference *for each dialogue*: its mean, and the
# standard error of that mean (the standard deviation over the root of their number).

# %%
def paired(ours, theirs, rows):
    """Mean and standard error of the difference in ROUGE-L, in points."""
    gains = [100 * (score([one], [row]).f1 - score([other], [row]).f1) for one, other, row in zip(ours, theirs, rows, strict=True)]
    return statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5


gains = {name: paired(results["LoRA"], results[name], JUDGED) for name in names[:-1]}
for name, (gain, error) in gains.items():
    print(f"LoRA against {name}: {gain:+.1f} ± {error:.1f} points of ROUGE-L")
gain, error = gains["the untuned model"]
holds("better than the untuned model, by more than two standard errors", gain > 2 * error, real_only=True)
told("and better than either way of copying, by as much", all(gain > 2 * error for gain, error in gains.values()))
holds("the tuned model comes to an end by itself nearly always", clean_endings(after) > 0.9, real_only=True)

# %% [markdown]
# Now read. The first column is the person's.

# %%
tables.before_after({row["dialogue"]: (row["summary"], old.text, new.text) for row, old, new in zip(JUDGED[:4], before[:4], after[:4], strict=True)},
                    ["a person", "before", "after"])  # fmt: skip

# %%
print("What the count found in LoRA's summaries, dialogue by dialogue:")
for row, text in zip(JUDGED[:10], results["LoRA"][:10], strict=True):
    print(f"  {row['id']}: missing {missing(text, row)}, wrong {wrong(text, row)}")

# %% [markdown]
# Two things stand side by side. The *form* is learned: length, an end, and a summary is about people and no longer one of them speaking:

# %%
def in_person(texts):
    """The share that says I, you, we or my: a dialogue does, a summary seldom."""
    return sum(bool({*words(text)} & {"i", "you", "we", "my", "your", "our"}) for text in texts) / len(texts)


figures.bars({name: round(100 * in_person(texts)) for name, texts in results.items()}, x="% with I, you, we, my, your or our in them")

# %% [markdown]
# The *content* is another matter. Whoever copies invents nothing, so a model that writes in its own words can have a better ROUGE and more wrong
# facts at once: compare the last three columns of the table, and remember that the count is a lower bound. Who did what to whom it does not see, and
# no score on this page does: read the texts above for that.
#
# ## 8. How it writes: greedy, sampling, a penalty
#
# Greedy writing takes the likeliest word each time. Small models then tend to go round in circles. Two remedies are common: **sampling** (draw the
# next word by its probability; a temperature below 1 sharpens the probabilities) and a **repetition penalty**, which makes every word that was
# there before less likely (Keskar et al. 2019, [arXiv:1909.05858](https://arxiv.org/abs/1909.05858), section 4.1).
#
# ## Exercise 5. How much does it repeat itself? (*, 5 minutes)
#
# The share of a text's runs of `n` words that were there before *in this text*. A text shorter than `n` words repeats nothing.

# %% tags=["exercise"]
def repeated(text, n):
    ...  # your code


check.repeated(repeated)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `words(text)` gives the words. How many runs are there, and how many different ones?
# </details>
#
# <details><summary>Solution, in words</summary>
#
# One minus different runs over all runs.
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def repeated(text, n):
    found = words(text)
    runs = [*zip(*(found[i:] for i in range(n)), strict=False)]
    return 1 - len({*runs}) / len(runs) if runs else 0.0


check.repeated(repeated)

# %%
WRITING = {"greedy": {}, "penalty 1.1": {"repetition_penalty": 1.1}, "penalty 1.3": {"repetition_penalty": 1.3},
           "temperature 0.7": {"temperature": 0.7, "top_p": 0.9, "seed": 1}, "temperature 1.2": {"temperature": 1.2, "seed": 1}}  # fmt: skip
written = {name: summarise(model, tried, WAY, **how) for name, how in WRITING.items()}
texts = {name: [each.text for each in found] for name, found in written.items()}
compared = {name: [*judged(each, tried), statistics.mean(repeated(text, 3) for text in each)] for name, each in texts.items()}
ended = {name: clean_endings(each) for name, each in written.items()}
tables.Table(["on the validation part", *HEADINGS, "3 words repeated", "ends by itself"],
             [[name, *shown(values), f"{values[-1]:.1%}", f"{ended[name]:.0%}"] for name, values in compared.items()])  # fmt: skip

# %%
left, right = figures.panels(2, height=2.6)
figures.bars({name: round(values[2], 1) for name, values in compared.items()}, x="ROUGE-L", axes=left)
figures.bars({name: round(100 * values[4]) for name, values in compared.items()}, x="% of the facts missing", colours=figures.ORANGE, axes=right)
right.set_yticklabels([])

# %% [markdown]
# In a summary the penalty has a catch. The paper counts the words that were *generated*; here, as in transformers, *seen before* includes the prompt,
# and the prompt is the dialogue. Every name and number that the summary ought to repeat is pushed away, and so is the token that ends an answer,
# since the prompt has ended a turn, too (see the last column). What saves a story from going in circles can cost a summary its facts.

# %%
plain, pushed = compared["greedy"], compared["penalty 1.3"]
print(f"penalty 1.3 against none: ROUGE-L {plain[2]:.1f} -> {pushed[2]:.1f}, facts missing {plain[4]:.0%} -> {pushed[4]:.0%}")
gain, error = paired(texts["penalty 1.3"], texts["greedy"], tried)
told(f"a penalty of 1.3 costs ROUGE-L, by more than two standard errors on {len(tried)} dialogues ({gain:+.1f} ± {error:.1f})", gain < -2 * error)
told("and facts", pushed[4] > plain[4])

# %% [markdown]
# We take what did best on the validation part, and read the held-out part with it once. (The best of five on so few dialogues is partly lucky; the
# held-out part does not share the luck.)

# %%
best = max(compared, key=lambda name: compared[name][2])
chosen = after if best == "greedy" else summarise(model, JUDGED, WAY, **WRITING[best])
print(f"best on the validation part: {best}")
verdict = judged([each.text for each in chosen], JUDGED)
tables.Table(["held out", *HEADINGS], [["LoRA, greedy", *shown(verdicts["LoRA"])], [f"LoRA, {best}", *shown(verdict)]])

# %% [markdown]
# ## 9. Real data: doctors and patients
#
# MTS-Dialog (Ben Abacha et al. 2023, CC BY 4.0) has talks between doctors and patients, and what stood in the notes. It is not part of this
# repository: the cell runs where `LORA_LAB_DATA` points to a folder that holds it. Only numbers are shown. A short run, on part of the rows.

# %%
def talks(name):
    """Its rows with at least 8 words of notes and at most 250 of dialogue."""
    lines = real_data.table(folder / f"MTS-Dialog-{name}.csv")
    found = [{"dialogue": line["dialogue"].strip(), "summary": line["section_text"].strip()} for line in lines]
    return [row for row in found if len(row["summary"].split()) >= 8 and len(row["dialogue"].split()) <= 250]


folder, clinic = real_data.path("mts_dialog"), {}
if folder is None:
    print("not measured here: there is no mts_dialog in LORA_LAB_DATA")
else:
    notes, test = talks("TrainingSet")[: pick(160, 4)], talks("TestSet-1-MEDIQA-Chat-2023")[: pick(40, 2)]
    doctor = lora_lab.inject(models.load()[0], rank=8)
    with lora_lab.disabled(doctor):
        clinic["the untuned model"] = [each.text for each in summarise(doctor, test, WAY, max_new_tokens=pick(64, 4))]
    again = {**settings, "max_steps": pick(40, 2), "micro_batch_size": pick(4, 2), "eval_every": None}
    learned = training.fit(doctor, requests(notes, WAY), again, tokenizer=tokenizer)
    print(f"{len(notes)} talks, {learned.steps} steps, {learned.seconds:.0f} s")
    clinic["LoRA"] = [each.text for each in summarise(doctor, test, WAY, max_new_tokens=pick(64, 4))]
    clinic = {"a doctor": [row["summary"] for row in test], "the whole dialogue": [row["dialogue"] for row in test], **clinic}

# %%
if clinic:
    unheard = {name: sum(len(numbers(text) - numbers(row["dialogue"])) for text, row in zip(texts, test, strict=True))
               for name, texts in clinic.items()}  # fmt: skip
    scores = {name: [100 * score(texts, test, kind).f1 for kind in KINDS] for name, texts in clinic.items()}
    print(tables.Table([f"{len(test)} talks", "ROUGE-1", "ROUGE-2", "ROUGE-L", "numbers nobody said"],
                       [[name, *(f"{value:.1f}" for value in three), unheard[name]] for name, three in scores.items()]))  # fmt: skip
    for name in ("the whole dialogue", "the untuned model"):
        gain, error = paired(clinic["LoRA"], clinic[name], test)
        print(f"LoRA against {name}: {gain:+.1f} ± {error:.1f} points of ROUGE-L")
    holds("on real talks, too, LoRA beats the untuned model", scores["LoRA"][2] > scores["the untuned model"][2], real_only=True)

# %% [markdown]
# The row *a doctor* is the control: notes do contain numbers that nobody said in the talk (an age from the file, a dose), so not every one that a
# model writes is its invention. It *is* where to look first. `python -m lora_lab finetune --task summarization` does all of this on any file with
# dialogues and summaries, and keeps a test part unread until the end.
#
# ## 10. An encoder-decoder
#
# FLAN-T5, the first row of the lecture's table of instruction models (1,836 tasks, 15 million pairs [A8]), is built for this: an encoder reads the
# dialogue once, in both directions, and a decoder writes. Nothing changes for us: `inject`, `fit` and `write` take it as it is. It is too large to
# come with the course; the cell runs with a local folder, say of `google/flan-t5-small`, in `LORA_LAB_T5`.

# %%
pair, reading = models.load_t5(), {}
if pair is None:
    print("not measured here: LORA_LAB_T5 names no local folder of T5 or FLAN-T5")
else:
    t5, t5_tokenizer = pair
    asked = [{"instruction": "Summarize the following dialogue.", "input": row["dialogue"], "output": row["summary"]} for row in [*train, *JUDGED]]
    how = {"max_new_tokens": pick(80, 5), "progress": False}
    reading["before"] = training.answers(t5, asked[len(train) :], t5_tokenizer, **how)
    lora_lab.inject(t5, rank=8)
    print(lora_lab.count_parameters(t5))
    learned = training.fit(t5, asked[: len(train)], {**settings, "precision": "fp32", "eval_every": None}, tokenizer=t5_tokenizer)
    print(f"{learned.steps} steps, {learned.seconds:.0f} s")
    reading["LoRA"] = training.answers(t5, asked[len(train) :], t5_tokenizer, **how)
tables.Table(["FLAN-T5", *HEADINGS], [[name, *shown(judged(texts, JUDGED))] for name, texts in reading.items()]) if reading else None

# %% [markdown]
# ## 11. The numbers, all together

# %%
tables.Table(["", "before", "after"], [
    ["validation loss, nats per token", result.eval_losses[0], result.eval_losses[-1]],
    *[[heading, old, new] for heading, old, new in zip(HEADINGS, shown(verdicts["the untuned model"]), shown(verdicts["LoRA"]), strict=True)],
    ["ends by itself", f"{clean_endings(before):.0%}", f"{clean_endings(after):.0%}"],
    ["weights that train", 0, lora_lab.count_parameters(model).trainable],
])  # fmt: skip

# %% [markdown]
# ## Takeaways
#
# - ROUGE counts shared words, pairs and subsequences. Precision and recall can each be had for nothing, so look at F1, and beside it at the number
#   for copying.
# - A hundred dialogues and LoRA teach a small model the *form* of a summary within minutes: its length, its voice, its end.
# - Facts have to be counted apart: what is missing, what nobody said. A better ROUGE does not promise fewer wrong facts.
# - Choose wording, learning rate and way of writing on a validation part, and read the test part once.
# - A repetition penalty counts the prompt's words, too, and so works against a summary's names and numbers.
#
# ## Three questions
#
# 1. Somebody reports ROUGE-1 recall of 90 %. Are you impressed?
#    <details><summary>Answer</summary>
#
#    No: copying everything has that. Ask for the precision, or F1, and for the length of the texts.
#    </details>
# 2. Two models have the same ROUGE-L. One copies lines, the other writes in its own words. Which would you give to a doctor?
#    <details><summary>Answer</summary>
#
#    That is not for ROUGE to say. The first invents nothing, the second reads better and may. Count wrong facts on your own data first, and let
#    people read.
#    </details>
# 3. Why is the learning rate, the wording or the penalty never chosen on the held-out part?
#    <details><summary>Answer</summary>
#
#    The best of several tries is partly lucky. Chosen there, the luck would stay in the number you report; chosen on the validation part, it stays
#    behind.
#    </details>
