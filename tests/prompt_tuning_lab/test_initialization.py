"""How prompts begin. Trap numbers are those of the project's reference on prompt tuning."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bert_tools import word_pieces
from llama_tools import tokenizer as byte_pieces
from prefix_tools import both, model
from prompt_file_tools import TOKENS, edited, peft_folder, written
from prompt_file_tools import theirs as peft_base
from prompt_tools import EXACT, randomised
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from lora_lab.errors import LoraLabError
from prompt_tuning_lab import inject, nearest_tokens
from prompt_tuning_lab.embeddings import embedding_rms
from prompt_tuning_lab.initialization import Start, draw, without_meaning

METHODS = ["prompt", "prefix", "p-tuning", "residual"]


def wide_llama(vocabulary: int = 400) -> Any:
    torch.manual_seed(0)
    config = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()


def words(base: Any, ids: list[int]) -> torch.Tensor:
    return base.get_input_embeddings()(torch.tensor(ids)).detach().float()


def ids_of(base: Any, rows: torch.Tensor) -> list[int]:
    """The words these rows are, each exactly one."""
    table = words(base, list(range(base.get_input_embeddings().num_embeddings)))
    found = (rows.detach()[:, None] == table[None]).all(-1)
    assert (found.sum(1) == 1).all()
    return found.int().argmax(1).tolist()


# Words --------------------------------------------------------------------------------------------------------------------------


def test_drawn_words_are_different_frequent_and_no_special_tokens() -> None:
    """Lester et al., section 3.2. PEFT's SAMPLE_VOCAB draws with replacement from all ids, special and unused ones among them."""
    base, tokenizer = wide_llama(), byte_pieces()
    special = without_meaning(tokenizer, 100)
    assert special == {tokenizer.token_id(name) for name in ("bos_token", "eos_token", "unk_token")}
    ids = ids_of(base, inject(base, 90, tokenizer=tokenizer, top_n=100, seed=1).prompt()())
    assert len(set(ids)) == 90 and max(ids) < 100 and not special & set(ids)
    assert special & set(ids_of(base, inject(base, 100, top_n=100).prompt()()))  # without a tokenizer nobody knows what is special


def test_places_that_a_vocabulary_keeps_free_are_not_drawn() -> None:
    """BERT's first thousand ids are [unused..], whose vectors were never trained."""

    class Names:
        all_special_ids = (0, 1)

        def __len__(self) -> int:
            return 8

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [["[PAD]", "[CLS]", "[unused0]", "the", "<unused5>", "<extra_id_3>", "a", "<|reserved_special_token_1|>"][i] for i in ids]

    assert without_meaning(Names(), 100) == {0, 1, 2, 4, 5, 7}
    assert sorted(draw(wide_llama(), 2, Start(tokenizer=Names(), top_n=8), None)) == [3, 6]


def test_transformers_tokenizers_name_the_same_words_as_ours() -> None:
    """Theirs have an attribute `backend`, too, which since version 5 is a word."""
    ours = byte_pieces()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours.backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    assert without_meaning(theirs, 100) == without_meaning(ours, 100) != set()
    base = wide_llama()
    for start in ({}, {"init": "text", "text": "the quick fox"}, {"init": "labels", "labels": ["the", "dog"]}):
        rows = [inject(base, 7, tokenizer=tokenizer, seed=1, **start).prompt()() for tokenizer in (ours, theirs)]
        assert torch.equal(*rows)


def test_a_seed_gives_the_same_prompt_and_leaves_the_callers_random_numbers_alone() -> None:
    for method in METHODS:
        base = model("ours", "llama", torch.float32)
        before = torch.get_rng_state()
        first, again, other = (inject(copy.deepcopy(base), 6, method=method, seed=seed).prompt()() for seed in (4, 4, 5))
        assert torch.equal(before, torch.get_rng_state()), method
        assert torch.equal(first, again) and not torch.equal(first, other), method


def test_random_is_the_papers_uniform_and_its_scale_is_told() -> None:
    """T19: PEFT's N(0, 1) has 7.6 times the norm of SmolLM2's words; the record says how far this one is off."""
    prompted = inject(wide_llama(), 200, init="random", seed=0)
    rows, record = prompted.prompt()(), prompted.prompt().initialization
    assert rows.min() >= -0.5 and rows.max() <= 0.5 and float(rows.std()) == pytest.approx(1 / 12**0.5, rel=0.05)
    assert record.rms == pytest.approx(float(rows.detach().square().mean().sqrt())) and record.rms > 10 * record.embedding_rms
    assert record.embedding_rms == pytest.approx(float(prompted.get_input_embeddings().weight.square().mean().sqrt()))
    assert "rms 0.28" in str(record)


