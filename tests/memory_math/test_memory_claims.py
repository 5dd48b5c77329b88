"""The ledger: every row has the verdict that we expect of it, and the verdict follows from what is stated and what is computed."""

from __future__ import annotations

import pickle
import re
import xml.etree.ElementTree as ElementTree
from decimal import ROUND_HALF_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_math import MemoryMathError, predict
from memory_math.ledger import VERDICTS, Claim, Claims, claims, judge
from memory_math.ledger.lecture_b_lora import b9
from memory_math.ledger.rows import HEADINGS, Written, shown
from memory_math.ledger.sizes import lora_parameters, prefix_parameters, prompt_parameters, zero_states_bytes
from memory_math.presets import PRESETS, Preset

ROOT = Path(__file__).parent.parent.parent
LETTERS = dict(zip("eraWn", VERDICTS, strict=True))  # exact, rounded, assumption, Wrong, not measured here
EXPECTED = {  # a letter for each row, in order
    "A1": "eer", "A2": "eeeaarrrr", "A3": "aaaaaa", "A4": "Weeeeeeeeeeeee", "A5": "eeae", "A6": "rrWra", "A7": "e",
    "A8": "nnrnarnarnanarnarnarnanWn", "A9": "n", "A10": "eeeaeean", "A11": "n", "A12": "rnnnn", "A13": "aaaenn", "A14": "nnen", "A15": "eeeerr",
    "A16": "nn", "A17": "eren", "A18": "nne", "A19": "nnn", "A20": "nnn", "A21": "n", "A22": "n", "A23": "nnnaaaen",
    "B1": "aaaaaaaae", "B2": "rnn", "B3": "n", "B4": "reaeeaaeeaeaa", "B5": "narrrrnarerr", "B6": "nnrrr", "B7": "rrrearaa", "B7b": "Wrerra",
    "B8": "rWrraaaeee", "B9": "WWWWeeerrre", "B10": "n", "B11": "nnn", "B12": "n",
    "Count": "e" * len({id(preset) for preset in PRESETS.values()}), "Class": "eeeeeeee", "GPT3": "rr",
    "LoRA": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeea", "LoRA-millions": "rrrWWWrrraaarraWWWW", "LoRA-share": "rrrrrrrrrreeeee", "LoRA-GPT3": "rWrararr",
    "Lester": "ererWrererererererererererererereWererereaereaerererererererWW", "Prompt": "rreaereeeereereereeeer", "Prefix": "eeeeeeeeeeee",
    "QLoRA": "rrrrrrrrrer", "Optim": "eerreeee", "LOMO": "rrrr", "ZeRO": "eeeeeeeeeereeeeeeerreeeeeeerrreeeraerrreeeaaerrrraeaar", "KV": "errrrraaar",
    "Scale": "rrrrrrrrrrrrrerrWrrrrr", "Hours": "rrrrrrrerrr", "MFU": "rrrrrrrrrrrr",
}  # fmt: skip
IDS = [(f"{group}.{number}", LETTERS[letter]) for group, letters in EXPECTED.items() for number, letter in enumerate(letters, 1)]
SPREAD = {"MFU", "Scale", "Hours"}  # rows whose inputs are printed rounded: these may be further off than the last digit stated

LECTURE_NUMBERS = {  # every figure of the two lectures, and of the corrections to them, by row
    "A1": "4", "A2": "4 8 24", "A4": "3.1415920257568359375 8 23 3.140625 5 10 7 3 0", "A6": "20",
    "A8": "1836 15000000 100000 27500 2900000 15000 52000 70000 500000 11 40 70 13", "A10": "4096 80 8", "A12": "500 1000 7",
    "A15": "32768 4096 512 86 4608 85.9", "A17": "20480 11 5", "A18": "3 30", "A23": "100 1000 50000",
    "B1": "124439808", "B2": "7", "B4": "70 2 3 6 420 840 80 11 5.25 10.5", "B5": "2000000000000 400 5261 5260.9 28 28.3 2.5 4 3.47 35 4.30 323",
    "B6": "50000 4096 200 20 19.8", "B7": "140 560 420 840 1 4", "B7b": "140 560", "B8": "140 0 2 1", "B9": "8096 64 8192 8 128 8.4 65.5 67.1",
}  # fmt: skip


