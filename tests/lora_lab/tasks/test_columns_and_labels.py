"""Which column is what and what a label means: found where it is plain, an error that names the option where it is not."""

from __future__ import annotations

import pytest

from lora_lab import LoraLabError
from lora_lab.data.tables import Table, classes_of, columns_of
from lora_lab.data.tables.labels import Classes, in_the_order_of, without_secret
from lora_lab.tasks.base import CHATS, INSTRUCTIONS
from lora_lab.tasks.material import TASKS

SHAPES = {name: task.shapes for name, task in TASKS.items()}


def table(*rows):
    return Table(rows, [("rows.csv", line) for line in range(1, len(rows) + 1)])


def of(task, columns, **given):
    """role -> column of a table with these columns, a text in each."""
    return columns_of(table(dict.fromkeys(columns, "text")), SHAPES[task], given).of


# Names ------------------------------------------------------------------------------------------------------------------------

KNOWN = {
    "SST-2": ("sentiment", ["idx", "sentence", "label"], {"text": "sentence", "label": "label"}),
    "IMDB": ("sentiment", ["review", "sentiment"], {"text": "review", "label": "sentiment"}),
    "clothing reviews": ("sentiment", ["", "Clothing ID", "Title", "Review Text", "Rating"], {"text": "Review Text", "label": "Rating"}),
    "a rating beside a label": ("sentiment", ["text", "rating", "label"], {"text": "text", "label": "label"}),
    "DialogSum": ("summarization", ["id", "dialogue", "summary", "topic"], {"text": "dialogue", "summary": "summary"}),
    "MTS-Dialog": ("summarization", ["ID", "section_header", "section_text", "dialogue"], {"text": "dialogue", "summary": "section_text"}),
    "CNN": ("summarization", ["article", "highlights", "id"], {"text": "article", "summary": "highlights"}),
    "Alpaca": ("instruction", ["instruction", "input", "output"], {"instruction": "instruction", "input": "input", "output": "output"}),
    "Dolly": ("instruction", ["instruction", "context", "response", "category"],
              {"instruction": "instruction", "input": "context", "output": "response"}),
    "no input": ("instruction", ["prompt", "completion"], {"instruction": "prompt", "output": "completion"}),
    "chat": ("instruction", ["conversations"], {"messages": "conversations"}),
    "reviews": ("reviews", ["product_title", "review_body", "sentiment"],
                {"product": "product_title", "text": "review_body", "label": "sentiment"}),
}  # fmt: skip


@pytest.mark.parametrize(("task", "columns", "expected"), KNOWN.values(), ids=KNOWN)
def test_published_shapes_are_known_by_the_names_of_their_columns(task, columns, expected):
    assert of(task, columns) == expected


UNCLEAR = {
    "two texts": ("sentiment", ["text", "sentence", "label"], {}, "'text' and 'sentence' could each be the text: --text-column decides"),
    "two labels": ("sentiment", ["text", "label", "sentiment"], {}, "'label' and 'sentiment' could each be the label: --label-column"),
    "two shapes": ("instruction", ["messages", "instruction", "output"], {}, "--instruction-column instruction or --messages-column messages dec"),
    "nothing that is known": ("summarization", ["a", "b"], {}, r"are \['a', 'b'\]; expected .*text \(--text-column\) and summary \(--summary-c"),
    "half of it": ("summarization", ["dialogue", "b"], {}, r"of which summary \(--summary-column\) is not found"),
    "no such column": ("sentiment", ["text", "label"], {"text": "txt"}, r"--text-column txt: the columns are .*did you mean 'text'"),
    "no such role": ("sentiment", ["text", "label"], {"summary": "text"}, "--summary-column text: rows of this task have text, label"),
}


