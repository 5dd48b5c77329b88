"""Tables of several requests: every cell is predict's own total."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from memory_math import MemoryMathError, predict
from memory_math.optimizers import OPTIMIZERS
from memory_math.precision import PRECISIONS
from memory_math.tables import compare_requests, table
from memory_math.tape import PUBLIC_PARTS

SMALL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 688, "tie_word_embeddings": True,
}  # fmt: skip
SIZES = {"batch_size": 2, "sequence_length": 64}


def test_every_cell_is_the_total_that_predict_gives() -> None:
    found = table(SMALL, **SIZES)
    assert [row.precision for row in found.rows] == list(PRECISIONS) and found.optimizers == tuple(OPTIMIZERS)
    seen = 0
    for row in found.rows:
        for optimizer, total in row.totals.items():
            if total is None:
                with pytest.raises(MemoryMathError, match=r"."):
                    predict(SMALL, precision=row.precision, optimizer=optimizer, **SIZES)
            else:
                assert total == predict(SMALL, precision=row.precision, optimizer=optimizer, **SIZES).total
                seen += 1
    assert seen >= 4 * len(OPTIMIZERS)


def test_one_call_without_keywords_is_enough() -> None:
    text = str(table("smollm2-135m", optimizers=["sgd", "adamw"]))
    for precision in ("fp32", "bf16", "bf16-mixed"):
        for optimizer in ("sgd", "adamw"):
            assert f"{predict('smollm2-135m', precision=precision, optimizer=optimizer).gib():.2f}" in text


def test_a_refused_combination_is_a_footnote_with_predicts_reason() -> None:
    found = table("smollm2-135m", optimizers=["sgd", "adamw"], attention="flash", **SIZES)
    with pytest.raises(MemoryMathError) as refusal:
        predict("smollm2-135m", precision="fp32", attention="flash", **SIZES)
    assert found.rows[list(PRECISIONS).index("fp32")].refusals == {"sgd": str(refusal.value), "adamw": str(refusal.value)}
    assert str(found).endswith(f"[1] {refusal.value}") and str(found).count(str(refusal.value)) == 1
    line = next(line for line in str(found).splitlines() if line.startswith("fp32 "))
    assert line.split() == ["fp32", "[1]", "[1]"]


def test_a_request_that_is_refused_everywhere_is_an_error() -> None:
    with pytest.raises(MemoryMathError, match="smollm2-135m"):
        table("smolm2-135m", **SIZES)
    with pytest.raises(MemoryMathError, match="batch_size=0"):
        table(SMALL, batch_size=0)
    with pytest.raises(MemoryMathError, match=r"precision='fp32'.*precisions=\['fp32'\]"):
        table(SMALL, precision="fp32")
    with pytest.raises(MemoryMathError, match=r"precisions=\[\]"):
        table(SMALL, precisions=[])


def test_a_prompt_has_one_column() -> None:
    found = table(SMALL, method="inference", **SIZES)
    assert found.optimizers == ("no optimizer",)
    assert found.rows[0].totals["no optimizer"] == predict(SMALL, method="inference", precision="fp32", **SIZES).total


def test_markdown_html_and_dict_carry_the_same_numbers() -> None:
    found = table("smollm2-135m", precisions=["bf16", "fp32"], optimizers=["adamw"], attention="flash", **SIZES)
    amount = f"{found.rows[0].totals['adamw'] / 2**30:.2f}"
    assert f"| bf16 | {amount} |" in found.markdown()
    page = ElementTree.fromstring(found._repr_html_())
    assert [cell.text for cell in page.iter("td")] == ["bf16", amount, "fp32", "[1]"]
    assert json.loads(json.dumps(found.as_dict()))["totals"] == {"bf16": {"adamw": found.rows[0].totals["adamw"]}, "fp32": {"adamw": None}}


def test_requests_are_compared_part_by_part() -> None:
    requests = {"small batch": {"batch_size": 1}, "checkpointed": {"gradient_checkpointing": True}, "impossible": {"attention": "flash"}}
    found = compare_requests("smollm2-135m", requests, gpu="t4", batch_size=4, sequence_length=128)
    first = predict("smollm2-135m", batch_size=1, sequence_length=128)
    second = predict("smollm2-135m", batch_size=4, sequence_length=128, gradient_checkpointing=True)
    assert [row.footprint and row.footprint.total for row in found.rows] == [first.total, second.total, None]
    cells = [line.split() for line in str(found).splitlines()]
    row = next(line for line in cells if line and line[0] == "checkpointed")
    assert row[1:] == [*(f"{second.gib(part):.2f}" for part in PUBLIC_PARTS), f"{second.gib():.2f}", f"{second.total / first.total:.3f}", "yes"]
    assert str(found).splitlines()[-1].startswith("[1] attention='flash'")
    assert found.as_dict()["rows"][2]["refusal"].startswith("attention='flash'") and found.gpu == "T4"


def test_methods_by_name_are_requests() -> None:
    found = compare_requests("smollm2-135m", ["full", "lora"], precision="bf16-mixed", **SIZES)
    assert [row.request for row in found.rows] == [{"method": "full"}, {"method": "lora"}]
    assert found.rows[1].footprint.total == predict("smollm2-135m", method="lora", precision="bf16-mixed", **SIZES).total


def test_the_bars_of_a_comparison_are_as_wide_as_its_totals() -> None:
    found = compare_requests("smollm2-135m", ["full", "lora"], gpu="T4", **SIZES)
    widths = {"full": 0.0, "lora": 0.0}
    for box in ElementTree.fromstring(found.svg()).iter("{http://www.w3.org/2000/svg}rect"):
        says = box.findtext("{http://www.w3.org/2000/svg}title") or ""
        if says.split(",")[0] in widths:
            widths[says.split(",")[0]] += float(box.get("width"))
    full, lora = (row.footprint.total for row in found.rows)
    assert widths["lora"] / widths["full"] == pytest.approx(lora / full, rel=1e-2)
    assert "T4" in found.svg() and found.svg().strip() in found._repr_html_()


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(MemoryMathError, match="none to compare"):
        compare_requests(SMALL, [])
    with pytest.raises(MemoryMathError, match="'lora'.*list of methods"):
        compare_requests(SMALL, "lora")
    with pytest.raises(MemoryMathError, match="loraa"):
        compare_requests(SMALL, ["loraa"])


def test_a_limit_may_be_a_number_of_bytes() -> None:
    compared = compare_requests("smollm2-135m", ["full", "lora"], gpu=4_000_000_000, precision="bf16", sequence_length=128)
    assert "fits 4,000,000,000 B" in str(compared) and compared.gpu == 4_000_000_000 and compared.svg().startswith("<svg")
    with pytest.raises(MemoryMathError, match="gpu='A1000'"):
        compare_requests("smollm2-135m", ["full"], gpu="A1000")
