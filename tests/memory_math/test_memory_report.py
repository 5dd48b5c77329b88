"""How a footprint looks: table, picture, notebook, JSON."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from memory_math import MemoryMathError, hardware, predict
from memory_math.footprint import Footprint
from memory_math.report import html_grid, markdown_grid, share_bar, size_text, text_grid, unit_for
from memory_math.tape import PUBLIC_PARTS

SVG = "{http://www.w3.org/2000/svg}"
REQUEST = {"method": "lora", "precision": "bf16-mixed", "batch_size": 4, "sequence_length": 256}


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return predict("smollm2-135m", **REQUEST)


def widths(document: str) -> dict[str, float]:
    """Width of every part of the stacked bar, by the part's name."""
    found = {}
    for box in ElementTree.fromstring(document).iter(f"{SVG}rect"):
        says = box.findtext(f"{SVG}title") or ""
        if says.startswith("at the peak, "):
            found[says.removeprefix("at the peak, ").split(":")[0].replace(" ", "_")] = float(box.get("width"))
    return found


def test_the_table_has_every_part_phase_and_total_in_bytes(footprint: Footprint) -> None:
    lines = footprint.table().splitlines()
    for part in PUBLIC_PARTS:
        line = next(line for line in lines if line.startswith(part.replace("_", " ")))
        assert size_text(getattr(footprint, part)) in line and f"{getattr(footprint, part) / footprint.total:.1%}" in line
    for phase, nbytes in footprint.phases.items():
        assert any(line.startswith(phase) and size_text(nbytes) in line for line in lines)
    assert [line.split()[0] for line in lines if line.endswith("<- the peak")] == [footprint.peak_phase.split()[0]]
    assert any(line.startswith("total allocated") and size_text(footprint.total) in line for line in lines)
    assert any(line.startswith("reserved") and size_text(footprint.reserved.estimate) in line for line in lines)
    assert lines[-1] == f"checked: {footprint.validated}"


def test_share_bars_are_as_long_as_their_shares() -> None:
    assert [len(share_bar(share, cells=16)) for share in (0, 0.25, 0.5, 1)] == [0, 4, 8, 16]
    assert share_bar(3 / 8, cells=1) == "▍" and share_bar(1e-9) == "▏"
    eighths = [share_bar(number / 8, cells=1) for number in range(1, 9)]
    assert [ord(block) for block in eighths] == list(range(0x258F, 0x2587, -1))


def test_the_picture_shows_parts_as_wide_as_their_bytes(footprint: Footprint) -> None:
    found = widths(footprint.svg())
    assert set(found) == {part for part in PUBLIC_PARTS if getattr(footprint, part)}
    whole = sum(found.values())
    for part, wide in found.items():
        assert wide / whole == pytest.approx(getattr(footprint, part) / footprint.total, abs=1e-4)


def test_the_picture_marks_a_gpu_where_its_usable_bytes_are(footprint: Footprint) -> None:
    document = footprint.svg("T4")
    usable = hardware.gpu_of("T4").usable_bytes
    mark = next(line for line in ElementTree.fromstring(document).iter(f"{SVG}line") if line.get("stroke-width") == "1.5")
    bar = [box for box in ElementTree.fromstring(document).iter(f"{SVG}rect") if "at the peak" in (box.findtext(f"{SVG}title") or "")]
    start, found = min(float(box.get("x")) for box in bar), widths(document)
    assert (float(mark.get("x1")) - start) / sum(found.values()) == pytest.approx(usable / footprint.total, rel=1e-3)
    assert "T4" in document and "T4" not in footprint.svg()
    assert "the limit" in footprint.svg(10 * 2**30)
    with pytest.raises(MemoryMathError, match="did you mean 'T4'"):
        footprint.svg("T44")


def test_a_notebook_shows_the_table_and_the_picture(footprint: Footprint) -> None:
    page = ElementTree.fromstring(footprint._repr_html_().replace('xmlns="http://www.w3.org/2000/svg" ', ""))
    cells = [cell.text for cell in page.iter("td")]
    for part in PUBLIC_PARTS:
        assert size_text(getattr(footprint, part)) in cells and footprint.how[part] in cells
    assert len(page.findall("svg")) == 1


def test_what_a_model_is_called_cannot_break_the_page(footprint: Footprint) -> None:
    from dataclasses import replace

    named = replace(footprint, name="<script>&\"'")
    assert "<script>" not in named._repr_html_()
    assert ElementTree.fromstring(named.svg()) is not None


def test_json_is_every_number_as_a_whole_number_of_bytes(footprint: Footprint) -> None:
    read = json.loads(footprint.to_json())
    assert {part: read[part] for part in PUBLIC_PARTS} == {part: getattr(footprint, part) for part in PUBLIC_PARTS}
    assert read["total"] == footprint.total and read["phases"] == footprint.phases
    assert read["reserved"]["low"] == footprint.reserved.low and read["request"]["batch_size"] == 4
    assert "\n" not in footprint.to_json(indent=None)


def test_a_cpu_prediction_has_a_picture_without_a_gpus_totals() -> None:
    footprint = predict("smollm2-135m", device="cpu", **REQUEST)
    assert "reserved" not in footprint.table() and "nvidia-smi" not in footprint._repr_html_()


def test_grids_carry_the_same_cells_as_text_markdown_and_html() -> None:
    header, rows = ["a", "b"], [["x|y", "1"], ["z", "22"]]
    assert text_grid(header, rows).splitlines() == ["a     b", "x|y   1", "z    22"]
    assert markdown_grid(header, rows).splitlines() == ["| a | b |", "| :--- | ---: |", "| x\\|y | 1 |", "| z | 22 |"]
    cells = [cell.text for cell in ElementTree.fromstring(html_grid(header, rows)).iter("td")]
    assert cells == ["x|y", "1", "z", "22"]


def test_units_stop_at_gib() -> None:
    assert [unit_for(nbytes)[1] for nbytes in (0, 5, 2**10, 2**20, 2**30, 2**41)] == ["B", "B", "KiB", "MiB", "GiB", "GiB"]
