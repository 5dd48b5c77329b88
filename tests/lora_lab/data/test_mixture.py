"""Mixtures: the shares are the papers', the rows are the sources' own, and `fit` takes one as any other data."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_workshop import QUIET, chat_tokenizer, exact_model, token_rows

from lora_lab import LoraLabError, data
from lora_lab.data import mixture
from lora_lab.training import fit


def rows_of(count, name="a", length=3):
    return [{"input_ids": [index] * length, "labels": [index] * length, "name": (name, index)} for index in range(count)]


def sources(**counts):
    return {name: rows_of(count, name) for name, count in counts.items()}


SIZES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1)


# Shares -------------------------------------------------------------------------------------------------------------------------


def test_proportional_is_min_of_size_and_maximum_over_their_sum():
    """Raffel et al. 2020, section 3.5.2: r_m = min(e_m, K) / sum of min(e_n, K)."""
    mixed = mixture(sources(a=500, b=80, c=20), maximum=100)
    assert mixed.weights == pytest.approx({"a": 0.5, "b": 0.4, "c": 0.1})
    assert mixed.counts() == {"a": 100, "b": 80, "c": 20} and len(mixed) == 200


def test_without_a_maximum_every_row_comes_once():
    mixed = mixture(sources(a=50, b=8))
    assert sorted(row["name"] for row in mixed) == sorted(row["name"] for rows in sources(a=50, b=8).values() for row in rows)


def test_temperature_is_the_power_1_over_t_of_the_capped_sizes():
    """The same section: raise to 1/T and renormalise; 1 is proportional, and the more, the more equal."""
    given_rows = sources(a=900, b=100, c=25)
    rates = {"a": 400**0.5, "b": 100**0.5, "c": 25**0.5}
    assert mixture(given_rows, temperature=2, maximum=400).weights == pytest.approx({name: rate / 35 for name, rate in rates.items()})
    assert mixture(given_rows, temperature=1).weights == mixture(given_rows).weights
    assert mixture(given_rows, temperature=1e9).weights == pytest.approx(mixture(given_rows, "equal").weights, rel=1e-6)
    spread = [max(mixture(given_rows, temperature=t).weights.values()) for t in (0.5, 1, 2, 4)]
    assert spread == sorted(spread, reverse=True)


def test_weights_by_hand_are_shares_of_their_sum():
    mixed = mixture(sources(a=10, b=10, c=10), {"b": 1, "a": 2, "c": 1}, size=40)
    assert mixed.weights == {"a": 0.5, "b": 0.25, "c": 0.25} and mixed.counts() == {"a": 20, "b": 10, "c": 10}


@given(SIZES, st.sampled_from([1, 2, 5]), st.none() | st.integers(1, 80), st.integers(60, 300))
def test_counts_sum_to_the_size_and_are_less_than_a_row_from_the_shares(sizes, temperature, maximum, size):
    mixed = mixture(sources(**sizes), temperature=temperature, maximum=maximum, size=max(size, sum(sizes.values())))
    assert sum(mixed.counts().values()) == len(mixed) == max(size, sum(sizes.values()))
    assert all(abs(count - mixed.weights[name] * len(mixed)) < 1 for name, count in mixed.counts().items())


# Rows -------------------------------------------------------------------------------------------------------------------------


@given(SIZES, st.integers(1, 400), st.integers(0, 3))
def test_a_source_goes_through_all_its_rows_before_one_comes_again(sizes, size, seed):
    mixed = mixture(sources(**sizes), "equal", size=size + len(sizes), seed=seed)
    names = [row["name"] for row in mixed]
    for source, rows in sizes.items():
        times = [names.count((source, index)) for index in range(rows)]
        assert max(times) - min(times) <= 1 and sum(times) == mixed.counts()[source]


def test_the_seed_decides_and_the_rows_are_the_sources_own():
    given_rows = sources(a=100, b=30)
    first, again, other = (mixture(given_rows, maximum=40, seed=seed) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert {row["name"] for row in first} != {row["name"] for row in other}  # other rows of the large source, too
    assert all(any(row is own for own in given_rows[row["name"][0]]) for row in first)


def test_the_sources_are_mixed_all_the_way():
    names = [row["name"][0] for row in mixture(sources(a=600, b=200))]
    assert all(15 <= names[at : at + 100].count("b") <= 40 for at in range(0, 800, 100))


def test_a_mixture_is_a_plain_sequence():
    mixed = mixture(sources(a=5, b=3))
    assert mixed[-1] == mixed[7] == list(mixed)[7] and mixed[2:5] == [mixed[2], mixed[3], mixed[4]]
    assert mixed[3] in mixed and len([*mixed]) == len(mixed) == 8
    with pytest.raises(IndexError):
        mixed[8]
    assert random.Random(0).sample(mixed, 2)


def test_one_epoch_of_a_longer_mixture_sees_rows_that_each_epoch_of_a_short_one_leaves_out():
    """What the docstring recommends where a large source is to be drawn from anew in every pass."""
    given_rows = sources(large=90, small=30)
    short, long = mixture(given_rows, maximum=30), mixture(given_rows, {"large": 1, "small": 1}, size=3 * 60)
    assert [len({row["name"] for row in mixed if row["name"][0] == "large"}) for mixed in (short, long)] == [30, 90]
    assert long.counts()["small"] == 3 * short.counts()["small"]


# Use --------------------------------------------------------------------------------------------------------------------------


def test_errors_name_the_source_and_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": "i", "output": "o" * length}) for length in (3, 3, 200)))
    rows, _ = data.load(path)
    assert "file: " + rows.where(2) in {place for mixed in [mixture({"file": rows})] for place in map(mixed.where, range(3))}
    with pytest.raises(LoraLabError, match=r"file: .*rows\.jsonl, line 3: the row has \d+ tokens"):
        data.encode_rows(mixture({"file": rows, "list": token_rows(4)}), chat_tokenizer(), 100)
    with pytest.raises(LoraLabError, match="list: row 1: 2 input_ids but 1 labels"):
        data.encode_rows(mixture({"file": token_rows(4), "list": [*token_rows(1), {"input_ids": [1, 2], "labels": [1]}]}), None)


def test_a_row_that_repeats_is_encoded_once_and_shared():
    class Counting:
        chat_template = None
        eos_token_id = bos_token_id = None
        calls = 0

        def encode(self, text, add_special_tokens=False):
            Counting.calls += 1
            return list(text.encode())

    rows = [{"instruction": "i", "output": "o"}, {"instruction": "j", "output": "p"}]
    data.encode_rows(rows, Counting())
    of_two, Counting.calls = Counting.calls, 0
    mixed = mixture({"a": rows[:1], "b": rows[1:]}, "equal", size=10)
    examples = data.encode_rows(mixed, Counting())
    assert Counting.calls == of_two and len(examples) == 10
    assert len({id(example) for example in examples}) == 2
    assert examples == data.encode_rows(list(mixed), Counting())


@pytest.mark.parametrize("packing", [False, True])
def test_fit_trains_on_a_mixture_as_on_the_list_of_its_rows(packing):
    mixed = mixture({"a": token_rows(9), "b": token_rows(3, seed=4)}, "equal")
    config = {"epochs": 2, "micro_batch_size": 4, "packing": packing, **QUIET}
    result = fit(exact_model(), mixed, config, eval_data=mixture({"c": token_rows(3)}))
    assert result.losses == fit(exact_model(), list(mixed), config).losses and result.steps == 2 * 12 // 4
    assert result.tokens == 2 * sum(mixed.tokens().values())


def test_a_mixture_of_mixtures_is_a_mixture():
    inner = mixture(sources(a=6, b=2))
    outer = mixture({"both": inner, "c": rows_of(4, "c")})
    assert outer.counts() == {"both": 8, "c": 4}
    assert {outer.where(index) for index in range(12)} >= {"both: b: row 1", "c: row 3"}


def test_the_table_has_rows_and_tokens_of_each_source():
    mixed = mixture({"long": rows_of(30, length=9), "short": rows_of(10, length=3)}, "equal", size=40)
    assert mixed.counts() == {"long": 20, "short": 20} and mixed.tokens() == {"long": 180, "short": 60}
    lines = str(mixed).split("\n")
    assert [word for word in lines[1].split() if word != "%"] == ["long", "30", "20", "50.0", "0.67", "180", "75.0"]
    assert [word for word in lines[2].split() if word != "%"] == ["short", "10", "20", "50.0", "2.00", "60", "25.0"]
    assert len({len(line) for line in lines}) == 1
    text = mixture({"text": [{"instruction": "i", "output": "o"}]})
    assert "tokens" not in text.table() and "tokens" in text.table(chat_tokenizer())
    assert repr(text) == "Mixture(1 rows of text)"


# Mistakes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"weights": "proportinal"}, "weights='proportinal': expected 'proportional', 'equal', or a dict.*did you mean 'proportional'"),
    ({"weights": {"a": 1}}, "weight of 'b' is None: expected a number above 0 for each source"),
    ({"weights": {"a": 1, "b": 0}}, "weight of 'b' is 0: .*leave it out"),
    ({"weights": {"a": 1, "b": float("nan")}}, "weight of 'b' is nan"),
    ({"weights": {"a": 1, "b": 1, "bb": 2}}, "weights name 'bb', the sources are a, b .did you mean 'b'"),
    ({"weights": {"a": 1, "b": True}}, "weight of 'b' is True"),
    ({"temperature": 0}, "temperature=0: expected a number above 0"),
    ({"maximum": 0}, "maximum=0: expected a whole number of at least 1"),
    ({"size": 2.5}, "size=2.5: expected a whole number"),
    ({"weights": "equal", "temperature": 2}, "temperature=2 with weights='equal': it shapes weights='proportional' only"),
    ({"weights": {"a": 1, "b": 1}, "maximum": 3}, "maximum=3 with weights=.*'proportional' only"),
    ({"size": 2}, "'b' would get none of the mixture's 2 rows, its share is 0.091: raise its weight or size"),
    ({"temperature": 0.001}, "'b' would get none of the mixture's 22 rows"),
])  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(LoraLabError, match=message):
        mixture(sources(a=20, b=2), **changes)


@pytest.mark.parametrize("given_rows, message", [
    ({}, "expected a dict of name -> rows"),
    ([token_rows(2)], "expected a dict of name -> rows"),
    ({"a": []}, "'a' holds no rows"),
    ({"a": "rows.jsonl"}, r"'a' is a str, expected a list of rows \(rows, held_out = lora_lab.data.load\(path\)\)"),
    ({"a": iter([1])}, "'a' is a list_iterator, expected a list of rows"),
    ({1: token_rows(1)}, "the source 1: a name is text"),
])  # fmt: skip
def test_sources_that_are_none_are_refused(given_rows, message):
    with pytest.raises(LoraLabError, match=message):
        mixture(given_rows)
