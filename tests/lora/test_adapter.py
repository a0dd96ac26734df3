"""Reading PEFT folders: we compute the same as PEFT, and refuse adapters that we cannot compute exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model_compose.errors import AdapterError
from model_compose.lora.adapter import read_adapter, write_adapter
from model_compose.lora.blend import Blend, stack
from model_compose.lora.layers import LoraModel
from model_compose.lora.peft_config import scaling
from tests import tiny
from tests.lora.oracle import TOLERANCE, error

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"))


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def ours(base: Path, folder: Path, weight: float = 1.0) -> torch.Tensor:
    lora = LoraModel(load(base), [read_adapter(folder, "x")])
    with torch.inference_mode(), lora.use([Blend({"x": weight})]):
        logits: torch.Tensor = lora.model(IDS).logits
    return logits


def pefts(base: Path, folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = PeftModel.from_pretrained(load(base), folder).eval()(IDS).logits
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 6},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 7}},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_one_adapter_at_weight_1_is_what_peft_computes(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny.save_adapter(tmp_path / "adapter", base, **options)
    reference = pefts(base, folder)
    assert error(ours(base, folder), reference.double()) <= TOLERANCE
    assert error(ours(base, folder, 0.0), reference.double()) > 100 * TOLERANCE  # the adapter has an effect at all


def test_peft_loads_a_stacked_blend(base: Path, tmp_path: Path) -> None:
    """PEFT computes the same from a blend that we wrote as one stacked adapter, whose ranks differ between modules."""
    one = read_adapter(tiny.save_adapter(tmp_path / "one", base, seed=1), "one")
    two = read_adapter(
        tiny.save_adapter(tmp_path / "two", base, seed=2, r=2, target_modules=["v_proj", "embed_tokens"]), "two"
    )
    blend = Blend({"one": 0.7, "two": -1.3})
    write_adapter(stack(blend, {"one": one, "two": two}), tmp_path / "stacked")
    lora = LoraModel(load(base), [one, two])
    with torch.inference_mode(), lora.use([blend]):
        live = lora.model(IDS).logits
    assert error(pefts(base, tmp_path / "stacked"), live.double()) <= TOLERANCE


def test_pickled_weights_and_old_configs(base: Path, tmp_path: Path) -> None:
    """The format of tloen/alpaca-lora-7b: adapter_model.bin, and config keys that PEFT has since removed."""
    folder = tiny.save_adapter(tmp_path / "new", base)
    old = tmp_path / "old"
    old.mkdir()
    config = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.05, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (old / "adapter_config.json").write_text(json.dumps(config))
    torch.save(load_file(folder / "adapter_model.safetensors"), old / "adapter_model.bin")
    assert torch.equal(ours(base, old), ours(base, folder))
    assert read_adapter(old, "x").base == "decapoda-research/llama-7b-hf"


def test_tensor_names_with_an_adapter_name(base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(tmp_path / "adapter", base)
    expected = ours(base, folder)
    path = folder / "adapter_model.safetensors"
    save_file({key.replace(".weight", ".default.weight"): t for key, t in load_file(path).items()}, path)
    assert torch.equal(ours(base, folder), expected)


def test_a_pickle_never_executes(base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(tmp_path / "adapter", base)
    (folder / "adapter_model.safetensors").unlink()
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter(folder, "x")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"init_lora_weights": "pissa_niter_16"}, "PiSSA"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"use_qalora": True}, "use_qalora"),
        ({"some_future_option": {"k": 1}}, "some_future_option"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
    ],
    ids=str,
)
def test_options_that_change_more_than_the_low_rank_sum_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = tiny.save_adapter(tmp_path / "adapter", base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterError, match="adapter 'odd'") as caught:
        read_adapter(folder, "odd")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "key", ["q_proj.lora_magnitude_vector", "q_proj.lora_B.bias", "lm_head.modules_to_save.weight", "norm.bias"]
)
def test_tensors_that_are_not_factors_are_refused(base: Path, tmp_path: Path, key: str) -> None:
    folder = tiny.save_adapter(tmp_path / "adapter", base)
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.model.{key}": torch.zeros(4)}, path)
    with pytest.raises(AdapterError, match=key):
        read_adapter(folder, "x")


def test_a_trained_embedding_is_refused_and_a_copy_of_the_bases_is_not(base: Path, tmp_path: Path) -> None:
    """PEFT stores the base's embedding in an adapter of the embedding."""
    folder = tiny.save_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"])
    assert read_adapter(folder, "x").copies  # peft did store it
    ours(base, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    copy = next(key for key in tensors if "lora_" not in key)
    save_file(tensors | {copy: tensors[copy] + 1e-3}, path)
    with pytest.raises(AdapterError, match="differs from the base model's"):
        ours(base, folder)


def test_broken_folders(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path, "x")
    folder = tiny.save_adapter(tmp_path / "adapter", base)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter(folder, "x")
    weights.unlink()
    with pytest.raises(AdapterError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        read_adapter(folder, "x")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter(folder, "x")


def test_nan_factors_are_refused(base: Path, tmp_path: Path) -> None:
    folder = tiny.save_adapter(tmp_path / "adapter", base)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="NaN"):
        read_adapter(folder, "x")


def test_digest_follows_content_not_name(base: Path, tmp_path: Path) -> None:
    one = tiny.save_adapter(tmp_path / "one", base, seed=1)
    two = tiny.save_adapter(tmp_path / "two", base, seed=2)
    assert read_adapter(one, "x").digest == read_adapter(one, "y").digest != read_adapter(two, "x").digest


def test_scaling() -> None:
    assert scaling({"lora_alpha": 16}, "m.q_proj", 8) == 2.0
    assert scaling({"r": 16, "lora_alpha": 16, "use_rslora": True}, "m.q_proj", 16) == 4.0
    assert scaling({"lora_alpha": 16, "alpha_pattern": {"q_proj": 4}}, "m.q_proj", 8) == 0.5
    assert scaling({"lora_alpha": 16, "alpha_pattern": {"q_proj": 4}}, "m.xq_proj", 8) == 2.0
