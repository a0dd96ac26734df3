"""Claim: with sixteen texts of 2,048 tokens at once, memory is the weights, the KV cache's budget, and Python's own part.

    python -m benchmarks.kv_memory [--precision float32|bfloat16] [--quantization int8|int4] [--rows 16] [--tokens 2048]

A separate process opens the quickstart's model with a KV cache of exactly rows × tokens. `rows` requests with the same long
prompt, half with one blend and half with another, fill the cache completely. Printed are the peak resident memory (VmHWM)
and the bytes of the KV cache.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.blend_exactness import ROOT
from benchmarks.load_memory import peak_memory

QUICKSTART = ROOT / "examples" / "quickstart" / "model-compose.yml"
ANSWER = 16


async def fill(precision: str, quantization: str | None, rows: int, tokens: int) -> None:
    """Runs in the measured process."""
    from model_compose.components.model import TextGenerationOptions
    from model_compose.compose import Compose
    from model_compose.generation import Request, Sampling, collect
    from model_compose.loading import load
    from model_compose.lora.blend import Blend

    loaded = load((QUICKSTART,))
    component = loaded.config.all_components[0]
    assert isinstance(component, TextGenerationOptions)
    per_token = 2 * 30 * 3 * 64 * (4 if precision == "float32" else 2)
    budget = rows * tokens * per_token
    options = component.options.model_copy(update={"max_context": tokens, "kv_cache": budget, "max_batch_size": rows})
    component = component.model_copy(update={"precision": precision, "quantization": quantization, "options": options})
    compose = Compose(replace(loaded, config=loaded.config.model_copy(update={"component": component})))
    try:
        await compose.load()
        opened = peak_memory()
        text = (Path(__file__).parent / "alice.txt").read_text(encoding="utf-8") * 8
        sampling = Sampling(ANSWER, ANSWER, do_sample=False)
        requests = [
            Request(text, Blend({"alpaca": 0.5 + row % 2}), sampling, max_input_length=tokens - ANSWER)
            for row in range(rows)
        ]
        (id,) = compose.models
        done = await asyncio.gather(*(collect(compose.generate(id, request)) for request in requests))
        held = sum(one.usage.prompt_tokens + one.usage.completion_tokens for one in done)
        print(json.dumps({"opened": opened, "peak": peak_memory(), "kv": budget, "tokens": held}))
    finally:
        await compose.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        asyncio.run(fill(arguments.precision, arguments.quantization, arguments.rows, arguments.tokens))
        return
    command = [sys.executable, "-m", "benchmarks.kv_memory", "--child", *sys.argv[1:]]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    match = re.search(r"\{.*\}", output)
    assert match is not None
    result = json.loads(match[0])
    print(f"{arguments.precision} {arguments.quantization or ''}: {result['tokens']} tokens held at once")
    print(
        f"peak {result['peak'] / 1e9:.2f} GB ({result['opened'] / 1e9:.2f} GB after loading), including "
        f"{result['kv'] / 1e9:.2f} GB of KV cache"
    )


if __name__ == "__main__":
    main()
