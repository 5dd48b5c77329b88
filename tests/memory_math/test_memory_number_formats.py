"""Number formats against the casts of torch and struct, and against the figures of the lecture's slide on pi."""

from __future__ import annotations

import math
import random
import re
import struct
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist
from xml.etree import ElementTree

import pytest
import torch

from memory_math import MemoryMathError
from memory_math.number_formats import FLOAT_FORMATS, NF4_LEVELS, number_formats

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}
BITS_TYPE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
LAYOUTS = {layout.name: layout for layout in FLOAT_FORMATS}


def as_fp32(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).double().tolist()


def sample(name: str) -> list[float]:
    """Values that float32 holds exactly (torch casts by way of it): random ones over the format's range and beyond, all the halves
    between neighbours and what lies beside them, subnormals, the edge of overflow, both signs, zeros, infinities, NaN."""
    layout, rng = LAYOUTS[name], random.Random(0)
    low, high = layout.smallest_exponent - layout.fraction_bits - 3, layout.bias + 3
    values = [rng.uniform(1, 2) * 2.0 ** rng.uniform(max(low, -140), min(high, 127)) for _ in range(400)]
    tiny = float(Fraction(2) ** (layout.smallest_exponent - layout.fraction_bits))
    for units in range(1, 40):  # subnormals and the first normals, with their halves
        values += [units * tiny, (units + 0.5) * tiny, (units + 0.5) * tiny * (1 + 2**-20), (units + 0.5) * tiny * (1 - 2**-20)]
    for _ in range(200):
        spot = rng.uniform(1, 2) * 2.0 ** rng.randint(max(layout.smallest_exponent, -100), min(layout.bias, 100))
        step = float(layout.spacing(Fraction(spot)))
        half = (math.floor(spot / step) + 0.5) * step
        values += [half, half + step / 64, half - step / 64]
    largest, top = float(layout.largest), float(layout.spacing(layout.largest))
    values += [largest, largest + top / 4, largest + top / 2, largest + top / 2 * (1 + 2**-12), largest + top, 4 * largest, tiny / 2, tiny / 4]
    values = [value for value in as_fp32(values) if math.isfinite(value)]
    return [*values, *(-value for value in values), 0.0, -0.0, math.inf, -math.inf, math.nan]


def same(ours: float, theirs: float) -> bool:
    return (math.isnan(ours) and math.isnan(theirs)) or (ours == theirs and math.copysign(1, ours) == math.copysign(1, theirs))


@pytest.mark.parametrize("name", DTYPES)
def test_nearest_value_and_bits_are_those_of_torchs_cast(name: str) -> None:
    """IEEE 754 and OCP FP8, rounding halves to even: torch's float64 -> format, on thousands of values that float32 holds exactly."""
    values = sample(name)
    assert len(values) > 2000
    if torch.tensor(1e6).to(DTYPES[name]).isnan().item():  # the torch versions that do not saturate e4m3
        values = [value for value in values if abs(value) <= 464]
    cast = torch.tensor(values, dtype=torch.float64).to(torch.float32).to(DTYPES[name])
    stored = cast.view(BITS_TYPE[cast.element_size()]).tolist()
    width = 8 * cast.element_size()
    wrong = []
    for value, theirs, bits in zip(values, cast.double().tolist(), stored, strict=True):
        row = number_formats(value)[name]
        # which NaN, and with which sign, is the implementation's choice: only that it is one
        agree = same(row.nearest, theirs) and (math.isnan(theirs) or int(row.bits.replace(" ", ""), 2) == bits % 2**width)
        wrong += [] if agree else [(value, row.nearest, theirs)]
    assert not wrong, wrong[:5]
    rounded_up = [value for value, theirs in zip(values, cast.double().tolist(), strict=True) if theirs > value]
    assert len(rounded_up) > 200  # the sample does exercise rounding


def test_fp32_is_what_struct_packs() -> None:
    """float64 to float32 in one rounding, by the C library: random doubles, halves between floats, subnormals."""
    rng = random.Random(1)
    values = [rng.choice((1, -1)) * rng.uniform(1, 2) * 2.0 ** rng.randint(-152, 127) for _ in range(700)]
    values += [float((Fraction(rng.randrange(2**23, 2**24)) + Fraction(1, 2)) * Fraction(2) ** rng.randint(-160, 100)) for _ in range(400)]
    values += [2.0**-149, 2.0**-150, 2.0**-150 * 1.0001, 3 * 2.0**-150, 2.0**-126 - 2.0**-150]
    for value in values:
        row = number_formats(value)["fp32"]
        packed = struct.pack(">f", value) if abs(value) < float(LAYOUTS["fp32"].largest) else None
        if packed is not None:
            assert same(row.nearest, struct.unpack(">f", packed)[0]), value
            assert int(row.bits.replace(" ", ""), 2) == int.from_bytes(packed, "big"), value


