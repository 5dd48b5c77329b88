"""How a task is put to each kind of model, taught and judged: against the same computed by hand from the pieces."""

from __future__ import annotations

import math

import pytest
import tokenizers
import torch
from task_tools import decoder, dialogues, encoder, instructions, jsonl, opinions, plain_decoder, t5
from tiny_workshop import BOS, END, EOS, ids

from lora_lab import LoraLabError, inject, models
from lora_lab.data import encode_rows, prompt_of
from lora_lab.models import Pooling, embed
from lora_lab.models.pooled_classifier import RobertaPooledForSequenceClassification, with_pooled_head
from lora_lab.tasks import Reading, Way, gather
from lora_lab.tasks.sentiment import NewHead
from lora_lab.training import fit, perplexity, rouge, score_choices
from lora_lab.training.evaluation import Written, auc, class_logits, clean_endings, write
from lora_lab.training.probing import linear_probe

QUIET = {"progress": False}
MAKERS = {"sentiment": opinions, "summarization": dialogues, "instruction": instructions}


def reading(tmp_path, task, made, rows=None, **settings):
    """(reader, model, all rows)."""
    model, tokenizer = made
    material = gather(task, jsonl(tmp_path / "rows.jsonl", MAKERS[task]() if rows is None else rows), wanted=())
    return material.reader(model, tokenizer, Reading(**settings)), model, material.part("all")


# A class as a word ------------------------------------------------------------------------------------------------------------


def test_a_language_model_answers_by_the_likelier_class_behind_the_text(tmp_path):
    reader, model, rows = reading(tmp_path, "sentiment", decoder())
    prompts = [f"Review: {row['text']}\nSentiment:" for row in rows]
    scores = score_choices(model, [ids(prompt) for prompt in prompts], reader.tokenizer, [" negative", " positive"], **QUIET)
    right = [bool(row[1] > row[0]) == bool(label) for row, label in zip(scores, [row["label"] for row in rows], strict=True)]
    found = reader.scores(model, rows)
    assert found["accuracy"] == sum(right) / len(right) == reader.score(model, rows)
    assert found["AUC"] == auc(scores[:, 1] - scores[:, 0], [row["label"] for row in rows])
    assert reader.questions(rows) == [ids(prompt) for prompt in prompts]
    assert reader.longest(rows) == max(map(len, reader.questions(rows))) + len(" negative")


def test_what_is_learned_is_the_word_of_the_class(tmp_path):
    reader, _, rows = reading(tmp_path, "sentiment", decoder())
    example = reader.examples(rows)[1]
    learned = [token for token in example["labels"] if token != -100]
    assert bytes(example["input_ids"]).decode() == f"Review: {rows[1]['text']}\nSentiment: positive" and bytes(learned) == b" positive"


def test_a_class_whose_name_begins_anothers_is_taught_and_scored_with_its_end(tmp_path):
    """Of " pay" and " payback" the longer is never the likelier without."""
    rows = [{"text": ("aaaa", "zzzz")[number % 2] + str(number), "label": ("pay", "payback")[number % 2]} for number in range(8)]
    reader, model, rows = reading(tmp_path, "sentiment", decoder(), rows)
    answers, learned = [" pay", " payback"], [label for label in reader.examples(rows)[1]["labels"] if label != -100]
    expected = score_choices(model, reader.questions(rows), reader.tokenizer, answers, end=True, **QUIET)
    assert learned == [*b" payback", END]
    torch.testing.assert_close(reader.answered(model, rows, None), expected, rtol=1e-5, atol=1e-4)
    assert reader.longest(rows) == max(len(example["input_ids"]) for example in reader.examples(rows))
    fit(model, reader.examples(rows), {"max_steps": 60, "learning_rate": 1e-2, **QUIET})
    assert reader.score(model, rows) == 1.0


def test_a_causal_models_text_begins_as_its_tokenizer_begins_every_text(tmp_path):
    model, tokenizer = plain_decoder()
    tokenizer.backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    reader, _, rows = reading(tmp_path, "sentiment", (model, tokenizer))
    assert reader.questions(rows)[0] == [BOS, *ids(f"Review: {rows[0]['text']}\nSentiment:")] and reader.examples(rows)[0]["input_ids"][0] == BOS


