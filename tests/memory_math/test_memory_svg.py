"""The charts: XML that parses, numbers that appear, lengths in proportion."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from memory_math import MemoryMathError
from memory_math.svg import PALETTE, column, line_chart, log_ticks, nice_ticks, number_text, rectangles, stacked_bars, timeline

SVG = "{http://www.w3.org/2000/svg}"
BARS = {"full": {"weights": 25.0, "gradients": 25.0, "states": 50.0}, "lora": {"weights": 12.5, "states": 0.25}}
PHASES = {"load": 12.0, "forward": 38.0, "backward": 39.5, "optimizer step": 13.0}


def charts() -> dict[str, str]:
    return {
        "line": line_chart({"a": [(1, 2), (3, 4)], "b": [(1, 1), (2, 8)]}, title="Line", x_label="x", y_label="y"),
        "bars": stacked_bars(BARS, title="Bars", unit="GiB", marks={"GPU": 79.5}),
        "timeline": timeline(PHASES, title="Phases", unit="GiB"),
        "rectangles": rectangles([[("0", "#0072B2"), ("1", "#E69F00")], [("1", "#0072B2")]], ["fp32", "bf16"], title="Bits"),
    }


def texts(document: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(document).iter(f"{SVG}text")]


def boxes(document: str) -> dict[str, ElementTree.Element]:
    """Rectangle by what it says under the pointer."""
    found = ElementTree.fromstring(document).iter(f"{SVG}rect")
    return {box.find(f"{SVG}title").text: box for box in found if box.find(f"{SVG}title") is not None}


@pytest.mark.parametrize("name", ["line", "bars", "timeline", "rectangles"])
def test_a_chart_is_a_standalone_document_on_its_own_paper_and_the_same_each_time(name: str) -> None:
    document = charts()[name]
    root = ElementTree.fromstring(document)
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    paper = root[0]
    assert paper.tag == f"{SVG}rect" and paper.get("fill") == "#FFFFFF" and paper.get("width") == paper.get("height") == "100%"
    assert document == charts()[name]


@pytest.mark.parametrize("name", ["line", "bars", "timeline", "rectangles"])
def test_nothing_is_drawn_outside_of_the_paper(name: str) -> None:
    root = ElementTree.fromstring(charts()[name])
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter():
        for left, top in (("x", "y"), ("x1", "y1"), ("x2", "y2"), ("cx", "cy")):
            if element.get(left):
                assert 0 <= float(element.get(left)) <= width and 0 <= float(element.get(top)) <= height, ElementTree.tostring(element)


def test_parts_are_as_wide_as_their_amounts_and_lie_end_to_end() -> None:
    found = boxes(charts()["bars"])
    widths = {name: float(box.get("width")) for name, box in found.items()}
    assert widths["full, states: 50 GiB"] / widths["full, weights: 25 GiB"] == pytest.approx(2, rel=1e-3)
    assert widths["lora, weights: 12.5 GiB"] / widths["full, states: 50 GiB"] == pytest.approx(0.25, rel=1e-3)
    assert widths["lora, states: 0.25 GiB"] / widths["full, states: 50 GiB"] == pytest.approx(0.005, abs=1e-4)
    weights, gradients = found["full, weights: 25 GiB"], found["full, gradients: 25 GiB"]
    assert float(weights.get("x")) + float(weights.get("width")) == pytest.approx(float(gradients.get("x")), abs=0.02)


def test_a_part_has_one_colour_in_every_bar_and_in_the_legend() -> None:
    found = boxes(charts()["bars"])
    assert found["full, weights: 25 GiB"].get("fill") == found["lora, weights: 12.5 GiB"].get("fill") == PALETTE[0]
    assert found["full, states: 50 GiB"].get("fill") == found["lora, states: 0.25 GiB"].get("fill") == PALETTE[2]
    legend = [text for text in texts(charts()["bars"]) if text in ("weights", "gradients", "states")]
    assert legend == ["weights", "gradients", "states"]


def test_bars_say_their_sums_and_a_mark_stands_where_its_amount_is() -> None:
    document = charts()["bars"]
    assert "100 GiB" in texts(document) and "12.75 GiB" in texts(document) and "GPU: 79.5 GiB" in texts(document)
    full = boxes(document)["full, weights: 25 GiB"]
    pixels = float(full.get("width")) / 25
    mark = next(line for line in ElementTree.fromstring(document).iter(f"{SVG}line") if line.get("stroke-width") == "1.5")
    assert float(mark.get("x1")) == pytest.approx(float(full.get("x")) + 79.5 * pixels, abs=0.1)


def test_phases_are_as_high_as_their_amounts_and_the_highest_is_the_peak() -> None:
    found = boxes(charts()["timeline"])
    heights = {name: float(box.get("height")) for name, box in found.items()}
    assert heights["backward: 39.5 GiB"] / heights["optimizer step: 13 GiB"] == pytest.approx(39.5 / 13, rel=1e-3)
    assert [text for text in texts(charts()["timeline"]) if text.startswith("peak")] == ["peak 39.5 GiB"]
    odd = {box.get("fill") for name, box in found.items() if name.startswith("backward")}
    assert odd.isdisjoint(box.get("fill") for name, box in found.items() if not name.startswith("backward"))


def test_a_logarithmic_axis_makes_powers_a_straight_line() -> None:
    document = line_chart({"cube": [(10.0**k, 10.0 ** (3 * k)) for k in range(5)]}, title="t", x_label="x", y_label="y", log_x=True, log_y=True)
    line = next(ElementTree.fromstring(document).iter(f"{SVG}polyline"))
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert slopes == pytest.approx([slopes[0]] * 4, abs=0.01) and slopes[0] < 0  # pixels count downwards


def test_text_is_escaped() -> None:
    nasty = "<b> & \"quotes\" 'and' more"
    document = stacked_bars({nasty: {nasty: 1.0}}, title=nasty, unit=nasty, marks={nasty: 2.0})
    assert nasty in texts(document) and ElementTree.fromstring(document).get("aria-label") == nasty
    document = line_chart({nasty: [(0, 0), (1, 1)]}, title=nasty, x_label=nasty, y_label=nasty)
    assert texts(document).count(nasty) == 4  # title, legend, both axes
    assert nasty in texts(rectangles([[(nasty, "#000000")]], [nasty], title=nasty)) and nasty in texts(timeline({nasty: 1}, title=nasty, unit=nasty))


def test_text_on_dark_cells_is_light_and_on_light_cells_dark() -> None:
    document = rectangles([[("dark", "#000000"), ("light", "#F0E442")]], ["row"], title="t")
    ink = {element.text: element.get("fill") for element in ElementTree.fromstring(document).iter(f"{SVG}text")}
    assert ink["dark"] == "#FFFFFF" and ink["light"] == "#222222"


@pytest.mark.parametrize(("low", "high"), [(0, 47), (0, 0.0031), (-3, 3), (98, 99), (0, 1e12), (5, 5), (0, 0)])
def test_ticks_are_1_2_or_5_times_a_power_of_ten_and_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 12
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    assert [b - a for a, b in pairwise(ticks)] == pytest.approx([step] * (len(ticks) - 1))


@pytest.mark.parametrize(("low", "high"), [(3, 40), (1, 1), (7, 7), (1e18, 5e25), (0.02, 0.3), (1e-9, 1e9)])
def test_logarithmic_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.000001 and ticks[-1] >= high * 0.999999 and 2 <= len(ticks) <= 12 and ticks == sorted(set(ticks))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(MemoryMathError, match=r"'Empty'.*no point"):
        line_chart({"a": []}, title="Empty", x_label="x", y_label="y")
    with pytest.raises(MemoryMathError, match=r"0.*above 0 on a logarithmic axis"):
        line_chart({"a": [(0, 1), (1, 1)]}, title="t", x_label="x", y_label="y", log_x=True)
    with pytest.raises(MemoryMathError, match="nan"):
        line_chart({"a": [(0, math.nan)]}, title="t", x_label="x", y_label="y")
    with pytest.raises(MemoryMathError, match=r"-1.*at least 0"):
        stacked_bars({"a": {"b": -1.0}}, title="t", unit="GiB")
    with pytest.raises(MemoryMathError, match="no bar"):
        stacked_bars({}, title="t", unit="GiB")
    with pytest.raises(MemoryMathError, match="no phase"):
        timeline({}, title="t", unit="GiB")
    with pytest.raises(MemoryMathError, match="1 rows and 2 labels"):
        rectangles([[("0", "#000000")]], ["a", "b"], title="t")
    with pytest.raises(MemoryMathError, match="this file has drawn"):
        column("<p>")


def test_a_column_is_as_high_as_its_charts_together() -> None:
    parts = [charts()["bars"], charts()["timeline"]]
    root = ElementTree.fromstring(column(*parts))
    heights = [float(ElementTree.fromstring(part).get("height")) for part in parts]
    assert float(root.get("height")) == pytest.approx(sum(heights))
    assert [float(inner.get("y")) for inner in root.findall(f"{SVG}svg")] == [0.0, heights[0]]


def test_lines_past_the_palette_are_told_apart_by_dashes() -> None:
    document = line_chart({str(number): [(0, number), (1, number)] for number in range(20)}, title="t", x_label="x", y_label="y")
    looks = [(line.get("stroke"), line.get("stroke-dasharray")) for line in ElementTree.fromstring(document).iter(f"{SVG}polyline")]
    assert len(set(looks)) == 20


def test_numbers_have_four_figures() -> None:
    assert [number_text(value) for value in (0, 1, 999.96, 123456, 2e6, 0.00012)] == ["0", "1", "1,000", "123,456", "2e6", "1.2e-4"]


def test_values_that_hardly_differ_have_an_axis_all_the_same() -> None:
    document = line_chart({"a": [(0, 1e9), (1, 1e9 + 1e-4)]}, title="t", x_label="x", y_label="y")
    assert document.count("<polyline") == 1 and len(nice_ticks(1e9, 1e9 + 1e-4, 8)) >= 2


def test_a_long_title_is_written_smaller() -> None:
    def size_of(title: str) -> int:
        return int(next(ElementTree.fromstring(timeline(PHASES, title=title, unit="GiB")).iter(f"{SVG}text")).get("font-size"))

    assert size_of("short") == 15 and 15 > size_of("a" * 100) >= size_of("a" * 1000) == 9
