"""adapter_config.json of a prompt, both ways.

    PROMPT_TUNING   rows of the embedding; ours of method "prompt", and "residual" once it is folded
    P_TUNING        the rows that an MLP (or LSTM) made; PEFT keeps the rows alone
    PREFIX_TUNING   keys and values for every layer

Missing keys are as PEFT fills them in. What PEFT knows and would compute something else from is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lab.checks import LARGEST, is_size
from lora_lab.errors import LoraLabError, did_you_mean
from lora_lab.models.base import is_encoder_decoder

from ..base_model import ANSWERING, is_causal_lm, is_named
from ..layout import check_placement
from ..prefix_cache import prefix_shape
from ..soft_prompt import Prompt

ROWS, PREFIX = ("PROMPT_TUNING", "P_TUNING"), "PREFIX_TUNING"
OWN_PREFIX = "LORA_LAB_PREFIX"  # of an encoder-decoder; a name that PEFT stops at, where it would share out the layers wrongly
READ = {"peft_type", "num_virtual_tokens", "num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim", "task_type",
        "modules_to_save", "placement", "encoder_reparameterization_type", "prefix_projection"}  # fmt: skip
# How the prompt began or was trained: the function is the same without.
PROVENANCE = {
    "auto_mapping", "base_model_name_or_path", "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "inference_mode", "init_weights",
    "peft_version", "prompt_tuning_init", "prompt_tuning_init_text", "revision", "runtime_config", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
REFUSED = {
    "LORA": "it holds LoRA adapters: lora_lab.load reads it",
    "MULTITASK_PROMPT_TUNING": "its prompt is a product with factors of a task: multiply prompt_embeddings by prefix_task_cols[task] @ "
                               "prefix_task_rows[task], and save the rows as PROMPT_TUNING",
    "CPT": "its prompt stands for the words of its examples, which are masked and decay in training: that is not read here",
    "CARTRIDGE": "its keys and values belong to the text they were distilled from, frozen rows included: that is not read here",
}  # fmt: skip
TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}


@dataclass(frozen=True)
class BaseSizes:
    """What a configuration says of the model a prompt is for; None where the model does not say."""

    hidden: int
    layers: int | None
    heads: int | None
    encoder_decoder: bool

    @classmethod
    def of(cls, base: nn.Module) -> BaseSizes:
        embedding, config = base.get_input_embeddings(), getattr(base, "config", None)  # type: ignore[operator]
        layers, heads = (_first(config, names) for names in (("num_hidden_layers", "num_layers"), ("num_attention_heads", "num_heads")))
        return cls(embedding.embedding_dim, layers, heads, is_encoder_decoder(base))


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


# Writing --------------------------------------------------------------------------------------------------------------------


def peft_config(base: nn.Module, peft_type: str, num_virtual_tokens: int, sizes: Mapping[str, Any], heads: list[str]) -> dict[str, Any]:
    """sizes: of the method, with PEFT's names.  heads: modules of the base whose values are in the file."""
    here = BaseSizes.of(base)
    name = getattr(base, "name_or_path", None)
    return {
        "peft_type": peft_type,
        "task_type": task_type(base),
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
        "num_virtual_tokens": num_virtual_tokens,
        "num_transformer_submodules": 1,  # PEFT would make rows for the decoder, too, and never use them
        "token_dim": here.hidden,
        "num_layers": here.layers,
        "num_attention_heads": here.heads,
        "modules_to_save": heads or None,
        "inference_mode": True,
        **sizes,
    }


def type_and_sizes(base: nn.Module, prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """PEFT's name of the method, and its keys."""
    if prompt.method == "prefix":
        layers, heads, head_dim = prefix_shape(base)
        sizes = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim, "init_weights": None}
        projection = {"prefix_projection": prompt.hidden_size is not None, "encoder_hidden_size": prompt.hidden_size or heads * head_dim}
        return (OWN_PREFIX if is_encoder_decoder(base) else PREFIX), sizes | projection
    if prompt.method == "p-tuning":
        encoder = {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0}
        return "P_TUNING", {**encoder, "encoder_hidden_size": prompt.hidden_size}
    return "PROMPT_TUNING", {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}


def task_type(base: nn.Module) -> str:
    """By it PEFT chooses what puts the prompt before the text; without one it would leave the prompt out."""
    if is_causal_lm(base):
        return "CAUSAL_LM"
    if is_named(base, ANSWERING):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in TASKS.items() if is_named(base, (ending,))), "FEATURE_EXTRACTION")


