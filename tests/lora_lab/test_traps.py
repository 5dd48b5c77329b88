"""Traps that other LoRA libraries' issue trackers are full of: a test each, named after what would go wrong. Where the rest are: trap_index.py."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from small_models import build, llama, logits, randomise
from tiny_workshop import QUIET, our_llama, token_rows
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab import LoraLabError
from lora_lab.targets import lora_layers
from lora_lab.training import fit

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double()


def changed(folder: Path, **settings: Any) -> Path:
    """The folder with other settings, as another program would have written it: without our copy of the configuration."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    return folder


# Merging -----------------------------------------------------------------------------------------------------------------------


def test_a_merge_into_a_tied_head_does_not_collapse_at_the_next_load(tmp_path: Path) -> None:
    """Trap 1 (transformers issue 45127): while the config says tied, loading throws the merged head away and takes the embedding again."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).double().eval()
    lora_lab.inject(model, rank=2, target_modules=["lm_head"], init="random")
    y = logits(model, "llama")
    with pytest.raises(LoraLabError, match=r"tie_word_embeddings=False"):
        lora_lab.merge(model)
    lora_lab.merge(model, untie=True, restorable=False)
    lora_lab.eject(model)
    model.config.tie_word_embeddings = False  # what the refusal said
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(logits(again, "llama"), y, rtol=0, atol=1e-12)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_two_dora_adapters_merged_together_do_not_see_each_others_merged_norm() -> None:
    """Trap 13 (PEFT issue 3608: 2.6 to 13.9 % off): each norm is of W and its own update, merged or not."""
    model = small()
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, variant="dora", adapter=name)
    randomise(model)
    y = lora_lab.use(model, ["a", "b"])(numbers(4, 6))
    assert_close(lora_lab.merge(model)(numbers(4, 6)), y, rtol=0, atol=1e-12)
    lora_lab.unmerge(model)
    for name in ("a", "b"):
        assert not torch.allclose(lora_lab.use(model, name)(numbers(4, 6)), y)


def test_merging_a_quantised_layer_cannot_round_the_adapter_away() -> None:
    """Trap 9 (transformers issue 31293, PEFT issue 1203): a small update lies below the distance of two codes."""
    torch.manual_seed(0)
    model = lora_lab.quantize(nn.Sequential(nn.Linear(64, 64)), "nf4")
    base = lora_lab.quantize(copy.deepcopy(nn.Sequential(nn.Linear(64, 64))), "nf4")
    lora_lab.inject(model, rank=2)
    randomise(model, by=0.01)
    with pytest.raises(LoraLabError, match=r"rounding would take the adapter away.*dequantize\(model\) first"):
        lora_lab.merge(model)
    assert type(base[0]).__name__ in type(model[0]).__name__  # nothing was changed
    delta, x = model[0].lora_delta("default").detach(), torch.randn(4, 64)
    plain = lora_lab.dequantize(lora_lab.eject(copy.deepcopy(model)))
    codes = lora_lab.quantize(nn.Sequential(copy.deepcopy(plain[0])), "nf4")[0].dequantize()
    with torch.no_grad():
        plain[0].weight += delta
    again = lora_lab.quantize(nn.Sequential(copy.deepcopy(plain[0])), "nf4")[0].dequantize()
    lost = (again - codes - delta).norm() / delta.norm()
    assert lost > 0.5  # what would have happened
    assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)  # the way out


@pytest.mark.parametrize("adapters", [None, torch.bfloat16])
def test_merging_16_bit_weights_on_a_cpu_is_not_done_in_slow_and_rough_16_bit_products(adapters: torch.dtype | None) -> None:
    """Trap 43 (PEFT issue 1977: 65 times slower): whatever the weights and adapters are stored in, the products are float32."""

    class Products(TorchDispatchMode):
        seen: set[torch.dtype]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(name in str(func) for name in ("mm", "matmul")):
                self.seen = getattr(self, "seen", set()) | {args[0].dtype}
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = randomise(lora_lab.inject(nn.Sequential(nn.Linear(16, 16)).bfloat16(), rank=2, dtype=adapters))
    layer = model[0]
    exact = layer.weight.float() + layer.lora_B["default"].float() @ layer.lora_A["default"].float()
    with Products() as products:
        lora_lab.merge(model)
    assert products.seen == {torch.float32}
    assert torch.equal(model[0].weight, exact.bfloat16())


# Layers that are more than a matrix ------------------------------------------------------------------------------------------------


def test_an_embedding_that_scales_what_it_looks_up_scales_the_update() -> None:
    """Trap 15 (PEFT issues 2809 and 2825): Gemma multiplies its embeddings by the root of their width, in a buffer of transformers' class."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model, ids = nn.Sequential(Gemma3TextScaledWordEmbedding(20, 8, 0, embed_scale=5.0)).double(), torch.tensor([[1, 7, 7, 19]])
    base = model(ids)
    lora_lab.inject(model, rank=2, target_modules=["0"], init="random")
    delta = model[0].lora_delta("default")
    assert_close(model(ids), base + 5.0 * F.embedding(ids, delta.T), rtol=0, atol=1e-12)
    assert_close(lora_lab.merge(model)(ids), base + 5.0 * F.embedding(ids, delta.T), rtol=0, atol=1e-12)