@pytest.mark.parametrize("pieces", [word_pieces, byte_pieces])
def test_a_text_begins_the_prompt_without_special_tokens_and_the_rest_is_drawn(pieces: Any) -> None:
    """T20: PEFT takes [CLS] and [SEP] for words of the text, and repeats it to fill up. Google's code draws the rest."""
    base, tokenizer = wide_llama(), pieces()
    text = "the cat sat on a mat" if pieces is word_pieces else "the quick dog"
    own = tokenizer.encode(text, add_special_tokens=False)
    prompt = inject(base, len(own) + 3, init="text", text=text, tokenizer=tokenizer, seed=0).prompt()
    ids = ids_of(base, prompt())
    assert ids[: len(own)] == own and not without_meaning(tokenizer, 400) & set(ids)
    assert (prompt.initialization.given, prompt.initialization.filled, prompt.initialization.cut) == (len(own), 3, 0)
    assert str(prompt.initialization).startswith(f"{len(own)} from text, 3 drawn from the vocabulary; rms")


def test_a_longer_text_is_cut_and_that_is_told() -> None:
    """T20: PEFT cuts in silence."""
    base, tokenizer = wide_llama(), word_pieces()
    own = tokenizer.encode("the cat sat on a mat", add_special_tokens=False)
    with pytest.warns(UserWarning, match=r"gives 6 positions, num_virtual_tokens is 4: the last 2 are left out") as caught:
        prompt = inject(base, 4, init="text", text="the cat sat on a mat", tokenizer=tokenizer).prompt()
    assert ids_of(base, prompt()) == own[:4] and prompt.initialization.cut == 2
    assert caught[0].filename == __file__


def test_each_label_begins_a_position_as_the_mean_of_its_tokens() -> None:
    """Lester et al., section 3.2: labels of several tokens are averaged; the rest of the prompt is drawn."""
    base, tokenizer = wide_llama(), word_pieces()
    rows = inject(base, 5, init="labels", labels=["good", "cats", "bad"], tokenizer=tokenizer, seed=0).prompt()()
    good, cat, plural, bad = tokenizer.encode("good cats bad", add_special_tokens=False)
    expected = torch.cat((words(base, [good]), words(base, [cat, plural]).mean(0, keepdim=True), words(base, [bad])))
    assert_close(rows[:3], expected)
    assert len(set(ids_of(base, rows[3:]))) == 2


def test_words_go_through_a_call_of_the_embedding() -> None:
    """T21: Gemma's embedding multiplies what its table holds by sqrt(H); PEFT of old, and others, read the table."""
    torch.manual_seed(0)
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    base = transformers.GemmaForCausalLM(transformers.GemmaConfig(**config, num_key_value_heads=1)).eval()
    prompted, ids = inject(base, 4, init="text", text="the cat sat on", tokenizer=word_pieces()), [5, 6, 8, 10]
    assert_close(prompted.prompt()(), words(base, ids))
    assert not torch.allclose(prompted.prompt()(), base.get_input_embeddings().weight[ids])
    with torch.no_grad():  # so a prompt of words is those words
        rest = torch.tensor([[11, 12, 13]])
        expected = base(input_ids=torch.cat((torch.tensor([ids]), rest), 1)).logits[:, 4:]
        assert_close(prompted(input_ids=rest).logits, expected, rtol=1e-4, atol=1e-5)
    assert embedding_rms(base) == pytest.approx(4.0 * float(base.get_input_embeddings().weight.square().mean().sqrt()), rel=1e-5)


def test_the_width_is_the_embeddings_which_may_not_be_the_hidden_size() -> None:
    """T22: OPT-350m's words are narrower than its layers; PEFT crashes in RANDOM, and finds the embedding by its vocabulary's size."""
    torch.manual_seed(0)
    config = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
    base = transformers.OPTForCausalLM(transformers.OPTConfig(**config, word_embed_proj_dim=16)).eval().double()
    prompted = randomised(inject(base, 4, init="random"))
    ids = torch.tensor([[5, 9, 3, 40]])
    with torch.no_grad():
        joined = torch.cat((prompted.prompt()()[None], base.get_input_embeddings()(ids)), 1)
        assert_close(prompted(input_ids=ids).logits, base(inputs_embeds=joined).logits[:, 4:], **EXACT)


# Rows that are there already ----------------------------------------------------------------------------------------------------


