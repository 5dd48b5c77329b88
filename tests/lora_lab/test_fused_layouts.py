"""Whose outputs are whose in fused layers: what lora_lab.fused says, asked of the attention that reads them.

Outputs called v set to zero leave the attention nothing to say; outputs called q matter to their own token only (of GLUs: twice the outputs called
up is twice the result). Each would fail if one output belonged to another part.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small_models import SMALL
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalAudioConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioMLP
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

import lora_lab
from lora_lab import LoraLabError
from lora_lab.fused.layouts import known_layout
from lora_lab.fused.parts import Layout, consecutive, interleaved, scattered

transformers.logging.set_verbosity_error()

FOUR = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SHORT = {**SMALL, **FOUR, "intermediate_size": 48, "max_position_embeddings": 64}
GPT = {**SMALL, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
PIXELS = {"image_size": [16, 16], "patch_size": 8}


def falcon(**changes: Any) -> nn.Module:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SMALL, **FOUR, **changes))


def bigcode(multi_query: bool) -> nn.Module:
    return transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**GPT, multi_query=multi_query))


def with_cross_attention() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, add_cross_attention=True))


def minimax() -> nn.Module:
    return transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**SHORT, num_key_value_heads=4, head_dim=8, num_local_experts=2,
                                                                      layer_types=["linear_attention"], experts_implementation="eager"))  # fmt: skip


def dbrx() -> nn.Module:
    config = transformers.DbrxConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=1, max_seq_len=64,
                                     attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
                                     ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 32})  # fmt: skip
    return transformers.DbrxForCausalLM(config)


class Vit(nn.Module):
    """DINO's and timm's attention: ``qkv.reshape(B, N, 3, heads, width).permute(2, 0, 3, 1, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(torch.softmax(q @ k.mT, -1).matmul(v).transpose(1, 2).flatten(2))


# name -> (how to build it, the fused layer, the layer that gets what the attention gives)
ATTENTIONS: dict[str, tuple[Any, str, str]] = {
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT)), "c_attn", "c_proj"),
    "openai-gpt": (lambda: transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**GPT)), "c_attn", "c_proj"),
    "gpt-bigcode, one head for k and v": (lambda: bigcode(True), "c_attn", "c_proj"),
    "gpt-bigcode, a head each": (lambda: bigcode(False), "c_attn", "c_proj"),
    "gpt-neox": (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHORT)), "query_key_value", "dense"),
    "gpt-neox-japanese": (lambda: transformers.GPTNeoXJapaneseForCausalLM(transformers.GPTNeoXJapaneseConfig(**SMALL, **FOUR)),
                          "query_key_value", "dense"),
    "bloom": (lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=1, n_head=4)),
              "query_key_value", "dense"),
    "persimmon": (lambda: transformers.PersimmonForCausalLM(transformers.PersimmonConfig(**SHORT, qk_layernorm=False)), "query_key_value", "dense"),
    "falcon-7b": (lambda: falcon(multi_query=True), "query_key_value", "dense"),
    "falcon-40b": (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), "query_key_value", "dense"),
    "falcon-rw": (lambda: falcon(multi_query=False, alibi=True), "query_key_value", "dense"),
    "phi-3": (lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHORT, num_key_value_heads=2)), "qkv_proj", "o_proj"),
    "codegen": (lambda: transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**GPT, rotary_dim=4)), "qkv_proj", "out_proj"),
    "minimax": (minimax, "qkv_proj", "norm"),
    "mpt": (lambda: transformers.MptForCausalLM(transformers.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=1, max_seq_len=64)),
            "Wqkv", "out_proj"),
    "modernbert": (lambda: transformers.ModernBertModel(transformers.ModernBertConfig(**SHORT, cls_token_id=1, sep_token_id=2)), "Wqkv", "Wo"),
    "dbrx": (dbrx, "Wqkv", "out_proj"),
    "deberta": (lambda: transformers.DebertaModel(transformers.DebertaConfig(**SHORT)), "in_proj", "output.dense"),
    "vitdet": (lambda: transformers.VitDetModel(transformers.VitDetConfig(**FOUR, **PIXELS)), "qkv", "proj"),
    "dino, timm": (Vit, "qkv", "proj"),
}  # fmt: skip


def build(make: Any) -> nn.Module:
    torch.manual_seed(1)
    model = make().double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(2)
    if isinstance(model, Vit):
        return {"x": torch.randn(2, 5, 32, dtype=torch.float64)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(1, 3, *model.config.image_size, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, 64, (2, 6))}


def find(model: nn.Module, name: str, beside: str = "") -> str:
    """The first layer of this name, in the same block as `beside`."""
    block = beside.rpartition(".")[0].removesuffix(".self")
    return next(path for path, _ in model.named_modules() if path.startswith(block) and (path == name or path.endswith(f".{name}")))


def seen(model: nn.Module, fused: str, after: str, change: Any) -> Tensor:
    """What the attention gives to the layer after it while the fused layer's outputs are changed."""
    found: list[Tensor] = []
    hooks = [model.get_submodule(fused).register_forward_hook(lambda module, args, output: change(output.clone())),
             model.get_submodule(after).register_forward_pre_hook(lambda module, args: found.append(args[0]))]  # fmt: skip
    with torch.no_grad():
        model(**inputs(model))
    for hook in hooks:
        hook.remove()
    return found[0]


