"""The cell in which hostile files are read sees what it is for: without this, a suite that finds nothing would say nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess

import cell
import pytest
import torch

from lora_lab import LoraLabError


def loops():
    while True:
        pass


def hides():
    try:
        torch.empty(2**38)
    except RuntimeError:
        raise LoraLabError("the file is damaged") from None


def reads(path):
    return lambda: open(path).close()


CAUGHT = {
    "a traceback": (lambda folder: {}["r"], "KeyError: 'r'"),
    "memory that ran out": (lambda folder: torch.empty(2**38), "can't allocate memory"),
    "memory that ran out, hidden": (lambda folder: hides(), "it ran out of memory, and called that an error of the file"),
    "memory that is used": (lambda folder: torch.ones(120 * 2**20), "MiB"),
    "a loop": (lambda folder: loops(), "more than 1 s of processor time"),
    "a file elsewhere": (lambda folder: (folder.parent / "beside").write_text("x"), "was changed|reached for.*beside"),
    "a file of the surroundings read": (lambda folder: (folder.parent / "canary").read_text(), "reached for.*canary"),
    "a file removed": (lambda folder: os.remove(folder.parent / "canary"), "reached for.*os.remove|was changed"),
    "a process": (lambda folder: subprocess.run(["true"]), "reached for.*subprocess.Popen|reached for.*posix_spawn"),
    "a connection": (lambda folder: socket.getaddrinfo("localhost", 80), "reached for.*getaddrinfo"),
    "code": (lambda folder: os.system("true"), "reached for.*os.system"),
}  # fmt: skip


@pytest.mark.parametrize("harm", CAUGHT)
def test_harm_is_caught_and_named(harm, tmp_path, monkeypatch):
    monkeypatch.setattr(cell, "CASE_CPU_SECONDS", 1)
    (tmp_path / "chosen").mkdir(), (tmp_path / "canary").write_text("x")
    act, message = CAUGHT[harm]

    def work(case):
        with case("harm-1"):
            act(tmp_path / "chosen")

    with pytest.raises(AssertionError, match=message):
        cell.confined(tmp_path / "chosen", work)


def test_what_is_removed_in_an_open_folder_is_seen_where_it_is(tmp_path):
    """shutil.rmtree names files in relation to folders it has opened."""
    (tmp_path / "chosen" / "inner").mkdir(parents=True), (tmp_path / "other").mkdir()

    def work(case):
        (tmp_path / "chosen" / "inner" / "file").touch()
        with case("own"):
            shutil.rmtree(tmp_path / "chosen" / "inner")
        with case("another's"), contextlib.suppress(FileNotFoundError):
            os.rmdir("nothing", dir_fd=os.open(tmp_path / "other", os.O_RDONLY))

    with pytest.raises(AssertionError, match=r"1 failures, of 2 cases:\n\nanother's: it reached for .*os.rmdir"):
        cell.confined(tmp_path / "chosen", work)


def test_a_result_and_an_error_of_ours_are_fine(tmp_path):
    (tmp_path / "chosen").mkdir()

    def work(case):
        with case("1"):
            (tmp_path / "chosen" / "file").write_text("x")
        with case("2"):
            raise LoraLabError("refused")

    told = cell.confined(tmp_path / "chosen", work)
    assert (told.cases, told.refused) == (2, 1)
