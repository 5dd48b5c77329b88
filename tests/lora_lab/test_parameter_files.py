"""Adapters of parameters in PEFT's files, where they differ by position only: the same function both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import randomise
from torch import Tensor, nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*keys did not match.*")
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2, head_dim=8)),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 2)),
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=40, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1, attention_chunk_size=32)),
}  # fmt: skip
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> (ours, PEFT's)
    "experts": ({"target_modules": []}, {"target_modules": []}),
    "attention too": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        {"target_modules": ["q_proj"], "rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"1\..*gate_up_proj": 9}},
        {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {r"1\..*gate_up_proj": 9}},
    ),
}


def build(family: str, dtype: torch.dtype = torch.float64, experts: str = "eager") -> Any:
    torch.manual_seed(1)
    model: Any = MODELS[family]().to(dtype).eval()
    model.set_experts_implementation(experts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 64, (2, 7))).logits


def seeded(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return randomise(model, by=0.2).eval()


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("family", MODELS)
def test_peft_computes_what_we_save(tmp_path: Path, family: str, request_: str) -> None:
    model = seeded(lora_lab.inject(build(family), rank=4, alpha=7, target_parameters=STACKS, **REQUESTS[request_][0]))
    assert (logits(model) - logits(build(family))).abs().max() > 0.1
    lora_lab.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert_close(logits(theirs), logits(model), rtol=0, atol=1e-9)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("family", MODELS)
def test_we_compute_what_peft_saves(tmp_path: Path, family: str, request_: str) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=7, target_parameters=STACKS, **REQUESTS[request_][1])
    theirs = seeded(peft.get_peft_model(build(family), config).double())
    theirs.save_pretrained(tmp_path)
    ours = lora_lab.load(build(family), tmp_path).eval()
    assert (logits(ours) - logits(build(family))).abs().max() > 0.1
    assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-9)
    assert_close(logits(lora_lab.merge(ours)), logits(theirs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_transformers_computes_experts_sees_the_update(experts: str) -> None:
    model = seeded(lora_lab.inject(build("mixtral", torch.float32, experts), rank=4, target_modules=[], target_parameters=STACKS))
    plain = lora_lab.eject(lora_lab.merge(copy.deepcopy(model), restorable=False))
    assert (logits(model) - logits(build("mixtral", torch.float32, experts))).abs().max() > 0.1
    assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    exact = lora_lab.inject(build("mixtral"), rank=4, target_modules=[], target_parameters=STACKS)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(3, 64, (2, 7))
    for network in (model, exact):
        network(input_ids=ids, labels=ids).loss.backward()
    for own, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        assert (own.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            assert (own.grad - wanted.grad).norm() < 1e-3 * wanted.grad.norm()


# The layout ---------------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Adapted parameters that are not in alphabetical order, another one between them, a layer inside, a bias."""

    def __init__(self, n: int = 3, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.z = nn.Parameter(torch.randn(n, 4, 6))
        self.middle = nn.Parameter(torch.randn(6, 6))
        self.a = nn.Parameter(torch.randn(n, 4, 6))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.inside = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = sum(torch.tanh(x @ z.T) @ a for z, a in zip(self.z, self.a, strict=True))
        return self.inside(y @ self.matrix.T @ self.middle + self.bias)


def odd(**sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"block": nn.Sequential(nn.Linear(6, 6), Odd(**sizes))}).double()


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    block = model.base_model.model["block"] if isinstance(model, peft.PeftModel) else model["block"]
    return block(torch.randn(5, 6, dtype=torch.float64))