WITH_DROPOUT: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(16, 8), lambda: torch.ones(64, 16).double()),
    "embedding": (lambda: nn.Embedding(4, 8), lambda: torch.zeros(64, dtype=torch.long)),
    "conv": (lambda: nn.Conv2d(16, 8, 1), lambda: torch.ones(64, 16, 1, 1).double()),
}


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_dropout_is_not_forgotten_and_not_one_mask_for_the_whole_batch(kind: str) -> None:
    """Trap 37: loralib's convolutions and embeddings ignore dropout, minLoRA drops the same features of every row."""
    make, rows = WITH_DROPOUT[kind]
    torch.manual_seed(0)
    model = lora_lab.inject(nn.Sequential(make()).double(), rank=8, target_modules=["0"], dropout=0.5, init="random")
    once = model.train()(rows()).flatten(1)  # every row is the same input
    assert len({tuple(row.tolist()) for row in once}) > 32
    many = torch.cat([model(rows()).flatten(1).detach() for _ in range(200)])
    kept = model.eval()(rows()).flatten(1).detach()
    assert len({tuple(row.tolist()) for row in kept}) == 1
    assert_close(many.mean(0), kept[0], rtol=0, atol=float(5 * many.std(0).max() / len(many) ** 0.5))


def test_dropout_of_a_dora_adapter_does_not_drop_the_frozen_path() -> None:
    """Trap 37 (PEFT pull 2107): W x is of the whole x; with everything dropped what is left is m / norm times it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8)).double()
    lora_lab.inject(model, rank=4, variant="dora", dropout=0.999999)
    randomise(model)
    layer, x = model[0], numbers(5, 64)
    ratio = layer.lora_variant["default"].ratio(layer, "default")
    assert_close(model.train()(x), ratio * F.linear(x, layer.weight) + layer.bias, rtol=0, atol=1e-12)
    assert not torch.allclose(model.eval()(x), model.train()(x))


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.MultiheadAttention(4, 2)])
def test_train_and_eval_of_an_adapted_layer_still_return_the_layer(layer: nn.Module) -> None:
    """Trap 40: loralib's return None, so that `model = layer.eval()` loses the layer; and they merge on the way."""
    model = lora_lab.inject(nn.Sequential(layer), rank=2, target_modules=["0"], init="random")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model[0].eval() is layer and model[0].train() is layer and layer.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.eval().state_dict().items())


