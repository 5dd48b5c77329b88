"""BERT and RoBERTa, by hand: attention in both directions, learned positions, LayerNorm after each sum.

    h = norm(words[ids] + positions + token types)
    for each layer:  h = norm(h + attention(h));  h = norm(h + mlp(h))
    pooled = tanh(W h[first])

BERT: Devlin et al. 2019, arXiv:1810.04805, section 3. RoBERTa (Liu et al. 2019, arXiv:1907.11692) is the same with one token type, and its
positions begin after the padding's. all-MiniLM-L6-v2 and most sentence encoders are `BertModel`s (embedding.py); the heads for classes and for
masked words are in bert_heads.py. Module paths and parameter names are transformers'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from .activations import ACTIVATIONS, activated
from .attention import attend, padding_mask
from .base import PretrainedModel, check_ids
from .bert_config import BertConfig, RobertaConfig
from .cache import KVCache, LayerCache
from .recompute import Recomputable, RecomputableCore

ENCODER = ("embeddings", "encoder", "pooler")  # the parts of a BertModel
HEADS = ("cls", "lm_head", "classifier", "qa_outputs")  # what stands on it in the files of one task or another
OLD_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # TensorFlow's names, in the first checkpoints
BUFFER = re.compile(r"(.*\.)?embeddings\.(position_ids|token_type_ids)")


@dataclass
class BaseModelOutput:
    """last_hidden_state: [B, T, H].  pooler_output: [B, H], or None of a model without a pooler."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


# Layers -----------------------------------------------------------------------------------------------------------------------


class BertEmbeddings(nn.Module):
    """``norm(word + token type + position)``: ids [B, T], or embeddings [B, T, H] -> [B, T, H]."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.first_position = c.first_position
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id, **factory)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size, padding_idx=c.position_padding, **factory)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size, **factory)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, **factory)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        types = torch.zeros(1, 1, dtype=torch.long, device=x.device) if token_type_ids is None else token_type_ids
        positions = self.positions(input_ids, x) if position_ids is None else position_ids
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings(types) + self.position_embeddings(positions)))

    def positions(self, input_ids: Tensor | None, x: Tensor) -> Tensor:
        """0, 1, ...: [1, T]. RoBERTa's begin after its padding's, and count text only: [B, T]."""
        padding = self.position_embeddings.padding_idx
        if padding is None or input_ids is None:
            return torch.arange(self.first_position, self.first_position + x.shape[1], device=x.device)[None]
        text = (input_ids != padding).long()
        return text.cumsum(1) * text + padding


class BertSelfAttention(RecomputableCore):
    """Every position looks at all text. x: [B, T, H].  mask: see `padding_mask`.  past: what stands before the text."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.heads, self.dropout = c.num_attention_heads, c.attention_probs_dropout_prob
        self.query = nn.Linear(c.hidden_size, c.hidden_size, **factory)
        self.key = nn.Linear(c.hidden_size, c.hidden_size, **factory)
        self.value = nn.Linear(c.hidden_size, c.hidden_size, **factory)

    def forward(self, x: Tensor, mask: Tensor | None, past: LayerCache | None = None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.query, self.key, self.value))  # [B, N, T, D]
        if past is not None:
            k, v = past.append(k, v)
        return attend(self, q, k, v, mask, causal=False, dropout=self.dropout)


class BertOutput(nn.Module):
    """``norm(residual + dropout(dense(x)))``: the end of both halves of a layer."""

    def __init__(self, width: int, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(width, c.hidden_size, **factory)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps, **factory)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nn.Module):
    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.self = BertSelfAttention(c, **factory)
        self.output = BertOutput(c.hidden_size, c, **factory)

    def forward(self, x: Tensor, mask: Tensor | None, past: LayerCache | None = None) -> Tensor:
        return self.output(self.self(x, mask, past), x)


class BertIntermediate(nn.Module):
    """``activation(dense(x))``: [..., H] -> [..., 4 H]."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.dense, self.activation = nn.Linear(c.hidden_size, c.intermediate_size, **factory), ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.activation, self.dense(x))


class BertLayer(Recomputable):
    """``norm(x + attention(x))``, then ``norm(x + mlp(x))``; x: [B, T, H]."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.attention = BertAttention(c, **factory)
        self.intermediate = BertIntermediate(c, **factory)
        self.output = BertOutput(c.intermediate_size, c, **factory)

    def compute(self, x: Tensor, mask: Tensor | None, past: LayerCache | None) -> Tensor:
        x = self.attention(x, mask, past)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(c, **factory) for _ in range(c.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None, past: KVCache | None = None) -> Tensor:
        for index, layer in enumerate(self.layer):
            x = layer(x, mask, None if past is None else past.layers[index])
        return x


