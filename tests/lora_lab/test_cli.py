"""The command line in process: the way through, and every mistake as one line, exit code 2, and nothing touched."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from command_line import CONTEXT, check_refusal, half, run
from safetensors.torch import load_file
from tiny_workshop import chat_tokenizer, our_llama, plain_tokenizer, text_rows

import lora_lab
from lora_lab.__main__ import main
from lora_lab.commands.shared import exit_code
from lora_lab.models import loading

ROOT = Path(lora_lab.__file__).parent.parent


# The way through ------------------------------------------------------------------------------------------------------------


def test_help_is_there_as_a_module():
    result = subprocess.run([sys.executable, "-m", "lora_lab", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and not result.stderr
    assert all(command in result.stdout for command in ("finetune", "generate", "inspect", "demo"))


def test_finetune_generate_and_inspect_work_one_after_the_other(shop, capsys):
    out = shop.folder / "new"
    assert shop.finetune(out=out, **{"eval-data": shop.rows, "epochs": 2, "max-steps": None, "micro-batch-size": 2, "learning-rate": 0.02}) == 0
    printed = capsys.readouterr().out
    held_out = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", printed)
    assert float(held_out[2]) < float(held_out[1])
    assert re.search(r"parameters are trainable.*\nmemory: .*GiB(.|\n)*in 6 steps.*\nadapter saved to ", printed)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "log.jsonl"]
    assert len((out / "log.jsonl").read_text().splitlines()) == 6 + 2

    assert shop.inspect(adapter=out) == 0
    printed = capsys.readouterr().out
    assert "q_proj" in printed and "A [2, 16]" in printed
    texts = []
    for adapter in (None, out, out):
        assert shop.generate(adapter=adapter, seed=3, temperature=0.9) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1] == texts[2]


def test_several_prompts_are_printed_with_their_answers(shop, capsys):
    assert main(["generate", "--model", str(shop.model), "--prompt", "One?", "--prompt", "Two?", "--max-new-tokens", "2", "--precision", "fp32"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("> One?\n") and "\n> Two?\n" in out and "tokens" in err


def test_inspect_shows_the_plan_without_an_adapter(shop, capsys):
    assert shop.inspect(rank=4, precision="auto", **{"target-modules": ["q_proj", "v_proj"]}) == 0
    assert "4 layers, 448 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "layers"), [(["all-linear"], 14), (["attention"], 8), (["q_proj"], 2), (["q_proj", "mlp.up_proj"], 4),
                                               ([r".*layers\.0\..*_proj"], 7), (["model.layers.1.mlp.up_proj"], 1)])  # fmt: skip
def test_target_modules_are_a_keyword_names_or_one_regular_expression(shop, capsys, words, layers):
    assert shop.inspect(**{"target-modules": words}) == 0
    assert re.search(rf"total +{layers} layers", capsys.readouterr().out)


def test_the_seed_decides_everything(shop):
    """The adapter's first values included: the same command makes the same file."""
    tensors = {}
    for name, seed in (("first", 1), ("second", 1), ("third", 2)):
        torch.rand(len(tensors) + 1)
        assert shop.finetune(out=shop.folder / name, seed=seed, dropout=0.1) == 0
        tensors[name] = load_file(shop.folder / name / "adapter_model.safetensors")
    assert all(torch.equal(tensor, tensors["second"][key]) for key, tensor in tensors["first"].items())
    assert not any(torch.equal(tensor, tensors["third"][key]) for key, tensor in tensors["first"].items())


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed", "fp16-mixed", "auto"])
def test_every_precision_runs_and_saves_float32(shop, precision):
    assert shop.finetune(out=shop.folder / "new", precision=precision, **{"gradient-checkpointing": True}) == 0
    assert {tensor.dtype for tensor in load_file(shop.folder / "new" / "adapter_model.safetensors").values()} == {torch.float32}
    assert shop.generate(adapter=shop.folder / "new", precision=precision) == 0


