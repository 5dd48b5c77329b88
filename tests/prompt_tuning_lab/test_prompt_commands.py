"""python -m prompt_tuning_lab in process: the way through, and every mistake as one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import peft
import pytest
import torch
import transformers
from bert_tools import WORDS, ours, theirs, word_pieces
from command_line import CONTEXT, Folder, check_refusal, half, run
from prompt_file_tools import peft_folder
from safetensors.torch import load_file
from tiny_workshop import chat_tokenizer, our_llama, text_rows

import lora_lab
import prompt_tuning_lab
from lora_lab import LoraLabError, comparison, models
from lora_lab.data import filled, prompt_of, verbalize
from lora_lab.models import loading
from lora_lab.training import TrainConfig, accuracy, best_choices, fit, predict_classes, score_choices
from lora_lab.training.loop import Run
from prompt_tuning_lab.__main__ import main
from prompt_tuning_lab.commands.memory import memory_of_a_step
from prompt_tuning_lab.commands.nearest import table
from prompt_tuning_lab.tuning import PREFIX_SHARE, SHARE, WARMUP, learning_rate, training_config

ROOT = Path(prompt_tuning_lab.__file__).parent.parent
LABELLED = [{"text": word, "label": number % 2} for number, word in enumerate(("good", "bad", "fine", "poor", "nice", "grim"))]
PROMPT = "adapter_model.safetensors"
METHODS = {"a": {"method": "prompt"}, "b": {"method": "residual", "encoder_hidden_size": 6}, "c": {"method": "prefix"}}


class Shop(Folder):
    """With labelled rows, and prompts a, b and c of three methods."""

    def __init__(self, folder):
        super().__init__(folder)
        self.labelled = folder / "labelled.jsonl"
        self.a, self.b, self.c = (folder / name for name in METHODS)

    def tune(self, **changes):
        given = {"model": self.model, "data": self.rows, "output": self.folder / "new", "precision": "fp32", "steps": 4, "num-virtual-tokens": 5,
                 "samples": 0, **changes}  # fmt: skip
        return run("tune", main, **given)

    def generate(self, **changes):
        given = {"model": self.model, "prompt-folder": [self.a], "prompt": "Say one.", "max-new-tokens": 6, "temperature": 0, "precision": "fp32",
                 **changes}  # fmt: skip
        return run("generate", main, **given)

    def nearest(self, k=3, **changes):
        given = {"model": self.model, "prompt-folder": self.a, **changes}
        return main(["nearest", "-k", str(k), *(str(word) for name, value in given.items() for word in (f"--{name}", value))])

    def inspect(self, folder=None):
        return main(["inspect", str(folder or self.a)])

    def prompted(self, *names):
        model, tokenizer = models.load(self.model)
        for name in names:
            model = prompt_tuning_lab.load(model, self.folder / name, name)
        return model, tokenizer


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    torch.manual_seed(0)
    shop = Shop(tmp_path_factory.mktemp("shop"))
    loading.save(our_llama(max_position_embeddings=CONTEXT), shop.model, chat_tokenizer())
    shop.rows.write_text("\n".join(map(json.dumps, text_rows())))
    shop.labelled.write_text("\n".join(map(json.dumps, LABELLED)))
    for length, (name, settings) in enumerate(METHODS.items(), start=3):
        prompted = prompt_tuning_lab.inject(models.load(shop.model)[0], length, seed=length, **settings)
        with torch.no_grad():
            for parameter in prompted.prompt().parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        prompt_tuning_lab.save(prompted, shop.folder / name)
    return shop


@pytest.fixture
def shop(made, tmp_path, capsys):
    capsys.readouterr()
    return made.copied(tmp_path / "shop")


def numbers(text):
    return [float(word.replace(",", "")) for word in re.findall(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", text)]


# The way through ----------------------------------------------------------------------------------------------------------------


def test_help_is_there_as_a_module():
    result = subprocess.run([sys.executable, "-m", "prompt_tuning_lab", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and not result.stderr
    assert all(re.search(rf"^ +{command} ", result.stdout, re.MULTILINE) for command in ("tune", "generate", "nearest", "inspect"))


def test_help_says_the_defaults_that_are(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"default: {SHARE:g}, of a prefix {PREFIX_SHARE:g}" in said and f"default: {WARMUP:.0%} of the steps".replace("%", " %") in said


@pytest.mark.parametrize("command", ["tune", "generate", "nearest", "inspect"])
def test_every_command_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage: prompt-tuning-lab" in capsys.readouterr().out


def test_a_run_that_was_stopped_is_told_before_anything_is_read(shop, capsys, monkeypatch):
    (shop.folder / "new" / "snapshots" / "step-000002").mkdir(parents=True)
    monkeypatch.setattr("lora_lab.training.snapshots._checked_state", lambda folder: {"step": 2, "steps": 4})
    check_refusal(shop.tune(data="nowhere.jsonl"), capsys, "holds a run that was stopped after step 2 of 4: the same command with --resume")


def test_what_an_earlier_adapter_was_taught_is_not_said_of_a_prompt(shop):
    record = shop.folder / "new" / "lora_lab_task.json"
    record.parent.mkdir()
    record.write_text("{}")
    assert shop.tune(steps=1) == 0 and not record.exists()


def test_tune_inspect_nearest_and_generate_work_one_after_the_other(shop, capsys):
    out = shop.folder / "new"
    assert shop.tune(**{"eval-data": shop.rows, "steps": None, "epochs": 15, "batch-size": 3, "samples": 2}) == 0
    printed = capsys.readouterr().out
    held_out = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", printed)
    assert float(held_out[2]) < float(held_out[1]) - 0.1 and "in 30 steps" in printed
    assert printed.count("without the prompt") == 2 and "> Say one." in printed and "> Say two." in printed
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", PROMPT, "log.jsonl"]
    assert shop.inspect(out) == 0
    assert "5, 16 numbers each, F32" in capsys.readouterr().out
    assert shop.nearest(**{"prompt-folder": out}) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert shop.generate(**{"prompt-folder": [out]}) == 0
    model, tokenizer = models.load(shop.model)
    ids = [tokenizer.encode(prompt_of(text_rows()[0], tokenizer), add_special_tokens=False)]
    settings = {"max_new_tokens": 6, "top_p": 0.9, "repetition_penalty": 1.1}
    texts = [models.generate(each, ids, tokenizer, **settings).texts[0] for each in (model, prompt_tuning_lab.load(model, out))]
    assert capsys.readouterr().out == texts[1] + "\n" != texts[0] + "\n"


# tune ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "prefix", "p-tuning", "residual"])
def test_tune_makes_what_the_library_makes(shop, method):
    """The same seed, rate and warm-up; what is measured and shown before leaves no trace in the prompt."""
    assert shop.tune(method=method, seed=3, text="ab", steps=6, **{"eval-data": shop.rows, "samples": 2, "batch-size": 2}) == 0
    model, tokenizer = models.load(shop.model)
    prompted = prompt_tuning_lab.inject(model, 5, method=method, init="text", text="ab", tokenizer=tokenizer, seed=3)
    rows = lora_lab.data.load(shop.rows)[0]
    config = training_config(prompted, rows, max_steps=6, seed=3, micro_batch_size=2, progress=False)
    assert config.learning_rate == learning_rate(prompted)
    fit(prompted, rows, config, tokenizer=tokenizer)
    prompt_tuning_lab.save(prompted, shop.folder / "by hand")
    ours, by_hand = (load_file(shop.folder / name / PROMPT) for name in ("new", "by hand"))
    assert ours.keys() == by_hand.keys() and all(torch.equal(ours[name], by_hand[name]) for name in ours)


def test_what_is_printed_is_what_there_is(shop, capsys):
    assert shop.tune(method="residual", **{"encoder-hidden-size": 6, "batch-size": 3, "labels": ["ab", "c"]}) == 0
    printed = capsys.readouterr().out
    assert "5 virtual tokens: 2 from labels, 3 drawn from the vocabulary; rms" in printed
    model, tokenizer = models.load(shop.model)
    settings = {"method": "residual", "encoder_hidden_size": 6, "init": "labels", "labels": ["ab", "c"], "tokenizer": tokenizer, "seed": 0}
    prompted = prompt_tuning_lab.inject(model, 5, **settings)
    assert str(prompt_tuning_lab.count_parameters(prompted)) in printed
    rate, share, size, gain = numbers(re.search(r"learning rate (.*)", printed)[1].replace("1 steps", ""))
    assert rate == pytest.approx(learning_rate(prompted), rel=0.01) == pytest.approx(share * size / gain, rel=0.02)
    saved = re.search(r"saved to .*: ([\d,]+) bytes of adapter_model.* and ([\d,]+) bytes of trainable-.*; the model has ([\d,]+)", printed)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert [int(each.replace(",", "")) for each in saved.groups()] == [
        (shop.folder / "new" / PROMPT).stat().st_size, next((shop.folder / "new").glob("trainable-*")).stat().st_size, weights]  # fmt: skip


@pytest.mark.parametrize(("method", "off"), [("prompt", 0.01), ("residual", 0.01), ("p-tuning", 0.01), ("prefix", 0.06)])
def test_memory_is_predicted(shop, capsys, method, off):
    """By memory_math, which knows each method and its network, and takes rows for equally long: the mask of a prefix is not in it."""
    loading.save(our_llama(max_position_embeddings=CONTEXT, hidden_size=64, intermediate_size=160), shop.folder / "wider", chat_tokenizer())
    assert shop.tune(model=shop.folder / "wider", method=method) == 0
    ratio = float(re.search(r"MiB of tensors predicted, .* MiB measured \(ratio ([\d.]+)\)", capsys.readouterr().out)[1])
    assert abs(ratio - 1) < off


def test_a_measured_step_that_fails_leaves_the_prompt_as_it_was(monkeypatch):
    prompted = prompt_tuning_lab.inject(our_llama(max_position_embeddings=CONTEXT), 5)
    before = prompted.prompt()().detach().clone()

    def fails(model, *_):
        model.prompt().weight.data.add_(1)
        raise LoraLabError("the loss is NaN")

    monkeypatch.setattr(comparison.memory, "fit", fails)
    with pytest.raises(LoraLabError, match="the loss is NaN"):
        memory_of_a_step(prompted, [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], TrainConfig())
    assert torch.equal(prompted.prompt()(), before)


def test_a_given_rate_is_said_and_used(shop, capsys):
    assert shop.tune(**{"learning-rate": 0.25, "warmup-steps": 2}) == 0
    assert "\nlearning rate 0.25, 2 steps of warm-up\n" in capsys.readouterr().out
    rates = [json.loads(line)["learning_rate"] for line in (shop.folder / "new" / "log.jsonl").read_text().splitlines()]
    assert rates == [0.125, 0.25, 0.25, 0.125]


def test_texts_with_labels_become_a_template_and_a_word(shop, capsys):
    given = {"choices": [" no", " no, yes"], "template": "Is {text} so?"}
    assert shop.tune(data=shop.labelled, steps=12, samples=1, **{"eval-data": shop.labelled, **given}) == 0
    printed = capsys.readouterr().out
    prompted, tokenizer = shop.prompted("new")
    scored = []
    for task in (None, "new"):
        prompt_tuning_lab.use(prompted, task)
        asked = [filled("Is {text} so?", row) for row in LABELLED]
        scores = score_choices(prompted, asked, tokenizer, [" no", " no, yes"], end=True, progress=False)  # taught with the end
        scored.append(accuracy(best_choices(scores), [row["label"] for row in LABELLED]))
    said = re.search(r"held-out accuracy ([\d.]+) without the prompt, ([\d.]+) with it \(6 rows\)", printed)
    assert [float(each) for each in said.groups()] == pytest.approx(scored, abs=1e-4)
    assert "> Is good so?" in printed
    rows = verbalize(LABELLED, tokenizer, "Is {text} so?", [" no", " no, yes"])
    assert f"{12 * sum(len(row['input_ids']) for row in rows):,} tokens" in printed


def test_a_head_that_was_drawn_is_said_and_one_class_refused(shop, capsys):
    given, texts = saved_bert(shop, "BertModel")
    assert shop.tune(**given, **{"eval-data": given["data"], "num-virtual-tokens": 3}) == 0
    assert re.search(r"held-out accuracy [\d.]+ without the prompt, its head drawn at random, [\d.]+ with it", capsys.readouterr().out)
    alone = shop.file("alone.jsonl", "\n".join(json.dumps({**row, "label": 0}) for row in texts))
    check_refusal(shop.tune(**{**given, "data": alone}), capsys, "all rows have the label 0: expected two classes at least")


def test_words_are_scored_with_the_end_that_they_are_taught(shop, monkeypatch):
    """Of " no" and " no, yes" the longer would never be the likelier without."""
    ends = []
    monkeypatch.setattr("lora_lab.training.score_choices", lambda *given, end=False, **others: ends.append(end) or score_choices(*given, **others))
    assert shop.tune(data=shop.labelled, steps=1, choices=[" no", " no, yes"], **{"eval-data": shop.labelled}) == 0 and ends == [True, True]


def saved_bert(shop, name):
    torch.manual_seed(3)
    loading.save(ours(theirs(name, vocab_size=len(WORDS))), shop.folder / "bert", word_pieces())
    texts = [{"text": text, "label": number % 2} for number, text in enumerate(("good", "bad", "the cat", "a dog"))]
    return {"model": shop.folder / "bert", "data": shop.file("texts.jsonl", "\n".join(map(json.dumps, texts)))}, texts


def test_a_classifier_learns_its_rows_as_they_are(shop, capsys):
    given, texts = saved_bert(shop, "BertForSequenceClassification")
    assert shop.tune(**given, **{"eval-data": given["data"], "num-virtual-tokens": 3}) == 0
    model, tokenizer = models.load(given["model"])
    after = predict_classes(prompt_tuning_lab.load(model, shop.folder / "new"), texts, tokenizer, progress=False)
    expected = accuracy(after, [row["label"] for row in texts])
    assert f"{expected:.4f} with it (4 rows)" in capsys.readouterr().out


def test_an_encoder_gets_a_head_that_trains_along_and_is_in_the_file(shop, capsys):
    given, texts = saved_bert(shop, "BertModel")
    assert shop.tune(**given, **{"eval-data": given["data"], "num-virtual-tokens": 3, "steps": 40, "learning-rate": 0.1}) == 0
    out, err = capsys.readouterr()
    assert "begin at random" in err
    with pytest.warns(UserWarning, match="begin at random"):
        model, tokenizer = models.load(given["model"], task="sequence-classification", num_labels=2)
    prompted = prompt_tuning_lab.load(model, shop.folder / "new", head=True)
    found = accuracy(predict_classes(prompted, texts, tokenizer, progress=False), [row["label"] for row in texts])
    assert found == 1.0 and "1.0000 with it" in out


def test_a_run_that_was_stopped_goes_on(shop, capsys, monkeypatch):
    step, once, taken = Run.step, iter([True]), []

    def stopping(self, indices, number):
        if self.config.output_dir is not None:
            taken.append(number)
        if number == 5 and self.config.output_dir is not None and next(once, False):
            raise KeyboardInterrupt
        return step(self, indices, number)

    given = {"steps": 8, "save-every": 2, "batch-size": 2, "method": "p-tuning"}
    assert shop.tune(output=shop.folder / "whole", **given) == 0
    monkeypatch.setattr(Run, "step", stopping)
    assert shop.tune(**given) == 130
    assert not (shop.folder / "new" / PROMPT).exists()
    assert shop.tune(**given, resume=True) == 0
    assert taken == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    tensors = [load_file(shop.folder / name / PROMPT)["prompt_embeddings"] for name in ("whole", "new")]
    assert torch.equal(*tensors)


# generate -----------------------------------------------------------------------------------------------------------------------


def written(shop, names, texts, **settings):
    """By the library, each task alone: {name: texts}."""
    prompted, tokenizer = shop.prompted(*(name for name in names if name))
    ids = [tokenizer.encode(prompt_of({"instruction": text}, tokenizer), add_special_tokens=False) for text in texts]
    given = {"max_new_tokens": 6, "top_p": 0.9, "repetition_penalty": 1.1, **settings}
    return {name: models.generate(prompt_tuning_lab.use(prompted, name), ids, tokenizer, **given).texts for name in names}


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_several_prompts_write_side_by_side_what_each_writes_alone(shop, capsys, monkeypatch, temperature):
    """In one batch: rows, keys and values, and none at all. The same random numbers in every column."""
    shown = []
    monkeypatch.setattr("lora_lab.training.evaluation.Samples.table", lambda self, width: shown.append(self) or "")
    texts = ["Say one.", "Say seven and eight."]
    words = ["generate", "--model", str(shop.model), "--prompt-folder", *map(str, (shop.a, shop.b, shop.c)), "--with-base", "--precision", "fp32",
             "--temperature", str(temperature), "--max-new-tokens", "6", "--seed", "4"]  # fmt: skip
    assert main([*words, "--prompt", texts[0], "--prompt", texts[1]]) == 0
    alone = written(shop, ["a", "b", "c", None], texts, temperature=temperature, seed=4)
    assert shown[0].prompts == texts and shown[0].columns == {name or "no prompt": found for name, found in alone.items()}
    assert len({*map(tuple, alone.values())}) == 4


def test_tasks_may_be_named(shop, capsys):
    assert shop.generate(**{"prompt-folder": [shop.a, shop.b], "tasks": ["first", "second"]}) == 0
    assert re.search(r"^first +\| second", capsys.readouterr().out, re.MULTILINE)


def test_an_ensemble_writes_one_text(shop, capsys):
    from prompt_tuning_lab.ensembling import Ensembled

    assert shop.generate(ensemble=True, **{"prompt-folder": [shop.a, shop.b, shop.c]}) == 0
    prompted, tokenizer = shop.prompted("a", "b", "c")
    ids = [tokenizer.encode(prompt_of({"instruction": "Say one."}, tokenizer), add_special_tokens=False)]
    settings = {"max_new_tokens": 6, "top_p": 0.9, "repetition_penalty": 1.1}
    text = models.generate(Ensembled(prompted, ["a", "b", "c"]), ids, tokenizer, **settings).texts[0]
    assert capsys.readouterr().out == text + "\n"
    assert [text] != written(shop, ["a"], ["Say one."])["a"]  # the task that is active


def test_several_texts_of_one_prompt_are_listed(shop, capsys):
    words = ["generate", "--model", str(shop.model), "--prompt-folder", str(shop.a), "--precision", "fp32", "--temperature", "0"]
    assert main([*words, "--max-new-tokens", "6", "--prompt", "One?", "--prompt", "Two?"]) == 0
    first, second = written(shop, ["a"], ["One?", "Two?"])["a"]
    assert capsys.readouterr().out == f"> One?\n{first}\n\n> Two?\n{second}\n"


# nearest and inspect ------------------------------------------------------------------------------------------------------------


def test_nearest_prints_what_nearest_tokens_finds(shop, capsys):
    assert shop.nearest(k=4) == 0
    prompted, tokenizer = shop.prompted("a")
    assert capsys.readouterr().out == table(prompt_tuning_lab.nearest_tokens(prompted, tokenizer, 4)) + "\n"


def test_nearest_draws_a_picture(shop, capsys):
    path = shop.folder / "pictures" / "a.svg"
    assert shop.nearest(picture=path) == 0
    assert f"map drawn in {path}" in capsys.readouterr().out
    assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")


def lines_of(printed):
    return {line[:16].strip(): line[16:] for line in printed.splitlines()}


def test_inspect_says_what_the_files_hold(shop, capsys):
    said = {}
    for name in METHODS:
        assert shop.inspect(shop.folder / name) == 0
        said[name] = lines_of(capsys.readouterr().out)
    assert [said[name]["method"] for name in METHODS] == ["prompt", "residual", "prefix (plain keys and values)"]
    assert [said[name]["virtual tokens"] for name in METHODS] == [
        "3, 16 numbers each, F32", "4, 16 numbers each, F32", "5, 32 numbers each, F32"]  # fmt: skip
    assert all(each["PEFT reads it"] == "yes" and "drawn from the vocabulary" in each["began as"] for each in said.values())
    assert said["a"]["files"].startswith(f"{PROMPT} {(shop.a / PROMPT).stat().st_size:,} bytes, adapter_config.json")
    assert said["b"]["trains on as"] == "the network that made the rows" and "trainable-" in said["b"]["files"]
    assert re.search(r"SHA-256 [0-9a-f]{12}", said["a"]["base"])


@pytest.mark.parametrize(("family", "method", "expected"), [
    ("gpt2", "prompt", {"method": "prompt", "PEFT reads it": "yes", "began as": "not in the file"}),
    ("gpt2", "p-tuning", {"method": "p-tuning", "trains on as": "plain rows: the network that made them is not in the folder"}),
    ("t5", "prompt", {"virtual tokens": "4, 30 numbers each, F32; of 8 rows the others are never used"}),
    ("classifier", "prompt", {"head": "classifier (load(..., head=True) puts it into the base)"}),
])  # fmt: skip
def test_inspect_reads_folders_of_pefts(tmp_path, capsys, family, method, expected):
    """T13: PEFT's prompt of an encoder-decoder has rows for the decoder, too."""
    peft_folder(tmp_path, family, method)
    assert main(["inspect", str(tmp_path)]) == 0
    said = lines_of(capsys.readouterr().out)
    assert said.items() >= expected.items()


