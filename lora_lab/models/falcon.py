"""Falcon, by hand, in its three shapes; what differs is how many heads share a key, and where the norms are.

    7B            h = h + attention(n) + mlp(n), n = norm(h)          one key for all heads, rotary positions
    40B, 180B     h = h + attention(norm(h)) + mlp(norm'(h))          a key for each group of heads, rotary positions; 11B has one norm
    rw-1b         h = h + attention(norm(h)); h = h + mlp(norm'(h))   a key for each head, ALiBi, biases

Almazrouei et al. 2023 (arXiv:2311.16867); rw-1b: Penedo et al. 2023 (arXiv:2306.01116). One matrix makes the heads of each group
and their key and value: q .. q k v, for every group. Module paths and parameter names are transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoraLabError
from .activations import ACTIVATIONS, activated, check_activation
from .attention import Documents, Mask, attend
from .blocks import compute_dtype, rotate
from .cache import KVCache, LayerCache
from .causal import CausalLM, Decoder
from .config import check_config, check_heads, flags, shares
from .recompute import Recomputable, RecomputableCore
from .rotary import Rope

COLUMNS = 8  # that ALiBi adds to q, k and v: one would do, but the fast kernels want whole multiples of eight


@dataclass(frozen=True)
class FalconConfig:
    """The fields of a config.json that shape the model; `source` keeps the whole file. num_kv_heads: of the shape, whatever the file says."""

    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    max_position_embeddings: int
    activation: str
    layer_norm_epsilon: float
    rope: Rope
    hidden_dropout: float
    attention_dropout: float
    num_ln_in_parallel_attn: int
    alibi: bool
    new_decoder_architecture: bool
    multi_query: bool
    parallel_attn: bool
    bias: bool
    tie_word_embeddings: bool
    source: dict[str, Any] = field(default_factory=dict, repr=False)

    model_type: ClassVar[str] = "falcon"
    old_names: ClassVar[dict[str, str]] = {"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
                                           "n_head_kv": "num_kv_heads"}  # fmt: skip

    @classmethod
    def from_dict(cls, source: dict[str, Any]) -> FalconConfig:
        """Read a Hugging Face config, of transformers 4 or 5, or of the first files of 2023 (RefinedWeb, RefinedWebModel).

        Raises LoraLabError for a missing or unsupported field.
        """
        given = {**source, **{ours: source[old] for old, ours in cls.old_names.items() if old in source}}
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        optional = ("num_kv_heads", "ffn_hidden_size", "max_position_embeddings", "num_ln_in_parallel_attn")
        check_config(given, "Falcon", sizes, optional, "layer_norm_epsilon")
        new = {"new_decoder_architecture": given.get("model_type") == "RefinedWeb"}  # so were the first files of the 40B
        choices = flags(given, {**new, "alibi": False, "multi_query": True, "parallel_attn": True, "bias": False, "tie_word_embeddings": True})
        check_heads(given["hidden_size"], given["num_attention_heads"])
        return cls(**{name: given[name] for name in sizes}, **choices, num_kv_heads=key_heads(given, choices),
                   ffn_hidden_size=given.get("ffn_hidden_size") or 4 * given["hidden_size"], num_ln_in_parallel_attn=parallel_norms(given, choices),
                   max_position_embeddings=given.get("max_position_embeddings", 2048),
                   activation=check_activation(given.get("activation", "gelu"), "activation"),
                   layer_norm_epsilon=given.get("layer_norm_epsilon", 1e-5),
                   rope=Rope.from_config(given, given["hidden_size"] // given["num_attention_heads"]),
                   **shares(given, {"hidden_dropout": 0.0, "attention_dropout": 0.0}), source=source)  # fmt: skip

    @property
    def block_norms(self) -> tuple[str, ...]:
        """The names of a block's norms: before attention first, before the MLP last, which may be the same one."""
        if not self.parallel_attn:
            return "input_layernorm", "post_attention_layernorm"
        return ("ln_attn", "ln_mlp") if self.num_ln_in_parallel_attn == 2 else ("input_layernorm",)

    def to_dict(self) -> dict[str, Any]:
        """The config.json this model would be saved with; what the file it came from said beyond our fields is kept."""
        ours = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("rope", "source")}
        gone = {"rope_parameters", "auto_map", *self.old_names}  # auto_map names files of code that do not come along
        kept = {name: value for name, value in self.source.items() if name not in gone}
        return {**kept, **ours, **self.rope.to_dict(), "model_type": self.model_type, "architectures": ["FalconForCausalLM"]}


