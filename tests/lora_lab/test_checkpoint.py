"""Adapter files: PEFT reads ours, we read PEFT's, with the same logits; and what is damaged or foreign is refused."""

from __future__ import annotations

import copy
import errno
import json
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import build, logits
from torch import nn
from torch.testing import assert_close

import lora_lab
import lora_lab.checkpoint
from lora_lab import LoraLabError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

def peft_model(base, **config):
    return peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, **config)).eval()


def read_with_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing or an unknown key is a warning in PEFT
        return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval()


@pytest.fixture
def toy():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()


@pytest.fixture
def saved(toy, tmp_path):
    """(folder, the model it was saved from)."""
    model = lora_lab.inject(copy.deepcopy(toy), rank=2, alpha=6, init="random")
    lora_lab.save(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)


# With PEFT, both ways (every family: test_peft_families.py) ----------------------------------------------------------------------


def test_an_adapter_of_ours_travels_through_peft_and_comes_back(tmp_path):
    base = build("llama")
    ours = lora_lab.inject(copy.deepcopy(base), rank=3, alpha=7, init="random", target_modules=["q_proj", "down_proj"])
    lora_lab.save(ours, tmp_path / "ours")
    read_with_peft(copy.deepcopy(base), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs" / TENSORS).keys() == load_file(tmp_path / "ours" / TENSORS).keys()
    assert_close(logits(lora_lab.load(base, tmp_path / "theirs"), "llama"), logits(ours, "llama"), rtol=0, atol=1e-12)


def test_our_llama_and_transformers_llama_share_one_adapter_file(tmp_path):
    """The same paths and names: train here, serve there."""
    theirs = build("llama", torch.float32)
    ours = lora_lab.models.LlamaForCausalLM(lora_lab.models.LlamaConfig.from_dict(theirs.config.to_dict())).eval()
    ours.load_state_dict(theirs.state_dict())
    lora_lab.save(lora_lab.inject(ours, rank=4, init="random"), tmp_path)
    assert_close(logits(ours, "llama"), logits(read_with_peft(theirs, tmp_path), "llama"), rtol=1e-4, atol=1e-4)


def test_ranks_that_no_common_pattern_describes_are_written_path_by_path(tmp_path):
    """alpha=None means alpha = rank of each layer; PEFT's lora_alpha is one number, so alpha_pattern has to say the rest."""
    base = build("llama")
    ours = lora_lab.inject(copy.deepcopy(base), rank=4, rank_pattern={"q_proj": 2, r"1\..*\.v_proj": 3}, init="random")
    lora_lab.save(ours, tmp_path)
    assert_close(logits(read_with_peft(base, tmp_path), "llama"), logits(ours, "llama"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", [["q_proj"], ["layers.1.mlp.up_proj"], ["0.self_attn.v_proj", "down_proj"], "attention"])
def test_target_modules_on_disk_name_exactly_the_adapted_layers_by_pefts_rule(targets, tmp_path):
    base = build("llama")
    ours = lora_lab.inject(copy.deepcopy(base), rank=2, target_modules=targets, init="random")
    lora_lab.save(ours, tmp_path)
    theirs = read_with_peft(base, tmp_path)
    wrapped = {name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if "default" in getattr(module, "lora_A", ())}
    assert wrapped == set(lora_lab.checkpoint.lora_layers(ours))


def test_layer_names_that_end_alike_are_told_apart_on_disk(tmp_path):
    """A Sequential's "0" is also the end of "inner.0": PEFT's suffix matching needs a regular expression here."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).double()
    ours = lora_lab.inject(copy.deepcopy(base), rank=2, target_modules="0", init="random")
    lora_lab.save(ours, tmp_path)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(read_with_peft(base, tmp_path)(x), ours(x), rtol=0, atol=1e-12)


# The file ------------------------------------------------------------------------------------------------------------------------


def test_keys_shapes_and_dtype_are_pefts(saved):
    folder, _ = saved
    with safe_open(folder / TENSORS, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        assert file.metadata()["format"] == "pt"
    assert shapes == {"base_model.model.0.lora_A.weight": (2, 6), "base_model.model.0.lora_B.weight": (5, 2),
                      "base_model.model.2.lora_A.weight": (2, 5), "base_model.model.2.lora_B.weight": (4, 2)}  # fmt: skip
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]) == ("LORA", 2, 6, ["0", "2"])


def test_save_dtype_halves_the_file_and_loads_as_float32(toy, tmp_path):
    model = lora_lab.inject(toy.float(), rank=2, init="random")
    lora_lab.save(model, tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / TENSORS).values()} == {torch.float16}
    fresh = lora_lab.load(lora_lab.eject(copy.deepcopy(model)), tmp_path)
    assert fresh[0].lora_A["default"].dtype == torch.float32
    assert_close(fresh[0].lora_A["default"], model[0].lora_A["default"].half().float())


def test_the_name_of_the_adapter_is_not_in_the_file(toy, saved):
    folder, model = saved
    fresh = lora_lab.load(toy, folder, adapter="other")
    assert torch.equal(fresh(X), model(X)) and fresh[0].lora_active == ("other",)


def test_save_writes_the_one_active_adapter_and_asks_where_there_are_two(toy, tmp_path):
    for name in ("a", "b"):
        lora_lab.inject(toy, rank=2, init="random", adapter=name)
    lora_lab.save(toy, tmp_path / "b")
    lora_lab.save(toy, tmp_path / "a", adapter="a")
    assert torch.equal(load_file(tmp_path / "a" / TENSORS)["base_model.model.0.lora_B.weight"], toy[0].lora_B["a"])
    assert torch.equal(load_file(tmp_path / "b" / TENSORS)["base_model.model.0.lora_B.weight"], toy[0].lora_B["b"])
    with pytest.raises(LoraLabError, match=r"\['a', 'b'\].*active"):
        lora_lab.save(lora_lab.use(toy, ["a", "b"]), tmp_path / "c")
    with pytest.raises(LoraLabError, match="adapter='bb'"):
        lora_lab.save(toy, tmp_path / "c", adapter="bb")
    assert not (tmp_path / "c").exists()


def test_save_refuses_nan_and_keeps_the_earlier_file(saved):
    folder, model = saved
    before = (folder / TENSORS).read_bytes()
    with torch.no_grad():
        model[0].lora_B["default"][0, 0] = float("nan")
    with pytest.raises(LoraLabError, match="'0' holds NaN"):
        lora_lab.save(model, folder)
    assert (folder / TENSORS).read_bytes() == before


@pytest.mark.parametrize("fails", ["save_file", "os.replace"])
def test_a_full_disk_keeps_the_earlier_file_and_leaves_no_litter(saved, monkeypatch, fails):
    folder, model = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lora_lab.checkpoint.save_file" if fails == "save_file" else "os.replace", full)
    with torch.no_grad():
        model[0].lora_B["default"].add_(1.0)
    with pytest.raises(LoraLabError, match="could not save adapter 'default'.*No space left.*untouched"):
        lora_lab.save(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_interrupted_between_its_two_files_still_loads_as_one_adapter(toy, saved, monkeypatch):
    """The tensors carry a copy of their configuration: never a new B with an old alpha."""
    folder, _ = saved
    new = lora_lab.inject(copy.deepcopy(toy), rank=2, alpha=40, init="random")
    monkeypatch.setattr("lora_lab.checkpoint.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lora_lab.save(new, folder)
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == 6
    with pytest.warns(UserWarning, match="differs.*lora_alpha"):
        assert torch.equal(lora_lab.load(copy.deepcopy(toy), folder)(X), new(X))


def test_the_base_is_recorded_and_another_one_is_warned_about(toy, tmp_path, no_warnings):
    toy.base_sha256 = "a" * 64
    model = lora_lab.inject(copy.deepcopy(toy), rank=2)
    lora_lab.save(model, tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        assert file.metadata()["base_sha256"] == "a" * 64
    lora_lab.load(copy.deepcopy(toy), tmp_path)
    toy.base_sha256 = "b" * 64
    with pytest.warns(UserWarning, match="aaaaaaaaaaaa.*bbbbbbbbbbbb"):
        lora_lab.load(toy, tmp_path)


# Loading -------------------------------------------------------------------------------------------------------------------------


def test_a_loaded_adapter_is_frozen_unless_asked_to_train(toy, saved):
    folder, _ = saved
    assert not any(p.requires_grad for p in lora_lab.load(copy.deepcopy(toy), folder).parameters())
    trainable = lora_lab.load(toy, folder, trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {n for n, _ in trainable.named_parameters() if "lora_" in n}


def test_replace_copies_into_the_same_parameters_and_no_replace_refuses(toy, saved):
    folder, model = saved
    lora_lab.inject(toy, rank=2, alpha=6)
    parameter = toy[0].lora_B["default"]
    with pytest.raises(LoraLabError, match="already in this model.*replace=True"):
        lora_lab.load(toy, folder)
    lora_lab.load(toy, folder, replace=True)
    assert toy[0].lora_B["default"] is parameter and torch.equal(toy(X), model(X))
    with pytest.raises(LoraLabError, match="the rank of '0': 3 in 'default' here, 2 in the file"):
        lora_lab.load(lora_lab.inject(lora_lab.eject(toy), rank=3), folder, replace=True)


def test_a_loaded_adapter_can_be_saved_again_unchanged(toy, saved, tmp_path):
    folder, _ = saved
    lora_lab.save(lora_lab.load(toy, folder), tmp_path / "again")
    assert (tmp_path / "again" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()
    first, again = load_file(folder / TENSORS), load_file(tmp_path / "again" / TENSORS)
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def edit_config(**changes):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(config))
        save_file(load_file(folder / TENSORS), folder / TENSORS)  # as PEFT writes it: without our copy of the config

    return change


def edit_tensors(change):
    def apply(folder):
        tensors = load_file(folder / TENSORS)
        save_file(change(tensors) or tensors, folder / TENSORS)

    return apply


KEY_A = "base_model.model.0.lora_A.weight"
DAMAGE = {
    "cut": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:200]), "truncated or not a safetensors file"),
    "empty": (lambda f: (f / TENSORS).write_bytes(b""), "truncated or not a safetensors file"),
    "gone": (lambda f: (f / TENSORS).unlink(), "holds no adapter_model.safetensors"),
    "pickle": (lambda f: (f / TENSORS).rename(f / "adapter_model.bin"), "pickled.*save_pretrained"),
    "no tensors": (edit_tensors(lambda t: t.clear()), "holds no tensors"),
    "nan": (edit_tensors(lambda t: t | {KEY_A: torch.full((2, 6), float("nan"))}), "finite"),
    "half": (edit_tensors(lambda t: {k: v for k, v in t.items() if k != KEY_A}), "'0' has lora_B.weight only"),
    "shape": (edit_tensors(lambda t: t | {KEY_A: torch.zeros(2, 9)}), r"A \[2, 9\].*needs \[2, 6\]"),
    "integers": (edit_tensors(lambda t: t | {KEY_A: torch.zeros(2, 6, dtype=torch.int64)}), "floating-point"),
    "no prefix": (edit_tensors(lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}), "unexpected tensor '0.lora_A.weight'"),
    "extra": (edit_tensors(lambda t: t | {"base_model.model.0.lora_magnitude_vector": torch.ones(5)}), "has lora_magnitude.*use_dora=False"),
    "another model": (edit_tensors(lambda t: {k.replace(".0.", ".model.0."): v for k, v in t.items()}), "another model: it adapts 'model.0'"),
    "not linear": (edit_tensors(lambda t: {k.replace(".0.", ".1."): v for k, v in t.items()}), "'1', a ReLU"),
    "wrong rank": (edit_config(r=3), "with rank 3.*wrong rank"),
    "not lora": (edit_config(peft_type="PREFIX_TUNING"), "peft_type is 'PREFIX_TUNING'"),
    "dora": (edit_config(use_dora=True), "has no lora_magnitude_vector, but adapter_config.json says use_dora=True"),
    "bias": (edit_config(bias="all"), "bias='all' and modules_to_save=None, but '0.bias' is not in the file"),
    "saved modules": (edit_config(modules_to_save=["2"]), "modules_to_save"),
    "unknown key": (edit_config(shiny_new_thing={"x": 1}), "shiny_new_thing"),
    "corda": (edit_config(init_lora_weights="corda"), "init_lora_weights='corda' changed the base"),
    "alpha is text": (edit_config(lora_alpha="16"), "alpha='16'"),
    "no alpha": (edit_config(lora_alpha=None), "lora_alpha is null"),
    "rank is null": (edit_config(r=None), "rank=None"),
    "pattern is a list": (edit_config(rank_pattern=["0"]), "rank_pattern"),
    "broken pattern": (edit_config(rank_pattern={"(": 3}), "not a regular expression"),
    "nan alpha": (edit_config(alpha_pattern={"0": float("nan")}), r"alpha_pattern\['0'\]=nan"),
    "rslora is text": (edit_config(use_rslora="no"), "rslora='no'"),
    "dropout is 5": (edit_config(lora_dropout=5), "dropout=5"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "holds a list, expected an object"),
    "not json": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "no config": (lambda f: (edit_tensors(lambda t: None)(f), (f / CONFIG).unlink()), "is missing: it holds alpha"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_foreign_is_refused_and_the_model_is_untouched(damage, toy, saved):
    folder, _ = saved
    change, message = DAMAGE[damage]
    change(folder)
    before, keys, types = toy(X), set(toy.state_dict()), [type(m) for m in toy.modules()]
    with pytest.raises(LoraLabError, match=message):
        lora_lab.load(toy, folder)
    assert torch.equal(toy(X), before) and set(toy.state_dict()) == keys and [type(m) for m in toy.modules()] == types
    assert all(p.requires_grad for p in toy.parameters())


@pytest.mark.parametrize("harmless", [{"shiny": None}, {"shiny": False}, {"shiny": []}, {"modules_to_save": None}, {"init_lora_weights": "gaussian"}])
def test_unknown_settings_that_are_off_do_not_matter(harmless, toy, saved):
    folder, model = saved
    edit_config(**harmless)(folder)
    assert torch.equal(lora_lab.load(toy, folder)(X), model(X))


def test_a_file_that_names_a_shared_layer_by_its_second_path_fills_it(tmp_path):
    saved_from = lora_lab.inject(nn.ModuleDict({"b": nn.Linear(4, 4)}), rank=2, init="random")
    lora_lab.save(saved_from, tmp_path)
    shared = nn.Linear(4, 4)
    model = lora_lab.load(nn.ModuleDict({"a": shared, "b": shared}), tmp_path)
    assert torch.equal(model["a"].lora_B["default"], saved_from["b"].lora_B["default"])


def test_a_layer_alone_has_no_name_to_be_saved_under(tmp_path):
    with pytest.raises(LoraLabError, match="a layer alone has no name"):
        lora_lab.save(lora_lab.inject(nn.Linear(4, 4), rank=2), tmp_path)


def test_a_base_whose_files_are_gone_does_not_keep_an_adapter_from_being_saved(tmp_path):
    theirs = build("llama", torch.float32)
    theirs.save_pretrained(tmp_path / "base")
    model, _ = lora_lab.models.load(tmp_path / "base")
    lora_lab.inject(model, rank=2)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="SHA-256 is not recorded"):
        lora_lab.save(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / TENSORS).is_file()


def test_a_named_adapter_in_a_folder_below_is_pointed_out(toy, saved):
    folder, _ = saved
    with pytest.raises(LoraLabError, match=r"the adapters \['adapter'\] are in folders"):
        lora_lab.load(toy, folder.parent)