def test_fp32_overflows_at_half_a_step_above_its_largest() -> None:
    """IEEE 754-2019, 7.4: what rounds to beyond the largest number is infinity; torch agrees on both sides of the edge."""
    largest = float(LAYOUTS["fp32"].largest)
    edge = largest + 2.0 ** (127 - 24)
    for value, expected in ((math.nextafter(edge, 0), largest), (edge, math.inf), (-edge, -math.inf)):
        assert number_formats(value)["fp32"].nearest == expected == torch.tensor(value, dtype=torch.float64).float().item()


def test_rounding_happens_once() -> None:
    """1 + 2^-8 + 2^-30 is above the half between two bf16 neighbours; by way of float32 it falls on the half, and then to the even 1."""
    value = 1 + 2**-8 + 2**-30
    assert number_formats(value)["bf16"].nearest == 1 + 2**-7
    assert torch.tensor(value, dtype=torch.float64).float().bfloat16().item() == 1.0


def test_tf32_is_fp32s_range_with_fp16s_fraction() -> None:
    """NVIDIA A100 white paper: 8 exponent bits, 10 fraction bits. Inside fp16's normal range it rounds as fp16 does."""
    rng = random.Random(2)
    for _ in range(500):
        formats = number_formats(rng.uniform(-1, 1) * 2.0 ** rng.randint(-13, 15))
        if abs(formats.value) >= formats["fp16"].smallest_normal:
            assert formats["tf32"].nearest == formats["fp16"].nearest
    assert number_formats(1e30)["tf32"].nearest == pytest.approx(1e30, rel=2**-11)
    assert number_formats(1.0)["tf32"].stored_bits == 19


