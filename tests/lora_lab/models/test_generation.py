"""Generation: the cache, the batch and the padding change nothing; sampling is transformers'; streaming loses no character."""

from __future__ import annotations

import pytest
import torch
from llama_tools import config, ids, ours, pair, theirs, tokenizer
from torch.testing import assert_close
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_lab import LoraLabError
from lora_lab.models import LlamaConfig, LlamaForCausalLM, generate
from lora_lab.models.generation import Sampling, choose, left_pad, penalise, truncate

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20]]
WAYS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "everything": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 4},
    "penalised greedy": {"repetition_penalty": 1.5},
}


@pytest.fixture
def model():
    return pair()[0]


# The same tokens, however they are made -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_no_token(model, way):
    runs = [generate(model, PROMPTS, max_new_tokens=12, use_cache=cache, **WAYS[way]).ids for cache in (True, False)]
    assert runs[0] == runs[1]
    assert {len(row) for row in runs[0]} == {12}


@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_depend_on_its_neighbours(model, way):
    """Left padding is masked and positions count from the text's start; each row samples from its own stream."""
    options = dict(WAYS[way])
    seed = options.pop("seed", 0)
    together = generate(model, PROMPTS, max_new_tokens=12, seed=seed, **options).ids
    alone = [generate(model, [prompt], max_new_tokens=12, seed=seed + row, **options).ids[0] for row, prompt in enumerate(PROMPTS)]
    given = generate(model, PROMPTS[::-1], max_new_tokens=12, seed=[seed + 3, seed + 2, seed + 1, seed], **options).ids
    assert together == alone == given[::-1]
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_a_row_gets_the_room_it_would_have_alone():
    """The context ends for the long prompt first; the short ones go on."""
    model, _ = pair(max_position_embeddings=10)
    together = generate(model, PROMPTS, max_new_tokens=100)
    assert [len(row) for row in together.ids] == [10 - len(prompt) for prompt in PROMPTS]
    assert together.ids == [generate(model, [prompt], max_new_tokens=100).ids[0] for prompt in PROMPTS]


@pytest.mark.parametrize("use_cache", [True, False])
def test_transformers_generates_the_same_and_its_models_work_here(use_cache):
    mine, reference = pair()
    prompt = ids(1, 6)
    with torch.no_grad():
        expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None,
                                      pad_token_id=0)  # fmt: skip
    for model in (mine, reference):
        assert generate(model, prompt, max_new_tokens=10, use_cache=use_cache).ids == expected[:, 6:].tolist()
    assert generate(reference, PROMPTS, max_new_tokens=8).ids == generate(mine, PROMPTS, max_new_tokens=8).ids


def test_prompts_may_be_a_tensor_or_lists_or_texts(model):
    words = tokenizer()
    model = ours(theirs(vocab_size=len(words)))
    encoded = [words.encode(text) for text in ("the dog", "a quick brown fox")]
    by_text = generate(model, ["the dog", "a quick brown fox"], words, max_new_tokens=5, stop_ids=[])
    assert by_text.ids == generate(model, encoded, max_new_tokens=5).ids
    assert by_text.ids[0] == generate(model, torch.tensor(encoded[:1]), max_new_tokens=5).ids[0] == generate(
        model, [torch.tensor(encoded[0])], max_new_tokens=5).ids[0]  # fmt: skip
    assert by_text.texts == [words.decode(row) for row in by_text.ids]
    assert generate(model, encoded, max_new_tokens=5).texts == ["", ""]
    assert by_text.tokens_per_second > 0


def test_left_padding_puts_every_end_at_the_right_edge():
    tokens, mask = left_pad([[1, 2], [3]], pad=9)
    assert tokens.tolist() == [[1, 2], [9, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]


# Stopping -----------------------------------------------------------------------------------------------------------------------------


def test_each_row_stops_at_its_own_token_and_the_others_go_on(model):
    free = generate(model, PROMPTS, max_new_tokens=12).ids
    stops = [free[0][3], free[2][6]]
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop_ids=stops).ids
    for row, whole in zip(stopped, free, strict=True):
        end = next((index for index, token in enumerate(whole) if token in stops), len(whole) - 1)
        assert row == whole[: end + 1]  # the stop token is included
    assert len(stopped[0]) <= 4
    assert max(map(len, stopped)) > min(map(len, stopped))


