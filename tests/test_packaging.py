"""What `pip install` gives a user: the packages, their data, the licence, the commands."""

from __future__ import annotations

import configparser
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lora_lab

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # a build must not write into the checkout
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lora_lab", "memory_math", "prompt_tuning_lab"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []  # which a venv of Python 3.12 does not bring along
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", *offline, "--wheel-dir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_module_the_bundled_data_and_the_licence(wheel):
    for package in ("lora_lab", "memory_math", "prompt_tuning_lab"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".jsonl", ".typed"):
                assert path.relative_to(ROOT).as_posix() in wheel
    assert any(name.endswith("LICENSE") for name in wheel)
    assert not any(name.startswith(("tests", "benchmarks", "notebooks")) for name in wheel)


def test_the_wheels_commands_and_version_are_ours(wheel):
    points = next(text.decode() for name, text in wheel.items() if name.endswith("entry_points.txt"))
    for name, package in (("lora-lab", "lora_lab"), ("memory-math", "memory_math"), ("prompt-tuning-lab", "prompt_tuning_lab")):
        assert f"{name} = {package}.__main__:main" in points
    metadata = next(text.decode() for name, text in wheel.items() if name.endswith("METADATA"))
    assert f"Version: {lora_lab.__version__}" in metadata


def test_run_time_dependencies_are_five_and_the_oracles_are_not_among_them():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = {line.split(">")[0] for line in config["options"]["install_requires"].split()}
    assert names == {"torch", "numpy", "tokenizers", "safetensors", "tqdm"}
