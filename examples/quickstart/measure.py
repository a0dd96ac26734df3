"""Measures what each weight does to the answers to the held-out prompts: how many pirate words they have, and how many
end by themselves.

    make measure            (or: python examples/quickstart/measure.py)

Answers are greedy, with at most 96 new tokens. Prints the README's table as Markdown.
"""

import asyncio
import json
import sys
from pathlib import Path
from statistics import mean

from model_compose import Compose

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from pirate import pirate_words_per_100  # noqa: E402  # pirate.py lies beside this script

MAX_TOKENS = 96
SHOWN = 1  # the held-out prompt whose answers the table shows
SWEEP = (0.5, 1, 1.5)
BLENDS: list[dict[str, float]] = [
    {},
    *({"alpaca": weight} for weight in SWEEP),
    *({"pirate": weight} for weight in SWEEP),
    {"alpaca": 0.5, "pirate": 1},
    {"alpaca": 1, "pirate": 1},
]


def shorten(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width].rsplit(' ', 1)[0]} …"


async def measure(compose: Compose, blend: dict[str, float], prompts: list[str]) -> str:
    """One row of the table."""
    runs = await asyncio.gather(*(compose.answer({"prompt": prompt}, blend=blend) for prompt in prompts))
    texts = [run.output["generated"] for run in runs]
    tokens = [run.answers[0].usage.completion_tokens for run in runs]
    stopped = sum(count < MAX_TOKENS for count in tokens) / len(runs)
    weights = " | ".join(f"{blend.get(name, 0):g}" for name in ("alpaca", "pirate"))
    pirate = mean(pirate_words_per_100(text) for text in texts)
    return f"| {weights} | {pirate:.0f} | {stopped:.0%} | {mean(tokens):.0f} | {shorten(texts[SHOWN])} |"


async def main() -> None:
    lines = (
        (HERE / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    )  # read before the event loop is busy
    prompts = [json.loads(line)["instruction"] for line in lines]
    async with Compose.open(HERE / "model-compose.yml") as compose:
        print(f"| alpaca | pirate | pirate words per 100 | stops by itself | tokens | “{prompts[SHOWN]}” |")
        print("|---|---|---|---|---|---|")
        for blend in BLENDS:
            print(await measure(compose, blend, prompts), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
