"""The demonstration as a user runs it, on the real model: what it prints is what it claims."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from real_models import had_or_skipped

import lora_lab
from lora_lab.checkpoint import CONFIG, TENSORS
from lora_lab.demo import MODEL
from lora_lab.models.catalogue import fetch

pytestmark = pytest.mark.real
ROOT = Path(lora_lab.__file__).parent.parent


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(what one quick run printed, its folder), in a process of its own: it measures every tensor that is alive."""
    with had_or_skipped():
        fetch(MODEL)
    out = tmp_path_factory.mktemp("demo") / "adapter"
    command = "from pathlib import Path; from lora_lab.demo import Settings, run; import sys; run(Settings(quick=True, out=Path(sys.argv[1])))"
    result = subprocess.run([sys.executable, "-c", command, str(out)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout, out


def texts(printed):
    """The two columns of part 7, one (before, after) for each request."""
    part = printed[printed.index("\n== 7.") : printed.index("\n== 8.")]
    pairs = []
    for block in part.split("BEFORE")[1:]:
        rows = [line for line in block.split("\n\n")[0].split("\n")[2:] if not line.startswith(">")]
        cells = [(line + " | ").split(" | ") for line in rows]
        pairs.append(tuple(" ".join(row[column].strip() for row in cells).strip() for column in (0, 1)))
    return pairs


def number(text, pattern):
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in what the demonstration printed"
    return [float(group) for group in match.groups()]


def test_injecting_changes_no_text_and_no_bit(story):
    assert re.search(r"same text: yes; same logits, bit for bit: yes", story[0])


def test_training_changes_every_text(story):
    pairs = texts(story[0])
    assert len(pairs) == 4
    assert all(before and after and before != after for before, after in pairs)
    assert len({text for pair in pairs for text in pair}) == 8


def test_the_held_out_loss_falls(story):
    first, last = number(story[0], r"held-out loss +([\d.]+) -> ([\d.]+)")
    assert last < first - 0.1


def test_memory_is_predicted_within_three_percent(story):
    predicted, measured = number(story[0], r"memory of a step, predicted +([\d.]+) MiB(?:.|\n)*memory of a step, measured +([\d.]+) MiB")
    (ratio,) = number(story[0], r"predicted / measured +([\d.]+)")
    assert 0.97 < ratio < 1.03
    assert predicted / measured == pytest.approx(ratio, abs=1e-3)


def test_the_saved_adapter_reloads_bit_for_bit(story):
    printed, out = story
    assert re.search(r"reloaded logits equal, bit for bit: yes", printed)
    assert {TENSORS, CONFIG} <= {path.name for path in out.iterdir()}
    (megabytes,) = number(printed, rf"{TENSORS}: ([\d.]+) MB")
    assert megabytes == pytest.approx((out / TENSORS).stat().st_size / 1e6, abs=0.01)
    assert f"--adapter {out}" in printed
