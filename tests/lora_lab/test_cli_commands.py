"""compare, evaluate, merge and report on the command line, and a finetune that is interrupted and resumed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal

import pytest
import tokenizers
import torch
import transformers
from bert_tools import WORDS, ours, theirs, word_pieces
from command_line import CONTEXT, check_refusal, run
from gguf_tools import write as write_gguf
from safetensors.torch import load_file
from tiny_workshop import SHAPE, SPECIAL, VOCABULARY, byte_alphabet, chat_tokenizer, livelier, our_llama, text_rows

import lora_lab
from lora_lab.__main__ import main, parser
from lora_lab.commands import finetune as finetune_command
from lora_lab.models import loading
from lora_lab.training import TrainConfig, evaluation
from lora_lab.training.loop import Run

QUIET = {"progress": False}


def tuned(shop):
    """The model with the shop's adapter, made strong enough to matter."""
    model, tokenizer = lora_lab.models.load(shop.model)
    lora_lab.load(model, shop.adapter)
    return model, tokenizer


@pytest.fixture
def shop(shop):
    """An adapter that says something other than the base: its B is large."""
    model, _ = tuned(shop)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    lora_lab.save(model, shop.adapter)
    return shop


def numbers(line):
    return [float(word) for word in re.findall(r"[-+]?\d+\.\d+", line)]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} ", printed, re.MULTILINE)
               for command in ("finetune", "generate", "compare", "evaluate", "merge", "report", "inspect", "demo"))  # fmt: skip


# evaluate -------------------------------------------------------------------------------------------------------------------


def evaluate(shop, **changes):
    return run("evaluate", **{"model": shop.model, "data": shop.rows, "precision": "fp32", **changes})


def test_evaluate_prints_the_base_and_the_adapter_beside_each_other(shop, capsys):
    assert evaluate(shop, adapter=shop.adapter) == 0
    first, heading, line = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first == f"{shop.rows}, 6 rows, fp32" and heading.split() == ["base", str(shop.adapter), "change"]
    model, tokenizer = tuned(shop)
    after = evaluation.perplexity(model, text_rows(), tokenizer, **QUIET)
    before = evaluation.perplexity(lora_lab.models.load(shop.model)[0], text_rows(), tokenizer, **QUIET)
    assert numbers(line) == pytest.approx([before, after, after - before], abs=0.006) and abs(after - before) > 1
    assert evaluate(shop) == 0
    assert numbers(capsys.readouterr().out.splitlines()[-1]) == pytest.approx([before], abs=0.006)


def test_evaluate_takes_the_held_out_rows_where_the_data_has_some_and_as_many_as_asked(shop, capsys):
    loading.save(our_llama(max_position_embeddings=4096), shop.folder / "long", chat_tokenizer())
    assert evaluate(shop, model=shop.folder / "long", data="reviews", limit=2) == 0
    assert capsys.readouterr().out.startswith("reviews (held-out rows), 2 rows, fp32\n")
    _, held_out = lora_lab.data.load("reviews")
    assert evaluate(shop, model=shop.folder / "long", data="reviews", limit=len(held_out) + 5, metric="accuracy", choices=["x"]) == 2


def test_accuracy_is_of_the_answers_that_occur_or_of_those_that_are_named(shop, capsys):
    model, tokenizer = tuned(shop)
    rows = text_rows()
    choices = [row["output"] for row in rows]
    for given, answers in ((None, choices), ([*choices, "seven"], [*choices, "seven"])):
        assert evaluate(shop, adapter=shop.adapter, metric="accuracy", choices=given, normalise="characters") == 0
        lines = capsys.readouterr().out.splitlines()
        scores = evaluation.score_choices(model, rows, tokenizer, answers, normalise="characters", **QUIET)
        best, labels = evaluation.best_choices(scores), list(range(6))
        assert numbers(lines[2])[1] == pytest.approx(evaluation.accuracy(best, labels), abs=1e-4)
        assert numbers(lines[3])[1] == pytest.approx(evaluation.f1(best, labels).macro, abs=1e-4)


