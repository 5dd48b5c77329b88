"""Reading the pages of the documentation: blocks of code with the comments before them, commands, links; and running them on small models.

A page's Python blocks share a namespace and run in an empty folder. An HTML comment right before a block, which no reader sees, says more:

    <!-- setup: NAME -->            the names that `docs_setups.NAME` makes are there from here on
    <!-- not compared: WHY -->      the ```text block below a block of code shows what it prints, except here
    <!-- run -->                    the commands of a ```console block are run, on small models, and not only parsed
    <!-- provoke: CODE -->          the ```text block is the error that this expression raises; "..." stands for any text

LORA_LAB_WRITE_DOCS=1 pytest tests/test_docs.py writes what is printed now into the pages, where it is right that it has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- ([\w ]+?)(?:: ((?:(?!-->).)*?))? -->", re.DOTALL)
COMMENTS = re.compile(rf"(?:{COMMENT.pattern}\s*)+\Z", re.DOTALL)  # those right before a block
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = "docs/reference/"
# So many steps are for a reader; what is claimed of them is measured elsewhere.
QUICKER = ((re.compile(r'("?max_steps"?[:=] ?)\d{2,}'), r"\g<1>2"), (re.compile(r"\bepochs=\d+"), "max_steps=2"))


def pages() -> dict[str, Path]:
    """Every page that people write, by its path from the root."""
    found = [*sorted(ROOT.glob("*.md")), ROOT / "notebooks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {name: path for path in found if not (name := path.relative_to(ROOT).as_posix()).startswith(GENERATED)}


@dataclass(frozen=True)
class Block:
    """kind: of the fence.  line: of its first line in the page.  notes: of the comments before it, what each says -> more of it."""

    page: str
    line: int
    kind: str
    text: str
    notes: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"


def blocks(name: str) -> list[Block]:
    text, found = (ROOT / name).read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        comments = COMMENTS.search(before)
        notes = dict(COMMENT.findall(comments[0])) if comments else {}
        found.append(Block(name, before.count("\n") + 2, match[1], match[2], notes))
    return found


# Running ------------------------------------------------------------------------------------------------------------------------


def run_page(name: str, setups: dict[str, Callable[[], dict[str, Any]]], namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a page's blocks in order, compare what they print with what is shown, and return the names they leave."""
    names, printed = {"__name__": "page"} if namespace is None else namespace, None
    for block in blocks(name):
        if "setup" in block.notes:
            names.update(setups[block.notes["setup"]]())
        if block.kind == "python":
            printed = run_python(block, names)
        elif block.kind == "console":
            printed = "".join([run_command(words, block) for words in commands(block)]) if runs(block) else None
        elif "provoke" in block.notes:
            compare_error(block, names)
        elif block.kind == "text" and printed is not None and "not compared" not in block.notes:
            if os.environ.get("LORA_LAB_WRITE_DOCS"):
                show(block, printed)
            else:
                assert lines(printed) == lines(block.text), f"{block.place} shows something else than the code above it prints:\n{printed}"
            printed = None
    return names


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    """What the block prints. Line numbers in a traceback are the page's."""
    text, out = block.text, io.StringIO()
    for pattern, quick in QUICKER:
        text = pattern.sub(quick, text)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(compile("\n" * (block.line - 1) + text, block.page, "exec", dont_inherit=True), namespace)
    return out.getvalue()


def show(block: Block, printed: str) -> None:
    """Put it into the page, in the place of what the block shows."""
    path, fresh = ROOT / block.page, "\n".join(lines(printed)) + "\n"
    path.write_text(path.read_text(encoding="utf-8").replace(f"```text\n{block.text}```", f"```text\n{fresh}```", 1), encoding="utf-8")


def compare_error(block: Block, namespace: dict[str, Any]) -> None:
    """The text is the message; "..." in it stands for anything."""
    try:
        eval(block.notes["provoke"], namespace)
    except ValueError as error:  # LoraLabError and MemoryMathError
        message = str(error)
    else:
        raise AssertionError(f"{block.place}: {block.notes['provoke']} raises nothing")
    pattern = ".*?".join(re.escape(part) for part in " ".join(block.text.split()).split("..."))
    assert re.fullmatch(pattern, " ".join(message.split())), f"{block.place} shows another message than\n{message}"


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


# Commands -----------------------------------------------------------------------------------------------------------------------


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each line that begins with a prompt."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield shlex.split(line[2:], comments=True)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The real ones, by the name of their package."""
    import lora_lab.__main__ as lora
    import memory_math.__main__ as memory
    import prompt_tuning_lab.__main__ as prompts

    return {"lora_lab": lora.parser(), "prompt_tuning_lab": prompts.parser(), "memory_math": memory._parser()}


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """(package, its arguments) of `python -m package ...`, also under torchrun; ("", []) of any other command."""
    if "-m" in words and (at := words.index("-m")) and words[at + 1] in ("lora_lab", "prompt_tuning_lab", "memory_math"):
        return words[at + 1], words[at + 2 :]
    return "", []


def runs(block: Block) -> bool:
    """Arithmetic always runs."""
    return "run" in block.notes or all(module_of(words)[0] == "memory_math" for words in commands(block))


def check_command(words: list[str], place: str) -> None:
    """The command exists and takes these options."""
    package, arguments = module_of(words)
    if package:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                parsers()[package].parse_args(arguments)
        except SystemExit:
            raise AssertionError(f"{place}: {shlex.join(words)}: {errors.getvalue()}") from None
        return
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word)]  # of the environment, or of make
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{place}: no target {words[1]!r} in the Makefile"
    elif (script := next((word for word in words if word.endswith(".py")), None)) is not None:
        assert (ROOT / script).is_file() or words[0] == "torchrun", f"{place}: there is no {script}"
    else:
        assert words[0] in ("pip", "git", "python3") or "pytest" in words, f"{place}: {shlex.join(words)}: what is that?"


def run_command(words: list[str], block: Block) -> str:
    """What the command prints; it has to succeed."""
    package, arguments = module_of(words)
    main, out, errors = __import__(f"{package}.__main__", fromlist=["main"]).main, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(arguments)
    assert code == 0, f"{block.place}: {shlex.join(words)}: {errors.getvalue()}"
    return out.getvalue()


# Links --------------------------------------------------------------------------------------------------------------------------


def broken_links(name: str) -> list[str]:
    """Links to files that are not there, and to headings that no page has."""
    path, broken = ROOT / name, []
    for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    return broken


def headings(path: Path) -> set[str]:
    """The anchors that a forge gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).strip().replace(" ", "-") for title in titles}
