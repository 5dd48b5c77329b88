"""Run the notebooks of this folder, and see that each .py and its .ipynb say the same.

    python notebooks/build.py                 execute all with the real model, and write their .ipynb (about ten minutes each on 2 cores)
    python notebooks/build.py 02 04           those whose names begin so
    python notebooks/build.py --fast          with models of a million random weights, in a temporary folder; writes nothing
    python notebooks/build.py --texts         executes nothing: texts that were changed, into the .ipynb whose code is the same
    python notebooks/build.py --check         executes nothing: where a pair has drifted

NN-name.py is the source, in jupytext's percent format, and is what one edits; NN-name.ipynb is made from it, by the Python that runs this file.
Exit status 1 where a notebook fails, says that something it claims did not hold, has a solution its check refuses, or has drifted.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = Path(__file__).resolve().parent
KERNEL = "python3"
BAR = re.compile(r"\d+%\|")  # tqdm's
DRAWN = re.compile(r"\[?(<matplotlib\.|Text\()")  # what a cell that draws leaves behind beside its figure
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL}, "language_info": {"name": "python"}}


def sources(names: list[str] | None = None) -> list[Path]:
    """The notebooks' sources in order, or those whose names begin with one of these. Raises SystemExit for a name that none begins with."""
    found = sorted(FOLDER.glob("[0-9][0-9]-*.py"))
    for name in names or ():
        if not any(path.name.startswith(name) for path in found):
            raise SystemExit(f"no notebook begins with {name!r}: there are {', '.join(path.stem for path in found)}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def read_source(source: Path) -> Any:
    """The notebook that a .py stands for, without outputs; the cells' ids are their numbers, so that they stay when it is made again."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(source: Path, *, fast: bool = False) -> Any:
    """The executed notebook. Raises CellExecutionError for a cell that raises.

    It runs in a folder of its own that is thrown away, with the course and the packages of this checkout on its path.
    """
    notebook, started = read_source(source), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lora-lab-notebook-") as folder:
        work = Path(folder) / "work"
        work.mkdir()
        write_kernel_spec(str(Path(folder) / "kernels" / KERNEL))
        specs = KernelSpecManager(kernel_dirs=[str(Path(folder) / "kernels")], ensure_native_kernel=False)
        manager = AsyncKernelManager(kernel_name=KERNEL, kernel_spec_manager=specs)
        client = NotebookClient(notebook, km=manager, timeout=None, resources={"metadata": {"path": str(work)}}, coalesce_streams=True,
                                extra_arguments=["--log-level=ERROR"])  # fmt: skip
        client.execute(env=environment(fast), cleanup_kc=True)  # a kernel that is given is left running otherwise
    return tidy(notebook, time.perf_counter() - started)


def environment(fast: bool) -> dict[str, str]:
    paths = [str(FOLDER), str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": "1"} if fast else {}  # small products are slower in two
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "LORA_LAB_COURSE": "fast" if fast else "real", **threads}  # fmt: skip


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tidy(notebook: Any, seconds: float) -> Any:
    """Without the times of cells and progress bars; figures in 128 colours, which makes their files a third as large."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                output.text = "".join(line for line in output.text.splitlines(keepends=True) if not BAR.search(line))
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = smaller(png)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_idle(output)]
    notebook.metadata = nbformat.from_dict({**METADATA, "course": {"seconds": round(seconds), "cores": cores()}})
    return notebook


def is_idle(output: Any) -> bool:
    """Whether there is nothing in it for a reader: an empty stream, or the repr of what a figure was drawn with."""
    if output.get("name") == "stderr":
        return not output.text.strip()
    data = output.get("data", {})
    return [*data] == ["text/plain"] and DRAWN.match(data["text/plain"]) is not None


def smaller(png: str) -> str:
    """A base64 PNG with a palette."""
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def drift(source: Path) -> str | None:
    """What is wrong with a source's .ipynb: missing, not executed, or made from another source; None where all is well."""
    target = source.with_suffix(".ipynb")
    if not target.is_file():
        return f"{target.name} is missing"
    made, wanted = nbformat.read(target, as_version=4).cells, read_source(source).cells
    for number, (left, right) in enumerate(zip(made, wanted, strict=False)):
        if any(left[part] != right[part] for part in ("cell_type", "source", "metadata")):
            return f"{target.name} was not made from {source.name} as it is: they differ in cell {number}, {right.source[:60]!r}"
        if left.cell_type == "code" and left.source.strip() and left.execution_count is None:
            return f"cell {number} of {target.name} was not executed"
    return f"{target.name} has {len(made)} cells, {source.name} {len(wanted)}" if len(made) != len(wanted) else None


def renew_texts(source: Path) -> str | None:
    """Write the texts of a source into its pair, where the code is the same: outputs stay. Returns what is wrong with the pair then, as `drift`."""
    target, wanted = source.with_suffix(".ipynb"), read_source(source)
    if target.is_file():
        made = nbformat.read(target, as_version=4)
        wanted.metadata, before, after = made.metadata, code_cells(made), code_cells(wanted)
        if [cell.source for cell in before] == [cell.source for cell in after]:
            for old, new in zip(before, after, strict=True):
                new.outputs, new.execution_count = [output for output in old.outputs if not is_idle(output)], old.execution_count
            nbformat.write(wanted, target)
    return drift(source)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def complaints(notebook: Any) -> list[str]:
    """What an executed notebook says of itself that must not be: claims that did not hold, solutions that are refused, warnings."""
    found = []
    for number, cell in enumerate(notebook.cells):
        printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
        found += [f"cell {number}: {line}" for line in printed.splitlines() if line.startswith("✗")]
        if "solution" in cell.metadata.get("tags", []) and ("yes: " not in printed or "not yet: " in printed):
            found.append(f"cell {number}: its check does not pass the solution: {printed.strip() or 'nothing printed'}")
    return found


def build(source: Path, fast: bool) -> bool:
    """Execute one, tell how it went, and write it unless fast; returns whether all is well."""
    started = time.perf_counter()
    try:
        notebook = execute(source, fast=fast)
    except CellExecutionError as error:
        print(f"{source.name}: {error}", flush=True)
        return False
    wrong = complaints(notebook)
    print("\n".join([f"{source.name}: {time.perf_counter() - started:.0f} s", *(f"  {line}" for line in wrong)]), flush=True)
    if not fast:
        nbformat.write(notebook, source.with_suffix(".ipynb"))
    return not wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help="beginnings of notebooks' names; none means all")
    parser.add_argument("--fast", action="store_true", help="models of a million weights; writes nothing")
    parser.add_argument("--texts", action="store_true", help="write changed texts into the .ipynb; executes nothing")
    parser.add_argument("--check", action="store_true", help="say where a pair has drifted")
    options = parser.parse_args(arguments)
    chosen = sources(options.names)
    if options.check or options.texts:
        drifted = [problem for source in chosen if (problem := (renew_texts if options.texts else drift)(source))]
        print("\n".join(drifted or [f"{len(chosen)} pairs agree"]))
        return int(bool(drifted))
    return int(not min([build(source, options.fast) for source in chosen]))


if __name__ == "__main__":
    sys.exit(main())
