"""Writes docs/reference/*.md from the docstrings: python docs/build.py

Every public name with its signature and its docstring, and every command with its options; `inspect` and argparse say what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = ("lora_lab", "prompt_tuning_lab", "memory_math")
MODULES = {"lora_lab": "lora_lab.md", "lora_lab.models": "models.md", "lora_lab.data": "data.md", "lora_lab.training": "training.md",
           "prompt_tuning_lab": "prompt_tuning_lab.md", "memory_math": "memory_math.md"}  # fmt: skip
# What has no docstring of its own: names for types, and tables.
ALIASES = {
    "Row": "`dict[str, Any]`: `{\"instruction\", \"input\", \"output\"}` (input may be missing), `{\"messages\": [{\"role\", \"content\"}, ...]}`, "
           "`{\"text\", \"label\"}`, `{\"dialogue\", \"summary\"}`, or `{\"input_ids\", \"labels\"}`.",
    "Example": "`dict[str, list[int]]`: `{\"input_ids\", \"labels\"}`; a label of -100 is not learned.",
    "Batch": "`dict[str, Any]`: the arguments of the model's forward, by name.",
    "CHAT_TEMPLATES": "Name -> Jinja template: alpaca, dolly, vicuna, koala, baize, llama-2-chat, chatml.",
}  # fmt: skip
NOTE = "<!-- Written by docs/build.py from the docstrings; edit those. -->"


def main() -> None:
    for name, text in pages().items():
        (ROOT / "docs" / "reference" / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Name of the file -> its text."""
    return {**{file: page_of(importlib.import_module(name)) for name, file in MODULES.items()}, "commands.md": commands_page()}


# A module ------------------------------------------------------------------------------------------------------------------------


def page_of(module: ModuleType) -> str:
    names = [name for name in public(module) if not isinstance(getattr(module, name), (ModuleType, str))]
    inside = [name for name in public(module) if isinstance(getattr(module, name), ModuleType)]
    first = sorted(names, key=lambda name: (inspect.isclass(getattr(module, name)), name.lower()))
    parts = [f"# {module.__name__}", NOTE, as_markdown(module.__doc__), " · ".join(contents(first))]
    parts += [section(name, getattr(module, name)) for name in first]
    parts += [f"## {name}\n\nA module: {first_line(getattr(module, name))}" for name in inside if f"{module.__name__}.{name}" not in MODULES]
    return "\n\n".join(parts) + "\n"


def contents(names: list[str]) -> Iterator[str]:
    """Links to the headings; of two that differ in case only, a forge numbers the second."""
    anchors = [name.lower() for name in names]
    for index, (name, anchor) in enumerate(zip(names, anchors, strict=True)):
        yield f"[{name}](#{anchor}{f'-{before}' if (before := anchors[:index].count(anchor)) else ''})"


def public(module: ModuleType) -> list[str]:
    return [name for name in module.__all__ if not name.startswith("__")]


def section(name: str, thing: Any) -> str:
    if not inspect.isclass(thing):
        return f"## {name}\n\n{as_code(name, thing)}\n\n{ALIASES.get(name) or as_markdown(thing.__doc__)}"
    parts = [f"## {name}", as_code(f"class {name}", thing)]
    if own_docstring(thing):
        parts.append(as_markdown(thing.__doc__))
    if fields := field_notes(thing):
        parts.append(fields)
    parts += [f"**`{name}.{method}{shown}`** {first_line(what)}".rstrip() for method, shown, what in members(thing)]
    return "\n\n".join(parts)


def own_docstring(cls: type) -> bool:
    """A dataclass without one has its signature there."""
    return bool(cls.__doc__) and not cls.__doc__.startswith(f"{cls.__name__}(")


def members(cls: type) -> Iterator[tuple[str, str, Any]]:
    """(name, signature, what it is) of public methods and properties that our own classes define and say something about."""
    seen: set[str] = set()
    for owner in cls.__mro__:
        for name, value in vars(owner).items() if owner.__module__.startswith(OURS) else ():
            what = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if not name.startswith("_") and name not in seen and (isinstance(what, property) or inspect.isfunction(what)) and inspect.getdoc(what):
                seen.add(name)
                yield name, "" if isinstance(what, property) else signature(what), what


def field_notes(cls: type) -> str:
    """A table of the fields that have a text under them."""
    if not dataclasses.is_dataclass(cls):
        return ""
    found = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', inspect.getsource(cls), re.MULTILINE | re.DOTALL)
    rows = [f"| `{name}` | {' '.join(text.split()).replace('|', chr(92) + '|')} |" for name, text in found]
    return "\n".join(["| field | |", "|---|---|", *rows]) if rows else ""


# A signature ---------------------------------------------------------------------------------------------------------------------


