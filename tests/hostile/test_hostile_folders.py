"""Adapters' and models' folders that ask for too much, lead elsewhere or do not add up: refused by name, before memory is taken, nothing changed."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from adapter_surfaces import CONFIG, TENSORS, Small, Watched, read_folder
from cell import MIB, confined
from hypothesis import given, settings
from hypothesis import strategies as st
from model_surfaces import CONFIGS, runs, small
from mutations import header_of, nested, with_header
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_workshop import our_llama

import lora_lab
import prompt_tuning_lab
from lora_lab import LoraLabError, models
from lora_lab.models.embedding import Pooling
from lora_lab.streaming import merge_checkpoint


@pytest.fixture
def adapter(tmp_path):
    """A good adapter's folder whose configuration is read from adapter_config.json, and its model."""
    folder = tmp_path / "chosen"
    lora_lab.save(lora_lab.inject(Small(), rank=2, init="random"), folder)
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    return folder


def with_config(folder, **changes):
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **changes}))


def refused(folder, act, message):
    """The act is refused with this message in a cell, and takes no more than 100 MiB."""

    def work(case):
        with case("once"), pytest.raises(LoraLabError, match=message):
            act()

    assert confined(folder, work).peak_bytes < 100 * MIB


# Numbers --------------------------------------------------------------------------------------------------------------------------


NUMBERS = [True, "8", 8.0, 0, -1, 2**31, 2**63, 10**400, float("nan"), float("inf"), [], {}, None]


@pytest.mark.parametrize("number", NUMBERS, ids=range(len(NUMBERS)))
@pytest.mark.parametrize("key", ["r", "rank_pattern"])
def test_a_rank_is_a_whole_number_of_a_size(key, number, adapter):
    with_config(adapter, lora_alpha=2.5, **{key: {"q_proj": number} if key == "rank_pattern" else number})
    with pytest.raises(LoraLabError, match="rank"):
        lora_lab.load(Small(), adapter)


@pytest.mark.parametrize("number", [True, "8", 10**400, 1e39, float("nan"), -float("inf"), [], None], ids=range(8))
@pytest.mark.parametrize("key", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_is_a_finite_number(key, number, adapter):
    with_config(adapter, **{key: {"q_proj": number} if key == "alpha_pattern" else number})
    with pytest.raises(LoraLabError, match="alpha"):
        lora_lab.load(Small(), adapter)


@pytest.mark.parametrize("changes", [{"r": 2**31 - 1}, {"rank_pattern": {"q_proj": 2_000_000_000}}, {"r": 10**9, "init_lora_weights": "pissa"}])
def test_an_enormous_rank_is_refused_before_memory_is_taken(changes, adapter):
    with_config(adapter, **changes)
    watched = Watched(Small())
    refused(adapter, lambda: lora_lab.load(watched.model, adapter), r"with rank \d+ .*a wrong rank")
    watched.check()


SIZES = ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads"]


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "FalconForCausalLM", "BertForSequenceClassification"])
def test_a_model_is_no_larger_than_its_weights(family, tmp_path):
    """A billion layers in config.json would be a billion modules before the first tensor is looked at."""
    folder = tmp_path / "chosen"
    models.save(small(family), folder)
    config = json.loads((folder / "config.json").read_text())

    def work(case):
        for name in SIZES:
            others = rf"{name}=.* in config.json, but the weights have|tensor .* by config.json|cannot share a width of \d+ in config.json"
            number = f"{name}=.* in config.json: expected a whole number of at least 1"
            said = {10**9: others, 2**31 - 1: others, 2**62: f"{number}|{others}", 10**400: f"{number}|{others}", None: f"config.json lacks {name}"}
            for value in (*said, -1, 0, "2", True, 2.0, float("nan")):
                (folder / "config.json").write_text(json.dumps({**config, name: value}))
                with case(f"{name}={value}"), pytest.raises(LoraLabError, match=said.get(value, number)):
                    models.load(folder)

    assert confined(folder, work).peak_bytes < 100 * MIB


@pytest.mark.parametrize(("family", "name"), [("GPT2LMHeadModel", "n_positions"), ("Qwen3ForCausalLM", "max_position_embeddings")])
def test_a_context_of_null_is_refused_by_its_name(family, name, tmp_path):
    """GPT-2 has a row for each position; rotary scaling of type dynamic compares positions with it."""
    models.save(small(family), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: None}))
    with pytest.raises(LoraLabError, match=name):
        runs(models.load(tmp_path)[0])


def test_a_classifier_of_a_billion_classes_is_refused(tmp_path):
    folder = tmp_path / "chosen"
    models.save(small("BertForSequenceClassification"), folder)
    config = {name: value for name, value in json.loads((folder / "config.json").read_text()).items() if name != "id2label"}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"], "num_labels": 10**9}))
    refused(folder, lambda: models.load(folder, task="sequence-classification"), "num_labels=1000000000.*100,000 classes")


