"""How much memory merging an adapter into a checkpoint of Llama-2-7B's shapes takes: `python benchmarks/streaming_merge.py`.

Writes a synthetic bf16 checkpoint (by default 7 of the 32 layers, with the full embedding and head, in two shards: 3.4 GB) and a
float32 adapter of rank 64 on every linear layer and the head, merges them in a process of its own, and deletes everything. Needs
twice the checkpoint's size on the disk. The process's memory does not depend on the number of layers: it never holds a tensor.
The last line is JSON. Linux only (/proc tells the peak).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lora_lab.streaming.merge import merge_checkpoint
from lora_lab.streaming.shards import BLOCK_NUMBERS, INDEX, NAMES, NewTensor, write_shard

HIDDEN, FEED_FORWARD, VOCABULARY = 4096, 11008, 32000
LINEAR = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
          "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FEED_FORWARD, HIDDEN), "mlp.up_proj": (FEED_FORWARD, HIDDEN),
          "mlp.down_proj": (HIDDEN, FEED_FORWARD)}  # fmt: skip


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> NewTensor:
    def blocks() -> Iterator[Tensor]:
        step = max(1, BLOCK_NUMBERS // shape[-1])
        for start in range(0, shape[0], step):
            yield (0.02 * torch.randn(min(step, shape[0] - start), *shape[1:])).to(dtype)

    return NewTensor(NAMES[dtype], shape, blocks)


def write_base(folder: Path, layers: int, shards: int) -> int:
    """A checkpoint of random weights; returns its bytes."""
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in LINEAR.items()}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    names = {key: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, key in enumerate(sorted(shapes))}
    for name in sorted(set(names.values())):
        write_shard(folder / name, {key: random_tensor(shapes[key], torch.bfloat16) for key in shapes if names[key] == name}, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}))
    return sum(path.stat().st_size for path in folder.iterdir())


def write_adapter(folder: Path, layers: int, rank: int) -> None:
    shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in LINEAR.items()} | {"lm_head": (VOCABULARY, HIDDEN)}
    tensors = {}
    for path, (out, inside) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = random_tensor((rank, inside), torch.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = random_tensor((out, rank), torch.float32)
    write_shard(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def worker(base: str, adapter: str, out: str) -> None:
    before, start = peak_mib(), time.perf_counter()
    report = merge_checkpoint(base, adapter, out, progress=False)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "peak_mib": round(peak_mib()), "peak_mib_before": round(before),
                      "merged": len(report.merged), "largest_rounding_error": report.largest_rounding_error}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints are written for the time of the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        base, adapter, out = (Path(name) / part for part in ("base", "adapter", "out"))
        base.mkdir()
        adapter.mkdir()
        size = write_base(base, arguments.layers, arguments.shards)
        write_adapter(adapter, arguments.layers, arguments.rank)
        command = [sys.executable, __file__, "--worker", str(base), str(adapter), str(out)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps({"checkpoint_gb": round(size / 1e9, 2), "layers": arguments.layers, "rank": arguments.rank, **result,
                      "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