@pytest.mark.parametrize("request_", [{}, {"variant": "dora"}, {"init": "pissa"}, {"lora_bias": True}])
def test_nothing_an_adapted_layer_computes_with_is_left_behind_by_to(request_: dict[str, Any]) -> None:
    """Trap 40: loralib's index is a plain attribute, which stays on the old device."""
    model = lora_lab.inject(nn.Sequential(nn.Linear(6, 6)), rank=2, **request_).double()
    owned = [value for module in model.modules() for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
    assert not any(isinstance(value, Tensor) for value in owned)
    assert all(tensor.dtype == torch.float64 for tensor in model.state_dict().values())
    model.to("meta")
    assert model(torch.zeros(2, 6, device="meta", dtype=torch.float64)).is_meta


def test_what_others_read_of_a_layer_is_still_there_and_injecting_twice_nests_nothing() -> None:
    """Trap 41: a wrapper has no .weight or .in_features, and a second round wraps the wrapper."""
    model = small()
    lora_lab.inject(model, rank=2)
    layer = model[0]
    assert (layer.in_features, layer.out_features, layer.weight.shape, layer.bias.shape) == (6, 8, (8, 6), (8,))
    with pytest.raises(LoraLabError, match="already in this model"):
        lora_lab.inject(model, rank=2)
    lora_lab.inject(model, rank=2, adapter="second")
    assert type(layer).__mro__[:3] == (lora_lab.LoRALinear, lora_lab.layers.LoRA, nn.Linear) and type(lora_lab.eject(model)[0]) is nn.Linear


# Training -----------------------------------------------------------------------------------------------------------------------------


class Reentrant(nn.Module):
    """The old form of checkpointing around the first of two layers, whose input needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(300, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        hidden = checkpoint(self.first, self.embed(input_ids), use_reentrant=True)
        return type("Out", (), {"loss": self.second(hidden).square().mean()})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_that_checkpointing_cuts_off_do_not_stay_untrained_without_a_word() -> None:
    """Trap 16 (PEFT issue 137, open-unlearning issue 178): only what is not checkpointed trains, the other B's stay zero."""
    model = lora_lab.inject(Reentrant(), rank=2)
    with pytest.raises(LoraLabError, match="layer 'first' ran, but its lora_B got no gradient"):
        fit(model, token_rows(2), QUIET)


def test_a_head_that_trains_along_does_not_break_loss_scaling() -> None:
    """Trap 18 (PEFT issues 341 and 1249): "Attempting to unscale FP16 gradients", of the 16-bit copy of a head."""
    model = lora_lab.inject(our_llama(torch.float16), rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = model.lm_head.weight.detach().clone()
    result = fit(model, token_rows(4), {"max_steps": 3, "precision": "fp16-mixed", "learning_rate": 0.01, **QUIET})
    assert result.skipped_steps == 0 and not torch.equal(model.lm_head.weight, before)


def test_a_second_adapter_from_a_16_bit_file_is_not_trained_in_16_bit(tmp_path: Path) -> None:
    """Trap 19 (PEFT issue 1090: the first float32, the second float16)."""
    lora_lab.save(lora_lab.inject(small(), rank=2, init="random"), tmp_path, dtype=torch.float16)
    model = lora_lab.inject(small().to(torch.bfloat16), rank=2)
    lora_lab.load(model, tmp_path, adapter="second", trainable=True)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_an_optimizer_is_not_left_with_parameters_that_are_gone() -> None:
    """Trap 26: a step that moves nothing says nothing. `.to()`, use, disabled and merge with unmerge keep the Parameters; inject freezes the base,
    so that an optimizer made before it has nothing that trains, and `fit` makes its own."""
    model = small()
    too_early = torch.optim.SGD(model.parameters(), lr=0.1)
    base = dict(model.named_parameters())
    lora_lab.inject(model, rank=2, init="random")
    assert all(dict(model.named_parameters())[name] is p for name, p in base.items())
    assert not any(p.requires_grad for group in too_early.param_groups for p in group["params"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.float().to("cpu").double()
    lora_lab.unmerge(lora_lab.merge(lora_lab.use(lora_lab.use(model, None), "default")))
    with lora_lab.disabled(model):
        pass
    y = model(numbers(4, 6))
    y.square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(numbers(4, 6)), y)


def test_a_loaded_adapter_is_not_trained_in_vain_and_the_mode_stays(tmp_path: Path) -> None:
    """Trap 27: PEFT's is frozen and the model in eval(), transformers' load_adapter leaves dropout on (issue 34469); here load touches no mode,
    and training what is frozen is refused."""
    lora_lab.save(lora_lab.inject(our_llama(), rank=2, init="random"), tmp_path)
    for mode in (True, False):
        model = lora_lab.load(our_llama().train(mode), tmp_path)
        assert all(module.training == mode for module in model.modules() if type(module) is not lora_lab.layers.AdapterParameters)
    with pytest.raises(LoraLabError, match="nothing in the model requires grad"):
        fit(model, token_rows(2), QUIET)
    fit(lora_lab.load(our_llama(), tmp_path, trainable=True), token_rows(2), {"max_steps": 1, **QUIET})


# Files -------------------------------------------------------------------------------------------------------------------------------


def test_a_head_that_was_unfrozen_by_hand_is_not_left_out_of_the_file_without_a_word(tmp_path: Path) -> None:
    """Trap 23 (PEFT issues 310 and 577): it trains, is not saved, and is random again when the adapter is loaded."""
    model = lora_lab.inject(small(), rank=2, target_modules=["0"])
    model[2].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2\.weight.*not in the file.*modules_to_save"):
        lora_lab.save(model, tmp_path)


def test_what_an_adapter_trains_is_all_in_its_file_and_saving_it_warns_of_nothing(tmp_path: Path, no_warnings: None) -> None:
    for number, request in enumerate(({}, {"modules_to_save": ["2"]}, {"bias": "all"}, {"variant": "dora"}, {"init": "pissa"}, {"lora_bias": True})):
        model = lora_lab.inject(small(), rank=2, target_modules=["0"], **request)
        lora_lab.inject(model, rank=2, target_modules=["1"], adapter="another", bias="lora_only")
        lora_lab.save(lora_lab.use(model, "default"), tmp_path / str(number))
        for parameter in model.parameters():
            parameter.requires_grad_(False)


def test_a_head_that_trains_along_is_counted_once() -> None:
    """Trap 24: PEFT keeps the old head beside the new one and counts both ("all params": 158 for 99)."""
    model = small()
    base = sum(p.numel() for p in model.parameters())
    count = lora_lab.count_parameters(lora_lab.inject(model, rank=2, target_modules=["0"], modules_to_save=["2"]))
    head, adapter = 8 * 3 + 3, 2 * (6 + 8)
    assert (count.trainable, count.adapter, count.base, count.total) == (head + adapter, adapter, base, base + adapter)
    assert sum(p.numel() for p in model.parameters()) == count.total


def test_an_adapted_embedding_does_not_drag_the_whole_matrix_into_the_file(tmp_path: Path) -> None:
    """Trap 25 (PEFT issue 2898: 322 MB for one new token), and one of another size is an error, not a truncation (issue 1457)."""
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 4))
    lora_lab.save(lora_lab.inject(model, rank=2, target_modules=["0"]), tmp_path)
    assert {key.removeprefix(PREFIX) for key in load_file(tmp_path / TENSORS)} == {"0.lora_embedding_A", "0.lora_embedding_B"}
    assert (tmp_path / TENSORS).stat().st_size < 0.1 * 4 * 1000 * 64
    resized = nn.Sequential(nn.Embedding(1001, 64), nn.Linear(64, 4))
    with pytest.raises(LoraLabError, match=r"A \[2, 1000\].*needs \[2, 1001\]"):
        lora_lab.load(resized, tmp_path)
    assert type(resized[0]) is nn.Embedding


@pytest.mark.parametrize("name", ["lora", "lora_A", "lora_B", "default", "weight", "base_layer"])
def test_an_adapter_called_like_a_part_of_a_key_is_not_lost_on_the_way(tmp_path: Path, name: str) -> None:
    """Trap 28 (PEFT issue 2699): the name was cut out of the keys, with more than itself."""
    model = lora_lab.inject(small(), rank=2, init="random", adapter=name)
    lora_lab.save(model, tmp_path)
    again = lora_lab.load(small(), tmp_path, adapter=name)
    assert torch.equal(again(numbers(4, 6)), model(numbers(4, 6))) and not torch.allclose(again(numbers(4, 6)), small()(numbers(4, 6)))
    assert_close(peft.PeftModel.from_pretrained(small(), tmp_path, autocast_adapter_dtype=False)(numbers(4, 6)), model(numbers(4, 6)))


def test_a_file_for_a_model_with_repeated_layers_is_not_half_applied(tmp_path: Path) -> None:
    """Trap 44: PEFT's guard looks a setting up under an adapter's name and never fires; here such a file is refused by the setting's name."""
    lora_lab.save(lora_lab.inject(small(), rank=2, init="random"), tmp_path)
    model = small()
    with pytest.raises(LoraLabError, match=r"layer_replication=\[\[0, 2\], \[1, 3\]\]"):
        lora_lab.load(model, changed(tmp_path, layer_replication=[[0, 2], [1, 3]]))
    assert not lora_layers(model)


# Names --------------------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.proj_drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.1)


def sees_and_reads() -> nn.ModuleDict:
    """The same names in the part that sees and in the part that reads."""
    return nn.ModuleDict({"vision_tower": nn.ModuleList([Attention()]), "language_model": nn.ModuleList([Attention(), Attention()]),
                          "lm_head": nn.Linear(4, 4)})  # fmt: skip


def test_a_vision_tower_gets_no_adapters_that_nobody_meant() -> None:
    """Trap 29 (PEFT issue 2615): the plan says how many layers a name is, and one word leaves a whole part out."""
    plan = lora_lab.plan(sees_and_reads(), rank=2, target_modules=["q_proj"])
    assert "q_proj     3 x rank 2" in str(plan)
    model = lora_lab.inject(sees_and_reads(), rank=2, target_modules=["q_proj"], exclude_modules=["vision_tower"])
    assert set(lora_layers(model)) == {"language_model.0.q_proj", "language_model.1.q_proj"}


def test_a_greedy_expression_meets_layers_only_and_a_head_is_called_by_its_whole_name() -> None:
    """Trap 29 (unsloth-zoo issue 807: an expression that hits the Dropout `proj_drop`); PEFT's modules_to_save=["head"] captures lm_head."""
    model = lora_lab.inject(sees_and_reads(), rank=2, target_modules=r".*proj.*")
    assert set(lora_layers(model)) == {path for path, module in sees_and_reads().named_modules() if path.endswith(("q_proj", "v_proj"))}
    with pytest.raises(LoraLabError, match=r"'head' matches no module with parameters.*lm_head"):
        lora_lab.inject(sees_and_reads(), rank=2, target_modules=["q_proj"], modules_to_save=["head"])


def test_layer_numbers_are_found_in_a_list_at_the_root() -> None:
    """Trap 30 (PEFT issue 3610): layers_pattern missed a root-level ModuleList."""
    model = lora_lab.inject(nn.ModuleList(Attention() for _ in range(3)), rank=2, target_modules=["q_proj"], layers=[1])
    assert set(lora_layers(model)) == {"1.q_proj"}


def test_names_of_an_older_release_are_an_error_that_lists_todays() -> None:
    """Trap 31: ViT's "query" is "q_proj" in transformers 5.23."""
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8)
    model = transformers.ViTForImageClassification(config)
    present = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    stale = "query" if "query" not in present else "q_proj"
    with pytest.raises(LoraLabError, match=f"'{stale}' matches nothing") as error:
        lora_lab.inject(model, target_modules=[stale, stale])
    assert all(name in str(error.value) for name in present) and not lora_layers(model)


