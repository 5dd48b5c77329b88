"""Text to token ids and back, and chat templates: a thin layer over the `tokenizers` library.

Method names are those of transformers' tokenizers, so that either kind can be given to `lora_lab.data` and `fit`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from ..errors import LoraLabError
from ..files import write_file, write_json

Message = dict[str, str]


@dataclass
class Tokenizer:
    """backend: the `tokenizers.Tokenizer`.  special: names to tokens ("eos_token": "</s>").  stop_ids: what ends a generation."""

    backend: tokenizers.Tokenizer
    special: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json; None without the first."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise LoraLabError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        backend.no_truncation()  # settings of somebody's last call, which would cut or pad every text from here on
        backend.no_padding()
        config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        special = {key: _text(value) for key, value in config.items() if key.endswith("_token") and isinstance(value, (str, dict))}
        stop = _json(folder / "generation_config.json").get("eos_token_id", _json(folder / "config.json").get("eos_token_id"))
        stop_ids = frozenset([stop] if isinstance(stop, int) else stop or [])
        template = folder / "chat_template.jinja"
        chat_template = template.read_text(encoding="utf-8") if template.is_file() else _default_template(config.get("chat_template"))
        return cls(backend, special, chat_template, stop_ids)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, which transformers reads too."""
        folder = Path(folder)
        write_file(folder / "tokenizer.json", lambda path: self.backend.save(str(path)))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        if "cls_token" in self.special and any(self("a", "a")["token_type_ids"]):
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # BERT's; transformers would leave the types out
        write_json(folder / "tokenizer_config.json", {**config, **({"chat_template": self.chat_template} if self.chat_template else {})})
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # an older one would win over ours
        if self.stop_ids:
            generation = folder / "generation_config.json"
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
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

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


def render(template: str, **variables: Any) -> str:
    """Render a chat template in jinja2's sandbox: a template comes with a model, so it is somebody else's program.

    Raises LoraLabError for a template that is not valid, refuses its input, or reaches for what the sandbox forbids.
    """
    import jinja2

    try:
        return str(_sandbox().from_string(template).render(**variables))
    except jinja2.TemplateError as error:
        raise LoraLabError(f"the chat template refused: {error}") from None
    except Exception as error:  # whatever somebody else's program may raise
        raise LoraLabError(f"the chat template failed on these messages: {type(error).__name__}: {error}") from None


@functools.cache
def _sandbox() -> Any:
    """The environment transformers gives its templates: the same filters, functions and tags."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what is to be learned; here it is only rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    environment.globals["dict"] = lambda *items, **named: dict(*items, **named)  # the type itself would let dict.update(...) through
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _default_template(value: Any) -> str | None:
    """A template, or the default one of a list of named ones."""
    if isinstance(value, list):
        return next((entry["template"] for entry in value if entry.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise LoraLabError(f"{path} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}
