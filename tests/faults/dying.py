"""Work done in a forked child that dies on the way: at its n-th file operation, in the middle of a write, or at a moment of chance.

The parent has imported everything and made the models, so that a child costs milliseconds. Python announces every file that is opened for writing,
every rename, folder, removal and change of permissions (its audit events), the child passes that on, and dies or fails where it is told to.
What a library writes without Python, safetensors' files, is met by a limit of their size: the system ends the process inside the write.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from processes import PATIENCE_SECONDS

EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir", "os.chmod": "chmod", "os.truncate": "truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CAN_BE_FULL = ("open", "mkdir", "rename", "fsync")  # what a disk without room refuses
Before = Callable[[int, str], None]  # (number of the operation, its name)


@dataclass
class Ended:
    """How a child ended.  operations: those it began.  error: "Class: message".  result: what the work returned, by JSON.
    seconds: from its first line to its last."""

    signal: int | None
    operations: list[str] = field(default_factory=list)
    error: str | None = None
    result: Any = None
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        return self.signal is None

    @property
    def renames(self) -> int:
        return self.operations.count("rename")


def run(work: Callable[[], Any], before: Before | None = None, prepare: Callable[[], None] | None = None,
        kill_after: float | None = None) -> Ended:  # fmt: skip
    """Do the work in a child.  before: called there at each operation.  prepare: called there first.  kill_after: seconds from its first line on."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads: the child uses none of them
        child = os.fork()
    if child == 0:
        os.close(reading)
        _in_the_child(work, before, prepare, writing)
    os.close(writing)
    try:
        lines = _lines(reading, child, kill_after)
    finally:
        os.close(reading)
    _, status = os.waitpid(child, 0)
    ended = Ended(os.WTERMSIG(status) if os.WIFSIGNALED(status) else None)
    for kind, value in map(json.loads, lines):
        if kind == "operation":
            ended.operations.append(value)
        else:
            setattr(ended, kind, value)
    return ended


def _lines(reading: int, child: int, kill_after: float | None) -> list[str]:
    """What the child says until its end, which comes `kill_after` seconds after its beginning at the latest."""
    said, until, killed = b"", time.monotonic() + PATIENCE_SECONDS, False
    while True:
        if kill_after is not None and said:
            until, kill_after = time.monotonic() + kill_after, None
            killed = True
        if not select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            assert killed, f"a child hangs; it said {said[-500:]!r}"
            until, killed = time.monotonic() + PATIENCE_SECONDS, False
        if not (part := os.read(reading, 1 << 16)):
            return said.decode().split("\n")[1:-1]  # without the greeting, and a line that was cut short
        said += part


def _in_the_child(work: Callable[[], Any], before: Before | None, prepare: Callable[[], None] | None, writing: int) -> None:
    """Never returns: the parent's own code must not run twice."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        gc.disable()  # it would write into every page that is shared with the parent, and so copy it
        torch.set_num_threads(1)

        def say(kind: str, value: Any) -> None:
            os.write(writing, json.dumps([kind, value], default=str).encode() + b"\n")

        os.write(writing, b"here\n")
        if prepare is not None:
            prepare()
        _announce(say, before or (lambda number, name: None))
        started = time.perf_counter()
        try:
            say("result", work())
            say("seconds", time.perf_counter() - started)
        except Exception as error:
            say("error", f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _announce(say: Callable[[str, Any], None], before: Before) -> None:
    done = 0

    def operation(name: str) -> None:
        nonlocal done
        say("operation", name)
        done += 1
        before(done - 1, name)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES and str(args[0]) != os.devnull:
            operation("open")
        elif event in EVENTS:
            operation(EVENTS[event])

    fsync = os.fsync

    def announced(handle: Any) -> None:
        operation("fsync")
        fsync(handle)

    os.fsync = announced
    sys.addaudithook(hook)


# Ways to die and to fail ------------------------------------------------------------------------------------------------------------


def die_at(number: int) -> Before:
    def before(done: int, name: str) -> None:
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def fail_at(number: int, code: int) -> Before:
    """The operation is refused as a full disk (or one that is read-only) refuses it, if it is one that needs room."""

    def before(done: int, name: str) -> None:
        if done == number and name in CAN_BE_FULL:
            raise OSError(code, os.strerror(code))

    return before


def largest_file(size: int, deadly: bool) -> Callable[[], None]:
    """No file may grow beyond `size` bytes: writing on ends the process there and then, or is refused."""

    def prepare() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return prepare
