"""Where tables come from: what is bundled, a file, a folder, a data set of the hub; and which part is for what.

    rows.csv                                              {"all": ...}: nobody has divided it yet
    folder/train.jsonl, folder/test.jsonl                 {"train": ..., "test": ...}, by the words in the files' names; data/ of a hub snapshot, too
    folder/train-00000-of-00002.csv, ...-00001-...        pieces of one part, one after another
    folder/reviews.neg, folder/reviews.pos                a text a line, the label is the ending: {"all": ...}
    folder/neg/1.txt, folder/pos/1.txt                    a text a file, the label is the folder
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import LoraLabError, did_you_mean
from ..formats import BUNDLED, read
from .files import SUFFIXES, Table, read_lines, read_table
from .parquet import ENDING, check_installed

Parts = dict[str, Table]  # by TRAIN, VALIDATION, TEST; or ALL alone
TRAIN, VALIDATION, TEST, ALL = "train", "validation", "test", "all"
WORDS = {TRAIN: ("train", "training", "trainset"), VALIDATION: ("validation", "valid", "val", "dev", "development"),
         TEST: ("test", "testing", "testset", "heldout")}  # fmt: skip
PART_OF = {word: part for part, words in WORDS.items() for word in words}
LABELS = ("neg", "neu", "pos", "negative", "neutral", "positive")  # endings of files, and names of folders
ROWS = (".csv", ".tsv", ".json", ".jsonl")
ABOUT = re.compile(r"(dataset_infos?|dataset_dict|state|config|metadata|package.*|\..*)\.jsonl?")  # JSON that holds no rows
PIECE = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")  # the hub's older ones end in a hash
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_parts(source: str | Path) -> Parts:
    """The tables of a source, by what they are for. A source that nobody has divided is {"all": table}.

    source: a bundled name, a file, a folder, or a hub data set "owner/name", which is downloaded.
    Raises LoraLabError for a source that is none of these or cannot be read, and a folder in which it is not plain what is what.
    """
    name, path = str(source), Path(source).expanduser()
    if name in BUNDLED:
        return {part: _bundled(file) for part, file in zip((TRAIN, TEST), BUNDLED[name], strict=True)}
    if path.is_file():
        return {ALL: read_lines(path, label=path.suffix[1:]) if path.suffix[1:] in LABELS else read_table(path)}
    if path.is_dir():
        return _folder(path)
    if HUB_ID.fullmatch(name) and path.suffix.lower() not in SUFFIXES and not name.startswith("."):
        return _folder(_from_hub(name))
    raise LoraLabError(f"no data at {name!r}: expected one of {[*BUNDLED]}, a file that ends in {', '.join(SUFFIXES)}, a folder with such files, or "
                       f"a hub data set 'owner/name'{did_you_mean(name, [*BUNDLED])}")  # fmt: skip


def part_of(path: Path) -> str | None:
    """What a file is for, by the words in its name.

    >>> part_of(Path("MTS-Dialog-TrainingSet.csv")), part_of(Path("dialogsum.dev.jsonl")), part_of(Path("device.csv"))
    ('train', 'validation', None)
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", path.stem.replace("held_out", "heldout").replace("held-out", "heldout"))
    found = {PART_OF[word.lower()] for word in words if word.lower() in PART_OF}
    return found.pop() if len(found) == 1 else None


def _bundled(file: str) -> Table:
    rows = read(resources.files("lora_lab.data") / "bundled" / file)
    return Table(rows, [(file, line) for line in rows.lines or ()])


def _folder(folder: Path) -> Parts:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
    tables = [path for path in files if path.suffix.lower() in ROWS and not ABOUT.fullmatch(path.name)]
    if tables:
        return _by_part(tables, folder)
    if labelled := [path for path in files if path.suffix[1:] in LABELS]:
        return _by_label(folder, {path: path.suffix[1:] for path in labelled}, read_lines)
    if labelled := [path for path in files if path.suffix == ".txt" and path.parent.name in LABELS]:
        return _by_label(folder, {path: path.parent.name for path in labelled}, _one_text)
    if tables := [path for path in files if path.suffix.lower() == ENDING]:
        return _by_part(tables, folder)
    raise LoraLabError(f"{folder} holds no {', '.join((*ROWS, ENDING))}; {_names(files, folder)}: give one of its files, if that is a text with tabs")


def _hidden(path: Path, folder: Path) -> bool:
    return any(name.startswith(".") for name in path.relative_to(folder).parts)


def _by_part(files: list[Path], folder: Path) -> Parts:
    if len(files) == 1 and part_of(files[0]) in (None, TRAIN):
        return {ALL: read_table(files[0])}
    parts: dict[str, list[Path]] = {}
    for path in files:
        parts.setdefault(part_of(path) or "", []).append(path)
    for part, paths in parts.items():
        if not part or len({PIECE.sub("", str(path.with_suffix(""))) for path in paths}) > 1:
            what = f"more than one file for {part!r}" if part else "files whose names have no train, validation or test in them"
            raise LoraLabError(f"{folder} has {what}: {_names(paths, folder)}. Give one of them, or a folder with one for each part")
    return {part: Table.joined(map(read_table, paths)) for part, paths in parts.items()}


def _by_label(folder: Path, labels: dict[Path, str], reader: Any) -> Parts:
    """Below a folder called train or test the part is known, too."""
    parts: dict[str, list[Table]] = {}
    for path, label in labels.items():
        part = next((PART_OF[name] for name in path.relative_to(folder).parts[:-1] if name in PART_OF), ALL)
        parts.setdefault(part, []).append(reader(path, label=label))
    return {part: Table.joined(tables) for part, tables in parts.items()}


def _one_text(path: Path, **cells: Any) -> Table:
    rows = read_lines(path)
    return Table([{"text": "\n".join(row["text"] for row in rows), **cells}], rows.places[:1] or [(str(path), 1)])


def _names(paths: list[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)) for path in paths]
    return "there are " + ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "it is empty"


def _from_hub(name: str) -> Path:
    """Those files of a data set that are read here, Parquet where there is nothing else: it may be a copy of the others."""
    folder = _fetched(name, [suffix for suffix in SUFFIXES if suffix != ENDING])
    if not _holds_rows(folder):
        check_installed(name)
        folder = _fetched(name, [ENDING])
    if not _holds_rows(folder):
        raise LoraLabError(f"the hub's {name!r} holds no {', '.join(SUFFIXES)}: fetch its rows in another way, and give the file")
    return folder


def _holds_rows(folder: Path) -> bool:
    """As `_folder` sees it: a text alone, a licence say, is no row."""
    tables = (path for path in folder.rglob("*") if path.suffix.lower() in (*ROWS, ENDING) or path.parent.name in LABELS)
    return any(not ABOUT.fullmatch(path.name) for path in tables)


def _fetched(name: str, suffixes: list[str]) -> Path:
    """A README tells that the data set exists."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=[*(f"*{suffix}" for suffix in suffixes), "*.md"]))
    except Exception as error:  # offline, gated, misspelt: many classes of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraLabError(f"{name!r} is no file and no folder here, and could not be got from the hub: {reason}") from None
