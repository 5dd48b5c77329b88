"""Users' files to tables, and folders to parts: what is read as it is, and every mistake named with its file and line."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import huggingface_hub
import pyarrow.parquet
import pytest
from shared_data import folder_of
from task_tools import jsonl, opinions, table

from lora_lab import LoraLabError
from lora_lab.data.tables import read_parts, read_table
from lora_lab.data.tables.folders import part_of


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def cells(tmp_path, name, text):
    return [list(row.values()) for row in read_table(written(tmp_path, name, text))]


# Files ------------------------------------------------------------------------------------------------------------------------


def test_a_csv_may_have_line_breaks_quotation_marks_and_delimiters_in_its_texts(tmp_path):
    """RFC 4180, section 2: rules 6 and 7."""
    text = 'id,dialogue,summary\r\n1,"A: ""Hi"", all.\nB: Bye.",They meet.\r\n\r\n2,x,y\r\n'
    rows = read_table(written(tmp_path, "d.csv", text))
    assert rows[0] == {"id": "1", "dialogue": 'A: "Hi", all.\nB: Bye.', "summary": "They meet."} and len(rows) == 2
    assert [rows.where(index).rpartition(", ")[2] for index in range(2)] == ["line 2", "line 5"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_found(tmp_path, delimiter):
    rows = [{"text": "Good, but; dear | really", "label": "1"}, {"text": "Bad", "label": "0"}]
    assert list(read_table(table(tmp_path / "t.csv", rows, delimiter))) == rows


def test_quotation_marks_in_a_tsv_are_marks_of_the_text_unless_every_field_is_quoted_as_a_whole(tmp_path):
    """GLUE's SST-2 quotes nothing; pandas quotes the fields that have a quotation mark in them."""
    glue = cells(tmp_path, "glue.tsv", 'sentence\tlabel\n"so-called comedy\t0\n"a" is fine\t1\n')
    assert glue == [['"so-called comedy', "0"], ['"a" is fine', "1"]]
    assert cells(tmp_path, "pandas.tsv", 'sentence\tlabel\n"a ""good"" one"\t1\nb\t0\n') == [['a "good" one', "1"], ["b", "0"]]
    assert cells(tmp_path, "lines.tsv", 'sentence\tlabel\n"a\nb"\t1\n') == [["a\nb", "1"]]


@pytest.mark.parametrize(("first", "columns"), [
    ("text\tlabel", ["text", "label"]), ("\ttext", ["column 1", "text"]),
    ("A film.\t1", ["column 1", "column 2"]), ("A film.\tpositive", ["column 1", "column 2"]), ("x" * 61 + "\ty", ["column 1", "column 2"]),
    ("same\tsame", ["column 1", "column 2"]),
])  # fmt: skip
def test_a_first_row_that_is_data_is_no_header(tmp_path, first, columns):
    rows = read_table(written(tmp_path, "t.tsv", f"{first}\nAnother.\tpositive\nThird.\tnegative\n"))
    assert rows.columns == columns and len(rows) == (2 if "text" in columns else 3)


def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_no_text(tmp_path):
    """UCI's imdb file has U+0085 in its sentences."""
    assert cells(tmp_path, "t.txt", b"\xef\xbb\xbfone\xc2\x85two\t1\r\nthree\t0\r\n") == [["one\x85two", "1"], ["three", "0"]]


def test_json_arrays_and_lines_are_tables_too(tmp_path):
    rows = [{"Review Text": "a", "n": None}, {"Review Text": "b", "more": [1]}]
    for name, text in (("a.json", json.dumps(rows, indent=1)), ("a.jsonl", "\n".join(map(json.dumps, rows)))):
        read = read_table(written(tmp_path, name, text))
        assert list(read) == rows and read.columns == ["Review Text", "n", "more"]


def test_empty_cells_that_end_the_first_row_are_columns_without_a_name(tmp_path):
    """As spreadsheets leave them; the header taken for a row would be a class of its own."""
    rows = read_table(written(tmp_path, "t.csv", "text,label,,\nOne,pos,,\nTwo,neg,x,\n"))
    assert rows.columns == ["text", "label", "column 3", "column 4"] and len(rows) == 2
    assert len(read_table(written(tmp_path, "t.csv", "One,pos,\nTwo,neg,\nThree,pos,\n"))) == 3


def test_blank_lines_long_texts_and_capital_endings_are_read(tmp_path):
    """The csv module's own limit is 131,072 characters, and is as it was afterwards."""
    limit, long = csv.field_size_limit(), "x" * 200_000
    assert cells(tmp_path, "T.CSV", f"text,label\n\n   \n{long},1\nTwo,0\n") == [[long, "1"], ["Two", "0"]]
    assert csv.field_size_limit() == limit