# Files ----------------------------------------------------------------------------------------------------------------------------


def test_a_header_of_a_hundred_megabytes_is_refused_unread(adapter):
    """Read, it would take ten times as much."""
    entry = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % number for number in range(1_700_000)) + b"}"
    (adapter / TENSORS).write_bytes(with_header(text, b""))
    del text
    watched = Watched(Small())
    refused(adapter, lambda: lora_lab.load(watched.model, adapter), "has a header of .* bytes, expected 33,554,432 at most")
    watched.check()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("part", ["the adapter", "a norm that trains along", "rows of words"])
def test_numbers_that_cannot_be_computed_in_are_refused(part, dtype, tmp_path):
    kind, options = {"the adapter": ("", {}), "a norm that trains along": ("norm", {"modules_to_save": ["norm"]}),
                     "rows of words": ("trainable_tokens", {"trainable_token_indices": [1, 2]})}[part]  # fmt: skip
    lora_lab.save(lora_lab.inject(our_llama(), rank=2, init="random", **options), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = next(key for key in tensors if kind in key)
    save_file({**tensors, key: tensors[key].to(dtype)}, tmp_path / TENSORS)
    watched = Watched(our_llama())
    with pytest.raises(LoraLabError, match=f"{dtype}.*finite|finite.*{dtype}"):
        lora_lab.load(watched.model, tmp_path)
    watched.check()


def test_a_network_in_8_bit_floats_is_refused(tmp_path):
    prompt_tuning_lab.save(prompt_tuning_lab.inject(our_llama(), 2, method="p-tuning"), tmp_path)
    path = next(tmp_path.glob("trainable-*"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.to(torch.float8_e5m2) for name, tensor in load_file(path).items()}, path, metadata)
    with pytest.raises(LoraLabError, match="float8_e5m2.*expected finite numbers"):
        prompt_tuning_lab.load(our_llama(), tmp_path, trainable=True)


LARGER = r"tensor 'base_model\.model\.model\.norm\.weight' is \[\d.*\d\], larger than any memory: it is damaged"
SHAPES = [([0, 2**62], LARGER), ([2**62, 0], LARGER), ([0, 2**63 - 1, 2**63 - 1], LARGER), ([2**64, 0], "truncated or not a safetensors file"),
          ([2**40, 0], r"model\.norm\.weight.* \[1099511627776, 0\].* \[16\]")]  # fmt: skip


@pytest.mark.parametrize(("shape", "message"), SHAPES, ids=str)
def test_a_tensor_of_nothing_takes_no_work(shape, message, tmp_path):
    """2**40 rows of no columns are no bytes in a file, and were 2**20 blocks to look at: in place of a norm's weight that the adapter announces."""
    adapter, key, model = tmp_path / "chosen", "base_model.model.model.norm.weight", our_llama()
    lora_lab.save(lora_lab.inject(our_llama(), rank=2, init="random", modules_to_save=["norm"]), adapter)
    save_file({name: tensor for name, tensor in load_file(adapter / TENSORS).items() if name != key}, adapter / TENSORS)
    header, body = header_of((adapter / TENSORS).read_bytes())
    (adapter / TENSORS).write_bytes(with_header({**header, key: {"dtype": "F32", "shape": shape, "data_offsets": [len(body)] * 2}}, body))
    models.save(model, adapter / "base")
    watched = Watched(model)
    refused(adapter, lambda: lora_lab.load(model, adapter), message)
    refused(adapter, lambda: merge_checkpoint(adapter / "base", adapter, adapter / "out", progress=False), message)
    watched.check()


def test_a_network_is_no_larger_than_its_file(tmp_path):
    """A first layer [hidden, 1] would say of the others that they are [hidden, hidden]: 40 GB of 400 KB."""
    folder = tmp_path / "chosen"
    prompted = prompt_tuning_lab.inject(our_llama(), 4, method="p-tuning", init="random", encoder_hidden_size=6)
    prompt_tuning_lab.save(prompted, folder)
    (path,) = folder.glob("trainable-*.safetensors")
    tensors = {**load_file(path), "mlp_head.0.weight": torch.zeros(100_000, 1)}
    save_file(tensors, path, {"lora_lab_method": "p-tuning"})
    refused(folder, lambda: prompt_tuning_lab.load(our_llama(), folder, trainable=True), "expected .*save the task again")


@pytest.mark.parametrize("name", ["../beside/secret.safetensors", "/etc/passwd", "..", "", "x" * 5000, "a\0b", "sub/model.safetensors", "\ud800",
                                  "c:\\x"])  # fmt: skip
def test_an_index_names_files_of_its_folder_and_no_others(name, tmp_path):
    folder = tmp_path / "chosen"
    models.save(our_llama(), folder)
    (tmp_path / "beside").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "beside" / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(folder, lambda: models.load(folder), "is not in the folder")
    refused(folder, lambda: merge_checkpoint(folder, folder, folder / "out"), "is not in the folder")


@pytest.mark.parametrize("name", ["../beside", "/etc", "..", "a/b", "x" * 5000, "\0", None, 3])
def test_pooling_is_read_from_the_models_own_folder(name, tmp_path):
    (tmp_path / "chosen").mkdir(), (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "config.json").write_text('{"pooling_mode": "cls"}')
    (tmp_path / "chosen" / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": name}]))
    refused(tmp_path / "chosen", lambda: Pooling.of_folder(tmp_path / "chosen"), "expected the name of a folder beside it")


def test_names_in_an_adapter_are_names_and_no_paths(adapter, tmp_path):
    """Where it came from is not followed, a layer that is not there is not looked for elsewhere."""
    for name in ("../../beside", "/etc/passwd", "\0", "x" * 100_000, "https://example.org/x"):
        with_config(adapter, base_model_name_or_path=name, revision=name, auto_mapping={"parent_library": name, "base_model_class": name})

        def work(case):
            with case("a name"):
                lora_lab.load(Small(), adapter)

        assert confined(adapter, work).refused == 0
    for name in ("../x", "x/y", "..", "a b", "", "x" * 65):
        with pytest.raises(LoraLabError, match="expected 1 to 64 letters"):
            lora_lab.load(Small(), adapter, adapter=name)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"null", b'"x"', b"[]", b"1" * 5000, b"", b"{}\0"], ids=range(9))