def rows_of(layout: Layout, part: str) -> Tensor:
    return layout.only([part]).own(torch.arange(layout.out))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_parts_are_what_the_attention_reads(name: str) -> None:
    make, fused, after = ATTENTIONS[name]
    model = build(make)
    path = find(model, fused)
    layout = known_layout(model, path)
    assert layout is not None and sorted(layout.names) == ["k", "q", "v"] and sum(layout.sizes) == layout.out
    q, k, v = (rows_of(layout, part) for part in "qkv")

    def look(rows: Tensor, tokens: slice, by: float) -> Tensor:
        def change(output: Tensor) -> Tensor:
            output.view(-1, output.shape[-1])[tokens, rows] *= by
            return output

        return seen(model, path, find(model, after, path), change).flatten(0, -2)

    everywhere, one = slice(None), slice(3, 4)
    before = look(q, everywhere, 1.0)
    others = torch.arange(len(before)) != 3
    assert look(v, everywhere, 0.0).abs().max() < 1e-12 < before.abs().max(), "without v the attention should have nothing to say"
    assert_close(look(q, one, -2.0)[others], before[others], rtol=0, atol=1e-12, msg="the q of one token should matter to that token only")
    assert not torch.allclose(look(q, one, -2.0)[one], before[one])
    assert not torch.allclose(look(k, one, -2.0)[others], before[others])


STAGES: dict[str, Any] = {
    "hiera": lambda: transformers.HieraModel(transformers.HieraConfig(
        embed_dim=8, image_size=[32, 32], patch_kernel=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], depths=[1, 1], num_heads=[1, 2],
        masked_unit_size=[4, 4], masked_unit_attention=[True, False], num_query_pool=1)),
    "sam2": lambda: Sam2HieraDetModel(Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[32, 32], blocks_per_stage=[1, 1], embed_dim_per_stage=[8, 16],
        num_attention_heads_per_stage=[1, 2], window_size_per_stage=[2, 2], num_query_pool_stages=1, global_attention_blocks=[],
        window_positional_embedding_background_size=[2, 2])),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_stages_that_become_wider_are_thirds_of_the_new_width(name: str) -> None:
    """There queries are pooled, so that they are of no one token; but where all are zero k does not matter."""
    model = build(STAGES[name])
    path = [path for path, module in model.named_modules() if path.endswith(".qkv")][-1]
    layout = known_layout(model, path)
    assert layout is not None and layout.out == 48 and model.get_submodule(path).in_features == 8
    q, k, v = (rows_of(layout, part) for part in "qkv")

    def look(zero: Tensor, louder: Tensor) -> Tensor:
        def change(output: Tensor) -> Tensor:
            output[..., zero] = 0.0
            output[..., louder] *= noise
            return output

        return seen(model, path, path.replace("qkv", "proj"), change)

    nothing, noise = torch.tensor([], dtype=torch.long), torch.ones(0)
    before, without_v, without_q = look(nothing, nothing), look(v, nothing), look(q, nothing)
    noise = torch.randn(len(k), dtype=torch.float64)
    assert without_v.abs().max() < 1e-12 < before.abs().max() and not torch.allclose(without_q, before)
    assert_close(look(q, k), without_q, rtol=0, atol=1e-12)
    assert not torch.allclose(look(nothing, k), before)


GLUS: dict[str, Any] = {
    "phi-3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHORT, num_key_value_heads=2)),
    "glm": lambda: transformers.GlmForCausalLM(transformers.GlmConfig(**SHORT, head_dim=8, num_key_value_heads=2)),
}


@pytest.mark.parametrize("name", GLUS)
def test_twice_the_up_part_is_twice_the_result(name: str) -> None:
    model = build(GLUS[name])
    path = find(model, "gate_up_proj")
    layout = known_layout(model, path)
    assert layout is not None and set(layout.names) == {"gate", "up"}
    up = rows_of(layout, "up")

    def twice(output: Tensor) -> Tensor:
        output[..., up] *= 2
        return output

    once = seen(model, path, find(model, "down_proj", path), lambda output: output)
    assert_close(seen(model, path, find(model, "down_proj", path), twice), 2 * once, rtol=0, atol=1e-12)


