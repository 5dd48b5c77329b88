"""The tokenizer inside a GGUF file: the same tokens as the hub's tokenizer.json and SentencePiece itself."""

from __future__ import annotations

from itertools import pairwise

import gguf_tools
import pytest
import tokenizers
import transformers
from gguf_tools import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from llama_tools import CHATML, TRICKY, theirs, tokenizer
from tokenizers import Regex, pre_tokenizers

from lora_lab import LoraLabError, models
from lora_lab.models.gguf_files import GGUFFile
from lora_lab.models.gguf_tokenizer import CUTS, LLAMA3_CUT, build_tokenizer

# Byte-level BPE -----------------------------------------------------------------------------------------------------------

ORACLES = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_CUT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}  # fmt: skip
TEXTS = [*TRICKY, "in 2024 and 1999 and 2000", "WE'LL we'll", "(hello) (world)", "a\n\nb\n\n\nc"]


def byte_level():
    """Trained with GPT-2's cuts, so that merges across digits exist which another cut must prevent."""
    return tokenizer(size=700, texts=[*TEXTS, "2024 2024 2024 1999 2000"])


def metadata(path):
    return GGUFFile(path).metadata


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """pre -> the path of a file with the same byte-level tokenizer under that name."""
    folder, words = tmp_path_factory.mktemp("gguf"), byte_level()
    model = theirs(vocab_size=len(words))
    for pre in ORACLES:
        gguf_tools.write(folder / f"{pre}.gguf", model, tokenizer=lambda writer, pre=pre: gguf_tools.add_byte_level_tokenizer(writer, words, pre))
    return lambda pre: folder / f"{pre}.gguf"


@pytest.mark.parametrize("pre", ORACLES)
def test_byte_level_tokenizers_cut_as_the_hubs_tokenizer_json_does(written, pre):
    """The pre_tokenizer of gpt2, HuggingFaceTB/SmolLM2-135M and meta-llama/Meta-Llama-3-8B on the hub."""
    oracle = byte_level().backend
    oracle.pre_tokenizer = ORACLES[pre]
    rebuilt = models.load(written(pre))[1]
    for text in TEXTS:
        expected = oracle.encode(text, add_special_tokens=False)
        assert rebuilt.encode(text, add_special_tokens=False) == expected.ids, text
        assert rebuilt.decode(expected.ids, skip_special_tokens=False) == text
        assert rebuilt.decode(expected.ids) == oracle.decode(expected.ids), text


def test_the_cuts_differ_so_the_test_above_means_something(written):
    rebuilt = [build_tokenizer(metadata(written(pre))) for pre in ORACLES]
    assert len({str([words.encode(text, add_special_tokens=False) for text in TEXTS]) for words in rebuilt}) == len(ORACLES)
    assert {str(cut) for cut in CUTS.values()} == {str(CUTS[pre]) for pre in ORACLES}  # and there is no other


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_transformers_rebuilds_the_same(written, pre):
    """Not "smollm": transformers 5 leaves out its cut at digits."""
    path = written(pre)
    expected = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rebuilt = models.load(path)[1]
    for text in TEXTS:
        assert rebuilt.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False), text
    assert rebuilt.chat_template == expected.chat_template == CHATML
    assert (rebuilt.eos_token_id, rebuilt.bos_token_id, rebuilt.pad_token_id) == (expected.eos_token_id, expected.bos_token_id, expected.pad_token_id)


@pytest.mark.parametrize(("pre", "given", "starts"), [("gpt-2", None, False), ("gpt-2", True, True), ("smollm", None, False),
                                                      ("llama-bpe", None, True), ("llama-bpe", False, False)])  # fmt: skip
def test_the_start_token_is_added_where_llama_cpp_adds_it(written, pre, given, starts):
    """llama.cpp's llama-vocab.cpp: by default for "llama" and the Llama 3 cuts; tokenizer.ggml.add_bos_token overrides."""
    fields = {**metadata(written(pre)), **({} if given is None else {"tokenizer.ggml.add_bos_token": given})}
    rebuilt = build_tokenizer(fields)
    assert rebuilt.encode("fox") == [rebuilt.bos_token_id] * starts + rebuilt.encode("fox", add_special_tokens=False)


def test_llama_3_takes_a_word_of_the_vocabulary_whole_even_without_its_merges(written):
    """`ignore_merges` of Llama 3's tokenizer.json."""
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        fields = metadata(written(pre))
        fields["tokenizer.ggml.tokens"].append("zebra")
        assert (len(build_tokenizer(fields).encode("zebra", add_special_tokens=False)) == 1) == whole


