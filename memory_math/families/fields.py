"""The fields of a config.json, each checked as it is read: a mistake is an error that names the field and what it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MemoryMathError

LARGEST, MOST_LAYERS = 2**31 - 1, 2_000  # layers are gone through one by one; the deepest model that was published has 1,000
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers")
SAME_TASK = {"LMHeadModel": "ForCausalLM", "WithLMHeadModel": "ForConditionalGeneration"}  # GPT-2's name for it, and T5's of 2020


@dataclass(frozen=True)
class Fields:
    """A config with the name that errors call it by. None counts as absent, as transformers writes it for "the class's own"."""

    config: Mapping[str, object]
    name: str

    def has(self, field: str) -> bool:
        return self.config.get(field) is not None

    def whole(self, field: str, purpose: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number. `field` may give several names for it, "n_embd|hidden_size"; without `default` it has to be there."""
        name = next((name for name in field.split("|") if self.has(name)), field.split("|")[0])
        value = self.config.get(name)
        value = default if value is None else value
        if value is None:
            found = ", ".join(sorted(map(str, self.config))) or "nothing"
            raise MemoryMathError(f"{self.name}: the config has no {name} ({purpose}); found: {found}")
        most = MOST_LAYERS if name in DEPTHS else LARGEST
        if isinstance(value, bool) or not isinstance(value, int) or (not least <= value <= most and value != default):
            raise MemoryMathError(f"{self.name}: {name}={value!r} ({purpose}): expected a whole number of at least {least}, at most {most:,}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise MemoryMathError(f"{self.name}: {field}={value!r}: expected true or false")
        return value

    def share(self, field: str, default: float) -> float:
        """A probability, such as of dropout."""
        value = self.config.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise MemoryMathError(f"{self.name}: {field}={value!r}: expected a number with 0 <= {field} < 1")
        return float(value)

    def text(self, field: str, default: str) -> str:
        value = self.config.get(field)
        value = default if value is None else value
        if not isinstance(value, str):
            raise MemoryMathError(f"{self.name}: {field}={value!r}: expected a name, in quotes")
        return value

    def multi_head_sizes(self) -> dict[str, Any]:
        """vocabulary, hidden, layers, heads, kv_heads and head_dim of a model whose heads all have keys and values of their own."""
        hidden = self.whole("hidden_size", "the width of the residual stream")
        heads = self.whole("num_attention_heads", "the heads")
        return {
            "vocabulary": self.whole("vocab_size", "the rows of the embedding"),
            "hidden": hidden,
            "layers": self.whole("num_hidden_layers", "the number of blocks"),
            "heads": heads,
            "kv_heads": heads,
            "head_dim": self.split(hidden, heads, "hidden_size and num_attention_heads"),
        }

    def split(self, total: int, parts: int, what: str) -> int:
        """total / parts; both are sizes that `what` names."""
        if total % parts:
            raise MemoryMathError(f"{self.name}: {total} does not divide into {parts} heads: check {what}")
        return total // parts

    def refuse(self, *fields: str) -> None:
        """Raise for a field that is set and would add parameters that are not modelled."""
        for field in fields:
            if self.config.get(field):
                raise MemoryMathError(f"{self.name}: {field}={self.config[field]!r} is not modelled yet: only models without it are")

    def labels(self) -> int:
        """Of a classifier: num_labels, or as many as id2label has, or transformers' 2."""
        names = self.config.get("id2label")
        return self.whole("num_labels", "the classes of a classifier", len(names) if isinstance(names, Mapping) and names else 2)

    def task(self, class_names: Sequence[str], tasks: Sequence[str]) -> str:
        """The end of architectures[0] that says which class it is; the first of `tasks` where the config names none."""
        classes = self.config.get("architectures")
        if not classes:
            return tasks[0]
        if not isinstance(classes, (list, tuple)) or not isinstance(classes[0], str):
            raise MemoryMathError(f"{self.name}: architectures={classes!r}: expected a list with the name of the model's class")
        task = end_of(classes[0], class_names)
        if task not in tasks:
            known = ", ".join(class_names[0] + task for task in tasks)
            raise MemoryMathError(f"{self.name}: architectures[0]={classes[0]!r} is not modelled; modelled of this family: {known}")
        return task


def end_of(class_name: str, class_names: Sequence[str]) -> str:
    """"BertForMaskedLM" -> "ForMaskedLM". What comes before "For" may be foreign: Falcon's files say RWForCausalLM.

    >>> end_of("T5EncoderModel", ("T5",)), end_of("RWForCausalLM", ("Falcon",)), end_of("GPT2LMHeadModel", ("GPT2",))
    ('EncoderModel', 'ForCausalLM', 'ForCausalLM')
    """
    _, found, task = class_name.partition("For")
    if found and task[:1].isupper():
        return found + task
    prefix = next((prefix for prefix in class_names if class_name.startswith(prefix)), "")
    end = class_name[len(prefix) :]
    return SAME_TASK.get(end, end)