def test_an_answer_that_begins_another_can_be_right(shop, capsys):
    """Scored with their ends, or the longer one would never be the likelier."""
    model, tokenizer = lora_lab.models.load(shop.model)
    rows, choices = [{"text": word, "label": 1} for word in ("ab", "cd", "ef")], ["no", "none"]
    scores = evaluation.score_choices(model, [row["text"] for row in rows], tokenizer, choices, end=True, normalise="tokens", **QUIET)
    assert evaluate(shop, data=labelled(shop, rows), metric="accuracy", choices=choices, normalise="tokens") == 0
    expected = evaluation.accuracy(evaluation.best_choices(scores), [1, 1, 1])
    plain = evaluation.score_choices(model, [row["text"] for row in rows], tokenizer, choices, normalise="tokens", **QUIET)
    assert expected != evaluation.accuracy(evaluation.best_choices(plain), [1, 1, 1])
    assert numbers(capsys.readouterr().out.splitlines()[2]) == pytest.approx([expected], abs=1e-4)


def labelled(shop, rows):
    return shop.file("labelled.jsonl", "\n".join(map(json.dumps, rows)))


def test_texts_with_labels_are_put_into_the_template(shop, capsys):
    rows = [{"text": "ab", "label": 0}, {"text": "{text}", "label": 1}, {"text": "cd", "label": 1}]
    assert evaluate(shop, data=labelled(shop, rows), metric="accuracy", choices=["no", "yes"], template="Is {text} so?") == 0
    model, tokenizer = lora_lab.models.load(shop.model)
    prompts = ["Is ab so?", "Is {text} so?", "Is cd so?"]
    best = evaluation.best_choices(evaluation.score_choices(model, prompts, tokenizer, ["no", "yes"], **QUIET))
    assert numbers(capsys.readouterr().out.splitlines()[2]) == pytest.approx([evaluation.accuracy(best, [0, 1, 1])], abs=1e-4)


def test_a_classifier_answers_with_its_head(shop, capsys):
    torch.manual_seed(3)
    model = ours(theirs("BertForSequenceClassification", vocab_size=len(WORDS)))
    rows = [{"text": text, "label": 1} for text in ("good", "the cat", "bad")]
    loading.save(model, shop.folder / "bert", word_pieces())
    assert evaluate(shop, model=shop.folder / "bert", data=labelled(shop, rows), metric="accuracy") == 0
    expected = evaluation.predict_classes(model, rows, word_pieces(), **QUIET)
    assert numbers(capsys.readouterr().out.splitlines()[2]) == pytest.approx([evaluation.accuracy(expected, [1, 1, 1])], abs=1e-4)


def test_rouge_compares_what_is_written_with_the_rows_answers(shop, capsys):
    assert evaluate(shop, adapter=shop.adapter, metric="rouge", stemmer=True, **{"max-new-tokens": 20}) == 0
    lines = capsys.readouterr().out.splitlines()
    model, tokenizer = tuned(shop)
    written = evaluation.answers(model, text_rows(), tokenizer, max_new_tokens=20, **QUIET)
    scores = evaluation.rouge(written, [row["output"] for row in text_rows()], use_stemmer=True)
    assert [line.split()[0] for line in lines[2:]] == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert [numbers(line)[1] for line in lines[2:]] == pytest.approx([score.f1 for score in scores.values()], abs=1e-4)


LABELLED = [{"text": "ab", "label": 1}]
BAD_EVALUATIONS = {
    "unknown metric": ({"metric": "acuracy"}, "--metric acuracy.*did you mean 'accuracy'"),
    "no rows": ({"limit": 0}, "--limit 0"),
    "no batch": ({"batch-size": 0}, "batch_size=0"),
    "labels without answers": ({"metric": "accuracy", "data": LABELLED}, "--choices names the answer that stands for each label"),
    "a label beyond the answers": ({"metric": "accuracy", "data": LABELLED, "choices": ["a"]}, "line 1: its answer 1 is none"),
    "an answer that is no choice": ({"metric": "accuracy", "choices": ["a", "b"]}, "line 1: its answer 'oneone' is none of the choices"),
    "a template without a place": ({"metric": "accuracy", "data": LABELLED, "choices": ["a", "b"], "template": "Is it?"}, r"has no \{text\}"),
    "labels for a language model": ({"data": LABELLED}, "line 1: a row has the fields"),
    "labels for rouge": ({"data": LABELLED, "metric": "rouge"}, "line 1: the row has the fields .*expected an output"),
    "unknown adapter": ({"adapter": "nowhere"}, "'nowhere' does not exist"),
}


