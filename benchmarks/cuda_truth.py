"""python benchmarks/cuda_truth.py [--cpu] [--only WORDS] [--output FILE]: predictions against a GPU, 20 configurations.

Each runs in a process of its own: the second step of a training, or the second prompt, of a model with random weights. A line per
configuration shows what memory_math.predict says beside what PyTorch's allocator allocated and reserved at most and what nvidia-smi then
shows, less what others used on the GPU before. What does not fit the GPU, or lacks a library, is skipped with the reason. FILE
(cuda_truth.json) gets everything with versions, driver and date; the last line is a summary of it as JSON.

--cpu, and a machine without a GPU, run the same configurations with tiny shapes on the CPU, where only the allocated bytes and what
autograd keeps can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cuda_cases import CASES, Case, missing_library, truth
from interleaved import Worker, serve, setting

MIB, GIB = 2**20, 2**30


def built_for_cuda() -> bool:
    import torch

    return torch.backends.cuda.is_built()


def gpu_facts() -> dict[str, Any] | None:
    """What nvidia-smi says of the GPU that torch will take, without making a CUDA context here; None where it says nothing."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    fields = "name,driver_version,memory.total,memory.used"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        name, driver, total, used = (word.strip() for word in answer.splitlines()[0].split(","))
        return {"gpu": name, "driver": driver, "total_bytes": int(total) * MIB, "used_bytes": int(used) * MIB}
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None


def why_not(case: Case, footprint: Any, facts: dict[str, Any] | None) -> str | None:
    """Why a configuration is skipped, None where it can run. facts: of the GPU, None on the CPU."""
    from memory_math import MemoryMathError, hardware

    if library := missing_library(case):
        return f"{library} is not installed"
    if facts is None:
        return f"{case.optimizer} is for CUDA" if case.optimizer == "adamw8bit" else None
    try:
        fits = footprint.fits(facts["gpu"])
    except MemoryMathError:  # a GPU that the table does not have
        fits = footprint.total <= facts["total_bytes"] - hardware.CONTEXT_BYTES[1]
    return None if fits else f"{footprint.total / GIB:.1f} GiB are predicted, more than {facts['gpu']} has"


