"""Regular expressions that would run for ever are refused by their form, wherever a file may give one; those that people write are read."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from adapter_surfaces import CONFIG, TENSORS, Small, Watched
from cell import confined
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_lab
from lora_lab import LoraLabError
from lora_lab.patterns import at_the_end, compile_pattern

EXPLODING = ["(.+)+x", "(.*)*", "(a|a)*b", "(a|ab)*c", "([a-z]+)*$", "(.*.*)+", ".*.*.*.*.*.*x", ".?" * 40, "(.{1,60}){1,60}", "(?=(.+)+x).*",
             "(?:(?:.+)?)+x",
             "((a{9}){9}){9}(.*)+.*", "(?:x|y|)*z", "(?:(?:a|b)c?)*d"]  # fmt: skip
REFERRING = [r"(a)\1", "(?P<n>.)(?P=n)+", "(a)?(?(1)b|c)"]
BROKEN = ["(", "[", "*", "a{99999999999999999999}", "(" * 5000, "\\", "(?P<n>", "x" * 1_000_001]
READ = [
    ".*q_proj", r".*\.(q|k|v)_proj", ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$", r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    # PEFT's docs
    r"^(?!.*vision).*(?:q_proj|v_proj)$", r"(.*\.)?(q_proj|c_attn)", r"layers\.(1[0-9]|2[0-3])\.", "(?i).*Q_PROJ", r"[\w.]+",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj).*?)",
    "|".join(re.escape(f"model.layers.{n}.self_attn.{part}_proj") for n in range(80) for part in "qkvo"),  # what `save` writes
    r"^model\.layers\.\d{1,3}\.mlp", r"(?:layers|blocks|h)\.\d+\..*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EXPLODING)
def test_an_exploding_expression_is_refused_with_the_way_out(pattern):
    with pytest.raises(LoraLabError, match=r"target_modules=.*could be tried in more than 5,000,000 ways.*write '\.\*' once"):
        compile_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", REFERRING)
def test_references_to_groups_are_refused(pattern):
    with pytest.raises(LoraLabError, match="refers back to a group"):
        compile_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_expression_is_an_error_of_ours(pattern):
    with pytest.raises(LoraLabError, match="is not a regular expression|1,000,001 characters") as error:
        compile_pattern(pattern, "target_modules")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("pattern", READ, ids=range(len(READ)))
def test_expressions_that_people_write_are_read(pattern):
    assert compile_pattern(pattern, "target_modules").pattern == pattern


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
        @settings(max_examples=300, database=None, derandomize=True, deadline=None)
        @given(EXPRESSIONS)
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
