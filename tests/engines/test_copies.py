"""PEFT stores the base's embedding and head along with their adapters. Whatever became of the base's weights when it was
loaded, an equal copy is taken and a trained one is refused: when the file is opened, and from a client later."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_compose.checkpoint import reading
from model_compose.checkpoint.reading import open_checkpoint
from model_compose.engines.huggingface.engine import HuggingfaceEngine
from model_compose.engines.llamacpp.base import read_base
from model_compose.engines.options import AdapterOptions
from model_compose.errors import AdapterError, LoadError
from model_compose.lora.adapter import LoraAdapter, check_copies, read_adapter
from model_compose.lora.blend import Blend
from model_compose.lora.gguf import is_stored
from model_compose.progress import silent
from tests import gguf_base, tiny
from tests.contracts.test_engine import text
from tests.engines.test_huggingface import FAMILIES, opened

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": gguf_base.VOCABULARY}


def project(folder: Path, config: Any) -> Path:
    """Adapters that bring copies, and further ones: 'again' with equal copies, 'trained' with one that differs."""
    base = tiny.save_base(folder / "base", config)
    for name in ("alpaca", "again"):
        tiny.save_adapter(folder / name, base, seed=1, std=0.5, target_modules=["q_proj", "embed_tokens", "lm_head"])
    tiny.save_adapter(folder / "pirate", base, seed=2, std=0.5)
    return change(
        folder / "again", folder / "trained", lambda copy: copy + 0.01 * (torch.arange(len(copy)) == 7)[:, None]
    )


def change(folder: Path, to: Path, how: Any) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {key: tensor if "lora_" in key else how(tensor) for key, tensor in tensors.items()}
    assert len(changed) > sum("lora_" in key for key in changed)
    to.mkdir(exist_ok=True)
    (to / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file(changed, to / "adapter_model.safetensors")
    return to


async def load(engine: HuggingfaceEngine, folder: Path) -> None:
    options = AdapterOptions.model_validate({"type": "lora", "name": "new", "model": str(folder)})
    await engine.load_adapter(options, silent)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("lean", {}), ("lean", {"quantization": "int8"}), ("lean", {"quantization": "int4"}),
        ("lean", {"precision": "bfloat16"}), ("lean", {"options": {"fold": "auto"}}),
        ("tied", {"quantization": "int8", "precision": "bfloat16"}), ("tied", {"options": {"fold": "auto"}}),
        ("gemma", {"quantization": "int4"}),
    ],
    ids=str,
)  # fmt: skip
async def test_whatever_became_of_the_weights(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """The lean decoder fuses and packs them, the others are packed before adapters come; a fold changes them."""
    config = (
        FAMILIES["gemma"] if family == "gemma" else tiny.llama_config(**SIZES, tie_word_embeddings=family == "tied")
    )
    trained = project(tmp_path, config)
    engine = await opened(tmp_path, **changes)
    await text(engine, "Hello", Blend({"alpaca": 0.7, "pirate": 0.8}))
    for dtype in (torch.float32, torch.bfloat16):
        await load(engine, change(tmp_path / "again", tmp_path / "copies", lambda copy, dtype=dtype: copy.to(dtype)))
        assert await text(engine, "Hello", Blend({"new": 1.0})) == await text(engine, "Hello", Blend({"alpaca": 1.0}))
    with pytest.raises(AdapterError, match=r"brings its own '.*', which differs from the base model's"):
        await load(engine, trained)
    await engine.close()


async def test_a_base_is_opened_once_for_all_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file's vocabulary takes seconds to read."""
    opened_bases = []

    def opens(base: Any, model: Any) -> Any:
        opened_bases.append(base)
        return open_checkpoint(base, model)

    monkeypatch.setattr(reading, "open_checkpoint", opens)
    project(tmp_path, tiny.llama_config(**SIZES))
    gguf_base.save_gguf(tmp_path / "base", tmp_path / "base.gguf")
    engine = await opened(tmp_path, model="./base.gguf")
    for _ in range(2):
        await load(engine, tmp_path / "again")
    assert len(opened_bases) == 1
    await engine.close()


def test_parts_of_two_bases_are_refused(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.llama_config(**SIZES))
    gguf_base.save_gguf(base, tmp_path / "parts.gguf", split=8)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(LoadError, match="hold a tensor twice, so they do not belong to one base"):
        read_base(parts[0], "x")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
async def test_a_base_in_gguf(tmp_path: Path, kind: str) -> None:
    """Quantised, both drivers compare in the form that the base has."""
    trained = project(tmp_path, tiny.llama_config(**SIZES))
    file = gguf_base.save_gguf(tmp_path / "base", tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType[kind])
    base = read_base(file, "x")
    change(tmp_path / "again", tmp_path / "halves", lambda copy: copy.half())
    engine = await opened(tmp_path, model="./base.gguf")
    for name in ("again", "halves") if kind != "Q8_0" else ("again",):
        base.check(read_adapter(tmp_path / name, name))
        await load(engine, tmp_path / name)
    with pytest.raises(AdapterError, match="which differs from the base model's"):
        base.check(read_adapter(trained, "trained"))
    with pytest.raises(AdapterError, match="which differs from the base model's"):
        await load(engine, trained)
    await engine.close()


def test_a_quantisation_that_cannot_be_made_again() -> None:
    """gguf unpacks K-quants and cannot make any to compare with."""
    data = np.zeros((4, 144), np.uint8)
    stored = SimpleNamespace(shape=(256, 4), data=data, tensor_type=gguf.GGMLQuantizationType.Q4_K)
    assert is_stored(torch.zeros(4, 256), stored) is None
    adapter = LoraAdapter("x", {}, "d", copies={"lm_head.weight": torch.zeros(4, 256)})
    with pytest.raises(
        AdapterError, match=r"which cannot be compared with the base model's.*save_embedding_layers=False"
    ):
        check_copies(adapter, lambda _, copy: is_stored(copy, stored))
