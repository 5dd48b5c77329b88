"""One vector for a text: an encoder's hidden states pooled, as sentence-transformers does it (Reimers & Gurevych 2019, arXiv:1908.10084).

    model, tokenizer = models.load("all-minilm-l6-v2")
    vectors = models.embed(model, tokenizer, ["a text", "another"])      # [2, 384], of length 1
    similarity = vectors @ vectors.T                                     # cosines
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import LoraLabError, did_you_mean
from ..files import json_object, read_json
from ..wrapping import base_of
from .base import PretrainedModel, in_mode, longest_row, pad_id_of
from .progress import watched

MODES = ("mean", "cls", "max", "mean_sqrt_len")
# sentence-transformers' name for each, in 1_Pooling/config.json
FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
         "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len"}  # fmt: skip
LAYOUT = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "*_Pooling/config.json")


@dataclass(frozen=True)
class Pooling:
    """How hidden states become one vector.

    mode: "mean" over the text, "cls" (the first position), "max" over the text, or "mean_sqrt_len" (the sum / sqrt(positions)).
    normalize: to length 1.  max_length: tokens of a text that are read; None is the model's context.
    """

    mode: str = "mean"
    normalize: bool = True
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise LoraLabError(f"pooling {self.mode!r}: expected one of {', '.join(MODES)}{did_you_mean(self.mode, MODES)}")

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden: [B, T, H].  mask: [B, T], 1 for text.  Returns [B, H], in float32 at least."""
        hidden, text = hidden.to(torch.promote_types(hidden.dtype, torch.float32)), mask[:, :, None].to(hidden.device)
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif self.mode == "max":
            pooled = hidden.masked_fill(text == 0, -torch.inf).amax(1)
        else:
            length = text.sum(1).clamp(min=1).to(hidden.dtype)
            pooled = (hidden * text).sum(1) / (length if self.mode == "mean" else length.sqrt())
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    @classmethod
    def of_folder(cls, folder: Path) -> Pooling:
        """What a folder's modules.json says; without one, the mean, normalised. Raises LoraLabError for what is not modelled here."""
        if not (folder / "modules.json").is_file():
            return cls()
        mode, normalize = "mean", False
        for module in _modules(folder):
            kind = str(module.get("type")).rpartition(".")[2]
            if kind == "Pooling":
                mode = _mode(read_json(folder / _inside(folder, module.get("path")) / "config.json"), folder)
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise LoraLabError(f"{folder / 'modules.json'} has a {kind} after the encoder: expected Transformer, Pooling and Normalize only")
        settings = folder / "sentence_bert_config.json"
        longest = read_json(settings).get("max_seq_length") if settings.is_file() else None
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
            raise LoraLabError(f"{settings}: max_seq_length={longest!r}, expected a whole number of at least 1, or null")
        return cls(mode, normalize, longest)


def embed(model: nn.Module, tokenizer: Any, texts: Sequence[str], batch_size: int = 32, *, pooling: Pooling | None = None,
          progress: bool = False) -> Tensor:  # fmt: skip
    """One vector a text: [n, H], float32, on the model's device, without gradients.

    model: an encoder (its output has .last_hidden_state), e.g. `models.load("all-minilm-l6-v2")[0]`.
    texts: each is taken without the blanks around it and cut to the pooling's max_length and the model's context, as sentence-transformers
        does. Texts of like length are computed together, so that little of the work is padding.
    pooling: None is what the model's folder says (modules.json), else the mean over the text, normalised.  progress: a bar on stderr where it
        takes long.
    Raises LoraLabError for a single text, a model without .last_hidden_state, no tokenizer, and a layout that is not modelled here.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise LoraLabError(f"texts is {texts!r:.60}: expected a list of texts")
    if tokenizer is None:
        raise LoraLabError("texts become vectors through a tokenizer: this model's folder has no tokenizer.json")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise LoraLabError(f"batch_size={batch_size!r}: expected a whole number of at least 1")
    pooling = pooling or pooling_of(model)
    longest = longest_row(model, pooling.max_length)
    cut = {} if longest is None else {"truncation": True, "max_length": longest}
    rows = [[int(i) for i in tokenizer(text.strip(), **cut)["input_ids"]] for text in texts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)  # if memory is short, it shows at once
    pad, batches = pad_id_of(tokenizer), [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with in_mode(model, training=False), torch.no_grad():
        vectors = [_vectors(model, [rows[index] for index in batch], pad, pooling)
                   for batch in watched(batches, "embed", progress)]  # fmt: skip
    if not vectors:
        return torch.zeros(0, model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    return torch.cat(vectors)[torch.tensor(order, device=vectors[0].device).argsort()]


def pooling_of(model: nn.Module) -> Pooling:
    """The pooling of the folder the model was loaded from."""
    folder = getattr(base_of(model), "source_folder", None)
    return Pooling.of_folder(folder) if isinstance(folder, Path) else Pooling()


def _vectors(model: nn.Module, rows: list[list[int]], pad: int, pooling: Pooling) -> Tensor:
    device = next(model.parameters()).device
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    ids, mask = ids.to(device), mask.to(device)
    hidden = getattr(model(input_ids=ids, attention_mask=mask), "last_hidden_state", None)
    if hidden is None:
        raise LoraLabError(f"a {type(model).__name__} returned no .last_hidden_state: load the encoder with task='feature-extraction'")
    return pooling(hidden, mask)


# sentence-transformers' files ---------------------------------------------------------------------------------------------------


def copy_layout(model: PretrainedModel, folder: Path) -> None:
    """Beside a saved encoder, the files that say how its vectors are made; they are those of the folder it was loaded from."""
    source = model.source_folder
    if model.head_path is not None or model.new_head or source is None or not source.is_dir():
        return
    for path in (path for pattern in LAYOUT for path in source.glob(pattern)):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    modules = json_object(b'{"modules": %s}' % path.read_bytes(), path)["modules"]
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise LoraLabError(f"{path} holds no list of modules: expected sentence-transformers' {{'type', 'path'}} each")
    return modules


def _inside(folder: Path, name: Any) -> str:
    """The name of a folder in the model's own, and of none elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{0,100}", name) or name == "..":
        raise LoraLabError(f"{folder / 'modules.json'}: path={name!r}: expected the name of a folder beside it, such as '1_Pooling'")
    return name


def _mode(config: dict[str, Any], folder: Path) -> str:
    """Older files have a flag for each mode, newer ones its name."""
    modes = [FLAGS.get(name, name) for name, on in config.items() if name.startswith("pooling_mode_") and on]
    if isinstance(named := config.get("pooling_mode"), str):
        modes = [named]
    if len(modes) != 1 or modes[0] not in MODES:
        raise LoraLabError(f"{folder} pools by {' and '.join(modes) or 'nothing'}: expected one of {', '.join(MODES)}")
    return modes[0]
