"""The bundled reviews: what the README and the demonstration say of them."""

from __future__ import annotations

import re
import statistics
from importlib import resources

import pytest

from lora_lab import data

SENTIMENTS = ("positive", "neutral", "negative")
BROCHURE = ("elevate", "seamless", "unparalleled", "game-changer", "game changer", "timeless", "indulge", "effortless", "must-have", "exquisite",
            "stunning", "boasts", "versatile", "sleek", "testament", "highly recommend")  # fmt: skip


@pytest.fixture(scope="module")
def train():
    return data.load("reviews")[0]


@pytest.fixture(scope="module")
def held_out():
    return data.load("reviews")[1]


@pytest.fixture(scope="module")
def everything(train, held_out):
    return [*train, *held_out]


def test_there_are_240_reviews_of_80_products_and_48_of_16_others(train, held_out):
    assert (len(train), len({row["product"] for row in train})) == (240, 80)
    assert (len(held_out), len({row["product"] for row in held_out})) == (48, 16)


def test_no_product_is_in_both_parts(train, held_out):
    for field in ("product", "input", "output"):
        assert not {row[field] for row in train} & {row[field] for row in held_out}


def test_every_product_has_one_review_of_each_sentiment(train, held_out):
    for rows in (train, held_out):
        products = {row["product"] for row in rows}
        assert sorted((row["product"], row["sentiment"]) for row in rows) == sorted((p, s) for p in products for s in SENTIMENTS)


def test_the_instruction_says_the_sentiment_in_exactly_these_words(everything):
    assert all(row["instruction"] == f"Write a {row['sentiment']} review of the following product." for row in everything)


def test_the_input_is_the_products_name_and_its_description(everything):
    described = {row["product"]: row["input"] for row in everything}
    assert all(row["input"] == described[row["product"]] and row["input"].startswith(row["product"] + ". ") for row in everything)


def test_no_review_is_there_twice(everything):
    assert len({row["output"] for row in everything}) == len(everything)
    assert len({" ".join(row["output"].lower().split()[:6]) for row in everything}) > 0.98 * len(everything)  # nor its beginning


def test_horrible_is_in_no_row(everything):
    """The demonstration asks for a horrible review: a word the training has not seen."""
    assert not [row for row in everything if "horribl" in " ".join(row.values()).lower()]


def test_lengths_vary(everything):
    words = [len(row["output"].split()) for row in everything]
    assert min(words) < 20 and max(words) > 75 and statistics.stdev(words) > 15


def test_reviews_are_not_written_like_brochures(everything):
    found = [(word, row["output"]) for row in everything for word in BROCHURE if re.search(rf"\b{word}", row["output"], re.IGNORECASE)]
    assert not found
    assert any(re.search(rf"\b{word}", row["input"], re.IGNORECASE) for row in everything for word in BROCHURE)  # the descriptions are


def test_quotes_and_dashes_are_ascii(everything):
    assert not {character for row in everything for value in row.values() for character in value if ord(character) > 126 or ord(character) < 32}


def test_the_files_are_package_data_and_remember_their_lines(train):
    folder = resources.files("lora_lab.data") / "bundled"
    assert {"reviews_train.jsonl", "reviews_held_out.jsonl"} <= {entry.name for entry in folder.iterdir()}
    assert train.where(239).endswith("reviews_train.jsonl, line 240")
