"""Sentence embeddings: pooling against the textbook, sentence-transformers' folders, and the real all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from bert_tools import SMALL, WORDS, pair, theirs, word_pieces
from real_models import had_or_skipped
from torch.testing import assert_close

from lora_lab import LoraLabError, models
from lora_lab.models import BertModel, Pooling, Tokenizer, embed
from lora_lab.models.embedding import pooling_of

MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
           {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
           {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]  # fmt: skip
TEXTS = ["the cat sat on a mat", "a dog", "so", "", "the dog ran", "the cat sat on a mat and the dog ran on and on and on"]


def sentence_folder(folder: Path, pooling: dict[str, Any], modules: Any = MODULES, **settings: Any) -> Path:
    """A BertModel's folder as sentence-transformers lays it out."""
    torch.manual_seed(0)
    theirs("BertModel").save_pretrained(folder)
    word_pieces().save(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


# Pooling ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len"])
def test_pooling_is_of_the_text_alone(mode, normalize):
    """Each row's text cut out by hand; padding holds numbers that would change every kind of pooling."""
    hidden, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    hidden[1, 3:] = hidden[2, 1:] = 100.0
    expected = []
    for row, length in zip(hidden, (5, 3, 1), strict=True):
        text = row[:length]
        pooled = {"mean": text.mean(0), "cls": text[0], "max": text.amax(0), "mean_sqrt_len": text.sum(0) / length**0.5}[mode]
        expected.append(pooled / pooled.norm() if normalize else pooled)
    assert_close(Pooling(mode, normalize)(hidden, mask), torch.stack(expected))


def test_pooling_16_bit_states_is_done_in_float32():
    hidden = torch.randn(1, 300, 4).to(torch.bfloat16)
    pooled = Pooling(normalize=False)(hidden, torch.ones(1, 300))
    assert pooled.dtype == torch.float32
    assert_close(pooled, hidden.float().mean(1))


def test_texts_of_all_lengths_come_back_in_their_order_as_if_each_were_alone():
    model, _ = pair("BertModel")
    together = embed(model, word_pieces(), TEXTS, batch_size=4)
    assert together.shape == (len(TEXTS), 32) and not together.requires_grad
    for text, vector in zip(TEXTS, together, strict=True):
        ids = torch.tensor([word_pieces().encode(text)])
        with torch.no_grad():
            assert_close(vector, F.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)[0])


def test_texts_of_like_length_are_computed_together():
    model, _ = pair("BertModel")
    shapes = []
    model.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    embed(model, word_pieces(), ["a"] * 4 + ["the cat sat on a mat"] * 4, batch_size=4)
    assert shapes == [(4, 8), (4, 3)]


def test_embedding_leaves_the_model_as_it_was():
    model, _ = pair("BertModel", hidden_dropout_prob=0.5)
    model.train()
    model.encoder.layer[0].eval()
    first = embed(model, word_pieces(), TEXTS)
    assert torch.equal(first, embed(model, word_pieces(), TEXTS))  # no dropout
    assert model.training and not model.encoder.layer[0].training


def test_transformers_model_and_tokenizer_are_as_good(tmp_path):
    mine, reference = pair("BertModel")
    word_pieces().save(tmp_path)
    backend = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_close(embed(reference, backend, TEXTS), embed(mine, word_pieces(), TEXTS), rtol=1e-5, atol=1e-5)


def test_no_texts_are_no_vectors():
    assert embed(pair("BertModel")[0], word_pieces(), []).shape == (0, 32)


# Folders ------------------------------------------------------------------------------------------------------------------------