@pytest.mark.parametrize("name", DTYPES)
def test_limits_are_torchs(name: str) -> None:
    info, row = torch.finfo(DTYPES[name]), number_formats(0.0)[name]
    assert (row.largest, row.smallest_normal, row.epsilon) == (info.max, info.tiny, info.eps)
    first = torch.tensor([1], dtype=BITS_TYPE[info.bits // 8]).view(DTYPES[name])  # the bits 0...01
    assert row.smallest_subnormal == first.double().item()
    assert row.stored_bits == info.bits


def test_pi_on_the_slide_is_fp32_of_3_141592() -> None:
    """Lecture A4: the slide has 3.1415920257568359375 for pi in FP32; the nearest is 3.1415927410125732421875, 3 units further."""
    true, slide = number_formats(math.pi)["fp32"], number_formats(3.141592)["fp32"]
    assert slide.exact == "3.1415920257568359375"
    assert true.exact == "3.1415927410125732421875"
    assert (true.nearest - slide.nearest) / true.spacing == 3
    assert (true.sign_bits, true.exponent_bits, true.fraction_bits) == (1, 8, 23)


def test_pi_in_the_other_formats_of_the_slide() -> None:
    """Lecture A4: FP16 3.140625 (5, 10), BF16 3.140625 (8, 7), INT8 3 (0, 7)."""
    formats = number_formats(math.pi)
    stated = {"fp16": ("3.140625", 5, 10), "bf16": ("3.140625", 8, 7), "int8": ("3", 0, 7)}
    for name, (exact, exponent, fraction) in stated.items():
        assert (formats[name].exact, formats[name].exponent_bits, formats[name].fraction_bits) == (exact, exponent, fraction)
    assert formats["int4"].nearest == 3


def test_exact_digits_are_all_of_them() -> None:
    """Decimal holds every digit of a float: our expansion, read back, is the stored value with no rounding."""
    rng = random.Random(3)
    for _ in range(300):
        for row in number_formats(rng.uniform(-2, 2) * 2.0 ** rng.randint(-60, 14)):
            assert Fraction(row.exact) == Fraction(row.nearest)
    smallest = number_formats(2.0**-149)["fp32"]
    assert Decimal(smallest.exact) == Decimal(2.0**-149) and len(smallest.exact) == 151


def test_errors_are_exact_differences() -> None:
    row = number_formats(0.1)["bf16"]
    assert Fraction(row.absolute_error) == pytest.approx(abs(Fraction(row.nearest) - Fraction(0.1)))
    assert row.relative_error == pytest.approx(row.absolute_error / 0.1)
    assert row.absolute_error <= row.spacing / 2
    for exact in number_formats(0.5)[:6]:
        assert (exact.absolute_error, exact.relative_error) == (0, 0)
    assert number_formats(Fraction(1, 3))["fp32"].nearest == number_formats(1 / 3)["fp32"].nearest


def test_e4m3_saturates_and_e5m2_overflows() -> None:
    """OCP FP8 1.0: e4m3 has no infinity. 464, the half between 448 and what would be 480, rounds to the even 448."""
    for value, e4m3, e5m2 in ((464, 448, 448), (480, 448, 512), (61439, 448, 57344), (61440, 448, math.inf), (-1e9, -448, -math.inf)):
        formats = number_formats(value)
        assert (formats["fp8 e4m3"].nearest, formats["fp8 e5m2"].nearest) == (e4m3, e5m2)
    assert number_formats(1e6)["fp8 e4m3"].bits == "0 1111 110"


def test_infinities_and_nan() -> None:
    formats = number_formats(-math.inf)
    assert formats["fp8 e5m2"].nearest == -math.inf and formats["fp8 e5m2"].absolute_error == 0
    assert formats["fp8 e4m3"].nearest == -448 and formats["fp8 e4m3"].absolute_error == math.inf and formats["int8"].nearest == -128
    overflown = number_formats(1e6)["fp16"]
    assert overflown.nearest == math.inf == overflown.relative_error and overflown.spacing is None
    nothing = number_formats(math.nan)
    assert nothing["int4"].nearest is None and nothing["nf4"].nearest is None and math.isnan(nothing["bf16"].nearest)
    assert number_formats(-0.0)["fp16"].exact == "-0" and number_formats(0)["fp16"].exact == "0"


def test_int8_rounds_halves_to_even_and_clamps() -> None:
    for value in (2.5, 3.5, -2.5, 0.5, 127.4, -128.4, 126.5):
        row = number_formats(value)["int8"]
        assert row.nearest == torch.tensor(value).round().item()
        assert int(row.bits.replace(" ", ""), 2) == torch.tensor(row.nearest).to(torch.int8).item() % 256
    assert [number_formats(value)["int8"].nearest for value in (1e9, -1e9)] == [127, -128]
    assert [number_formats(value)["int4"].nearest for value in (100, -100)] == [7, -8]


def test_nf4_levels_are_the_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E and section 3: 8 quantiles below 0 and 9 from 0 on between 1 - 0.9677083 and 0.9677083, scaled to [-1, 1]."""
    offset, normal = 0.9677083, NormalDist()
    upper = [normal.inv_cdf(offset + (0.5 - offset) * step / 8) for step in range(8)]
    lower = [-normal.inv_cdf(offset + (0.5 - offset) * step / 7) for step in range(7)]
    built = sorted([*lower, 0.0, *upper])
    assert [level / max(built) for level in built] == pytest.approx(NF4_LEVELS, abs=1e-6)
    assert all(struct.unpack("f", struct.pack("f", level))[0] == level for level in NF4_LEVELS)  # float32s, as the paper prints them


def test_nf4_is_the_nearest_level_times_the_blocks_scale() -> None:
    assert number_formats(0.5, scale=1.0)["nf4"].nearest == 0.44070982933044434  # 0.0593 away; the level above is 0.0626 away
    rng = random.Random(4)
    for _ in range(200):
        scale = 2.0 ** rng.randint(-6, 6)
        value = rng.uniform(-scale, scale)
        row = number_formats(value, scale=scale)["nf4"]
        assert row.absolute_error == pytest.approx(min(abs(level * scale - value) for level in NF4_LEVELS))
        assert NF4_LEVELS[int(row.bits, 2)] * scale == row.nearest
    assert number_formats(math.pi)["nf4"].largest == 4  # without a block: the next power of two


@pytest.mark.parametrize(("value", "scale", "words"), [
    (2.0, 1.0, "at least"), (0.0, 0.0, "scale=0.0"), (0.5, math.inf, "scale=inf"), (0.5, 10**400, "scale=10+: .*float can hold"),
    (True, None, "value=True"), ("3", None, "value='3'"),
    (2**4000, None, "1e-330 to 1e330"), (Decimal("1e-999999999"), None, "1e-330 to 1e330"), (Fraction(1, 10**400), None, "1e-330 to 1e330"),
])  # fmt: skip
def test_what_is_no_number_or_no_scale_is_refused(value: object, scale: float | None, words: str) -> None:
    with pytest.raises(MemoryMathError, match=words):
        number_formats(value, scale=scale)  # type: ignore[arg-type]


def test_rows_by_name_and_the_near_name_in_the_error() -> None:
    formats = number_formats(1.5)
    assert formats["float8_e4m3fn"] is formats["FP8-E4M3"] is formats[4] and formats["bfloat16"] is formats["bf16"]
    assert [row.name for row in formats[:2]] == ["fp32", "tf32"] and len(formats) == 9
    with pytest.raises(MemoryMathError, match="did you mean 'fp16'"):
        formats["fp17"]


def test_table_and_pictures_show_every_row() -> None:
    formats = number_formats(math.pi)
    table = formats.table()
    assert "3.1415927410125732421875" in table and "0 10000000 1001001" in table
    drawing = ElementTree.fromstring(formats.svg())
    texts = ["".join(node.itertext()) for node in drawing.iter() if node.tag.endswith("text")]
    assert sum(text in ("0", "1") for text in texts) == sum(row.stored_bits for row in formats)
    html = formats._repr_html_()
    assert html.count("<tr>") == 1 + len(formats) and "<svg" in html and re.search(r"clamped to -8\.\.7", html)
    assert "inf" in number_formats(math.inf).svg() and "inf" in number_formats(10**329).table()
