"""Claim: exporting a merged 7B model takes minutes of I/O and a few hundred MB of memory, far less than the model's size.

    python -m benchmarks.export [--layers 32] [--folder /scratch]

This writes a random checkpoint with Llama-2-7B's shape, in float16 and two shards, and drops it from the page cache. A
separate process then exports it merged with two adapters (r 16 on q, k, v and o). Printed are that process's peak resident
memory and its wall time, split into arithmetic (including reads of the changed weights, which are mapped), other reading
and writing, and fsync. For comparison, the time of PEFT's default combination (svd) is measured for one module and
multiplied by the number of modules, since the whole would take many minutes. All files are removed at the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

YAML = """\
component:
  type: model
  task: text-generation
  model: ./base
  peft_adapters:
    - {type: lora, name: one, model: ./one, weight: 0.7}
    - {type: lora, name: two, model: ./two, weight: 0.8}
  action: {prompt: "${input.prompt}"}
"""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_project(folder: Path, layers: int) -> int:
    """Write a base and adapters with random weights, one tensor in memory at a time. Returns the bytes of the base's
    weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from model_compose.checkpoint.shards import Entry, write_shards
    from tests import tiny

    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="float16")
    config.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    entries = {name: Entry(torch.float16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    noise = torch.randn(1 << 24).half() * 0.02  # repeated, since drawing all weights would take minutes

    def make(name: str) -> torch.Tensor:
        size = torch.Size(entries[name].shape).numel()
        return noise.repeat(-(-size // len(noise)))[:size].reshape(entries[name].shape)

    write_shards(folder / "base", entries, make, 10 * 10**9, lambda _: None)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        tensors = {}
        for path in (path for path, _ in model.named_modules() if path.endswith(TARGETS)):
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(16, config.hidden_size) * 0.01
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(config.hidden_size, 16) * 0.01
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        options = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": list(TARGETS)}
        (folder / name / "adapter_config.json").write_text(json.dumps(options))
    (folder / "model-compose.yml").write_text(YAML)
    forget(folder / "base")
    return sum(entry.nbytes for entry in entries.values())


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that the export reads them from the disk."""
    for file in folder.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def export_and_measure(yaml_file: Path) -> None:
    """Runs in the measured process."""
    from benchmarks.load_memory import peak_memory
    from model_compose.export import Order, destination, export, merged
    from model_compose.loading import load

    seconds = dict.fromkeys(("arithmetic", "all tensors", "fsync"), 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds[part] += time.perf_counter() - start

        return run

    patched: Any = merged
    patched.delta, patched.add = timed("arithmetic", patched.delta), timed("arithmetic", patched.add)
    patched.write_shards = timed("all tensors", patched.write_shards)
    synced: Any = destination
    synced._sync = timed("fsync", synced._sync)
    start = time.perf_counter()
    export(load([yaml_file]), Order("merged", yaml_file.parent / "out"))
    print(json.dumps(seconds | {"whole": time.perf_counter() - start, "peak": peak_memory()}))


def peft_seconds(layers: int) -> float:
    """The seconds of PEFT's default, add_weighted_adapter(svd), for one 4096 x 4096 module, times the number of modules."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = get_peft_model(nn.Sequential(nn.Linear(4096, 4096, bias=False)), LoraConfig(r=16, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=16, target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.01)
    start = time.perf_counter()
    model.add_weighted_adapter(["default", "other"], [0.7, 0.8], "blend", combination_type="svd")
    return (time.perf_counter() - start) * layers * len(TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="a folder with 27 GB of free space")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        export_and_measure(arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        size = write_project(folder, arguments.layers)
        print(f"base of {size / 1e9:.2f} GB, {arguments.layers} layers, made in {time.perf_counter() - start:.0f} s")
        command = [sys.executable, __file__, "--child", str(folder / "model-compose.yml")]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        copy = _copy_seconds(folder)
    io = done["all tensors"] - done["arithmetic"]
    print(f"export: {done['whole']:.0f} s, peak {done['peak'] / 1e9:.2f} GB = {done['peak'] / size:.2f} x weights")
    print(
        f"  reading and writing {io:.0f} s, arithmetic {done['arithmetic']:.1f} s, fsync {done['fsync']:.0f} s, start "
        f"{done['whole'] - done['all tensors'] - done['fsync']:.1f} s"
    )
    print(f"  copying the base's files takes {copy:.0f} s on this disk, without fsync")
    print(
        f"PEFT's default (svd), extrapolated from one module: {peft_seconds(arguments.layers):.0f} s, arithmetic alone"
    )


def _copy_seconds(folder: Path) -> float:
    """The seconds of a plain copy of the base, read from the disk."""
    shutil.rmtree(folder / "out")
    forget(folder / "base")
    start = time.perf_counter()
    shutil.copytree(folder / "base", folder / "copy")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
