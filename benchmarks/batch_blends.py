"""Claim: requests with different weights share one batch, at little more than the cost of the base alone.

    python -m benchmarks.batch_blends [--pairs 5] [--rows 1 4 16]

The quickstart's model and adapters, through the Python API: `rows` requests at once, 64 greedy tokens each after a prompt
of about 60. In turns: all on the bare base; all on one blend; each with weights of its own. Prints tokens per second in all
(median), and the ratio to the base in the same pair (median, lowest, highest).
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

from benchmarks.blend_exactness import ROOT
from model_compose import Blend, Compose
from model_compose.generation import Request, Sampling, collect

TOKENS = 64
PROMPT = (
    "### Instruction:\nExplain in a few plain words to a small child why the sky is blue by day.\n\n### Response:\n" * 2
)
MIXES: dict[str, Callable[[int], Blend]] = {
    "base": lambda _: Blend(),
    "one blend": lambda _: Blend({"alpaca": 0.5, "pirate": 1.0}),
    "own blends": lambda row: Blend({"alpaca": 0.1 * row - 0.5, "pirate": 1 - 0.05 * row}),
}


async def tokens_per_second(compose: Compose, rows: int, blend_of: Callable[[int], Blend]) -> float:
    sampling = Sampling(TOKENS, TOKENS, do_sample=False)
    requests = [Request(PROMPT, blend_of(row), sampling) for row in range(rows)]
    start = time.perf_counter()
    await asyncio.gather(*(collect(compose.generate("__component__", request)) for request in requests))
    return rows * TOKENS / (time.perf_counter() - start)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    arguments = parser.parse_args()
    async with Compose.open(ROOT / "examples" / "quickstart" / "model-compose.yml") as compose:
        await tokens_per_second(compose, 1, MIXES["own blends"])  # warm-up
        for rows in arguments.rows:
            speeds: dict[str, list[float]] = {name: [] for name in MIXES}
            for _ in range(arguments.pairs):
                for name, blend_of in MIXES.items():
                    speeds[name].append(await tokens_per_second(compose, rows, blend_of))
            for name, measured in speeds.items():
                ratios = [ours / base for ours, base in zip(measured, speeds["base"], strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(
                    f"{rows:3} at once, {name:<10} {statistics.median(measured):6.1f} tok/s, {spread} x base",
                    flush=True,
                )


if __name__ == "__main__":
    asyncio.run(main())
