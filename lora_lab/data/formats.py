"""Training rows from JSON and JSONL files, and from what is bundled.

Two formats for language models, one for classifiers and one for summaries, the fields' names as everywhere in the field:

    {"instruction": "...", "input": "...", "output": "..."}                                     Alpaca's; input may be missing
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}  chat; any number of turns
    {"text": "...", "label": 0}                                                                  see classification.py; text_pair may come, too
    {"dialogue": "...", "summary": "..."}                                                        DialogSum's and SAMSum's; see tasks/

Files with columns of other names, and CSV, are read by tables/.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast, overload

from ..errors import LoraLabError, did_you_mean

Row = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
BUNDLED = {name: (f"{name}_train.jsonl", f"{name}_held_out.jsonl") for name in ("reviews", "sentiment", "dialogues", "instructions")}
TABLES = (".csv", ".tsv", ".txt", ".parquet")


class Placed:
    """A sequence of rows that know where they came from."""

    def where(self, index: int) -> str:
        raise NotImplementedError

    def each(self, encode: Callable[[Row, str], Any]) -> list[Any]:
        """``encode(row, where)`` of every row."""
        return [encode(row, self.where(index)) for index, row in enumerate(cast("Iterable[Row]", self))]


class PlacedSequence(Sequence[Row], Placed):
    """One whose rows are fetched when they are asked for."""

    def row(self, index: int) -> Row:
        """index: 0 to len - 1."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        found = range(len(self))[index]
        return self.row(found) if isinstance(found, int) else [self.row(each) for each in found]


def each_encoded(rows: Iterable[Row], encode: Callable[[Row, str], Any]) -> list[Any]:
    """``encode(row, where)`` of every row; where: its place, for errors. Raises LoraLabError for no rows."""
    examples = rows.each(encode) if isinstance(rows, Placed) else [encode(row, f"row {index}") for index, row in enumerate(rows)]
    if not examples:
        raise LoraLabError("the data holds no rows: there is nothing to train on")
    return examples


class Rows(list[Row], Placed):
    """Rows that remember where they stood: `where(i)` is "file, line n"."""

    def __init__(self, rows: list[Row], source: str = "row", lines: list[int] | None = None) -> None:
        super().__init__(rows)
        self.source, self.lines = source, lines

    def where(self, index: int) -> str:
        return f"row {index}" if self.lines is None else f"{self.source}, line {self.lines[index]}"


def load(name_or_path: str | Path) -> tuple[Rows, Rows | None]:
    """(training rows, held-out rows or None): the bundled "reviews", "sentiment", "dialogues" or "instructions", or any .json or .jsonl file.

    Raises LoraLabError, with file and line, for a missing or empty file, broken JSON, or a row that is not in one of the formats.
    """
    if str(name_or_path) in BUNDLED:
        train, held_out = (read(resources.files(__package__) / "bundled" / name) for name in BUNDLED[str(name_or_path)])
        return train, held_out
    path = Path(name_or_path)
    if not path.is_file():
        raise LoraLabError(f"no data at {str(path)!r}: expected a .json or .jsonl file, or one of {list(BUNDLED)}{did_you_mean(path, BUNDLED)}")
    if path.suffix.lower() in TABLES:
        raise LoraLabError(f"{path} is a table: its columns are found for a task, --task sentiment, summarization, instruction or reviews "
                           "(lora_lab.tasks.gather)")  # fmt: skip
    return read(path), None


def read(path: Any) -> Rows:
    """Rows of one file: a JSON array, or one JSON object a line. Each row is checked.

    Lines are read one by one, and memory holds no more than their rows; an array is read as a whole first.
    """
    rows, lines = Rows([], str(path), []), list[int]()
    for line, row in numbered_values(path):
        check_format(row, f"{path}, line {line}")
        rows.append({sys.intern(name): value for name, value in row.items()})  # else each row keeps its own copy of the fields' names
        lines.append(line)
    if not rows:
        raise LoraLabError(f"{path} holds no rows: expected one JSON object a line, or an array of them")
    rows.lines = lines
    return rows


def numbered_values(path: Any) -> Iterator[tuple[int, Any]]:
    """The JSON values in a file, each with the line it begins on. Raises LoraLabError, with file and line."""
    if next((line for line in text_lines(path) if line.strip()), "").lstrip().startswith("["):
        yield from _array("".join(text_lines(path)), path)
        return
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            yield number, parsed(line.rstrip("\r\n"), path, number)


