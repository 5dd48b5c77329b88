"""The public contract: names, signatures and command-line options of the three packages, as contract.txt beside this file has them.

    python tests/test_contract.py        # writes contract.txt anew, where a change is meant

Annotations are left to mypy. A name that goes, or an argument that gets another name or default, breaks somebody's program: CONTRIBUTING.md says how
that is done.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SNAPSHOT = Path(__file__).with_name("contract.txt")
MODULES = ("lora_lab", "lora_lab.models", "lora_lab.data", "lora_lab.training", "prompt_tuning_lab", "memory_math")
COMMANDS = ("lora_lab", "prompt_tuning_lab", "memory_math")
WAY_OUT = """the public contract has changed:

{changes}

If that is meant: `python tests/test_contract.py` writes tests/contract.txt anew, and CHANGELOG.md gets a line that tells users; for what went or
means something else now, the deprecation policy in CONTRIBUTING.md says how."""


def test_names_signatures_and_options_are_those_that_users_were_promised() -> None:
    changes = difference(SNAPSHOT.read_text(encoding="utf-8"), snapshot())
    assert not changes, WAY_OUT.format(changes=changes)


def test_a_change_is_told_with_its_place() -> None:
    """What the check says of an argument that was renamed, a name that went, and one that came."""
    before = snapshot()
    after = before.replace("    trainable = False\n", "    trains = False\n", 1).replace("lora_lab.eject\n", "lora_lab.reject\n", 1)
    told = difference(before, after).splitlines()
    assert told == ["-lora_lab.eject", "lora_lab.load", "-    trainable = False", "+    trains = False", "+lora_lab.reject"]


def test_what_a_module_promises_is_there_and_has_a_text() -> None:
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            documented = inspect.getdoc(thing) if inspect.isclass(thing) or callable(thing) or inspect.ismodule(thing) else "data"
            assert documented, f"{module.__name__}.{name} has no docstring"


def difference(before: str, after: str) -> str:
    """What went (-), what came (+), and under the name it belongs to what changed; "" where nothing did."""
    told, (old, new) = [], (sections(before), sections(after))
    for name in sorted({*old, *new}):
        if name not in old or name not in new:
            told.append(f"{'+' if name in new else '-'}{name}")
        elif old[name] != new[name]:
            told += [name, *(f"{line[0]}{line[2:]}" for line in difflib.ndiff(old[name], new[name]) if line[0] in "+-")]
    return "\n".join(told)


def sections(text: str) -> dict[str, list[str]]:
    """Name -> the lines below it, which are indented."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith(" "):
            found[next(reversed(found))].append(line)
        else:
            found[line] = []
    return found


# The snapshot ----------------------------------------------------------------------------------------------------------------------


def snapshot() -> str:
    lines = [line for name in MODULES for line in of_module(name)]
    lines += [line for package in COMMANDS for line in of_commands(package)]
    return "\n".join(lines) + "\n"


def of_module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for public in sorted(module.__all__):
        thing, path = getattr(module, public), f"{name}.{public}"
        if inspect.isclass(thing):
            yield f"class {path}"
            yield from parameters(thing)
            for member, value in sorted(members(thing)):
                yield f"{path}.{member}"
                yield from parameters(value) if callable(value) else ()
        elif callable(thing):
            yield path
            yield from parameters(thing)
        else:
            yield f"{'module' if inspect.ismodule(thing) else 'data'} {path}"


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that classes of ours define; a dataclass's fields are the arguments of its class."""
    ours = [vars(owner) for owner in reversed(cls.__mro__) if owner.__module__.startswith(COMMANDS)]
    for name, value in {name: value for own in ours for name, value in own.items()}.items():
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, classmethod, staticmethod))):
            yield name, getattr(cls, name)


def parameters(thing: Any) -> Iterator[str]:
    """A line each, the bare star included: behind it they are given by name. What Python says of an exception's differs by version."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return
    try:
        given = [each for each in inspect.signature(thing).parameters.values() if each.name != "self"]
    except (TypeError, ValueError):
        return
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    starred = False
    for each in given:
        if each.kind is each.KEYWORD_ONLY and not starred:
            yield "    *"
        starred = starred or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        default = "" if each.default is each.empty else f" = {shown(each.default)}"
        yield f"    {stars.get(each.kind, '')}{each.name}{default}"


def shown(value: Any) -> str:
    """A default; of what prints an address only that there is one."""
    text = repr(value)
    return "..." if text.startswith("<") or " at 0x" in text else text


def of_commands(package: str) -> Iterator[str]:
    entry: Any = importlib.import_module(f"{package}.__main__")
    for action in (getattr(entry, "parser", None) or entry._parser)()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"python -m {package} {name}"
                yield from sorted(f"    {option(each)}" for each in command._actions if not isinstance(each, argparse._HelpAction))


def option(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or action.dest
    default = "" if action.default in (None, argparse.SUPPRESS) or action.nargs == 0 else f" = {action.default}"
    return f"{name}{default}{'' if action.choices is None else f' of {list(action.choices)}'}{' (needed)' if action.required else ''}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