@pytest.fixture(scope="module")
def ledger() -> Claims:
    return claims()


# --- the rows -----------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("row_id", "verdict"), IDS, ids=[row_id for row_id, _ in IDS])
def test_every_row_has_its_verdict(ledger: Claims, row_id: str, verdict: str) -> None:
    """And a stated number is where an exact or rounded verdict says it is, by another rounding than the ledger's own."""
    row = ledger[row_id]
    assert row.verdict == verdict, f"{row.claim}: stated {row.stated}, computed {row.computed}"
    assert row.claim and row.why and row.why[-1] in ".)", row
    if verdict in ("exact", "rounded") and isinstance(row.stated, Written):
        assert not isinstance(row.computed, str) and row.computed is not None
        if row.group in SPREAD:
            assert float(row.stated) == pytest.approx(float(row.computed), rel=0.03)
        elif verdict == "exact":
            assert float(row.stated) == pytest.approx(float(row.computed), rel=1e-12, abs=0)
        else:
            assert rounded_to_its_digits(Decimal(row.computed), row.stated.decimal)


def rounded_to_its_digits(computed: Decimal, stated: Decimal) -> bool:
    """By Decimal's own rounding; the zeros at the end of a whole number are no digits."""
    exponent = stated.normalize().as_tuple().exponent if stated == stated.to_integral() and "." not in str(stated) else stated.as_tuple().exponent
    assert isinstance(exponent, int)
    place, digits = Decimal(1).scaleb(exponent), Decimal(f"{computed:.14g}")  # 2.675 is a little less as a float
    return stated in {digits.quantize(place, rounding) for rounding in (ROUND_HALF_UP, ROUND_HALF_DOWN)}


def test_no_row_is_left_out_and_none_is_new(ledger: Claims) -> None:
    assert [row.id for row in ledger] == [row_id for row_id, _ in IDS]
    lectures = [*(f"A{number}" for number in range(1, 24)), *(f"B{number}" for number in range(1, 13)), "B7b"]
    assert set(lectures) <= {row.group for row in ledger}


@pytest.mark.parametrize(("group", "digits"), LECTURE_NUMBERS.items(), ids=list(LECTURE_NUMBERS))
def test_every_number_of_the_lectures_has_a_row(ledger: Claims, group: str, digits: str) -> None:
    stated = {row.stated for row in ledger.where(source=group)}
    assert [number for number in digits.split() if float(number) not in stated] == []


def test_every_named_file_exists(ledger: Claims) -> None:
    """A row that says where something is shown, shows where (tests/notebooks/test_claims_are_covered.py looks at the notebooks)."""
    named = {path for row in ledger for path in re.findall(r"\b(?:tests|notebooks|benchmarks|docs|lora_lab)/[\w/.-]+\.\w+", row.why)}
    ours = {path for path in named if not path.startswith("docs/performance")}
    assert ours and [path for path in ours if not (ROOT / path).is_file()] == []
    for row in ledger.where(verdict="not measured here"):
        assert re.search(r"tests/|(?i:notebook) \d\d of the course|count of the data set|An input|A price|weights are closed", row.why), row


def test_a_wrong_row_gives_the_right_value(ledger: Claims) -> None:
    for row in ledger.where(verdict="wrong"):
        assert re.search(r"\d", row.why), row


