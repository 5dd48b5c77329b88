"""Regular expressions that would run for ever are refused by their form, wherever a file may give one; those that people write are read."""

from __future__ import annotations

import gc
import json
import random
import re
import weakref

import pytest
import torch
from adapter_surfaces import CONFIG, TENSORS, Small, Watched
from cell import confined
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_lab
from lora_lab import LoraLabError
from lora_lab.patterns import at_the_end, compile_pattern
from lora_lab.plans import AdapterConfig
from lora_lab.targets import check_config

EXPLODING = ["(.+)+x", "(.*)*", "(a|a)*b", "(a|ab)*c", "([a-z]+)*$", "(.*.*)+", ".*.*.*.*.*.*x", "(?i)(?:ka|\u212aa)*", "(?:a|ab)*c",
             ".?" * 40, "(.{1,60}){1,60}", "(?=(.+)+x).*",
             "(?:(?:.+)?)+x",
             "((a{9}){9}){9}(.*)+.*", "(?:x|y|)*z", "(?:(?:a|b)c?)*d"]  # fmt: skip
REFERRING = [r"(a)\1", "(?P<n>.)(?P=n)+", "(a)?(?(1)b|c)"]
BROKEN = ["(", "[", "*", "a{99999999999999999999}", "(" * 5000, "\\", "(?P<n>", "x" * 8_000_001]
# What Unsloth writes for models of images and text: older versions, newer ones, and one that was published with the layers of Qwen3.5
PARTS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
NEWER = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"
NAMES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|out_proj|fc1|fc2"
QWEN = ("qkv|proj|linear_fc1|linear_fc2|out_proj|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|gate_proj|up_proj|down_proj|q_proj|k_proj|v_proj|o_proj")
UNSLOTH = [
    rf"(?:.*?(?:{tags}).*?(?:{parts}).*?(?:{names}){end})|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{parts})\.(?:(?:{names})))"
    for tags in ("vision|image|visual|patch|language|text", "language|text") for parts in (PARTS, NEWER)
    for names in (NAMES, QWEN, f"{NAMES}|proj|proj_out|fc") for end in (".*?", "")
]  # fmt: skip
READ = [
    *UNSLOTH,
    ".*q_proj", r".*\.(q|k|v)_proj", ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    # PEFT's docs
    r"^(?!.*vision).*(?:q_proj|v_proj)$", r"(.*\.)?(q_proj|c_attn)", r"layers\.(1[0-9]|2[0-3])\.", "(?i).*Q_PROJ", r"[\w.]+",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj).*?)",
    "|".join(re.escape(f"model.layers.{n}.self_attn.{part}_proj") for n in range(80) for part in "qkvo"),  # what `save` writes
    r"^model\.layers\.\d{1,3}\.mlp", r"(?:layers|blocks|h)\.\d+\..*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EXPLODING)
def test_an_exploding_expression_is_refused_with_the_way_out(pattern):
    with pytest.raises(LoraLabError, match=r"target_modules=.*could be tried in more than 20,000,000 ways.*write '\.\*' once"):
        compile_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", REFERRING)
def test_references_to_groups_are_refused(pattern):
    with pytest.raises(LoraLabError, match="refers back to a group"):
        compile_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_expression_is_an_error_of_ours(pattern):
    with pytest.raises(LoraLabError, match="is not a regular expression|8,000,001 characters") as error:
        compile_pattern(pattern, "target_modules")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("pattern", READ, ids=range(len(READ)))
def test_expressions_that_people_write_are_read(pattern):
    assert compile_pattern(pattern, "target_modules").pattern == pattern


@pytest.mark.parametrize("pattern", UNSLOTH, ids=range(len(UNSLOTH)))
def test_unsloths_expressions_come_to_an_end_fast(pattern):
    """Their ways are counted with room: none is near the bound."""
    compiled = compile_pattern(pattern, "target_modules")
    assert compiled.fullmatch("model.language_model.layers.0.self_attn.q_proj") and compiled.fullmatch("model.layers.31.mlp.down_proj")
    assert not compiled.fullmatch("vision.attention." + "a" * 47)


def test_an_expression_may_be_as_long_as_the_names_of_half_of_many_experts():
    """22,000 of them make 1.4 million characters; here most of those are a comment, which is read faster."""
    names = "|".join(re.escape(f"model.layers.{layer}.mlp.experts.{expert}.down_proj") for layer in range(9) for expert in range(0, 256, 2))
    compiled = compile_pattern(f"(?#{'x' * 2_000_000}){names}", "target_modules")
    assert compiled.fullmatch("model.layers.8.mlp.experts.254.down_proj") and not compiled.fullmatch("model.layers.8.mlp.experts.255.down_proj")


def test_a_long_expression_is_not_kept():
    """A stranger's would stay in memory for the life of the process."""
    for length, kept in ((100, True), (50_000, False)):
        compiled = weakref.ref(compile_pattern("x" * length, "target_modules"))
        gc.collect()
        assert (compiled() is not None) == kept


