"""Measures how far each approximate method is from the exact sum, with the quickstart's two adapters and weights.

    python -m benchmarks.methods

The base is SmolLM2-135M-Instruct in float32, with alpaca 0.5 and pirate 1.0. The model gives greedy answers of at most 48
tokens to six held-out prompts. Printed for each method: ‖D - exact‖ / ‖exact‖ over all modules (Frobenius norm); the
perplexity of the exact blend's answers under the method's weights; pirate words per 100 words of the method's own answers;
the seconds to combine; and the first answer.
"""

import json
import math
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.blend_exactness import ADAPTERS, load_base
from model_compose.lora.adapter import read_adapter
from model_compose.lora.blend import Blend, delta
from model_compose.lora.layers import LoraModel
from model_compose.lora.methods import METHODS, Method

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from pirate import pirate_words_per_100  # noqa: E402  # imported from the quickstart's folder

WEIGHTS = {"alpaca": 0.5, "pirate": 1.0}
CASES: list[dict[str, Any]] = [
    {"method": "svd", "rank": 8},
    {"method": "svd", "rank": 4},
    {"method": "magnitude_prune", "density": 0.5},
    {"method": "magnitude_prune", "density": 0.2},
    {"method": "ties", "density": 0.5},
    {"method": "ties", "density": 0.2},
    {"method": "dare_linear", "density": 0.5},
    {"method": "dare_ties", "density": 0.5},
]
PROMPTS = 6


def distance(lora: LoraModel, method: Method) -> float:
    """‖D - exact‖ / ‖exact‖ over all modules."""
    off, whole = 0.0, 0.0
    for path in {path for adapter in lora.adapters.values() for path in adapter.modules}:
        exact = delta(Blend(WEIGHTS), lora.adapters, path)
        ours = delta(Blend(WEIGHTS, None, method), lora.adapters, path)
        assert exact is not None
        assert ours is not None
        off += float((ours - exact).square().sum())
        whole += float(exact.square().sum())
    return math.sqrt(off / whole)


def prompts() -> list[str]:
    """The first held-out prompts, in the adapters' template."""
    lines = (QUICKSTART / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    return [f"### Instruction:\n{json.loads(line)['instruction']}\n\n### Response:\n" for line in lines]


def perplexity(model: Any, ids: list[torch.Tensor], texts: list[torch.Tensor]) -> float:
    """The perplexity of the texts' tokens after their prompts. ids: the prompts; texts: prompts with answers; each (1,
    n)."""
    losses = []
    for prompt, whole in zip(ids, texts, strict=True):
        logits = model(whole).logits[0, prompt.shape[1] - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, whole[0, prompt.shape[1] :], reduction="none"))
    return float(torch.cat(losses).mean().exp().item())


@torch.inference_mode()
def main() -> None:
    from transformers import AutoTokenizer

    model, _ = load_base()
    gguf = next(Path(model.name_or_path).glob("*.gguf")).name
    tokenizer: Any = AutoTokenizer.from_pretrained(model.name_or_path, gguf_file=gguf)
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts()]
    lora = LoraModel(model, [read_adapter(ADAPTERS / name, name) for name in WEIGHTS])

    def answer(prompt: torch.Tensor) -> torch.Tensor:
        """Prompt and answer, (1, tokens)."""
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 48, "pad_token_id": tokenizer.eos_token_id}
        out: torch.Tensor = model.generate(prompt, **options)
        return out

    def row(what: str, far: float, seconds: float) -> None:
        outs = [answer(prompt)[0, prompt.shape[1] :] for prompt in ids]
        texts = [" ".join(tokenizer.decode(out, skip_special_tokens=True).split()) for out in outs]
        pirate = mean(map(pirate_words_per_100, texts))
        off = perplexity(model, ids, exact)
        print(f"| {what} | {far:.2f} | {off:.2f} | {pirate:.0f} | {seconds:.1f} | “{texts[0][:60]}” |", flush=True)

    print("| method | distance of the delta | perplexity | pirate words per 100 | seconds | an answer |")
    print("|---|---|---|---|---|---|")
    start = time.perf_counter()
    lora.fold(Blend(WEIGHTS))
    seconds = time.perf_counter() - start
    exact = [answer(prompt) for prompt in ids]
    row("the exact sum", 0.0, seconds)
    for case in CASES:
        method = METHODS[case["method"]].model_validate(case)
        start = time.perf_counter()
        lora.fold(Blend(WEIGHTS, None, method))
        seconds = time.perf_counter() - start
        settings = ", ".join(f"{key} {value}" for key, value in case.items() if key != "method")
        row(f"{case['method']}, {settings}", distance(lora, method), seconds)
        lora.unfold()
    row("the bare base", 1.0, 0.0)


if __name__ == "__main__":
    main()
