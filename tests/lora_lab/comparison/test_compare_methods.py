"""python -m lora_lab compare --methods, in process: one table for every task, and mistakes told before anything is trained."""

from __future__ import annotations

import re

import pytest
from command_line import Folder, check_refusal, run
from task_tools import decoder, encoder, jsonl, opinions, saved

from lora_lab import models
from lora_lab.comparison import Results
from lora_lab.tasks.sentiment import Words

SHORT = {"precision": "fp32", "max-steps": 1, "seeds": [0, 1], "rank": 2, "num-virtual-tokens": 3, "shots": [1], "rows": 8, "held-out-rows": 4,
         "max-new-tokens": 3, "micro-batch-size": 4}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:init='text' gives")


class Shop(Folder):
    def compare(self, **changes):
        given = {"methods": "zero-shot,few-shot,prompt,lora,full", "task": "sentiment", "model": self.model, "data": self.rows, **SHORT,
                 "forgetting-data": self.other, **changes}  # fmt: skip
        return run("compare", **given)


@pytest.fixture
def shop(tmp_path, capsys):
    made = Shop(tmp_path)
    made.other = jsonl(tmp_path / "other.jsonl", [{"instruction": "Say it.", "output": "It."}] * 3)
    saved(made.model, *decoder())
    jsonl(made.rows, opinions(60))
    return made


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split(" | ")]


def test_one_table_has_every_method_with_quality_cost_and_what_was_forgotten(shop, capsys):
    out = shop.folder / "table.md"
    assert shop.compare(out=out) == 0
    printed = capsys.readouterr().out
    assert "text and label (SST-2)" in printed and "Review: " in printed
    heading, _, *lines = [cells(line) for line in out.read_text().splitlines()]
    assert heading == ["method", "accuracy (%)", "F1 (macro) (%)", "AUC (%)", "trained", "MiB predicted", "MiB measured", "seconds", "bytes per task",
                       "ms per answer", "perplexity, other.jsonl", "chosen"]  # fmt: skip
    rows = {line[0]: dict(zip(heading, line, strict=True)) for line in lines}
    assert [*rows] == ["largest class", "zero-shot", "few-shot", "soft prompt", "LoRA", "full fine-tuning"]
    for title, row in rows.items():
        assert (re.fullmatch(r"\d+\.\d ± \d+\.\d \(2\)", row["accuracy (%)"]) is not None) == (title not in ("largest class", "zero-shot")), title
    before, after = rows["full fine-tuning"]["perplexity, other.jsonl"].split(" -> ")
    assert rows["zero-shot"]["perplexity, other.jsonl"] == f"{before} -> {before}" and float(after) > 1
    assert rows["soft prompt"]["trained"] == "48" and rows["LoRA"]["chosen"].startswith("learning rate 0.0")


def test_a_comparison_that_was_stopped_goes_on_from_its_results(shop, capsys):
    results = shop.folder / "runs.jsonl"
    given = {"methods": "lora", "results": results, "seeds": [0], "no-forgetting": True}
    assert shop.compare(**given, **{"forgetting-data": None}) == 0
    first, lines = capsys.readouterr(), results.read_text().splitlines(keepends=True)
    assert first.err.count("lora       validation") == 3 and len(Results(results).records) == 4
    results.write_text("".join(lines[:2]))
    assert shop.compare(**given, **{"forgetting-data": None}) == 0
    assert capsys.readouterr().err.count("lora       validation") == 1 and len(Results(results).records) == 4


def test_a_method_that_cannot_do_it_does_not_keep_the_others_from_it(shop, capsys):
    saved(shop.folder / "short", *decoder(max_position_embeddings=64))
    assert shop.compare(model=shop.folder / "short", methods="few-shot,zero-shot", **{"no-forgetting": True, "forgetting-data": None}) == 0
    printed = capsys.readouterr().out
    assert "\nzero-shot " in printed and re.search(r"^few-shot: .*the model's context is 64", printed, re.MULTILINE)
    code = shop.compare(model=shop.folder / "short", methods="few-shot", **{"no-forgetting": True, "forgetting-data": None})
    check_refusal(code, capsys, "no method could do it: few-shot: .*the model's context is 64")


