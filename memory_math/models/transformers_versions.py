"""How transformers' Llama and its relatives differed before: what a version made and kept that today's does not.

    before 4.31     RMSNorm keeps its 16-bit input beside the float32 one; no float32 logits; eager scores pass torch.max, which keeps them
    before 4.43     every block looks its cos and sin up, and keeps them
    4.38, 4.39      a causal mask is always given, so q, k and v are laid out anew for the memory-efficient kernel; in 4.38 with one copy
                    of the mask per block
    4.48 to 4.55    q, k and v are always laid out anew; the kernel's output follows q's layout and is copied on its way to o_proj
    before 4.54     k and v of grouped queries are repeated to q's width
    before 4.42, from 4.45 on    training without checkpointing fills a cache of keys and values (use_cache is True unless it is turned off); until
                    4.55 it holds tensors of its own where attention works on copies

Read in the releases' modeling_llama.py, integrations/sdpa_attention.py and cache_utils.py (4.28.1 to 4.56.2 on PyPI).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..versions import Versions


@dataclass(frozen=True)
class Habits:
    """What one version does; all False is transformers 5.23."""

    norm_keeps_input: bool
    bounded_scores: bool
    rotary_per_block: bool
    masked: bool
    mask_per_block: bool
    lays_out: bool
    copies_output: bool
    repeats: bool
    caches: bool


def habits_of(versions: Versions) -> Habits:
    """The habits of the version of transformers that a request names."""

    def before(version: str) -> bool:
        return versions.before("transformers", version)

    masked = not before("4.38") and before("4.40")
    laid_out = not before("4.48") and before("4.56")
    return Habits(
        norm_keeps_input=before("4.31"),
        bounded_scores=before("4.31"),
        rotary_per_block=before("4.43"),
        masked=masked,
        mask_per_block=masked and before("4.39"),
        lays_out=masked or laid_out,
        copies_output=laid_out,
        repeats=before("4.54"),
        caches=before("4.42") or (not before("4.45") and before("4.56")),
    )