def test_a_model_is_still_known_by_its_class_and_its_forward_by_its_arguments() -> None:
    """Trap 45 (transformers issue 27161): the Trainer looks the class up by its name, and drops columns that forward does not name."""
    model = build("llama")
    kind, name, arguments, keys = type(model), model._get_name(), inspect.signature(model.forward), list(model.state_dict())
    lora_lab.inject(model, rank=2)
    assert (type(model), model._get_name(), inspect.signature(model.forward)) == (kind, name, arguments)
    assert [key for key in model.state_dict() if ".lora_" not in key] == keys
    assert name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


# Several adapters ------------------------------------------------------------------------------------------------------------------------


def test_pissa_does_not_change_the_base_under_other_adapters() -> None:
    """Trap 32 (PEFT issues 2184 and 1929): there the principal part is taken out of W for everybody, and unload leaves it out."""
    model, x = small(), numbers(4, 6)
    base = model(x)
    lora_lab.inject(model, rank=2, adapter="plain", init="random")
    plain = model(x)
    lora_lab.inject(model, rank=2, adapter="principal", init="pissa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.requires_grad)  # "principal" has learned something
    assert not torch.allclose(model(x), base)
    with lora_lab.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(lora_lab.use(model, "plain")(x), plain) and not torch.allclose(plain, base)
    assert torch.equal(lora_lab.eject(model)(x), base)
    assert all(torch.equal(p, dict(small().named_parameters())[name]) for name, p in model.named_parameters())


ROWS = ["a", None, "b"]


def two(model: nn.Module, **request: Any) -> nn.Module:
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, adapter=name, **request)
    return randomise(model)


