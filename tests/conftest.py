"""What tests share: a fixed seed, the benchmarks' modules, and the real model where it can be had.

LORA_LAB_REQUIRE_REAL=1 (CI sets it) turns a real model that cannot be had from a skip into a failure.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch
from real_models import had_or_skipped

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
hypothesis.settings.register_profile("without a clock", deadline=None)  # 200 ms an example would count what else the machine does
hypothesis.settings.load_profile("without a clock")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread_for_small_models(request):
    """On a busy machine two threads wait for each other, up to tenfold; real models keep all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("real") else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Every save waits until its files are on the disk, 10 ms or more each time; no power fails here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of smollm2-135m-instruct-q4 in float32. Do not change the model."""
    import lora_lab

    with had_or_skipped():
        return lora_lab.models.load("smollm2-135m-instruct-q4")


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
