"""A prompt as a map: where each virtual token began, where it is, and the words nearest to it, in the two directions they differ most in.

Every row is taken at unit length, as nearness is by cosine (interpretation.py); the two axes are the first principal components of all rows
together, at one scale, so that near on the map means near as far as two of H dimensions can tell; the caption says how far that is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_math.svg import FAINT, INK, PALETTE, Canvas

from .embeddings import embedding_rows
from .interpretation import Neighbour, initial_rows_of, nearest_tokens, rows_of

WIDTH, HEIGHT = 760, 600
LEFT, RIGHT, TOP, BOTTOM = 60, WIDTH - 60, 84, HEIGHT - 52
SIZE, LETTER = 11, 6.4  # of a label; pixels that one letter takes, generously
MOST_LETTERS = 18
BEGAN, NOW, WORD = "#999999", PALETTE[0], PALETTE[5]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Label:
    text: str
    at: Point
    colour: str


def picture(prompted: Any, tokenizer: Any, task: str | None = None, title: str | None = None) -> str:
    """One SVG document, 760 x 600 pixels: save it with the ending .svg, or show it in a notebook.

    tokenizer, task: as of `nearest_tokens`.  A label that finds no free place is left out; the pointer shows what each point is.
    Raises LoraLabError for an unknown task, and a prefix.
    """
    before, after = initial_rows_of(prompted, task), rows_of(prompted, task)
    near = [first for first, *_ in nearest_tokens(prompted, tokenizer, 1, task)]
    words = {each.id: label_text(each.token) for each in near}
    rows = torch.cat([before, after, embedding_rows(prompted.base, list(words)).to(after)])
    flat, shares = principal_components(F.normalize(rows.cpu().double(), dim=1))
    places = on_paper([(x, y) for x, y in flat.tolist()])
    count = len(before)
    canvas = Canvas(WIDTH, HEIGHT, title or f"{count} virtual tokens and their nearest words")
    _legend(canvas)
    _draw(canvas, places[:count], places[count : 2 * count], near, dict(zip(words, places[2 * count :], strict=True)), words)
    caption = f"first two principal components of the directions: {shares[0]:.0%} and {shares[1]:.0%} of the variance"
    canvas.text((LEFT + RIGHT) / 2, HEIGHT - 16, caption, anchor="middle")
    return canvas.text_of()


def principal_components(rows: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """([n, 2] coordinates, the shares of the variance they carry). The sign is chosen so that the largest coordinate is positive.

    >>> flat, shares = principal_components(torch.tensor([[0.0, 2.0, 5.0], [4.0, 2.0, 5.0], [2.0, 3.0, 5.0], [2.0, 1.0, 5.0]]))
    >>> flat.abs().round().tolist(), [round(share, 2) for share in shares]
    ([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [0.8, 0.2])
    """
    left, lengths, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    flat = F.pad(left * lengths, (0, 2))[:, :2]
    signs = flat.gather(0, flat.abs().argmax(0, keepdim=True)).sign()
    squares = F.pad(lengths.square() / lengths.square().sum().clamp(min=torch.finfo(rows.dtype).tiny), (0, 2))
    return flat * torch.where(signs == 0, 1, signs), (float(squares[0]), float(squares[1]))


def on_paper(points: Sequence[Point]) -> list[Point]:
    """Pixels, at one scale for both directions, in the middle of the paper."""
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    scale = min((RIGHT - LEFT) / max(right - left, 1e-12), (BOTTOM - TOP) / max(high - low, 1e-12))
    if right - left < 1e-9 and high - low < 1e-9:
        scale = 0.0  # all in one place
    middle, centre = ((left + right) / 2, (low + high) / 2), ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2)
    return [(centre[0] + (x - middle[0]) * scale, centre[1] - (y - middle[1]) * scale) for x, y in points]


def label_text(token: str) -> str:
    """One line of printable letters.

    >>> label_text(" good"), label_text("\\n"), label_text(" ")
    ('good', '\\\\n', "' '")
    """
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in token.strip(" ")) or repr(token)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"


# Labels that leave each other room --------------------------------------------------------------------------------------------


def placed(labels: Sequence[Label], points: Sequence[Point]) -> list[tuple[Label, Point]]:
    """Labels with the left end of their base line: each at the first free place around its point, on no other label and no point."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    done = []
    for label in labels:
        for box in _places(label):
            if _inside(box) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                done.append((label, (box[0], box[3] - 3)))
                break
    return done


def _places(label: Label) -> list[Box]:
    """Right, left, above, below and between, then the same further away."""
    (x, y), wide, high = label.at, text_width(label.text), SIZE + 2.0
    found = []
    for away in (6, 14, 24):
        for left, top in ((away, -high / 2), (-away - wide, -high / 2), (-wide / 2, -away - high), (-wide / 2, away),
                          (away, -away - high), (away, away), (-away - wide, -away - high), (-away - wide, away)):  # fmt: skip
            found.append((x + left, y + top, x + left + wide, y + top + high))
    return found


def text_width(text: str) -> float:
    """Pixels, generously; an East Asian letter takes as much as two."""
    return LETTER * sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _inside(box: Box) -> bool:
    left, top, right, bottom = box
    return left > 4 and right < WIDTH - 4 and top > TOP - 18 and bottom < HEIGHT - 34


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


# Drawing ----------------------------------------------------------------------------------------------------------------------


def _draw(canvas: Canvas, before: list[Point], after: list[Point], near: list[Neighbour], at: dict[int, Point], words: dict[int, str]) -> None:
    for start, end in zip(before, after, strict=True):
        canvas.rule(*start, *end, FAINT, thick=1.5)
    for number, place in enumerate(before):
        _dot(canvas, place, BEGAN, f"virtual token {number} began here", hollow=True)
    for i, place in at.items():
        _dot(canvas, place, WORD, words[i])
    for number, (place, word) in enumerate(zip(after, near, strict=True)):
        _dot(canvas, place, NOW, f"virtual token {number}: nearest {label_text(word.token)}, cosine distance {word.distance:.3f}")
    labels = [Label(words[i], place, INK) for i, place in at.items()] + [Label(str(i), place, NOW) for i, place in enumerate(after)]
    for label, (x, y) in placed(labels, [*before, *after, *at.values()]):
        canvas.text(x, y, label.text, size=SIZE, colour=label.colour)


def _dot(canvas: Canvas, place: Point, colour: str, says: str, hollow: bool = False) -> None:
    """`says` is shown while the pointer rests on it."""
    x, y = (f"{round(value, 2):g}" for value in place)
    paint = f'fill="#FFFFFF" stroke="{colour}"' if hollow else f'fill="{colour}"'
    canvas.add(f'<circle cx="{x}" cy="{y}" r="3.5" {paint}><title>{escape(says)}</title></circle>')


def _legend(canvas: Canvas) -> None:
    x = 20.0
    for text, colour, hollow in (("where it began", BEGAN, True), ("where it is", NOW, False), ("nearest word", WORD, False)):
        _dot(canvas, (x, 48), colour, text, hollow)
        canvas.text(x + 10, 52, text)
        x += 34 + LETTER * 1.1 * len(text)
