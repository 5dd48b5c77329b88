"""What the names in `modules_to_save` mean to PEFT: every module whose path ends so, without regard to dots. "norm" is "input_layernorm", too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..base_parameters import of_an_adapter, paths_with_parameters


def meant_by_peft(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules with parameters that `modules_to_save` means in a file."""
    return [path for path in paths_with_parameters(model) if path.endswith(tuple(names))]


def exact_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The shortest name for each that means none but these to PEFT; the path itself where there is none ("head" beside "aux_head")."""
    present = [path for path, _ in model.named_modules(remove_duplicate=False) if path and not of_an_adapter(path)]

    def shortest(path: str) -> str:
        parts = path.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts))]
        return next((end for end in ends if all(other in paths for other in present if other.endswith(end))), path)

    return list(dict.fromkeys(map(shortest, paths)))
