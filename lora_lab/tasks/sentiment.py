"""Is this text positive or negative? Any few classes will do: {"text": "...", "label": 0}.

    a language model     log P(" negative"), log P(" positive") after "Review: ...\\nSentiment:"; learned is that one word
    an encoder           a head on the pooled hidden states, which begins as the linear probe of the frozen ones; without training: the nearer text
    a classifier         its own head
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Rows, filled, prompt_of, verbalize
from ..data.classification import encode_labelled
from ..data.formats import Row
from ..data.tables.columns import Columns, Role, Shape
from ..data.tables.labels import Classes, spoken, written
from ..data.tables.parts import some_of
from ..data.templates import has_chat_template
from ..data.verbalizing import answer_ids, one_begins_another, read_ids
from ..errors import LoraLabError
from ..models.embedding import embed, pooling_of
from ..models.pooled_classifier import with_pooled_head
from ..training.evaluation import accuracy, auc, best_choices, class_logits, f1, score_choices
from ..training.probing import linear_probe
from .base import LABEL, Cells, Reader, Reading, Scores, Task, Unusable, Way, digest, model_kind, text_in

TEXT = Role("text", (("text", "sentence", "review", "review_text", "review_body", "content", "comment", "tweet", "phrase", "body"),
                     ("document", "message", "description")), by_values="longest")  # fmt: skip
MOST_PROBED = 2000  # rows that a new head begins from
EMBEDDED = 32  # texts in one pass


class Sentiment(Task):
    name = "sentiment"
    shapes = (Shape("text and label (SST-2)", (TEXT, LABEL)),)
    labelled = True

    def row(self, cells: Cells, classes: Classes | None) -> Row:
        assert classes is not None
        label = written(cells.get("label"))
        if label not in classes.of:
            raise Unusable(f"the label {label!r} is none of the classes" if label else "no label")
        return {"text": text_in(cells, "text"), "label": classes.of[label]}

    def key(self, row: Row) -> str:
        return digest(row["text"])

    def reader(self, model: nn.Module, tokenizer: Any, columns: Columns, classes: Classes | None, reading: Reading) -> Reader:
        assert classes is not None
        kind = model_kind(model)
        if kind == "encoder":
            return NewHead(tokenizer, reading, classes)
        if kind == "classifier":
            return OwnHead(model, tokenizer, reading, classes)
        return Words(tokenizer, reading, classes, kind == "encoder-decoder")


class Named(Reader):
    """Texts to classes. Of two classes the second is the positive one."""

    quality = "accuracy"

    def __init__(self, tokenizer: Any, reading: Reading, classes: Classes) -> None:
        super().__init__(tokenizer, reading)
        self.classes = classes

    def answered(self, model: nn.Module, rows: Sequence[Row], way: Way | None) -> Tensor:
        """[rows, classes]: the higher, the likelier."""
        raise NotImplementedError

    def scores(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> Scores:
        answers, labels = self.answered(model, rows, way), [row["label"] for row in rows]
        best = best_choices(answers)
        found = {"accuracy": accuracy(best, labels), "F1 (macro)": f1(best, labels).macro}
        if len(self.classes) == 2:
            found["AUC"] = auc(answers[:, 1] - answers[:, 0], labels) if len({*labels}) == 2 else math.nan
        return found

    def without_model(self, rows: Sequence[Row]) -> tuple[str, Scores] | None:
        labels = [row["label"] for row in rows]
        most = [Counter(labels).most_common(1)[0][0]] * len(labels)
        found = {"accuracy": accuracy(most, labels), "F1 (macro)": f1(most, labels).macro}
        return "largest class", {**found, "AUC": 0.5} if len(self.classes) == 2 else found

    def hint(self) -> str | None:
        return f"Is this text {self.named()}?"

    def named(self) -> str:
        """The classes in a sentence."""
        return f"{', '.join(self.classes.names[:-1])} or {self.classes.names[-1]}"

    def few(self, rows: Sequence[Row], count: int, seed: int) -> Way:
        """So many of each class, mixed: the last one shown would weigh too much (Zhao et al. 2021, arXiv:2102.09690, section 4)."""
        drawn, shots = random.Random(f"{seed} shots"), list[Row]()
        for label in range(len(self.classes)):
            own = [row for row in rows if row["label"] == label]
            shots += drawn.sample(own, min(count, len(own)))
        drawn.shuffle(shots)
        return Way(self.way.words, tuple(shots))


# A language model -------------------------------------------------------------------------------------------------------------


class Words(Named):
    """The likeliest of the classes' names after the text (Schick & Schuetze 2021, arXiv:2001.07676: pattern and verbalizer).

    end: they are taught and scored with the stop token behind them, as an encoder-decoder's are, and names of which one begins another.
    """

    def __init__(self, tokenizer: Any, reading: Reading, classes: Classes, encodes: bool) -> None:
        super().__init__(tokenizer, reading, classes)
        self.encodes = encodes
        self.answers = [name if encodes else f" {name}" for name in classes.names]
        self.end = getattr(tokenizer, "eos_token_id", None) is not None and (encodes or one_begins_another(self.answers, tokenizer))
        self.way = self.ways()[0]

    def ways(self) -> list[Way]:
        """The first is what does best untaught with SmolLM2; for an encoder-decoder T5's own prefix."""
        names = self.named()
        if self.encodes:
            return [Way("sst2 sentence: {text}"), Way(f"{{text}}\n\nIs this text {names}?"), Way(f"Text: {{text}}\nIts sentiment ({names}):")]
        plain = ["Review: {text}\nSentiment:", "{text}\nThe sentiment of this text is", f"Text: {{text}}\nIs this text {names}? It is",
                 f"Classify the text as {names}.\nText: {{text}}\nAnswer:"]  # fmt: skip
        if has_chat_template(self.tokenizer):
            plain.append(prompt_of({"instruction": f"Is the sentiment of this text {names}?\n{{text}}"}, self.tokenizer) + "The sentiment is")
        return [Way(words) for words in plain]

    def asked(self, row: Row, way: Way) -> str:
        shown = "".join(filled(way.words, shot) + " " * self.encodes + self.answers[shot["label"]] + "\n\n" for shot in way.shots)
        return shown + filled(way.words, row)

    def examples(self, rows: Sequence[Row]) -> Any:
        return verbalize(rows, self.tokenizer, self.way.words, self.answers, end=self.end, encodes=self.encodes)

    def shown(self, row: Row) -> str:
        return f"{self.asked(row, self.way)}[{self.answers[row['label']]}]"

    def questions(self, rows: Sequence[Row], way: Way | None = None) -> list[list[int]]:
        return [read_ids(self.asked(row, way or self.way), self.tokenizer, self.encodes) for row in rows]

    def longest(self, rows: Sequence[Row], way: Way | None = None) -> int:
        answer = 0 if self.encodes else max(len(answer_ids(answer, self.tokenizer)) for answer in self.answers) + self.end
        return max(map(len, self.questions(rows, way))) + answer

    def answered(self, model: nn.Module, rows: Sequence[Row], way: Way | None) -> Tensor:
        return score_choices(model, self.questions(rows, way), self.tokenizer, self.answers, end=self.end, batch_size=self.reading.batch_size,
                             precision=self.reading.precision, progress=self.reading.progress)  # fmt: skip


