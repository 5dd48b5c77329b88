"""The rooms and the arrows between them, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lora_lab", "memory_math", "prompt_tuning_lab")
# Every other file of lora_lab is LoRA itself: torch and safetensors only
WORKSHOP = ("models", "data", "training", "tasks", "comparison", "commands", "__main__", "demo")
LAZILY = {"merge": "tqdm"}  # a progress bar, imported when it is shown


def imports(path: Path) -> set[str]:
    """Every module a file imports, in full: `from ..data import x` in lora_lab/training/loop.py is lora_lab.data."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def starts(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_import_no_oracle_and_no_pickle(package):
    for path in files(package):
        assert not starts(imports(path), "transformers", "peft", "pickle", "accelerate"), path


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_read_no_file_that_can_run_code(package):
    """torch's and numpy's own files may hold pickles, too."""
    for path in files(package):
        assert not starts(imports(path), "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch.load", "numpy.load"), path
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("torch.load", "torch.serialization.load", "torch.hub.load"), f"{path}, line {node.lineno}"
            if called in ("np.load", "numpy.load"):
                assert "allow_pickle=False" in [ast.unparse(keyword) for keyword in node.keywords], f"{path}, line {node.lineno}"


def test_memory_math_imports_nobody_and_torch_only_where_it_measures():
    for path in files("memory_math"):
        assert not starts(imports(path), "lora_lab", "prompt_tuning_lab"), path
        assert path.name in ("measurement.py", "fake_runs.py") or not starts(imports(path), "torch"), path


def test_only_the_main_of_lora_lab_imports_prompt_tuning_lab():
    for path in files("lora_lab"):
        assert path == ROOT / "lora_lab" / "__main__.py" or not starts(imports(path), "prompt_tuning_lab"), path


def test_lora_itself_needs_no_models_no_data_no_training():
    forbidden = {"lora_lab.models", "lora_lab.data", "lora_lab.training", "memory_math", "tokenizers", "tqdm", "numpy", "huggingface_hub"}
    alone = [path for path in files("lora_lab") if path.relative_to(ROOT / "lora_lab").parts[0].removesuffix(".py") not in WORKSHOP]
    alone.remove(ROOT / "lora_lab" / "__init__.py")  # which names them
    assert {"layers", "targets", "injection", "adapters", "checkpoint", "merging", "kinds", "variants"} <= {path.stem for path in alone}
    for path in alone:
        assert not starts(imports(path), *forbidden - {LAZILY.get(path.stem)}), path


@pytest.mark.parametrize(
    ("statement", "absent"),
    [("import lora_lab", ["tokenizers", "gguf", "jinja2", "transformers", "memory_math", "huggingface_hub", "prompt_tuning_lab"]),
     ("import prompt_tuning_lab", ["transformers", "peft", "memory_math", "matplotlib"]),
     ("import memory_math; memory_math.predict('llama-2-7b')", ["torch", "numpy", "lora_lab"])],
)  # fmt: skip
def test_importing_brings_in_no_more_than_it_says(statement, absent):
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


def test_submodules_are_reachable_without_importing_them():
    code = "import lora_lab; print(lora_lab.models.load, lora_lab.training.fit, lora_lab.data.load)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
