"""The file PEFT does not have: the network that makes a prompt, with which training goes on exactly.

    adapter_model.safetensors              the prompt it makes, for PEFT and for use
    trainable-<twelve digits>.safetensors  its parameters, and what it began as, by name; the method in the metadata

The digits are of the SHA-256 of the prompt in the first file. So the two cannot be mistaken for a pair when one was replaced, or when a save was
interrupted between them: an older pair stays whole until the newer one is, and what is left over is removed by the next save.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_lab.checks import are_finite
from lora_lab.errors import LoraLabError
from lora_lab.files import write_file
from lora_lab.streaming.shards import raw_bytes, read_shard
from lora_lab.wrapping import whole

from ..reparameterization import PrefixMLP, PTuning, ResidualPrompt
from ..soft_prompt import Prompt

INITIAL = "initial"  # of the buffer, and in the file
FIRST_LAYERS = {"p-tuning": "mlp_head.0.weight", "residual": "down.weight", "prefix": "transform.0.weight"}  # [hidden, width]


def digest_of(rows: Tensor) -> str:
    """The digits in the name of the file that belongs to these rows."""
    return hashlib.sha256(raw_bytes(rows)).hexdigest()[:12]


def path_of(folder: Path, digest: str) -> Path:
    return folder / f"trainable-{digest}.safetensors"


def network_tensors(prompt: Prompt) -> dict[str, Tensor]:
    """What is to be written of a reparameterised prompt: whole, on the CPU."""
    tensors = {**prompt.state_dict(), INITIAL: prompt.get_buffer(INITIAL)}
    return {name: whole(tensor.detach()).to("cpu").contiguous() for name, tensor in tensors.items()}


def write_trainable(folder: Path, digest: str, method: str, tensors: dict[str, Tensor]) -> None:
    metadata = {"format": "pt", "lora_lab_method": method}
    write_file(path_of(folder, digest), lambda path: save_file(tensors, path, metadata))


def remove_others(folder: Path, digest: str) -> None:
    """The networks of prompts that are no longer in the folder."""
    for path in set(folder.glob(path_of(Path(), "*").name)) - {path_of(folder, digest)}:
        path.unlink()


def read_trainable(plain: Prompt, folder: Path, digest: str) -> Prompt | None:
    """The network that made a plain prompt of this digest, or None where the folder does not have it.

    Raises LoraLabError for a damaged file, a method that is not known, and tensors that are missing, unexpected, of another shape or not finite.
    """
    if not (path := path_of(folder, digest)).is_file():
        return None
    shard = read_shard(path)
    tensors = {name: tensor.read() for name, tensor in shard.tensors.items()}
    for name, tensor in tensors.items():
        if not are_finite(tensor):
            raise LoraLabError(f"{path}: {name!r} ({tensor.dtype}, {list(tensor.shape)}): expected finite numbers")
    method = shard.metadata.get("lora_lab_method")
    for device in ("meta", "cpu"):  # a network may be far larger than the file that says how wide it is
        prompt = _empty(plain, method, tensors, path, device)
        expected = {**prompt.state_dict(), INITIAL: prompt.get_buffer(INITIAL)}
        shapes, wanted = ({name: list(tensor.shape) for name, tensor in each.items()} for each in (tensors, expected))
        if shapes != wanted:
            raise LoraLabError(f"{path} has {shapes}, expected {wanted}: save the task again")
    with torch.no_grad():
        prompt.to(next(iter(tensors.values())).dtype).get_buffer(INITIAL).copy_(tensors.pop(INITIAL))
    prompt.load_state_dict(tensors)
    return prompt


def _empty(plain: Prompt, method: str | None, tensors: dict[str, Tensor], path: Path, device: str) -> Prompt:
    """A network of the sizes that the tensors have; no random number is drawn that would be missed elsewhere."""
    first = tensors.get(FIRST_LAYERS.get(method or "", ""))
    if first is None or first.ndim != 2 or INITIAL not in tensors:
        raise LoraLabError(f"{path}: method {method!r} with {sorted(tensors)}: expected one of {', '.join(FIRST_LAYERS)} with its first layer and "
                           f"{INITIAL!r}")  # fmt: skip
    zeros = torch.zeros_like(plain.get_buffer(INITIAL), device=device)
    with torch.random.fork_rng(devices=[]):
        if method == "prefix":
            return PrefixMLP(zeros, len(first))
        return (PTuning if method == "p-tuning" else ResidualPrompt)(zeros, len(first))
