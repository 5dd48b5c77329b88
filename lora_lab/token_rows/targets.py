"""Which token rows a request names: ids of words for the model's input embedding, or {name of an embedding: ids}; and who shares them.

Names match at dots from the right, as everywhere here (PEFT's also match in the middle of a name).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..errors import LoraLabError, did_you_mean
from ..paths import is_inside, name_matches

FALLBACK = "embed_tokens"  # the input embedding of a model that has no get_input_embeddings(), as in PEFT


@dataclass(frozen=True)
class PlannedRows:
    """Rows of one embedding that are to be trained. tied: the layers that have its weight and take its rows."""

    path: str
    indices: tuple[int, ...]
    dim: int
    tied: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return len(self.indices) * self.dim

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def formula(self) -> str:
        also = f", in {' and '.join(self.tied)} too" if self.tied else ""
        return f"{len(self.indices)} rows * {self.dim}{also}"


Planned = tuple[PlannedRows, ...]


def plan_rows(model: nn.Module, request: Any, targets: Collection[str] = (), saved: Collection[str] = (), variant: str = "lora") -> Planned:
    """Resolve `trainable_token_indices`: None, the ids of words for the model's input embedding, or {name of an embedding: ids}.

    targets: layers that get a pair A and B, of this variant.  saved: modules that are trained whole.
    Raises LoraLabError for a name that matches no embedding, an id that is no word of it, and where the same adapter changes it otherwise, too.
    """
    return () if request is None else plan_paths(model, _by_path(model, request), targets, saved, variant)


def plan_paths(model: nn.Module, wanted: dict[str, tuple[int, ...]], targets: Collection[str], saved: Collection[str], variant: str) -> Planned:
    """`plan_rows` where the embeddings are known by path."""
    for path, indices in wanted.items():
        check_rows(model, path, indices)
        if path in targets:
            raise LoraLabError(f"trainable_token_indices: {path!r} is among target_modules, too, which PEFT's files cannot hold: leave it out of one,"
                               " or give the rows to an adapter of their own")  # fmt: skip
        if whole := next((module for module in saved if is_inside(path, [module])), None):
            raise LoraLabError(f"trainable_token_indices: {path!r} is trained whole by modules_to_save ({whole!r}): leave it out of one")
    planned = with_ties(model, wanted)
    if variant == "dora" and (both := next((path for rows in planned for path in rows.tied if path in targets), None)):
        raise LoraLabError(f"variant='dora' in {both!r}, which takes the trained rows of the embedding: DoRA's norm is that of a weight without them;"
                           " leave it out of target_modules")  # fmt: skip
    return planned


def _by_path(model: nn.Module, request: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(request, dict):
        return {input_embedding(model): _ids(request, "trainable_token_indices")}
    if not request:
        raise LoraLabError("trainable_token_indices={} names no embedding: give {name: ids}, a list of ids, or None")
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in request.items():
        paths = [path for path, _ in model.named_modules() if path and name_matches(name, path)]
        if not paths:
            raise LoraLabError(f"trainable_token_indices: {name!r} matches nothing.{_embeddings_here(model, name)}")
        for path in paths:
            if path in found:
                raise LoraLabError(f"trainable_token_indices: {path!r} is named twice, the second time by {name!r}")
            found[path] = _ids(ids, f"trainable_token_indices[{name!r}]")
    return found


def _ids(ids: Any, where: str) -> tuple[int, ...]:
    """A list of different whole numbers, as a tuple."""
    words = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, (str, dict)) else None
    if words is None or any(isinstance(word, bool) or not isinstance(word, int) for word in words):
        raise LoraLabError(f"{where}={ids!r}: expected a list of whole numbers, the ids of words (a tokenizer gives them), or {{name: ids}}")
    if not words:
        raise LoraLabError(f"{where}=[] names no word: give ids, or None for no rows")
    if len(set(words)) < len(words):
        raise LoraLabError(f"{where}: {next(word for word in words if words.count(word) > 1)} is there twice, and a word has one row")
    return tuple(words)


def input_embedding(model: nn.Module) -> str:
    """The path of the embedding that a list of ids means."""
    embedding = _input_embedding(model)
    paths = [path for path, module in model.named_modules() if module is embedding or (embedding is None and path.rpartition(".")[2] == FALLBACK)]
    if not paths:
        raise LoraLabError(f"trainable_token_indices: this {type(model).__name__} does not say which is its input embedding (no "
                           f"get_input_embeddings()), and has no {FALLBACK!r}: give {{name: ids}}.{_embeddings_here(model, '')}")  # fmt: skip
    return paths[0]


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return cast("nn.Module | None", cast(Any, model).get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None


def _embeddings_here(model: nn.Module, near: str) -> str:
    names = list(dict.fromkeys(path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Embedding)))
    return f"\n  Embeddings here: {', '.join(names) or 'none'}{did_you_mean(str(near), names)}"


def check_rows(model: nn.Module, path: str, indices: Sequence[int]) -> None:
    """Raise LoraLabError where a layer has no such rows, or they could not be trained."""
    module: Any = model.get_submodule(path)
    if not isinstance(module, nn.Embedding) and not (isinstance(module, nn.Linear) and module is _output_embedding(model)):
        raise LoraLabError(f"trainable_token_indices: {path!r} is a {type(module).__name__}, and neither an embedding nor the model's output layer."
                           f"{_embeddings_here(model, path.rpartition('.')[2])}")  # fmt: skip
    if hasattr(module, "quantization") or "weight" not in module._parameters:
        raise LoraLabError(f"trainable_token_indices: {path!r} is quantised, or computes its weight, and has no rows to begin with")
    if getattr(module, "max_norm", None) is not None:
        raise LoraLabError(f"trainable_token_indices: {path!r} has max_norm={module.max_norm}, which rescales rows while it looks them up")
    words = module.weight.shape[0]
    if wrong := [index for index in indices if not 0 <= index < words]:
        raise LoraLabError(f"trainable_token_indices: {wrong[0]} is no word of {path!r}, whose words are 0 to {words - 1} (after adding words to a "
                           "tokenizer, resize the model's embedding)")  # fmt: skip


def _output_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return cast("nn.Module | None", cast(Any, model).get_output_embeddings())
    except (AttributeError, NotImplementedError):
        return None


def with_ties(model: nn.Module, wanted: dict[str, tuple[int, ...]]) -> Planned:
    """Which other layers take an embedding's rows: those that have its weight, where it is the model's input embedding and the configuration
    says that weights are tied, as in PEFT. One of them that is given other ids has rows of its own, and then no layer takes another's."""
    embedding = _input_embedding(model) if _says_tied(model) else None
    first = next((path for path in wanted if model.get_submodule(path) is embedding), None)
    tied = [] if first is None else _holders(model, first)
    if first is None or any(wanted.get(path, wanted[first]) != wanted[first] for path in tied):
        tied, first = [], None
    return tuple(PlannedRows(path, ids, cast(Any, model.get_submodule(path)).weight.shape[1], tuple(tied) if path == first else ())
                 for path, ids in wanted.items() if path not in tied)  # fmt: skip


def _says_tied(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    return bool(config.get("tie_word_embeddings") if isinstance(config, dict) else getattr(config, "tie_word_embeddings", False))


def _holders(model: nn.Module, path: str) -> list[str]:
    """The other layers with the weight of this one."""
    first = model.get_submodule(path)
    found = [other for other, module in model.named_modules() if module is not first and module._parameters.get("weight") is first.weight]
    for other in found:
        if not isinstance(module := model.get_submodule(other), (nn.Embedding, nn.Linear)):
            raise LoraLabError(f"trainable_token_indices: {other!r} has the weight of {path!r} and is a {type(module).__name__}, in which no rows "
                               "can be put in the place of others; untie them first")  # fmt: skip
    return found