def test_a_folder_says_how_its_vectors_are_made(tmp_path):
    folder = sentence_folder(tmp_path, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, MODULES[:2], max_seq_length=5)
    model, tokenizer = models.load(folder)
    assert pooling_of(model) == Pooling("cls", normalize=False, max_length=5)
    cut = torch.tensor([[*tokenizer.encode(TEXTS[0])[:4], WORDS.index("[SEP]")]])
    with torch.no_grad():
        expected = model(input_ids=cut).last_hidden_state[:, 0]
    assert_close(embed(model, tokenizer, TEXTS[:1]), expected)
    assert not torch.allclose(embed(model, tokenizer, TEXTS[:1], pooling=Pooling()), expected)


@pytest.mark.parametrize("pooling", [{"pooling_mode_mean_sqrt_len_tokens": True}, {"pooling_mode": "mean_sqrt_len"}])
def test_both_generations_of_pooling_configs_are_read(pooling, tmp_path):
    model, _ = models.load(sentence_folder(tmp_path, pooling))
    assert pooling_of(model) == Pooling("mean_sqrt_len")


def test_without_a_layout_it_is_the_mean_normalised(tmp_path):
    theirs("BertModel").save_pretrained(tmp_path)
    assert pooling_of(models.load(tmp_path)[0]) == Pooling("mean", normalize=True) == pooling_of(pair("BertModel")[0])


def test_a_saved_encoder_takes_its_layout_along_and_a_classifier_does_not(tmp_path):
    folder = sentence_folder(tmp_path / "a", {"pooling_mode_cls_token": True}, MODULES[:2], max_seq_length=7)
    model, tokenizer = models.load(folder)
    models.save(model, tmp_path / "b", tokenizer)
    again, words = models.load(tmp_path / "b")
    assert pooling_of(again) == pooling_of(model) == Pooling("cls", normalize=False, max_length=7)
    assert torch.equal(embed(again, words, TEXTS), embed(model, tokenizer, TEXTS))
    models.save(model, folder)  # onto itself
    assert pooling_of(models.load(folder)[0]) == pooling_of(model)
    with pytest.warns(UserWarning, match="begin at random"):
        classifier, _ = models.load(folder, task="sequence-classification")
    models.save(classifier, tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [([*MODULES, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}], {"pooling_mode_mean_tokens": True}, "has a Dense after"),
     (MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pools by mean and cls"),
     (MODULES, {"pooling_mode_lasttoken": True}, "pools by pooling_mode_lasttoken"), (MODULES, {}, "pools by nothing"),
     ({"a": 1}, {}, "holds no list of modules"), (MODULES[1:2], None, "config.json is missing")],
)  # fmt: skip
def test_a_layout_that_is_not_modelled_is_refused_rather_than_guessed(modules, pooling, message, tmp_path):
    folder = sentence_folder(tmp_path, pooling or {}, modules)
    if pooling is None:
        shutil.rmtree(folder / "1_Pooling")
    model, tokenizer = models.load(folder)
    with pytest.raises(LoraLabError, match=message):
        embed(model, tokenizer, TEXTS)


# Bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [({"texts": "one text"}, "texts is 'one text': expected a list"), ({"texts": [1]}, r"texts is \[1\]"), ({"tokenizer": None}, "no tokenizer"),
     ({"batch_size": 0}, "batch_size=0")],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_errors_that_name_them(change, message):
    arguments = {"model": pair("BertModel")[0], "tokenizer": word_pieces(), "texts": TEXTS, **change}
    with pytest.raises(LoraLabError, match=message):
        embed(**arguments)


def test_a_model_without_hidden_states_is_an_error_with_the_way_out():
    with pytest.raises(LoraLabError, match="a BertForSequenceClassification returned no .last_hidden_state.*feature-extraction"):
        embed(pair("BertForSequenceClassification")[0], word_pieces(), TEXTS)
    with pytest.raises(LoraLabError, match="pooling 'mena'.*did you mean 'mean'"):
        Pooling("mena")


def test_a_text_beyond_the_context_is_cut_to_it():
    model, _ = pair("BertModel")
    assert embed(model, word_pieces(), ["the " * 100]).isfinite().all()
    cut = "the " * (SMALL["max_position_embeddings"] - 2)
    assert_close(embed(model, word_pieces(), ["the " * 100]), embed(model, word_pieces(), [cut]))