# Reading --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a configuration says of its prompt, checked.  submodules: how many times the rows are in the file; the first are used.

    network: the words for what made the rows and is not in PEFT's file, or "".
    """

    peft_type: str
    num_virtual_tokens: int
    submodules: int
    task: str | None
    heads: tuple[str, ...]
    placement: str
    network: str


def from_peft(config: dict[str, Any], base: nn.Module, path: Path) -> Written:
    """Keep what says how the tensor is used. path: of the file, for messages.

    Raises LoraLabError for another method, a feature that is not read here, a number that makes no sense, and another model.
    """
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and peft_type in REFUSED:
        raise LoraLabError(f"{path}: peft_type is {peft_type!r}: {REFUSED[peft_type]}")
    known = (*ROWS, PREFIX, OWN_PREFIX)
    if peft_type not in known:
        raise LoraLabError(f"{path}: peft_type is {peft_type!r}, expected one of {', '.join(known)}{did_you_mean(peft_type, known)}")
    for key, value in config.items():
        if key not in READ | PROVENANCE and value not in (None, False, "", {}, []):
            raise LoraLabError(f"{path}: {key}={value!r} is a feature that is not read here; the result would compute something else")
    if config.get("num_virtual_tokens") is None:
        raise LoraLabError(f"{path}: num_virtual_tokens is missing: it says how many rows are one prompt")
    tokens = _number(config, "num_virtual_tokens", path)
    written = Written(peft_type, tokens or 0, _submodules(config, path), config.get("task_type"), _names(config, path), _placement(config, path),
                      _network(config, path))  # fmt: skip
    _check_model(config, written, base, path)
    return written


def rows_in_use(rows: Tensor, config: dict[str, Any], base: nn.Module, path: Path) -> Tensor:
    """Of the rows in a file those that are read: PEFT's prompts of an encoder-decoder have P more for its decoder, which nothing ever reads.

    path: of the configuration, for messages. Raises LoraLabError for PEFT's prefix of an encoder-decoder.
    """
    _refuse_shared_slots(config.get("peft_type"), base, path)
    tokens = _number(config, "num_virtual_tokens", path)
    return rows[:tokens] if tokens is not None and len(rows) == tokens * _submodules(config, path) else rows


def _submodules(config: dict[str, Any], path: Path) -> int:
    """How many times the rows are in the file; left out, PEFT's prompts have two of an encoder-decoder's."""
    twice = config.get("task_type") == "SEQ_2_SEQ_LM" and config.get("peft_type") in ROWS
    return _number(config, "num_transformer_submodules", path) or (2 if twice else 1)


def _refuse_shared_slots(peft_type: Any, base: nn.Module, path: Path) -> None:
    if peft_type == PREFIX and is_encoder_decoder(base):
        raise LoraLabError(f"{path}: PEFT's prefix of an encoder-decoder is not read: PEFT repeats the layers' slots and splits them in fours, so "
                           "that layer j of the decoder gets slots 4j mod 2L and half of what was saved never had a gradient. Train a prefix "
                           "here (method='prefix'), or a prompt, whose files are exchanged with PEFT")  # fmt: skip


def _number(config: dict[str, Any], key: str, path: Path) -> int | None:
    value = config.get(key)
    if value is not None and not is_size(value):
        raise LoraLabError(f"{path}: {key}={value!r}: expected a whole number of at least 1, at most {LARGEST:,}")
    return value


def _names(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = config.get("modules_to_save") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise LoraLabError(f"{path}: modules_to_save={names!r}: expected a list of names")
    return tuple(dict.fromkeys(names))  # PEFT writes "classifier" and "score" twice


def _placement(config: dict[str, Any], path: Path) -> str:
    try:
        return check_placement(config.get("placement", "front"))
    except LoraLabError as error:
        raise LoraLabError(f"{path}: {error}") from None


def _network(config: dict[str, Any], path: Path) -> str:
    if config["peft_type"] != "P_TUNING":
        return "MLP" if config["peft_type"] == PREFIX and config.get("prefix_projection") else ""
    network = config.get("encoder_reparameterization_type") or "MLP"
    if network not in ("MLP", "LSTM"):
        raise LoraLabError(f"{path}: encoder_reparameterization_type={network!r}: expected 'MLP' or 'LSTM'")
    return str(network)


def _check_model(config: dict[str, Any], written: Written, base: nn.Module, path: Path) -> None:
    """Raise LoraLabError where the file says that it was made for another model."""
    _refuse_shared_slots(written.peft_type, base, path)
    here = BaseSizes.of(base)
    of_both = written.peft_type == OWN_PREFIX or written.submodules > 1
    if (of_both or written.task in ("SEQ_2_SEQ_LM", "CAUSAL_LM")) and (of_both or written.task == "SEQ_2_SEQ_LM") != here.encoder_decoder:
        kinds = ("an encoder-decoder", "a model with one stack")
        raise LoraLabError(f"{path}: task_type={written.task!r} and num_transformer_submodules={config.get('num_transformer_submodules')!r} are of "
                           f"{kinds[here.encoder_decoder]}, this model is {kinds[not here.encoder_decoder]}: a prompt for another model")  # fmt: skip
    if written.submodules > 2:
        raise LoraLabError(f"{path}: num_transformer_submodules={written.submodules}: expected 1, or 2 for an encoder-decoder")
    for key, value in _sizes(here, written, base).items():
        if value is not None and (said := _number(config, key, path)) not in (None, value):
            raise LoraLabError(f"{path}: {key}={said}, this model has {value}: a prompt for another model")


def _sizes(here: BaseSizes, written: Written, base: nn.Module) -> dict[str, int | None]:
    """What a configuration has to say of this model, where it says it. Of a prefix the key/value heads count, fewer than there are queries."""
    if written.peft_type in ROWS:
        return {"token_dim": here.hidden, "num_layers": here.layers, "num_attention_heads": here.heads}
    layers, heads, head_dim = prefix_shape(base)
    return {"token_dim": heads * head_dim, "num_layers": layers, "num_attention_heads": heads}
