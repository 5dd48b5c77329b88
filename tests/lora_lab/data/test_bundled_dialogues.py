"""The bundled dialogues with their summaries: what the summarisation notebook and command say of them."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import Counter
from importlib import resources

import pytest

from lora_lab.training.evaluation import rouge

FOLDER = resources.files("lora_lab.data") / "bundled"
FILES = {"train": "dialogues_train.jsonl", "held-out": "dialogues_held_out.jsonl"}
TITLES = r"\b(Mr|Mrs|Ms|Dr)\."
NUMBER = r"\w*\d\w*(?:[.,:]\d+)*"


@pytest.fixture(scope="module")
def parts():
    return {part: [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()] for part, name in FILES.items()}


@pytest.fixture(scope="module")
def everything(parts):
    return [*parts["train"], *parts["held-out"]]


def turns(row: dict) -> list[tuple[str, str]]:
    """(who speaks, what they say)."""
    return [tuple(line.split(": ", 1)) for line in row["dialogue"].split("\n")]


def speakers(row: dict) -> set[str]:
    return {name for name, _ in turns(row)}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def says(text: str, fact: str) -> bool:
    """Whole words only: "5 euros" isn't said by "15 euros"."""
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) is not None


def test_there_are_144_dialogues_to_train_on_and_43_held_out(parts):
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 144, "held-out": 43}
    for part, rows in parts.items():
        assert [row["id"] for row in rows] == [f"{part}-{number:03d}" for number in range(1, len(rows) + 1)]


def test_the_files_are_utf8_lines_without_carriage_returns():
    for name in FILES.values():
        text = (FOLDER / name).read_bytes()
        assert text.decode("utf-8").endswith("}\n") and b"\r" not in text


def test_each_row_has_the_same_five_fields(everything):
    for row in everything:
        assert list(row) == ["id", "dialogue", "summary", "topic", "facts"]
        assert all(isinstance(row[field], str) and row[field] == row[field].strip() for field in ("id", "dialogue", "summary", "topic"))


def test_a_dialogue_has_4_to_14_turns_of_a_name_and_a_line(everything):
    for row in everything:
        assert 4 <= len(turns(row)) <= 14, row["id"]
        assert all(re.fullmatch(r"[A-Z][A-Za-z. ]+: \S.*", line) for line in row["dialogue"].split("\n")), row["id"]


def test_nobody_speaks_twice_running_nor_to_themselves(everything):
    for row in everything:
        names = [name for name, _ in turns(row)]
        assert 2 <= len({*names}) <= 3, row["id"]
        assert all(one != other for one, other in itertools.pairwise(names)), row["id"]


def test_a_dialogue_has_50_to_180_words_and_lengths_vary(everything):
    lengths = [len(row["dialogue"].split()) for row in everything]
    assert 50 <= min(lengths) < 70 and 160 < max(lengths) <= 180 and statistics.stdev(lengths) > 15


def test_a_summary_has_15_to_45_words_in_one_to_three_sentences(everything):
    for row in everything:
        sentences = re.findall(r"[.!?](?=\s|$)", re.sub(TITLES, "", row["summary"]))
        assert 15 <= len(row["summary"].split()) <= 45 and 1 <= len(sentences) <= 3, row["id"]


def test_a_summary_is_about_a_third_of_its_dialogue(everything):
    ratios = [len(row["dialogue"].split()) / len(row["summary"].split()) for row in everything]
    assert 2.5 < statistics.mean(ratios) < 3.5 and min(ratios) > 1.5


def test_each_row_names_two_to_four_facts_which_dialogue_and_summary_both_say(everything):
    """What lets code count facts that a summary lacks."""
    for row in everything:
        assert 2 <= len({*row["facts"]}) == len(row["facts"]) <= 4, row["id"]
        assert all(1 <= len(fact.split()) <= 4 for fact in row["facts"]), row["id"]
        missing = [fact for fact in row["facts"] for text in (row["dialogue"], row["summary"]) if not says(text, fact)]
        assert not missing, (row["id"], missing)


