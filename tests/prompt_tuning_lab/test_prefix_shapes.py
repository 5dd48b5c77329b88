"""How prefixes begin, their shapes and counts, and what is refused. Trap numbers are those of the project's reference on prompt tuning."""

from __future__ import annotations

import peft
import pytest
import torch
from prefix_tools import CAUSAL, both, model, random_states, run
from torch.testing import assert_close

from lora_lab.errors import LoraLabError
from prompt_tuning_lab.prefix import Prefix, from_rows, keys_and_values, random_prefix
from prompt_tuning_lab.prefix_cache import PrefixShape, prefix_shape
from prompt_tuning_lab.prefix_insertion import insert_prefixes

ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])

# The start, and the counts ------------------------------------------------------------------------------------------------------


def test_a_random_prefix_is_small_and_a_texts_is_as_large_as_the_models_own() -> None:
    """T19: PEFT's normal numbers of std 1 are no keys the model has ever seen. Small ones move its output less."""
    base = model("ours", "llama")
    small = random_prefix(prefix_shape(base), 4, generator=torch.Generator().manual_seed(1)).double()
    assert 0.018 < float(small.std()) < 0.022
    own = keys_and_values(base, ids[0])
    assert_close(own.square().mean().sqrt(), keys_and_values(base, ids[1]).square().mean().sqrt(), rtol=0.3, atol=0)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        moved = [(run(base, [states], [0, 0, 0], input_ids=ids).logits - plain).abs().mean() for states in (small, small * 50)]
    assert moved[0] < moved[1]


def test_a_prefix_begins_with_its_own_copy_and_remembers_it() -> None:
    """T27: nothing is made in place, and nothing shrinks the start."""
    states = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    prefix = Prefix(states)
    before = states.clone()
    assert prefix.weight.dtype == torch.float32 and torch.equal(prefix(), prefix()) and torch.equal(prefix(), states.float())
    with torch.no_grad():
        prefix.weight.add_(1)
    assert torch.equal(states, before) and torch.equal(prefix.initial, states.float()) and [*prefix.state_dict()] == ["weight"]


COUNTS = {  # model: (L, N, D), virtual tokens, parameters
    "SmolLM2-135M": ((30, 3, 64), 20, 230_400), "GPT-2": ((12, 12, 64), 1, 18_432), "distilGPT-2": ((6, 12, 64), 1, 9_216),
    "Pythia-70m": ((6, 8, 64), 1, 6_144), "bloomz-560m": ((24, 16, 64), 20, 983_040), "bloomz-560m, 30": ((24, 16, 64), 30, 1_474_560),
    "BERT-base": ((12, 12, 64), 20, 368_640), "BERT-large": ((24, 16, 64), 1, 49_152), "run_rte_roberta": ((24, 16, 64), 128, 6_291_456),
    "boolq_roberta": ((24, 16, 64), 8, 393_216),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str) -> None:
    """PEFT's documentation, P-tuning v2's scripts, and P * 2 * L * N * D."""
    shape, length, parameters = COUNTS[name]
    prefix = Prefix(torch.empty(shape[0], 2, length, *shape[1:], device="meta"))
    assert sum(parameter.numel() for parameter in prefix.parameters()) == parameters == length * prefix.shape.per_token


CONFIGS = {
    "SmolLM2-135M": ("LlamaConfig", "LlamaForCausalLM", {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "vocab_size": 49152,
                                                         "num_key_value_heads": 3, "intermediate_size": 1536}),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "Pythia-70m": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
                                                           "intermediate_size": 2048}),
    "BERT-base": ("BertConfig", "BertModel", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_is_read_from_the_config(name: str) -> None:
    import transformers

    config, kind, fields = CONFIGS[name]
    with torch.device("meta"):
        base = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    assert prefix_shape(base) == COUNTS[name][0]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_shape_is_pefts(name: str) -> None:
    """Key-value heads, not query heads (T25)."""
    base = both(name)
    theirs = peft.get_peft_model(base["theirs"], peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    if not name.startswith("falcon-7b"):  # PEFT takes its one key head for four
        assert theirs.prompt_encoder["default"].embedding.weight.shape[1] == prefix_shape(base["ours"]).per_token


# Bad input ----------------------------------------------------------------------------------------------------------------------


BAD = {
    "another model's": (lambda base: ([torch.zeros(3, 2, 4, 2, 8)], [0, 0, 0], {}), r"a prefix is \[3, 2, 4, 2, 8\].*expected \[2, 2, P, 2, 8\]"),
    "query heads": (lambda base: ([torch.zeros(2, 2, 4, 4, 8)], [0, 0, 0], {}), r"expected \[2, 2, P, 2, 8\]: layers, keys and values"),
    "rows": (lambda base: ([random_states(base, 2)], [0, 0], {}), r"which has 2 rows, the batch 3"),
    "index": (lambda base: ([random_states(base, 2)], [0, 0, 1], {}), r"names prefix 1; there are 1"),
    "mask": (lambda base: ([random_states(base, 2)], [0] * 3, {"attention_mask": torch.ones(3, 9)}),
             r"attention_mask is \[3, 9\], expected \[3, 7\]: of the text, without its prefix"),
    "4D mask": (lambda base: ([random_states(base, 2)], [0] * 3, {"attention_mask": torch.ones(3, 1, 7, 7)}), "4 dimensions"),
}  # fmt: skip


@on_both_sides
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_before_anything_runs(side: str, what: str) -> None:
    base = model(side, "llama")
    make, message = BAD[what]
    prefixes, which, more = make(base)
    with pytest.raises(LoraLabError, match=message):
        insert_prefixes(base, prefixes, which, {"input_ids": ids, **more})


@pytest.mark.parametrize("weight", [torch.zeros(2, 3), torch.zeros(2, 3, 1, 1, 1), torch.zeros(2, 2, 0, 1, 1), torch.ones(2, 2, 1, 1, 1).long(), 5])
def test_what_is_no_prefix_is_refused(weight: object) -> None:
    with pytest.raises(LoraLabError, match="expected numbers"):
        Prefix(weight)


def test_a_prefix_that_is_not_finite_is_refused() -> None:
    with pytest.raises(LoraLabError, match="a NaN or an infinity"):
        Prefix(torch.full((2, 2, 1, 1, 1), torch.nan))


def test_models_that_can_have_no_prefix_are_refused() -> None:
    import transformers

    small = {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    distil = transformers.DistilBertModel(transformers.DistilBertConfig(**small))
    for base, message in ((torch.nn.Linear(2, 2), "a Linear can have no prefix"), (distil, "takes no past_key_values.*method='prompt'")):
        with pytest.raises(LoraLabError, match=message):
            prefix_shape(base)


def test_ids_that_are_no_text_are_refused() -> None:
    base = model("ours", "gpt2")
    for bad in (torch.tensor([], dtype=torch.long), ids, [1, 2]):
        with pytest.raises(LoraLabError, match="expected one row"):
            keys_and_values(base, bad)
    with pytest.raises(LoraLabError, match="num_virtual_tokens=0"):
        random_prefix(PrefixShape(1, 1, 1), 0)
    with pytest.raises(LoraLabError, match=r"expected \[P, 16\]"):
        from_rows(torch.zeros(3, 15), PrefixShape(2, 2, 2))
