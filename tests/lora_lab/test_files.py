"""Files and folders appear whole or not at all; what was there before a failure is there after it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lora_lab
from lora_lab import LoraLabError, files

ROOT = Path(lora_lab.__file__).parent.parent
FAILURES = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), RuntimeError("on purpose")]
posix = pytest.mark.skipif(os.name != "posix", reason="permissions and file locks are POSIX's here")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask():
    """Sets the process's umask, for one test."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


# write_file -----------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_under_another_name_and_then_renamed(tmp_path):
    seen, path = [], tmp_path / "deep" / "file.txt"

    def write(temporary):
        seen.append((temporary.parent.parent, temporary != path, path.exists()))
        temporary.write_text("new")

    files.write_file(path, write)
    assert seen == [(path.parent, True, False)]  # beside the target: a rename across file systems is a copy
    assert path.read_text() == "new" and names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("moment", ["while writing", "at the rename"])
def test_a_failure_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, failure, moment):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_):
        raise failure

    def write(temporary):
        temporary.write_text("half")
        if moment == "while writing":
            fail()

    if moment == "at the rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(failure)):
        files.write_file(path, write)
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


@posix
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mask, mode):
    """mkstemp makes files that only their owner reads; a shared adapter has to be readable like every other file."""
    umask(mask)
    files.write_file(tmp_path / "file", lambda temporary: temporary.write_text("x"))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    with files.new_folder(tmp_path / "folder"):
        pass
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask
    with files.new_folder(tmp_path / "private") as temporary:
        (temporary / "file").touch(mode=0o600)  # as safetensors makes its files
    assert stat.S_IMODE((tmp_path / "private" / "file").stat().st_mode) == mode
    assert os.umask(mask) == mask  # asking for it did not change it


def test_json_is_sorted_and_ends_with_a_line_break(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": ["é"]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": ["é"], "b": 1} and text.index('"a"') < text.index('"b"') and text.endswith("}\n")


# new_folder -----------------------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_its_block_has_ended(tmp_path):
    target = tmp_path / "deep" / "folder"
    with files.new_folder(target) as temporary:
        (temporary / "file").write_text("x")
        assert not target.exists() and temporary.parent.parent == target.parent
    assert names(target.parent) == ["folder"] and names(target) == ["file"]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_an_exception_in_the_block_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)), files.new_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("x")
        raise failure
    assert names(tmp_path) == []


def test_a_folder_that_another_process_has_finished_meanwhile_stays_and_is_an_error_unless_it_will_do(tmp_path):
    for will_do in (True, False):
        refused = contextlib.nullcontext() if will_do else pytest.raises(OSError, match="not empty|exists")
        with refused, files.new_folder(tmp_path / "folder", or_theirs=will_do) as temporary:
            (temporary / "file").write_text("mine")
            (tmp_path / "folder").mkdir(exist_ok=True)
            (tmp_path / "folder" / "file").write_text("theirs")
    assert (tmp_path / "folder" / "file").read_text() == "theirs" and names(tmp_path) == ["folder"]


def test_a_file_in_the_folders_place_is_an_error_and_stays(tmp_path):
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(OSError), files.new_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").read_text() == "mine" and names(tmp_path) == ["folder"]


# lock -----------------------------------------------------------------------------------------------------------------------


WAITER = """
import sys
import time
from pathlib import Path
from lora_lab.files import lock
print("trying", flush=True)
with lock(Path(sys.argv[1])):
    print("in", Path(sys.argv[2]).exists(), flush=True)
"""


