"""Parameter counts: every preset against its published integer, other classes of the same configs, other people's printed sums."""

from __future__ import annotations

from collections.abc import Callable

from ..architectures import count_parameters
from ..presets import PRESETS
from ..time_and_cost import training_flops
from .rows import Rows

TINY_LLAMA_OF_ANSWER_AI = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 4096, "tie_word_embeddings": False,
}  # fmt: skip
TIED_FLAN_T5 = (  # FLAN-T5 as transformers 5 builds it from a config alone: the head tied to the embedding
    ("small", "60,511,616"), ("base", "222,903,552"), ("large", "750,251,008"), ("xl", "2,783,959,040"), ("xxl", "11,003,736,064"),
)  # fmt: skip


def presets() -> Rows:
    """A row for each shape; aliases are the same one."""
    rows = Rows("Count", "the config's repository or paper, as published or built")
    seen: set[int] = set()
    for name, preset in PRESETS.items():
        if id(preset) not in seen:
            seen.add(id(preset))
            rows.number(f"parameters of {name}", str(preset.parameters), count_parameters(name).total, "parameters", f"Config: {preset.source}.")
    return rows


def classes() -> Rows:
    rows = Rows("Class", "transformers 5.23, built from the config")
    for name, architecture, stated in (("bert-base-uncased", "BertForMaskedLM", "109,514,298"),
                                       ("bert-large-uncased", "BertForSequenceClassification", "335,143,938")):  # fmt: skip
        count = count_parameters({**PRESETS[name], "architectures": [architecture]})
        rows.number(f"parameters of {name} as {architecture}", stated, count.total, "parameters", "Another head, and a pooler or none.")
    for size, stated in TIED_FLAN_T5:
        count = count_parameters({**PRESETS[f"flan-t5-{size}"], "tie_word_embeddings": True})
        rows.number(
            f"parameters of flan-t5-{size} with its head tied", stated, count.total, "parameters", "32,128 x hidden fewer than the model itself."
        )
    count = count_parameters(TINY_LLAMA_OF_ANSWER_AI)
    rows.number("parameters of the Llama in answer.ai's notebook", "1,137,805,312", count.total, "parameters", "24 blocks of 2,048, MLP 4,096.")
    return rows


def rounded_sizes() -> Rows:
    rows = Rows("GPT3", "arXiv:2005.14165, table 2.1 and appendix D")
    count = count_parameters("gpt3-175b")
    rows.number("parameters of GPT-3", "175", count / 1e9, "billion", f"{count.total:,} by its shape.")
    rows.number("operations to train it on 300 billion tokens", "3.14e23", training_flops("gpt3-175b", 300e9).model, "operations", "6ND.")
    return rows


SECTIONS: tuple[Callable[[], Rows], ...] = (presets, classes, rounded_sizes)
