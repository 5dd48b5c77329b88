"""The README keeps its word: its code runs, its commands exist; and docs/what-is-where.md, the tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lora_lab

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = (ROOT / "docs" / "what-is-where.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
PRINTED = re.search(r"prints\n\n```text\n(.*?)```", README, re.DOTALL).group(1)


def test_the_example_has_at_most_twelve_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 12


@pytest.mark.real
def test_the_example_runs_and_prints_the_count_the_readme_shows(smollm2, tmp_path, monkeypatch, capsys):
    """With one step in place of thirty; the text it writes depends on the machine's rounding, the count does not."""
    monkeypatch.chdir(tmp_path)
    code = EXAMPLE.replace('"max_steps": 30', '"max_steps": 1, "progress": False')
    assert code != EXAMPLE
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == PRINTED.splitlines()[0]
    assert len(printed[1]) > 20
    assert (tmp_path / "adapters" / "reviews" / "adapter_model.safetensors").is_file()


def test_every_file_the_tree_names_exists():
    tree = re.search(r"```text\n(.*?)```", TREE, re.DOTALL).group(1)
    package, missing = "", []
    for line in tree.splitlines():
        if not line.startswith(" "):
            package = line.split("/")[0]
        for name in re.findall(r"[\w/]+\.py", line):
            if not list((ROOT / package).rglob(name.rsplit("/", 1)[-1])):
                missing.append(name)
    assert not missing


def test_every_module_of_lora_lab_is_in_the_tree():
    names = {path.name for path in (ROOT / "lora_lab").rglob("*.py") if not path.name.startswith("__init__") and path.name != "version.py"}
    assert {name for name in names if name not in TREE} == set()


def test_every_make_target_the_readme_names_exists():
    """In its texts as well; the commands of its blocks are held by test_docs.py."""
    makefile, targets = (ROOT / "Makefile").read_text(), re.findall(r"(?:`|\$ )make (?:PYTHON=\S+ )?([a-z]+)", README)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(("command", "printed"), re.findall(r"\$ python -m memory_math (.*)\n```\n\n```text\n(.*?)\n```", README, re.DOTALL))
def test_what_memory_math_prints_is_what_the_readme_shows(command, printed, capsys):
    from memory_math.__main__ import main

    assert main(command.split()) == 0
    assert capsys.readouterr().out.rstrip("\n") == printed


def test_every_command_and_number_of_memory_math_in_the_readme_holds(capsys):
    import memory_math
    from memory_math.__main__ import main

    commands = re.findall(r"`python -m memory_math (.*?)`", README)
    assert commands
    for command in commands:
        assert main(command.split()) == 0, command
    capsys.readouterr()
    formula = re.search(r"activation_formula\('llama-2-7b', precision='bf16'\)\)\"`: (.*?) \|", README).group(1)
    assert str(memory_math.activation_formula("llama-2-7b", precision="bf16")) == formula
    claims, names = memory_math.claims(), len(memory_math.presets.PRESETS)
    counts = claims.counts()
    unknown, wrong = counts["not measured here"], counts["wrong"]
    assert f"{len(claims)} numbers of lectures and papers, {len(claims) - unknown} of them recomputed: {wrong} are wrong" in README
    assert f"{unknown} are facts or measurements" in README
    assert f"{names} models by name" in README


def test_what_this_library_needs_is_said_beside_the_table_of_pefts():
    import memory_math

    said = re.search(r"`--implementation lora_lab` \(there: lora ([\d.]+), qlora ([\d.]+) GiB\)", README).groups()
    request = {"precision": "bf16-mixed", "sequence_length": 1024, "device": "cuda", "implementation": "lora_lab"}
    compared = [memory_math.predict("llama-3-8b", method=method, **request).gib() for method in ("lora", "qlora")]
    assert [f"{gib:.2f}" for gib in compared] == [*said]


def test_what_four_gpus_need_is_what_is_predicted():
    import memory_math

    call, divided, whole = re.search(r"`memory_math\.(predict\(.*?\))` says ([\d.]+) GiB.*?\(DDP\) ([\d.]+)\.", README, re.DOTALL).groups()
    footprint = eval(call, {"predict": memory_math.predict})
    assert round(footprint.gib(), 2) == float(divided)
    alone = eval(call.replace("zero_stage=3", "zero_stage=0"), {"predict": memory_math.predict})
    assert round(alone.gib(), 2) == float(whole)


def test_the_accuracy_in_the_readme_is_the_benchmarks():
    from memory_accuracy import score

    summary = score(lambda line: None).summary
    said = re.search(r"against (\d+) published figures.*?median error is ([\d.]+) %, the worst ([\d.]+) %", README, re.DOTALL)
    median, worst = (round(100 * summary[name], 1) for name in ("median_absolute_error", "worst_absolute_error"))
    assert [int(said[1]), float(said[2]), float(said[3])] == [summary["scored_rows"], median, worst]


def test_the_version_is_the_changelogs():
    assert f"## {lora_lab.__version__}" in (ROOT / "CHANGELOG.md").read_text()
