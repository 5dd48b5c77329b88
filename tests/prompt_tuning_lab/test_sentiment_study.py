"""The sentiment study keeps its promises: fixed disjoint parts, the test rows behind every choice, no run done twice, a table from the file alone.

On tiny random models and made-up reviews: what is held here is the bookkeeping, and that every method of the study runs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentiment
import sentiment_data
import sentiment_methods
import sentiment_models
import sentiment_results
import torch
from sentiment_data import Review
from tiny_workshop import our_llama, plain_tokenizer

from lora_lab.models.bert import BertModel
from lora_lab.models.bert_config import BertConfig
from lora_lab.training.guards import Diverged

LM, ENCODER = sentiment_models.LanguageModel.name, sentiment_models.SentenceEncoder.name
GOOD, BAD = ("fine", "great", "warm", "clever"), ("dull", "bad", "cold", "stale")
pytestmark = pytest.mark.filterwarnings("ignore:init='text' gives")  # a byte is a token here
TRAINED = [name for name, method in sentiment_methods.METHODS.items() if method.epochs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 reviews of each kind; one of the test's last ones also stands among the first, and one is there twice."""
    (tmp_path / "rotten_tomatoes").mkdir()
    for name, words in zip(sentiment_data.FILES, (BAD, GOOD), strict=True):
        lines = [f"a {words[number % 4]} film {number}" for number in range(30)]
        lines[1], lines[3] = lines[29], lines[2]
        (tmp_path / "rotten_tomatoes" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def tiny_lm(dtype: torch.dtype) -> tuple[Any, Any]:
    return our_llama(dtype, max_position_embeddings=512), plain_tokenizer()


class Words:
    """A sentence encoder's tokenizer: called, it gives ids with a token at either end."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.backend = plain_tokenizer().backend

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *text.encode(), 2]}


def tiny_encoder(dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(1)
    sizes = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig.from_dict({**sizes, "initializer_range": 0.3})).to(dtype).eval(), Words()


@pytest.fixture
def study(folder: Path, tmp_path: Path) -> sentiment.Study:
    readers = {LM: sentiment_models.LanguageModel(tiny_lm, "fp32"), ENCODER: sentiment_models.SentenceEncoder(tiny_encoder, "fp32")}
    results = sentiment_results.Results(tmp_path / "results" / "study.jsonl")
    return sentiment.Study(sentiment_data.splits(folder, validation=8), results, readers, rows=12, sweep_rows=8, seeds=(0, 1), epochs=1)


# Parts of the data ----------------------------------------------------------------------------------------------------------------


def test_the_parts_are_disjoint_balanced_and_the_same_every_time(folder: Path) -> None:
    parts = sentiment_data.splits(folder, validation=8)
    texts = [{review.text for review in part} for part in (parts.train, parts.validation, parts.test)]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert [*map(len, (parts.train, parts.validation, parts.test))] == [*map(len, texts)] == [42, 8, 6]  # 27 - 2 lines of a kind to learn from
    assert parts == sentiment_data.splits(folder, validation=8)
    for part in (parts.train[:12], parts.validation, parts.test):
        assert [review.label for review in part] == [0, 1] * (len(part) // 2)


def test_the_test_part_is_the_last_tenth_of_each_file(folder: Path) -> None:
    assert {review.text for review in sentiment_data.splits(folder).test} == {f"a {word[number % 4]} film {number}" for word in (BAD, GOOD)
                                                                              for number in (27, 28, 29)}  # fmt: skip


def test_data_that_are_not_there_are_told_with_the_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="LORA_LAB_DATA"):
        sentiment_data.splits()


# Choosing, and looking at the test rows -------------------------------------------------------------------------------------------


@pytest.fixture
def read(study: sentiment.Study, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Review]]]:
    """A method whose answers are as good as its choice says; what its answers were asked for, in order."""
    asked: list[tuple[str, list[Review]]] = []

    def teach(reader: Any, train: list[Review], choice: dict[str, Any], seed: int) -> sentiment_methods.Taught:
        def scores(reviews: list[Review]) -> torch.Tensor:
            asked.append((f"{choice['rate']}, seed {seed}, {len(train)} rows", reviews))
            return torch.eye(2)[[review.label if number % 4 < choice["rate"] else 1 - review.label for number, review in enumerate(reviews)]]

        return sentiment_methods.Taught(scores, trained=5, nbytes=20, seconds=1.5)

    made_up = sentiment_methods.Method("made up", teach, {LM: [{"rate": 1}, {"rate": 3}, {"rate": 2}]}, epochs={LM: 2})
    monkeypatch.setitem(sentiment_methods.METHODS, "made-up", made_up)
    return asked


def test_the_test_rows_are_read_once_for_each_seed_of_what_validation_chose(study: sentiment.Study, read: list[Any]) -> None:
    study.run(LM, "made-up")
    validation, test = study.splits.validation, study.splits.test
    sweep = [(f"{rate}, seed 0, 8 rows", validation) for rate in (1, 3, 2)]
    final = [(f"3, seed {seed}, 12 rows", part) for seed in (0, 1) for part in (validation, test)]
    assert read == sweep + final
    assert [record["test"] is None for record in study.results.records.values()] == [True] * 3 + [False] * 2
    assert {record["validation"] for record in study.results.of(stage="validation")} == {0.25, 0.5, 0.75}


def test_runs_that_are_in_the_file_are_not_done_again(study: sentiment.Study, read: list[Any]) -> None:
    study.seeds = (0,)
    study.run(LM, "made-up")
    done = len(read)
    study.results = sentiment_results.Results(study.results.path)
    assert [*study.missing(LM, "made-up")] == []
    study.run(LM, "made-up")
    assert len(read) == done
    study.seeds = (0, 1)
    assert [setting["seed"] for setting in study.missing(LM, "made-up")] == [1]
    study.run(LM, "made-up")
    assert [name for name, _ in read[done:]] == ["3, seed 1, 12 rows"] * 2


def test_a_second_choice_does_not_get_to_see_the_test_rows(study: sentiment.Study, read: list[Any]) -> None:
    study.run(LM, "made-up")
    study.epochs = 2
    asked = len(read)
    with pytest.raises(SystemExit, match="choose by the test"):
        study.run(LM, "made-up")
    assert len(read) == asked


def test_studies_of_more_rows_or_other_epochs_share_a_sweep(study: sentiment.Study, read: list[Any]) -> None:
    """What is chosen from 500 rows is chosen once: all rows, or one epoch of them, are asked of the last runs alone."""
    study.run(LM, "made-up")
    done = len(read)
    study.rows, study.epochs = 40, 5
    assert [setting["stage"] for setting in study.missing(LM, "made-up")] == ["test"] * 2
    study.run(LM, "made-up")
    assert {name for name, _ in read[done:]} == {"3, seed 0, 40 rows", "3, seed 1, 40 rows"}
    assert [record["setting"]["choice"]["epochs"] for record in study.results.of(stage="test", rows=40)] == [5, 5]
    assert {record["setting"]["choice"]["epochs"] for record in study.results.of(stage="validation")} == {2}


def test_without_test_nothing_but_validation_is_read(study: sentiment.Study, read: list[Any]) -> None:
    study.reads_test = False
    assert len([*study.missing(LM, "made-up")]) == 3
    study.run(LM, "made-up")
    assert len(read) == 3 and all(reviews is study.splits.validation for _, reviews in read)


def test_a_rate_that_diverges_is_recorded_and_not_chosen(study: sentiment.Study, read: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of a study of hours."""
    made_up = sentiment_methods.METHODS["made-up"]

    def teach(reader: Any, train: list[Review], choice: dict[str, Any], seed: int) -> sentiment_methods.Taught:
        if choice["rate"] == 3:
            raise Diverged("the loss is nan at step 7")
        return made_up.teach(reader, train, choice, seed)

    monkeypatch.setitem(sentiment_methods.METHODS, "made-up", replace(made_up, teach=teach))
    study.run(LM, "made-up")
    assert [record.get("diverged", False) for record in study.results.of(stage="validation")] == [False, True, False]
    assert {record["setting"]["choice"]["rate"] for record in study.results.of(stage="test")} == {2}


def test_an_estimate_goes_by_what_was_measured(study: sentiment.Study, read: list[Any]) -> None:
    setting = next(study.missing(LM, "made-up"))
    assert study.estimate(setting) == sentiment.work(setting) * sentiment.SECONDS_A_ROW[LM]
    study.results.add({"setting": setting, "validation": 0.5, "test": None, "wall": 100.0})
    assert study.estimate(setting) == pytest.approx(100.0)
    assert study.estimate({**setting, "rows": 10 * setting["rows"]}) > 500


# The file, and the table ----------------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_short_is_no_result_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"setting": {"seed": 0}, "test": 0.5}) + '\n{"setting": {"seed": 1}, "te')
    results = sentiment_results.Results(path)
    assert {"seed": 0} in results and {"seed": 1} not in results
    results.add({"setting": {"seed": 1}, "test": 0.6})
    again = sentiment_results.Results(path)
    assert again[{"seed": 1}]["test"] == 0.6 and again[{"seed": 0}]["test"] == 0.5


def test_the_table_is_made_from_the_file_alone(tmp_path: Path) -> None:
    results = sentiment_results.Results(tmp_path / "r.jsonl")
    setting = {"model": LM, "method": "lora", "stage": "test", "choice": {"rate": 1e-3, "epochs": 1}, "rows": 2000}
    figures = {"validation": 0.8, "trained": 2_442_240, "bytes": 9_823_896, "seconds": 60}
    for seed, test in enumerate((0.80, 0.82, 0.84)):
        results.add({"setting": {**setting, "seed": seed}, "test": test, **figures})
    results.add({"setting": {**setting, "rows": 64, "seed": 0}, "test": 0.1, **figures})
    lines = sentiment_results.table(sentiment_results.Results(results.path), LM, sentiment_methods.METHODS, rows=2000).splitlines()
    assert lines[2:] == ["| LoRA, rank 8, all linear layers | 2,442,240 | 9,823,896 | 60 | 80.0 ± 0.0 (3) | 82.0 ± 2.0 (3) | rate 0.001, epochs 1 |"]


# Models and methods ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sentiment_methods.METHODS)
@pytest.mark.parametrize("model", [LM, ENCODER])
def test_every_method_runs_for_both_models(study: sentiment.Study, model: str, method: str) -> None:
    study.reads_test = False
    choice = study.final(sentiment_methods.METHODS[method].choices(model)[0])
    setting = study.setting(model, method, "test", choice, 4, 0)
    study.once(setting)
    record = study.results[setting]
    assert 0.0 <= record["validation"] <= 1.0 and 0.0 <= record["test"] <= 1.0
    assert (record["trained"] > 0) == (method in TRAINED or method == "probe") and (record["bytes"] > 0) == (method != "majority")
    assert method == "majority" or record["bytes"] < 1_000_000


def test_features_do_not_know_of_padding_and_are_made_once(study: sentiment.Study) -> None:
    reviews = [Review("ab", 0), Review("a much longer text", 1)]
    for name, source in ((LM, tiny_lm), (ENCODER, tiny_encoder)):
        together = study.readers[name].features(reviews)
        alone = torch.cat([type(study.readers[name])(source, "fp32").features([review]) for review in reviews])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        study.readers[name].source = None  # type: ignore[assignment]
        assert torch.equal(study.readers[name].features(reviews), together)


def test_a_language_models_features_are_what_its_answer_is_made_of(study: sentiment.Study) -> None:
    """The hidden state of the last token before the answer, after the last norm: the head's logits of it are the model's own."""
    model, tokenizer = tiny_lm(torch.float32)
    text = sentiment_models.LanguageModel.template.format(text="ab")
    expected = model(input_ids=torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits[0, -1]
    features = study.readers[LM].features([Review("ab", 0)])
    torch.testing.assert_close(model.lm_head(features)[0], expected, rtol=0, atol=1e-4)


def test_a_classifier_begins_as_the_probe(study: sentiment.Study) -> None:
    """Kumar et al. 2022: so that one learning rate does for the head and for what is below it."""
    reader, train = study.readers[ENCODER], study.splits.train[:12]
    model = reader.fresh(train)
    head = reader.probe(train, sentiment_models.HEAD_L2)  # type: ignore[attr-defined]
    scores = reader.scores(model, study.splits.validation)
    torch.testing.assert_close(scores, head(reader.features(study.splits.validation)), rtol=0, atol=1e-4)


def test_examples_shown_as_a_prefix_are_examples_in_the_text(study: sentiment.Study) -> None:
    reader: Any = study.readers[LM]
    examples, reviews = study.splits.train[:4], study.splits.validation
    found = reader.few_shot(examples, reviews)
    before = "".join(f"Review: {each.text}\nSentiment: {('negative', 'positive')[each.label]}\n\n" for each in examples)
    in_the_text = reader.zero_shot(before + reader.template, reviews)
    torch.testing.assert_close(found, in_the_text, rtol=0, atol=1e-4)


def test_the_tables_on_the_page_are_those_of_the_runs() -> None:
    """As `python benchmarks/sentiment.py --table` prints them from the runs that are kept."""
    results = sentiment_results.Results(sentiment.RESULTS)
    text = (Path(__file__).parents[2] / "docs" / "soft-prompts-that-work.md").read_text(encoding="utf-8")
    for model in (LM, ENCODER):
        assert sentiment_results.table(results, model, sentiment_methods.METHODS, rows=sentiment.ROWS) in text