def key_heads(given: dict[str, Any], choices: dict[str, Any]) -> int:
    """num_kv_heads counts in the new decoder only; before, there was one (multi_query), or one for each head."""
    heads = int(given["num_attention_heads"])
    if not choices["new_decoder_architecture"]:
        return 1 if choices["multi_query"] else heads
    kv_heads = int(given.get("num_kv_heads") or heads)
    if heads % kv_heads:
        raise LoraLabError(f"num_attention_heads={heads} is not a multiple of num_kv_heads={kv_heads}")
    return kv_heads


def parallel_norms(given: dict[str, Any], choices: dict[str, Any]) -> int:
    """One or two norms in a block whose halves are side by side. Raises LoraLabError for what no Falcon has, and transformers cannot run."""
    new = choices["new_decoder_architecture"]
    norms = int(given.get("num_ln_in_parallel_attn") or (2 if new else 1))
    if new and not choices["parallel_attn"]:
        raise LoraLabError("new_decoder_architecture=true with parallel_attn=false: in the new decoder attention and MLP are side by side")
    if norms > 2 or (norms == 2 and not new and choices["parallel_attn"]):
        raise LoraLabError(f"num_ln_in_parallel_attn={norms}, new_decoder_architecture={new}: expected 1, or 2 in the new decoder")
    if given.get("apply_residual_connection_post_layernorm"):
        raise LoraLabError("apply_residual_connection_post_layernorm=true: no Falcon adds to the normed input, and it is not modelled here")
    return norms


# ALiBi ------------------------------------------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> list[float]:
    """How fast each head forgets: 2^(-8/n), 2^(-16/n), ... for n heads; beyond a power of two, every other one of the next power's.

    Source: Press et al. 2022 (arXiv:2108.12409), section 3, and its code for other numbers of heads.

    >>> alibi_slopes(8)[:3], alibi_slopes(3)
    ([0.5, 0.25, 0.125], [0.0625, 0.00390625, 0.25])
    """
    near = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * head / near) for head in range(1, near + 1)]
    return slopes + [2 ** (-8 * head / (2 * near)) for head in range(1, 2 * near, 2)][: heads - near]


def alibi(heads: int, places: Tensor) -> Tensor:
    """What is added to the scores of each key, and zeros to fill up: [B or 1, heads, S, COLUMNS]. places: [B or 1, S], of text.

    It grows with the place, not with the distance: what differs is the same for all keys of a query, and softmax does not see it.
    The product is rounded to bfloat16, as in the model's training: for far places that is coarse, and part of what it has learned.
    """
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=places.device).bfloat16()
    return F.pad((slopes[:, None] * places[:, None, :])[..., None], (0, COLUMNS - 1))


def places_of(mask: Mask, padding: Tensor | None, total: int, device: torch.device) -> Tensor:
    """The place of each key among the text of its row, or of its document: [B or 1, S]."""
    if isinstance(mask, Documents):
        return mask.positions(device)
    if padding is None:
        return torch.arange(total, device=device)[None]
    text = padding.long()
    return (text.cumsum(1) - 1) * text


# The model ----------------------------------------------------------------------------------------------------------------------


