"""Text to token ids and back, and chat templates: a thin layer over the `tokenizers` library.

Method names are those of transformers' tokenizers, so that either kind can be given to `lora_lab.data` and `fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import LoraLabError
from ..files import json_object, write_file, write_json
from .chat_sandbox import render

Message = dict[str, str]
GENERATION = "generation_config.json"
CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"),
            (" 're", "'re"))  # fmt: skip


@dataclass
class Tokenizer:
    """backend: the `tokenizers.Tokenizer`.  special: names to tokens ("eos_token": "</s>").  stop_ids: what ends a generation.

    cleans_up: decoding takes the blank before a punctuation mark away (transformers' clean_up_tokenization_spaces, never where the model is BPE).
    """

    backend: tokenizers.Tokenizer
    special: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    stop_ids: frozenset[int] = frozenset()
    cleans_up: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json; None without the first."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except BaseException as error:  # the library raises plain Exception, and where it panics none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise LoraLabError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        backend.no_truncation()  # settings of somebody's last call, which would cut or pad every text from here on
        backend.no_padding()
        config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        special = {key: _text(value) for key, value in config.items() if key.endswith("_token") and isinstance(value, (str, dict))}
        if odd := [key for key, token in special.items() if not token.isascii() and token != token.encode("utf-8", "replace").decode()]:
            raise LoraLabError(f"{folder}: {odd[0]}={special[odd[0]]!a} holds half of a character")
        stop = _json(folder / GENERATION).get("eos_token_id", _json(folder / "config.json").get("eos_token_id"))
        cleans_up = config.get("clean_up_tokenization_spaces") is True and type(backend.model).__name__ != "BPE"
        return cls(backend, special, _template(folder, config.get("chat_template")), stop_ids_of(stop), cleans_up)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, which transformers reads too."""
        folder = Path(folder)
        text = self.backend.to_str(pretty=True)  # the library's own `save` reports a full disk as an Exception of no class
        write_file(folder / "tokenizer.json", lambda path: _write(path, text))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": self.cleans_up, **self.special}
        if "cls_token" in self.special and any(self("a", "a")["token_type_ids"]):
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # BERT's; transformers would leave the types out
        write_json(folder / "tokenizer_config.json", {**config, **({"chat_template": self.chat_template} if self.chat_template else {})})
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # an older one would win over ours
        if self.stop_ids:
            generation = folder / GENERATION
            write_json(generation, {**_json(generation), "eos_token_id": sorted(self.stop_ids)})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def __call__(self, text: str, text_pair: str | None = None, truncation: bool = False, max_length: int | None = None) -> dict[str, list[int]]:
        """{"input_ids", "token_type_ids", "attention_mask"} of one text or two, with special tokens; of a pair BERT's second text has type 1.

        truncation: cut to max_length tokens, special ones included; of two texts the longer one is cut first.
        """
        if truncation and max_length is not None:
            self.backend.enable_truncation(max_length)
        try:
            encoding = self.backend.encode(text, text_pair)
        finally:
            self.backend.no_truncation()
        return {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids, "attention_mask": encoding.attention_mask}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        for spaced, plain in CLEAN_UP if self.cleans_up else ():
            text = text.replace(spaced, plain)
        return text

    def apply_chat_template(self, messages: Sequence[Message], tokenize: bool = False, add_generation_prompt: bool = False) -> Any:
        """Render messages ({"role", "content"} each) as the model was trained to see them: text, or ids with tokenize=True.

        Raises LoraLabError where the tokenizer has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise LoraLabError("this tokenizer has no chat template: give plain prompts, or rows with instruction / input / output")
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        text = render(self.chat_template, **self.special, **given)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def token_id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id("bos_token")

    @property
    def pad_token_id(self) -> int:
        """The padding token's id; else the end-of-text token's, else 0 (padding is masked, so any id will do)."""
        return next((i for i in (self.token_id("pad_token"), self.eos_token_id) if i is not None), 0)

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""
        return self.stop_ids | ({self.eos_token_id} if self.eos_token_id is not None else set())

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def __len__(self) -> int:
        return self.vocab_size


def stop_ids_of(value: Any) -> frozenset[int]:
    """What ends a generation, as configurations have it: an id, a list of them, or null."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise LoraLabError(f"eos_token_id={value!r:.80}: expected a token's id, or a list of them")
    return frozenset(ids)


def _template(folder: Path, in_config: Any) -> str | None:
    """That of chat_template.jinja, else the configuration's; of a list of named ones the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LoraLabError(f"{path} is not UTF-8 ({error.reason})") from None
    if isinstance(in_config, list):
        named = [entry.get("template") for entry in in_config if isinstance(entry, dict) and entry.get("name") == "default"]
        in_config = next(iter(named), None)
    return in_config if isinstance(in_config, str) else None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _json(path: Path) -> dict[str, Any]:
    return json_object(path.read_bytes(), path) if path.is_file() else {}