def test_parameters_lie_in_a_file_by_their_order_in_the_module(tmp_path: Path) -> None:
    """PEFT wraps the module once for each, the first one innermost; what is below the module lies below all of them."""
    model = lora_lab.inject(odd(), rank=2, target_modules=["inside"], target_parameters=["matrix", "a", "z"], bias="all")
    lora_lab.save(seeded(model), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    at = "base_model.model.block.1."
    wanted = {f"{at}base_layer.base_layer.lora_A.weight": (6, 6), f"{at}base_layer.base_layer.lora_B.weight": (4, 6),  # z [3, 4, 6]
              f"{at}base_layer.lora_A.weight": (6, 6), f"{at}base_layer.lora_B.weight": (4, 6),                        # a
              f"{at}lora_A.weight": (2, 6), f"{at}lora_B.weight": (6, 2),                                              # matrix
              f"{at}base_layer.base_layer.base_layer.inside.lora_A.weight": (2, 6),
              f"{at}base_layer.base_layer.base_layer.inside.lora_B.weight": (6, 2),
              f"{at}base_layer.base_layer.base_layer.inside.base_layer.bias": (6,),
              f"{at}base_layer.base_layer.base_layer.bias": (6,),
              "base_model.model.block.0.bias": (6,)}  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["a", "matrix", "z"] and config["target_modules"] == ["inside"]
    again = lora_lab.load(odd(), tmp_path)
    assert_close(outputs(again), outputs(model), rtol=0, atol=0)
    for part in ("lora_of_a", "lora_of_z"):
        assert torch.equal(*(network["block"][1].get_submodule(part).lora_B["default"] for network in (again, model)))


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("sizes", [{}, {"transposed": True}, {"n": 1}], ids=["stacks", "transposed", "a stack of one"])
def test_modules_of_ones_own_go_through_peft_and_back(tmp_path: Path, sizes: dict[str, Any], bias: str) -> None:
    names = ["matrix", "z", "a"]
    model = seeded(lora_lab.inject(odd(**sizes), rank=2, alpha=5, target_modules=["inside", "0"], target_parameters=names, bias=bias))
    lora_lab.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(odd(**sizes), tmp_path / "ours").double()
    assert_close(outputs(theirs), outputs(model), rtol=0, atol=1e-12)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["inside", "0"], target_parameters=names, bias=bias)
    theirs = seeded(peft.get_peft_model(odd(**sizes), config).double())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_lab.load(odd(**sizes), tmp_path / "theirs")
    assert_close(outputs(ours), outputs(theirs), rtol=0, atol=1e-12)
    assert not torch.allclose(outputs(ours), outputs(odd(**sizes)))


def test_the_weight_of_a_layer_goes_through_peft_and_back(tmp_path: Path) -> None:
    model = seeded(lora_lab.inject(odd(), rank=2, alpha=5, target_modules=["inside"], target_parameters=["block.0.weight"]))
    lora_lab.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"] == ["0.weight"]
    assert_close(outputs(peft.PeftModel.from_pretrained(odd(), tmp_path).double()), outputs(model), rtol=0, atol=1e-12)
    assert_close(outputs(lora_lab.load(odd(), tmp_path)), outputs(model), rtol=0, atol=0)


def test_adapters_of_different_parameters_are_saved_one_by_one(tmp_path: Path) -> None:
    """PEFT refuses two adapters with different target_parameters in one model; here each has a file as if it were alone."""
    model = lora_lab.inject(odd(), rank=2, target_modules=[], target_parameters=["z", "a"], adapter="one")
    lora_lab.inject(model, rank=3, target_modules=[], target_parameters=["z"], layers=None, adapter="two")
    seeded(model)
    for name in ("one", "two"):
        lora_lab.save(lora_lab.use(model, name), tmp_path / name)
        assert_close(outputs(peft.PeftModel.from_pretrained(odd(), tmp_path / name).double()), outputs(model), rtol=0, atol=1e-12)
    both = lora_lab.load(lora_lab.load(odd(), tmp_path / "one", adapter="one"), tmp_path / "two", adapter="two")
    assert_close(outputs(lora_lab.use(both, ["one", "two"])), outputs(lora_lab.use(model, ["one", "two"])), rtol=0, atol=1e-12)


