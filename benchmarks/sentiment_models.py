"""The two models of the sentiment study, each with its way to answer: a language model by the next word, a sentence encoder by a head.

    SmolLM2     log P(" negative"), log P(" positive") after "Review: ...\nSentiment:"; learned is that one word
    MiniLM      linear(mean of the hidden states), the head beginning as the linear probe; without a head: the nearer of two vectors

A `Reader` makes a fresh model for each run, so that none sees what another has learned. Frozen features are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentiment_data import LABELS, Review
from torch import Tensor, nn

import lora_lab
from lora_lab.data import filled, length_buckets, verbalize
from lora_lab.models.base import pad_id_of
from lora_lab.models.embedding import Pooling
from lora_lab.models.generation import right_pad
from lora_lab.models.pooled_classifier import with_pooled_head
from lora_lab.training import score_choices
from lora_lab.training.evaluation import class_logits
from lora_lab.training.evaluation.passes import evaluating
from lora_lab.training.precision import storage_dtype
from lora_lab.training.probing import linear_probe
from prompt_tuning_lab import inject

Source = Callable[[torch.dtype], tuple[Any, Any]]  # a dtype -> a model with weights in it, and its tokenizer
MEAN = Pooling("mean", normalize=False)
HEAD_L2 = 0.1  # of the probe that a head begins as
BATCH = 32  # texts of like length that are read at once


class Reader:
    """A model of the study. name: as `models.load` knows it.  source: loads it.  precision: of `fit`."""

    name: str
    templates: Sequence[str]  # five ways to ask, for zero-shot
    has_head = False

    def __init__(self, source: Source, precision: str) -> None:
        self.source, self.precision = source, precision
        self.tokenizer = source(storage_dtype(precision))[1]
        self._features: dict[str, Tensor] = {}

    def fresh(self, train: Sequence[Review], whole: bool = False) -> Any:
        """A model as it was published. whole: all of it is to be trained, so its weights are float32."""
        raise NotImplementedError

    def ids(self, review: Review) -> list[int]:
        """What is read of a review."""
        raise NotImplementedError

    def example(self, review: Review) -> dict[str, Any]:
        """A row for `fit`."""
        raise NotImplementedError

    def scores(self, model: Any, reviews: Sequence[Review]) -> Tensor:
        """[n, 2], of negative and positive: the higher is the answer."""
        raise NotImplementedError

    def zero_shot(self, template: str, reviews: Sequence[Review]) -> Tensor:
        """The same of the model as it was published."""
        raise NotImplementedError

    def few_shot(self, examples: Sequence[Review], reviews: Sequence[Review]) -> Tensor:
        """The same, the model having been shown examples with their answers."""
        raise NotImplementedError

    def shown_bytes(self, examples: Sequence[Review]) -> int:
        """What the examples are kept as."""
        raise NotImplementedError

    def features(self, reviews: Sequence[Review]) -> Tensor:
        """[n, H] of the frozen model, each text read once in the life of this object."""
        if new := list(dict.fromkeys(review.text for review in reviews if review.text not in self._features)):
            self._features.update(zip(new, self._read(new), strict=True))
        return torch.stack([self._features[review.text] for review in reviews])

    def _read(self, texts: list[str]) -> Tensor:
        """[n, H], float32."""
        model, rows = self._frozen(), [self.ids(Review(text, 0)) for text in texts]
        found: dict[int, Tensor] = {}
        with evaluating(model, self.precision):
            for indices in length_buckets([len(row) for row in rows], BATCH):
                ids, mask = right_pad([rows[i] for i in indices], pad_id_of(self.tokenizer))
                found.update(zip(indices, self._feature(model, ids, mask).float(), strict=True))
        return torch.stack([found[index] for index in range(len(rows))])

    def _frozen(self) -> Any:
        return self.source(storage_dtype(self.precision))[0].requires_grad_(False)

    def _feature(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


# A language model -----------------------------------------------------------------------------------------------------------------


class LanguageModel(Reader):
    """Answers by the likelier of two words."""

    name = "smollm2-135m-instruct-q4"
    template = "Review: {text}\nSentiment:"
    templates = (
        template,
        "{text}\nThe sentiment of this review is",
        "Movie review: {text}\nIs this review positive or negative? It is",
        "Classify the review as positive or negative.\nReview: {text}\nAnswer:",
        "<|im_start|>user\nIs this movie review positive or negative?\n{text}<|im_end|>\n<|im_start|>assistant\nThe review is",
    )
    answers = tuple(f" {label}" for label in LABELS)  # one token each

    def fresh(self, train: Sequence[Review], whole: bool = False) -> Any:
        return self.source(torch.float32 if whole else storage_dtype(self.precision))[0]

    def ids(self, review: Review) -> list[int]:
        return self._encode(filled(self.template, vars(review)))

    def example(self, review: Review) -> dict[str, Any]:
        """The text, and behind it the answer, which alone has a label."""
        row: dict[str, Any] = verbalize([vars(review)], self.tokenizer, self.template, self.answers, end=False)[0]
        return row

    def scores(self, model: Any, reviews: Sequence[Review]) -> Tensor:
        return self._scores(model, self.template, reviews)

    def zero_shot(self, template: str, reviews: Sequence[Review]) -> Tensor:
        return self._scores(self._frozen(), template, reviews)

    def few_shot(self, examples: Sequence[Review], reviews: Sequence[Review]) -> Tensor:
        """The examples are read once: what the model keeps of them is a prefix before each text."""
        shown = self._shown(examples)
        prompted = inject(self._frozen(), len(self._encode(shown)), method="prefix", init="text", text=shown, tokenizer=self.tokenizer)
        return self.scores(prompted, reviews)

    def shown_bytes(self, examples: Sequence[Review]) -> int:
        return len(self._shown(examples).encode())

    def _shown(self, examples: Sequence[Review]) -> str:
        return "".join(filled(self.template, vars(review)) + self.answers[review.label] + "\n\n" for review in examples)

    def _scores(self, model: Any, template: str, reviews: Sequence[Review]) -> Tensor:
        prompts = [self._encode(filled(template, vars(review))) for review in reviews]
        options = {"batch_size": BATCH, "precision": self.precision, "use_cache": False, "progress": False}
        return score_choices(model, prompts, self.tokenizer, self.answers, **options)  # type: ignore[arg-type]

    def _feature(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """Of the last token before the answer. Padding stands on the right, where no text looks."""
        hidden = model.decoder(model.get_input_embeddings()(ids), torch.arange(ids.shape[1])[None], None, None, None)
        return hidden[torch.arange(len(ids)), mask.sum(1) - 1]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


# A sentence encoder ---------------------------------------------------------------------------------------------------------------


class SentenceEncoder(Reader):
    """Answers by a head, or by which of two texts is nearer."""

    name = "all-minilm-l6-v2"
    templates = ("{label}", "a {label} review", "This movie review is {label}.", "The critic's opinion of the film is {label}.",
                 "I feel {label} about this movie.")  # fmt: skip
    has_head = True

    def fresh(self, train: Sequence[Review], whole: bool = False) -> Any:
        """The head begins as the probe of the frozen features (Kumar et al. 2022, arXiv:2202.10054), so one learning rate does for all."""
        encoder = self.source(torch.float32 if whole else storage_dtype(self.precision))[0]
        return with_pooled_head(encoder, self.probe(train, HEAD_L2))

    def probe(self, train: Sequence[Review], l2: float) -> nn.Linear:
        return linear_probe(self.features(train), torch.tensor([review.label for review in train]), l2=l2)

    def ids(self, review: Review) -> list[int]:
        return [int(i) for i in self.tokenizer(review.text)["input_ids"]]

    def example(self, review: Review) -> dict[str, Any]:
        return {"input_ids": self.ids(review), "label": review.label}

    def scores(self, model: Any, reviews: Sequence[Review]) -> Tensor:
        rows = [self.example(review) for review in reviews]
        return class_logits(model, rows, self.tokenizer, batch_size=BATCH, precision=self.precision, progress=False)

    def zero_shot(self, template: str, reviews: Sequence[Review]) -> Tensor:
        return self._nearness(reviews, self.features([Review(template.format(label=label), 0) for label in LABELS]))

    def few_shot(self, examples: Sequence[Review], reviews: Sequence[Review]) -> Tensor:
        """The nearer mean of the examples of each class."""
        means = [F.normalize(self.features([each for each in examples if each.label == label]), dim=-1).mean(0) for label in range(len(LABELS))]
        return self._nearness(reviews, torch.stack(means))

    def shown_bytes(self, examples: Sequence[Review]) -> int:
        return 4 * len(LABELS) * self.features(examples).shape[1]

    def _nearness(self, reviews: Sequence[Review], vectors: Tensor) -> Tensor:
        return F.normalize(self.features(reviews), dim=-1) @ F.normalize(vectors, dim=-1).T

    def _feature(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        return MEAN(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def published(name: str) -> Source:
    """A model of the catalogue."""
    task = {"task": "feature-extraction"} if name == SentenceEncoder.name else {}
    return lambda dtype: lora_lab.models.load(name, dtype=dtype, **task)  # type: ignore[arg-type]


READERS: dict[str, type[Reader]] = {reader.name: reader for reader in (SentenceEncoder, LanguageModel)}
