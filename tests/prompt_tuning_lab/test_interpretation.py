"""Reading a prompt: nearest words, drift, similarity between tasks, and the picture."""

from __future__ import annotations

import re
import xml.dom.minidom

import pytest
import torch
import torch.nn.functional as F
import transformers
from decoder_tools import pair as decoder_pair
from llama_tools import pair, tokenizer
from torch.testing import assert_close

from lora_lab import LoraLabError
from prompt_tuning_lab import embeddings
from prompt_tuning_lab.drawing import HEIGHT, WIDTH, label_text, on_paper, picture, principal_components, text_width
from prompt_tuning_lab.embeddings import embedding_rms
from prompt_tuning_lab.interpretation import Neighbour, drift, nearest_tokens, similarity
from prompt_tuning_lab.prefix import Prefix
from prompt_tuning_lab.prefix_cache import prefix_shape
from prompt_tuning_lab.prompted_model import PromptedModel
from prompt_tuning_lab.soft_prompt import SoftPrompt

WORDS = tokenizer()


@pytest.fixture(params=["ours", "transformers"])
def prompted(request):
    torch.manual_seed(0)
    return PromptedModel(pair(vocab_size=len(WORDS))[request.param == "transformers"])


def words_of(prompted, ids):
    return prompted.base.get_input_embeddings()(torch.tensor(ids)).detach()


def moved(prompted, ids, by=0.1, task="default"):
    """A task that began as these words and has gone a little way."""
    prompt = SoftPrompt(words_of(prompted, ids))
    with torch.no_grad():
        prompt.weight.add_(by * torch.randn_like(prompt.weight))
    prompted.add(task, prompt)
    return prompt


# Nearest words ------------------------------------------------------------------------------------------------------------------


def test_a_words_own_row_has_that_word_at_distance_zero_whatever_its_length(prompted):
    """Lester et al. 2021, section 7: cosine. Prompts travel far (released ones have row norms of a thousand), so the length says nothing."""
    prompted.add("default", SoftPrompt(1000 * words_of(prompted, [65, 66, 290])))
    found = nearest_tokens(prompted, WORDS, k=4)
    assert [position[0].id for position in found] == [65, 66, 290]
    assert [position[0].token for position in found] == [WORDS.decode([i]) for i in (65, 66, 290)]
    for position in found:
        assert len(position) == 4
        assert position[0].distance == pytest.approx(0, abs=1e-6)
        assert [each.distance for each in position] == sorted(each.distance for each in position)


def test_nearest_words_are_those_of_the_full_matrix_of_cosines(prompted):
    prompt = moved(prompted, [5, 70, 200, 250, 299], by=0.5)
    cosines = F.normalize(prompt.weight.detach(), dim=1) @ F.normalize(words_of(prompted, range(len(WORDS))), dim=1).T
    best, ids = cosines.topk(7)
    found = nearest_tokens(prompted, WORDS, k=7)
    assert [[each.id for each in position] for position in found] == ids.tolist()
    assert_close(torch.tensor([[each.distance for each in position] for position in found]), 1 - best)


def test_blocks_of_the_embedding_give_what_the_whole_gives(prompted, monkeypatch):
    moved(prompted, [5, 70, 200], by=0.5)
    whole = nearest_tokens(prompted, WORDS, k=9)
    monkeypatch.setattr(embeddings, "BLOCK_NUMBERS", 7 * 32)  # seven words at a time, fewer than k
    in_blocks = nearest_tokens(prompted, WORDS, k=9)
    assert [[near.id for near in row] for row in in_blocks] == [[near.id for near in row] for row in whole]
    distances = [[[near.distance for near in row] for row in found] for found in (in_blocks, whole)]
    assert_close(*map(torch.tensor, distances), rtol=1e-5, atol=1e-6)


def test_a_large_vocabulary_is_never_whole_in_float32(monkeypatch):
    """A copy of a 150,000 x 576 embedding would be 330 MiB; no more than a block of it is ever looked at."""
    base = decoder_pair("gpt2", vocab_size=5000)[0].to(torch.bfloat16)
    prompted = PromptedModel(base)
    prompted.add("default", SoftPrompt(torch.randn(3, 32)))
    monkeypatch.setattr(embeddings, "BLOCK_NUMBERS", 100 * 32)
    sizes, embed = [], embeddings.embedding_rows
    monkeypatch.setattr(embeddings, "embedding_rows", lambda *args: sizes.append(len(args[1])) or embed(*args))
    nearest_tokens(prompted, _Tokens(5000), k=2)
    assert max(sizes) == 100 and sum(sizes) == 5000


