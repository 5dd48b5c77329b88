"""How good a model is, before and after: on rows with labels, on classes, on what it writes.

    perplexity(model, rows, tokenizer)                     exp of the mean loss over labelled tokens
    predict_classes(model, rows, tokenizer)                by a head; then accuracy(...), f1(...)
    score_choices(model, rows, tokenizer, choices)         by a language model's probability of each answer; then best_choices(...)
    answers(model, rows, tokenizer)                        what it writes; then rouge(answers, references)
    forgetting(model, metric)                              any metric, adapters off and on
    samples(model, prompts, tokenizer)                     texts side by side, the same random numbers in every column

Each runs in batches of like length, in eval mode, without gradients, and leaves the model as it was: mode, selection of adapters, weights.
"""

from .before_after import BeforeAfter, forgetting
from .choices import best_choices, score_choices
from .classes import F1, accuracy, class_logits, f1, predict_classes
from .likelihood import perplexity
from .rouge_scores import Rouge, rouge
from .side_by_side import Samples, answers, samples

__all__ = ["F1", "BeforeAfter", "Rouge", "Samples", "accuracy", "answers", "best_choices", "class_logits", "f1", "forgetting", "perplexity",
           "predict_classes", "rouge", "samples", "score_choices"]  # fmt: skip