def test_inspect_tells_what_peft_would_compute_otherwise(shop, capsys):
    """A prefix of an encoder-decoder (T14), a prompt behind the first token, a classifier (T15)."""
    from prefix_tools import model

    cases = {"no:": (model("ours", "t5", torch.float32), {"method": "prefix", "init": "random"}),
             "it reads the file, but puts the prompt in front": (our_llama(), {"placement": "after-bos"}),
             "off the first virtual token": (ours(theirs("BertForSequenceClassification")), {}),
             "start and end of an answer from the first virtual token": (theirs("BertForQuestionAnswering", num_labels=2), {})}  # fmt: skip
    for number, (expected, (base, settings)) in enumerate(cases.items()):
        prompt_tuning_lab.save(prompt_tuning_lab.inject(base, 3, **settings), shop.folder / str(number))
        assert shop.inspect(shop.folder / str(number)) == 0
        assert expected in lines_of(capsys.readouterr().out)["PEFT reads it"]


def test_what_inspect_says_peft_reads_peft_reads(shop):
    """`yes` is checked: PEFT's logits with the file are ours."""
    ids = torch.tensor([[1, 2, 3, 4]])
    for name in METHODS:
        their_model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(shop.model), shop.folder / name).eval()
        with torch.no_grad():
            logits = their_model(input_ids=ids).logits[:, -4:]
            torch.testing.assert_close(logits, shop.prompted(name)[0](input_ids=ids).logits, rtol=0, atol=1e-4)


