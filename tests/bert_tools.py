"""Small BERTs and RoBERTas: transformers' and ours from the same random weights, and what they are compared by."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers
from llama_tools import gradients, relative_error
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.testing import assert_close

from lora_lab.models import Tokenizer
from lora_lab.models.loading import build

transformers.logging.set_verbosity_error()

VOCABULARY = 64
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
CLASSES = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification",
           "RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"]  # fmt: skip
LABELS = 3


def theirs(name: str, **changes: Any) -> Any:
    """transformers' model in eval mode; every parameter is random, norms and biases too, and large enough to matter."""
    family = "Roberta" if name.startswith("Roberta") else "Bert"
    given = {**SMALL, "num_labels": LABELS, **changes}
    pooling = {"add_pooling_layer": given.pop("add_pooling_layer")} if "add_pooling_layer" in given else {}
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**given), **pooling).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if parameter_name.lower().endswith(("layernorm.weight", "layer_norm.weight")):
                parameter.add_(1.0)
    return model


def ours(model: Any, **changes: Any) -> Any:
    """Our model with the weights of transformers' and the config it would save."""
    source = {**model.config.to_dict(), "architectures": [type(model).__name__], **changes}
    return build(source, ((name, tensor.clone()) for name, tensor in model.state_dict().items()), None, None)


def pair(name: str, **changes: Any) -> tuple[Any, Any]:
    model = theirs(name, **changes)
    return ours(model), model


def padding(name: str) -> int:
    return 1 if name.startswith("Roberta") else 0


def batch(name: str, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """ids and a mask that pads two of the rows, on the right."""
    ids, mask = torch.randint(3, VOCABULARY, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    for row, text in ((0, length - 3), (1, length - 1)):
        ids[row, text:], mask[row, text:] = padding(name), 0
    return {"input_ids": ids, "attention_mask": mask}


def labels_for(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Classes of the rows, words at every third position of the text, or nothing."""
    if name.endswith("ForSequenceClassification"):
        return {"labels": torch.arange(len(given["attention_mask"])) % LABELS}
    if name.endswith("ForMaskedLM"):
        length = given["attention_mask"].shape[1]
        labelled = (torch.arange(length) % 3 == 1) & given["attention_mask"].bool()
        return {"labels": torch.randint(3, VOCABULARY, labelled.shape).masked_fill(~labelled, -100)}
    return {}


def main_output(out: Any, mask: Tensor) -> Tensor:
    """The output of the text's positions, or of the rows."""
    tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    return tensor[mask.bool()] if tensor.ndim == 3 else tensor


def loss_of(model: Any, given: dict[str, Tensor], weights: Tensor) -> Tensor:
    """The model's own loss, or of a model without one a fixed weighing of both its outputs."""
    out = model(**given)
    if "labels" in given:
        return out.loss
    loss = (out.last_hidden_state * weights * given["attention_mask"][:, :, None]).mean()
    return loss if out.pooler_output is None else loss + (out.pooler_output * weights[:, 0]).mean()


def assert_same(mine: Any, reference: Any, given: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Output, loss and every gradient of two models, relative to the largest value; a gradient that is zero but for rounding, to all of them."""
    plain = {name: tensor for name, tensor in given.items() if name != "labels"}
    with torch.no_grad():
        outputs = [main_output(model(**plain), given["attention_mask"]) for model in (mine, reference)]
    assert relative_error(*outputs) < tolerance
    weights = torch.randn(*given["attention_mask"].shape, SMALL["hidden_size"])
    losses, slopes = [], []
    for model in (mine, reference):
        torch.manual_seed(7)  # the same dropout
        losses.append(loss_of(model.train(), given, weights))
        slopes.append(gradients(model, losses[-1]))
        model.eval()
    assert_close(*losses, rtol=tolerance, atol=tolerance)
    assert slopes[0].keys() == slopes[1].keys()
    largest = max(float(slope.abs().max()) for slope in slopes[1].values())
    for name, slope in slopes[0].items():
        scale = max(float(slopes[1][name].abs().max()), 1e-2 * largest)  # a key's bias moves all scores alike: its gradient is rounding
        assert float((slope - slopes[1][name]).abs().max()) < tolerance * scale, name
        assert slope.abs().max() > 0, name


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sat", "ran", "on", "a", "mat", "good", "bad", "film", "##s", "##ly",
         "was", "very", "not", "so"]  # fmt: skip


def word_pieces() -> Tokenizer:
    """BERT's kind of tokenizer, with a few words: lower case, WordPiece, [CLS] and [SEP]."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return Tokenizer(backend, special)