def test_an_encoder_decoder_reads_the_text_and_writes_the_word(tmp_path):
    reader, model, rows = reading(tmp_path, "sentiment", t5())
    example = reader.examples(rows)[0]
    assert bytes(example["input_ids"]).decode() == f"sst2 sentence: {rows[0]['text']}" and example["labels"] == [*b"negative", EOS]
    expected = score_choices(model, [reader.tokenizer.encode(f"sst2 sentence: {row['text']}") for row in rows], reader.tokenizer,
                             ["negative", "positive"], end=True, **QUIET)  # fmt: skip
    torch.testing.assert_close(reader.answered(model, rows, None), expected, rtol=1e-5, atol=1e-4)  # scored with the end that it was taught


def test_shots_stand_before_the_text_with_their_answers_and_are_balanced(tmp_path):
    reader, model, rows = reading(tmp_path, "sentiment", decoder())
    way = reader.few(rows, 2, seed=3)
    assert sorted(shot["label"] for shot in way.shots) == [0, 0, 1, 1] and way != reader.few(rows, 2, seed=4) and way == reader.few(rows, 2, seed=3)
    asked = bytes(reader.questions(rows, way)[0]).decode()
    first = way.shots[0]
    assert asked.startswith(f"Review: {first['text']}\nSentiment: {('negative', 'positive')[first['label']]}\n\nReview: ")
    assert asked.endswith(f"Review: {rows[0]['text']}\nSentiment:") and asked.count("Sentiment:") == 5
    assert not torch.equal(reader.answered(model, rows, way), reader.answered(model, rows, None))


def test_the_largest_class_needs_no_model(tmp_path):
    reader, _, rows = reading(tmp_path, "sentiment", decoder(), [{"text": f"t {n}", "label": int(n % 4 > 0)} for n in range(20)])
    assert reader.without_model(rows) == ("largest class", {"accuracy": 0.75, "F1 (macro)": pytest.approx(3 / 7), "AUC": 0.5})


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    """Hanley & McNeil 1982: ties count half."""
    torch.manual_seed(4)
    scores, labels = torch.randint(0, 6, (40,)).double(), torch.randint(0, 2, (40,))
    ones, zeros = scores[labels == 1], scores[labels == 0]
    above = ones[:, None] - zeros[None]
    assert auc(scores, labels) == pytest.approx(float(((above > 0).double() + 0.5 * (above == 0)).mean()), abs=1e-12)
    with pytest.raises(LoraLabError, match="both classes"):
        auc([1.0, 2.0], [1, 1])


# A class by a head ------------------------------------------------------------------------------------------------------------


def test_a_head_begins_as_the_linear_probe_of_the_pooled_states(tmp_path):
    """Kumar et al. 2022, section 3; the mean of hidden states is what the encoder was trained to be read by."""
    reader, model, rows = reading(tmp_path, "sentiment", encoder())
    features = embed(model, reader.tokenizer, [row["text"] for row in rows], pooling=Pooling(normalize=False))
    expected = linear_probe(features, torch.tensor([row["label"] for row in rows]))(features)
    classifier = reader.prepared(model, rows)
    torch.testing.assert_close(class_logits(classifier, list(rows), reader.tokenizer, **QUIET), expected.detach(), rtol=1e-4, atol=1e-4)
    assert reader.score(classifier, rows) > 0.8 and reader.new_head and classifier.bert is model and model.pooler is None


def test_features_are_made_once_for_several_heads(tmp_path, monkeypatch):
    reader, model, rows = reading(tmp_path, "sentiment", encoder())
    first = reader.prepared(model, rows).classifier.weight.clone()
    monkeypatch.setattr("lora_lab.tasks.sentiment.embed", None)
    assert torch.equal(reader.prepared(encoder()[0], rows).classifier.weight, first)


def test_a_probe_of_some_rows_has_seen_every_class(tmp_path, monkeypatch):
    """The opinions alternate: every second is of one class."""
    monkeypatch.setattr("lora_lab.tasks.sentiment.MOST_PROBED", 15)
    reader, model, rows = reading(tmp_path, "sentiment", encoder())
    assert reader.score(reader.prepared(model, rows), rows) > 0.8


def test_the_whole_classifier_learns_and_saves_with_its_adapter(tmp_path):
    reader, model, rows = reading(tmp_path, "sentiment", encoder())
    classifier = inject(reader.prepared(model, rows), 2, modules_to_save=["classifier"])
    result = fit(classifier, reader.examples(rows), {"max_steps": 12, "learning_rate": 1e-2, **QUIET}, tokenizer=reader.tokenizer)
    assert sum(result.losses[-3:]) < sum(result.losses[:3])


