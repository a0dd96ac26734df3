"""Sizes by config are those of real tensors, the KV cache's budget keeps to its bounds, and a container's limit counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, GemmaConfig, GPT2Config, PreTrainedConfig

from model_compose.engines.blueprint import on_meta
from model_compose.engines.devices import main_memory
from model_compose.engines.huggingface.memory import kv_budget
from model_compose.engines.huggingface.options import HuggingfaceOptions
from model_compose.engines.huggingface.quantized import NativeLinear, quantize_modules
from model_compose.engines.needs import Needs, check_fits
from model_compose.engines.sizes import (
    Checkpoint,
    adapter_size,
    base_bytes,
    checkpoint_dtype,
    kv_bytes_per_token,
    parameters,
)
from model_compose.errors import AdapterError, LoadError
from model_compose.lora.adapter import read_adapter
from model_compose.lora.layers import module_shapes
from model_compose.lora.peft_config import read_config
from model_compose.native import kernels
from tests import tiny

# The arithmetic against real tensors.

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": tiny.llama_config(),
    "tied": tiny.llama_config(tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=tiny.VOCABULARY, n_positions=64),
    "gemma": GemmaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=16, vocab_size=tiny.VOCABULARY,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_cache_are_as_large_as_the_real_ones(family: str, dtype: torch.dtype) -> None:
    config = FAMILIES[family]
    real = AutoModelForCausalLM.from_config(config).to(dtype)
    assert base_bytes(on_meta(config, False), dtype) == sum(parameter.nbytes for parameter in real.parameters())
    cache = DynamicCache(config=config)
    with torch.no_grad():
        real(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    layers: Any = cache.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert held == 5 * kv_bytes_per_token(config, dtype)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"r": 3, "target_modules": "all-linear"}),
        ("llama", {"target_modules": r".*\.(q|o)_proj", "rank_pattern": {"layers.0.self_attn.q_proj": 7}}),
        ("llama", {"target_modules": ["down_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "exclude_modules": ["1.self_attn.v_proj"]}),
        ("llama", {"target_modules": None}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("gemma", {"target_modules": ["q_proj", "k_proj"]}),
    ],
)  # fmt: skip
def test_an_adapter_is_as_large_as_its_config_says(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    base = tiny.save_base(tmp_path / "base", FAMILIES[family])
    folder = tiny.save_adapter(tmp_path / "adapter", base, **options)
    meta = on_meta(FAMILIES[family], False)
    size = adapter_size(read_config(folder, "x"), meta, "x")
    real = read_adapter(folder, "x").modules
    assert size.ranks == {path: factors.rank for path, factors in real.items()}
    held = sum(factors.a.nbytes + factors.b.nbytes for factors in real.values())
    assert size.stored == 4 * parameters(size.ranks, module_shapes(meta)) == held


def test_configs_that_peft_has_not_resolved_mean_what_peft_means_by_them() -> None:
    meta = on_meta(tiny.llama_config(), False)
    linear = adapter_size({"r": 2, "target_modules": "all-linear"}, meta, "x").ranks
    assert {path.rpartition(".")[2] for path in linear} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {path.rpartition(".")[2] for path in adapter_size({"r": 2}, meta, "x").ranks} == {"q_proj", "v_proj"}
    with pytest.raises(
        AdapterError, match=r"adapter 'x': the base model has none of its target_modules \(\['c_attn'\]\)"
    ):
        adapter_size({"r": 2, "target_modules": ["c_attn"]}, meta, "x")


@pytest.mark.skipif(kernels() is None, reason="torch's own kernels take a little less; there is no C compiler")
@pytest.mark.parametrize("family", ["llama", "tied", "gemma"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_is_as_large_as_the_real_one(family: str, kind: str) -> None:
    real = AutoModelForCausalLM.from_config(FAMILIES[family]).bfloat16()
    quantize_modules(real, kind)
    held = sum(parameter.nbytes for parameter in real.parameters())
    for module in real.modules():
        if isinstance(module, NativeLinear):
            assert module._packed is not None
            assert module._packed.scales is not None
            held += module._packed.weight.nbytes + module._packed.scales.nbytes
    assert base_bytes(on_meta(FAMILIES[family], False), torch.bfloat16, kind) == held


def test_bitsandbytes_packs_all_linear_weights_but_the_head() -> None:
    meta = on_meta(tiny.llama_config(), False)
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    rows = 2 * (32 + 32 + 16 + 16 + 48 + 48 + 32)
    other = sum(parameter.numel() for parameter in meta.parameters()) - linear
    assert base_bytes(meta, torch.bfloat16, "int8", "cuda") == 2 * other + linear + 4 * rows
    assert base_bytes(meta, torch.bfloat16, "nf4", "cuda") == 2 * other + linear // 2 + 4 * linear // 64


def test_the_dtype_of_a_checkpoint_that_does_not_say_it_is_told_by_its_size() -> None:
    config = tiny.llama_config()
    config.dtype = None
    meta = on_meta(config, False)
    numbers = sum(parameter.numel() for parameter in meta.parameters())
    assert checkpoint_dtype(meta, Checkpoint("safetensors", 4 * numbers + 900)) == torch.float32
    assert checkpoint_dtype(meta, Checkpoint("safetensors", 2 * numbers + 900)) == torch.float16
    assert checkpoint_dtype(meta, Checkpoint("gguf", numbers * 9 // 16)) == torch.float32
    assert checkpoint_dtype(meta, Checkpoint("gguf", 2 * numbers)) == torch.float16
    assert checkpoint_dtype(meta, Checkpoint()) == torch.float16
    config.dtype = torch.bfloat16
    assert checkpoint_dtype(on_meta(config, False), Checkpoint()) == torch.bfloat16


SIZES = st.integers(0, 1 << 40)


@given(SIZES, st.integers(1, 1 << 21), st.integers(1, 1 << 20), st.integers(1, 64), st.sampled_from(["cpu", "cuda:0"]))
def test_the_cache_leaves_room_and_is_never_larger_than_its_use(
    free: int, per_token: int, context: int, rows: int, name: str
) -> None:
    device = torch.device(name)
    budget = kv_budget(HuggingfaceOptions(max_batch_size=rows), device, free, per_token, context)
    share = 0.25 if name == "cpu" else 0.9
    assert 0 <= budget <= min(free * share, rows * context * per_token)
    assert budget >= min(free * share, rows * context * per_token) - 1
    given_one = HuggingfaceOptions(max_batch_size=rows, kv_cache=12345)  # type: ignore[arg-type]  # pydantic converts
    assert kv_budget(given_one, device, free, per_token, context) == 12345


@given(SIZES, SIZES, SIZES, SIZES)
def test_refused_is_exactly_what_is_larger_than_what_is_free(free: int, base: int, adapter: int, least: int) -> None:
    needs = Needs("m", "cpu", free, base=base, adapters={"a": adapter}, kv_least=least, context=2048)
    if base + adapter + least <= free:
        check_fits(needs)
    else:
        with pytest.raises(LoadError, match="m does not fit on cpu"):
            check_fits(needs)
    check_fits(Needs("m", "cpu", None, base=base))  # nobody knows what is free


# What is free.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 9_000 * 1024),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 9_000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/memory.max": "5000\n",
                "sys/fs/cgroup/user/memory.current": "3000\n",
                "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 400\n",
                "sys/fs/cgroup/user/job/memory.max": "7000\n", "sys/fs/cgroup/user/job/memory.current": "2000\n",
            },
            2400,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/a\n4:hugetlb,memory:/docker/x\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "6000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5500\n",
                "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            600,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5500\n",
            },
            9_000 * 1024,
        ),
    ],
    ids=["no limits", "v2 without a limit", "v2, the one above is tighter", "v1 in a container", "v1 without a limit"],
)  # fmt: skip
def test_a_container_s_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    meminfo = "MemTotal:  10000 kB\nMemAvailable:   9000 kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main_memory(tmp_path) == expected


def test_this_machine_says_what_is_free() -> None:
    free = main_memory()
    assert free is not None
    assert free > 1 << 20
