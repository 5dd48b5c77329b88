"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library.

Two kinds exist for Llama models: byte-level BPE ("gpt2", with the name of how text is cut before merging) and SentencePiece's BPE
("llama", whose merges follow from the scores).
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ..errors import LoraLabError
from .tokenizer import Tokenizer

LONGEST_TOKEN = 1000  # characters: each place in it is looked at as a merge
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # llama.cpp's token types
# How text is cut before merging, by llama.cpp's name for it. None: the byte-level pre-tokenizer's own expression, GPT-2's.
LLAMA3_CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
CUTS: dict[str, Any] = {"gpt-2": [], "default": [], "smollm": ["digits"], "llama-bpe": [LLAMA3_CUT], "llama3": [LLAMA3_CUT]}


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """metadata: a GGUF file's fields. Raises LoraLabError for a kind that is not known here."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise LoraLabError(f"tokenizer.ggml.model={kind!r}: this version rebuilds 'gpt2' and 'llama'; put a tokenizer.json beside the file")
    needed = "tokenizer.ggml.merges" if kind == "gpt2" else "tokenizer.ggml.scores"
    if needed not in metadata:
        raise LoraLabError(f"the GGUF file lacks the field {needed!r}: its tokenizer cannot be rebuilt; put a tokenizer.json beside the file")
    if longest := [token for token in metadata["tokenizer.ggml.tokens"] if len(token) > LONGEST_TOKEN]:
        raise LoraLabError(f"a token of {len(longest[0]):,} characters: expected {LONGEST_TOKEN} at most")
    if not isinstance(metadata.get("tokenizer.chat_template"), (str, NoneType)):
        raise LoraLabError("tokenizer.chat_template is no text")
    backend = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    added = [(token, type_) for token, type_ in zip(tokens, types, strict=False) if type_ in (UNKNOWN, CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, type_ in added if type_ != USER_DEFINED])
    backend.add_tokens([AddedToken(token, normalized=False) for token, type_ in added if type_ == USER_DEFINED])
    special = {f"{name}_token": tokens[metadata[f"tokenizer.ggml.{field}_token_id"]]
               for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
               if f"tokenizer.ggml.{field}_token_id" in metadata}  # fmt: skip
    starts = kind == "llama" or CUTS[metadata.get("tokenizer.ggml.pre", "default")] == [LLAMA3_CUT]  # llama.cpp's defaults
    if metadata.get("tokenizer.ggml.add_bos_token", starts) and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
        )
    ends = (metadata.get(f"tokenizer.ggml.{field}_token_id") for field in ("eos", "eot"))  # of the text, of a turn
    return Tokenizer(backend, special, metadata.get("tokenizer.chat_template"), frozenset(end for end in ends if end is not None))


def _byte_level(metadata: dict[str, Any]) -> Backend:
    cut = metadata.get("tokenizer.ggml.pre", "default")
    if cut not in CUTS:
        raise LoraLabError(f"tokenizer.ggml.pre={cut!r}: expected one of {', '.join(CUTS)}; put a tokenizer.json beside the file")
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=CUTS[cut] == [LLAMA3_CUT]))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True) if step == "digits" else pre_tokenizers.Split(Regex(step), "isolated")
             for step in CUTS[cut]]  # fmt: skip
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[cut] != [LLAMA3_CUT]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any]) -> Backend:
    """A merge of two pieces is allowed where the result is a piece too; better scores merge first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    splits = [(-score, vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
              for token, score in zip(tokens, scores, strict=True) for cut in range(1, len(token))
              if token[:cut] in vocabulary and token[cut:] in vocabulary]  # fmt: skip
    merges = [(left, right) for *_, left, right in sorted(splits)]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Backend(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
