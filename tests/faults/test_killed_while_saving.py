"""SIGKILL at any moment of any save: the old file or the new one loads, bit for bit, and the next save finds nothing in its way."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest
from cases import KILLS, Case
from dying import die_at, largest_file, run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork and SIGKILL are POSIX's")


def test_killed_at_any_file_operation(case: Case) -> None:
    """Each open, rename, sync, removal and change of permissions in turn: there is no other moment at which the names on the disk change."""
    loaded: Counter[str] = Counter()
    for number in range(len(case.whole.operations)):
        with case.copy() as folder:
            ended = run(lambda folder=folder: case.saver.save(folder), die_at(number))
            assert ended.signal == signal.SIGKILL and ended.operations == case.whole.operations[: number + 1]
            loaded[case.what_loads(folder)] += 1
            case.saves_again(folder)
    assert loaded["old"] and loaded["new"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_killed_in_the_middle_of_a_write(case: Case, share: float) -> None:
    """By a limit of the file size, which works inside libraries, too."""
    with case.copy() as folder:
        case.saver.save(folder)
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with case.copy() as folder:
        ended = run(lambda: case.saver.save(folder), prepare=largest_file(int(share * largest), deadly=True))
        assert ended.signal == signal.SIGXFSZ
        case.what_loads(folder)
        case.saves_again(folder)


def test_killed_at_moments_of_chance(case: Case) -> None:
    chance = random.Random(case.name)
    for _ in range(KILLS):
        with case.copy() as folder:
            case.tell(run(lambda folder=folder: case.saver.save(folder), kill_after=chance.uniform(0, case.seconds)))
            case.what_loads(folder)
            case.saves_again(folder)


@pytest.mark.parametrize("case", ["model over another"], indirect=True)
def test_killed_while_the_rest_of_a_killed_save_is_finished(case: Case) -> None:
    """Loading moves the files that an interrupted save had decided on; that may be interrupted as well."""
    renames = [number for number, name in enumerate(case.whole.operations) if name == "rename"]
    decided = renames[-1] - 1  # one file is not in its place yet
    with case.copy() as folder:
        run(lambda: case.saver.save(folder), die_at(decided))
        loading = run(lambda: [case.saver.read(folder), None][1])
    assert loading.renames >= 1
    for number in range(len(loading.operations)):
        with case.copy() as folder:
            run(lambda folder=folder: case.saver.save(folder), die_at(decided))
            ended = run(lambda folder=folder: [case.saver.read(folder), None][1], die_at(number))
            assert ended.signal == signal.SIGKILL and case.what_loads(folder) == "new"