def test_peft_computes_the_same_with_the_adapter(shop):
    ids = torch.tensor([[1, 2, 3, 4]])
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(shop.model), shop.adapter).eval()
    model, _ = lora_lab.models.load(shop.model)
    with torch.no_grad():
        base = model(input_ids=ids).logits
        ours = lora_lab.load(model, shop.adapter)(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, base, atol=1e-3)


def test_a_model_without_a_chat_template_takes_instructions(shop, capsys):
    loading.save(our_llama(max_position_embeddings=512), shop.folder / "plain", plain_tokenizer())
    assert shop.finetune(model=shop.folder / "plain", out=shop.folder / "new") == 0
    assert shop.generate(model=shop.folder / "plain", adapter=shop.folder / "new") == 0


def test_warnings_are_one_line_and_the_callers_own_come_back(shop, capsys):
    import warnings

    before = warnings.showwarning
    loading.save(our_llama(seed=2, max_position_embeddings=CONTEXT), shop.folder / "other", chat_tokenizer())
    assert shop.generate(model=shop.folder / "other", adapter=shop.adapter) == 0  # shapes fit, weights differ
    assert re.search(r"^warning: .*trained on a base with SHA-256 .*$", capsys.readouterr().err, re.MULTILINE)
    assert warnings.showwarning is before


# Mistakes -------------------------------------------------------------------------------------------------------------------


def rows(text):
    return lambda shop: {"data": shop.file("bad.jsonl", text)}