def test_computed_values_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64 key/value heads A^K is square, 67.1 million, and the rows say so."""
    changed = {**PRESETS["llama-2-70b"], "num_key_value_heads": 64}
    monkeypatch.setitem(PRESETS, "llama-2-70b", Preset(changed, "a test", 0))
    rows = Claims(b9().rows)
    assert rows["B9.2"].computed == 8192 and rows["B9.4"].computed == 8192 * 8192 / 1e6
    assert (rows["B9.6"].verdict, rows["B9.8"].verdict) == ("wrong", "wrong")


# --- the rule ------------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("stated", "computed", "verdict"), [
    ("4", 4, "exact"), ("0.5", 0.5, "exact"), ("0.3", 0.1 + 0.2, "exact"), ("5261", 5260.94, "rounded"), ("28", 28.26, "rounded"),
    ("28", 28.6, "assumption"), ("28", 27.4, "wrong"), ("420", 413.86, "wrong"), ("420", 415, "rounded"), ("420.0", 415, "wrong"),
    ("4.50", 4.51, "wrong"), ("4.5", 4.51, "rounded"), ("5.76e23", 5.764e23, "rounded"), ("2.0e12", 2.04e12, "rounded"),
    ("2.0e12", 2.06e12, "assumption"), ("18.8", 18.874, "assumption"), ("603.8", 603.98, "wrong"), ("64", 65.5, "wrong"), ("0", 0.09, "rounded"),
    ("0", 137.95, "wrong"), ("0.00143", 0.0014373, "assumption"), ("4187", 4187.5, "rounded"), ("-2", -1.9, "rounded"), ("2", -2, "wrong"),
])  # fmt: skip
def test_the_verdict_on_numbers(stated: str, computed: float, verdict: str) -> None:
    assert judge(Written(stated), computed) == verdict


def test_the_verdict_with_an_assumption_a_spread_and_words() -> None:
    assert judge(Written("420"), 413.86, assuming=420) == "assumption" and judge(Written("420"), 413.86, assuming=400) == "wrong"
    assert judge(Written("40.27"), 40.25, spread=(40.24, 40.272)) == "rounded" and judge(Written("40.27"), 40.25, spread=(40.24, 40.26)) == "wrong"
    assert judge("fits", "fits") == "exact" and judge("fits", "does not") == "wrong" and judge("no", "yes", assuming="no") == "assumption"
    assert judge(None, 3.5) == "assumption" and judge(Written("3"), None) == judge(None, None) == "not measured here"


@given(st.decimals(min_value=-(10**5), max_value=10**5, places=3, allow_nan=False), st.integers(0, 3))
def test_a_number_rounded_to_any_digits_is_never_wrong(value: Decimal, places: int) -> None:
    """With more digits than a float has to spare (TINY), a difference in the last of them is none; so the numbers here have eight."""
    stated = value.quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN)
    assert judge(Written(str(stated)), Written(str(value))) in ("exact", "rounded")
    assert judge(Written(str(stated + Decimal(2).scaleb(-places))), Written(str(value))) in ("wrong", "rounded")


def test_what_is_stated_can_be_computed_with_and_keeps_its_digits(ledger: Claims) -> None:
    """A user's first line: how far off is it?"""
    numbers = [row for row in ledger if isinstance(row.stated, float) and isinstance(row.computed, (int, float))]
    assert len(numbers) > 400
    assert all(abs(row.computed - row.stated) <= abs(row.stated) * 0.1 + 1 for row in numbers if row.verdict in ("exact", "rounded"))
    row = ledger["B5.4"]
    assert (row.stated == 5260.9, str(row.stated), f"{row.stated / 1000:.4f}") == (True, "5260.9", "5.2609")
    again = pickle.loads(pickle.dumps(ledger["B5.11"]))
    assert again == ledger["B5.11"] and str(again.stated) == "4.30"


# --- the ledger as a whole -------------------------------------------------------------------------------------------------------------------------
def test_a_row_is_the_tuple_of_the_contract(ledger: Claims) -> None:
    source, claim, stated, computed, unit, verdict, why = ledger["A15.1"]
    assert (source, claim, stated, computed, unit, verdict) == (
        "A15.1 Instruction Finetuning", "weights of a 512 x 64 layer", 32768, 32768, "parameters", "exact",
    )  # fmt: skip
    assert why and Claim._fields == HEADINGS
    with pytest.raises(AttributeError):
        ledger[0].verdict = "wrong"  # type: ignore[misc]


