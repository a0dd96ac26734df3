"""Claim: on vLLM, a blend is as fast as a single adapter of the same rank: their speeds have a ratio of at least 0.95.

    python -m benchmarks.stacked_vllm --vllm-python PATH [--adapters 4] [--at-once 1] [--tokens 32] [--pairs 10]

model-compose starts vLLM's server with SmolLM2-135M-Instruct. Two kinds of requests alternate, with greedy texts of the
same length: a blend of all adapters (of rank 8 each), which reaches vLLM as one stacked adapter of rank 8 · adapters, and a
single adapter of that rank. Printed are the tokens per second of both and their ratio, as medians with 95 % intervals.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Collection
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
    parser.add_argument("--vllm-python", metavar="PATH", help="default: the one of `model-compose setup vllm`")
    parser.add_argument("--adapters", type=int, default=4, help="number of adapters in the blend")
    parser.add_argument("--at-once", type=int, default=1, help="concurrent requests")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of base and adapters; created if missing")
    return parser.parse_args()


def write_single(weights: Weights, rank: int, folder: Path) -> None:
    """Write a random adapter of the given rank, on the same modules as the others."""
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
            # vLLM pads all adapters to this rank, so it must be exactly the rank of the two that are compared
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
    """Tokens per second of `--at-once` concurrent requests."""
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


def with_interval(values: Collection[float]) -> str:
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
    print(f"blend of {arguments.adapters} adapters  {with_interval(speeds['stacked'])}")
    print(f"one adapter          {with_interval(speeds['single'])}")
    print(
        f"ratio                {with_interval([a / b for a, b in zip(speeds['stacked'], speeds['single'], strict=True)])}"
    )


if __name__ == "__main__":
    main()