# An encoder -------------------------------------------------------------------------------------------------------------------


class Head(Named):
    """By a head."""

    has_words = False
    way = Way("{text}")

    def examples(self, rows: Sequence[Row]) -> Any:
        encoded = encode_labelled(rows, self.tokenizer, None, len(self.classes))
        return Rows(encoded)

    def shown(self, row: Row) -> str:
        return f"{row['text']} [{self.classes.names[row['label']]}]"

    def questions(self, rows: Sequence[Row], way: Way | None = None) -> list[list[int]]:
        return [example["input_ids"] for example in self.examples(rows)]

    def longest(self, rows: Sequence[Row], way: Way | None = None) -> int:
        return max(map(len, self.questions(rows)))

    def answered(self, model: nn.Module, rows: Sequence[Row], way: Way | None) -> Tensor:
        return class_logits(model, rows, self.tokenizer, batch_size=self.reading.batch_size, precision=self.reading.precision,
                            progress=self.reading.progress).double()  # fmt: skip


class OwnHead(Head):
    """One that the model came with. outputs: of each class."""

    def __init__(self, model: Any, tokenizer: Any, reading: Reading, classes: Classes) -> None:
        super().__init__(tokenizer, reading, classes)
        if model.config.num_labels != len(classes):
            raise LoraLabError(f"the model's head has {model.config.num_labels} outputs, the data {len(classes)} classes: {', '.join(classes.names)}")
        self.outputs = outputs_of(classes, model.config.to_dict().get("id2label") or {})

    def examples(self, rows: Sequence[Row]) -> Any:
        return Rows([{**example, "label": self.outputs[example["label"]]} for example in super().examples(rows)])

    def answered(self, model: nn.Module, rows: Sequence[Row], way: Way | None) -> Tensor:
        return super().answered(model, rows, way)[:, self.outputs]

    def ways(self) -> list[Way]:
        return [self.way]

    def few(self, rows: Sequence[Row], count: int, seed: int) -> Way:
        raise LoraLabError("a classifier with a head of its own is not shown examples")