def test_a_part_that_no_row_of_fits_is_told_before_anything_is_trained(shop, capsys):
    """All rows of a test of their own are too long."""
    long = jsonl(shop.folder / "long.jsonl", [{"text": f"{text} film " * 90, "label": label} for label, text in enumerate(("bad", "good"))])
    message = r"error: \S*rows.jsonl has no test rows \(it has: train .*2 longer than 512 tokens \(test\)"
    check_refusal(shop.compare(methods="lora", **{"test-data": long}), capsys, message)


def test_rows_leave_room_for_a_prompt_where_one_is_asked_for(shop, capsys):
    """Of 80 positions 12 are the prompt's, so no row has more than 68 tokens, nor one of what is measured elsewhere."""
    saved(shop.folder / "short", *decoder(max_position_embeddings=80))
    jsonl(shop.rows, [{"text": f"{row['text']} {number}" + " and" * (number % 10), "label": row["label"]} for number, row in enumerate(opinions(60))])
    jsonl(shop.other, [{"instruction": "Say it.", "output": "It. " * (1 + number)} for number in range(8)])
    given = {"model": shop.folder / "short", "methods": "prompt,zero-shot", "num-virtual-tokens": 12, "rows": None, "seeds": [0]}
    assert shop.compare(**given) == 0
    printed = capsys.readouterr().out
    assert re.search(r"longer than 68 tokens \(train\)", printed) and re.search(r"^soft prompt ", printed, re.MULTILINE)
    assert shop.compare(**{**given, "methods": "zero-shot"}) == 0 and "longer than 80 tokens" in capsys.readouterr().out


def test_more_virtual_tokens_than_the_context_are_told_at_once(shop, capsys):
    saved(shop.folder / "short", *decoder(max_position_embeddings=80))
    given = {"model": shop.folder / "short", "methods": "prompt,zero-shot", "num-virtual-tokens": 80}
    check_refusal(shop.compare(**given), capsys, "--num-virtual-tokens 80: the model's context is 80, which leaves no room for a row")


def test_other_weights_at_the_same_place_are_another_model(shop, capsys):
    given = {"methods": "zero-shot", "results": shop.folder / "runs.jsonl", "no-forgetting": True, "forgetting-data": None}
    runs = []
    for seed in (1, 1, 2):
        if seed == 2:
            saved(shop.model, *decoder(seed=2))
        assert shop.compare(**given) == 0
        runs.append(capsys.readouterr().err.count("zero-shot  "))
    assert runs[0] == runs[2] > 0 and runs[1] == 0


def test_a_models_own_head_has_nothing_else_to_forget(shop, capsys):
    """Which is said below the table; data that is given for it is refused."""
    model, tokenizer = encoder()
    head = {**model.config.to_dict(), "num_labels": 2, "id2label": {0: "negative", 1: "positive"}, "architectures": ["BertForSequenceClassification"]}
    saved(shop.folder / "head", models.BertForSequenceClassification(models.BertConfig.from_dict(head)).eval(), tokenizer)
    given = {"model": shop.folder / "head", "methods": "lora", "seeds": [0]}
    assert shop.compare(**given, **{"forgetting-data": None}) == 0
    printed = capsys.readouterr().out
    assert "\nLoRA " in printed and printed.endswith("forgetting: a BertForSequenceClassification does nothing but its classes\n")
    check_refusal(shop.compare(**given), capsys, "so nothing else can be forgotten")


