"""Files to rows: what is read, and that every mistake is named with its file and line."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab import LoraLabError, data

ROW = {"instruction": "Say one.", "output": "One."}
CHAT = {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]}


def written(tmp_path, content, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refused(path, line=None):
    """The message of the error, which has to begin with the file and, where given, the line."""
    with pytest.raises(LoraLabError) as caught:
        data.load(path)
    expected = str(path) if line is None else f"{path}, line {line}"
    assert str(caught.value).startswith(expected)
    assert line is None or str(caught.value)[len(expected)] in ":,"  # line 1 is not line 12
    return str(caught.value)


# What is read ---------------------------------------------------------------------------------------------------------------


def test_jsonl_is_one_row_a_line_and_blank_lines_count(tmp_path):
    rows, held_out = data.load(written(tmp_path, f"\n{json.dumps(ROW)}\n\n  \n{json.dumps(CHAT)}\n"))
    assert (list(rows), held_out) == ([ROW, CHAT], None)
    assert [rows.where(i).rpartition(", ")[2] for i in range(2)] == ["line 2", "line 5"]


def test_an_array_gives_the_line_each_row_begins_on(tmp_path):
    rows, _ = data.load(written(tmp_path, json.dumps([ROW, CHAT, ROW], indent=2), "rows.json"))
    assert list(rows) == [ROW, CHAT, ROW]
    lines = (tmp_path / "rows.json").read_text().split("\n")
    assert rows.lines[0] == 2 and len(set(rows.lines)) == 3
    assert all(lines[line - 1] == "  {" for line in rows.lines)


def test_an_array_on_one_line_and_one_object_are_read_too(tmp_path):
    assert list(data.load(written(tmp_path, json.dumps([ROW, ROW])))[0]) == [ROW, ROW]
    assert list(data.load(written(tmp_path, json.dumps(ROW), "one.json"))[0]) == [ROW]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    text = f"{json.dumps(ROW)}\n{json.dumps(CHAT)}\n"
    plain, _ = data.load(written(tmp_path, text))
    windows, _ = data.load(written(tmp_path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), "windows.jsonl"))
    assert list(plain) == list(windows) and plain.lines == windows.lines == [1, 2]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x1c"])
def test_unicode_line_separators_inside_a_string_do_not_end_the_line(tmp_path, character):
    """JSON allows U+2028 and U+0085 unescaped in strings (RFC 8259, section 7); str.splitlines would cut there."""
    row = {**ROW, "output": f"One{character}two"}
    text = json.dumps(row, ensure_ascii=False) if character != "\x1c" else json.dumps(row)
    rows, _ = data.load(written(tmp_path, f"{text}\n{json.dumps(ROW)}\n"))
    assert list(rows) == [row, ROW] and rows.lines == [1, 2]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1, max_size=4), st.booleans())
def test_what_json_writes_is_read_back(tmp_path_factory, outputs, as_array):
    rows = [{"instruction": "i", "input": "", "output": output} for output in outputs]
    text = json.dumps(rows, ensure_ascii=False, indent=1) if as_array else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path = tmp_path_factory.mktemp("json") / "rows"
    path.write_bytes(text.encode("utf-8"))
    assert list(data.load(path)[0]) == rows


def test_lines_are_read_one_by_one(tmp_path):
    """Beside the rows themselves no copy of the file is in memory, neither whole nor in parts."""
    path = written(tmp_path, "".join(json.dumps({"instruction": str(i), "output": "x" * 1_000}) + "\n" for i in range(3_000)))
    tracemalloc.start()
    try:
        rows, _ = data.load(path)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 3_000 and peak - now < 0.1 * path.stat().st_size < 0.1 * now


@pytest.mark.parametrize("second", ["[1]", "[", json.dumps([ROW])])
def test_an_array_after_rows_is_no_array_of_rows(tmp_path, second):
    assert "JSON" in (message := refused(written(tmp_path, f"{json.dumps(ROW)}\n{second}\n"), line=2)) or "a row is a list" in message


# What is refused ------------------------------------------------------------------------------------------------------------


BAD_ROWS = {
    "no output": ({"instruction": "Say one."}, "'output'"),
    "empty output": ({"instruction": "Say one.", "output": " \n"}, "'output'"),
    "no instruction": ({"output": "One."}, "'instruction'"),
    "number as output": ({"instruction": "Say one.", "output": 1}, "'output' is a int"),
    "null as output": ({"instruction": "Say one.", "output": None}, "'output' is a NoneType"),
    "list as input": ({"instruction": "Say one.", "input": ["x"], "output": "One."}, "'input' is a list"),
    "number as row": (7, "a row is a int"),
    "null as row": (None, "a row is a NoneType"),
    "text as row": ("Say one.", "a row is a str"),
    "other fields": ({"prompt": "Say one.", "completion": "One."}, "['completion', 'prompt']"),
    "messages without assistant": ({"messages": [{"role": "user", "content": "Hello"}]}, "no message of the assistant"),
    "silent assistant": ({"messages": [{"role": "assistant", "content": ""}]}, "no message of the assistant"),
    "no messages": ({"messages": []}, "expected a list"),
    "messages are text": ({"messages": "Hello"}, "'Hello'"),
    "unknown role": ({"messages": [{"role": "human", "content": "Hello"}, {"role": "assistant", "content": "One."}]}, "'human'"),
    "list as role": ({"messages": [{"role": ["user"], "content": "Hello"}]}, "needs a 'role'"),
    "message without content": ({"messages": [{"role": "assistant"}]}, "text 'content'"),
    "message is text": ({"messages": ["Hello"]}, "'Hello'"),
    "half a character": ({"instruction": "Say one.", "output": "One \ud83d"}, "half of a character"),
    "half a character in a message": ({"messages": [{"role": "assistant", "content": "\udc00"}]}, "half of a character"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_learned_from_is_named_with_its_line(tmp_path, row, reason):
    as_lines = written(tmp_path, f"{json.dumps(ROW)}\n\n{json.dumps(row)}\n")
    assert reason in refused(as_lines, line=3)
    as_array = json.dumps([ROW, row], indent=2)
    assert as_array.split("\n")[4] == "  },"
    assert reason in refused(written(tmp_path, as_array, "rows.json"), line=6)


GOOD = json.dumps(ROW) + "\n"
BROKEN = {
    "a word": (GOOD + GOOD + "oops\n", 3),
    "a cut line": (GOOD + '{"instruction": "a", "outp', 2),
    "a comma at the end": (GOOD + '{"instruction": "a", "output": "b",}\n' + GOOD, 2),
    "an object over several lines": (GOOD + '{\n"instruction": "a"}', 2),
    "two objects on a line": (GOOD + GOOD.strip() + GOOD, 2),
    "a raw NUL": (GOOD + '{"instruction": "a\x00", "output": "b"}\n', 2),
    "nothing but NUL": (GOOD + "\n\x00\x00\x00\n", 3),
    "a raw tab": (GOOD + '\n{"instruction": "a\t", "output": "b"}\n', 3),
    "a number of 5,000 digits": (GOOD + '{"instruction": "a", "output": "b", "n": ' + "1" * 5_000 + "}\n", 2),
    "brackets nested 100,000 deep": (GOOD + '{"messages": ' + "[" * 100_000 + "\n", 2),
}


@pytest.mark.parametrize(("text", "line"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named(tmp_path, text, line):
    assert "JSON" in refused(written(tmp_path, text), line=line)


BROKEN_ARRAYS = {
    "a missing value": ('[\n  {\n    "instruction": "a",\n    "output": \n  }\n]', 5),
    "a missing comma": ('[\n  {"instruction": "a", "output": "b"}\n  {"instruction": "a", "output": "b"}\n]', 3),
    "an extra comma": ('[\n  {"instruction": "a", "output": "b"},\n  ,\n  {"instruction": "a", "output": "b"}\n]', 3),
    "no end": ('[\n  {"instruction": "a", "output": "b"},\n', 3),
    "cut in a string": ('[\n  {"instruction": "a", "output": "b"},\n  {"instruction": "a', 3),
    "words after the end": ('[\n  {"instruction": "a", "output": "b"}\n]\nand more', 4),
    "nested 100,000 deep": ("[" * 100_000, 1),
}


@pytest.mark.parametrize(("text", "line"), BROKEN_ARRAYS.values(), ids=BROKEN_ARRAYS)
def test_a_broken_array_is_named_with_the_line_where_it_breaks(tmp_path, text, line):
    assert "JSON" in refused(written(tmp_path, text, "rows.json"), line=line)


@pytest.mark.parametrize("depth", [*range(800, 1_000, 7), 20_000])
def test_nesting_that_the_parser_just_takes_is_still_a_clear_error(tmp_path, depth):
    refused(written(tmp_path, '{"messages": ' + "[" * depth + "]" * depth + "}"), line=1)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    good = json.dumps(ROW).encode()
    assert "UTF-8" in refused(written(tmp_path, good + b"\r\n\r\n" + b'{"instruction": "caf\xe9"}'), line=3)
    assert "UTF-8" in refused(written(tmp_path, b"\xef\xbb\xbf" + good + b"\n\xff", "marked.jsonl"), line=2)
    assert "UTF-8" in refused(written(tmp_path, json.dumps(ROW).encode("utf-16"), "wide.jsonl"), line=1)


@pytest.mark.parametrize("text", ["", " \n\r\n", "[]", "[\n\n]\n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path, text):
    assert "holds no rows" in refused(written(tmp_path, text))


def test_a_file_the_system_does_not_hand_out_is_one_clear_error(tmp_path, monkeypatch):
    path = written(tmp_path, json.dumps(ROW))

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)
    assert "Permission denied" in refused(path)


def test_an_unknown_name_lists_what_there_is(tmp_path):
    with pytest.raises(LoraLabError, match="no data at 'revews'.*did you mean 'reviews'"):
        data.load("revews")
    with pytest.raises(LoraLabError, match="no data at"):
        data.load(tmp_path)