def text_lines(path: Any) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, split at line feeds only: U+2028 and U+0085 may stand inside a string."""
    return (line for _, line in placed_lines(path))


def placed_lines(path: Any) -> Iterator[tuple[int, str]]:
    """The same, each with the byte it begins at. Raises LoraLabError, with file and line."""
    number, begin = 1, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield begin, line.decode("utf-8-sig" if number == 1 else "utf-8")
                begin += len(line)
    except UnicodeDecodeError as error:
        raise LoraLabError(f"{path}, line {number}: not UTF-8 ({error.reason}): save the file as UTF-8") from None
    except OSError as error:
        raise LoraLabError(f"{path} cannot be read: {error.strerror or error}") from None


def _array(text: str, path: Any) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array with the line each begins on; parsed as a whole first, so that each comma is where it belongs."""
    parsed(text, path, 1)
    decoder, at, line, seen = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        line, seen = line + text.count("\n", seen, at), at
        if text[at] == "]":
            return
        row, at = decoder.raw_decode(text, at)
        yield line, row


def parsed(text: str, path: Any, line: int) -> Any:
    """`text` begins on `line` of the file; where it breaks, the parser knows how many lines and columns further."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.strip() == "{":
            raise LoraLabError(f"{path}, line {line}: not JSON of a line, the object goes on below: expected an array, or an object a line") from None
        raise LoraLabError(f"{path}, line {line + error.lineno - 1}, column {error.colno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets nested as deep
        raise LoraLabError(f"{path}, line {line}: JSON that cannot be read ({error})") from None


def check_format(row: Any, where: str) -> None:
    """Raise LoraLabError, beginning with `where`, for a row that is not in the one of the formats that its fields' names are of."""
    fields = row if isinstance(row, dict) else {}
    summarized = "dialogue" in fields and not {"instruction", "output", "messages"} & {*fields}
    check = check_labelled if "label" in fields else check_summarized if summarized else check_row
    check(row, where)


def check_row(row: Any, where: str) -> None:
    """Raise LoraLabError, beginning with `where`, for a row that cannot be learned from."""
    if not isinstance(row, dict):
        raise LoraLabError(f"{where}: a row is a {type(row).__name__}, expected an object with instruction/input/output or messages")
    if "messages" in row:
        _check_messages(row["messages"], where)
    elif "instruction" in row or "output" in row:
        _check_instruction(row, where)
    else:
        raise LoraLabError(f"{where}: a row has the fields {sorted(row)}, expected instruction, input, output, or messages")


def check_labelled(row: Row, where: str) -> None:
    """The same for a classifier's row; what its label may be, the model decides."""
    texts = {name: row[name] for name in ("text", "text_pair") if row.get(name) is not None}
    if "text" not in texts:
        raise LoraLabError(f"{where}: the row has the fields {sorted(row)}, expected text (and text_pair) and label")
    for name, text in texts.items():
        if not isinstance(text, str):
            raise LoraLabError(f"{where}: {name!r} is a {type(text).__name__}, expected text")
        _check_characters(text, name, where)


def check_summarized(row: Row, where: str) -> None:
    """The same for a dialogue and its summary."""
    for name in ("dialogue", "summary"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise LoraLabError(f"{where}: {name!r} is {reprlib.repr(row.get(name))}, expected text: a row is a dialogue and its summary")
        _check_characters(row[name], name, where)


def _check_instruction(row: Row, where: str) -> None:
    if row.get("input", "") is None:  # as many files say "no input"
        row = {**row, "input": ""}
    for name in ("instruction", "input", "output"):
        if name in row and not isinstance(row[name], str):
            raise LoraLabError(f"{where}: {name!r} is a {type(row[name]).__name__}, expected text")
        _check_characters(row.get(name, ""), name, where)
    for name in ("instruction", "output"):
        if not row.get(name, "").strip():
            raise LoraLabError(f"{where}: the row has no {name!r}: there is nothing to learn from it (fill it in, or remove the row)")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise LoraLabError(f"{where}: 'messages' is {reprlib.repr(messages)}, expected a list of {{'role', 'content'}}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
            raise LoraLabError(f"{where}: message {reprlib.repr(message)} needs a 'role' of {', '.join(ROLES)} and a text 'content'")
        _check_characters(message["content"], "content", where)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise LoraLabError(f"{where}: no message of the assistant: there is nothing to learn from it")


def _check_characters(text: str, name: str, where: str) -> None:
    """JSON can spell half of a surrogate pair ("\\ud83d"), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LoraLabError(f"{where}: {name!r} holds {text[error.start]!r}, half of a character: write the whole character") from None
