"""Claim: bases in int8 and int4 have nearly the float32 base's perplexity, and answer faster.

    python -m benchmarks.quantization [--rounds 10] [--rows 1 4 16]

With the quickstart's model and adapters, this prints the perplexity of the beginning of Alice in Wonderland, computed
in one pass and token by token (as in decoding). Then it measures decode steps with the default blend, live, for
float32, int8 and int4 in turns. Printed are the medians, and the speed relative to float32 in the same round (median,
lowest, highest).
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.blend_exactness import ROOT
from model_compose.components.model import TextGenerationOptions
from model_compose.engines.huggingface.attention import Pass, Piece
from model_compose.engines.huggingface.cache import KVCache, Row
from model_compose.engines.huggingface.loading import LoadedModel
from model_compose.engines.huggingface.loading import load as load_model
from model_compose.loading import load as load_file
from model_compose.lora.blend import Blend
from model_compose.progress import silent

KINDS = (None, "int8", "int4")
CPU = torch.device("cpu")
BLEND = Blend({"alpaca": 0.5, "pirate": 1.0})


@dataclass(frozen=True)
class Model:
    loaded: LoadedModel
    cache: KVCache

    def rows(self, count: int, tokens: int) -> list[Row]:
        taken = [self.cache.take(tokens) for _ in range(count)]
        return [row for row in taken if row is not None]

    @torch.inference_mode()
    def logits(self, pieces: list[Piece], blend: Blend, *, all_tokens: bool = False) -> torch.Tensor:
        step = Pass(pieces, CPU)
        if all_tokens:
            step.last = torch.arange(len(step.tokens))
        with self.loaded.lora.use([blend] * len(pieces), step.counts) as mix:
            return self.loaded.forward(step, mix)


def load(kind: str | None) -> Model:
    path = ROOT / "examples" / "quickstart" / "model-compose.yml"
    options = load_file((path,)).config.all_components[0]
    assert isinstance(options, TextGenerationOptions)
    options = options.model_copy(update={"quantization": kind, "precision": "float32"})
    loaded = load_model(options, path.parent, silent)
    return Model(loaded, KVCache(loaded.forward.layers, 2 << 30, 2048))


def perplexities(model: Model, text: str) -> tuple[float, float]:
    """The text's perplexity, computed in one pass and token by token."""
    ids: list[int] = model.loaded.tokenizer(text)["input_ids"]
    (row,) = model.rows(1, len(ids))
    whole = model.logits([Piece(row, ids[:-1], 0)], Blend(), all_tokens=True)
    single = torch.cat([model.logits([Piece(row, [token], at)], Blend()) for at, token in enumerate(ids[:-1])])
    model.cache.give_back(row)
    targets = torch.tensor(ids[1:])
    once, each = (math.exp(torch.nn.functional.cross_entropy(part.float(), targets)) for part in (whole, single))
    return once, each


def step_seconds(model: Model, count: int, steps: int = 10) -> float:
    """The median seconds of `steps` decode steps after 48 tokens, with `count` rows."""
    rows = model.rows(count, 128)
    seconds = []
    for at in range(48, 48 + steps):
        start = time.perf_counter()
        model.logits([Piece(row, [1000 + at], at) for row in rows], BLEND)
        seconds.append(time.perf_counter() - start)
    for row in reversed(rows):
        model.cache.give_back(row)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    arguments = parser.parse_args()
    text = (Path(__file__).parent / "alice.txt").read_text(encoding="utf-8")
    models = {kind: load(kind) for kind in KINDS}
    plain = 0.0
    for kind, model in models.items():
        once, each = perplexities(model, text)
        plain = plain or once
        print(
            f"{kind or 'float32':8} perplexity {once:.3f} in one pass ({once / plain - 1:+.2%}), {each:.3f} token by token "
            f"({each / plain - 1:+.2%})",
            flush=True,
        )
    for rows in arguments.rows:
        taken: dict[str | None, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.rounds):
            for kind, model in models.items():
                taken[kind].append(step_seconds(model, rows))
        for kind, seconds in taken.items():
            ratios = [base / ours for base, ours in zip(taken[None], seconds, strict=True)]
            print(
                f"{rows:3} rows {kind or 'float32':8} {statistics.median(seconds) * 1e3:6.1f} ms a step, "
                f"{rows / statistics.median(seconds):6.1f} tok/s, {statistics.median(ratios):.2f} x float32 "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
