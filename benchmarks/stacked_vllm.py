"""Claim: on vLLM a blend costs what a single adapter of the same rank costs: a ratio of 0.95 and more.

    python -m benchmarks.stacked_vllm --vllm-python PATH [--adapters 4] [--at-once 1] [--tokens 32] [--pairs 10]

SmolLM2-135M-Instruct on a server of vLLM's that model-compose starts. A blend of all adapters (rank 8 each), which is one
stacked adapter of rank 8 · adapters to vLLM, and one adapter of that rank, asked in turns for greedy texts of the same
length. Prints tokens per second of both and their ratios: medians with 95 % intervals.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.peers.load import Prompts
from benchmarks.peers.report import median_interval
from benchmarks.peers.weights import RANK, STD, Weights, adapter_names, prepare
from benchmarks.serving import WEIGHTS
from model_compose.components.model import TextGenerationOptions
from model_compose.engines.vllm.engine import VllmEngine
from model_compose.generation import Request, Sampling, collect
from model_compose.lora.adapter import Factors, LoraAdapter, read_adapter, write_adapter
from model_compose.lora.blend import Blend
from model_compose.progress import silent

PROMPT_TOKENS = 48


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--vllm-python", metavar="PATH", help="that of `model-compose setup vllm` if left out")
    parser.add_argument("--adapters", type=int, default=4, help="in the blend")
    parser.add_argument("--at-once", type=int, default=1, help="requests")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="written where they are missing")
    return parser.parse_args()


def write_single(weights: Weights, rank: int, folder: Path) -> None:
    """A random adapter of that rank on the modules of the others."""
    like = read_adapter(weights.adapter("a1"), "a1")
    generator = torch.Generator().manual_seed(rank)
    modules = {
        path: Factors(
            torch.randn(rank, factors.a.shape[1], generator=generator) * STD,
            torch.randn(factors.b.shape[0], rank, generator=generator) * STD,
            1.0,
        )
        for path, factors in like.modules.items()
    }
    write_adapter(LoraAdapter("single", modules, "single"), folder)


def engine_of(arguments: argparse.Namespace, weights: Weights, single: Path) -> VllmEngine:
    folders = {name: weights.adapter(name) for name in adapter_names(arguments.adapters)} | {"single": single}
    options = TextGenerationOptions.model_validate(
        {
            "type": "model",
            "task": "text-generation",
            "driver": "vllm",
            "model": str(weights.base(arguments.precision)),
            "precision": arguments.precision,
            "peft_adapters": [
                {"type": "lora", "name": name, "model": str(folder), "weight": 0} for name, folder in folders.items()
            ],
            # both at their rank and no more: vLLM computes with the largest one
            "options": {
                "python": arguments.vllm_python,
                "kv_cache": "1GiB",
                "max_context": 2048,
                "max_lora_rank": RANK * arguments.adapters,
            },
        }
    )
    return VllmEngine(options, options.to_blends(), Path.cwd())


async def wave(engine: VllmEngine, blend: Blend, prompts: Prompts, arguments: argparse.Namespace) -> float:
    """Tokens per second of so many requests at once."""
    sampling = Sampling(arguments.tokens, arguments.tokens, do_sample=False)
    requests = [Request(prompts.take(PROMPT_TOKENS), blend, sampling) for _ in range(arguments.at_once)]
    start = time.perf_counter()
    done = await asyncio.gather(*(collect(engine.generate(request)) for request in requests))
    return sum(one.usage.completion_tokens for one in done) / (time.perf_counter() - start)


async def measure(arguments: argparse.Namespace, weights: Weights, single: Path) -> dict[str, list[float]]:
    blends = {
        "stacked": Blend({name: 0.5 + 0.1 * at for at, name in enumerate(adapter_names(arguments.adapters))}),
        "single": Blend({"single": 1.0}),
    }
    prompts, engine = Prompts(weights.base("float32")), engine_of(arguments, weights, single)
    speeds: dict[str, list[float]] = {name: [] for name in blends}
    try:
        await engine.open(silent)
        for number in range(arguments.pairs + 1):
            for name in blends if number % 2 else reversed(blends):
                speed = await wave(engine, blends[name], prompts, arguments)
                if number:  # the first round is a warm-up
                    speeds[name].append(speed)
            print(f"round {number} of {arguments.pairs}", file=sys.stderr, flush=True)
    finally:
        await engine.close()
    return speeds


def told(values: Sequence[float]) -> str:
    low, high = median_interval(values)
    return f"{statistics.median(values):.3g} ({low:.3g} to {high:.3g})"


def main() -> None:
    arguments = parse()
    rank = RANK * arguments.adapters
    weights = prepare(arguments.weights, arguments.adapters)
    with tempfile.TemporaryDirectory(prefix="stacked-") as folder:
        write_single(weights, rank, Path(folder) / "single")
        speeds = asyncio.run(measure(arguments, weights, Path(folder) / "single"))
    print(f"tokens/s, {arguments.at_once} at once, rank {rank}, {arguments.precision}")
    print(f"blend of {arguments.adapters} adapters  {told(speeds['stacked'])}")
    print(f"one adapter          {told(speeds['single'])}")
    print(f"ratio                {told([a / b for a, b in zip(speeds['stacked'], speeds['single'], strict=True)])}")


if __name__ == "__main__":
    main()