def worker(number: int) -> None:
    """The other side of `in_own_process`: one configuration on the GPU."""
    import torch

    def one_round() -> dict[str, Any]:
        try:
            return {**truth(CASES[number], tiny=False, device="cuda"), "capability": ".".join(map(str, torch.cuda.get_device_capability()))}
        except Exception as failure:  # the table goes on with the next one, and shows this
            return {"error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}

    serve(one_round)


def in_own_process(number: int) -> dict[str, Any]:
    try:
        process = Worker(__file__, str(number))
        process.round()
        process.close()
    except SystemExit as death:
        return {"error": str(death)}
    return process.rounds[0]


def answers(cases: dict[int, Case], facts: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """One entry per configuration, as it is done."""
    from memory_math import MemoryMathError, predict

    tiny = facts is None
    for number, case in cases.items():
        entry: dict[str, Any] = {"name": case.name, **asdict(case)}
        try:
            footprint = predict(case.config(tiny), **case.request(tiny))
        except MemoryMathError as refusal:
            yield {**entry, "skipped": str(refusal)}
            continue
        if reason := why_not(case, footprint, facts):
            yield {**entry, "skipped": reason}
            continue
        before = gpu_facts() if facts else None
        found = truth(case, tiny, "cpu") if tiny else in_own_process(number)
        yield finished(entry, footprint, found, before["used_bytes"] if before else 0)


def finished(entry: dict[str, Any], footprint: Any, found: dict[str, Any], others: int) -> dict[str, Any]:
    """An entry with its totals side by side. others: bytes in use on the GPU before."""
    entry = {**entry, **found}
    if "error" in found:
        return entry
    real = found["measured"]
    if real["nvidia_smi"] is not None:
        real["nvidia_smi"] -= others
    entry["predicted"] = {"allocated": footprint.total, "saved": footprint.saved_bytes}
    for total in ("reserved", "nvidia_smi"):
        interval = getattr(footprint, total)
        entry["predicted"][total] = interval.as_dict() if interval else None
        entry[f"{total}_inside"] = interval.low <= real[total] <= interval.high if interval and real[total] is not None else None
    entry["error_percent"] = 100 * (footprint.total / real["allocated"] - 1)
    return entry


def line(entry: dict[str, Any]) -> str:
    """One line of the table."""
    name = f"{entry['name']:<74}"
    for stopped in ("skipped", "error"):
        if stopped in entry:
            return f"{name} {stopped}: {entry[stopped]}"
    said, real = entry["predicted"], entry["measured"]
    cells = f"{said['allocated'] / MIB:>10.1f} {real['allocated'] / MIB:>10.1f} {entry['error_percent']:>+7.2f}%"
    for total in ("reserved", "nvidia_smi"):
        if real[total] is not None:
            inside = "in" if entry[f"{total}_inside"] else "out"
            cells += f" {said[total]['estimate'] / MIB:>10.0f} {real[total] / MIB:>10.0f} {inside:>4}"
    return f"{name} {cells}"


def header(on_gpu: bool) -> str:
    totals = "".join(f" {total + ' MiB':>10} {'measured':>10} {'':>4}" for total in ("reserved", "smi")) if on_gpu else ""
    return f"{'configuration':<74} {'MiB':>10} {'measured':>10} {'error':>8}{totals}"


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the absolute errors of what was allocated, in percent."""
    errors = [abs(entry["error_percent"]) for entry in entries if "error_percent" in entry]
    counts = {"configurations": len(entries), "measured": len(errors)}
    counts |= {"skipped": sum("skipped" in entry for entry in entries), "failed": sum("error" in entry for entry in entries)}
    inside = {f"{total}_inside": sum(entry.get(f"{total}_inside") is True for entry in entries) for total in ("reserved", "nvidia_smi")}
    worst = {"median_error_percent": statistics.median(errors), "worst_error_percent": max(errors)} if errors else {}
    return {**counts, **inside, **worst}


def where(facts: dict[str, Any] | None) -> dict[str, Any]:
    """Date, machine and versions."""
    import torch

    found = {"benchmark": "cuda_truth", "device": "cuda" if facts else "cpu", **setting(), "cuda": torch.version.cuda}
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes"] = version("bitsandbytes")
    return {**found, **({"gpu": facts["gpu"], "driver": facts["driver"], "gpu_total_bytes": facts["total_bytes"]} if facts else {})}


@contextlib.contextmanager
def only_what_is_new() -> Iterator[None]:
    """Measuring on the CPU looks through all objects of the process: those of the libraries, imported here, are put aside for a while."""
    for name in ("transformers", "peft", "lora_lab.models.llama"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", metavar="NUMBER", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU, also where there is a GPU")
    parser.add_argument("--only", default="", metavar="WORDS", help="the configurations whose name has all of these words")
    parser.add_argument("--output", type=Path, default=Path("cuda_truth.json"), metavar="FILE")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker)
        return
    facts = None if arguments.cpu or not built_for_cuda() else gpu_facts()
    cases = {number: case for number, case in enumerate(CASES) if all(word in case.name.split() for word in arguments.only.split())}
    place, entries = where(facts), []
    print(f"{place.get('gpu', 'CPU, tiny shapes')}, {place['date']}, torch {place['torch']}\n{header(facts is not None)}", flush=True)
    with contextlib.nullcontext() if facts else only_what_is_new():
        for entry in answers(cases, facts):
            entries.append(entry)
            print(line(entry), flush=True)
    arguments.output.write_text(json.dumps({**place, "summary": summary(entries), "results": entries}, indent=1) + "\n")
    print(json.dumps({**place, **summary(entries)}))


if __name__ == "__main__":
    main()