def test_generation_ends_when_every_row_has_stopped(model):
    free = generate(model, PROMPTS[:2], max_new_tokens=12).ids
    calls = []
    model.register_forward_hook(lambda *_: calls.append(True))
    generate(model, PROMPTS[:2], max_new_tokens=12, stop_ids=[free[0][1], free[1][1]])
    assert len(calls) <= 2


def test_the_tokenizer_says_what_stops(model):
    words = tokenizer()
    model = ours(theirs(vocab_size=len(words)))
    free = generate(model, [[5, 6]], words, max_new_tokens=6, stop_ids=[]).ids[0]
    words.stop_ids = frozenset([free[2]])
    assert generate(model, [[5, 6]], words, max_new_tokens=6).ids[0] == free[: free.index(free[2]) + 1]

    class Transformerslike:
        eos_token_id, pad_token_id = free[2], None
        decode = staticmethod(words.decode)

    assert generate(model, [[5, 6]], Transformerslike(), max_new_tokens=6).ids[0] == free[: free.index(free[2]) + 1]


# Sampling -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_the_repetition_penalty_is_transformers(penalty):
    logits, seen = torch.randn(3, 50), torch.randint(0, 50, (3, 12))
    assert_close(penalise(logits, seen, torch.ones_like(seen), penalty), RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()))


def test_padding_is_not_penalised():
    logits, (tokens, mask) = torch.ones(2, 5), left_pad([[1, 2], [3]], pad=4)
    assert penalise(logits, tokens, mask, 2.0).tolist() == [[1, 0.5, 0.5, 1, 1], [1, 1, 1, 0.5, 1]]


@pytest.mark.parametrize("top_k", [0, 1, 5, 49, 50, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.05, 1e-6])
def test_top_k_and_top_p_are_transformers(top_k, top_p):
    logits = torch.randn(20, 50) * 3
    processors = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    kept = truncate(logits, top_k, top_p)
    assert torch.equal(kept, processors(None, logits.clone()))
    assert kept.isfinite().any(-1).all()


def test_temperature_top_k_and_top_p_come_in_transformers_order():
    logits, seen = torch.randn(4, 50) * 2, torch.randint(0, 50, (4, 9))
    processors = [RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.6), TopKLogitsWarper(12), TopPLogitsWarper(0.8)]
    probabilities = LogitsProcessorList(processors)(seen, logits.clone()).softmax(-1)
    expected = [torch.multinomial(row, 1, generator=torch.Generator().manual_seed(7 + i)) for i, row in enumerate(probabilities)]
    generators = [torch.Generator().manual_seed(7 + i) for i in range(4)]
    assert torch.equal(choose(logits, seen, torch.ones_like(seen), Sampling(0.6, 12, 0.8, 1.4), generators), torch.cat(expected))


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    generator, mask = [torch.Generator().manual_seed(0)], torch.zeros(1, 1, dtype=torch.long)
    draws = torch.stack([choose(logits, mask, mask, Sampling(temperature=2.0), generator) for _ in range(4000)])
    assert_close(torch.bincount(draws.flatten(), minlength=4) / 4000, (logits[0] / 2).softmax(-1), rtol=0, atol=0.03)


def test_a_seed_determines_the_text_and_another_gives_another(model):
    runs = [generate(model, PROMPTS, max_new_tokens=10, temperature=1.5, seed=seed).ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    torch.manual_seed(5)
    unseeded = [generate(model, PROMPTS, max_new_tokens=10, temperature=1.5).ids for _ in range(2)]
    torch.manual_seed(5)
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=1.5).ids == unseeded[0] != unseeded[1]


def test_a_seed_leaves_the_global_stream_alone(model):
    before = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=3, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


# Streaming ----------------------------------------------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """A model that says given tokens, whatever it is asked."""

    def __init__(self, rows, vocabulary):
        super().__init__()
        self.rows, self.vocabulary, self.at = rows, vocabulary, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        said = torch.tensor([row[min(self.at, len(row) - 1)] for row in self.rows])
        self.at += 1
        return type("Output", (), {"logits": torch.nn.functional.one_hot(said, self.vocabulary)[:, None].float(), "past_key_values": None})


