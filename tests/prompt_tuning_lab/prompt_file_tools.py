"""Small models of transformers and ours from the same weights, prompts that are never zero, and folders of PEFT's to read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import bert_tools
import decoder_tools
import llama_tools
import peft
import t5_tools
import torch
from safetensors.torch import load_file, save_file

from prompt_tuning_lab.injection import inject

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION", "classifier": "SEQ_CLS"}
POINTING = {"answers": "QUESTION_ANS", "tokens": "TOKEN_CLS"}  # heads on every position, which only transformers has
TOKENS, HIDDEN = 4, {"t5": 30}  # of other families 32
METHODS = {"prompt": {"method": "prompt"}, "p-tuning": {"method": "p-tuning", "encoder_hidden_size": 12},
           "residual": {"method": "residual", "encoder_hidden_size": 6}, "prefix": {"method": "prefix"},
           "prefix-mlp": {"method": "prefix", "prefix_projection": True, "encoder_hidden_size": 10}}  # fmt: skip
PEFT_METHODS = {"prompt": (peft.PromptTuningConfig, {}), "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12}),
                "prefix": (peft.PrefixTuningConfig, {}), "prefix-mlp": (peft.PrefixTuningConfig, {"prefix_projection": True})}  # fmt: skip
MAKERS = {"gpt2": lambda: decoder_tools.theirs("gpt2"), "llama": llama_tools.theirs, "t5": t5_tools.theirs,
          "bert": lambda: bert_tools.theirs("BertModel"), "classifier": lambda: bert_tools.theirs("BertForSequenceClassification"),
          "answers": lambda: bert_tools.theirs("BertForQuestionAnswering", num_labels=2),
          "tokens": lambda: bert_tools.theirs("BertForTokenClassification")}  # fmt: skip
OURS = {"gpt2": decoder_tools.ours, "llama": llama_tools.ours, "t5": t5_tools.ours, "bert": bert_tools.ours, "classifier": bert_tools.ours}


def theirs(family):
    """transformers' model in float64, the same weights in every call."""
    torch.manual_seed(0)
    return MAKERS[family]().double().eval()


def ours(family):
    return OURS[family](theirs(family).float()).double().eval()


MODELS = {"transformers": theirs, "ours": ours}


def batch(family):
    """Two rows, the second with padding on the right."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 60, (2, 9), generator=generator), torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"decoder_input_ids": ids[:, :5]} if family == "t5" else {})}


def answer(model, family):
    """What the model says of the text, at its real positions. A live PEFT answers for its virtual tokens, too: these are left out."""
    inputs = batch(family)
    with torch.no_grad():
        out = model(**inputs)
    if family == "answers":
        out.logits = torch.stack((out.start_logits, out.end_logits), -1)
    found = out.last_hidden_state if family == "bert" else out.logits
    if found.ndim == 2 or family == "t5":
        return found
    return found[:, -inputs["input_ids"].shape[1] :][inputs["attention_mask"].bool()]


def prompted(family, method, maker=theirs):
    """Ours, its numbers moved so that no part of them is zero or as it began."""
    torch.manual_seed(3)
    model = inject(maker(family), TOKENS, init="random", **METHODS[method])
    with torch.no_grad():
        for parameter in model.prompt().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def peft_model(family, method, **more):
    torch.manual_seed(4)
    kind, settings = PEFT_METHODS[method]
    config = kind(task_type={**TASKS, **POINTING}[family], num_virtual_tokens=TOKENS, **{**settings, **more})
    return peft.get_peft_model(theirs(family), config).eval()


def peft_folder(folder, family="gpt2", method="prompt", **more):
    """A folder as PEFT saves it, and the model."""
    model = peft_model(family, method, **more)
    model.save_pretrained(folder)
    return model


def written(folder):
    return json.loads((Path(folder) / CONFIG).read_text()), load_file(Path(folder) / TENSORS)


def edited(folder, config=None, drop=(), tensors=None):
    """The folder as PEFT writes it (no metadata of ours), with these keys and tensors changed; a tensor of None goes."""
    settings, stored = written(folder)
    settings = {key: value for key, value in {**settings, **(config or {})}.items() if key not in drop}
    stored = {key: value.contiguous() for key, value in {**stored, **(tensors or {})}.items() if value is not None}
    (Path(folder) / CONFIG).write_text(json.dumps(settings))
    save_file(stored, Path(folder) / TENSORS, {"format": "pt"})
    return folder


def state_of(model):
    """All that a refused verb must leave as it was."""
    return copy.deepcopy(model.state_dict()), {name: p.requires_grad for name, p in model.named_parameters()}, model.training


def assert_untouched(model, before):
    weights, trains, training = before
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in now)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains and model.training == training