class _Tokens:
    """Words by their numbers."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def decode(self, ids, skip_special_tokens=True):
        return f"word{ids[0]}"


def test_rows_of_the_embedding_that_are_no_words_are_left_out():
    """Embeddings are padded to round sizes; the rows beyond the tokenizer were never trained."""
    prompted = PromptedModel(pair(vocab_size=len(WORDS) + 20)[0])
    prompted.add("default", SoftPrompt(words_of(prompted, [len(WORDS) + 3])))
    assert all(each.id < len(WORDS) for each in nearest_tokens(prompted, WORDS, k=len(WORDS))[0])


def test_embeddings_that_scale_are_read_through_their_call():
    """T21: Gemma multiplies by sqrt(H) inside the embedding's forward; its rows are compared as the model sees them."""
    torch.manual_seed(0)
    config = transformers.GemmaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=1, head_dim=16)  # fmt: skip
    prompted = PromptedModel(transformers.GemmaForCausalLM(config))
    weight = prompted.base.get_input_embeddings().weight
    assert_close(embedding_rms(prompted.base), float(words_of(prompted, range(64)).square().mean().sqrt()))
    assert embedding_rms(prompted.base) == pytest.approx(32**0.5 * float(weight.square().mean().sqrt()), rel=1e-4)
    prompted.add("default", SoftPrompt(words_of(prompted, [7])))
    assert nearest_tokens(prompted, _Tokens(64), k=1) == [[Neighbour("word7", pytest.approx(0, abs=1e-6), 7)]]


def test_a_transformers_tokenizer_reads_the_same_words(prompted):
    moved(prompted, [5, 70, 200, 290])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=WORDS.backend)
    assert nearest_tokens(prompted, theirs) == nearest_tokens(prompted, WORDS)


def test_a_piece_that_is_no_text_by_itself_is_written_as_the_tokenizer_writes_it(prompted):
    byte = next(i for i in range(len(WORDS)) if WORDS.decode([i]) == "\ufffd")
    prompted.add("default", SoftPrompt(words_of(prompted, [byte])))
    assert nearest_tokens(prompted, WORDS, k=1)[0][0].token == WORDS.backend.id_to_token(byte)


def test_tasks_are_looked_at_by_name(prompted):
    moved(prompted, [65, 66], task="a")
    moved(prompted, [70, 71, 72], task="b")
    assert [position[0].id for position in nearest_tokens(prompted, WORDS, task="a")] == [65, 66]
    assert [position[0].id for position in nearest_tokens(prompted, WORDS)] == [70, 71, 72]
    with pytest.raises(LoraLabError, match="'a', 'b'"):
        nearest_tokens(prompted, WORDS, task="c")


@pytest.mark.parametrize("k", [0, -1, True, 2.0, 10**6])
def test_a_k_that_the_vocabulary_cannot_give_is_refused(prompted, k):
    moved(prompted, [65])
    with pytest.raises(LoraLabError, match="1 to the 300 words"):
        nearest_tokens(prompted, WORDS, k=k)


def test_a_prefix_has_no_nearest_words(prompted):
    shape = prefix_shape(prompted.base)
    prompted.add("deep", Prefix(torch.randn(shape.layers, 2, 4, shape.heads, shape.head_dim)))
    for look in (lambda: nearest_tokens(prompted, WORDS), lambda: drift(prompted), lambda: similarity(prompted), lambda: picture(prompted, WORDS)):
        with pytest.raises(LoraLabError, match="prefix"):
            look()


# Drift and similarity -------------------------------------------------------------------------------------------------------------