class BertPooler(nn.Module):
    """``tanh(dense(first position))``: [B, T, H] -> [B, H]."""

    def __init__(self, c: BertConfig, **factory: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


# Models -----------------------------------------------------------------------------------------------------------------------


class BertPretrainedModel(PretrainedModel):
    """What the encoder and the models with a head on it share: how the tensors of each other's checkpoints are named."""

    config_class: ClassVar[type[BertConfig]] = BertConfig
    head_path: ClassVar[str | None] = None
    base_prefix: ClassVar[str] = "bert"  # where a model with a head keeps its encoder
    own_head: ClassVar[str | None] = None  # of HEADS, the one this model has
    has_pooler: ClassVar[bool] = True
    config: BertConfig

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Any checkpoint's encoder fits any of the models; the heads of other tasks, and buffers that old files carry, are left out."""
        for old, new in OLD_NORM.items():
            name = name.replace(old, new)
        inner = name.removeprefix(f"{cls.base_prefix}.")
        top = inner.partition(".")[0]
        if top in ENCODER:
            left_out = BUFFER.fullmatch(inner) or (top == "pooler" and not cls.has_pooler)
            return None if left_out else inner if cls.own_head is None else f"{cls.base_prefix}.{inner}"
        return None if (top in HEADS and top != cls.own_head) or name.startswith("cls.seq_relationship.") else name


class BertModel(BertPretrainedModel):
    """Text to hidden states. Named as in transformers, arguments and outputs too."""

    embedding_path: ClassVar[str] = "embeddings.word_embeddings"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config, **factory)
        self.encoder = BertEncoder(config, **factory)
        self.pooler = BertPooler(config, **factory) if add_pooling_layer else None
        initialise(self, config.initializer_range)

    def without(self, missing: set[str]) -> set[str]:
        """The checkpoints of some tasks have no pooler; then the model has none either."""
        if missing and missing == {name for name, _ in self.named_parameters() if name.startswith("pooler.")}:
            self.pooler = None
            return set()
        return missing

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                past_key_values: KVCache | None = None) -> BaseModelOutput:  # fmt: skip
        """input_ids: [B, T] or inputs_embeds: [B, T, H].  attention_mask: [B, past + T], 1 for text.  token_type_ids, position_ids: [B or 1, T].

        past_key_values: what each layer looks at, too, before the text (a prefix); the text's own is added to it. It moves no position.
        Raises LoraLabError for both or neither of the first two, shapes that differ, a text beyond the context, and on the CPU for ids
        outside their tables (a GPU stops by itself).
        """
        others = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids}
        self._check(input_ids, inputs_embeds, others, past_key_values.length if past_key_values is not None else 0)
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        hidden = self.encoder(x, padding_mask(attention_mask), past_key_values)
        return BaseModelOutput(hidden, None if self.pooler is None else self.pooler(hidden))

    def _check(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, others: dict[str, Tensor | None], past: int) -> None:
        c, given = self.config, inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise LoraLabError("give either input_ids [B, T] or inputs_embeds [B, T, H], not both and not neither")
        expected = ["B", "T"] if inputs_embeds is None else ["B", "T", c.hidden_size]
        if given.ndim != len(expected) or (inputs_embeds is not None and given.shape[2] != c.hidden_size):
            raise LoraLabError(f"the input is {list(given.shape)}, expected [{', '.join(map(str, expected))}]")
        batch, length = given.shape[:2]
        for name, tensor in others.items():
            shapes = [[batch, past + length]] if name == "attention_mask" else [[batch, length], [1, length]]
            if tensor is not None and list(tensor.shape) not in shapes:
                raise LoraLabError(f"{name} is {list(tensor.shape)}, expected {shapes[0]}, as the input")
        if others["position_ids"] is None and length > c.context_length:
            raise LoraLabError(f"the input has {length} positions, the model's context {c.context_length}: shorten the texts")
        if input_ids is not None:
            check_ids("input_ids", input_ids, c.vocab_size)
        for name, rows in (("token_type_ids", c.type_vocab_size), ("position_ids", c.max_position_embeddings)):
            check_rows(name, others[name], rows)


class RobertaModel(BertModel):
    config_class = RobertaConfig
    base_prefix = "roberta"


def check_rows(name: str, ids: Tensor | None, rows: int) -> None:
    """Raise LoraLabError for an id that a table of so many rows has no vector for. On the CPU only: elsewhere looking would wait for the device."""
    if ids is None or torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    outside = ids[(ids < 0) | (ids >= rows)]
    if len(outside):
        raise LoraLabError(f"{name} has {int(outside[0])}, the model knows 0 to {rows - 1}")


@torch.no_grad()
def initialise(module: nn.Module, spread: float) -> None:
    """As BERT began: normal weights of this spread, biases 0, norms 1, and 0 for padding (the released code's initializer_range)."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            part.weight.normal_(std=spread)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx] = 0.0
