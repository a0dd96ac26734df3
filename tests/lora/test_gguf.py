"""Writing a LoRA as GGUF: every product B A in the file equals the adapter's, with rows in llama.cpp's order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    GgufConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from model_compose.engines.llamacpp.base import read_base
from model_compose.errors import AdapterError
from model_compose.lora.adapter import LoraAdapter, read_adapter
from model_compose.lora.blend import Blend, delta, stack
from model_compose.lora.gguf import Architecture, permute, write_gguf
from tests import gguf_base, tiny

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 64, "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
}  # fmt: skip


def tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}


def made(folder: Path, config: PreTrainedConfig, **options: Any) -> tuple[LoraAdapter, Architecture]:
    base = tiny.save_base(folder / "base", config)
    adapter = read_adapter(tiny.save_adapter(folder / "adapter", base, **{"target_modules": ALL, **options}), "it")
    return adapter, Architecture.of_config(AutoConfig.from_pretrained(base))


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen2Config(**SIZES)], ids=lambda config: config.model_type)
def test_products_have_their_rows_in_the_order_of_a_converted_base(tmp_path: Path, config: PreTrainedConfig) -> None:
    """We put the deltas into a base as its weights, convert that base, and compare with B A from the adapter's file."""
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    adapter, architecture = made(tmp_path, config, **patterns)
    write_gguf(adapter, architecture, tmp_path / "adapter.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for path in adapter.modules:
        product = delta(Blend({"it": 1.0}), {"it": adapter}, path)
        assert product is not None
        model.get_parameter(f"{path}.weight").data = product
    model.save_pretrained(tmp_path / "base")
    gguf_base.save_gguf(tmp_path / "base", tmp_path / "base.gguf", permuted=config.model_type == "llama")
    factors, weights = tensors(tmp_path / "adapter.gguf"), tensors(tmp_path / "base.gguf")
    assert len(factors) == 2 * len(adapter.modules) == 2 * 2 * len(ALL)
    for name in {name.rpartition(".")[0] for name in factors}:
        ours = factors[f"{name}.lora_b"].astype(np.float64) @ factors[f"{name}.lora_a"]
        assert np.abs(ours - weights[name]).max() <= 1e-6 * np.abs(weights[name]).max()


def test_transformers_reads_the_gguf_base_of_these_tests_as_the_original(tmp_path: Path) -> None:
    """transformers' own reader restores the row order of q and k, so this proves that gguf_base.py orders them rightly."""
    base = tiny.save_base(tmp_path / "base", LlamaConfig(**SIZES))
    file = gguf_base.save_gguf(base, tmp_path / "base.gguf")
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor[: len(before[name])], before[name]), name


def test_permute_makes_halves_neighbours() -> None:
    assert permute(torch.arange(12), 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_metadata_of_the_file(tmp_path: Path) -> None:
    adapter, architecture = made(tmp_path, LlamaConfig(**SIZES))
    write_gguf(adapter, architecture, tmp_path / "adapter.gguf")
    fields = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    metadata = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert metadata == {
        "general.architecture": "llama", "general.type": "adapter", "general.name": "it", "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_embedding_and_head_of_an_untied_base(tmp_path: Path) -> None:
    """llama.cpp looks up rows of A, so A of an embedding must have one row for each token."""
    adapter, architecture = made(tmp_path, LlamaConfig(**SIZES), target_modules=["embed_tokens", "lm_head"])
    write_gguf(adapter, architecture, tmp_path / "adapter.gguf")
    found = {name: tensor.shape for name, tensor in tensors(tmp_path / "adapter.gguf").items()}
    assert found == {
        "token_embd.weight.lora_a": (tiny.VOCABULARY, 4), "token_embd.weight.lora_b": (32, 4),
        "output.weight.lora_a": (4, 32), "output.weight.lora_b": (tiny.VOCABULARY, 4),
    }  # fmt: skip
    with pytest.raises(
        AdapterError, match=r"one tensor for its embedding and its output head.*use the huggingface driver"
    ):
        write_gguf(adapter, replace(architecture, tied=True), tmp_path / "tied.gguf")
    assert not (tmp_path / "tied.gguf").exists()


def test_a_stacked_blend_is_written_like_any_adapter(tmp_path: Path) -> None:
    one, architecture = made(tmp_path, LlamaConfig(**SIZES))
    both = {"it": one, "other": read_adapter(tiny.save_adapter(tmp_path / "o", tmp_path / "base", seed=3), "other")}
    blend = Blend({"it": 0.5, "other": -2.0})
    write_gguf(stack(blend, both), architecture, tmp_path / "blend.gguf")
    found = tensors(tmp_path / "blend.gguf")
    product = found["blk.1.attn_q.weight.lora_b"] @ found["blk.1.attn_q.weight.lora_a"]
    expected = delta(blend, both, "model.layers.1.self_attn.q_proj")
    assert expected is not None
    assert torch.allclose(torch.from_numpy(product), permute(expected, 4), atol=1e-6)


def test_two_spellings_of_a_module_are_one(tmp_path: Path) -> None:
    """Another version of transformers, or a model with a vision part, has another path for the same module."""
    one, architecture = made(tmp_path, LlamaConfig(**SIZES), target_modules=["q_proj"])
    base = read_base(gguf_base.save_gguf(tmp_path / "base", tmp_path / "base.gguf"), "x")
    own, around = "model.layers.", ("language_model.model.layers.", "model.language_model.layers.")
    old, new = (
        replace(one, name=each, modules={path.replace(own, each): pair for path, pair in one.modules.items()})
        for each in around
    )
    by_name = {adapter.name: base.check(adapter) for adapter in (one, old, new)}
    assert {tuple(adapter.modules) for adapter in by_name.values()} == {tuple(one.modules)}
    blend = Blend({"it": 0.5, around[0]: 2.0, around[1]: -1.0})
    write_gguf(stack(blend, by_name), architecture, tmp_path / "blend.gguf")
    found = tensors(tmp_path / "blend.gguf")
    product = found["blk.1.attn_q.weight.lora_b"] @ found["blk.1.attn_q.weight.lora_a"]
    expected = delta(Blend({"it": 1.5}), {"it": one}, "model.layers.1.self_attn.q_proj")
    assert expected is not None
    assert torch.allclose(torch.from_numpy(product), permute(expected, 4), atol=1e-6)
    both = replace(one, modules={**old.modules, **new.modules})
    with pytest.raises(
        AdapterError, match=r"'language_model.model.layers.0.*' and '.*' are the same module 'model.layers"
    ):
        base.check(both)
    with pytest.raises(
        AdapterError, match=r"adapter 'it': two of its modules have the same tensor in GGUF, blk.0.attn_q"
    ):
        write_gguf(both, architecture, tmp_path / "both.gguf")


def test_unknown_architectures_and_modules_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"architecture falcon cannot be converted.*known: gemma, .*llama"):
        Architecture.of_config(FalconConfig())
    with pytest.raises(AdapterError, match="architecture mixtral cannot be converted"):
        Architecture.of_config(MixtralConfig())
    adapter, architecture = made(tmp_path, LlamaConfig(**SIZES))
    strange = replace(adapter, modules={"model.layers.0.mlp.router": next(iter(adapter.modules.values()))})
    with pytest.raises(AdapterError, match=r"adapter 'it': llama.cpp takes no adapter on 'model.layers.0.mlp.router'"):
        write_gguf(strange, architecture, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