def test_a_file_of_googles_of_pefts_or_of_ours_begins_a_prompt(tmp_path: Any) -> None:
    """Google's prompts are .npy of [P, H] (their README); PEFT's and ours have `prompt_embeddings`."""
    base, rows = model("ours", "llama", torch.float32), torch.randn(4, 32)
    np.save(tmp_path / "sst2.npy", rows.numpy())
    save_file({"prompt_embeddings": rows}, tmp_path / "adapter_model.safetensors")
    for init in (tmp_path / "sst2.npy", tmp_path, str(tmp_path / "adapter_model.safetensors"), rows):
        for method in ("prompt", "p-tuning", "residual"):
            assert_close(inject(copy.deepcopy(base), 4, init=init, method=method).prompt()(), rows, rtol=1e-4, atol=1e-5)
    with pytest.raises(LoraLabError, match=r"init gives torch.float32 \[4, 32\]: expected .* \[20, 32\].*\(num_virtual_tokens=4\?\)"):
        inject(base, init=rows)


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
@pytest.mark.parametrize("told", [True, False])
def test_of_pefts_rows_for_an_encoder_decoder_the_first_half_begins_a_prompt(method: str, told: bool, tmp_path: Any) -> None:
    """T13: PEFT has 2P rows for a T5, and never reads the second P. told: whether num_transformer_submodules is in the file."""
    peft_folder(tmp_path, "t5", method)
    if not told:
        edited(tmp_path, drop=["num_transformer_submodules"])
    rows = written(tmp_path)[1]["prompt_embeddings"]
    assert len(rows) == 2 * TOKENS and not torch.equal(rows[:TOKENS], rows[TOKENS:])
    for init in (tmp_path, tmp_path / "adapter_model.safetensors"):
        prompted = inject(peft_base("t5"), TOKENS, init=init)
        assert torch.equal(prompted.prompt()(), rows[:TOKENS])
    with pytest.raises(LoraLabError, match=rf"init gives torch.float32 \[{TOKENS}, 30\]: expected .* \[{2 * TOKENS}, 30\].*tokens={TOKENS}\?\)"):
        inject(peft_base("t5"), 2 * TOKENS, init=tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(LoraLabError, match=f"PEFT keeps {TOKENS} rows more, for its decoder, which nothing ever reads; give the folder with"):
        inject(peft_base("t5"), TOKENS, init=tmp_path)


def test_pefts_prefix_of_an_encoder_decoder_begins_nothing(tmp_path: Any) -> None:
    """T14: its layers share slots, and half of them were never trained."""
    peft_folder(tmp_path, "t5", "prefix")
    for method in ("prefix", "prompt"):
        with pytest.raises(LoraLabError, match="slots 4j mod 2L and half of what was saved never had a gradient"):
            inject(peft_base("t5"), TOKENS, method=method, init=tmp_path)


def test_another_task_begins_a_prompt() -> None:
    """Vu et al. 2022 (SPoT): a task begins where another one ended; each goes its own way from there."""
    prompted = randomised(inject(model("ours", "llama", torch.float32), 4, method="residual", task="old"))
    inject(prompted, 4, init="old", task="new")
    assert_close(prompted.prompt("new")(), prompted.prompt("old")())
    with torch.no_grad():
        prompted.prompt("new").weight.add_(1.0)
    assert not torch.allclose(prompted.prompt("new")(), prompted.prompt("old")())


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_a_prefix_begins_as_the_keys_and_values_of_words(side: str) -> None:
    """Li & Liang, section 7.4: the same function as the words in front, of a GQA model, too (T25); of labels, one after another."""
    base, tokenizer = model(side, "llama"), word_pieces()
    for given, own in (({"init": "text", "text": "the cat sat"}, "the cat sat"), ({"init": "labels", "labels": ["cat", "bad"]}, "cat bad")):
        front = tokenizer.encode(own, add_special_tokens=False)
        prompted = inject(copy.deepcopy(base), len(front), method="prefix", tokenizer=tokenizer, **given)
        ids = torch.tensor([[11, 12, 13]])
        with torch.no_grad():
            expected = base(input_ids=torch.cat((torch.tensor([front]), ids), 1)).logits[:, len(front) :]
            assert_close(prompted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_prefixes_begin_small_at_random_and_as_rows_of_a_file(tmp_path: Any) -> None:
    base = model("ours", "llama", torch.float32)
    assert 0 < inject(copy.deepcopy(base), 4, method="prefix", init="random").prompt()().abs().max() < 0.2  # T25: nor zero, which is not nothing
    rows = torch.randn(4, 2 * 2 * 2 * 8)
    save_file({"prompt_embeddings": rows}, tmp_path / "adapter_model.safetensors")
    prompted = inject(base, 4, method="prefix", init=tmp_path)
    assert prompted.prompt()().shape == (2, 2, 4, 2, 8) and torch.equal(prompted.prompt()()[1, 0, 3].flatten(), rows[3, 32:48])


def test_a_16_bit_base_gets_a_float32_prompt_of_its_own_words() -> None:
    """T23."""
    base = model("ours", "llama", torch.bfloat16)
    for method in METHODS:
        prompted = inject(copy.deepcopy(base), 3, method=method, init="vocab")
        assert {parameter.dtype for parameter in prompted.prompt().parameters()} == {torch.float32}, method
    nearest = nearest_tokens(inject(base, 3, init="text", text="the cat sat", tokenizer=word_pieces()), word_pieces(), k=1)
    assert [each[0].token.strip() for each in nearest] == ["the", "cat", "sat"]


# Bad input ----------------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"num_virtual_tokens": 0}, "num_virtual_tokens=0: expected a whole number of at least 1"),
    "more tokens than are counted": ({"num_virtual_tokens": 10**30}, "num_virtual_tokens=10+: expected a whole number of at least 1, at most 2,1"),
    "more words than are counted": ({"top_n": 10**30}, "top_n=10+: expected a whole number of at least 1, at most 2,147,483,647"),
    "a seed that torch does not take": ({"seed": 2**64}, "seed=18446744073709551616: expected a whole number, or None .torch takes 64"),
    "more than the context": ({"num_virtual_tokens": 64}, "num_virtual_tokens=64: the model's context is 64, which leaves no room"),
    "a text of nothing": ({"init": "text", "text": "", "tokenizer": word_pieces()}, "text '' has no tokens"),
    "a text without tokenizer": ({"init": "text", "text": "the"}, "a tokenizer is needed"),
    "init without its text": ({"init": "text"}, "init='text' with text=None"),
    "a text without its init": ({"text": "the"}, "init='vocab' with text='the': text belongs to init='text'"),
    "a text beside rows": ({"init": torch.zeros(20, 32), "text": "the"}, r"init=a tensor \[20, 32\] with text='the': text belongs to init='text'"),
    "a text beside random keys": ({"init": "random", "method": "prefix", "text": "the"}, "init='random' with text='the'"),
    "a text in the place of init": ({"init": "Is this review positive? " * 20}, r'neither one of random.* nor a file \(init="text", text='),
    "an array": ({"init": np.zeros((20, 32), dtype=np.float32)}, "init=array.*: expected 'random', 'vocab'"),
    "labels that are a number": ({"init": "labels", "labels": 5, "tokenizer": word_pieces()}, "labels=5: expected a list"),
    "labels without an order": ({"init": "labels", "labels": {"good", "bad"}, "tokenizer": word_pieces()}, "labels={.*: expected a list"),
    "labels that are one word": ({"init": "labels", "labels": "good", "tokenizer": word_pieces()}, "labels='good': expected a list"),
    "an empty label": ({"init": "labels", "labels": ["good", ""], "tokenizer": word_pieces()}, "a label '' has no tokens"),
    "another model's tokenizer": ({"init": "text", "text": "the quick", "tokenizer": byte_pieces()}, "vocabulary ends at 63"),
    "too few words": ({"top_n": 10}, "20 words are to be drawn from the 10 most frequent"),
    "an unknown init": ({"init": "vocabulary"}, "init='vocabulary': neither one of random, vocab, labels, text nor a file.*did you mean 'vocab'"),
    "a file without a prompt": ({"init": __file__}, "holds no prompt"),
    "NaN": ({"init": torch.full((20, 32), torch.nan)}, "expected finite numbers"),
    "a method there is none of": ({"method": "prompts"}, "method='prompts'.*did you mean 'prompt'"),
    "a name with a dot": ({"task": "a.b"}, "task='a.b': expected 1 to 64"),
    "a network it has none of": ({"encoder_hidden_size": 8}, "encoder_hidden_size=8 with method='prompt'"),
    "a projection of rows": ({"prefix_projection": True}, "prefix_projection=True with method='prompt'"),
    "a prefix among the text": ({"method": "prefix", "placement": "after-bos"}, "placement='after-bos' with method='prefix'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_told_and_leave_the_model_as_it_was(case: str) -> None:
    changes, message = BAD[case]
    base = model("ours", "llama", torch.float32).train()
    with pytest.raises(LoraLabError, match=message):
        inject(base, **changes)
    assert base.training and all(parameter.requires_grad for parameter in base.parameters())


def test_models_that_take_no_prompt_are_told() -> None:
    with pytest.raises(LoraLabError, match="a Linear has no get_input_embeddings"):
        inject(nn.Linear(2, 2))
    prompted = inject(both("llama", torch.float32)["ours"], 3)
    with pytest.raises(LoraLabError, match="task='default' is already in this model"):
        inject(prompted, 3)