def test_a_parameter_of_one_layer_only_is_named_by_as_much_of_its_path_as_that_takes(tmp_path: Path) -> None:
    model = seeded(lora_lab.inject(build("mixtral"), rank=2, target_modules=[], target_parameters=STACKS, layers=[1], exclude_modules=["down_proj"]))
    lora_lab.save(model, tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"]
    assert names == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert_close(logits(peft.PeftModel.from_pretrained(build("mixtral"), tmp_path).eval()), logits(model), rtol=0, atol=1e-9)


def test_token_rows_and_parameters_go_together(tmp_path: Path) -> None:
    model = seeded(lora_lab.inject(build("mixtral"), rank=2, target_modules=[], target_parameters=STACKS, trainable_token_indices=[5, 9]))
    lora_lab.save(model, tmp_path)
    assert_close(logits(lora_lab.load(build("mixtral"), tmp_path)), logits(model), rtol=0, atol=0)
    assert_close(logits(peft.PeftModel.from_pretrained(build("mixtral"), tmp_path).eval()), logits(model), rtol=0, atol=1e-9)


# Loading -------------------------------------------------------------------------------------------------------------------------


def saved(folder: Path, **request: Any) -> nn.Module:
    model = seeded(lora_lab.inject(odd(), rank=2, alpha=5, target_modules=[], target_parameters=["z", "a"], **request))
    lora_lab.save(model, folder)
    return model


def test_replacing_values_keeps_the_parameters(tmp_path: Path) -> None:
    model = saved(tmp_path)
    other = lora_lab.inject(odd(), rank=2, alpha=5, target_modules=[], target_parameters=["z", "a"])
    before = [parameter for parameter in other.parameters() if parameter.requires_grad]
    lora_lab.load(other, tmp_path, replace=True, trainable=True)
    assert all(old is new for old, new in zip(before, (p for p in other.parameters() if p.requires_grad), strict=True))
    assert torch.equal(outputs(other), outputs(model))
    another = lora_lab.inject(odd(), rank=3, alpha=5, target_modules=[], target_parameters=["z", "a"])
    with pytest.raises(LoraLabError, match="the rank of 'block.1.z': 3 in 'default' here, 2 in the file"):
        lora_lab.load(another, tmp_path, replace=True)


def test_16_bit_files_and_bases_keep_float32_adapters(tmp_path: Path) -> None:
    model = saved(tmp_path / "wide")
    lora_lab.save(model, tmp_path / "half", dtype=torch.bfloat16)
    loaded = lora_lab.load(odd().bfloat16(), tmp_path / "half")
    part = loaded["block"][1].lora_of_a
    assert part.lora_A["default"].dtype == torch.float32 and part.weight.dtype == torch.bfloat16
    assert_close(part.lora_B["default"], model["block"][1].lora_of_a.lora_B["default"].bfloat16().float(), rtol=0, atol=0)


def damaged(folder: Path, case: str) -> tuple[nn.Module, str]:
    """A folder with one thing wrong, the model it is loaded into, and what the error says."""
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings, at = load_file(path), json.loads(config.read_text()), "base_model.model.block.1."
    model, message = odd(), ""
    if case == "a parameter is missing":
        tensors, message = {key: tensor for key, tensor in tensors.items() if "base_layer" not in key}, "names 'block.1.z', of which the file has no"
    elif case == "half a pair":
        del tensors[f"{at}base_layer.lora_B.weight"]
        message = "has lora_A.weight only"
    elif case == "one too deep":
        tensors[f"{at}base_layer.base_layer.lora_A.weight"] = tensors[f"{at}lora_A.weight"].clone()
        message = "an adapter for another model|has lora_A.weight only|does not have"
    elif case == "another rank":
        settings["r"], message = 3, r"'block.1.[az]' \[3, 4, 6\] it has.*rank 3.*needs \[3, 3, 6\]"
    elif case == "another model":
        model, message = nn.ModuleDict({"block": nn.Sequential(nn.Linear(6, 6))}).double(), "another model: target_parameters.*matches nothing"
    elif case == "other sizes":
        model, message = odd(n=2), "another model, or a wrong rank"
    elif case == "not a number":
        tensors[f"{at}lora_A.weight"][0, 0] = float("nan")
        message = "finite"
    elif case == "a text":
        settings["target_parameters"], message = "a", "expected a list of names"
    save_file(tensors, path, {"format": "pt"})
    config.write_text(json.dumps(settings))
    return model, message


@pytest.mark.parametrize(
    "case", ["a parameter is missing", "half a pair", "one too deep", "another rank", "another model", "other sizes", "not a number", "a text"]
)
def test_damaged_files_are_refused_and_the_model_is_untouched(tmp_path: Path, case: str) -> None:
    saved(tmp_path)
    model, message = damaged(tmp_path, case)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(LoraLabError, match=message):
        lora_lab.load(model, tmp_path)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == list(before) and all(torch.equal(model.state_dict()[key], values) for key, values in before.items())


def test_what_no_file_can_name_is_not_saved(tmp_path: Path) -> None:
    alone = lora_lab.inject(Odd(), rank=2, target_modules=[], target_parameters=["a"])
    with pytest.raises(LoraLabError, match="inject into a model that contains it"):
        lora_lab.save(alone, tmp_path)
    twins = nn.ModuleDict({"odd": Odd(), "more": nn.ModuleDict({"odd": Odd()})})
    lora_lab.inject(twins, rank=2, target_modules=[], target_parameters=["odd.a"], exclude_modules=["more"])
    with pytest.raises(LoraLabError, match="cannot be named in a PEFT file"):
        lora_lab.save(twins, tmp_path)
    assert not list(tmp_path.iterdir())
