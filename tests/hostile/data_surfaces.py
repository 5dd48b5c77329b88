"""Rows that are learned from, what a run left to go on from, small files of ours, and configurations that memory is computed for."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from adapter_surfaces import Case
from model_surfaces import CONFIGS, KEYS
from mutations import nasty, nested, spoilt_bytes, spoilt_json, spoilt_safetensors, text_of
from tiny_workshop import chat_tokenizer, our_llama

import lora_lab
import memory_math
from lora_lab.data import tables
from lora_lab.data.formats import load
from lora_lab.data.objectives import CausalObjective, ClassificationObjective
from lora_lab.tasks.record import read_record
from lora_lab.training.report import read_run, summary

ROWS = [{"instruction": "Say a word.", "input": "any", "output": "word"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant",
        "content": "b"}]},
        {"text": "good", "label": 1}, {"dialogue": "A: hi\nB: hello", "summary": "They greet."}, {"input_ids": [1, 2, 3], "labels": [-100, 2,
        3]}]  # fmt: skip
MATERIAL = {"sentiment": ("text", "label"), "summarization": ("dialogue", "summary"), "instruction": ("instruction", "response"),
"reviews": ("product", "review")}


def rows(folder: Path) -> Case:
    """data.load of JSON and JSONL; what it takes is encoded."""
    folder.mkdir(parents=True)
    words = chat_tokenizer()

    def case(rng: random.Random) -> None:
        path = folder / rng.choice(("rows.jsonl", "rows.json"))
        path.write_bytes(_written(path, [rng.choice(ROWS) for _ in range(rng.choice((1, 2, 5)))], rng))
        found, _ = load(path)
        objective = ClassificationObjective(2) if "label" in found[0] else CausalObjective()
        objective.encode(found, words, rng.choice((None, 64)))

    return case


def _written(path: Path, values: list[Any], rng: random.Random) -> bytes:
    """One of the rows spoilt, or the file as a whole."""
    number = rng.randrange(len(values))
    match rng.randrange(6):
        case 0:
            values[number] = nasty(rng)
        case 1:
            values[number] = nested(rng.choice((10, 990, 100_000)) if rng.random() < 0.2 else 20, rng.choice(("list", "object")))
        case 2 | 3 | 4:
            values[number] = spoilt_json(values[number], rng, ("label", "text", "messages", "input_ids", "labels", "role", "content", "summary"))
    try:
        texts = [json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass") for value in values]
    except RecursionError:
        texts = [b'{"a":' * 100_000, *[b"1"]]
    data = b"[" + b",\n".join(texts) + b"]" if path.suffix == ".json" else b"\n".join(texts)
    return spoilt_bytes(data, rng) if rng.random() < 0.3 else data


def material(folder: Path) -> Case:
    """Tables of anybody's columns, as a --task gathers them: CSV, TSV, JSON, JSONL."""
    folder.mkdir(parents=True)

    def case(rng: random.Random) -> None:
        task = rng.choice([*MATERIAL])
        path = folder / rng.choice(("train.csv", "train.tsv", "train.jsonl", "train.json", "train.txt"))
        cells = [{name: f"{name} {n}" if name != "label" else ["pos", "neg"][n % 2] for name in MATERIAL[task]} for n in range(rng.choice((1, 12,
        30)))]
        path.write_bytes(_written(path, cells, rng) if path.suffix.startswith(".json") else _separated(path, cells, rng))
        found = tables.read_parts(path)
        assert all(len(table) for table in found.values())
        lora_lab.tasks.gather(task, path)

    return case


def _separated(path: Path, cells: list[dict[str, str]], rng: random.Random) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else rng.choice(",;|"))
    if rng.random() < 0.2:
        cells[0][rng.choice([*cells[0]])] = rng.choice(('"' * 1001, "x" * 300_000, "\0", "\n" * 50, "a,b;c|d\te"))
    writer.writerows([[*cells[0]], *([*row.values()] for row in cells)])
    data = text.getvalue().encode("utf-8", "surrogatepass")
    return spoilt_bytes(data, rng) if rng.random() < 0.6 else data


