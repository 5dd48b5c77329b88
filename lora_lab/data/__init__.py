"""Rows of text to labelled batches."""

from .batching import Batch, collate, length_buckets, padding_share
from .formats import Row, Rows, load, read
from .templates import Example, encode_rows, messages_of, prompt_of

__all__ = [
    "Batch", "Example", "Row", "Rows", "collate", "encode_rows", "length_buckets", "load", "messages_of", "padding_share", "prompt_of", "read",
]  # fmt: skip