# The tokenizer ------------------------------------------------------------------------------------------------------------------


def test_word_pieces_are_transformers_alone_in_pairs_and_cut(tmp_path):
    word_pieces().save(tmp_path)
    mine, reference = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "The CAT, sat! naïve", "dogs badly", "[MASK] film"]:
        assert mine.encode(text) == reference.encode(text) == mine(text)["input_ids"]
        assert mine.encode(text)[0] == WORDS.index("[CLS]") and mine.encode(text)[-1] == WORDS.index("[SEP]")
        for cut in ({}, {"truncation": True, "max_length": 9}):
            expected = reference(text, "a good dog ran very badly", **cut)
            assert mine(text, "a good dog ran very badly", **cut) == {name: expected[name] for name in mine(text)}
    assert set(mine("a", "dog")["token_type_ids"]) == {0, 1}
    assert len(mine.encode("the " * 100)) == 102  # the last call's cut is not the next one's


# The real model -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Any:
    with had_or_skipped():
        return models.load("all-minilm-l6-v2")


SENTENCES = ["A man is eating a piece of bread.", "Someone is having some food.", "The stock market fell sharply on Tuesday.",
             "Shares lost a lot of their value this week.", "Two dogs are running across the beach.", "", "naïve CAFÉ 日本語 🙂",
             " ".join(["a very long text that goes on"] * 100)]  # fmt: skip


@pytest.mark.real
def test_minilms_embeddings_are_those_of_transformers(minilm):
    """sentence-transformers' recipe on the model card: mean over the attention mask, then length 1; at most 256 tokens."""
    model, tokenizer = minilm
    assert type(model) is BertModel and pooling_of(model) == Pooling("mean", normalize=True, max_length=256)
    reference = transformers.AutoModel.from_pretrained(model.source_folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(model.source_folder)
    encoded = words(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = reference(**encoded).last_hidden_state
    mask = encoded["attention_mask"][:, :, None]
    expected = F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)
    assert_close(embed(model, tokenizer, SENTENCES, batch_size=3), expected, rtol=0, atol=1e-5)


@pytest.mark.real
def test_similar_sentences_are_closer_than_others(minilm):
    vectors = embed(*minilm, SENTENCES[:5])
    similarity = vectors @ vectors.T
    assert_close(similarity.diagonal(), torch.ones(5))
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]
    assert similarity[2, 3] > 0.5 > 0.2 > similarity[3, 4]


@pytest.mark.real
def test_minilms_tokenizer_is_transformers(minilm):
    words = transformers.AutoTokenizer.from_pretrained(minilm[0].source_folder)
    for text in SENTENCES:
        assert minilm[1].encode(text) == words.encode(text, truncation=False)
        pair_ = words(text, SENTENCES[0])
        assert minilm[1](text, SENTENCES[0]) == {name: pair_[name] for name in ("input_ids", "token_type_ids", "attention_mask")}


@pytest.mark.real
def test_minilm_is_the_hubs_file_with_its_licence(minilm):
    """The wheel's model.safetensors has the hash of sentence-transformers/all-MiniLM-L6-v2's."""
    assert minilm[0].base_sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert json.loads((minilm[0].source_folder / "lora_lab.json").read_text())["licence"] == "Apache-2.0"
    assert sum(p.numel() for p in minilm[0].parameters()) == 22_713_216


def test_blanks_around_a_text_are_no_part_of_it():
    """As sentence-transformers reads them; a byte-level tokenizer would make tokens of them."""
    model, pieces = pair("BertModel")[0], word_pieces()
    asked = []

    class Asked:
        pad_token_id = 0

        def __call__(self, text, **cut):
            asked.append(text)
            return pieces(text, **cut)

    embed(model, Asked(), ["  a cat\n", "the dog"])
    assert asked == ["a cat", "the dog"]