GOOD_ROW = json.dumps(text_rows(1)[0])
BAD_FINETUNES = {
    "unknown model": ({"model": "smollm2-135m-instruct-q5"}, "unknown model.*did you mean 'smollm2-135m-instruct-q4'"),
    "a model folder without a model": (lambda shop: {"model": shop.adapter}, "config.json is missing"),
    "unknown data": ({"data": "revews"}, "no data at 'revews'.*did you mean 'reviews'"),
    "unknown precision": ({"precision": "fp8"}, "--precision fp8: expected auto, fp32"),
    "unknown device": ({"device": "gpu"}, "--device gpu"),
    "a device that holds no numbers": ({"device": "meta"}, "--device meta"),
    "unknown schedule": ({"schedule": "cosin"}, "did you mean 'cosine'"),
    "a target that matches nothing": ({"target-modules": ["q_prj"]}, r"'q_prj' matches nothing\.\n  Linear layers here: .*did you mean 'q_proj'"),
    "a broken regular expression": ({"target-modules": ["q_(proj"]}, "is not a regular expression"),
    "rank 0": ({"rank": 0}, "rank=0: expected a whole number of at least 1, at most 2,147,483,647"),
    "alpha nan": ({"alpha": "nan"}, "alpha=nan"),
    "dropout 1": ({"dropout": 1}, "dropout=1.0: expected 0 <= dropout < 1"),
    "learning rate 0": ({"learning-rate": 0}, "learning_rate=0.0"),
    "steps 0": ({"max-steps": 0}, "max_steps=0"),
    "empty data": (rows("\n"), "holds no rows"),
    "broken data": (rows("{oops\n"), r"bad.jsonl, line 1, column 2: not JSON"),
    "a row without output": (rows(f'{GOOD_ROW}\n{{"instruction": "Say two."}}\n'), "bad.jsonl, line 2: the row has no 'output'"),
    "half a character": (rows(r'{"instruction": "Say", "output": "\ud83d"}'), "bad.jsonl, line 1: 'output' holds"),
    "a row longer than the context": (rows(f"{GOOD_ROW}\n\n" + json.dumps({"instruction": "Say", "output": "x" * CONTEXT})),
                                      rf"bad.jsonl, line 3: the row has \d+ tokens, .*{CONTEXT}"),
    "a row longer than max-length": ({"max-length": 30}, r"rows.jsonl, line 1: the row has \d+ tokens, .*30"),
    "bad held-out rows": (lambda shop: {"eval-data": shop.file("bad.jsonl", "[]")}, "bad.jsonl holds no rows"),
    "a file where the folder should be": (lambda shop: {"out": shop.rows}, "could not save"),
    "a folder below a file": (lambda shop: {"out": shop.rows / "adapter"}, "could not save"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_FINETUNES.values(), ids=BAD_FINETUNES)
def test_a_finetune_that_makes_no_sense_is_refused_before_anything_is_written(shop, capsys, change, message):
    change = change(shop) if callable(change) else change
    before = shop.contents()
    check_refusal(shop.finetune(**change), capsys, message)
    assert shop.contents() == before


def test_a_folder_that_cannot_be_written_is_refused_before_training(shop, capsys, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(lora_lab.files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(lora_lab.training, "fit", pytest.fail)
    before = shop.contents()
    check_refusal(shop.finetune(), capsys, "Read-only file system")
    assert shop.contents() == before


def test_a_loss_that_is_not_a_number_leaves_the_earlier_adapter(shop, capsys):
    before = shop.contents()
    check_refusal(shop.finetune(**{"learning-rate": 1e30, "max-steps": 10}), capsys, r"the (loss|gradient's norm) is (nan|inf) at step \d+")
    untouched(shop, before)


def untouched(shop, before):
    """All but the log, which is the failed run's own; the earlier one is kept beside it."""
    after, log, earlier = shop.contents(), str(shop.adapter / "log.jsonl"), str(shop.adapter / "log.previous.jsonl")
    assert after.pop(earlier) == before[log]
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {log}


@pytest.mark.parametrize("place", ["tensors", "rename"])
def test_a_full_disk_while_saving_leaves_the_earlier_adapter(shop, capsys, monkeypatch, place):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_adapters(source, target):
        return full() if Path(target).name.startswith("adapter_") else rename(source, target)

    rename = os.replace
    monkeypatch.setattr(*((lora_lab.checkpoint, "save_file", full) if place == "tensors" else (os, "replace", full_for_adapters)))
    before = shop.contents()
    check_refusal(shop.finetune(seed=5), capsys, "could not save adapter 'default'.*No space left on device")
    untouched(shop, before)


def test_a_model_without_a_tokenizer_is_refused(shop, capsys):
    (shop.model / "tokenizer.json").unlink()
    before = shop.contents()
    check_refusal(shop.finetune(), capsys, "tokenizer")
    check_refusal(shop.generate(), capsys, "no tokenizer.json")
    assert shop.contents() == before


def test_damaged_files_are_named(shop, capsys):
    half(shop.adapter / "adapter_model.safetensors")
    for command in (shop.generate, shop.inspect):
        check_refusal(command(adapter=shop.adapter), capsys, r"adapter_model\.safetensors is truncated")
    half(shop.model / "model.safetensors")
    before = shop.contents()
    for command in (shop.generate, shop.inspect, shop.finetune):
        check_refusal(command(), capsys, r"model\.safetensors is truncated")
    (shop.model / "config.json").write_text("{")
    check_refusal(shop.inspect(), capsys, r"config\.json is not JSON")
    assert {name for name, content in shop.contents().items() if content != before[name]} == {str(shop.model / "config.json")}


def test_an_adapter_of_another_model_is_refused(shop, capsys):
    loading.save(our_llama(hidden_size=32, max_position_embeddings=CONTEXT), shop.folder / "wider", chat_tokenizer())
    loading.save(our_llama(num_hidden_layers=1, max_position_embeddings=CONTEXT), shop.folder / "flatter", chat_tokenizer())
    check_refusal(shop.generate(model=shop.folder / "wider", adapter=shop.adapter), capsys, "another model, or a wrong rank")
    check_refusal(shop.inspect(model=shop.folder / "flatter", adapter=shop.adapter), capsys, "an adapter for another model: it adapts")


BAD_USES = {
    "unknown adapter folder": ("generate", {"adapter": "nowhere"}, "adapter folder 'nowhere' does not exist"),
    "unknown adapter folder to look at": ("inspect", {"adapter": "nowhere"}, "adapter folder 'nowhere' does not exist"),
    "unknown model": ("generate", {"model": "smollm"}, "unknown model 'smollm'"),
    "unknown precision": ("generate", {"precision": "int8"}, "--precision int8: expected auto"),
    "unknown precision to look at": ("inspect", {"precision": "int8"}, "--precision int8: expected auto"),
    "unknown device": ("inspect", {"device": "gpu"}, "--device gpu"),
    "temperature below zero": ("generate", {"temperature": "-1"}, "temperature=-1.0"),
    "an empty prompt": ("generate", {"prompt": "", "raw": True}, "prompt 0 is empty"),
    "a prompt beyond the context": ("generate", {"prompt": "x" * CONTEXT}, f"the model's context is {CONTEXT}"),
    "no tokens": ("generate", {"max-new-tokens": 0}, "max_new_tokens=0"),
    "a target that matches nothing": ("inspect", {"target-modules": ["q_prj"]}, "'q_prj' matches nothing"),
}


@pytest.mark.parametrize(("command", "change", "message"), BAD_USES.values(), ids=BAD_USES)
def test_a_use_that_makes_no_sense_is_refused(shop, capsys, command, change, message):
    before = shop.contents()
    check_refusal(getattr(shop, command)(**change), capsys, message)
    assert shop.contents() == before


def test_letters_that_stdout_cannot_write_are_replaced(monkeypatch):
    """As in a pipe of Windows: a table of hours must not end in UnicodeEncodeError."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert exit_code(argparse.Namespace(run=lambda options: print("80.0 \N{PLUS-MINUS SIGN} 2.0"))) == 0
    out.flush()
    assert out.buffer.getvalue().split() == [b"80.0", b"?", b"2.0"]


def test_the_demo_refuses_a_folder_that_cannot_be_written_before_it_loads_anything(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_lab.demo.data.load", None)
    (tmp_path / "file").write_text("")
    check_refusal(run("demo", precision="fp32", out=tmp_path / "file" / "demo"), capsys, "could not save anything to")


def test_the_demo_refuses_an_unknown_precision_before_it_loads_anything(capsys, tmp_path):
    check_refusal(run("demo", precision="fp8", out=tmp_path / "demo"), capsys, "precision='fp8': expected one of")
    assert list(tmp_path.iterdir()) == []


def test_without_the_gguf_extra_its_name_is_in_the_error(shop, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
    check_refusal(shop.inspect(model=shop.file("model.gguf", "GGUF")), capsys, r"pip install 'lora-lab\[gguf\]'")
    check_refusal(shop.inspect(model="smollm2-135m-instruct-q4"), capsys, r"pip install 'lora-lab\[gguf\]'")


def test_a_broken_gguf_file_is_named(shop, capsys):
    check_refusal(shop.inspect(model=shop.file("model.gguf", "GGUF")), capsys, r"model\.gguf is truncated or not a GGUF file")


@pytest.mark.parametrize("words", [[], ["train"], ["finetune"], ["finetune", "--rank", "two"], ["generate", "--model", "m"]])
def test_what_the_parser_refuses_is_exit_code_2_too(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_interrupting_is_no_traceback(shop, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_lab.training, "fit", interrupt)
    before = shop.contents()
    assert shop.finetune() == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert shop.contents() == before


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16)])
def test_precision_says_what_the_base_is_stored_in_whatever_the_file_holds(shop, precision, dtype):
    from lora_lab.__main__ import parser
    from lora_lab.commands.shared import load_model

    model, tokenizer = lora_lab.models.load(shop.model, dtype=torch.bfloat16)
    loading.save(model, shop.model, tokenizer)
    options = parser().parse_args(["generate", "--model", str(shop.model), "--prompt", "x"])
    assert load_model(options, precision)[0].lm_head.weight.dtype == dtype


def test_a_raw_prompt_begins_as_the_tokenizer_begins_a_text(shop, monkeypatch):
    """A base model expects its first token (Llama's <s>); a chat template brings its own."""
    seen = []
    monkeypatch.setattr(lora_lab.models.Tokenizer, "encode", lambda self, text, add_special_tokens=True: seen.append(add_special_tokens) or [5])
    run("generate", model=shop.model, prompt="ab", raw=True, precision="fp32")
    assert seen[0] is True
