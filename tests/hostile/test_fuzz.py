"""Thousands of spoilt files, each of which has to end in a correct result or in an error of ours, within bounds of memory, work and reach (cell.py).

LORA_LAB_FUZZ is the number of cases in all, LORA_LAB_FUZZ_SEED another run of them; `make fuzz` takes many more than CI. A case that fails is
named by its surface, seed and number.
"""

from __future__ import annotations

import os
import random

import adapter_surfaces
import data_surfaces
import model_surfaces
import pytest
from cell import MIB, confined

CASES, SEED = int(os.environ.get("LORA_LAB_FUZZ", "10000")), os.environ.get("LORA_LAB_FUZZ_SEED", "0")
# surface: its share of the cases, in thousandths
SURFACES = {
    adapter_surfaces.adapters: 200, adapter_surfaces.prompts: 80, adapter_surfaces.merges: 30, model_surfaces.folders: 150,
    model_surfaces.layouts: 40,
    model_surfaces.tokenizers: 80, model_surfaces.templates: 80, model_surfaces.gguf_files: 60, data_surfaces.rows: 100, data_surfaces.material: 60,
    data_surfaces.snapshots: 10, data_surfaces.small_files: 50, data_surfaces.predictions: 60,
}  # fmt: skip


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.__name__)
def test_a_spoilt_file_is_a_result_or_an_error_of_ours(surface, tmp_path):
    chosen, cases = tmp_path / "chosen", max(1, CASES * SURFACES[surface] // 1000)
    (tmp_path / "beside").mkdir(), chosen.mkdir()
    (tmp_path / "beside" / "canary").write_text("not to be read"), (chosen / "beside.txt").write_text("")

    def work(case):
        once = surface(chosen / "surface")
        for number in range(cases):
            name = f"{surface.__name__}-{SEED}-{number}"
            with case(name):
                once(random.Random(name))

    told = confined(chosen, work)
    assert told.cases == cases
    assert 0 < told.refused < cases or cases < 50, f"{told.refused} of {cases} refused: the cases are all alike"
    print(f"\n{surface.__name__}: {cases} cases, {told.refused} refused, {told.peak_bytes / MIB:.0f} MiB more at the peak, {told.seconds:.1f} s")


def test_the_shares_are_the_whole():
    assert sum(SURFACES.values()) == 1000