@posix
def test_a_second_process_waits_until_the_first_has_left_the_lock(tmp_path):
    path, done = tmp_path / "deep" / "work.lock", tmp_path / "done"
    with files.lock(path):
        waiter = subprocess.Popen([sys.executable, "-c", WAITER, str(path), str(done)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert waiter.stdout.readline() == "trying\n"
        time.sleep(0.2)  # a lock that does not hold lets it in now
        done.write_text("")
    out, _ = waiter.communicate()
    assert out == "in True\n" and waiter.returncode == 0


@posix
def test_the_lock_is_free_again_after_an_exception(tmp_path):
    with pytest.raises(RuntimeError), files.lock(tmp_path / "work.lock"):
        raise RuntimeError("on purpose")
    with files.lock(tmp_path / "work.lock"):
        pass


@posix
def test_the_file_of_a_lock_can_be_run_by_nobody_and_written_as_the_umask_says(tmp_path, umask):
    umask(0o022)
    with files.lock(tmp_path / "work.lock"):
        pass
    assert stat.S_IMODE((tmp_path / "work.lock").stat().st_mode) == 0o644


def test_without_file_locks_the_block_runs_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with files.lock(tmp_path / "work.lock"):
        pass


# Small things ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 1])
def test_sha256_is_that_of_the_whole_file(tmp_path, size):
    content = b"lora" * (size // 4) + b"x" * (size % 4)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LORA_LAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if os.name == "posix":
        assert files.cache_folder() == tmp_path / ".cache" / "lora-lab"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert files.cache_folder() == tmp_path / "xdg" / "lora-lab"
        (tmp_path / "Library" / "Caches").mkdir(parents=True)
        assert files.cache_folder() == tmp_path / "Library" / "Caches" / "lora-lab"
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "mine"))
    assert files.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("LORA_LAB_CACHE", "~/mine")
    assert files.cache_folder() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()  # asking makes nothing


def test_check_writable_leaves_no_trace_but_the_folder(tmp_path):
    files.check_writable(tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out").is_dir() and names(tmp_path / "deep" / "out") == []


def test_check_writable_names_the_folder_and_the_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LoraLabError, match=rf"could not save .* to {folder}: .*(exists|[Nn]ot a directory)"):
            files.check_writable(folder)

    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(LoraLabError, match="Read-only file system"):
        files.check_writable(tmp_path / "new")


def test_saving_translates_what_the_system_refuses_and_nothing_else(tmp_path):
    with pytest.raises(LoraLabError, match=r"could not save it to .*: No space left on device \(what was there before is untouched\)"), \
            files.saving("it", tmp_path):  # fmt: skip
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (KeyError("x"), LoraLabError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, files.saving("it", tmp_path):
            raise error
        assert caught.value is error


def test_saving_translates_safetensors_own_error(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(LoraLabError, match="could not save it"), files.saving("it", tmp_path):
        save_file({}, tmp_path / "no" / "such" / "folder" / "file")


# Several files together -----------------------------------------------------------------------------------------------------


def test_files_are_replaced_together_and_the_rest_of_the_folder_stays(tmp_path):
    for name in ("model.safetensors", "config.json", files.ORIGIN, "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text("old")
    with files.replacing_files(tmp_path) as place:
        (place / "1_Pooling").mkdir()
        for name in ("model.safetensors", "config.json", "1_Pooling/config.json"):
            (place / name).write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    contents = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert contents == {**dict.fromkeys(("model.safetensors", "config.json", "1_Pooling/config.json"), "new"), "README.md": "old",
                        "chat_template.jinja": "old"}  # of a tokenizer that stays; the origin of the weights is gone  # fmt: skip
    assert names(tmp_path) == ["1_Pooling", "README.md", "chat_template.jinja", "config.json", "model.safetensors"]


@pytest.mark.parametrize("what", ["a link out of the folder", "the folder itself a link"])
def test_a_folder_that_came_from_elsewhere_moves_nothing_out_of_itself(tmp_path, what):
    """An interrupted save is finished by whoever loads; a stranger's folder may only look like one."""
    outside, folder = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    (outside / "config.json").write_text("mine")
    decided = folder / files.DECIDED
    if what == "a link out of the folder":
        (decided / "1_Pooling").mkdir(parents=True)
        (decided / "1_Pooling" / "config.json").write_text("theirs")
        (folder / "1_Pooling").symlink_to(outside)
        with pytest.raises(LoraLabError, match="out of its folder"):
            files.settle(folder)
    else:
        folder.mkdir()
        decided.symlink_to(outside)
        files.settle(folder)
    assert names(outside) == ["config.json"] and (outside / "config.json").read_text() == "mine"


def left_by_a_killed_save(folder):
    (folder / files.DECIDED).mkdir(parents=True)
    for number in range(6):
        (folder / files.DECIDED / f"{number}.json").write_text("new")
    return folder


def settled_by_eight(folder, monkeypatch):
    """The names of the files that were moved, by eight threads that begin at once; what went wrong in one is raised."""
    start, moved, replace = threading.Barrier(8), [], os.replace

    def slowly(source, target):
        time.sleep(0.002)
        replace(source, target)
        moved.append(Path(target).name)

    def settle(_):
        start.wait(10)
        files.settle(folder)
        return names(folder)

    monkeypatch.setattr(os, "replace", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == [f"{number}.json" for number in range(6)] for found in pool.map(settle, range(8)))
    return sorted(moved)


@posix
def test_many_may_finish_an_interrupted_save_at_once_and_one_does(tmp_path, monkeypatch):
    """Every process of a launcher loads the same folder; none sees half of it."""
    assert settled_by_eight(left_by_a_killed_save(tmp_path), monkeypatch) == [f"{number}.json" for number in range(6)]


def test_without_file_locks_many_may_finish_an_interrupted_save_as_well(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert {*settled_by_eight(left_by_a_killed_save(tmp_path), monkeypatch)} == {f"{number}.json" for number in range(6)}


def test_nobody_waits_for_a_save_that_has_decided_nothing_yet(tmp_path, monkeypatch):
    with files.replacing_files(tmp_path):
        monkeypatch.setattr(files, "alone_in", None)
        files.settle(tmp_path)
        monkeypatch.undo()


def test_where_an_interrupted_save_cannot_be_finished_nobody_says_that_nothing_was_touched(tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if Path(target).name == "3.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    left_by_a_killed_save(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(LoraLabError, match=r"No space left on device \(some of its files are in place"):
        patch.setattr(os, "replace", full)
        files.settle(tmp_path)
    assert (tmp_path / "2.json").exists() and not (tmp_path / "3.json").exists()
    files.settle(tmp_path)
    assert names(tmp_path) == [f"{number}.json" for number in range(6)]


def test_files_and_names_are_on_the_disk_when_a_save_returns(tmp_path, monkeypatch):
    """Content before the rename, the new name after it: a power failure in between leaves the old file."""
    happened, fsync, replace, rename = [], os.fsync, os.replace, os.rename

    def synced(handle):
        happened.append(("sync", os.stat(handle).st_ino))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: happened.append(("rename", None)) or replace(*paths))
    monkeypatch.setattr(os, "rename", lambda *paths: happened.append(("rename", None)) or rename(*paths))
    files.write_json(tmp_path / "a.json", {})
    assert happened == [("sync", (tmp_path / "a.json").stat().st_ino), ("rename", None), ("sync", tmp_path.stat().st_ino)]
    happened.clear()
    with files.new_folder(tmp_path / "folder") as place:
        (place / "file").write_text("x")
    inside = [("sync", (tmp_path / "folder" / "file").stat().st_ino), ("sync", (tmp_path / "folder").stat().st_ino)]
    assert happened == [*inside, ("rename", None), ("sync", tmp_path.stat().st_ino)]