def outputs_of(classes: Classes, names: Mapping[Any, str]) -> list[int]:
    """For each class the output that the model's config (id2label) calls so; the outputs as they stand, where it calls them otherwise.

    >>> from lora_lab.data.tables.labels import classes_of
    >>> outputs_of(classes_of(["neg", "pos"]), {"0": "POSITIVE", "1": "NEGATIVE"})
    [1, 0]
    >>> outputs_of(classes_of(["anger", "joy"]), {"0": "LABEL_0", "1": "LABEL_1"})
    [0, 1]
    """
    outputs, wanted = {spoken(name): int(output) for output, name in names.items()}, [spoken(name) for name in classes.names]
    told = {*outputs} == {*wanted} and sorted(outputs.values()) == [*range(len(wanted))]
    return [outputs[name] for name in wanted] if told else [*range(len(classes))]


class NewHead(Head):
    """One that is put on; and without, the class whose text, or whose examples, are nearer."""

    new_head = True

    def __init__(self, tokenizer: Any, reading: Reading, classes: Classes) -> None:
        super().__init__(tokenizer, reading, classes)
        self._frozen: dict[str, Tensor] = {}  # text -> what the encoder as it was published makes of it

    def ways(self) -> list[Way]:
        words = ("{text}", "a {text} review", "This text is {text}.", "The writer's opinion is {text}.", "I feel {text} about it.")
        return [Way(each) for each in words]

    def answered(self, model: nn.Module, rows: Sequence[Row], way: Way | None) -> Tensor:
        if model_kind(model) == "classifier":
            return super().answered(model, rows, way)
        vectors = self._means(model, way.shots) if way and way.shots else self._called(model, way or self.ways()[0])
        return (self._vectors(model, [row["text"] for row in rows]) @ vectors.T).double()

    def prepared(self, model: Any, rows: Sequence[Row]) -> Any:
        """Heads of several models, as a sweep makes them, begin from the same features, which are made once."""
        rows = [rows[index] for index in some_of(rows, MOST_PROBED, lambda row: digest(row["text"]), lambda row: row["label"])]
        if new := [text for text in dict.fromkeys(row["text"] for row in rows) if text not in self._frozen]:
            pooling = replace(pooling_of(model), normalize=False)
            vectors = embed(model, self.tokenizer, new, EMBEDDED, pooling=pooling, progress=self.reading.progress).cpu()
            self._frozen.update(zip(new, vectors, strict=True))
        features, labels = torch.stack([self._frozen[row["text"]] for row in rows]), torch.tensor([row["label"] for row in rows])
        return with_pooled_head(model, linear_probe(features, labels, len(self.classes)))

    def restored(self, model: Any) -> Any:
        return with_pooled_head(model, nn.Linear(model.config.hidden_size, len(self.classes)))

    def _vectors(self, model: nn.Module, texts: list[str]) -> Tensor:
        pooling = replace(pooling_of(model), normalize=True)
        return embed(model, self.tokenizer, texts, EMBEDDED, pooling=pooling, progress=self.reading.progress).cpu()

    def _called(self, model: nn.Module, way: Way) -> Tensor:
        """[classes, H], of a text for each class."""
        return self._vectors(model, [filled(way.words, {"text": name}) for name in self.classes.names])

    def _means(self, model: nn.Module, shots: Sequence[Row]) -> Tensor:
        """[classes, H], the mean of each class's examples (Snell et al. 2017, arXiv:1703.05175: prototypes)."""
        vectors, labels = self._vectors(model, [shot["text"] for shot in shots]), torch.tensor([shot["label"] for shot in shots])
        return torch.stack([vectors[labels == label].mean(0) if (labels == label).any() else torch.zeros_like(vectors[0])
                            for label in range(len(self.classes))])  # fmt: skip