def test_control_tokens_vanish_from_text_and_user_defined_ones_stay(written):
    fields = metadata(written("gpt-2"))
    fields["tokenizer.ggml.tokens"] += ["<tool>", "<|end|>"]
    fields["tokenizer.ggml.token_type"] += [USER_DEFINED, CONTROL]
    rebuilt = build_tokenizer(fields)
    found = rebuilt.encode("a<tool>b<|end|>", add_special_tokens=False)
    size = len(fields["tokenizer.ggml.tokens"])
    assert size - 2 in found
    assert size - 1 in found
    assert rebuilt.vocab_size == size
    assert (rebuilt.decode(found), rebuilt.decode(found, skip_special_tokens=False)) == ("a<tool>b", "a<tool>b<|end|>")


def test_the_end_of_a_turn_ends_a_generation_too(written):
    fields = {**metadata(written("llama-bpe")), "tokenizer.ggml.eot_token_id": 7}
    rebuilt = build_tokenizer(fields)
    assert rebuilt.end_ids == {rebuilt.eos_token_id, 7}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokenizer.ggml.pre": "qwen2"}, "pre='qwen2': expected one of gpt-2.*tokenizer.json"),
     ({"tokenizer.ggml.model": "bert"}, "model='bert'.*'gpt2' and 'llama'"), ({"tokenizer.ggml.model": None}, "model=None"),
     ({"tokenizer.ggml.merges": None}, "lacks the field 'tokenizer.ggml.merges'"),
     ({"tokenizer.ggml.model": "llama"}, "lacks the field 'tokenizer.ggml.scores'")],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_rebuilt_is_an_error_that_names_the_field(written, change, message):
    fields = {name: value for name, value in {**metadata(written("gpt-2")), **change}.items() if value is not None}
    with pytest.raises(LoraLabError, match=message):
        build_tokenizer(fields)


def test_a_tokenizer_json_beside_the_file_stands_in_for_one_that_cannot_be_rebuilt(tmp_path):
    own = byte_level()
    model = theirs(vocab_size=own.vocab_size)
    path = gguf_tools.write(tmp_path / "m.gguf", model, tokenizer=lambda writer: gguf_tools.add_byte_level_tokenizer(writer, own, pre="tekken"))
    with pytest.raises(LoraLabError, match="pre='tekken': .*put a tokenizer.json beside the file"):
        models.load(path)
    own.save(tmp_path)
    found = models.load(path)[1]
    assert [found.encode(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]


# SentencePiece --------------------------------------------------------------------------------------------------------------


def pieces():
    """A SentencePiece vocabulary: special tokens, bytes, characters, and pieces made by training, best first."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    texts = ["▁" + text.replace(" ", "▁") for text in ("the quick brown fox jumps over the lazy dog", "café naïve 2024", "hello world the dog")] * 3
    backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=130, show_progress=False))
    learned = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    scores = [0.0] * 259 + [-float(len(token) > 1) * index for index, token in enumerate(learned)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(learned)]
    return tokens, scores, types


def sentencepiece_fields(**changes):
    tokens, scores, types = pieces()
    prefix = "tokenizer.ggml."
    fields = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {prefix + name: value for name, value in {**fields, **changes}.items()}


def by_the_book(text, space_prefix=True):
    """SentencePiece's BPE (Sennrich et al. 2016 with scores): merge the best-scored neighbours, leftmost first; bytes for the rest."""
    tokens, scores, _ = pieces()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    symbols = list(("▁" if space_prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[vocabulary[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in vocabulary]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        found += [vocabulary[symbol]] if symbol in vocabulary else [vocabulary[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


SPOKEN = [*TRICKY, "the quick brown fox", "hello  world", " the dog ", "lazy"]


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_the_algorithm(space_prefix):
    rebuilt = build_tokenizer(sentencepiece_fields(add_space_prefix=space_prefix))
    for text in SPOKEN:
        expected = by_the_book(text, space_prefix)
        assert rebuilt.encode(text, add_special_tokens=False) == expected, text
        assert rebuilt.decode(expected) == text
    assert len(by_the_book("the quick brown fox")) < 12  # merges happen


def test_sentencepiece_starts_with_bos_and_knows_its_special_tokens():
    rebuilt = build_tokenizer(sentencepiece_fields())
    assert rebuilt.encode("lazy") == [1, *by_the_book("lazy")]
    assert rebuilt.encode("lazy</s>", add_special_tokens=False)[-1] == 2
    assert rebuilt.encode("<unk>", add_special_tokens=False) == [0]
    assert rebuilt.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert build_tokenizer(sentencepiece_fields(add_bos_token=False)).encode("lazy") == by_the_book("lazy")


def test_transformers_rebuilds_the_same_sentencepiece(tmp_path):
    def add(writer):
        tokens, scores, types = pieces()
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        gguf_tools.add_special(writer, {"bos_token": 1, "eos_token": 2, "unk_token": 0})

    path = gguf_tools.write(tmp_path / "model.gguf", theirs(vocab_size=len(pieces()[0])), tokenizer=add)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    rebuilt = models.load(path)[1]
    for text in ("the quick brown fox", "hello world", "naïve café 2024", "日本語", "lazy"):
        assert rebuilt.encode(text) == expected.encode(text), text