BROKEN = {
    "an object over several lines": ("t.json", '{\n "data": []\n}\n', "t.json, line 1: not JSON of a line.*expected an array"),
    "a field too many": ("t.csv", "text,label\na,1\nb,c,0\n", "t.csv, line 3: 3 fields, the first row has 2"),
    "an open quotation mark": ("t.csv", 'text,label\n"a,1\nb,0\n', "t.csv, line 2: .*stands in quotation marks"),
    "ragged tabs": ("t.tsv", "text\tlabel\na\t1\nb\n", "t.tsv, line 3: 1 fields"),
    "no UTF-8": ("t.csv", "text,label\ncaf\xe9,1\n".encode("latin-1"), "t.csv, line 2: not UTF-8"),
    "nothing": ("t.csv", "", "t.csv holds no rows"), "a header alone": ("t.csv", "text,label\n", "t.csv holds no rows"),
    "lists": ("t.jsonl", "[1]\n", "a row is a int, expected an object"),
    "another ending": ("t.xlsx", "x", "expected a file that ends in .csv"),
    "no Parquet": ("t.parquet", "PAR1" + 20 * "x", "t.parquet cannot be read as Parquet"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(LoraLabError, match=message):
        read_table(written(tmp_path, name, text))


# Parquet ----------------------------------------------------------------------------------------------------------------------


def parquet(path, columns, names=None):
    """As Hugging Face's datasets writes it: the classes' names beside the schema."""
    features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    rows = pyarrow.table(columns)
    if names is not None:
        rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(rows, path, row_group_size=2)
    return path


def test_classes_of_a_parquet_file_are_read_by_their_names_and_secret_labels_as_none(tmp_path):
    """The names decide, not the order: here 0 is positive."""
    rows = read_table(parquet(tmp_path / "t.parquet", {"text": ["One", "Zwei\u2028", "3"], "label": [0, 1, -1]}, ["pos", "neg"]))
    assert list(rows) == [{"text": "One", "label": "pos"}, {"text": "Zwei\u2028", "label": "neg"}, {"text": "3", "label": None}]
    assert rows.where(2) == f"{tmp_path / 't.parquet'}, row 3"
    assert read_table(parquet(tmp_path / "n.parquet", {"text": ["One"], "label": [1]}))[0] == {"text": "One", "label": 1}


def test_chats_in_a_parquet_file_are_lists_of_turns(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert read_table(parquet(tmp_path / "t.parquet", {"messages": [turns]}))[0] == {"messages": turns}


def test_a_hub_snapshot_of_parquet_files_has_their_parts(tmp_path):
    """SST-2's test labels are -1; tatsu-lab's Alpaca has a hash behind the pieces' numbers."""
    some = {"text": ["a", "b"], "label": [0, 1]}
    parquet(tmp_path / "data" / "train-00000-of-00002-a09b74b3ef9c3b56.parquet", some, ["neg", "pos"])
    parquet(tmp_path / "data" / "train-00001-of-00002-0123456789abcdef.parquet", some, ["neg", "pos"])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"text": ["c"], "label": [-1]}, ["neg", "pos"])
    parts = read_parts(tmp_path)
    assert {part: [row["label"] for row in rows] for part, rows in parts.items()} == {"train": ["neg", "pos"] * 2, "test": [None]}


@pytest.mark.parametrize("damage", ["cut", "zeros", "other"])
def test_a_damaged_parquet_file_is_refused(tmp_path, damage):
    path = parquet(tmp_path / "t.parquet", {"text": ["word " * 20] * 50, "label": [0, 1] * 25}, ["neg", "pos"])
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "zeros": whole[:-8] + bytes(8), "other": b"PAR1" + bytes(64) + whole[68:]}[damage])
    with pytest.raises(LoraLabError, match="t.parquet cannot be read as Parquet: ."):
        read_table(path)


def test_without_pyarrow_the_extra_is_named_and_the_way_around_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(LoraLabError, match=r"pip install 'lora-lab\[parquet\]'.*pandas.read_parquet\('t.parquet'\).to_json\('t.parquet.jsonl'"):
        read_table(written(tmp_path, "t.parquet", "PAR1"))


# Folders ----------------------------------------------------------------------------------------------------------------------


def test_parts_are_known_by_the_words_in_the_names_of_files(tmp_path):
    names = {"data/train-00000-of-00002.jsonl": 2, "data/train-00001-of-00002.jsonl": 3, "data/validation-00000-of-00001.jsonl": 4, "test.csv": 5}
    for name, count in names.items():
        (jsonl if name.endswith("jsonl") else table)(tmp_path / name, opinions(count))
    jsonl(tmp_path / "dataset_infos.json", [{"splits": 3}])
    jsonl(tmp_path / ".cache" / "train.jsonl", opinions(9))
    parts = read_parts(tmp_path)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 5, "validation": 4, "test": 5}
    assert parts["train"].where(2) == f"{tmp_path / 'data' / 'train-00001-of-00002.jsonl'}, line 1"


