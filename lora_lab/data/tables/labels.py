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

    names: of the classes, in their order. They are the labels themselves, or words for the same ("positive" for "pos"), or those of numbers in the
        numbers' order, or "label=name" for every label, of which several may have one name.
    Raises LoraLabError for no labels, a single one, too many, numbers whose meaning is not known, and names of which it is not plain whose they are.

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
        how = "in this order" if all(map(is_number, labels)) else f"label=name for each ({labels[0]}=... {labels[1]}=...)"
        raise LoraLabError(f"the labels are {', '.join(labels)}: --labels says what they are called, {how}")
    return Classes(OF_NUMBERS[len(labels)], {label: number for number, label in enumerate(labels)})


def _named(labels: list[str], names: Sequence[str]) -> Classes:
    plain, given = [written(name) for name in names], tuple(name.strip() for name in names)
    if not {*labels} <= {*plain} and all("=" in name for name in names):
        return _one_by_one(labels, names)
    if len({*plain}) < len(plain) or not all(plain):
        raise LoraLabError(f"--labels {' '.join(names)}: expected a name for each class, and no name twice")
    if {*labels} <= {*plain}:
        return Classes(given, {label: number for number, label in enumerate(plain)})
    if len(names) != len(labels):
        raise LoraLabError(f"--labels {' '.join(names)}: {len(names)} names, the labels are {', '.join(labels)}")
    if all(map(is_number, labels)):
        return Classes(given, {label: number for number, label in enumerate(labels)})
    said = [spoken(name) for name in names]
    if {spoken(label) for label in labels} != {*said} or len({*said}) < len(said):
        raise LoraLabError(f"--labels {' '.join(names)}: the labels are {', '.join(labels)}, and which of them has which name is not plain: give "
                           f"their own words, or label=name for each ({labels[0]}={given[0]} ...)")  # fmt: skip
    return Classes(given, {label: said.index(spoken(label)) for label in labels})


def _one_by_one(labels: Sequence[str], pairs: Sequence[str]) -> Classes:
    """Of "label=name" for each."""
    of = {written(label): name.strip() for label, _, name in (pair.rpartition("=") for pair in pairs)}
    names = list(dict.fromkeys(of.values()))
    if missing := [label for label in labels if label not in of]:
        raise LoraLabError(f"--labels {' '.join(pairs)}: the label {missing[0]!r} has no name, the labels are {', '.join(labels)}")
    if len(names) < 2 or len(of) < len(pairs) or not all((*of, *names)):
        raise LoraLabError(f"--labels {' '.join(pairs)}: expected label=name once for each label, and two names at least")
    return Classes(tuple(names), {label: names.index(name) for label, name in of.items()})


def in_the_order_of(earlier: Classes, now: Classes) -> Classes:
    """The classes of an earlier run, and which of them the labels of `now` are, by the names. Raises LoraLabError for a name that was none.

    >>> in_the_order_of(Classes(("bad", "good"), {"0": 0, "1": 1}), classes_of(["+", "-"], ["+=good", "-=bad"])).of
    {'0': 0, '1': 1, '+': 1, '-': 0}
    """
    own = {written(name): number for number, name in enumerate(earlier.names)}
    alike = {spoken(name): number for number, name in enumerate(earlier.names)}
    places = [own.get(written(name), alike.get(spoken(name))) for name in now.names]
    if unknown := [name for name, place in zip(now.names, places, strict=True) if place is None]:
        raise LoraLabError(f"--labels {' '.join(now.names)}: {unknown[0]!r} is none of the classes that the adapter was taught, "
                           f"{', '.join(earlier.names)}")  # fmt: skip
    return Classes(earlier.names, {**earlier.of, **{label: place for label, number in now.of.items() if (place := places[number]) is not None}})


def _some(labels: Sequence[str]) -> str:
    return f" ({', '.join(labels[:5])}{', ...' if len(labels) > 5 else ''})" if labels else ""
