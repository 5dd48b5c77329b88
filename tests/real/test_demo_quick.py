"""The demonstration as a user runs it, on the real model: what it prints is what it claims."""

from __future__ import annotations

import re

import pytest

from lora_lab import demo
from lora_lab.checkpoint import CONFIG, TENSORS

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def story(smollm2, tmp_path_factory):
    """(what it printed, the texts of each generation, its folder) of one quick run."""
    printed, texts, out = [], [], tmp_path_factory.mktemp("demo") / "adapter"
    generate = demo.models.generate

    def recorded(*arguments, **settings):
        result = generate(*arguments, **settings)
        texts.append(result.texts)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.models, "generate", recorded)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        demo.run(demo.Settings(quick=True, out=out))
    return "\n".join(printed), texts, out


def number(text, pattern):
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in what the demonstration printed"
    return [float(group) for group in match.groups()]


def test_injecting_changes_no_text_and_no_bit(story):
    printed, texts, _ = story
    assert re.search(r"same text: yes; same logits, bit for bit: yes", printed)
    assert texts[1] == texts[0][:1]


def test_training_changes_every_text(story):
    printed, texts, _ = story
    before, after = texts[0], texts[-1]
    assert len(before) == len(after) == 4
    assert all(old != new and new.strip() for old, new in zip(before, after, strict=True))
    assert "BEFORE" in printed and "AFTER" in printed


def test_the_held_out_loss_falls(story):
    first, last = number(story[0], r"held-out loss +([\d.]+) -> ([\d.]+)")
    assert last < first - 0.1


def test_memory_is_predicted_within_three_percent(story):
    predicted, measured = number(story[0], r"memory of a step, predicted +([\d.]+) MiB(?:.|\n)*memory of a step, measured +([\d.]+) MiB")
    (ratio,) = number(story[0], r"predicted / measured +([\d.]+)")
    assert 0.97 < ratio < 1.03
    assert predicted / measured == pytest.approx(ratio, abs=1e-3)


def test_the_saved_adapter_reloads_bit_for_bit(story):
    printed, _, out = story
    assert re.search(r"reloaded logits equal, bit for bit: yes", printed)
    assert {TENSORS, CONFIG} <= {path.name for path in out.iterdir()}
    (megabytes,) = number(printed, rf"{TENSORS}: ([\d.]+) MB")
    assert megabytes == pytest.approx((out / TENSORS).stat().st_size / 1e6, abs=0.01)
    assert f"--adapter {out}" in printed