@pytest.mark.parametrize(("change", "message"), BAD_EVALUATIONS.values(), ids=BAD_EVALUATIONS)
def test_an_evaluation_that_makes_no_sense_is_refused(shop, capsys, change, message):
    if isinstance(change.get("data"), list):
        change = {**change, "data": labelled(shop, change["data"])}
    check_refusal(evaluate(shop, **change), capsys, message)


# compare --------------------------------------------------------------------------------------------------------------------


def compare(shop, **changes):
    given = {"model": shop.model, "adapter": shop.adapter, "prompt": "Say one.", "max-new-tokens": 6, "precision": "fp32", "temperature": 1}
    return run("compare", **{**given, **changes})


def test_compare_shows_what_generate_writes_with_the_same_seed(shop, capsys):
    texts = []
    for adapter in (None, shop.adapter):
        assert shop.generate(adapter=adapter, seed=4, temperature=1, **{"max-new-tokens": 6}) == 0
        texts.append(capsys.readouterr().out.rstrip("\n"))
    assert compare(shop, seed=4, out=shop.folder / "table.html", width=90) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("> Say one.\nbase ") and str(shop.adapter)[-30:] in printed.replace("\n", "")
    html = (shop.folder / "table.html").read_bytes().decode()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html, re.DOTALL)
    assert cells == ["Say one.", *(evaluation.side_by_side.escape(text) for text in texts)] and texts[0] != texts[1]
    assert compare(shop, seed=4, out=shop.folder / "table.md") == 0
    assert "| Say one. | " in (shop.folder / "table.md").read_text()


def test_several_adapters_and_prompts_are_columns_and_rows(shop, capsys):
    assert shop.finetune(out=shop.folder / "second", rank=4, seed=9, **{"learning-rate": 0.5}) == 0
    capsys.readouterr()
    words = ["compare", "--model", shop.model, "--adapter", shop.adapter, "--adapter", shop.folder / "second", "--prompt", "One?", "--prompt", "Two?",
             "--max-new-tokens", "3", "--precision", "fp32", "--temperature", "0"]  # fmt: skip
    assert main([*map(str, words)]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["> One?", "> Two?"] and blocks[0].splitlines()[1].count(" | ") == 2


def test_a_comparison_that_makes_no_sense_is_refused(shop, capsys):
    twice = ["compare", "--model", str(shop.model), "--prompt", "x", "--adapter", str(shop.adapter), "--adapter", str(shop.adapter)]
    check_refusal(main(twice), capsys, "is given twice")
    check_refusal(compare(shop, out="table.pdf"), capsys, r"--out table.pdf: expected a file that ends in \.html or \.md")
    check_refusal(compare(shop, adapter="nowhere"), capsys, "'nowhere' does not exist")
    (shop.model / "tokenizer.json").unlink()
    check_refusal(compare(shop), capsys, "no tokenizer.json")


# merge ----------------------------------------------------------------------------------------------------------------------


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 30, 7]])).logits


def merge(shop, **changes):
    return run("merge", **{"model": shop.model, "adapter": shop.adapter, "out": shop.folder / "merged", **changes})


def test_a_folder_is_merged_into_a_folder_that_computes_the_same(shop, capsys):
    assert merge(shop) == 0
    assert re.search(r"14 tensors merged, .*largest rounding error [\d.e-]+", capsys.readouterr().out)
    merged, tokenizer = lora_lab.models.load(shop.folder / "merged")
    torch.testing.assert_close(logits(merged), logits(tuned(shop)[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(transformers.AutoModelForCausalLM.from_pretrained(shop.folder / "merged")), logits(merged), rtol=0, atol=1e-4)
    assert tokenizer.chat_template and not torch.allclose(logits(merged), logits(lora_lab.models.load(shop.model)[0]))
    check_refusal(merge(shop), capsys, "is there and not empty")
    assert merge(shop, out=shop.folder / "half", dtype="bfloat16") == 0
    assert {tensor.dtype for tensor in load_file(shop.folder / "half" / "model.safetensors").values()} == {torch.bfloat16}


def whole_vocabulary():
    """The chat tokenizer with its special tokens in the vocabulary, where GGUF has them, and the merge it cannot be without."""
    tokenizer = chat_tokenizer()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={**byte_alphabet(), **SPECIAL, "on": VOCABULARY}, merges=[("o", "n")]))
    backend.pre_tokenizer, backend.decoder = tokenizer.backend.pre_tokenizer, tokenizer.backend.decoder
    backend.add_special_tokens(list(SPECIAL))
    return dataclasses.replace(tokenizer, backend=backend)


