"""What a prompt's folder says of itself, without the model: for a look before it is loaded, and for what has no model at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.errors import LoraLabError, did_you_mean
from lora_lab.peft_files.config import CONFIG, TENSORS, read_config, what_is_missing
from lora_lab.streaming.shards import StoredTensor, read_shard

from ..initialization import Initialization
from .config import OWN_PREFIX, PREFIX, REFUSED, ROWS
from .heads import PREFIX as OF_THE_BASE
from .reading import KEY, initialization_in
from .trainable import path_of

METHODS = {"PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning", PREFIX: "prefix", OWN_PREFIX: "prefix"}


@dataclass(frozen=True)
class Description:
    """tensor: the rows in the file, not read.  files: name -> bytes.  network: the method of the network that is beside them, or "".

    placement: "front" | "after-bos".  initialization, base, base_sha256: None where the file does not say.  peft: what PEFT makes of it.
    """

    peft_type: str
    num_virtual_tokens: int
    tensor: StoredTensor
    files: dict[str, int]
    network: str
    placement: str
    heads: tuple[str, ...]
    task_type: str | None
    base: str | None
    base_sha256: str | None
    initialization: Initialization | None

    @property
    def method(self) -> str:
        return self.network or METHODS[self.peft_type]

    @property
    def peft(self) -> str:
        if self.peft_type == OWN_PREFIX:
            return "no: it would share out the layers of an encoder-decoder's prefix in another way"
        if self.placement != "front":
            return f"it reads the file, but puts the prompt in front, and this one stands {self.placement}: the results differ"
        if self.task_type == "SEQ_CLS" and self.peft_type in ROWS:
            return "yes; of a BERT it reads the class off the first virtual token, so the logits differ"
        if self.task_type == "QUESTION_ANS" and self.peft_type in ROWS:
            return "yes; it counts the start and end of an answer from the first virtual token, so they are later by the virtual tokens"
        return "yes"

    def __str__(self) -> str:
        return "\n".join(f"{name:<16}{value}" for name, value in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        rows, width = self.tensor.shape
        yield "method", self.method + (" (plain keys and values)" if self.method == "prefix" and not self.network else "")
        yield "virtual tokens", f"{self.num_virtual_tokens}, {width:,} numbers each, {self.tensor.dtype}" + _unused(rows, self.num_virtual_tokens)
        yield "placement", self.placement
        yield "began as", "not in the file" if self.initialization is None else str(self.initialization)
        yield "base", (self.base or "not named") + (f", SHA-256 {self.base_sha256[:12]}..." if self.base_sha256 else "")
        if self.heads:
            yield "head", f"{', '.join(self.heads)} (load(..., head=True) puts it into the base)"
        if self.method in ("p-tuning", "residual"):
            yield "trains on as", "the network that made the rows" if self.network else "plain rows: the network that made them is not in the folder"
        yield "files", ", ".join(f"{name} {size:,} bytes" for name, size in self.files.items())
        yield "PEFT reads it", self.peft


def _unused(rows: int, tokens: int) -> str:
    return f"; of {rows} rows the others are never used" if rows != tokens else ""


def describe(folder: str | Path) -> Description:
    """Read the headers of a prompt's folder, ours or PEFT's. Raises LoraLabError for what is missing or damaged, and for another method's files."""
    folder = Path(folder)
    if not (folder / TENSORS).is_file():
        raise LoraLabError(what_is_missing(folder))
    shard = read_shard(folder / TENSORS)
    config = read_config(folder, shard.metadata, stacklevel=4)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in METHODS:
        known = f"expected one of {', '.join(METHODS)}{did_you_mean(peft_type, METHODS)}"
        raise LoraLabError(f"{folder / CONFIG}: peft_type is {peft_type!r}: {REFUSED.get(str(peft_type), known)}")
    tensor, tokens = shard.tensors.get(KEY), config.get("num_virtual_tokens")
    if tensor is None or len(tensor.shape) != 2 or not isinstance(tokens, int):
        raise LoraLabError(f"{folder}: expected {KEY!r} [rows, numbers] in {TENSORS} and num_virtual_tokens in {CONFIG}: the prompt is incomplete")
    network, heads = _network(folder), {key.removeprefix(OF_THE_BASE).split(".")[0] for key in shard.tensors if key != KEY}
    return Description(str(peft_type), tokens, tensor, _sizes(folder), network, str(config.get("placement", "front")), tuple(sorted(heads)),
                       config.get("task_type"), _text(config.get("base_model_name_or_path")), shard.metadata.get("base_sha256"),
                       initialization_in(shard.metadata, folder))  # fmt: skip


def _network(folder: Path) -> str:
    beside = sorted(folder.glob(path_of(Path(), "*").name))
    return read_shard(beside[0]).metadata.get("lora_lab_method", "") if beside else ""


def _sizes(folder: Path) -> dict[str, int]:
    names = [TENSORS, *sorted(path.name for path in folder.glob(path_of(Path(), "*").name)), CONFIG]
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