def signature(thing: Any) -> str:
    """As it is written, annotations included, whatever the version of Python.

    >>> signature(annotation)
    '(value: Any) -> str'
    """
    if (parameters := shown_parameters(thing)) is None:
        return ""
    returns = inspect.Signature.empty if inspect.isclass(thing) else inspect.signature(thing).return_annotation
    return f"({', '.join(arguments(parameters))}){'' if returns is inspect.Signature.empty else f' -> {annotation(returns)}'}"


def shown_parameters(thing: Any) -> Any:
    """None where Python knows of none; what it says of an exception's differs from version to version."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return None
    try:
        return [each for each in inspect.signature(thing).parameters.values() if each.name not in ("self", "cls")]
    except (TypeError, ValueError):
        return None


def arguments(parameters: list[inspect.Parameter]) -> Iterator[str]:
    starred = False
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        starred = starred or each.kind is each.VAR_POSITIONAL
        star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        typed = "" if each.annotation is each.empty else f": {annotation(each.annotation)}"
        given = "" if each.default is each.empty else f"{' = ' if typed else '='}{default(each.default)}"
        yield f"{star}{each.name}{typed}{given}"


def annotation(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def default(value: Any) -> str:
    """Without addresses, which differ from run to run."""
    return "..." if " at 0x" in repr(value) or "<" in repr(value) else repr(value)


# Text ----------------------------------------------------------------------------------------------------------------------------


def as_markdown(docstring: str | None) -> str:
    """Paragraphs and indented lines as they are, doctests as code; the rest may hold anything, so it is shown as it was written."""
    parts = re.split(r"((?:^>>> .*\n?(?:^(?!>>> )\S.*\n?)*)+)", inspect.cleandoc(docstring or ""), flags=re.MULTILINE)
    shown = [f"```pycon\n{part.strip()}\n```" if part.startswith(">>>") else prose(part.strip("\n")) for part in parts]
    return "\n\n".join(part for part in shown if part.strip())


def prose(text: str) -> str:
    """Paragraphs with indented lines are laid out by hand and stay so; others flow."""
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    return "\n\n".join(f"```text\n{part}\n```" if re.search(r"^ ", part, re.MULTILINE) else escaped(part) for part in paragraphs)


def escaped(text: str) -> str:
    """A line of a docstring is a line of the page; what Markdown would take for markup is text, but code stays code."""
    lines = []
    for line in text.splitlines():
        pieces = re.split(r"(``.+?``|`.+?`)", line)
        lines.append("".join(piece if piece.startswith("`") else re.sub(r"([*_<>\[\]])", r"\\\1", piece) for piece in pieces))
    return "  \n".join(lines)


def as_code(head: str, thing: Any, width: int = 120) -> str:
    """A declaration; one that is too long for a line has its arguments on several."""
    text = f"{head}{signature(thing)}"
    if len(text) > width:
        given, returns = arguments(shown_parameters(thing)), text.rpartition(")")[2]
        filled = textwrap.wrap(", ".join(each.replace(" ", "\0") for each in given), width, initial_indent="    ", subsequent_indent="    ",
                               break_long_words=False, break_on_hyphens=False)  # fmt: skip
        text = "\n".join([f"{head}(", *(line.replace("\0", " ") for line in filled), f"){returns}"])
    return f"```python\n{text}\n```"


def first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


# The command lines ---------------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    parts = ["# The command lines", NOTE]
    for package in OURS:
        entry: Any = importlib.import_module(f"{package}.__main__")
        top = getattr(entry, "parser", None) or entry._parser
        parts.append(f"## python -m {package}")
        parts += [f"### {package} {name}\n\n{command(parser, says)}" for name, parser, says in subcommands(top())]
    return "\n\n".join(parts) + "\n"


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """(name, its parser, what it does)."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            says = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, each in action.choices.items():
                yield name, each, says.get(name, "")


def command(parser: argparse.ArgumentParser, says: str) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows = [f"| `{', '.join(action.option_strings) or action.metavar or action.dest}` | {note(action)} |" for action in actions]
    table = "\n".join(["| option | |", "|---|---|", *rows]) if rows else ""
    return f"{says[:1].upper()}{says[1:].removesuffix('.')}.\n\n{table}".strip()


def note(action: argparse.Action) -> str:
    """What the option is, and what it is where it is not given."""
    said = escaped((action.help or "").replace("%%", "%").replace("|", "\\|"))
    switch = action.nargs == 0
    told = [said] if said else []
    if action.choices:
        told.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    if action.required and action.option_strings:
        told.append("**needed**")
    if not switch and action.default not in (None, argparse.SUPPRESS) and "default" not in said:
        told.append(f"default `{action.default}`")
    return "; ".join(told)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