def snapshots(folder: Path) -> Case:
    """fit(resume=True) over a snapshot whose numbers or tensors are others; the checksum beside them is right."""
    from lora_lab.training import fit

    def learner() -> Any:
        return lora_lab.inject(our_llama(num_hidden_layers=1), rank=2)

    data = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 6
    asked = {"max_steps": 3, "micro_batch_size": 2, "learning_rate": 1e-3, "output_dir": str(folder / "run"), "save_every": 2, "keep_snapshots": 1,
             "progress": False}  # fmt: skip
    fit(learner(), data, {**asked, "max_steps": 4})
    (place,) = (folder / "run" / "snapshots").iterdir()
    fit(learner(), data, {**asked, "max_steps": 4})
    tensors, state = (place / "tensors.safetensors").read_bytes(), json.loads((place / "state.json").read_bytes())
    model = learner()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def case(rng: random.Random) -> None:
        model.load_state_dict(start)
        spoilt = spoilt_safetensors(tensors, rng) if rng.random() < 0.5 else tensors
        value = spoilt_json(state, rng) if spoilt is tensors or rng.random() < 0.2 else dict(state)
        if isinstance(value, dict) and "tensors_sha256" in value:
            value["tensors_sha256"] = hashlib.sha256(spoilt).hexdigest()
        place.mkdir(exist_ok=True)
        (place / "tensors.safetensors").write_bytes(spoilt), (place / "state.json").write_bytes(text_of(value, rng))
        log = folder / "run" / "log.jsonl"
        log.write_bytes(b'{"step": 1, "loss": 1.0}\n')
        try:
            result = fit(model, data, {**asked, "max_steps": 4, "resume": True})
        except lora_lab.LoraLabError:
            assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items()), "a refused snapshot changed the model"
            raise
        assert result.steps == 4 and log.stat().st_size < 1_000_000

    return case


def small_files(folder: Path) -> Case:
    """What an adapter was taught, and a run's log."""
    folder.mkdir(parents=True)
    taught = {"task": "sentiment", "words": "Is it good?", "columns": {"text": "t"}, "classes": {"names": ["no", "yes"], "of": {"0": 0, "1": 1}}}
    log = [{"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 8, "skipped": False, "seconds": 0.1, "peak_bytes": 100},
           {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 1.5, "tokens": 16, "seconds": 0.2}]  # fmt: skip

    def case(rng: random.Random) -> None:
        if rng.random() < 0.6:
            (folder / "lora_lab_task.json").write_bytes(text_of(spoilt_json(taught, rng), rng))
            record = read_record(folder, "sentiment")
            assert record is not None
            assert record.classes is None or all(0 <= number < len(record.classes.names) for number in record.classes.of.values())
        else:
            (folder / "log.jsonl").write_bytes(b"\n".join(text_of(each, rng) for each in spoilt_json(log, rng)) + b"\n")
            assert isinstance(summary([read_run(folder)]), str)

    return case


def predictions(folder: Path) -> Case:
    """memory_math.predict of a configuration, as a dict or in a file, and of absurd requests."""
    folder.mkdir(parents=True)
    types = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen3ForCausalLM": "qwen3", "GPT2LMHeadModel": "gpt2",
             "GPTNeoXForCausalLM": "gpt_neox", "FalconForCausalLM": "falcon", "T5ForConditionalGeneration": "t5",
             "BertForSequenceClassification": "bert"}  # fmt: skip
    good = [{**CONFIGS[name], "model_type": kind, "architectures": [name]} for name, kind in types.items()]
    good.append({**CONFIGS["MistralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "architectures": ["MixtralForCausalLM"]})
    words: dict[str, list[Any]] = {
        "method": ["full", "lora", "dora", "qlora", "prompt", "prefix", "inference"], "batch_size": [1, 2, 10**9, -1], "sequence_length": [8, 10**12,
        0],
        "rank": [1, 10**6, 10**30], "precision": ["fp32", "bf16-mixed"], "gradient_checkpointing": [True, 3, "attention"], "dropout": [0.1, 2],
        "world_size": [2, 10**12], "zero_stage": [1, 9], "tensor_parallel": [2, 7], "num_virtual_tokens": [5, 10**9], "grad_accum_steps": [2, 10**9],
        "target_modules": ["attention", ["q_proj"], ["x"]], "implementation": ["lora_lab"],
    }  # fmt: skip

    def case(rng: random.Random) -> None:
        config = spoilt_json(rng.choice(good), rng, KEYS) if rng.random() < 0.8 else dict(rng.choice(good))
        asked = {name: rng.choice([*words[name], nasty(rng)]) for name in rng.sample([*words], rng.choice((0, 0, 1, 2)))}
        source: Any = config
        if rng.random() < 0.2 or not isinstance(config, dict):
            source = folder / "config.json"
            source.write_bytes(text_of(config, rng))
        footprint = memory_math.predict(source, **{"sequence_length": 16, **asked})
        assert footprint.total > 0 and str(footprint)

    return case