@pytest.mark.parametrize("variant", ["lora", "dora"])  # two ways of adding updates row by row
def test_rows_keep_their_adapters_where_the_model_cuts_a_picture_into_windows(variant: str) -> None:
    """Trap 35 (PEFT issues 1967 and 1990): MobileViT folds windows into the batch dimension, so that a layer sees more rows than there are names."""
    torch.manual_seed(0)
    config = transformers.MobileViTConfig(image_size=32, patch_size=2, hidden_sizes=[16] * 3, neck_hidden_sizes=[8] * 6 + [16],
                                          num_attention_heads=2, expand_ratio=2.0, num_labels=3)  # fmt: skip
    model = transformers.MobileViTForImageClassification(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    two(model, target_modules=["query", "value"], variant=variant)
    x, seen = torch.randn(3, 3, 32, 32).double(), []
    next(iter(lora_layers(model).values())).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape[0]))  # type: ignore[attr-defined]
    with torch.no_grad():
        alone = torch.cat([lora_lab.use(model, name)(x[row : row + 1]).logits for row, name in enumerate(ROWS)])
        with lora_lab.per_sample(model, ROWS):
            assert_close(model(x).logits, alone, rtol=0, atol=1e-9 * float(alone.abs().max()))
        base = lora_lab.use(model, None)(x).logits
    assert seen[:4] == [4, 4, 4, 12]  # four windows of every picture
    assert not torch.allclose(alone[0], base[0], rtol=1e-3) and not torch.allclose(alone[2], base[2], rtol=1e-3)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_beams_keep_their_rows_adapter_in_the_decoder_and_the_encoder(variant: str) -> None:
    """Trap 35: the encoder sees every row once, the decoder once for each beam; PEFT has names repeated for the one and not for the other."""
    model, ids = two(build("t5"), variant=variant), torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    beams = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    alone = [lora_lab.use(model, name).generate(ids[row : row + 1], **beams) for row, name in enumerate(ROWS)]  # type: ignore[operator]
    with lora_lab.per_sample(model, ROWS):
        together = model.generate(ids, **beams)  # type: ignore[operator]
    assert torch.equal(together.sequences, torch.cat([each.sequences for each in alone]))
    assert_close(together.sequences_scores, torch.cat([each.sequences_scores for each in alone]), rtol=0, atol=1e-6)
    base = lora_lab.use(model, None).generate(ids, **beams)  # type: ignore[operator]
    assert not torch.allclose(base.sequences_scores[[0, 2]], together.sequences_scores[[0, 2]])


