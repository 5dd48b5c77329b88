"""SECURITY.md names the test that holds each promise: they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_is_there():
    promises = PAGE.split("## What is promised")[1].split("## What is not promised")[0]
    path, named = "", 0
    for file, name in re.findall(r"`((?:tests|lora_lab)/[\w/.]+|)(?:::(\w+))?`", promises):
        path = file or path
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), f"{path}::{name}"
        named += 1
    assert named > 15


def test_its_numbers_are_the_codes():
    from lora_lab.models.chat_sandbox import LONGEST_TEMPLATE, MOST_WORK, TURN
    from lora_lab.models.gguf_header import MOST_OTHERS, MOST_VALUES
    from lora_lab.streaming.shards import MOST_HEADER

    assert (MOST_WORK, TURN, MOST_HEADER) == (50_000_000, 100, 32 * 2**20)
    assert "at most 50 million characters, a turn of a loop or a call counted as 100" in PAGE and "headers beyond 32 MiB" in PAGE
    assert f"A chat template of at most {LONGEST_TEMPLATE:,} characters" in PAGE
    assert f"may have {MOST_VALUES:,} values" in PAGE and f"of which {MOST_OTHERS:,} neither text, int32 nor float32" in PAGE