@pytest.fixture
def gguf_shop(shop):
    """The same workshop, its model a .gguf file; and one whose head is tied, with an adapter on it."""
    for tied in (False, True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": VOCABULARY + 1, "max_position_embeddings": CONTEXT, "tie_word_embeddings": tied})
        write_gguf(shop.folder / f"tied-{tied}.gguf", livelier(transformers.LlamaForCausalLM(config), 1), tokenizer=whole_vocabulary())
    shop.model = shop.folder / "tied-False.gguf"
    assert shop.finetune(out=shop.folder / "of-gguf", **{"learning-rate": 0.1}) == 0
    on_the_head = {"learning-rate": 0.1, "target-modules": ["lm_head"]}
    assert shop.finetune(model=shop.folder / "tied-True.gguf", out=shop.folder / "of-tied", **on_the_head) == 0
    return shop


def test_a_file_is_merged_in_memory(gguf_shop, capsys):
    shop, adapter = gguf_shop, gguf_shop.folder / "of-gguf"
    assert merge(shop, adapter=adapter) == 0
    assert re.search(r"default merged into 14 layers, rounded by at most .*; written to .*merged", capsys.readouterr().out)
    model, _ = lora_lab.models.load(shop.model)
    base = logits(model)
    merged, tokenizer = lora_lab.models.load(shop.folder / "merged")
    torch.testing.assert_close(logits(merged), logits(lora_lab.load(model, adapter)), rtol=0, atol=1e-5)
    assert tokenizer.chat_template and not torch.allclose(logits(merged), base)
    check_refusal(merge(shop, adapter=adapter), capsys, "--out .*merged is there and not empty")


def test_an_untied_head_is_in_the_file(gguf_shop, capsys):
    """A tied head is left out of a file: with a weight of its own it must not be."""
    shop, adapter, tied = gguf_shop, gguf_shop.folder / "of-tied", gguf_shop.folder / "tied-True.gguf"
    check_refusal(merge(shop, model=tied, adapter=adapter), capsys, "untie")
    assert merge(shop, model=tied, adapter=adapter, untie=True) == 0
    merged, _ = lora_lab.models.load(shop.folder / "merged")
    model, _ = lora_lab.models.load(tied)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight and model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), logits(lora_lab.load(model, adapter)), rtol=0, atol=1e-5)


# report ---------------------------------------------------------------------------------------------------------------------


def test_report_draws_a_run_and_several(shop, capsys):
    assert main(["report", str(shop.adapter)]) == 0
    printed = capsys.readouterr().out
    assert "3 steps" in printed and "training loss" in printed and f"curves written to {shop.adapter / 'report.html'}" in printed
    assert (shop.adapter / "report.html").read_text().startswith("<!doctype html>")
    assert shop.finetune(out=shop.folder / "second", **{"eval-data": shop.rows}) == 0
    capsys.readouterr()
    assert main(["report", str(shop.adapter), str(shop.folder / "second" / "log.jsonl"), "--out", str(shop.folder / "both.svg")]) == 0
    assert "held-out loss" in capsys.readouterr().out and (shop.folder / "both.svg").read_text().startswith("<svg ")
    check_refusal(main(["report", str(shop.model)]), capsys, "no log of a run at")
    check_refusal(main(["report", str(shop.adapter), "--out", str(shop.folder / "x.png")]), capsys, r"\.html or \.svg")


# finetune -------------------------------------------------------------------------------------------------------------------


def test_every_setting_of_the_command_reaches_the_training(shop, monkeypatch):
    class Stop(Exception):
        pass

    def seen(model, rows, config, **_):
        settings.append(config)
        raise Stop

    settings = []
    monkeypatch.setattr(lora_lab.training, "fit", seen)
    changes = {"optimizer": "lion", "lora-plus-ratio": 4.0, "save-every": 2, "eval-every": 1, "early-stopping": 3, "keep-best": True, "resume": True,
               "packing": True, "max-tokens": 200,
               "gradient-checkpointing": "attention", "max-length": 90, "schedule": "cosine", "warmup-steps": 1, "weight-decay": 0.1}  # fmt: skip
    for change in (changes, {"gradient-checkpointing": True}, {"gradient-checkpointing": 2}, {}):
        with pytest.raises(Stop):
            shop.finetune(**change)
    first = settings[0]
    assert {name.replace("_", "-"): getattr(first, name.replace("-", "_")) for name in changes} == changes
    assert [each.gradient_checkpointing for each in settings] == ["attention", True, 2, False] and first.output_dir == shop.adapter
    assert settings[3] == TrainConfig(max_steps=3, output_dir=shop.adapter)


