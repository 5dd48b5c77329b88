"""How good a model is, before and after: on rows with labels, on classes, on what it writes.

    perplexity(model, rows, tokenizer)                     exp of the mean loss over labelled tokens
    predict_classes(model, rows, tokenizer)                by a head; then accuracy(...), f1(...)
    score_choices(model, rows, tokenizer, choices)         by a language model's probability of each answer; then best_choices(...)
    auc(scores, labels)                                    how well scores rank, whatever the model is biased towards
    answers(model, rows, tokenizer)                        what it writes; then rouge(answers, references)
    write(model, rows, tokenizer)                          the same, and whether it stopped by itself; then clean_endings(...)
    unsupported_facts(text, source, ordinary)              numbers and names in a text that its source has not
    forgetting(model, metric)                              any metric, adapters off and on
    samples(model, prompts, tokenizer)                     texts side by side, the same random numbers in every column

Each runs in batches of like length, in eval mode, without gradients, and leaves the model as it was: mode, selection of adapters, weights.
"""

from .before_after import BeforeAfter, forgetting
from .choices import best_choices, score_choices
from .classes import F1, accuracy, class_logits, f1, predict_classes
from .likelihood import perplexity
from .ranking import auc
from .rouge_scores import Rouge, rouge
from .side_by_side import Samples, answers, samples
from .unsupported_facts import ordinary_words, unsupported_facts
from .writing import Written, clean_endings, write

__all__ = ["F1", "BeforeAfter", "Rouge", "Samples", "Written", "accuracy", "answers", "auc", "best_choices", "class_logits", "clean_endings", "f1",
           "forgetting", "ordinary_words", "perplexity", "predict_classes", "rouge", "samples", "score_choices", "unsupported_facts",
           "write"]  # fmt: skip
