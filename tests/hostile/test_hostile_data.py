"""Rows, tables, GGUF headers and configurations that memory is computed for: enormous, nested, of no encoding, absurd."""

from __future__ import annotations

import contextlib
import json
import struct

import gguf
import gguf_tools
import llama_tools
import pytest
from cell import MIB, confined
from hypothesis import given, settings
from hypothesis import strategies as st
from model_surfaces import CONFIGS, runs
from mutations import NUMBERS
from tiny_workshop import chat_tokenizer

import lora_lab
import memory_math
from lora_lab import LoraLabError, models
from lora_lab.data.formats import load
from lora_lab.data.objectives import CausalObjective, ClassificationObjective
from lora_lab.data.tables import read_parts
from lora_lab.tasks.record import read_record
from memory_math.errors import MemoryMathError

# Rows -----------------------------------------------------------------------------------------------------------------------------

ROW = b'{"instruction": "a", "output": "%s"}'
BAD = {
    "a hundred thousand lists": (b"[" * 100_000 + b"]" * 100_000, "cannot be read|not JSON"),
    "objects as deep": (b'{"a":' * 100_000, "cannot be read|not JSON"),
    "not UTF-8": (b'{"instruction": "\xff", "output": "b"}', "line 1: not UTF-8"),
    "zero bytes": (b"\0" * 1000, "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not"),
    "half a character": (ROW % b"\\ud800", "half of a character"),
    "a list for a row": (ROW % b"b" + b"\n[2]", "line 2: a row is a list"),
    "a number for a row": (b"3", "a row is a int"),
    "a number of digits": (b'{"label": 1%s, "text": "a"}' % (b"0" * 10_000), "cannot be read|not JSON"),
    "nothing": (b"", "no rows"),
    "half a row": (b'{"instruction": "a", "outp', "not JSON"),
    "NaN for a text": (b'{"instruction": NaN, "output": "b"}', "is a float, expected text"),
    "roles that are lists": (b'{"messages": [{"role": [], "content": "a"}]}', "needs a 'role'"),
    "a field for each byte": (b"{" + b'"":1,' * 100_000 + b'"a":1}', "fields"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_bad_row_is_named_with_its_line(kind, suffix, tmp_path):
    (tmp_path / "chosen").mkdir()
    path, (text, message) = tmp_path / "chosen" / f"rows.{suffix}", BAD[kind]
    path.write_bytes(text)

    def work(case):
        with case(kind), pytest.raises(LoraLabError, match=message) as error:
            load(path)
        assert len(str(error.value)) < 5000

    assert confined(tmp_path / "chosen", work).peak_bytes < 100 * MIB


def test_a_row_of_ten_megabytes_is_a_row(tmp_path):
    """And its zero characters are characters; of more tokens than the model reads it is refused by its line."""
    (tmp_path / "chosen").mkdir()
    path = tmp_path / "chosen" / "rows.jsonl"
    path.write_bytes(ROW % b"short" + b"\n" + ROW % (b"x" * 10_000_000 + b"\\u0000"))

    def work(case):
        with case("10 MB"):
            rows, _ = load(path)
            assert len(rows[1]["output"]) == 10_000_001
        with case("encoded"), pytest.raises(LoraLabError, match="line 2: the row has 10,000,00. characters"):
            CausalObjective().encode(rows, chat_tokenizer(), 64)

    assert confined(tmp_path / "chosen", work).peak_bytes < 100 * MIB


@pytest.mark.parametrize("beside", [7, 1.5, True, ["a"], [{"content": 3}], {"content": "x"}, None, "x" * 100_000], ids=range(8))
def test_fields_that_nobody_reads_may_be_anything(beside):
    """A row's messages beside its text, and the other way round."""
    told, labelled, tokenizer = {"instruction": "say", "output": "yes"}, {"text": "good", "label": 1}, chat_tokenizer()
    for task, row, others in ((CausalObjective(), told, ("text", "summary")), (ClassificationObjective(2), labelled, ("messages", "output"))):
        assert [*task.encode([{**row, **dict.fromkeys(others, beside)}], tokenizer, 64)] == [*task.encode([row], tokenizer, 64)]


TABLES = {
    "a field of ten megabytes": (b"text,label\n" + b"a,0\nb,1\n" * 10 + b"x" * 10_000_000 + b",1\n", None),
    "no end of quotation": (b'text,label\n"a,0\n' + b"b,1\n" * 9, "unexpected end|line"),
    "zero bytes": (b"text,label\n" + b"a\0b,0\nc,1\n" * 9, None),
    "not UTF-8": (b"text,label\n\xff\xfe,0\n", "not UTF-8"),
    "a thousand columns": (b"," * 1000 + b"\n" + b"," * 1000, ""),
    "rows of other lengths": (b"text,label\na,0\nb\n", "line 3: 1 fields"),
    "nothing but quotation": (b'"' * 10_001, ""),
    "no rows": (b"text,label\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_read_or_refused_with_its_line(kind, tmp_path):
    (tmp_path / "chosen").mkdir()
    path, (text, message) = tmp_path / "chosen" / "rows.csv", TABLES[kind]
    path.write_bytes(text)

    def work(case):
        with case(kind):
            if message is None:
                assert sum(map(len, read_parts(path).values())) > 10
            else:
                with pytest.raises(LoraLabError, match=message):
                    lora_lab.tasks.gather("sentiment", path)

    assert confined(tmp_path / "chosen", work).peak_bytes < 200 * MIB


@pytest.mark.parametrize("classes", [3, [], {"names": [], "of": {}}, {"names": ["a"], "of": {"0": 1}}, {"names": ["a"], "of": {"0": "0"}}, {"of": {}},
                                     {"names": ["a", "b"], "of": {"0": -1}}, {"names": ["a"], "of": {"0": None}}, {"names": ["a"],
                                     "of": {"0": True}}])  # fmt: skip
def test_what_an_adapter_was_taught_is_checked(classes, tmp_path):
    (tmp_path / "lora_lab_task.json").write_text(json.dumps({"task": "sentiment", "words": "", "classes": classes}))
    with pytest.raises(LoraLabError, match="lora_lab_task.json"):
        read_record(tmp_path, "sentiment")


# GGUF -----------------------------------------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*fields: bytes, count: int | None = None, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields) if count is None else count) + b"".join(fields)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, count) + values


HEADERS = {
    "fields without end": header(count=2**60),
    "tensors without end": header(tensors=2**60),
    "a name longer than the file": header(struct.pack("<Q", 2**62)),
    "an array of 2**60 bytes": header(array(0, 2**60)),
    "an array of 2**60 texts": header(array(8, 2**60)),
    "an array of arrays": header(array(9, 2**40, bytes(64))),
    "more values than any vocabulary": header(array(0, 10_000_000, bytes(10_000_000))),
    "more bytes than any table": header(array(0, 500_000, bytes(500_000))),
    "as many in two arrays": header(array(7, 300_000, bytes(300_000)), array(1, 300_000, bytes(300_000))),
    "an unknown type": header(text(b"a") + struct.pack("<I", 99)),
    "a tensor of 2**31 dimensions": header(tensors=1) + text(b"t") + struct.pack("<I", 2**31),
    "a big-endian one cut short": b"GGUF\0\0\0\3" + bytes(6),
    "nothing": b"",
    "only a name": b"GGUF",
    "another file": b"PK\3\4" * 100,
    "a tensor beyond the end": header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 2**40, 0, 0),
    "a tensor of a size that wraps": header(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_count_in_a_gguf_header_is_not_believed(kind, tmp_path):
    """The gguf package loops as often as a header says, and makes an object of each of its values."""
    (tmp_path / "chosen").mkdir()
    path = tmp_path / "chosen" / "model.gguf"
    path.write_bytes(HEADERS[kind])

    def work(case):
        with case(kind), pytest.raises(LoraLabError, match="truncated or not a GGUF file"):
            models.load(path)

    assert confined(tmp_path / "chosen", work).peak_bytes < 100 * MIB


@pytest.mark.parametrize("tokens", [["a", "b" * 5000], ["a", "a", ""], [3, 4], []], ids=range(4))
def test_a_gguf_files_vocabulary_is_checked(tokens, tmp_path):
    def vocabulary(writer):
        writer.add_tokenizer_model("llama")
        writer.add_array("tokenizer.ggml.tokens", tokens or ["a"])
        writer.add_array("tokenizer.ggml.scores", [0.0] * max(1, len(tokens)))
        writer.add_uint32("tokenizer.ggml.bos_token_id", 2**31)

    path = gguf_tools.write(tmp_path / "model.gguf", llama_tools.theirs(num_hidden_layers=1), gguf.GGMLQuantizationType.F32, vocabulary)
    with pytest.raises(LoraLabError, match="tokenizer cannot be rebuilt|a token of 5,000 characters"):
        models.load(path)


def test_a_good_gguf_file_still_runs(tmp_path):
    """Else the refusals above would say nothing."""
    path = gguf_tools.write(tmp_path / "model.gguf", llama_tools.theirs(num_hidden_layers=1), tokenizer=llama_tools.tokenizer(llama_tools.CHATML))
    model, words = models.load(path)
    runs(model)
    assert words.decode(words.encode("some text")) == "some text"


# Memory -----------------------------------------------------------------------------------------------------------------------------


LLAMA = {**CONFIGS["LlamaForCausalLM"], "model_type": "llama"}
ABSURD = [0, -1, 2**31, 10**12, 10**400, 1.5, True, "2", None, [], float("nan"), float("inf")]


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size"])
def test_a_size_that_no_model_has_is_refused(name, tmp_path):
    (tmp_path / "chosen").mkdir()

    def work(case):
        for value in ABSURD:
            with case(f"{name}={value}"), pytest.raises(MemoryMathError, match=name):
                memory_math.predict({**LLAMA, name: value})
            (tmp_path / "chosen" / "config.json").write_text(json.dumps({**LLAMA, name: value}))
            with case(f"{name}={value} in a file"), pytest.raises(MemoryMathError, match=name):
                memory_math.predict(tmp_path / "chosen")

    assert confined(tmp_path / "chosen", work).peak_bytes < 50 * MIB


def test_a_mixture_of_a_billion_experts_is_refused():
    with pytest.raises(MemoryMathError, match="1,000,000,000 experts"):
        memory_math.predict({**CONFIGS["MistralForCausalLM"], "model_type": "mixtral", "num_local_experts": 10**9}, versions={"transformers": "4.40"})


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"null", b"[1]", b"{"], ids=range(5))
def test_a_configuration_that_is_no_json_is_an_error_of_ours(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(MemoryMathError, match="config.json"):
        memory_math.predict(tmp_path)


@settings(max_examples=150, database=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(["batch_size", "sequence_length", "rank", "dropout", "world_size", "zero_stage", "tensor_parallel",
                                        "grad_accum_steps",
                                        "num_virtual_tokens", "target_length", "label_tokens", "encoder_hidden_size"]),
                       st.sampled_from(NUMBERS) | st.integers(-2, 64), max_size=3), st.sampled_from(["full", "lora", "prompt",
                       "inference"]))  # fmt: skip
def test_any_numbers_in_a_request(numbers, method):
    with contextlib.suppress(MemoryMathError):
        assert str(memory_math.predict(LLAMA, method=method, **numbers))
