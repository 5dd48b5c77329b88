"""Small, hand-written models that load real checkpoints, and what it takes to generate with them."""

from .base import CausalLMOutput, PretrainedModel
from .bert import BaseModelOutput, BertModel, RobertaModel
from .bert_config import BertConfig, RobertaConfig
from .bert_heads import (
    BertForMaskedLM,
    BertForSequenceClassification,
    MaskedLMOutput,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    SequenceClassifierOutput,
)
from .cache import KVCache
from .embedding import Pooling, embed
from .falcon import FalconConfig, FalconForCausalLM
from .generation import Generation, generate
from .gpt2 import GPT2Config, GPT2LMHeadModel
from .llama import LlamaConfig, LlamaForCausalLM
from .loading import load, save
from .neox import GPTNeoXConfig, GPTNeoXForCausalLM
from .seq2seq import Seq2SeqLMOutput
from .t5 import MT5ForConditionalGeneration, T5EncoderModel, T5ForConditionalGeneration
from .t5_config import T5Config
from .tokenizer import Tokenizer

__all__ = [
    "BaseModelOutput", "BertConfig", "BertForMaskedLM", "BertForSequenceClassification", "BertModel", "CausalLMOutput", "FalconConfig",
    "FalconForCausalLM", "GPT2Config", "GPT2LMHeadModel", "GPTNeoXConfig", "GPTNeoXForCausalLM", "Generation", "KVCache", "LlamaConfig",
    "LlamaForCausalLM", "MT5ForConditionalGeneration", "MaskedLMOutput", "Pooling", "PretrainedModel", "RobertaConfig", "RobertaForMaskedLM",
    "RobertaForSequenceClassification", "RobertaModel", "Seq2SeqLMOutput", "SequenceClassifierOutput", "T5Config", "T5EncoderModel",
    "T5ForConditionalGeneration", "Tokenizer", "embed", "generate", "load", "save",
]  # fmt: skip