def test_rows_are_found_by_id_by_claim_by_paper_and_by_verdict(ledger: Claims) -> None:
    assert {row.group for row in ledger.where(source="A1")} == {"A1"} and len(ledger.where(source="B9.2")) == 1
    assert {row.group[0] for row in ledger.where(source="lecture 10.5")} == {"B"}
    assert {row.group for row in ledger.where(source="arXiv:2305.14314")} == {"QLoRA"}
    wrong = ledger.where(verdict="wrong")
    assert len(wrong) == ledger.counts()["wrong"] and {row.verdict for row in wrong} == {"wrong"}
    assert [row.id for row in wrong.where(source="B9")] == ["B9.1", "B9.2", "B9.3", "B9.4"]
    assert sum(ledger.counts().values()) == len(ledger) and isinstance(ledger[2:4], Claims)


@pytest.mark.parametrize(("find", "words"), [
    (lambda rows: rows["B9.99"], "did you mean 'B9.9'"), (lambda rows: rows.where(source="B99"), "claims here: A1, A2"),
    (lambda rows: rows.where(verdict="rong"), "did you mean 'wrong'"),
])  # fmt: skip
def test_what_is_not_there_is_refused_by_name(ledger: Claims, find, words: str) -> None:
    with pytest.raises(MemoryMathError, match=re.escape(words)):
        find(ledger)


def test_markdown_has_seven_cells_in_every_line_and_a_line_for_every_row(ledger: Claims) -> None:
    title, blank, header, marks, *body = ledger.markdown().split("\n")
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (header, marks, *body)]
    assert title.startswith("**") and not blank and len(body) == len(ledger) and {len(line) for line in cells} == {7}
    assert [cell.strip() for cell in cells[0]] == list(HEADINGS)
    assert cells[2][0].strip() == ledger[0].source and cells[-1][5].strip() == ledger[-1].verdict


def test_html_is_well_formed_and_has_every_row(ledger: Claims) -> None:
    tree = ElementTree.fromstring(ledger._repr_html_())
    assert len(tree.findall(".//tbody/tr")) == len(ledger)


def test_the_text_has_every_row_and_the_reason_of_the_wrong_ones(ledger: Claims) -> None:
    text = " ".join(str(ledger).split())
    assert all(f" {row.id} " in text for row in ledger) and all(" ".join(row.why.split()) in text for row in ledger.where(verdict="wrong"))
    assert max(map(len, str(ledger).splitlines())) <= 140


@pytest.mark.parametrize(("value", "text"), [
    (None, "-"), ("fits", "fits"), (7, "7"), (12345678, "12,345,678"), (0.0, "0"), (1234.5678, "1,234.57"), (0.5, "0.5"), (99999999.4, "99,999,999"),
    (3.1e24, "3.1e+24"), (2.0e-7, "2e-07"), (Written("4.50"), "4.50"), (-1.25, "-1.25"),
])  # fmt: skip
def test_how_values_are_shown(value: object, text: str) -> None:
    assert shown(value) == text  # type: ignore[arg-type]


# --- the counts that rows share --------------------------------------------------------------------------------------------------------------------
small = partial(predict, "smollm2-135m", sequence_length=16, precision="bf16")


def test_adapters_are_as_large_as_predict_has_them() -> None:
    for targets in ("all-linear", "attention", ["q_proj", "v_proj"]):
        assert lora_parameters("smollm2-135m", 8, targets) == small(method="lora", rank=8, target_modules=targets).trained
        assert lora_parameters("smollm2-135m", 8, targets, dora=True) == small(method="dora", rank=8, target_modules=targets).trained
    assert prompt_parameters("smollm2-135m", 20) == small(method="prompt", num_virtual_tokens=20).trained
    assert prefix_parameters("smollm2-135m", 20) == small(method="prefix", num_virtual_tokens=20).trained


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_what_predict_divides(stage: int) -> None:
    """Weights and states alive at the peak; gradients are not, where the peak is elsewhere."""
    found = predict("smollm2-135m", precision="bf16-mixed", zero_stage=stage, world_size=4, sequence_length=16, optimizer="adam")
    weights = 2 * found.parameters / (4 if stage == 3 else 1)
    gradients = 2 * found.parameters / (4 if stage >= 2 else 1)
    assert found.weights == pytest.approx(weights, rel=1e-3)
    assert zero_states_bytes(found.parameters, stage, 4) == pytest.approx(weights + gradients + found.optimizer_states, rel=1e-3)
