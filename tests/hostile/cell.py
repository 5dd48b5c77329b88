"""A cell: a forked process in which files that mean harm are read. What happens in it stays in it, and is told.

    memory     RLIMIT_AS ends it where more than a GiB is asked for; the peak of resident memory is measured
    work       RLIMIT_CPU ends it; a case that alone takes CASE_CPU_SECONDS of processor time is stopped and named
    reach      an audit hook sees each file that Python opens, each process, connection and unpickled class; a listing of the surroundings
               before and after sees the rest
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2.sandbox  # noqa: F401 - as below: here, and not in the cell that renders first
import pytest
import torch

from lora_lab.errors import LoraLabError
from memory_math.errors import MemoryMathError

OURS = (LoraLabError, MemoryMathError)
MIB = 2**20
MOST_ADDRESSES, MOST_MEMORY = 1024 * MIB, 400 * MIB  # beyond what the process has when it begins: that it may ask for, that it may use
CELL_CPU_SECONDS, CASE_CPU_SECONDS = 3600, 20
MOST_TOLD = 20  # failures
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "socket.bind",
             "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen", "os.kill", "webbrowser.open")  # fmt: skip
TOUCHES = ("os.chmod", "os.chown", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree",
"shutil.copyfile")


torch.empty(2, device="meta").normal_()  # the first such line loads a hundred megabytes of torch: here, and not in each cell


@dataclass
class Told:
    """What a cell tells: cases, how many of them were refused, the first failures, the growth of memory at its peak, processor time."""

    cases: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    seconds: float = 0.0


class TooLong(BaseException):
    """A case took more processor time than any should; no Exception, so that no reader takes it for a fault of the file."""


def confined(chosen: Path, work: Callable[[Case], None]) -> Told:
    """Run `work` in a cell that may write below `chosen` only. Fails the test for each case that is neither a result nor an error of ours."""
    if not hasattr(os, "fork") or not sys.platform.startswith("linux"):
        pytest.skip("cells need Linux: fork, limits on memory, /proc")
    outside, place = listing(chosen.parent, but=chosen), mmap.mmap(-1, 4096)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _inside(chosen, work, place, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    at = place[:].rstrip(b"\0").decode(errors="replace")
    assert status == 0 and said, f"the cell ended with status {status} (signal {os.WTERMSIG(status)}) in case {at}"
    assert listing(chosen.parent, but=chosen) == outside, f"something beside {chosen} was changed"
    told = Told(**json.loads(said))
    assert not told.failures, "\n\n".join([f"{len(told.failures)} failures, of {told.cases} cases:", *told.failures])
    assert told.peak_bytes < MOST_MEMORY, f"{told.peak_bytes / MIB:.0f} MiB"
    return told


def listing(folder: Path, but: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file around a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path != but and but not in path.parents:
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


class Case:
    """Inside a cell: ``with case("name"): ...`` is one case."""

    def __init__(self, chosen: Path, place: mmap.mmap) -> None:
        self.told, self._place, self._reached = Told(), place, list[str]()
        self._hook(str(chosen), str(chosen.parent))

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.told.cases += 1
        self._reached.clear()
        self._place[:256] = name.encode()[:256].ljust(256, b"\0")
        signal.setitimer(signal.ITIMER_VIRTUAL, CASE_CPU_SECONDS)
        try:
            yield
        except OURS as error:
            self.told.refused += 1
            if _ran_out(error):
                self._fail(name, "it ran out of memory, and called that an error of the file")
        except BaseException as error:  # pytest's own among them, where a case expects a refusal
            self._fail(name, "".join(traceback.format_exception(type(error), error, error.__traceback__, limit=-6))[-2500:])
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if self._reached:
            self._fail(name, f"it reached for {self._reached[:5]}")
            self._reached.clear()

    def _fail(self, name: str, why: str) -> None:
        if len(self.told.failures) < MOST_TOLD:
            self.told.failures.append(f"{name}: {why}")

    def _hook(self, chosen: str, around: str) -> None:
        """Of all that Python does: no process and no connection, no file written elsewhere, none read in the surroundings."""

        def seen(event: str, arguments: tuple[Any, ...]) -> None:
            if event in FORBIDDEN:
                self._reached.append(f"{event}{arguments!r:.80}")
            elif event == "open" and isinstance(arguments[0], (str, bytes)):
                path, mode, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[1] or "", arguments[2] or 0
                writes = any(letter in mode for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if not _below(path, chosen) and path not in (os.devnull, "/proc/self/clear_refs") and (writes or _below(path, around)):
                    self._reached.append(f"open {path} {mode}")
            elif event in TOUCHES and not _below(_path(event, arguments), chosen):
                self._reached.append(f"{event}{arguments!r:.80}")

        sys.addaudithook(seen)


def _path(event: str, arguments: tuple[Any, ...]) -> str:
    """What an event is about, which may be named in relation to an open folder."""
    folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
    return os.path.abspath(os.path.join(os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(arguments[0])))


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _ran_out(error: BaseException | None) -> bool:
    """Whether there was no memory left somewhere behind an error."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _inside(chosen: Path, work: Callable[[Case], None], place: mmap.mmap, writer: int) -> None:
    """What the child does; it never returns."""
    import resource

    try:
        sys.dont_write_bytecode = True
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(chosen)  # which torch makes when it first computes without data
        warnings.simplefilter("ignore")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust tells of its panics there
        memory = _memory()
        resource.setrlimit(resource.RLIMIT_AS, (memory["VmSize"] + MOST_ADDRESSES,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CELL_CPU_SECONDS,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/clear_refs").write_text("5")
        signal.signal(signal.SIGVTALRM, _too_long)
        case = Case(chosen, place)
        try:
            work(case)
        except BaseException:
            case.told.failures.append("between cases: " + traceback.format_exc())
        case.told.seconds = time.process_time()
        case.told.peak_bytes = _memory()["VmHWM"] - memory["VmRSS"]
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(vars(case.told)))
        os._exit(0)
    finally:
        os._exit(1)


def _too_long(number: int, frame: Any) -> None:
    raise TooLong(f"more than {CASE_CPU_SECONDS} s of processor time")


def _memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
