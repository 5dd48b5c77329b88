"""The documentation keeps its word: its code runs and prints what the pages show, its commands parse, its links lead somewhere.

How a page says what it needs stands in docs_tools.py. With real models only numbers that a test or a benchmark prints are shown.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import Any

import docs_setups
import docs_tools
import pytest
from docs_tools import ROOT, blocks, broken_links, check_command, commands, pages, run_page

import lora_lab
from lora_lab.models import catalogue

PAGES = pages()
TO_RUN = [name for name in PAGES if name.startswith("docs/") and name != "docs/how-to/extend.md" and blocks(name)]  # that one: test_extending.py
KINDS = {"python", "console", "text", "json", ""}


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small models")


@pytest.fixture
def room(small_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, small models under the real ones' names, quiet progress bars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogue, "fetch", lambda name: docs_setups.small_model(small_models, name))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return tmp_path


@pytest.mark.parametrize("name", TO_RUN)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(name: str, room: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_page(name, docs_setups.SETUPS)


def test_the_readmes_code_runs(room: Path) -> None:
    """On a small model; test_readme.py compares what it shows with the real one's."""
    names: dict[str, Any] = {}
    for block in blocks("README.md"):
        if block.kind == "python":
            docs_tools.run_python(block, names)
    assert (room / "adapters" / "reviews" / "adapter_model.safetensors").is_file()
    assert (room / "adapters" / "prompt" / "adapter_model.safetensors").is_file()
    assert sorted(names["prompted"].tasks) == ["deep", "default"]


def test_every_block_has_a_kind_that_is_checked() -> None:
    for name in PAGES:
        for block in blocks(name):
            assert block.kind in KINDS, f"{block.place}: {block.kind!r} is neither run nor checked"


@pytest.mark.parametrize("name", [name for name in PAGES if any(any(commands(block)) for block in blocks(name))])
def test_every_command_of_a_page_exists_and_takes_its_options(name: str) -> None:
    for block in blocks(name):
        for words in commands(block):
            check_command(words, block.place)


def test_every_comment_before_a_block_is_understood() -> None:
    """A misspelt one would switch a comparison off, or a setup, without a word."""
    known = {"setup", "not compared", "not run", "run", "provoke"}
    for name in TO_RUN:
        noted = [(says, more) for block in blocks(name) for says, more in block.notes.items()]
        assert len(noted) == PAGES[name].read_text(encoding="utf-8").count("<!--"), f"{name} has a comment that belongs to no block"
        for says, more in noted:
            assert says in known and (says != "setup" or more in docs_setups.SETUPS), f"{name}: <!-- {says}: {more} -->"


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    assert not broken_links(name)


def test_every_page_is_on_the_map() -> None:
    """docs/README.md."""
    linked = {link.partition("#")[0] for link in docs_tools.LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))}
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert written <= linked


def test_the_reference_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    build: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
    stale = [name for name in {*there, *build.pages()} if there.get(name) != build.pages().get(name)]
    assert not stale, f"docs/reference/{stale[0]} is not what the docstrings say now: python docs/build.py writes it anew"


def test_the_citation_is_of_this_version() -> None:
    assert f"version: {lora_lab.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


# From PEFT and back ---------------------------------------------------------------------------------------------------------------


def table_of_calls() -> list[list[str]]:
    """[PEFT's call, ours] of each line, the code in backticks."""
    text = PAGES["docs/how-to/from-peft-and-back.md"].read_text(encoding="utf-8").split("## Files")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip().strip("`") for cell in cells[:2]] for cells in rows]


@pytest.mark.parametrize("call", [ours for _, ours in table_of_calls()])
def test_a_call_of_ours_beside_pefts_takes_these_arguments(call: str) -> None:
    import prompt_tuning_lab

    bind(call, {**vars(lora_lab), "ptl": prompt_tuning_lab})


@pytest.mark.parametrize("call", [theirs for theirs, _ in table_of_calls() if theirs])
def test_a_call_of_pefts_takes_these_arguments(call: str) -> None:
    import peft
    from peft.optimizers import create_loraplus_optimizer
    from peft.utils.hotswap import hotswap_adapter

    class Wrapped(peft.PeftModel):  # the wrapper's own methods, and those of the tuner that it passes calls on to
        def __getattribute__(self, name: str) -> Any:
            owner = next(cls for cls in (peft.PeftModel, peft.tuners.lora.LoraModel) if hasattr(cls, name))
            return getattr(owner, name).__get__(self)

    model = Wrapped.__new__(Wrapped)
    if call.startswith("model("):
        assert "adapter_names" in call and "adapter_names" in inspect.getsource(peft.tuners.lora.LoraModel)
        return
    bind(call, {**vars(peft), "hotswap_adapter": hotswap_adapter, "create_loraplus_optimizer": create_loraplus_optimizer, "model": model})


def bind(call: str, names: dict[str, Any]) -> None:
    """The outermost function exists and takes these arguments; so do those inside it. Nothing is called."""
    import ast

    for node in ast.walk(ast.parse(call, mode="eval")):
        if isinstance(node, ast.Call):
            function = eval(ast.unparse(node.func), {**names, "print": print})
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(function).bind(*[None for _ in node.args], **keywords) if function is not print else None