def test_every_option_of_the_command_is_a_setting_or_is_read():
    """An option that is passed through by its name must have one."""
    command = argparse.ArgumentParser()
    finetune_command.add_options(command)
    passed = {action.dest for action in command._actions if action.default == argparse.SUPPRESS and action.dest != "help"}
    assert passed and passed <= TrainConfig.__dataclass_fields__.keys()
    assert parser().parse_args(["finetune", "--model", "m", "--data", "d", "--out", "o", "--gradient-checkpointing", "3"]).gradient_checkpointing == 3


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent to the own process")
def test_an_interrupted_finetune_says_how_to_go_on_and_goes_on_as_if_it_had_not_been(shop, capsys, monkeypatch):
    new, whole = shop.folder / "new", shop.folder / "whole"
    settings = {"max-steps": 5, "dropout": 0.1, "eval-data": shop.rows, "eval-every": 2}
    assert shop.finetune(out=whole, **settings) == 0
    capsys.readouterr()
    backward, after = Run.backward, []

    def interrupted(self, *args):
        after.append(self.result.steps)
        if self.result.steps == 2 and not self.config.resume:
            signal.raise_signal(signal.SIGINT)
        return backward(self, *args)

    monkeypatch.setattr(Run, "backward", interrupted)
    assert shop.finetune(out=new, **settings) == 130
    assert capsys.readouterr().err.rstrip().splitlines()[-1] == "interrupted after step 3 of 5; the same command with --resume goes on from there"
    assert not (new / "adapter_model.safetensors").exists()
    check_refusal(shop.finetune(out=new, **settings), capsys, "stopped after step 3 of 5: the same command with --resume goes on with it")
    assert shop.finetune(out=new, resume=True, **settings) == 0
    out, err = capsys.readouterr()
    assert "in 5 steps" in out and "nothing to resume" not in err and after == [0, 1, 2, 3, 4]  # no step is done twice
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, new))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_resuming_what_was_not_begun_begins_it_and_says_so(shop, capsys):
    assert shop.finetune(out=shop.folder / "new", resume=True) == 0
    assert "nothing to resume in" in capsys.readouterr().err


def test_resuming_with_other_settings_is_refused(shop, capsys):
    assert shop.finetune(out=shop.folder / "new", **{"save-every": 1}) == 0
    other = shop.finetune(out=shop.folder / "new", resume=True, **{"learning-rate": 0.1})
    check_refusal(other, capsys, "learning_rate=0.1: the run began with 0.0005")


def test_a_patience_without_evaluations_is_refused(shop, capsys):
    code = shop.finetune(out=shop.folder / "new", **{"eval-data": shop.rows, "early-stopping": 2})
    check_refusal(code, capsys, "early_stopping=2 needs eval_every")


def test_keep_best_and_early_stopping_are_told(shop, capsys):
    assert shop.finetune(out=shop.folder / "new", **{"eval-data": shop.rows, "eval-every": 1, "keep-best": True, "early-stopping": 1, "max-steps": 9,
                                                     "learning-rate": 3.0, "optimizer": "sgd", "schedule": "constant"}) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"the weights are those after step \d, whose held-out loss was the lowest, \d", printed) and "steps, stopped early," in printed


BAD_SETTINGS = {
    "an optimizer": ({"optimizer": "adamv"}, "optimizer='adamv'.*did you mean 'adam"),
    "a checkpointing": ({"gradient-checkpointing": "attn"}, "gradient_checkpointing='attn'"),
    "a patience without rows": ({"early-stopping": 2}, "early_stopping=2 needs eval_data"),
    "a ratio of 0": ({"lora-plus-ratio": 0}, "lora_plus_ratio=0.0"),
}


@pytest.mark.parametrize(("change", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_setting_that_makes_no_sense_is_refused(shop, capsys, change, message):
    before = shop.contents()
    check_refusal(shop.finetune(**change), capsys, message)
    assert shop.contents() == before