def keyed(keys):
    return AdapterConfig(rank_pattern=dict.fromkeys(keys, 4))


@pytest.mark.parametrize("key", [".*.*{}", ".*.*.*{}", r"layers\.{}.*.*_proj"])
def test_keys_that_cost_too_much_together_are_refused(key):
    at_the_end(key.format(0), "rank_pattern")
    with pytest.raises(LoraLabError, match="rank_pattern: its keys could be tried in more than 200,000,000 ways"):
        check_config(keyed(key.format(number) for number in range(10_000)))


def test_long_keys_that_would_be_compiled_again_and_again_are_refused():
    with pytest.raises(LoraLabError, match="keys could be tried"):
        check_config(keyed(f"{'x' * 19_000}{number}" for number in range(10)))
    with pytest.raises(LoraLabError, match="has 20,001 characters, expected 20,000 at most"):
        check_config(keyed(["x" * 20_001]))


def test_a_key_for_every_layer_is_read():
    check_config(keyed(f"^{re.escape(f'model.layers.{layer}.mlp.experts.{expert}.down_proj')}" for layer in range(200) for expert in range(32)))
    check_config(keyed(rf"layers\.{layer}\..*{part}_proj" for layer in range(200) for part in ("q", "k", "v", "o", "gate", "up", "down")))


def test_a_key_of_a_pattern_is_an_expression_of_its_own():
    """PEFT puts it between brackets: what closes them, or sets flags in the middle, is an error and not a traceback."""
    for key in ("a)|(b", "(?i)q_proj"):
        with pytest.raises(LoraLabError, match="rank_pattern"):
            at_the_end(key, "rank_pattern")


PLACES = {"target_modules": lambda p: p, "exclude_modules": lambda p: p, "rank_pattern": lambda p: {p: 2}, "alpha_pattern": lambda p: {p: 2.0},
          "modules_to_save": lambda p: [p], "layers_pattern": lambda p: [p]}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_file_cannot_make_load_run_for_ever(place, tmp_path):
    folder = tmp_path / "chosen"
    lora_lab.save(lora_lab.inject(Small(), rank=2, target_modules=["q_proj"], init="random"), folder)
    save_file(load_file(folder / TENSORS), folder / TENSORS)  # without our copy of the configuration
    watched, config = Watched(Small()), json.loads((folder / CONFIG).read_text())

    def work(case):
        for pattern in EXPLODING:
            changed = {place: PLACES[place](pattern), **({"layers_to_transform": [0]} if place == "layers_pattern" else {})}
            (folder / CONFIG).write_text(json.dumps({**config, **changed}))
            with case(pattern):
                lora_lab.load(watched.model, folder)
            watched.check()

    told = confined(folder, work)
    assert told.refused == told.cases == len(EXPLODING)


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[a-z]", r"\d", "layers", "q_proj", "$", "^", r"\b", ""])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join), st.lists(inner, min_size=1, max_size=4).map(lambda each: f"(?:{'|'.join(each)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])).map(lambda each: f"(?:{each[0]}){each[1]}"),
        inner.map(lambda each: f"(?={each})"), inner.map(lambda each: f"({each})"),
    ),
    max_leaves=12,
)  # fmt: skip
WORST = ["a" * 64, "ab" * 32, "layers.0." * 7 + "q_prox", "." * 64, "9" * 64]


def test_whatever_is_read_comes_to_an_end(tmp_path):
    """Each expression that is accepted is tried on paths made to be slow; the cell stops one that takes 20 seconds."""
    (tmp_path / "chosen").mkdir()
    seen = {"read": 0}

    def work(case):
        @settings(max_examples=300, database=None, derandomize=True)
        @given(EXPRESSIONS)
        @example("(?:(?:a*)*)*b")  # refused whatever else is drawn
        def tried(expression):
            with case(expression):
                pattern = compile_pattern(expression, "target_modules")
                seen["read"] += 1
                for path in WORST:
                    pattern.fullmatch(path)

        tried()
        assert seen["read"] > 100

    told = confined(tmp_path / "chosen", work)
    assert 0 < told.refused < told.cases


def test_the_files_that_save_writes_are_read_again(tmp_path):
    """Where no shorter name will do, a file has an expression of all paths."""
    rng = random.Random(0)
    model = torch.nn.ModuleDict({f"a{n}": torch.nn.ModuleDict({"x": torch.nn.Linear(3, 3)}) for n in range(40)})
    chosen = rng.sample(range(40), 20)
    lora_lab.save(lora_lab.inject(model, rank=1, target_modules=lambda path, module: path in {f"a{n}.x" for n in chosen}, init="random"), tmp_path)
    fresh = torch.nn.ModuleDict({f"a{n}": torch.nn.ModuleDict({"x": torch.nn.Linear(3, 3)}) for n in range(40)})
    assert len([name for name, _ in lora_lab.load(fresh, tmp_path).named_parameters() if "lora_A" in name]) == 20