@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_streamed_pieces_join_to_the_text_and_never_end_in_half_a_character(cut):
    """Every byte of these characters is a token of its own; `cut` ends the text inside the last one."""
    words = tokenizer()
    texts = ["naïve 日本 🙂", "the quick dog 👩‍👩‍👧"]
    rows = [words.encode(text)[: None if cut is None else -cut] for text in texts]
    assert max(map(len, rows)) > 15
    pieces = [[], []]
    stops = [words.token_id("eos_token")]
    model = Scripted([[*row, *([] if cut else stops)] for row in rows], len(words))
    result = generate(model, [[5], [6]], words, max_new_tokens=max(map(len, rows)) + (cut is None), stop_ids=stops,
                      on_token=lambda row, token, text: pieces[row].append((token, text)))  # fmt: skip
    for row in (0, 1):
        assert "".join(text for _, text in pieces[row]) == result.texts[row]
        assert [token for token, _ in pieces[row]] == result.ids[row]
        assert all("\ufffd" not in text for _, text in pieces[row][:-1] if cut is None)
    if cut is None:
        assert result.texts == texts
    else:
        assert any("\ufffd" in text for text in result.texts)


def test_tokens_are_streamed_without_a_tokenizer_too(model):
    seen = []
    result = generate(model, PROMPTS, max_new_tokens=3, on_token=lambda *token: seen.append(token))
    assert seen == [(row, result.ids[row][step], "") for step in range(3) for row in range(4)]


# Modes and errors ------------------------------------------------------------------------------------------------------------------------


def test_every_modules_mode_comes_back(model):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    generate(model, PROMPTS, max_new_tokens=2)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, max_new_tokens=2, on_token=fail)
    assert not any(modes)
    assert [module.training for module in model.modules()] == before


def test_generation_leaves_no_gradients_and_training_works_afterwards(model):
    model.train().gradient_checkpointing_enable()
    generate(model, PROMPTS, max_new_tokens=2)
    assert all(p.grad is None for p in model.parameters())
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [([], {}, "prompts is empty"), ([[1], []], {}, "prompt 1 is empty"), ("hello", {}, r"one string.*\[prompt\]"),
     (["hello"], {}, "tokenizer is needed"), ([1, 2, 3], {}, "prompt 0 is 1: expected a text or a list"),
     (torch.tensor([1, 2]), {}, "prompt 0 is 1"),
     ([[1] * 64], {}, "64 tokens.*context is 64"), ([[1] * 70], {}, "70 tokens.*context is 64"), ([[64]], {}, "id 64"),
     ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"), ([[1]], {"max_new_tokens": -3}, "max_new_tokens=-3"),
     ([[1]], {"temperature": -1.0}, "temperature=-1.0"), ([[1]], {"top_k": -1}, "top_k=-1"), ([[1]], {"top_p": 0.0}, "top_p=0.0"),
     ([[1]], {"top_p": 1.5}, "top_p=1.5"), ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
     ([[1], [2]], {"seed": [1]}, "1 values for 2 prompts"), ([[1]], {"temperature": float("nan")}, "temperature=nan")],
)  # fmt: skip
def test_what_cannot_be_generated_is_an_error_that_names_the_value(prompts, options, message):
    with pytest.raises(LoraLabError, match=message):
        generate(LlamaForCausalLM(LlamaConfig.from_dict(config())), prompts, **options)


def test_an_empty_text_is_an_error_too():
    words = tokenizer()
    with pytest.raises(LoraLabError, match="prompt 0 is empty"):
        generate(LlamaForCausalLM(LlamaConfig.from_dict(config(vocab_size=400))), [""], words)


def test_a_prompt_of_the_whole_context_but_one_gets_one_token():
    assert len(generate(LlamaForCausalLM(LlamaConfig.from_dict(config())), [[1] * 63], max_new_tokens=50).ids[0]) == 1


@pytest.mark.parametrize("options", [{"top_k": 2.5}, {"temperature": "1"}, {"temperature": 1e-40}, {"seed": 1.5}, {"max_new_tokens": 2.5},
                                     {"stop_ids": [2.5]}, {"top_p": True}])  # fmt: skip
def test_a_setting_of_the_wrong_kind_is_named(options):
    name = next(iter(options))
    with pytest.raises(LoraLabError, match=name):
        generate(pair()[0], [[1, 2]], **options)


def test_a_prompt_of_fractions_is_refused():
    with pytest.raises(LoraLabError, match=r"prompt 0 is \[1.5\]: expected whole numbers"):
        generate(pair()[0], [[1.5]])