def test_drift_is_measured_from_the_initialisation_position_by_position(prompted):
    prompt = SoftPrompt(words_of(prompted, [65, 66, 67]))
    prompted.add("default", prompt)
    assert [each.distance for each in drift(prompted)] == [0, 0, 0]
    with torch.no_grad():
        prompt.weight[1] *= 3
        prompt.weight[2] += 0.25
    start, scale = words_of(prompted, [65, 66, 67]), embedding_rms(prompted.base)
    still, longer, elsewhere = drift(prompted)
    assert (still.distance, still.cosine, still.relative) == (0, pytest.approx(1), 0)
    assert longer.cosine == pytest.approx(1) and longer.distance == pytest.approx(float(2 * start[1].norm()), rel=1e-5)
    assert elsewhere.distance == pytest.approx(0.25 * 32**0.5) and elsewhere.relative == pytest.approx(0.25 / scale)
    assert elsewhere.cosine == pytest.approx(float(F.cosine_similarity(prompt.weight[2].detach(), start[2], dim=0)))


def test_similarity_is_spots_of_prompts_of_different_lengths(prompted):
    """Vu et al. 2022, section 4: the cosine of average tokens, or the average of the cosines of all pairs of tokens."""
    first, second = moved(prompted, [65, 66, 67], task="a").weight.detach(), moved(prompted, [70, 71], task="b").weight.detach()
    means, pairs = similarity(prompted), similarity(prompted, pairs=True)
    assert_close(means[0, 1], F.cosine_similarity(first.mean(0), second.mean(0), dim=0))
    assert_close(pairs[0, 1], F.cosine_similarity(first[:, None], second[None], dim=2).mean())
    assert_close(means.diagonal(), torch.ones(2))
    assert_close(means, means.T)
    assert_close(similarity(prompted, ["b", "a"]), means.flip(0, 1))


# The picture ----------------------------------------------------------------------------------------------------------------------

LABEL = re.compile(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*font-size="11"[^>]*>([^<]*)</text>')


def labels(svg):
    """(left, top, right, bottom) of each, and the text."""
    found = [(float(x), float(y), text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")) for x, y, text in LABEL.findall(svg)]
    return [(x, y - 10, x + text_width(text), y + 3) for x, y, text in found], [text for *_, text in found]


@pytest.mark.parametrize("count", [1, 2, 20, 100])
def test_a_pictures_labels_overlap_neither_each_other_nor_the_edge(prompted, count):
    ids = torch.randperm(len(WORDS))[:count].tolist()
    moved(prompted, ids, by=0.2)
    svg = picture(prompted, WORDS)
    xml.dom.minidom.parseString(svg)  # well-formed, whatever bytes the words are
    boxes, texts = labels(svg)
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= WIDTH and top >= 0 and bottom <= HEIGHT
        for other in boxes[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top, (texts[number], other)
    near = {each[0].id for each in nearest_tokens(prompted, WORDS, k=1)}
    assert len(texts) >= 0.9 * (count + len(near))
    assert svg.count("began here") == count and svg.count("cosine distance") == count


def test_the_same_prompt_gives_the_same_picture(prompted):
    moved(prompted, [65, 66, 67])
    assert picture(prompted, WORDS) == picture(prompted, WORDS)


def test_a_prompt_that_has_not_moved_is_drawn_on_its_words(prompted):
    """Where it began, where it is and the word: three dots in one place for each token."""
    prompted.add("default", SoftPrompt(words_of(prompted, [65, 66, 67])))
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture(prompted, WORDS))[3:]  # behind the legend's
    assert len(dots) == 9 and len({(round(float(x)), round(float(y))) for x, y in dots}) == 3


def test_principal_components_are_those_of_the_covariance():
    torch.manual_seed(0)
    rows = torch.randn(40, 6, dtype=torch.float64) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    flat, shares = principal_components(rows)
    values = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    assert_close(flat.var(0), values[:2])
    assert_close(torch.tensor(shares), (values[:2] / values.sum()).float(), check_dtype=False)


def test_one_scale_for_both_directions_so_that_near_is_near():
    a, b, c = on_paper([(0.0, 0.0), (10.0, 0.0), (0.0, 1.0)])
    assert b[0] - a[0] == pytest.approx(10 * (a[1] - c[1]))
    assert on_paper([(1.0, 2.0), (1.0, 2.0)]) == [(WIDTH / 2, pytest.approx((84 + HEIGHT - 52) / 2))] * 2


def test_labels_are_one_line_of_printable_letters():
    assert label_text("<|im_start|> and a long way after it") == "<|im_start|> and …"
    assert label_text("\x00\n") == "\\x00\\n"
