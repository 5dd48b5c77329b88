"""Rows of an embedding that train, for single words of the vocabulary."""