def test_a_pickle_of_a_model_in_memory_keeps_adapters_and_a_folder_never_holds_one(tmp_path: Path) -> None:
    """Trap 42 (PEFT issue 546): what is on disk is safetensors and JSON, which run nothing when they are read."""
    model = lora_lab.inject(small(), rank=2, init="random", modules_to_save=["2"], bias="lora_only")
    assert torch.equal(pickle.loads(pickle.dumps(model))(numbers(4, 6)), model(numbers(4, 6)))
    lora_lab.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(LoraLabError, match="pickled adapter_model.bin, which can run code"):
        lora_lab.load(small(), tmp_path)


# Running statistics --------------------------------------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double().eval()


def trained_whole() -> nn.Sequential:
    """An adapter with a BatchNorm of its own, after a batch in training mode."""
    model = randomise(lora_lab.inject(normed(), rank=2, target_modules=["0"], modules_to_save=["1"]))
    model.train()(3 * numbers(16, 6) + 1)
    return model.eval()


def test_running_statistics_that_trained_with_an_adapter_do_not_stay_behind_in_the_base() -> None:
    """Trap 39: with the adapter off, and after eject, BatchNorm has the statistics it had before inject."""
    model, x, base = trained_whole(), numbers(4, 6), normed()(numbers(4, 6))
    y = model(x)
    with lora_lab.disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), y) and not torch.allclose(y, base)
    assert torch.equal(lora_lab.eject(model)(x), base)
    assert model[1].num_batches_tracked == 0


def test_running_statistics_of_a_module_that_is_trained_whole_travel_in_the_file(tmp_path: Path) -> None:
    """Trap 39 (PEFT's troubleshooting guide: name BatchNorm in modules_to_save)."""
    model, x = trained_whole(), numbers(4, 6)
    lora_lab.save(model, tmp_path / "ours")
    assert_close(lora_lab.load(normed(), tmp_path / "ours")(x), model(x), rtol=0, atol=1e-12)
    theirs = peft.PeftModel.from_pretrained(normed(), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    assert_close(theirs(x), model(x), rtol=0, atol=1e-12)
    theirs.train()(numbers(16, 6, seed=2) - 2)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert_close(lora_lab.load(normed(), tmp_path / "theirs")(x), theirs(x), rtol=0, atol=1e-9)
    assert not torch.allclose(theirs(x), model(x))
