"""The rows of notebook 05: rotten_tomatoes in the long study's parts where it is, the bundled sentences where it is not; and the study's table."""

from __future__ import annotations

import json

import pytest

from course import movie_reviews
from course.movie_reviews import sentiment_data


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_LAB_DATA", str(tmp_path))
    return tmp_path


def texts(rows):
    return {row["text"] for row in rows}


def disjoint_and_balanced(parts):
    assert not texts(parts.train) & texts(parts.test)
    assert not texts(parts.train) & texts(parts.validation)
    assert not texts(parts.validation) & texts(parts.test)
    for part in (parts.train, parts.validation, parts.test):
        assert [row["label"] for row in part] == [0, 1] * (len(part) // 2)


def test_without_rotten_tomatoes_the_bundled_sentences_stand_in_and_it_is_told(nowhere):
    parts = movie_reviews.load()
    assert "bundled" in parts.source
    disjoint_and_balanced(parts)
    assert len(parts.train) > 2 * len(parts.validation) > 0


def test_with_it_the_parts_are_those_of_the_long_study(nowhere):
    folder = nowhere / "rotten_tomatoes"
    folder.mkdir()
    for word, name in zip(("dull", "fine"), sentiment_data.FILES, strict=True):
        (folder / name).write_text("".join(f"a {word} film {number}\n" for number in range(300)), encoding="utf-8")
    parts, study = movie_reviews.load(), sentiment_data.splits()
    disjoint_and_balanced(parts)
    assert parts.source.startswith("rotten_tomatoes")
    assert [row["text"] for row in parts.test] == [review.text for review in study.test]
    assert all(("dull" in row["text"]) == (row["label"] == 0) for row in parts.train)


def test_the_studys_table_has_a_line_for_each_method_with_test_results(monkeypatch, tmp_path):
    """Of 2,000 training rows, as the study's own table; None before it has been run."""
    monkeypatch.setattr(movie_reviews, "STUDY", tmp_path / "results.jsonl")
    model = "all-minilm-l6-v2"
    assert movie_reviews.study(model) is None
    setting = {"model": model, "method": "lora", "stage": "test", "choice": {"rate": 0.001}, "rows": 2000, "seed": 0}
    record = {"setting": setting, "validation": 0.8, "test": 0.79, "trained": 9, "bytes": 36, "seconds": 5.0}
    other = {**record, "setting": {**setting, "rows": 64}}
    movie_reviews.STUDY.write_text("".join(json.dumps(each) + "\n" for each in (record, other)), encoding="utf-8")
    headings, *lines = movie_reviews.study(model)
    assert len(lines) == 1
    assert dict(zip(headings, lines[0], strict=True))["test"] == "79.0"