class FalconAttention(RecomputableCore):
    """Attention with a key and a value for each group of heads. x: [B, T, H].

    rotary: (cos, sin), each [B or 1, T, 1, D/2], or bias: ALiBi, [B or 1, N, S, COLUMNS]; the other is None.
    """

    def __init__(self, c: FalconConfig, **factory: Any) -> None:
        super().__init__()
        self.kv_heads, self.group, self.head_dim = c.num_kv_heads, c.num_attention_heads // c.num_kv_heads, c.hidden_size // c.num_attention_heads
        self.dropout = c.attention_dropout
        self.query_key_value = nn.Linear(c.hidden_size, c.num_kv_heads * (self.group + 2) * self.head_dim, bias=c.bias, **factory)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size, bias=c.bias, **factory)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, bias: Tensor | None, mask: Mask, layer_cache: LayerCache | None) -> Tensor:
        groups = self.query_key_value(x).unflatten(-1, (self.kv_heads, self.group + 2, self.head_dim))  # q .. q k v
        q, k, v = groups.split((self.group, 1, 1), dim=3)
        if rotary is not None:
            cos, sin = (angle.to(q.dtype)[:, :, None] for angle in rotary)
            q, k, v = rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()  # a view of v would keep q and k alive, too
        q, k, v = (heads.flatten(2, 3).transpose(1, 2) for heads in (q, k, v))  # [B, N or fewer, T, D]
        causal = layer_cache is None or layer_cache.length == 0  # else there is a mask, or one token that may look at all
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)
        y = attend(self, q, k, v, mask, causal=causal) if bias is None else self.attend_with_alibi(q, k, v, bias, mask, causal)
        return self.dense(y)

    def attend_with_alibi(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Mask, causal: bool) -> Tensor:
        """A bias that depends on the key alone is one more column of q and k: ``[q, 1] . [k, bias] = q . k + bias``.

        A mask would say the same with N T S numbers, and keep the fastest kernels out. Dropout is here only, as in transformers.
        """
        if self.group > 1:  # heads that share a key have slopes of their own
            k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        q, k, v = F.pad(q, (0, COLUMNS), value=1.0), torch.cat((k, bias.to(k.dtype).expand(len(k), -1, -1, -1)), -1), F.pad(v, (0, COLUMNS))
        y = attend(self, q, k, v, mask, causal=causal, scale=self.head_dim**-0.5, dropout=self.dropout)
        return y.unflatten(-1, (-1, self.head_dim + COLUMNS))[..., : self.head_dim].flatten(2)


class FalconMLP(nn.Module):
    """``dense_4h_to_h(activation(dense_h_to_4h(x)))``: [..., H] -> [..., H]."""

    def __init__(self, c: FalconConfig, **factory: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=c.bias, **factory)
        self.dense_4h_to_h = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=c.bias, **factory)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(activated(self.activation, self.dense_h_to_4h(x)))


class FalconDecoderLayer(Recomputable):
    """Attention and MLP, side by side or one after the other; x: [B, T, H]."""

    def __init__(self, c: FalconConfig, **factory: Any) -> None:
        super().__init__()
        self.parallel, self.norms = c.parallel_attn, c.block_norms
        self.hidden_dropout, self.attention_dropout = c.hidden_dropout, c.attention_dropout
        self.self_attention = FalconAttention(c, **factory)
        self.mlp = FalconMLP(c, **factory)
        for name in self.norms:
            self.add_module(name, nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon, **factory))

    def compute(self, x: Tensor, *context: Any) -> Tensor:
        """context: rotary, bias, mask and cache of the attention."""
        normed = self.norm(0, x)
        y = self.self_attention(normed, *context)
        if self.parallel:
            return x + F.dropout(self.mlp(self.norm(1, x) if len(self.norms) > 1 else normed) + y, self.hidden_dropout, self.training)
        x = x + F.dropout(y, self.attention_dropout, self.training)
        return x + F.dropout(self.mlp(self.norm(1, x)), self.hidden_dropout, self.training)

    def norm(self, index: int, x: Tensor) -> Tensor:
        """Under autocast in 16 bit, so that attention and MLP share one cast of it."""
        y: Tensor = getattr(self, self.norms[index])(x)
        return y.to(compute_dtype(x))


class FalconModel(Decoder):
    """Embeddings to hidden states: [B, T, H] -> [B, T, H]."""

    def __init__(self, c: FalconConfig, **factory: Any) -> None:
        super().__init__(c)
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, **factory)
        self.h = nn.ModuleList(FalconDecoderLayer(c, **factory) for _ in range(c.num_hidden_layers))
        self.ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon, **factory)

    def forward(self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None, padding: Tensor | None) -> Tensor:
        """ALiBi counts the text of `padding` and not `positions`, as in transformers."""
        total = x.shape[1] + (cache.length if cache is not None else 0)
        rotary = None if self.config.alibi else self.config.rope(positions)
        bias = alibi(self.config.num_attention_heads, places_of(mask, padding, total, x.device)) if self.config.alibi else None
        for index, block in enumerate(self.h):
            x = block(x, rotary, bias, mask, cache.layers[index] if cache is not None else None)
        return self.ln_f(x)


class FalconForCausalLM(CausalLM):
    """Falcon with its language-model head. Arguments and outputs: see `CausalLM.forward`."""

    config_class: ClassVar[type[FalconConfig]] = FalconConfig
    decoder_class = FalconModel
    embedding_path: ClassVar[str] = "transformer.word_embeddings"
    decoder_path: ClassVar[str] = "transformer"
    config: FalconConfig