# Mistakes -----------------------------------------------------------------------------------------------------------------------


def rows(*given):
    return lambda shop: {"data": shop.file("bad.jsonl", "\n".join(map(json.dumps, given)))}


BAD_TUNES = {
    "unknown model": ({"model": "smollm2-135m-instruct-q5"}, "did you mean 'smollm2-135m-instruct-q4'"),
    "unknown data": ({"data": "revews"}, "did you mean 'reviews'"),
    "unknown precision": ({"precision": "fp8"}, "--precision fp8: expected auto"),
    "unknown method": ({"method": "prefx"}, "did you mean 'prefix'"),
    "unknown init": ({"init": "vocb"}, "did you mean 'vocab'"),
    "text that is none": ({"text": ""}, "text '' has no tokens"),
    "text and labels": ({"text": "a", "labels": ["b"]}, "init='text' with labels"),
    "no virtual tokens": ({"num-virtual-tokens": 0}, "num_virtual_tokens=0"),
    "more virtual tokens than context": ({"num-virtual-tokens": CONTEXT}, f"context is {CONTEXT}"),
    "a row that the prompt leaves no room for": ({"num-virtual-tokens": CONTEXT - 20}, r"rows.jsonl, line 1: the row has \d+ tokens, .* 20"),
    "a network without a method": ({"encoder-hidden-size": 4}, "encoder_hidden_size=4 with method='prompt'"),
    "share and rate": ({"share": 0.1, "learning-rate": 0.1}, "--share 0.1 with --learning-rate 0.1"),
    "no share": ({"share": 0}, "share=0.0: expected a number above 0"),
    "samples below none": ({"samples": -1}, "--samples -1"),
    "no steps": ({"steps": 0}, "max_steps=0"),
    "labels without words": (lambda shop: {"data": shop.labelled}, "--choices names the answer that stands for each label"),
    "words without labels": ({"choices": ["a", "b"]}, "--choices 'a b': words for labels are for text/label rows"),
    "a label without a word": (lambda shop: {"data": shop.labelled, "choices": ["a"]}, "labelled.jsonl, line 2: its answer 1 is none of"),
    "a template without a text": (lambda shop: {"data": shop.labelled, "choices": ["a", "b"], "template": "so?"}, "has no {text}"),
    "a row without output": (rows({"instruction": "Say two."}), "bad.jsonl, line 1: the row has no 'output'"),
    "bad held-out rows": (lambda shop: {"eval-data": shop.file("bad.jsonl", "[]")}, "bad.jsonl holds no rows"),
    "nothing to evaluate on": ({"keep-best": True}, "keep_best=True needs eval_data"),
    "a file where the folder should be": (lambda shop: {"output": shop.rows}, "could not save"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_TUNES.values(), ids=BAD_TUNES)
def test_a_tune_that_makes_no_sense_is_refused_before_anything_is_written(shop, capsys, change, message):
    change = change(shop) if callable(change) else change
    before = shop.contents()
    check_refusal(shop.tune(**change), capsys, message)
    assert shop.contents() == before


def test_an_encoder_cannot_learn_to_write(shop, capsys):
    given, _ = saved_bert(shop, "BertModel")
    check_refusal(shop.tune(**{**given, "data": shop.rows}), capsys, "reads text and writes none: it can learn from rows of text and label")
    wrong = shop.file("texts.jsonl", json.dumps({"text": "good", "label": "yes"}))
    check_refusal(shop.tune(**{**given, "data": wrong}), capsys, "a new head is for classes")


def test_a_loss_that_is_not_a_number_leaves_the_earlier_prompt(shop, capsys):
    before = {path.name: path.read_bytes() for path in shop.a.iterdir()}
    check_refusal(shop.tune(output=shop.a, **{"learning-rate": 1e38, "steps": 10}), capsys, r"the (loss|gradient's norm) is (nan|inf) at step \d+")
    assert {name: (shop.a / name).read_bytes() for name in before} == before


BAD_USES = {
    "an unknown folder": ("generate", {"prompt-folder": ["nowhere"]}, "adapter folder 'nowhere' does not exist"),
    "an unknown folder for nearest": ("nearest", {"prompt-folder": "nowhere"}, "adapter folder 'nowhere' does not exist"),
    "too many names": ("generate", {"tasks": ["x", "y"]}, "--tasks names 2 tasks for 1 folders"),
    "a name that is none": ("generate", {"tasks": ["x y"]}, "task='x y'"),
    "the same folder twice": ("generate", lambda shop: {"prompt-folder": [shop.a, shop.a]}, "two tasks are called 'a'"),
    "one text and a column": ("generate", {"ensemble": True, "with-base": True}, "--ensemble with --with-base"),
    "a prompt beyond the context": ("generate", {"prompt": "x" * (CONTEXT - 10)}, f"context is {CONTEXT - 3}"),
    "no words": ("nearest", {"k": 0}, "k=0"),
    "a prefix, which is near to no word": ("nearest", lambda shop: {"prompt-folder": shop.c}, "this task is a prefix"),
    "a picture of another kind": ("nearest", {"picture": "a.png"}, "--picture a.png: expected a file that ends in .svg"),
}


@pytest.mark.parametrize(("command", "change", "message"), BAD_USES.values(), ids=BAD_USES)
def test_a_use_that_makes_no_sense_is_refused(shop, capsys, command, change, message):
    before = shop.contents()
    check_refusal(getattr(shop, command)(**(change(shop) if callable(change) else change)), capsys, message)
    assert shop.contents() == before


def test_a_prompt_of_another_model_is_refused(shop, capsys):
    loading.save(our_llama(hidden_size=32, max_position_embeddings=CONTEXT), shop.folder / "wider", chat_tokenizer())
    check_refusal(shop.generate(model=shop.folder / "wider"), capsys, "a prompt for another model")
    check_refusal(shop.nearest(model=shop.folder / "wider"), capsys, "a prompt for another model")


def test_inspect_refuses_what_is_no_prompt(shop, capsys):
    check_refusal(shop.inspect("nowhere"), capsys, "'nowhere' does not exist")
    check_refusal(shop.inspect(shop.model), capsys, "holds no adapter_model.safetensors")
    lora_lab.save(lora_lab.inject(our_llama(), 2), shop.folder / "lora")
    check_refusal(shop.inspect(shop.folder / "lora"), capsys, "it holds LoRA adapters: lora_lab.load reads it")
    half(shop.a / PROMPT)
    check_refusal(shop.inspect(), capsys, "truncated")


@pytest.mark.parametrize("name", METHODS)
def test_lora_lab_says_who_reads_a_prompt(shop, name):
    with pytest.raises(lora_lab.LoraLabError, match=r"expected 'LORA': prompt_tuning_lab\.load reads it"):
        lora_lab.load(our_llama(max_position_embeddings=CONTEXT), shop.folder / name)


@pytest.mark.parametrize("words", [[], ["train"], ["tune"], ["tune", "--num-virtual-tokens", "two"], ["generate", "--model", "m"], ["inspect"]])
def test_what_the_parser_refuses_is_exit_code_2_too(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err
