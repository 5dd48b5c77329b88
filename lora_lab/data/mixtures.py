"""Several data sets as one, each with its share, as instruction tuning mixes its tasks.

    proportional    min(rows, maximum): a data set counts by its size, up to a limit, so that the large ones do not drown the small ones
    temperature     the same to the power of 1 / temperature: the higher, the more equal
    equal           the same share for each
    {name: weight}  shares by hand

Raffel et al. 2020 (T5, arXiv:1910.10683), section 3.5.2; FLAN takes maximum=3000: Wei et al. 2021 (arXiv:2109.01652), section 2.4.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import LoraLabError, did_you_mean
from .formats import Placed, PlacedSequence, Row
from .templates import encode_rows

WAYS = ("proportional", "equal")


class Mixture(PlacedSequence):
    """Rows of several sources in random order: a plain sequence, for `fit` and all else that takes rows. Rows are referred to, not copied.

    weights: the share of each source, 0 to 1.  len(): rows in one pass, which `fit` calls an epoch.  A row's `where` begins with its source.
    """

    def __init__(self, sources: Mapping[str, Sequence[Row]], weights: Mapping[str, float], counts: Mapping[str, int], seed: int) -> None:
        self.sources, self.weights = dict(sources), dict(weights)
        self._names = list(sources)
        drawn = [(source, row) for source, name in enumerate(self._names) for row in _drawn(len(sources[name]), counts[name], f"{seed}-{name}")]
        random.Random(seed).shuffle(drawn)
        self._source, self._row = (array("q", [place[part] for place in drawn]) for part in (0, 1))

    def __len__(self) -> int:
        return len(self._row)

    def row(self, index: int) -> Row:
        return self.sources[self._names[self._source[index]]][self._row[index]]

    def where(self, index: int) -> str:
        name, row = self._names[self._source[index]], self._row[index]
        source = self.sources[name]
        return f"{name}: {source.where(row)}" if isinstance(source, Placed) else f"{name}: row {row}"

    def each(self, encode: Callable[[Row, str], Any]) -> list[Any]:
        """A row that occurs several times is encoded once, and shared."""
        known: dict[tuple[int, int], Any] = {}
        for index, place in enumerate(zip(self._source, self._row, strict=True)):
            if place not in known:
                known[place] = encode(self[index], self.where(index))
        return [known[place] for place in zip(self._source, self._row, strict=True)]

    def counts(self) -> dict[str, int]:
        """Rows of each source in one pass."""
        return self._per_source([1] * len(self))

    def tokens(self, tokenizer: Any = None) -> dict[str, int]:
        """Tokens of each source in one pass. tokenizer: for rows of text."""
        return self._per_source([len(example["input_ids"]) for example in encode_rows(self, tokenizer)])

    def _per_source(self, amounts: Sequence[int]) -> dict[str, int]:
        total = dict.fromkeys(self._names, 0)
        for source, amount in zip(self._source, amounts, strict=True):
            total[self._names[source]] += amount
        return total

    def table(self, tokenizer: Any = None) -> str:
        """Each source's rows, its share of them, and how often one of its rows comes in a pass; of encoded rows, or with a tokenizer, tokens, too."""
        counts, width = self.counts(), max(6, *map(len, self._names))
        tokens = self.tokens(tokenizer) if tokenizer is not None or "input_ids" in self[0] else None
        lines = [f"{'source':<{width}}  {'rows':>9}  {'in a pass':>9}    share   passes" + ("" if tokens is None else f"  {'tokens':>11}    share")]
        for name, count in counts.items():
            rows = len(self.sources[name])
            line = f"{name:<{width}}  {rows:>9,}  {count:>9,}  {100 * count / len(self):5.1f} %  {count / rows:7.2f}"
            lines.append(line if tokens is None else f"{line}  {tokens[name]:>11,}  {100 * tokens[name] / sum(tokens.values()):5.1f} %")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"Mixture({len(self)} rows of {', '.join(self._names)})"