def test_without_training_an_encoder_takes_the_class_whose_text_is_nearer(tmp_path):
    reader, model, rows = reading(tmp_path, "sentiment", encoder())
    assert isinstance(reader, NewHead)
    vectors = embed(model, reader.tokenizer, [row["text"] for row in rows])
    called = embed(model, reader.tokenizer, ["a negative review", "a positive review"])
    torch.testing.assert_close(reader.answered(model, rows, Way("a {text} review")), (vectors @ called.T).double())
    shots = reader.few(rows, 2, 0).shots
    shown = {label: embed(model, reader.tokenizer, [shot["text"] for shot in shots if shot["label"] == label]).mean(0) for label in (0, 1)}
    expected = (vectors @ torch.stack([shown[0], shown[1]]).T).double()
    torch.testing.assert_close(reader.answered(model, rows, Way("", shots)), expected)


def test_padding_does_not_reach_the_pooled_head():
    model, _ = encoder()
    classifier = with_pooled_head(model, torch.nn.Linear(32, 2))
    alone, wide = torch.tensor([[2, 5, 13, 3]]), torch.tensor([[2, 5, 13, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(classifier(input_ids=wide, attention_mask=mask).logits, classifier(input_ids=alone).logits)
    assert not torch.allclose(classifier(input_ids=wide).logits, classifier(input_ids=alone).logits)
    with pytest.raises(LoraLabError, match="gets no head for classes"):
        with_pooled_head(decoder()[0], torch.nn.Linear(32, 2))


def test_a_roberta_gets_a_pooled_head_too():
    config = models.RobertaConfig.from_dict({"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
                                             "num_attention_heads": 2, "max_position_embeddings": 20, "type_vocab_size": 1})  # fmt: skip
    classifier = with_pooled_head(models.RobertaModel(config, add_pooling_layer=False), torch.nn.Linear(16, 3))
    assert isinstance(classifier, RobertaPooledForSequenceClassification) and classifier(input_ids=torch.tensor([[4, 5]])).logits.shape == (1, 3)
    assert classifier.get_input_embeddings() is classifier.roberta.embeddings.word_embeddings


def test_a_probe_of_nothing_is_refused():
    with pytest.raises(LoraLabError, match=r"features \[0, 3\] and labels \[0\]"):
        linear_probe(torch.zeros(0, 3), torch.zeros(0))


# A text -----------------------------------------------------------------------------------------------------------------------


def test_a_dialogue_is_an_instruction_with_an_input(tmp_path):
    reader, model, rows = reading(tmp_path, "summarization", decoder(), generation={"max_new_tokens": 6})
    row = {"instruction": "Summarize the following dialogue.", "input": rows[0]["dialogue"], "output": rows[0]["summary"]}
    assert reader.examples(rows)[0] == encode_rows([row], reader.tokenizer)[0]
    assert reader.questions(rows)[0] == reader.tokenizer.encode(prompt_of(row, reader.tokenizer), add_special_tokens=False)
    found, texts = reader.scores(model, rows), [each.text for each in reader.written(model, rows)]
    assert found["rougeL"] == rouge(texts, [each["summary"] for each in rows])["rougeL"].f1 == reader.score(model, rows)
    assert found["loss"] == pytest.approx(math.log(perplexity(model, reader.examples(rows), **QUIET)))
    name, copied = reader.without_model(rows)
    assert name == "the text itself" and copied["rougeL"] > 0.2


def test_other_words_are_put_in_place_of_the_usual_ones(tmp_path):
    model, tokenizer = decoder()
    material = gather("summarization", jsonl(tmp_path / "rows.jsonl", dialogues()), wanted=())
    assert "Tell it." in material.reader(model, tokenizer, words="Tell it.").shown(material.part("all")[0])


def test_words_that_would_do_nothing_are_refused(tmp_path):
    for task, made in (("sentiment", encoder), ("instruction", decoder)):
        reader, _, _ = reading(tmp_path, task, made())
        reader.ask_in(reader.way.words)
        with pytest.raises(LoraLabError, match="read by this model as they are"):
            reader.ask_in("Read this: {text}")


def test_examples_are_earlier_turns_and_only_the_last_answer_counts(tmp_path):
    """Otherwise the loss of few-shot would be that of the examples, too."""
    reader, model, rows = reading(tmp_path, "instruction", decoder())
    way = Way("", tuple(rows[:2]))
    example = reader._encoded(rows[5:6], way)[0]
    assert bytes(token for token in example["labels"] if 0 <= token < 256) == b"5."
    assert bytes(token for token in example["input_ids"] if token < 256).count(b"assistant\n") == 3
    torch.manual_seed(0)
    ids_, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
    assert reader.loss(model, rows[5:6], way) == pytest.approx(model(input_ids=ids_, labels=labels).loss.item(), abs=1e-5)
    assert reader.loss(model, rows, way) != pytest.approx(reader.loss(model, rows), abs=1e-3)


def test_a_tokenizer_without_turns_is_shown_examples_as_one_text(tmp_path):
    reader, _, rows = reading(tmp_path, "instruction", plain_decoder())
    asked = reader.asked(rows[3], Way("", tuple(rows[:1])))
    assert asked == {"instruction": "Say 0.\n\n0.\n\nSay 3.", "output": "3."}


def test_shots_are_of_the_shorter_half(tmp_path):
    rows = [{"instruction": "Say it" + " again" * number, "output": "It."} for number in range(10)]
    reader, _, rows = reading(tmp_path, "instruction", decoder(), rows)
    assert max(len(shot["instruction"]) for seed in range(9) for shot in reader.few(rows, 3, seed).shots) <= len(rows[4]["instruction"])


def test_an_encoder_decoder_reads_and_answers(tmp_path):
    reader, model, rows = reading(tmp_path, "summarization", t5(), generation={"max_new_tokens": 4})
    example = reader.examples(rows)[0]
    assert bytes(example["input_ids"]).decode() == f"summarize:\n\n{rows[0]['dialogue']}" and bytes(example["labels"][:-1]).decode() == "0 is good."
    assert {*reader.scores(model, rows)} == {"loss", "clean endings", "rouge1", "rouge2", "rougeL", "wrong facts"}
    assert reader.longest(rows, Way("", tuple(rows[:1]))) > reader.longest(rows)


def test_an_ending_is_clean_where_the_model_stops_by_itself_and_has_said_something(tmp_path):
    reader, model, rows = reading(tmp_path, "instruction", decoder())
    question, settings = [reader.questions(rows)[0]], {"max_new_tokens": 3, **QUIET}
    written = models.generate(model, question, max_new_tokens=3).ids[0]
    assert not write(model, question, reader.tokenizer, **settings)[0].ended
    for stop, said in ((written[2], True), (written[0], False)):
        stopping = write(model, question, StopsAt(stop), **settings)
        assert stopping[0].ended and clean_endings(stopping) == said
        assert write(model, question, StopsAt(-1), stop_ids=[stop], **settings)[0].ended  # the caller's, not the tokenizer's
    assert clean_endings([Written("Yes.", True), Written("Yes, and then", False), Written(" ", True), Written("No.", True)]) == 0.5


class StopsAt:
    """A tokenizer that says where a text ends, and what of it is there before that."""

    pad_token_id = 0

    def __init__(self, token):
        self.end_ids = [token]

    def decode(self, tokens, **_):
        return " ".join(str(token) for token in tokens if token not in self.end_ids)


@pytest.mark.parametrize(("task", "made"), [("summarization", encoder), ("instruction", encoder)])
def test_a_model_that_writes_nothing_is_refused(tmp_path, task, made):
    with pytest.raises(LoraLabError, match="a BertModel reads text and writes none"):
        reading(tmp_path, task, made())


# A head's own names -----------------------------------------------------------------------------------------------------------------


def named_classifier(names):
    model, tokenizer = encoder()
    torch.manual_seed(0)
    head = {"id2label": dict(enumerate(names)), "num_labels": len(names), "architectures": ["BertForSequenceClassification"]}
    sizes = {**model.config.to_dict(), **head}
    return models.BertForSequenceClassification(models.BertConfig.from_dict(sizes)).eval(), tokenizer


def test_a_models_own_head_answers_by_the_names_of_its_outputs(tmp_path):
    """id2label says which output is which class: here 0 is positive."""
    model, tokenizer = named_classifier(["POSITIVE", "NEGATIVE"])
    reader, _, rows = reading(tmp_path, "sentiment", (model, tokenizer))
    logits = class_logits(model, rows, tokenizer, progress=False)
    torch.testing.assert_close(reader.answered(model, rows, None), logits[:, [1, 0]].double())
    assert [example["label"] for example in reader.examples(rows)] == [1 - row["label"] for row in rows]
    plain, _, _ = reading(tmp_path, "sentiment", named_classifier(["LABEL_0", "LABEL_1"]))
    assert [example["label"] for example in plain.examples(rows)] == [row["label"] for row in rows]
