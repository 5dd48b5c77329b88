"""finetune and evaluate with --task, in process: the way through on each kind of model, and every mistake as one line before anything is written."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from command_line import Folder, check_refusal, run
from task_tools import decoder, dialogues, encoder, instructions, jsonl, opinions, saved, t5, table

import lora_lab
import lora_lab.__main__
from lora_lab.files import in_use
from lora_lab.tasks import gather
from lora_lab.tasks.record import RECORD
from lora_lab.tasks.sentiment import Words


class Shop(Folder):
    """A causal model, an encoder and an encoder-decoder, and a table of opinions."""

    def __init__(self, folder):
        super().__init__(folder)
        self.encoder, self.t5, self.table, self.out = folder / "encoder", folder / "t5", folder / "opinions.csv", folder / "out"

    def finetune(self, **changes):
        given = {"task": "sentiment", "model": self.model, "data": self.table, "out": self.out, "precision": "fp32", "max-steps": 3, "rank": 2,
                 **changes}  # fmt: skip
        return run("finetune", **given)

    def evaluate(self, **changes):
        return run("evaluate", **{"task": "sentiment", "model": self.model, "data": self.table, "precision": "fp32", "max-new-tokens": 4, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    shop = Shop(tmp_path_factory.mktemp("tasks"))
    for folder, model in ((shop.model, decoder), (shop.encoder, encoder), (shop.t5, t5)):
        saved(folder, *model())
    rows = [{"Review Text": row["text"] + f" {number}", "Stars": ("poor", "fine")[row["label"]]} for number, row in enumerate(opinions(40))]
    table(shop.table, rows, ";")
    return shop


@pytest.fixture
def shop(made, tmp_path, capsys):
    capsys.readouterr()
    return made.copied(tmp_path / "shop")


def numbers(line):
    return [float(word) for word in re.findall(r"[-+]?\d+\.\d+", line)]


# The way through --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "encoder", "t5"])
def test_sentiment_is_learned_from_any_table_by_each_kind_of_model(shop, capsys, kind):
    """The adapter remembers its classes, so that it is asked later as it was taught."""
    model = getattr(shop, kind)
    assert shop.finetune(model=model, **{"label-column": "Stars", "labels": ["fine", "poor"], "max-steps": 12, "learning-rate": 1e-2}) == 0
    printed = capsys.readouterr().out
    assert "text        'Review Text', by its name" in printed and "classes     fine -> fine, poor -> poor" in printed
    assert re.search(r"^held-out accuracy \d\.\d+ -> \d\.\d+", printed, re.MULTILINE) and f"--data {shop.table}" in printed
    assert json.loads((shop.out / RECORD).read_text())["classes"]["names"] == ["fine", "poor"]
    assert shop.evaluate(model=model, adapter=shop.out, **{"label-column": "Stars"}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("test rows: 4, fp32") for line in lines) and lines[-4].split() == ["base", str(shop.out), "change"]
    assert [line.split()[0] for line in lines[-3:]] == ["accuracy", "F1", "AUC"]


def test_what_evaluate_prints_is_what_the_library_says_of_the_same_rows(shop, capsys):
    assert shop.finetune(model=shop.encoder, **{"label-column": "Stars"}) == 0
    capsys.readouterr()
    assert shop.evaluate(model=shop.encoder, adapter=shop.out, **{"label-column": "Stars"}) == 0
    lines = capsys.readouterr().out.splitlines()
    material = gather("sentiment", shop.table, {"label": "Stars"})
    base, tokenizer = lora_lab.models.load(shop.encoder)
    reader = material.reader(base, tokenizer)
    untaught = reader.scores(base, material.test)
    taught = reader.scores(lora_lab.load(reader.restored(base), shop.out), material.test)
    for line, name in zip(lines[-3:], ("accuracy", "F1 (macro)", "AUC"), strict=True):
        assert numbers(line)[:2] == pytest.approx([untaught[name], taught[name]], abs=1e-4)


@pytest.mark.parametrize(("task", "rows", "kind", "measures"), [
    ("summarization", dialogues, "model", ["loss", "clean", "rouge1", "rouge2", "rougeL", "wrong"]),
    ("summarization", dialogues, "t5", ["loss", "clean", "rouge1", "rouge2", "rougeL", "wrong"]),
    ("instruction", instructions, "model", ["loss", "clean"]), ("reviews", instructions, "model", ["loss", "clean"]),
])  # fmt: skip
def test_texts_are_learned_and_judged(shop, capsys, task, rows, kind, measures):
    data, model = jsonl(shop.folder / "texts.jsonl", rows(30)), getattr(shop, kind)
    assert shop.finetune(task=task, data=data, model=model, **{"learning-rate": 1e-2}) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert shop.evaluate(task=task, data=data, model=model, adapter=shop.out, split="validation", limit=2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-len(measures) :]] == measures
    assert ("without any model, the text itself: rouge1" in "\n".join(lines)) == (task == "summarization")


def test_held_out_rows_of_their_own_are_watched_and_no_row_is_held_back(shop, capsys):
    other = jsonl(shop.folder / "other.jsonl", [{"Review Text": "fine cat", "Stars": "fine"}, {"Review Text": "poor dog", "Stars": "poor"}])
    assert shop.finetune(**{"label-column": "Stars", "eval-data": other}) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  train       40 rows", printed, re.MULTILINE) and re.search(r"^  validation  2 rows", printed, re.MULTILINE)
    assert shop.evaluate(data=other, split="all", **{"label-column": "Stars"}) == 0 and "all rows: 2" in capsys.readouterr().out


def test_the_command_that_evaluates_is_told_with_rows_that_were_not_trained_on(shop, capsys):
    """With --eval-data all rows of --data are trained on, so a tenth of them would be no test. The command runs as it is told."""
    rows = [{"Review Text": f"fine cat {number}", "Stars": ("fine", "poor")[number % 2]} for number in range(4)]
    other = jsonl(shop.folder / "held out.jsonl", rows)
    for given, data in (({"eval-data": other}, f"--data '{other}' --split all"), ({}, f"--data {shop.table}")):
        assert shop.finetune(**{"label-column": "Stars", **given}) == 0
        command = capsys.readouterr().out.splitlines()[-1]
        assert command.endswith(f"{data} --label-column Stars")
        assert lora_lab.__main__.main([*shlex.split(command)[3:], "--precision", "fp32"]) == 0
        capsys.readouterr()


def test_rows_that_were_trained_on_are_no_test(shop, capsys, monkeypatch):
    """With other held-out rows nothing of --data is held back, whatever a new division of it says."""
    other = jsonl(shop.folder / "other.jsonl", [{"Review Text": f"{stars} cat", "Stars": stars} for stars in ("fine", "poor")])
    named = {"label-column": "Stars"}
    assert shop.finetune(**{"eval-data": other, **named}) == 0
    for split in ("test", "validation"):
        message = f"the {split} rows of .*opinions.csv would be rows that .*out was trained on"
        check_refusal(shop.evaluate(adapter=shop.out, split=split, **named), capsys, message)
    assert shop.evaluate(adapter=shop.out, split="all", **named) == shop.evaluate(adapter=shop.out, split="all", data=other, **named) == 0
    record = json.loads((shop.out / RECORD).read_text())
    monkeypatch.chdir(shop.table.parent)  # the same file, by another name
    check_refusal(shop.evaluate(adapter=shop.out, data=shop.table.name, **named), capsys, "would be rows that .*out was trained on")
    (shop.out / RECORD).write_text(json.dumps({name: record[name] for name in ("task", "words", "columns", "classes")}))  # as of an older version
    assert shop.evaluate(adapter=shop.out, **named) == 0


@pytest.mark.parametrize(("change", "message"), [
    ({"columns": {"text": "Title", "label": "Stars"}}, "its columns were .*'Title'.*name the same"),
    ({"classes": {"names": ["fine", "poor"], "of": {"fine": 0, "poor": 0}}}, "its classes were .*leave --labels out")],
    ids=["columns", "classes"])  # fmt: skip
def test_another_division_of_the_same_rows_is_no_test(shop, capsys, change, message):
    """The tenth is chosen by a hash of the texts, of each class: other texts or classes are another tenth."""
    assert shop.finetune(**{"label-column": "Stars"}) == 0
    record = json.loads((shop.out / RECORD).read_text())
    (shop.out / RECORD).write_text(json.dumps({**record, **change}))
    check_refusal(shop.evaluate(adapter=shop.out, labels=["fine", "poor"], **{"label-column": "Stars"}), capsys, message)


def test_classes_keep_their_order_whatever_they_are_called_later(shop, capsys):
    assert shop.finetune(model=shop.encoder, **{"label-column": "Stars", "labels": ["fine", "poor"]}) == 0
    scores = []
    for labels in (None, ["fine", "poor"], ["poor", "fine"]):
        capsys.readouterr()
        assert shop.evaluate(model=shop.encoder, adapter=shop.out, **{"label-column": "Stars", "labels": labels}) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1] == scores[2]
    others = {"label-column": "Stars", "labels": ["fine=great", "poor=dull"]}
    check_refusal(shop.evaluate(model=shop.encoder, adapter=shop.out, **others), capsys, "'great' is none of the classes that the adapter")


def test_no_record_of_an_earlier_adapter_stays_beside_another(shop):
    rows = jsonl(shop.folder / "rows.jsonl", instructions(6))
    assert shop.finetune(**{"label-column": "Stars"}) == 0 and (shop.out / RECORD).exists()
    assert shop.finetune(task=None, data=rows) == 0 and not (shop.out / RECORD).exists()


def test_what_was_understood_is_told_before_it_is_computed_and_no_other_row_is_read(shop, capsys, monkeypatch):
    """--limit 2 is of the test rows alone."""
    said, counted, scores, examples = [], [], Words.scores, Words.examples
    monkeypatch.setattr(Words, "scores", lambda *given: said.append(capsys.readouterr().out) or scores(*given))
    monkeypatch.setattr(Words, "examples", lambda reader, rows: counted.append(len(rows)) or examples(reader, rows))
    assert shop.evaluate(limit=2, **{"label-column": "Stars"}) == 0
    assert "test rows: 2, fp32" in said[0] and "the first row as the model reads it" in said[0] and counted == [2]


def test_counting_and_embedding_show_how_far_they_are(shop, capsys, monkeypatch):
    monkeypatch.setattr("lora_lab.models.progress.PATIENCE_SECONDS", 0)
    assert shop.finetune(model=shop.encoder, **{"label-column": "Stars"}) == 0
    shown = capsys.readouterr().err
    assert "count tokens: " in shown and "embed: " in shown


def test_a_run_goes_on_in_the_precision_that_it_began_in(shop, monkeypatch):
    """Whatever is faster at the moment."""
    given = {"label-column": "Stars", "save-every": 1, "precision": "auto"}
    for fastest in ("fp32", "bf16-mixed"):
        monkeypatch.setattr("lora_lab.training.fastest_precision", lambda device, fastest=fastest: fastest)
        assert shop.finetune(resume=True if fastest == "bf16-mixed" else None, **given) == 0


def test_the_words_that_are_asked_in_can_be_chosen_and_are_remembered(shop, capsys):
    assert shop.finetune(template="{text} Verdict:", **{"label-column": "Stars"}) == 0
    assert shop.evaluate(adapter=shop.out, **{"label-column": "Stars"}) == 0
    assert capsys.readouterr().out.count(" Verdict:[ ") == 2


def test_rows_and_commands_without_a_task_are_as_ever(shop, capsys):
    rows = jsonl(shop.folder / "rows.jsonl", instructions(6))
    assert shop.finetune(task=None, data=rows) == 0 and not (shop.out / RECORD).exists()
    assert shop.evaluate(task=None, data=rows, adapter=shop.out) == 0 and "perplexity" in capsys.readouterr().out


# Mistakes ---------------------------------------------------------------------------------------------------------------------

BAD = {
    "unknown task": ({"task": "sentimnt"}, "--task sentimnt: expected one of .*did you mean 'sentiment'"),
    "column without a task": ({"task": None, "text-column": "a"}, "--text-column needs --task"),
    "labels without a task": ({"task": None, "labels": ["a", "b"]}, "--labels needs --task"),
    "template without a task": ({"task": None, "template": "{text}"}, "--template '{text}' needs --task"),
    "a table without a task": ({"task": None}, "is a table: its columns are found for a task, --task sentiment"),
    "no such column": ({"label-column": "Star"}, "--label-column Star: the columns are .*did you mean 'Stars'"),
    "no such data": ({"data": "nowhere.csv"}, "no data at 'nowhere.csv'"),
    "no place for the text": ({"label-column": "Stars", "template": "Verdict:"}, r"has no \{text\}"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line_and_nothing_is_written(shop, capsys, change, message):
    before = shop.contents()
    check_refusal(shop.finetune(**change), capsys, message)
    assert shop.contents() == before


def test_an_evaluation_that_makes_no_sense_is_refused(shop, capsys):
    named = {"label-column": "Stars"}
    for change, message in (({"metric": "rouge", **named}, "--metric with --task sentiment: a task has its own measures"),
                            ({"split": "tset", **named}, "--split tset: expected one of test"), ({"limit": 0, **named}, "--limit 0"),
                            ({"task": None, "split": "test", "data": jsonl(shop.folder / "r.jsonl", instructions(3))}, "--split test needs --task"),
                            ({"task": "summarization"}, "--task sentiment")):  # fmt: skip
        check_refusal(shop.evaluate(**change), capsys, message)


def test_an_adapter_that_is_not_there_is_told_before_anything_is_scored(shop, capsys, monkeypatch):
    monkeypatch.setattr("lora_lab.models.load", None)
    for changes in ({}, {"task": None, "data": jsonl(shop.folder / "r.jsonl", instructions(3))}):
        named = {"label-column": "Stars"} if not changes else {}
        check_refusal(shop.evaluate(adapter=shop.folder / "typo", **named, **changes), capsys, "typo' does not exist")


def test_a_run_that_was_stopped_is_told_before_anything_is_read(shop, capsys, monkeypatch):
    """And one that still trains there, too."""
    (shop.out / "snapshots" / "step-000002").mkdir(parents=True)
    monkeypatch.setattr("lora_lab.training.snapshots._checked_state", lambda folder: {"step": 2, "steps": 4})
    check_refusal(shop.finetune(data="nowhere.csv"), capsys, "holds a run that was stopped after step 2 of 4: the same command with --resume")
    check_refusal(shop.finetune(data="nowhere.csv", resume=True), capsys, "no data at 'nowhere.csv'")
    with in_use(shop.out, "trains"):
        check_refusal(shop.finetune(data="nowhere.csv", resume=True), capsys, "another process trains in")


def test_an_adapter_of_another_task_is_refused(shop, capsys):
    assert shop.finetune(**{"label-column": "Stars"}) == 0
    data = jsonl(shop.folder / "d.jsonl", dialogues(20))
    check_refusal(shop.evaluate(task="summarization", data=data, adapter=shop.out), capsys, "was taught 'sentiment'")


@pytest.mark.real
def test_a_model_that_was_never_taught_ranks_the_bundled_opinions(smollm2, capsys):
    """All 120 held-out sentences give an AUC of 0.79."""
    assert run("evaluate", task="sentiment", model="smollm2-135m-instruct-q4", data="sentiment", limit=48) == 0
    assert numbers(capsys.readouterr().out.splitlines()[-1])[0] > 0.65


def test_an_encoder_writes_no_summaries(shop, capsys):
    data = jsonl(shop.folder / "d.jsonl", dialogues(20))
    check_refusal(shop.finetune(task="summarization", data=data, model=shop.encoder), capsys, "a BertModel reads text and writes none")