def mixture(sources: Mapping[str, Sequence[Row]], weights: str | Mapping[str, float] = "proportional", *, temperature: float = 1.0,
            maximum: int | None = None, size: int | None = None, seed: int = 0) -> Mixture:  # fmt: skip
    """One sequence of rows out of several, each with its share; the same seed gives the same rows in the same order.

    sources: name -> rows.  weights: "proportional" (to the number of rows, up to `maximum`, to the power of 1 / temperature), "equal", or a
    weight for each name.  size: rows in one pass; None is as many as the sources have, each up to `maximum`.
    A source that has fewer rows than its share repeats, all its rows equally often before one comes again; of one that has more, rows are
    left out. Each epoch of `fit` goes through the same rows in a new order: for other rows of a large source in each of n passes make the
    mixture n times as long (size=) and train one epoch.
    Raises LoraLabError for a source that is empty or would get no row, and for weights that are none.

    >>> rows = {"large": [{"input_ids": [1, 2]}] * 90, "small": [{"input_ids": [1, 2, 3]}] * 10}
    >>> print(mixture(rows, maximum=30))
    source       rows  in a pass    share   passes       tokens    share
    large          90         30   75.0 %     0.33           60   66.7 %
    small          10         10   25.0 %     1.00           30   33.3 %
    >>> mixture(rows, "equal", size=40).counts()
    {'large': 20, 'small': 20}
    """
    _check_sources(sources)
    _check_numbers(weights, temperature, maximum, size)
    capped = {name: len(rows) if maximum is None else min(len(rows), maximum) for name, rows in sources.items()}
    shares = _shares(weights, capped, temperature)
    counts = _rounded(shares, sum(capped.values()) if size is None else size)
    for name, count in counts.items():
        if not count:
            raise LoraLabError(f"{name!r} would get none of the mixture's {sum(counts.values())} rows, its share is {shares[name]:.2g}: "
                               "raise its weight or size, or leave it out")  # fmt: skip
    return Mixture(sources, shares, counts, seed)


def _drawn(rows: int, count: int, seed: str) -> list[int]:
    """`count` indices below `rows`: all of them as often as they go in, and some once more."""
    passes, rest = divmod(count, rows)
    return [*range(rows)] * passes + random.Random(seed).sample(range(rows), rest)


def _shares(weights: str | Mapping[str, float], capped: Mapping[str, int], temperature: float) -> dict[str, float]:
    if weights == "proportional":
        most = max(capped.values())
        rates = {name: math.exp(math.log(rows / most) / temperature) for name, rows in capped.items()}
    else:
        rates = dict.fromkeys(capped, 1.0) if isinstance(weights, str) else _weights_of(weights, capped)
    return {name: rate / sum(rates.values()) for name, rate in rates.items()}


def _weights_of(weights: Mapping[str, float], names: Mapping[str, int]) -> dict[str, float]:
    for name in weights:
        if name not in names:
            raise LoraLabError(f"weights name {name!r}, the sources are {', '.join(names)}{did_you_mean(name, names)}")
    for name in names:
        weight = weights.get(name)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight > 0):
            raise LoraLabError(f"the weight of {name!r} is {weight!r}: expected a number above 0 for each source (to do without one, leave it out)")
    return {name: float(weights[name]) for name in names}


def _rounded(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole numbers that sum to `size`, each next to its share; the largest remainders are rounded up."""
    quotas = {name: share * size for name, share in shares.items()}
    counts = {name: int(quota + 1e-9) for name, quota in quotas.items()}
    for name in sorted(quotas, key=lambda name: counts[name] - quotas[name])[: size - sum(counts.values())]:
        counts[name] += 1
    return counts


def _check_sources(sources: Mapping[str, Sequence[Row]]) -> None:
    if not isinstance(sources, Mapping) or not sources:
        raise LoraLabError(f"mixture({sources!r:.60}): expected a dict of name -> rows")
    for name, rows in sources.items():
        if not isinstance(name, str) or not name:
            raise LoraLabError(f"the source {name!r}: a name is text")
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(rows, (str, bytes, Mapping)):
            raise LoraLabError(f"{name!r} is a {type(rows).__name__}, expected a list of rows (rows, held_out = lora_lab.data.load(path))")
        if not len(rows):
            raise LoraLabError(f"{name!r} holds no rows")


def _check_numbers(weights: Any, temperature: Any, maximum: Any, size: Any) -> None:
    if not isinstance(weights, Mapping) and weights not in WAYS:
        raise LoraLabError(f"weights={weights!r}: expected {', '.join(map(repr, WAYS))}, or a dict of name -> weight{did_you_mean(weights, WAYS)}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not (math.isfinite(temperature) and temperature > 0):
        raise LoraLabError(f"temperature={temperature!r}: expected a number above 0 (1 is proportional, higher is more equal)")
    for name, value in (("maximum", maximum), ("size", size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise LoraLabError(f"{name}={value!r}: expected a whole number of at least 1, or None")
    for name, value, idle in (("temperature", temperature, 1.0), ("maximum", maximum, None)):
        if weights != "proportional" and value != idle:
            raise LoraLabError(f"{name}={value!r} with weights={weights!r}: it shapes weights='proportional' only")
