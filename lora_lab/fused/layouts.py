"""Whose rows are whose in layers that hold several projections in one matrix, and requests for some of them: target_modules=["c_attn.q"].

    c_attn            GPT-2, ImageGPT, OpenAI GPT   q | k | v; of cross-attention k | v; GPTBigCode: q | k | v with one head for k and v, or
                                                    q k v for each head
    query_key_value   GPT-NeoX, BLOOM, Persimmon    q k v for each head
                      Falcon                        7B: all q | k | v;  40B: q .. q k v for each group;  rw: q k v for each head
    qkv_proj          Phi-3                         q | k | v, of their own sizes;  MiniMax: q k v for each head;  CodeGen: q v k, four times
    Wqkv              MPT, ModernBERT, DBRX         q | k | v
    qkv               ViTs (timm, DINO), litgpt     q | k | v
    in_proj           DeBERTa                       q k v for each head
    gate_up_proj      Phi-3, GLM                    gate | up;  the audio encoder of Phi-4: up | gate
    (any)             nn.MultiheadAttention         q | k | v of its in_proj_weight, as parts of the attention: "self_attn.q"

One name may mean several layouts, and a wrong one would train another projection without a word: so the model's config decides (of transformers'
models and of ours), and where it does not, the request says it: ``fused={"my_qkv": {"q": 64, "k": 16, "v": 16}}``.
Source: the forward passes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import LoraLabError, did_you_mean
from ..kinds import is_linear, kind_of
from ..paths import name_matches
from .parts import Layout, consecutive, interleaved, scattered

HOW = "say so with fused={{{name!r}: {{'q': 64, 'k': 16, 'v': 16}}}}: sizes of consecutive outputs that make {out}, or lists of their numbers"
PER_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")  # query_key_value; elsewhere it may be q | k | v (CogVLM's ViT)
THIRDS_OF_ANOTHER_WIDTH = ("hiera", "sam2_hiera_det_model")  # qkv that leads to another width


@dataclass(frozen=True)
class _Layer:
    """What a layout is decided by: the sizes of the layer and the config of the nearest module above that has one."""

    fan_in: int
    out: int
    config: Any

    def field(self, *names: str) -> Any:
        """The first of these fields that the config has; our own configs keep the file's in `source`."""
        source = self.config if isinstance(self.config, Mapping) else getattr(self.config, "source", None)
        for name in names:
            value = getattr(self.config, name, source.get(name) if isinstance(source, Mapping) else None)
            if value is not None:
                return value
        return None

    def number(self, *names: str) -> int:
        """The same where it is a number; 0 where it is not (Hiera has a list of heads)."""
        value = self.field(*names)
        return value if isinstance(value, int) else 0

    @property
    def model_type(self) -> str:
        return str(self.field("model_type") or "")

    @property
    def heads(self) -> int:
        return self.number("num_attention_heads", "n_head", "n_heads", "num_heads")

    @property
    def kv_heads(self) -> int:
        of_dbrx = getattr(self.field("attn_config"), "kv_n_heads", None)
        return of_dbrx or self.number("num_key_value_heads", "num_kv_heads", "n_query_groups") or self.heads

    @property
    def head_dim(self) -> int:
        return self.number("head_dim", "head_size") or (self.fan_in // self.heads if self.heads else 0)


# Known layouts ------------------------------------------------------------------------------------------------------------------


def _thirds(layer: _Layer) -> Layout | None:
    return consecutive(dict.fromkeys("qkv", layer.out // 3)) if layer.out % 3 == 0 else None


def _per_head(layer: _Layer) -> Layout | None:
    if not layer.heads or layer.out % (3 * layer.heads):
        return None
    return interleaved(layer.heads, dict.fromkeys("qkv", layer.out // (3 * layer.heads)))


def _grouped(layer: _Layer) -> Layout:
    """q | k | v, k and v with fewer heads."""
    shared = layer.kv_heads * layer.head_dim
    return consecutive({"q": layer.heads * layer.head_dim, "k": shared, "v": shared})


def _c_attn(layer: _Layer) -> Layout | None:
    if layer.field("multi_query"):
        return consecutive({"q": layer.fan_in, "k": layer.head_dim, "v": layer.head_dim})
    if layer.model_type == "gpt_bigcode":
        return _per_head(layer)
    if layer.out == 2 * layer.fan_in:
        return consecutive({"k": layer.fan_in, "v": layer.fan_in})
    return _thirds(layer) if layer.out == 3 * layer.fan_in else None


def _query_key_value(layer: _Layer) -> Layout | None:
    if layer.model_type in PER_HEAD:
        return _per_head(layer)
    if layer.model_type != "falcon" or not layer.heads:
        return None
    head_dim = layer.fan_in // layer.heads
    if layer.field("new_decoder_architecture"):
        return interleaved(layer.kv_heads, {"q": layer.heads // layer.kv_heads * head_dim, "k": head_dim, "v": head_dim})
    if layer.field("multi_query"):
        return consecutive({"q": layer.heads * head_dim, "k": head_dim, "v": head_dim})
    return _per_head(layer)


def _qkv_proj(layer: _Layer) -> Layout | None:
    if layer.model_type == "codegen":
        return interleaved(4, dict.fromkeys("qvk", layer.out // 12))
    if layer.model_type == "minimax":
        return _per_head(layer)
    return _grouped(layer) if layer.model_type in ("phi3", "phi4_multimodal") else None


def _wqkv(layer: _Layer) -> Layout | None:
    grouped = _grouped(layer)
    if grouped.out == layer.out:
        return grouped
    return _thirds(layer) if layer.kv_heads == layer.heads and layer.out == 3 * layer.fan_in else None


def _qkv(layer: _Layer) -> Layout | None:
    return _thirds(layer) if layer.model_type in THIRDS_OF_ANOTHER_WIDTH else _wqkv(layer)


def _in_proj(layer: _Layer) -> Layout | None:
    return _per_head(layer) if layer.model_type == "deberta" else None


def _gate_up_proj(layer: _Layer) -> Layout | None:
    names = ("up", "gate") if layer.model_type == "phi4_multimodal_audio" else ("gate", "up")
    return consecutive(dict.fromkeys(names, layer.out // 2)) if layer.out % 2 == 0 else None


KNOWN: dict[str, Callable[[_Layer], Layout | None]] = {
    "c_attn": _c_attn, "query_key_value": _query_key_value, "qkv_proj": _qkv_proj, "Wqkv": _wqkv, "qkv": _qkv, "in_proj": _in_proj,
    "gate_up_proj": _gate_up_proj,
}  # fmt: skip


def known_layout(model: nn.Module, path: str) -> Layout | None:
    """The layout of a fused layer; None where its name and its model's config do not tell.

    >>> block = nn.ModuleDict({"qkv": nn.Linear(8, 24)})
    >>> known_layout(block, "qkv").parts
    (('q', ((0, 8),)), ('k', ((8, 16),)), ('v', ((16, 24),)))
    """
    module = model.get_submodule(path)
    kind, decide = kind_of(module), KNOWN.get(path.rpartition(".")[2])
    if isinstance(module, nn.MultiheadAttention):
        decide = _thirds
    if decide is None or kind is None or not (is_linear(module) or isinstance(module, nn.MultiheadAttention)):
        return None
    fan_in, out = kind.shape(module)
    layout = decide(_Layer(fan_in, out, _config_above(model, path)))
    return layout if layout is not None and layout.out == out else None


def _config_above(model: nn.Module, path: str) -> Any:
    """The config of the nearest module above a layer that has one: in a model of several, that of its part."""
    names = path.split(".")
    for end in range(len(names) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(names[:end])), "config", None)
        if config is not None:
            return config
    return None


# Requests -----------------------------------------------------------------------------------------------------------------------


def parts_of(model: nn.Module, paths: Mapping[str, nn.Module], request: Any, fused: Any) -> dict[str, Layout]:
    """Path -> the parts of that layer that a request names, where it names parts.

    paths: the layers that can be adapted. fused: what the caller says about layouts, by name of the layer.
    Raises LoraLabError for a layout that is not known, a part that no layer has, a layer named whole and in part, a `fused` that nothing uses.
    """
    names = [name for name in request if isinstance(name, str)] if _is_list(request) else []
    wanted: dict[str, list[str]] = {}
    layouts: dict[str, Layout] = {}
    given = _checked(fused)
    for name in names:
        layer, part = split_part(name, paths)
        if part:
            found = {path: _layout(model, path, given, names, name) for path in paths if name_matches(layer, path)}
            layouts |= found
            for path in _with_part(found, part, names, name):
                wanted.setdefault(path, []).append(part)
    for name in names:
        if clash := next((path for path in wanted if name_matches(name, path)), None):
            raise LoraLabError(f"target_modules={names!r}: {name!r} is all of {clash!r}, of which {', '.join(wanted[clash])} is named, too: "
                               "name the layer or its parts")  # fmt: skip
    for name in given:
        if not any(name_matches(name, path) for path in wanted):
            near = did_you_mean(name, {path.rpartition(".")[2] for path in wanted})
            raise LoraLabError(f"fused={fused!r}: target_modules={request!r} names no part of {name!r}, such as '{name}.q'{near}")
    return {path: layouts[path].only(parts) for path, parts in wanted.items()}


def split_part(name: str, paths: Iterable[str]) -> tuple[str, str]:
    """"c_attn.q" -> ("c_attn", "q") where a layer is named so and none is named "c_attn.q"; otherwise the part is "".

    >>> split_part("c_attn.q", ["h.0.attn.c_attn"]), split_part("attn.q", ["h.0.attn.q"])
    (('c_attn', 'q'), ('attn.q', ''))
    """
    layer, _, part = name.rpartition(".")
    if not layer or any(name_matches(name, path) for path in paths) or not any(name_matches(layer, path) for path in paths):
        return name, ""
    return layer, part


def _is_list(request: Any) -> bool:
    return isinstance(request, Collection) and not isinstance(request, (str, type))


def _with_part(layouts: dict[str, Layout], part: str, names: list[str], name: str) -> list[str]:
    """The layers that have this part: the c_attn of GPT-2's cross-attention has no q."""
    having = [path for path, layout in layouts.items() if part in layout.names]
    if not having:
        parts = list(dict.fromkeys(other for layout in layouts.values() for other in layout.names))
        raise LoraLabError(f"target_modules={names!r}: {name!r} names the part {part!r}, but the parts of {next(iter(layouts))!r} are "
                           f"{', '.join(parts)}{did_you_mean(part, parts)}")  # fmt: skip
    return having


def _layout(model: nn.Module, path: str, given: dict[str, Any], names: list[str], name: str) -> Layout:
    module, where = model.get_submodule(path), f"target_modules={names!r}: {name!r} names a part of {path!r}"
    kind, last = kind_of(module), path.rpartition(".")[2]
    if kind is None or not (is_linear(module) or isinstance(module, nn.MultiheadAttention)):
        raise LoraLabError(f"{where}, a {type(module).__name__}: only linear layers and nn.MultiheadAttention have parts")
    out = kind.shape(module)[1]
    own = next((value for key, value in given.items() if name_matches(key, path)), None)
    layout = known_layout(model, path) if own is None else _given(own, out, f"fused={{{last!r}: {own!r}}}, but {path!r} has {out} outputs")
    if layout is None:
        raise LoraLabError(f"{where} [{out}, {kind.shape(module)[0]}], but which of its {out} outputs are whose is not known here; "
                           f"{HOW.format(name=last, out=out)}. Known by the config of their model: {', '.join(KNOWN)}")  # fmt: skip
    return layout


def check_parts(path: str, parts: Layout, config: Any) -> None:
    """What LoRA for parts of a layer cannot have."""
    for name, value, why in (("init", "pissa", "the principal part is of a whole weight"), ("lora_bias", True, "its bias would be of all outputs")):
        if getattr(config, name) == value:
            raise LoraLabError(f"{name}={value!r}, but target_modules={config.target_modules!r} names only {', '.join(parts.names)} of {path!r}: "
                               f"{why}; name the whole layer, or leave {name} out")  # fmt: skip
    if config.variant not in ("lora", "dora"):
        raise LoraLabError(f"variant={config.variant!r}, but target_modules={config.target_modules!r} names only {', '.join(parts.names)} of "
                           f"{path!r}: parts of a layer have 'lora' and 'dora'; name the whole layer")  # fmt: skip


# Layouts that the caller gives -----------------------------------------------------------------------------------------------------


def _checked(fused: Any) -> dict[str, Any]:
    """`fused` as a dict of name -> Layout, sizes or numbers; anything else is an error."""
    if fused is None:
        return {}
    if not isinstance(fused, Mapping):
        raise LoraLabError(f"fused={fused!r}: expected a dict like {{'my_qkv': {{'q': 64, 'k': 16, 'v': 16}}}}")
    checked: dict[str, Any] = {}
    for name, parts in fused.items():
        if isinstance(parts, Layout):
            checked[name] = parts
            continue
        if not isinstance(parts, Mapping) or not parts or not all(isinstance(part, str) and part and "." not in part for part in parts):
            raise LoraLabError(f"fused={fused!r}: expected of {name!r} a dict of part -> its number of outputs, or -> a list of their numbers")
        checked[name] = {part: rows.tolist() if hasattr(rows, "tolist") else rows for part, rows in parts.items()}
    return checked


def _given(own: Any, out: int, where: str) -> Layout:
    if isinstance(own, Layout):
        if own.out != out:
            raise LoraLabError(f"{where}; the layout is one of {own.out}")
        return own
    if all(_is_count(size) for size in own.values()):
        if sum(own.values()) != out:
            raise LoraLabError(f"{where}; the sizes make {sum(own.values())} (outputs that lie otherwise: a list of their numbers for each part)")
        return consecutive(own)
    numbers = [number for rows in own.values() if isinstance(rows, Sequence) for number in rows]
    lists = all(isinstance(rows, Sequence) and len(rows) for rows in own.values())
    if not lists or not all(isinstance(number, int) and 0 <= number < out for number in numbers) or len(set(numbers)) != len(numbers):
        raise LoraLabError(f"{where}: expected for every part its number of outputs (above 0), or for every part a list of numbers from 0 to "
                           f"{out - 1}, each number once")  # fmt: skip
    return scattered(out, own)


def _is_count(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size > 0
