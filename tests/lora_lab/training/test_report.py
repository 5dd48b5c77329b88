"""The report of a run: what is drawn and said is what the log holds, in a file that needs nothing else."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_workshop import QUIET, our_llama, token_rows

import lora_lab
from lora_lab import LoraLabError
from lora_lab.training import fit
from lora_lab.training.line_chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, Line, line_chart, thinned
from lora_lab.training.report import BARS, RunLog, charts, read_run, smoothed, sparkline, summary, write
from memory_math.svg import nice_ticks

SVG = "{http://www.w3.org/2000/svg}"
STEPS = [
    {"step": 1, "loss": 4.0, "learning_rate": 0.01, "grad_norm": 2.0, "tokens": 100, "skipped": False, "seconds": 0.5, "peak_bytes": 2**30},
    {"step": 2, "loss": 3.0, "learning_rate": 0.005, "grad_norm": None, "tokens": 300, "skipped": True, "seconds": 1.0, "peak_bytes": 3 * 2**29},
    {"step": 3, "loss": 2.5, "learning_rate": 0.001, "grad_norm": 1.0, "tokens": 400, "skipped": False, "seconds": 3.0, "peak_bytes": 3 * 2**29},
]
EVALUATIONS = [{"step": 0, "eval_loss": 4.5}, {"step": 2, "eval_loss": 3.25}, {"step": 3, "eval_loss": 3.5}]


def written(folder: Path, *entries: dict[str, Any], rest: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + rest)
    return folder


@pytest.fixture
def run(tmp_path):
    return written(tmp_path / "run", EVALUATIONS[0], *STEPS[:2], EVALUATIONS[1], STEPS[2], EVALUATIONS[2])


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.get("points").split())] for line in lines]


def words(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# What a log holds -----------------------------------------------------------------------------------------------------------


def test_the_log_that_training_writes_has_every_curve(tmp_path):
    model = lora_lab.inject(our_llama(), rank=2)
    config = {"max_steps": 6, "micro_batch_size": 2, "eval_every": 3, "learning_rate": 0.02, "output_dir": tmp_path, **QUIET}
    result = fit(model, token_rows(6), config, eval_data=token_rows(3, seed=5))
    run = read_run(tmp_path)
    assert [loss for _, loss in run.points("loss")] == result.losses
    assert run.points("eval_loss") == list(zip([0, 3, 6], result.eval_losses, strict=True))
    assert len(run.speed()) == len(run.points("grad_norm")) == 6 and len(charts([run])) == 5
    assert run.memory()[-1][1] * 2**30 <= result.peak_bytes
    times = [line["seconds"] for line in run.steps]
    assert times == sorted(times) and times[0] > 0 and times[-1] == pytest.approx(result.seconds, abs=1e-6)
    assert sum(speed * (now - then) for (_, speed), now, then in zip(run.speed(), times, [0.0, *times], strict=False)) == pytest.approx(result.tokens)


def test_points_are_the_numbers_of_the_lines_that_have_them(run):
    log = read_run(run)
    assert log.points("grad_norm") == [(1, 2.0), (3, 1.0)]
    assert log.speed() == [(1, 200.0), (2, 400.0), (3, 50.0)]
    assert log.memory() == [(1, 1.0), (2, 1.5), (3, 1.5)]
    assert read_run(run / "log.jsonl").steps == log.steps


def test_a_last_line_that_was_cut_off_is_ignored(tmp_path):
    """A process that was killed may have left half a line."""
    folder = written(tmp_path / "run", *STEPS, rest='{"step": 4, "lo')
    assert read_run(folder).steps == STEPS
    assert read_run(written(tmp_path / "run", *STEPS, rest='{"step": 4, "loss": 1.0}')).steps == STEPS


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no step yet"), ('{"step": 1, "lo', "holds no step yet"), ("oops\n", r"log.jsonl, line 1: not JSON"),
    ('{"step": 1, "loss": 1}\n[1]\n', "line 2: expected an object with a 'step'"), ('{"loss": 1}\n', "line 1: expected an object with a 'step'"),
    ("[" * 100_000 + "\n", "line 1: not JSON"),
])  # fmt: skip
def test_what_is_no_log_is_refused(tmp_path, text, message):
    with pytest.raises(LoraLabError, match=message):
        read_run(written(tmp_path / "run", rest=text))
    with pytest.raises(LoraLabError, match="no log of a run at .*nowhere"):
        read_run(tmp_path / "nowhere")


# Curves ---------------------------------------------------------------------------------------------------------------------


def test_a_line_lies_where_its_numbers_are():
    """Highest value on top, last step on the right; in proportion between the ticks."""
    (line,) = polylines(line_chart("loss", [Line("run", [(0, 0.0), (5, 10.0), (10, 5.0)])]))
    assert line == [(LEFT, BOTTOM), (LEFT + (RIGHT - LEFT) / 2, TOP), (RIGHT, pytest.approx((TOP + BOTTOM) / 2))]


def test_a_report_of_one_run_draws_the_losses_and_a_chart_for_each_other_number(run):
    drawn = charts([read_run(run)])
    assert [words(svg)[0] for svg in drawn] == ["loss", "learning rate", "gradient norm, before clipping", "tokens per second",
                                                "peak memory so far, GiB"]  # fmt: skip
    assert {"training", "held out"} <= {*words(drawn[0])}
    assert [len(line) for line in polylines(drawn[0])] == [3, 3, 3]
    assert drawn[0].count("<circle") == 3  # of the held-out losses


def test_several_runs_lie_over_each_other_in_their_own_colours(tmp_path, run):
    """One pair of axes for all; what only one has logged is drawn for that one."""
    other = written(tmp_path / "other", {"step": 1, "loss": 3.0}, {"step": 9, "loss": 2.0})
    both = [read_run(run), read_run(other)]
    drawn = charts(both)
    assert [len(line) for line in polylines(drawn[0])] == [3, 2, 3, 3, 2] and len(polylines(drawn[1])) == 1
    assert words(drawn[0])[0] == "loss (with dots: held out)"
    assert any(word.startswith("…") and str(other).endswith(word[1:]) for word in words(drawn[0]))  # the paths here are long
    strokes = set(re.findall(r'<polyline [^>]*stroke="(#\w+)"', drawn[0]))
    assert len(strokes) == 2
    text = summary(both)
    assert str(run) in text and str(other) in text and text.index(str(run)) < text.index(str(other))


def test_files_need_nothing_else_and_escape_what_is_not_text(tmp_path):
    folder = written(tmp_path / "a<b>&c", *STEPS, *EVALUATIONS)
    for ending in ("html", "svg"):
        write([read_run(folder)], tmp_path / f"report.{ending}")
        text = (tmp_path / f"report.{ending}").read_text()
        assert not re.search(r"(src|href|@import|url\(|<script|<link)", text)
        assert "<b>" not in text
    assert "a&lt;b&gt;&amp;c" in (tmp_path / "report.html").read_text() and "held-out loss" in (tmp_path / "report.html").read_text()
    root = ElementTree.parse(tmp_path / "report.svg").getroot()
    assert [child.get("y") for child in root.iter(f"{SVG}svg")] == [None, *(str(HEIGHT * row) for row in range(5))]
    with pytest.raises(LoraLabError, match=r"report\.png.*\.html or \.svg"):
        write([read_run(folder)], tmp_path / "report.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraLabError, match="could not save the report"):
        write([read_run(folder)], tmp_path / "file" / "report.html")


def test_numbers_that_are_none_are_left_out_of_a_line(tmp_path):
    (line,) = polylines(line_chart("x", [Line("", [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)])]))
    assert len(line) == 2
    assert "nothing was logged" in words(line_chart("x", [Line("", [(1, float("nan"))])]))
    skipped = written(tmp_path / "run", {"step": 1, "loss": None, "grad_norm": None, "skipped": True, "tokens": 5, "seconds": 0.0})
    assert "1 steps skipped" in summary([read_run(skipped)]) and charts([read_run(skipped)])


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), min_size=1, max_size=40, unique_by=lambda point: point[0]))
def test_every_point_is_inside_the_axes(points):
    svg = line_chart("x", [Line("run", sorted(points), dots=True)])
    for x, y in polylines(svg)[0]:
        assert LEFT - 0.01 <= x <= RIGHT + 0.01 and TOP - 0.01 <= y <= BOTTOM + 0.01


@settings(max_examples=100)
@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
@example(0.0, 5e-324)
@example(1e9, 1e9 + 1.2e-7)
def test_ticks_are_round_and_reach_past_both_ends(one, other):
    low, high = sorted((one, other))
    made = nice_ticks(low, high)
    rounding = 1e-6 * max(abs(low), abs(high)) + 1e-300
    assert made[0] <= low + rounding and made[-1] >= high - rounding and 2 <= len(made) <= 12
    assert made == sorted({*made})


def test_long_lines_are_thinned_without_moving_their_mean():
    points = [(step, float(step % 7)) for step in range(10_001)]
    short = thinned(points)
    assert len(short) <= 600
    assert sum(y for _, y in short) / len(short) == pytest.approx(3.0, abs=0.01)
    assert thinned(points[:600]) == points[:600]


def test_a_moving_mean_ends_where_the_line_ends():
    points = [(step, 100.0 - step) for step in range(100)]
    assert [value for _, value in smoothed(points)] == pytest.approx([value for _, value in points])
    wild = [(step, float(step % 2)) for step in range(100)]
    assert {round(value, 1) for _, value in smoothed(wild)[5:-5]} <= {0.3, 0.4, 0.5, 0.6, 0.7}
    assert smoothed([(1, 4.0), (2, 1.0)]) == [(1, 4.0), (2, 1.0)] and smoothed([]) == []


# Text -----------------------------------------------------------------------------------------------------------------------


def test_the_summary_says_the_numbers_of_the_log(run):
    text = summary([read_run(run)])
    assert text.splitlines()[0] == str(run)
    assert "3 steps, 400 tokens, 3 s, 133 tokens/s, 1 steps skipped by float16 overflow" in text
    assert re.search(r"training loss +4 -> 2\.5 +█▃▁", text)
    assert re.search(r"held-out loss +4\.5 -> 3\.5 +█▁▂  best 3\.25 at step 2", text)
    assert "peak memory    1.50 GiB" in text
    only = RunLog("x", [], EVALUATIONS)
    assert "0 steps" in summary([only]) and "training loss" not in summary([only])


def test_the_peak_is_the_highest_though_a_resumed_run_counts_anew(tmp_path):
    folder = written(tmp_path / "run", *STEPS, {"step": 4, "loss": 2.0, "peak_bytes": 2**29})
    assert "peak memory    1.50 GiB" in summary([read_run(folder)])


@settings(max_examples=100)
@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_a_sparkline_has_a_bar_for_each_value_or_forty(values):
    line = sparkline(values)
    assert len(line) == min(len(values), 40) and {*line} <= {*BARS}
    if len({*values}) > 1 and len(values) <= 40:
        assert line[values.index(max(values))] == "█" and line[values.index(min(values))] == "▁"
