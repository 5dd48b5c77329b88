"""Adapters merged into checkpoints that need not fit into memory."""

from .merge import merge_checkpoint

__all__ = ["merge_checkpoint"]
