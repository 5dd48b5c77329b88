"""Rows that stay on disk are the rows that are read into memory, to `fit` as well; and memory holds no more than where they are."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from tiny_workshop import QUIET, forgotten, our_llama, plain_tokenizer

import lora_lab
from lora_lab import LoraLabError, data
from lora_lab.training import fit

ROWS = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "zwei \u2028 three", "quatre", "fünf", "six", "sieben")]


def written(folder: Path, text: str | None = None, name: str = "rows.jsonl") -> Path:
    """With a byte-order mark, an empty line and Windows' line ends among the others."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = folder / name
    path.write_bytes(("\ufeff" + "\n\n".join((lines[0], "\r\n".join(lines[1:]))) if text is None else text).encode())
    return path


def test_rows_and_places_are_those_of_load(tmp_path):
    path = written(tmp_path)
    (loaded, _), opened = data.load(path), data.open_rows(path)
    assert [*opened] == [*loaded] == ROWS and len(opened) == 6
    assert [opened.where(i) for i in range(6)] == [loaded.where(i) for i in range(6)]
    assert opened[-1] == ROWS[-1] and opened[1:3] == ROWS[1:3]
    assert pickle.loads(pickle.dumps(opened))[3] == ROWS[3]
    with pytest.raises(IndexError):
        opened[6]


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_tokens": 400}])
def test_training_on_them_is_training_on_rows_in_memory(tmp_path, settings):
    path, weights = written(tmp_path), []
    for rows in (data.load(path)[0], data.open_rows(path)):
        torch.manual_seed(0)
        model = lora_lab.inject(our_llama(max_position_embeddings=400), 2)
        result = fit(model, rows, {"max_steps": 4, "micro_batch_size": 2, **settings, **QUIET}, tokenizer=plain_tokenizer(), eval_data=rows)
        weights.append([result.losses, result.eval_losses, *(p for p in model.parameters() if p.requires_grad)])
    assert weights[0][:2] == weights[1][:2]
    assert all(torch.equal(one, other) for one, other in zip(weights[0][2:], weights[1][2:], strict=True))


def test_a_run_on_rows_in_memory_goes_on_with_the_same_rows_on_disk(tmp_path):
    path, config = written(tmp_path), {"max_steps": 4, "micro_batch_size": 2, "save_every": 3, "output_dir": tmp_path / "run", **QUIET}
    losses = []
    for rows, resume in ((data.load(path)[0], False), (data.open_rows(path), True)):
        torch.manual_seed(0)
        model = lora_lab.inject(our_llama(max_position_embeddings=400), 2)
        if resume:
            forgotten(model)
            shutil.rmtree(tmp_path / "run" / "snapshots" / "step-000004")
        losses.append(fit(model, rows, {**config, "resume": resume}, tokenizer=plain_tokenizer()).losses)
    assert losses[0] == losses[1]


def test_encoded_rows_are_gone_with_what_held_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    encoded = data.encode_rows(data.open_rows(written(tmp_path)), plain_tokenizer())
    assert len(encoded) == 6 and [*tmp_path.glob("lora-lab-rows-*")]
    assert [*encoded] == data.encode_rows(ROWS, plain_tokenizer())
    del encoded
    assert not [*tmp_path.glob("lora-lab-rows-*")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ("\n \n", "holds no rows"),
        (json.dumps(ROWS), "an object a line"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": 3}', "line 2"),
        ('{"instruction": "a", "output": "b"}\n{oops', "line 2, column 2: not JSON"),
    ],
)
def test_what_is_no_file_of_rows_is_told_with_its_line(tmp_path, text, said):
    with pytest.raises(LoraLabError, match=said):
        data.open_rows(written(tmp_path, text))


def test_a_missing_file_and_one_that_changes_are_told(tmp_path):
    with pytest.raises(LoraLabError, match="cannot be read"):
        data.open_rows(tmp_path / "no.jsonl")
    path = written(tmp_path)
    opened = data.open_rows(path)
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(LoraLabError, match="has changed since its rows were opened"):
        opened[0]


def test_memory_holds_sixteen_bytes_a_row(tmp_path):
    """And so it does of encoded ones: the rows themselves are 500 bytes each."""
    path, count = tmp_path / "many.jsonl", 4_000
    path.write_text("".join(json.dumps({"instruction": "x" * 400, "output": str(i)}) + "\n" for i in range(count)))
    tracemalloc.start()
    opened = data.open_rows(path)
    encoded = opened.each(lambda row, where: {"input_ids": [*range(50)], "labels": [1] * 50})
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(encoded) == len(opened) == count
    assert kept < 2 * 20 * count and most < kept + 500_000
