"""ROUGE: how much of a reference text is in the answer, and how much of the answer is in the reference (Lin 2004, aclanthology.org/W04-1013).

    rouge1, rouge2, ...   runs of n words that both have (section 2)
    rougeL                the longest common subsequence of words (section 3.1)
    rougeLsum             the same of texts in lines: each line of the reference against all lines of the answer (section 3.2)

The numbers are those of Google's `rouge-score` package: words are runs of a-z and 0-9 in small letters. Any other letter ends a word, so the
scores say little about languages that need them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from ...errors import LoraLabError
from .stemmer import stem

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SHORTEST_STEMMED = 4  # letters; shorter words are left alone


@dataclass(frozen=True)
class Rouge:
    """precision: of the answer's parts those in the reference.  recall: of the reference's those in the answer.  f1: 2PR / (P + R). 0 to 1."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, common: int, answer: int, reference: int) -> Rouge:
        precision, recall = common / max(answer, 1), common / max(reference, 1)
        return cls(precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0)


def rouge(predictions: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]], *, kinds: Sequence[str] = KINDS,
          use_stemmer: bool = False) -> dict[str, Rouge]:  # fmt: skip
    """The mean over all texts of each kind's precision, recall and F1.

    references: a text for each prediction, or several, of which the one with the best F1 counts.
    use_stemmer: words of four letters and more are stemmed first, as most papers on summaries do; say so beside the number.

    >>> rouge(["the cat sat"], ["the cat lay down"], kinds=["rouge1"])["rouge1"]
    Rouge(precision=0.6666666666666666, recall=0.5, f1=0.5714285714285715)
    """
    if isinstance(predictions, str) or len(predictions) != len(references) or not len(predictions):
        what = "one text" if isinstance(predictions, str) else f"{len(predictions)} predictions"
        raise LoraLabError(f"{what} and {len(references)} references: expected lists, a reference for each prediction, and at least one")
    for kind in kinds:
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", kind):
            raise LoraLabError(f"kinds has {kind!r}: expected rouge1 to rouge9, rougeL or rougeLsum")
    scored = [_best(prediction, [given] if isinstance(given, str) else given, kinds, use_stemmer)
              for prediction, given in zip(predictions, references, strict=True)]  # fmt: skip
    return {kind: _mean([each[kind] for each in scored]) for kind in kinds}


def words(text: str, use_stemmer: bool = False) -> list[str]:
    """
    >>> words("The cat's 2 toys!"), words("running dogs", use_stemmer=True)
    (['the', 'cat', 's', '2', 'toys'], ['run', 'dog'])
    """
    found = re.findall(r"[a-z0-9]+", text.lower())
    return [stem(word) if len(word) >= SHORTEST_STEMMED else word for word in found] if use_stemmer else found


def _mean(scores: list[Rouge]) -> Rouge:
    return Rouge(*(sum(column) / len(scores) for column in zip(*map(astuple, scores), strict=True)))


def _best(answer: str, references: Sequence[str], kinds: Sequence[str], use_stemmer: bool) -> dict[str, Rouge]:
    """Against the reference with the best F1, the first of equal ones."""
    if not references:
        raise LoraLabError("a prediction has no reference: expected at least one text for each")
    scored = [_scores(answer, reference, kinds, use_stemmer) for reference in references]
    return {kind: max((each[kind] for each in scored), key=lambda score: score.f1) for kind in kinds}


def _scores(answer: str, reference: str, kinds: Sequence[str], use_stemmer: bool) -> dict[str, Rouge]:
    ours, theirs, scores = words(answer, use_stemmer), words(reference, use_stemmer), {}
    for kind in kinds:
        if kind == "rougeLsum":
            scores[kind] = _by_lines(*([words(line, use_stemmer) for line in text.split("\n") if line] for text in (answer, reference)))
        elif kind == "rougeL":
            scores[kind] = Rouge.of(common_length(ours, theirs), len(ours), len(theirs))
        else:
            scores[kind] = _by_runs(ours, theirs, int(kind.removeprefix("rouge")))
    return scores


def _by_runs(ours: list[str], theirs: list[str], n: int) -> Rouge:
    left, right = (Counter(zip(*(side[start:] for start in range(n)), strict=False)) for side in (ours, theirs))
    return Rouge.of((left & right).total(), left.total(), right.total())


# Subsequences ---------------------------------------------------------------------------------------------------------------


def common_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, a column of the table in one go as the bits of a number.

    A bit is 0 where the column's value is one more than a row above. H. Hyyrö 2004, Bit-parallel LCS-length computation revisited.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(left)) - 1
    column = full
    for word in right:
        match = column & places.get(word, 0)
        column = ((column + match) | (column - match)) & full
    return len(left) - column.bit_count()


def _by_lines(ours: list[list[str]], theirs: list[list[str]]) -> Rouge:
    """A word of the reference counts where a line of the answer has it in its subsequence, and no word more often than either side has it."""
    counts = [Counter(word for line in side for word in line) for side in (ours, theirs)]
    left, common = counts[0] & counts[1], 0
    for line in theirs:
        for index in sorted(set().union(*(_subsequence(line, other) for other in ours))):
            if left[line[index]] > 0:
                left[line[index]] -= 1
                common += 1
    return Rouge.of(common, counts[0].total(), counts[1].total())


def _subsequence(line: list[str], other: list[str]) -> list[int]:
    """The places in `line` of one of the longest common subsequences: where several are as long, the one rouge-score takes."""
    table = [[0] * (len(other) + 1) for _ in range(len(line) + 1)]
    for i, word in enumerate(line, start=1):
        for j, candidate in enumerate(other, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if word == candidate else max(table[i - 1][j], table[i][j - 1])
    places, i, j = [], len(line), len(other)
    while i and j:
        if line[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places
