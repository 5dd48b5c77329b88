"""Names of modules and parameters: paths with dots, and what of them a request names."""

from __future__ import annotations

from collections.abc import Collection


def name_matches(name: str, path: str) -> bool:
    """Equal, or equal from a dot on, PEFT's rule for names of modules.

    >>> name_matches("q_proj", "layers.0.q_proj"), name_matches("q_proj", "layers.0.seq_proj")
    (True, False)
    """
    return path == name or path.endswith(f".{name}")


def is_inside(path: str, modules: Collection[str]) -> bool:
    """Whether a path is that of one of these modules, or of something in one.

    >>> is_inside("head.proj", ["head"]), is_inside("header", ["head"])
    (True, False)
    """
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def ancestors(path: str) -> list[str]:
    """A path and the containers it is in.

    >>> ancestors("a.b.c")
    ['a', 'a.b', 'a.b.c']
    """
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def layer_number(path: str) -> int | None:
    """The first number in a path, as in PEFT's layers_to_transform."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