@pytest.mark.parametrize(("name", "part"), [("held_out.jsonl", "test"), ("dev.tsv", "validation"), ("dialogsum.train.jsonl", "train"),
                                            ("MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv", "test"), ("contest.csv", None),
                                            ("train_test.csv", None)])  # fmt: skip
def test_words_are_whole_words(name, part):
    assert part_of(Path(name)) == part


def test_one_file_in_a_folder_is_undivided_and_so_is_a_file(tmp_path):
    path = jsonl(tmp_path / "folder" / "rows.jsonl", opinions(4))
    assert read_parts(path).keys() == read_parts(path.parent).keys() == {"all"}


def test_labels_may_be_the_endings_of_files_or_the_names_of_folders(tmp_path):
    """Pang & Lee's rt-polarity.neg and .pos; Maas et al.'s train/neg/0_3.txt."""
    for name in ("neg", "pos"):
        written(tmp_path, f"rt.{name}", f"one {name}\n\ntwo {name}\n")
        (tmp_path / "imdb" / "train" / name).mkdir(parents=True)
        written(tmp_path, f"imdb/train/{name}/0.txt", f"a {name}\nfilm\n")
    assert list(read_parts(tmp_path / "imdb")["train"]) == [{"text": f"a {name}\nfilm", "label": name} for name in ("neg", "pos")]
    (tmp_path / "rt").mkdir()
    for name in ("neg", "pos"):
        (tmp_path / f"rt.{name}").rename(tmp_path / "rt" / f"rt.{name}")
    rows = read_parts(tmp_path / "rt")["all"]
    assert [row["label"] for row in rows] == ["neg", "neg", "pos", "pos"] and rows.where(1).endswith("rt.neg, line 3")


def test_a_hub_data_set_is_a_folder_and_one_without_tables_is_refused(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["repo_type"]))
        return str(tmp_path / name.split("/")[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    jsonl(tmp_path / "rows" / "train.jsonl", opinions(4))
    jsonl(tmp_path / "rows" / "test.jsonl", opinions(2))
    assert {*read_parts("someone/rows")} == {"train", "test"} and asked == [("someone/rows", "dataset")]
    written(tmp_path, "README.md", "x").rename((tmp_path / "columns").mkdir() or tmp_path / "columns" / "README.md")
    with pytest.raises(LoraLabError, match="the hub's 'someone/columns' holds no .csv"):
        read_parts("someone/columns")

    parquet(tmp_path / "typed" / "data" / "train-00000-of-00001.parquet", {"text": ["a"], "label": [1]})
    written(tmp_path / "typed", "LICENSE.txt", "A text, and no row.")
    asked.clear()
    assert [*read_parts("someone/typed")["all"]] == [{"text": "a", "label": 1}] and len(asked) == 1

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(LoraLabError, match="'someone/rows' is no file .*hub: no network"):
        read_parts("someone/rows")


def test_a_source_that_is_not_plain_is_refused(tmp_path):
    jsonl(tmp_path / "two" / "train-a.jsonl", opinions(2))
    jsonl(tmp_path / "two" / "train-b.jsonl", opinions(2))
    jsonl(tmp_path / "unnamed" / "a.jsonl", opinions(2))
    jsonl(tmp_path / "unnamed" / "b.jsonl", opinions(2))
    (tmp_path / "empty").mkdir()
    for source, message in ((tmp_path / "two", "more than one file for 'train': there are train-a.jsonl, train-b.jsonl"),
                            (tmp_path / "unnamed", "no train, validation or test in them: there are a.jsonl"), (tmp_path / "empty", "it is empty"),
                            ("sentimnet", "did you mean 'sentiment'"), ("no/such.csv", "no data at 'no/such.csv'")):  # fmt: skip
        with pytest.raises(LoraLabError, match=message):
            read_parts(source)


# Real data --------------------------------------------------------------------------------------------------------------------

REAL = {"rotten_tomatoes": {"all": 10_662}, "mts_dialog": {"train": 1201, "validation": 100, "test": 200}, "instructions_apache": {"all": 1622},
        "dolly": {"all": 3802}, "clothing_reviews": {"all": 3600}, "uci_sentiment/imdb_labelled.txt": {"all": 1000},
        "uci_sentiment/amazon_cells_labelled.txt": {"all": 1000}}  # fmt: skip


@pytest.mark.parametrize(("source", "counts"), REAL.items())
def test_published_files_are_read_as_they_are(source, counts):
    """The numbers of rows are those that each data set's description names."""
    name, _, file = source.partition("/")
    try:
        folder = folder_of(name)
    except SystemExit as missing:
        pytest.skip(str(missing))
    assert {part: len(rows) for part, rows in read_parts(folder / file).items()} == counts