def test_the_facts_of_one_row_are_not_in_another_rows_summary(everything):
    """Else a summary of anything would pass."""
    found = [says(other["summary"], fact) for row, other in zip(everything, [*everything[1:], everything[0]], strict=True) for fact in row["facts"]]
    assert sum(found) < 0.03 * len(found)


def test_every_number_and_name_of_a_summary_stands_in_the_dialogue(everything):
    """A capital inside a sentence is a name, a day, a month or a place."""
    count = 0
    for row in everything:
        summary = re.sub(TITLES, r"\1", row["summary"])
        named = [*re.findall(NUMBER, summary), *re.findall(r"(?<=[a-z0-9,;] )[A-Z][a-z]+", summary)]
        assert not [name for name in named if not says(row["dialogue"], name)], row["id"]
        count += len(named)
    assert count > 2.5 * len(everything)


def test_a_summary_speaks_in_the_third_person(everything):
    for row in everything:
        assert not {"i", "i'm", "i've", "we", "you", "your", "my", "our"} & {*words(row["summary"])}, row["id"]
        assert "?" not in row["summary"] and "!" not in row["summary"], row["id"]


def test_a_summary_repeats_no_six_words_of_a_line(everything):
    for row in everything:
        said = set().union(*(runs(line, 6) for _, line in turns(row)))
        assert not runs(row["summary"], 6) & said, row["id"]


def test_copying_lines_is_a_poor_summary(parts):
    """The baselines a model has to beat: ROUGE-L of the whole dialogue, and of its first two and last two lines."""
    rows = parts["held-out"]
    lines = [row["dialogue"].split("\n") for row in rows]
    ends = ["\n".join([*each[:2], *each[-2:]]) for each in lines]
    for copies in (["\n".join(each) for each in lines], ends):
        assert 0.15 < rouge(copies, [row["summary"] for row in rows], kinds=["rougeL"])["rougeL"].f1 < 0.25
    said = [says(text, fact) for row, text in zip(rows, ends, strict=True) for fact in row["facts"]]
    assert sum(said) < 0.65 * len(said)


def test_no_dialogue_is_there_twice_nor_nearly(everything):
    """Within the files and across them: two share less than 5 % of their four-word runs, and none begins like another."""
    for field, share in (("dialogue", 0.05), ("summary", 0.05)):
        found = [runs(row[field], 4) for row in everything]
        assert all(len(one & other) < share * len(one | other) for one, other in itertools.combinations(found, 2))
    assert len({tuple(words(turns(row)[0][1])[:4]) for row in everything}) == len(everything)
    assert len({tuple(words(row["summary"])[:4]) for row in everything}) == len(everything)


def test_openings_are_not_from_a_mould(everything):
    first = Counter(words(turns(row)[0][1])[0] for row in everything)
    assert first["hi"] + first["hello"] + first["hey"] < 0.05 * len(everything)
    assert max(first.values()) < 0.15 * len(everything) and len(first) > 0.3 * len(everything)


def test_nobody_speaks_in_two_dialogues(parts, everything):
    """More than twice as many names as dialogues, and none of the held-out ones was trained on."""
    names = Counter(name for row in everything for name in speakers(row))
    assert len(names) > 2 * len(everything) and max(names.values()) == 1
    assert not set().union(*map(speakers, parts["train"])) & set().union(*map(speakers, parts["held-out"]))


def test_every_topic_is_in_both_parts_and_spread_over_the_file(parts):
    """So that the first rows of a file are a fair sample."""
    assert {row["topic"] for row in parts["held-out"]} == {row["topic"] for row in parts["train"]}
    assert min(Counter(row["topic"] for row in parts["train"]).values()) >= 4
    assert len({row["topic"] for row in parts["train"][:20]}) > 15


def test_quotes_and_dashes_are_ascii(everything):
    texts = [text for row in everything for text in (row["dialogue"].replace("\n", " "), row["summary"], *row["facts"])]
    assert not {character for text in texts for character in text if ord(character) > 126 or ord(character) < 32}