def test_json_that_is_none_is_an_error_of_ours(text, adapter, tmp_path):
    (adapter / CONFIG).write_bytes(text)
    with pytest.raises(LoraLabError, match="adapter_config.json"):
        lora_lab.load(Small(), adapter)
    folder = tmp_path / "model"
    models.save(our_llama(), folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        before = read_folder(folder)
        (folder / name).write_bytes(text)
        (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
        with pytest.raises(LoraLabError, match=name):
            models.load(folder)
        (folder / name).unlink()
        for each, data in before.items():
            (folder / each).write_bytes(data)


# Any value, anywhere --------------------------------------------------------------------------------------------------------------


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([2**31 - 1, 2**63, 10**400, "../x", "(.+)+",
    "none"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12,
)  # fmt: skip


def test_any_value_of_any_key_of_an_adapters_configuration(adapter):
    config, watched = json.loads((adapter / CONFIG).read_text()), Watched(Small())

    def work(case):
        @settings(max_examples=250, database=None, derandomize=True)
        @given(st.dictionaries(st.sampled_from([*config, "exclude_modules", "layers_to_transform", "layers_pattern", "trainable_token_indices"]),
                               VALUES,
                               min_size=1, max_size=3))  # fmt: skip
        def tried(changes):
            (adapter / CONFIG).write_text(json.dumps({**config, **changes}))
            with case(repr(changes)):
                lora_lab.load(watched.model, adapter)
                lora_lab.eject(watched.model)
            watched.check()

        tried()

    assert confined(adapter, work).cases >= 250


@pytest.mark.parametrize("family", CONFIGS)
def test_any_value_of_any_key_of_a_models_configuration(family, tmp_path):
    folder = tmp_path / "chosen"
    models.save(small(family), folder)
    config = json.loads((folder / "config.json").read_text())

    def work(case):
        @settings(max_examples=40, database=None, derandomize=True)
        @given(st.dictionaries(st.sampled_from([*config, "rope_parameters", "rope_scaling", "partial_rotary_factor", "layer_types"]), VALUES,
                               min_size=1,
                               max_size=2))  # fmt: skip
        def tried(changes):
            (folder / "config.json").write_text(json.dumps({**config, **changes}))
            with case(repr(changes)):
                runs(models.load(folder)[0])

        tried()

    assert confined(folder, work).cases >= 40


def test_depth_is_no_way_out(adapter):
    """As deep as Python's own JSON will write; deeper ones are refused while they are read."""
    for depth in (100, 900):
        with_config(adapter, target_modules=nested(depth, "list"))
        with pytest.raises(LoraLabError, match="target_modules"):
            lora_lab.load(Small(), adapter)


def test_a_length_field_beyond_the_file_is_named(adapter):
    data = (adapter / TENSORS).read_bytes()
    for length in (0, 1, len(data), 2**31, 2**63, 2**64 - 1):
        (adapter / TENSORS).write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(LoraLabError, match="truncated or not a safetensors file"):
            lora_lab.load(Small(), adapter)