@pytest.mark.parametrize(("task", "columns", "given", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_is_not_plain_is_an_error_that_names_the_columns_and_the_option(task, columns, given, message):
    with pytest.raises(LoraLabError, match=message):
        of(task, columns, **given)


def test_what_is_given_decides():
    assert of("sentiment", ["text", "sentence", "label"], text="sentence")["text"] == "sentence"
    assert of("instruction", ["messages", "instruction", "output"], messages="messages") == {"messages": "messages"}
    assert of("summarization", ["a", "b"], text="b", summary="a") == {"text": "b", "summary": "a"}


# Values -----------------------------------------------------------------------------------------------------------------------


def rows_of(count=8):
    return [{"n": str(1000 + i), "who": f"critic {i}", "said": "a long and winding opinion of it " * 2, "mark": str(i % 2)} for i in range(count)]


def test_columns_without_known_names_are_found_by_their_values():
    """The label: few short values that come again; the text: clearly the longest."""
    found = columns_of(table(*rows_of()), SHAPES["sentiment"])
    assert found.of == {"label": "mark", "text": "said"} and {*found.why.values()} == {"by its values"}


def test_values_that_fit_two_columns_decide_nothing():
    twice = [{**row, "also": row["said"][:-5]} for row in rows_of()]
    with pytest.raises(LoraLabError, match="'said' and 'also' could each be the text .*--text-column decides"):
        columns_of(table(*twice), SHAPES["sentiment"])
    labels = [{**row, "kind": "ab"[index % 2]} for index, row in enumerate(rows_of())]
    with pytest.raises(LoraLabError, match="'mark' and 'kind' could each be the label .*--label-column decides"):
        columns_of(table(*labels), SHAPES["sentiment"])
    assert columns_of(table(*labels), SHAPES["sentiment"], {"label": "kind"}).of == {"label": "kind", "text": "said"}


def test_summaries_and_instructions_are_never_guessed():
    with pytest.raises(LoraLabError, match="is not found"):
        columns_of(table({"a": "long " * 50, "b": "short"}), SHAPES["summarization"])
    with pytest.raises(LoraLabError, match="is not found"):
        columns_of(table({"a": "long " * 50, "b": "short"}), (INSTRUCTIONS, CHATS))


# Labels -----------------------------------------------------------------------------------------------------------------------

LABELS = {
    "numbers": ([1, 0, 1], {"0": 0, "1": 1}, ("negative", "positive")),
    "in a CSV": (["1", "0", " 1.0"], {"0": 0, "1": 1}, ("negative", "positive")),
    "below zero": ([-1, 1], {"-1": 0, "1": 1}, ("negative", "positive")),
    "Sentiment140": ([4, 0], {"0": 0, "4": 1}, ("negative", "positive")),
    "around zero": ([0, 1, -1], {"-1": 0, "0": 1, "1": 2}, ("negative", "neutral", "positive")),
    "three": ([2, 0, 1], {"0": 0, "1": 1, "2": 2}, ("negative", "neutral", "positive")),
    "words": (["pos", "Neg", "POS"], {"neg": 0, "pos": 1}, ("negative", "positive")),
    "neutral ones": (["positive", "neutral", "negative"], {"negative": 0, "neutral": 1, "positive": 2}, ("negative", "neutral", "positive")),
    "other words": (["joy", "anger", "joy", None, ""], {"anger": 0, "joy": 1}, ("anger", "joy")),
}


@pytest.mark.parametrize(("cells", "mapped", "names"), LABELS.values(), ids=LABELS)
def test_labels_as_people_write_them_are_classes(cells, mapped, names):
    classes = classes_of(cells)
    assert (classes.of, classes.names) == (mapped, names)


def test_names_go_to_numbers_in_the_numbers_order_and_to_words_by_name():
    assert classes_of([5, 1, 3], ["bad", "fair", "good"]).of == {"1": 0, "3": 1, "5": 2}
    named = classes_of(["joy", "anger"], ["joy", "anger"])
    assert named.names == ("joy", "anger") and named.of == {"joy": 0, "anger": 1}
    assert classes_of(["neg", "pos"], ["positive", "negative"]).of == {"neg": 1, "pos": 0}
    assert classes_of(["Bad", "good", "neutral"], ["neu", "pos", "neg"]).of == {"bad": 2, "good": 1, "neutral": 0}


def test_labels_have_the_names_that_are_given_one_by_one():
    """Several labels may be one class; a label may have the sign in itself."""
    assert classes_of(["a", "b"], ["b=first", "a=second"]) == Classes(("first", "second"), {"b": 0, "a": 1})
    assert classes_of([1, 2, 3], ["1=bad", "2=bad", "3=good"]).of == {"1": 0, "2": 0, "3": 1}
    assert classes_of([">=3", "<3"], [">=3=good", "<3=bad"]).of == {">=3": 0, "<3": 1}
    assert classes_of([">=3", "<=3"], ["<=3", ">=3"]).names == ("<=3", ">=3")


def test_classes_of_an_earlier_run_keep_their_order():
    earlier = classes_of(["fine", "poor"], ["fine", "poor"])
    assert in_the_order_of(earlier, classes_of(["fine", "poor"], ["poor", "fine"])) == earlier
    five = ["bad", "negative", "neutral", "positive", "good"]  # of which two words are spoken like two others
    stars = classes_of([1, 2, 3, 4, 5], five)
    assert in_the_order_of(stars, classes_of([1, 2, 3, 4, 5], five)) == stars
    assert in_the_order_of(earlier, classes_of([1, 2], ["poor", "fine"])).of == {"fine": 0, "poor": 1, "1": 1, "2": 0}
    with pytest.raises(LoraLabError, match="--labels poor great: 'great' is none of the classes that the adapter was taught, fine, poor"):
        in_the_order_of(earlier, classes_of([1, 2], ["poor", "great"]))


@pytest.mark.parametrize(("cells", "names", "message"), [
    ([1, 1], None, r"1 different values \(1\): expected 2 to 50 classes"), ([None, ""], None, "0 different values"),
    (range(60), None, "60 different values"), ([1, 2, 3, 4, 5], None, "labels are 1, 2, 3, 4, 5: --labels says what they are called"),
    ([0, 1], ["a", "b", "c"], "3 names, the labels are 0, 1"), ([0, 1], ["a", "a"], "no name twice"),
    (["x", 3, 3], None, r"--labels says .*label=name for each \(3=... x=...\)"),
    (["a", "b"], ["first", "second"], "the labels are a, b, and which of them has which name is not plain.*label=name for each \\(a=first ...\\)"),
    (["joy", "pos"], ["pos", "anger"], "which of them has which name is not plain"), (["x", 3, 3], ["few", "many"], "is not plain"),
    ([0, 1], ["0=a"], "the label '1' has no name"), ([0, 1], ["0=a", "1=a"], "two names at least"), ([0, 1], ["0=a", "1=b", "1=c"], "once for each"),
])  # fmt: skip
def test_labels_that_say_too_little_are_refused(cells, names, message):
    with pytest.raises(LoraLabError, match=message):
        classes_of(cells, names)


def test_minus_one_beside_three_classes_is_no_class():
    """SNLI: people did not agree. And blank cells among the -1 of a secret test change nothing."""
    assert classes_of([0, 1, 2, -1], ["entailment", "neutral", "contradiction"]).of == {"0": 0, "1": 1, "2": 2}
    assert [*without_secret([[0, 1], [-1, "", -1]])] == [0, 1]
