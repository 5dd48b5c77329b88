"""Rows of text to labelled batches."""

from .batching import Batch, collate, length_buckets, padding_share
from .chat_templates import CHAT_TEMPLATES, chat_template
from .formats import Row, Rows, load, read
from .mixtures import Mixture, mixture
from .on_disk import RowsOnDisk, open_rows
from .packing import collate_packed
from .padding import BatchCost, PaddingReport, padding_report
from .seq2seq import encode_answers, question_of
from .templates import Example, encode_rows, messages_of, prompt_of
from .verbalizing import filled, verbalize

__all__ = [
    "CHAT_TEMPLATES", "Batch", "BatchCost", "Example", "Mixture", "PaddingReport", "Row", "Rows", "RowsOnDisk", "chat_template",
    "collate", "collate_packed", "encode_answers", "encode_rows", "filled", "length_buckets", "load", "messages_of", "mixture", "open_rows",
    "padding_report", "padding_share", "prompt_of", "question_of", "read", "verbalize",
]  # fmt: skip