def test_the_audio_encoder_of_phi_4_has_up_before_gate() -> None:
    """Its GLU reads ``up, gate = chunk(2)``; every other gate_up_proj of transformers is what its name says."""
    config = Phi4MultimodalAudioConfig(hidden_size=8, intermediate_size=12, num_blocks=1)
    model = nn.Module()
    model.mlp, model.config = Phi4MultimodalAudioMLP(config).double().eval(), config  # type: ignore[assignment]
    layout = known_layout(model, "mlp.gate_up_proj")
    assert layout == consecutive({"up": 12, "gate": 12})
    mlp, x = model.mlp, torch.randn(3, 8, dtype=torch.float64)
    found: list[Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    mlp(x)
    mlp.gate_up_proj.register_forward_hook(lambda module, args, output: torch.cat((2 * output[..., :12], output[..., 12:]), -1))
    mlp(x)
    assert_close(found[1], 2 * found[0], rtol=0, atol=1e-12)


def test_cross_attention_of_gpt2_has_k_and_v_only() -> None:
    model = with_cross_attention()
    assert known_layout(model, "transformer.h.0.crossattention.c_attn") == consecutive({"k": 32, "v": 32})
    layers = lora_lab.plan(model, rank=2, target_modules=["c_attn.q", "c_attn.v"]).layers
    assert {layer.path.split(".")[-2]: layer.parts.names for layer in layers} == {"attn": ("q", "v"), "crossattention": ("v",)}
    assert len(lora_lab.plan(model, rank=2, target_modules=["c_attn.q"]).layers) == 1


def test_the_config_that_counts_is_the_nearest_one() -> None:
    """In a model of several parts each has its own heads."""
    model = nn.Module()
    model.config = transformers.GPTNeoXConfig(**{**SHORT, "num_attention_heads": 2})  # type: ignore[assignment]
    model.text = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHORT))
    assert known_layout(model, "text.gpt_neox.layers.0.attention.query_key_value") == interleaved(4, {"q": 8, "k": 8, "v": 8})


def test_a_config_of_ours_keeps_the_model_type_in_its_source() -> None:
    class Config:
        def __init__(self) -> None:
            self.source = {"model_type": "gpt_neox", "num_attention_heads": 4}

    model = nn.Module()
    model.config, model.query_key_value = Config(), nn.Linear(32, 96)  # type: ignore[assignment]
    assert known_layout(model, "query_key_value") == interleaved(4, {"q": 8, "k": 8, "v": 8})


def test_litgpt_divides_qkv_by_its_query_groups() -> None:
    class Config:
        n_head, n_query_groups, head_size = 4, 2, 8

    model = nn.Module()
    model.config, model.qkv = Config(), nn.Linear(32, 64)  # type: ignore[assignment]
    assert known_layout(model, "qkv") == consecutive({"q": 32, "k": 16, "v": 16})


@pytest.mark.parametrize(("name", "shape", "config"), [
    ("query_key_value", (32, 96), {"num_attention_heads": 4}),  # of no model known: CogVLM's are q | k | v, Megatron's per head
    ("query_key_value", (32, 96), {"model_type": "cogvlm", "num_attention_heads": 4}),
    ("qkv_proj", (32, 96), {}), ("qkv", (32, 64), {"num_attention_heads": 4}), ("c_attn", (32, 80), {}), ("in_proj", (32, 96), {}),
    ("mixed", (32, 96), {}), ("qkv", (32, 95), {}),
])  # fmt: skip
def test_what_is_not_known_is_an_error_that_says_how_to_say_it(name: str, shape: tuple[int, int], config: dict[str, Any]) -> None:
    model = nn.ModuleDict({name: nn.Linear(*shape)})
    model.config = config  # type: ignore[assignment]
    with pytest.raises(LoraLabError, match=rf"not known here; say so with fused=\{{'{name}'"):
        lora_lab.inject(model, target_modules=[f"{name}.q"])
    assert type(model[name]) is nn.Linear


# The rows themselves --------------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "thirds": consecutive({"q": 4, "k": 4, "v": 4}),
    "sizes": consecutive({"q": 6, "k": 2, "v": 4}),
    "per head": interleaved(3, {"q": 2, "k": 1, "v": 1}),
    "every other": scattered(12, {"a": range(0, 12, 2), "b": range(1, 12, 2)}),
    "anyhow": scattered(12, {"a": [3, 0, 7], "b": [1, 11, 10, 5]}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_placing_puts_each_row_where_it_belongs_and_taking_gets_it_back(name: str) -> None:
    """Entry by entry against loops, of all parts and of one."""
    for layout in (LAYOUTS[name], LAYOUTS[name].only(LAYOUTS[name].names[1:])):
        B = torch.randn(sum(layout.sizes), 3)
        placed, wanted, row = layout.place(B), torch.zeros(12, 3 * len(layout.parts)), 0
        for p, part in enumerate(layout.names):
            for at in rows_of(layout, part).tolist():
                wanted[at, 3 * p : 3 * p + 3] = B[row]
                row += 1
        assert torch.equal(placed, wanted) and torch.equal(layout.take(placed), B)
        assert torch.equal(layout.own(layout.spread(B[:, 0])), B[:, 0])


def test_a_layout_from_numbers_finds_the_blocks() -> None:
    heads = {part: [8 * head + first + i for head in range(4) for i in range(2)] for part, first in (("q", 0), ("k", 3))}
    assert scattered(32, heads) == Layout(4, 8, (("q", ((0, 2),)), ("k", ((3, 5),))))


def test_what_lies_between_the_blocks_is_not_taken() -> None:
    layout = LAYOUTS["sizes"].only(["q", "v"])
    placed = layout.place(torch.randn(10, 2))
    placed[7, 0] = 1e-30
    with pytest.raises(LoraLabError, match="not zero outside the blocks of q, v"):
        layout.take(placed)
