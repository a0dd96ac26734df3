"""Claim: loading and folding takes little more memory than the weights themselves.

    python -m benchmarks.load_memory [--layers 16] [--fold never|always]

This writes a random Llama with the shape of Llama-3.2-1B (bfloat16 safetensors) and two adapters (r 16 on q, k, v and o).
A separate process opens it and answers one prompt. Printed are the peak resident memory of that process (VmHWM), the time
to load and fold, and the bound 1.15 × weights + 0.4 GB.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

YAML = """\
component:
  type: model
  task: text-generation
  model: ./base
  precision: bfloat16
  peft_adapters:
    - {{type: lora, name: one, model: ./one, weight: 0.7}}
    - {{type: lora, name: two, model: ./two, weight: 0.8}}
  options: {{fold: {fold}}}
  action: {{prompt: "${{input.prompt}}", max_output_length: 1}}
"""


def write_project(folder: Path, layers: int, fold: str) -> int:
    """Write a base, a tokenizer and adapters with random weights. Returns the bytes of the base's weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests import tiny

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128_256, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name in ("one", "two"):
        tensors = {}
        for path, module in model.named_modules():
            if path.endswith(targets):
                out, into = module.weight.shape
                tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(16, into) * 0.01
                tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, 16) * 0.01
        (folder / name).mkdir()
        save_file(tensors, folder / name / "adapter_model.safetensors")
        options = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": list(targets)}
        (folder / name / "adapter_config.json").write_text(json.dumps(options))
    (folder / "model-compose.yml").write_text(YAML.format(fold=fold))
    return sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))


def peak_memory() -> int:
    """This process's peak resident memory in bytes. ru_maxrss would be wrong: it includes the parent's memory before
    exec."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


async def open_and_answer(path: Path) -> None:
    """Runs in the measured process."""
    from model_compose import Compose

    start = time.perf_counter()
    async with Compose.open(path) as compose:
        loaded = time.perf_counter() - start
        await compose.answer({"prompt": "Hello, world"})
        print(json.dumps({"seconds": loaded, "peak": peak_memory()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--fold", choices=("never", "always"), default="always")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        asyncio.run(open_and_answer(arguments.child))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_project(folder, arguments.layers, arguments.fold)
        command = [sys.executable, __file__, "--child", str(folder / "model-compose.yml")]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    bound = 1.15 * size + 0.4e9
    print(f"weights {size / 1e9:.2f} GB, fold {arguments.fold}: ready in {result['seconds']:.1f} s")
    print(f"peak {result['peak'] / 1e9:.2f} GB = {result['peak'] / size:.2f} x weights; bound {bound / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
