"""The command line in process, in a folder with a model, rows of text and an adapter."""

from __future__ import annotations

import re
import shutil

from lora_lab.__main__ import main

CONTEXT = 128


class Folder:
    """A folder in which commands run: a model, rows of text, and what tests put beside them."""

    def __init__(self, folder):
        self.folder, self.model, self.rows = folder, folder / "model", folder / "rows.jsonl"

    def file(self, name, content):
        path = self.folder / name
        path.write_text(content)
        return path

    def copied(self, folder):
        """The same in another folder, for a test to change."""
        shutil.copytree(self.folder, folder)
        return type(self)(folder)

    def contents(self):
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


class Shop(Folder):
    """With an adapter from an earlier run."""

    def __init__(self, folder):
        super().__init__(folder)
        self.adapter = folder / "adapter"

    def finetune(self, **changes):
        given = {"model": self.model, "data": self.rows, "out": self.adapter, "precision": "fp32", "max-steps": 3, "rank": 2, **changes}
        return run("finetune", **given)

    def generate(self, **changes):
        return run("generate", **{"model": self.model, "prompt": "Say one.", "max-new-tokens": 5, "temperature": 0, "precision": "fp32", **changes})

    def inspect(self, **changes):
        return run("inspect", **{"model": self.model, **changes})


def run(command, by=main, **options):
    """main(), or another one, with --name value for each option; a value of None leaves the option out, True is a switch, a list several words."""
    words = [command]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *([] if value is True else map(str, value) if isinstance(value, list) else [str(value)])]
    return by(words)


def check_refusal(code, capsys, message):
    """Exit code 2 and one "error:" line, perhaps with one indented line below; no traceback."""
    err = capsys.readouterr().err
    assert code == 2
    assert len(re.findall(r"^error: ", err, re.MULTILINE)) == 1 and "Traceback" not in err
    lines = err[err.index("error: ") :].rstrip("\n").split("\n")
    assert len(lines) <= 2 and all(line.startswith("  ") for line in lines[1:])
    assert re.search(message, "\n".join(lines))


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
