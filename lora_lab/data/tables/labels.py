"""Labels as people write them, and the classes they stand for: 0 and 1, "pos" and "neg", -1 and 1, or any few words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import LoraLabError
from .files import is_number

POLARITY = ("negative", "neutral", "positive")
SPOKEN = {**dict.fromkeys(("neg", "negative", "bad"), "negative"), **dict.fromkeys(("neu", "neutral"), "neutral"),
          **dict.fromkeys(("pos", "positive", "good"), "positive")}  # fmt: skip
OF_NUMBERS = {2: ("negative", "positive"), 3: POLARITY}  # how many there are: what they mean, the lowest first, as in SST-2
MOST = 50
NO_LABEL = "-1"  # all there is in a test whose labels are kept secret, and beside 0, 1 and 2 that people did not agree (SNLI)


@dataclass(frozen=True)
class Classes:
    """names: class 0, class 1, ...  of: a label as it is written, `written`, -> its class."""

    names: tuple[str, ...]
    of: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)

    def table(self) -> str:
        """
        >>> classes_of([0, 1, 1]).table()
        '0 -> negative, 1 -> positive'
        """
        return ", ".join(f"{label} -> {self.names[number]}" for label, number in self.of.items())


def written(cell: Any) -> str:
    """A label as one of a few words.

    >>> written(" Positive"), written(1), written("1.0"), written(True), written(None)
    ('positive', '1', '1', 'true', '')
    """
    text = "" if cell is None else str(cell).strip().lower()
    return str(int(float(text))) if is_number(text) and float(text).is_integer() else text


def spoken(name: Any) -> str:
    """A class as one of a few words, whoever writes it.

    >>> spoken("POS"), spoken("Joy")
    ('positive', 'joy')
    """
    return SPOKEN.get(written(name), written(name))


def without_secret(parts: Iterable[Sequence[Any]]) -> Iterator[Any]:
    """The labels of all parts, but for those of a part in which all are -1.

    >>> list(without_secret([[0, 1], [-1, -1]])), list(without_secret([[0, 1, -1]]))
    ([0, 1], [0, 1, -1])
    """
    for cells in parts:
        if {written(cell) for cell in cells} - {""} != {NO_LABEL}:
            yield from cells


def classes_of(cells: Iterable[Any], names: Sequence[str] | None = None) -> Classes:
    """The classes that these labels stand for; cells without a label do not count.

    names: of the classes, those of numbers in the order of the numbers, of words in that of the alphabet or as the words themselves are called.
    Raises LoraLabError for no labels, a single one, too many, and numbers whose meaning is not known.

    >>> classes_of(["pos", "neg", ""]).of
    {'neg': 0, 'pos': 1}
    """
    counts = Counter(map(written, cells))
    counts.pop("", None)
    labels = sorted(counts, key=lambda label: (0, float(label), "") if is_number(label) else (1, 0.0, label))
    if NO_LABEL in labels and len(labels) > 3 and all(map(is_number, labels)):
        labels.remove(NO_LABEL)
    if not 1 < len(labels) <= MOST:
        raise LoraLabError(f"the labels have {len(labels)} different values{_some(labels)}: expected 2 to {MOST} classes (is this the column of the "
                           "labels? --label-column names another)")  # fmt: skip
    if names is not None:
        return _named(labels, names)
    if all(label in SPOKEN for label in labels):
        present = [name for name in POLARITY if name in {SPOKEN[label] for label in labels}]
        of = {label: present.index(SPOKEN[label]) for label in labels}
        return Classes(tuple(present), dict(sorted(of.items(), key=lambda each: each[1])))
    if not any(map(is_number, labels)):
        return Classes(tuple(labels), {label: number for number, label in enumerate(labels)})
    if len(labels) not in OF_NUMBERS or not all(map(is_number, labels)):
        raise LoraLabError(f"the labels are {', '.join(labels)}: --labels says what they are called, in this order")
    return Classes(OF_NUMBERS[len(labels)], {label: number for number, label in enumerate(labels)})


def _named(labels: list[str], names: Sequence[str]) -> Classes:
    plain = [written(name) for name in names]
    if len({*plain}) < len(plain) or not all(plain):
        raise LoraLabError(f"--labels {' '.join(names)}: expected a name for each class, and no name twice")
    if {*labels} <= {*plain}:
        return Classes(tuple(name.strip() for name in names), {label: number for number, label in enumerate(plain)})
    if len(names) != len(labels):
        raise LoraLabError(f"--labels {' '.join(names)}: {len(names)} names, the labels are {', '.join(labels)}")
    return Classes(tuple(name.strip() for name in names), {label: number for number, label in enumerate(labels)})


def _some(labels: Sequence[str]) -> str:
    return f" ({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''})" if labels else ""