def test_few_rows_are_counted_where_few_are_wanted_and_all_where_too_many_are_too_long(shop, capsys, monkeypatch):
    counted, examples = [], Words.examples
    monkeypatch.setattr(Words, "examples", lambda reader, rows: counted.append(len(rows)) or examples(reader, rows))
    given = {"methods": "zero-shot", "rows": 2, "held-out-rows": 2, "no-forgetting": True, "forgetting-data": None}
    assert shop.compare(**given) == 0 and counted[:4] == [8, 6, 6]
    capsys.readouterr()
    jsonl(shop.rows, [{**row, "text": f"{row['text']} {number}" + " and" * (150 * (number % 12 > 1))} for number, row in enumerate(opinions(120))])
    assert shop.compare(**given) == 0 and re.search(r"^  train       2 rows", capsys.readouterr().out, re.MULTILINE)


def test_a_comparison_shows_how_far_it_is(shop, capsys, monkeypatch):
    monkeypatch.setattr("lora_lab.models.progress.PATIENCE_SECONDS", 0)
    assert shop.compare(methods="zero-shot", **{"no-forgetting": True, "forgetting-data": None}) == 0
    assert "count tokens: " in capsys.readouterr().err


def test_an_encoder_is_compared_by_its_head(shop, capsys):
    saved(shop.folder / "encoder", *encoder())
    other = jsonl(shop.folder / "d.jsonl", [{"dialogue": "the cat sat", "summary": "cat"}, {"dialogue": "bad film", "summary": "film"}])
    assert shop.compare(model=shop.folder / "encoder", methods="zero-shot,lora", seeds=[0], **{"forgetting-data": other}) == 0
    assert "own summary nearest, d.jsonl" in capsys.readouterr().out


BAD = {
    "unknown method": ({"methods": "lora,qlora"}, "'qlora' is none of zero-shot, few-shot, lora, full, prompt.*did you mean 'lora'"),
    "no task": ({"task": None}, "--methods needs --task"), "no data": ({"data": None}, "--methods needs --data"),
    "an adapter": ({"adapter": "x"}, "--methods compares ways to learn a task"), "no rows": ({"rows": 0}, "--rows 0: expected at least 1"),
    "no shots": ({"shots": [0]}, "--shots 0"), "no such seed": ({"seeds": [0, -1]}, "--seeds 0 -1: expected whole numbers of at least 0"),
    "no such module": ({"target-modules": ["q_prj"]}, "error: .*'q_prj'"),
    "no passes": ({"epochs": 0, "max-steps": None}, "epochs=0"), "no batch": ({"micro-batch-size": 0}, "--micro-batch-size 0"),
    "another table": ({"out": "t.html"}, "a file that ends in .md"), "nothing elsewhere": ({"no-forgetting": True}, "--no-forgetting with --forget"),
    "no steps": ({"max-steps": 0}, "max_steps=0"), "rows without methods": ({"methods": None}, "--data needs --methods"),
    "a task without methods": ({"methods": None, "data": None, **dict.fromkeys(SHORT), "forgetting-data": None, "adapter": "x", "prompt": "y"},
                               "--task needs --methods"),
    "nothing to do": ({"methods": None, "task": None, "data": None, **dict.fromkeys(SHORT), "forgetting-data": None}, "needs --adapter and --prompt"),
}  # fmt: skip


def test_files_that_cannot_be_written_are_told_before_anything_is_read(shop, capsys):
    (shop.folder / "file").write_text("")
    (shop.folder / "folder.md").mkdir()
    for change in ({"results": shop.folder / "file" / "r.jsonl"}, {"results": shop.folder / "folder.md"}, {"out": shop.folder / "folder.md"},
                   {"out": shop.folder / "file" / "t.md"}):  # fmt: skip
        check_refusal(shop.compare(data="nowhere.csv", **change), capsys, "could not save anything to ")


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_comparison_that_makes_no_sense_is_refused(shop, capsys, change, message):
    before = shop.contents()
    check_refusal(shop.compare(**change), capsys, message)
    assert shop.contents() == before
