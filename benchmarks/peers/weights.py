"""The weights that every system is measured with: one base, adapters of rank 8, and two of them as one adapter."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.blend_exactness import BASE, ROOT
from model_compose.sources import fetch

RANK, STD = 8, 0.02
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PAIR = {"a1": 0.7, "a2": 0.8}
"""The one blend of two adapters."""


@dataclass(frozen=True)
class Weights:
    """Folders of one layout. base(precision): a Hugging Face folder. adapter("pair"): PAIR as a single adapter."""

    folder: Path
    gguf: Path

    def base(self, precision: str) -> Path:
        return self.folder / "smol-hf" / precision

    def adapter(self, name: str) -> Path:
        return self.folder / "adapters" / name


def adapter_names(count: int) -> list[str]:
    """a1, a2, … (not a: PEFT takes that for a prefix of `lora_`)."""
    return [f"a{number}" for number in range(1, count + 1)]


def prepare(folder: Path, adapters: int) -> Weights:
    """Writes what `folder` lacks: SmolLM2-135M-Instruct as safetensors, `adapters` random adapters, and PAIR merged."""
    fetched = fetch(BASE, base_dir=ROOT)
    assert fetched.file is not None
    weights = Weights(folder, fetched.folder / fetched.file)
    for precision in ("float32", "bfloat16"):
        _write(weights.base(precision), partial(_save_base, weights.gguf, precision))
    for seed, name in enumerate(adapter_names(max(adapters, len(PAIR)))):
        _write(weights.adapter(name), partial(_save_adapter, weights.base("float32"), seed))
    _write(weights.adapter("pair"), partial(_save_pair, weights))
    return weights


def _write(folder: Path, save: Callable[[Path], None]) -> None:
    """The folder appears whole or not at all."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        save(Path(temporary) / "made")
        shutil.move(Path(temporary) / "made", folder)


def _save_base(gguf: Path, precision: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.to(getattr(torch, precision)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _save_adapter(base: Path, seed: int, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=STD, generator=generator)
    model.save_pretrained(folder)


def _save_pair(weights: Weights, folder: Path) -> None:
    """PAIR concatenated by PEFT: what a server of single adapters is given for a blend."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first, *others = PAIR
    base = AutoModelForCausalLM.from_pretrained(weights.base("float32"))
    model = PeftModel.from_pretrained(base, weights.adapter(first), adapter_name=first)
    for name in others:
        model.load_adapter(weights.adapter(name), adapter_name=name)
    model.add_weighted_adapter(list(PAIR), list(PAIR.values()), "pair", combination_type="cat")
    model.save_pretrained(folder, selected_adapters=["pair"])
    for file in (folder / "pair").iterdir():  # PEFT makes a folder for each adapter
        shutil.move(file, folder / file.name)
    (folder / "pair").rmdir()
