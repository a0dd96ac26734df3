"""Exports of blends whose base is a GGUF file, and exports as GGUF files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen2Config

from model_compose.errors import AdapterError, InputError
from model_compose.export import Order, export
from model_compose.loading import load
from model_compose.lora.adapter import LoraAdapter, read_adapter
from model_compose.lora.blend import Blend, delta
from tests import tiny
from tests.gguf_base import VOCABULARY, save_gguf
from tests.lora import oracle

Kind = gguf.GGMLQuantizationType
IDS = torch.tensor([[5, 77, 130, 9, 41, 200, 3]])
WEIGHTS = {"alpaca": 0.7, "pirate": 0.8}


def config(family: str, **changes: Any) -> Any:
    """A tiny config whose matrices have rows of a multiple of 32, GGUF's block size."""
    made = tiny.llama_config(intermediate_size=64, **changes)
    return made if family == "llama" else Qwen2Config(**{k: v for k, v in made.to_dict().items() if k != "model_type"})


def project(folder: Path, family: str = "llama", kind: Kind = Kind.Q8_0, **changes: Any) -> Path:
    """Write a project with a GGUF base and two adapters for the model it was converted from. Returns the YAML's path."""
    origin = tiny.save_base(folder / "origin", config(family, **changes))
    tiny.save_adapter(folder / "alpaca", origin, seed=1, target_modules=["q_proj", "k_proj", "v_proj"])
    tiny.save_adapter(folder / "pirate", origin, seed=2, r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    save_gguf(origin, folder / "base.gguf", permuted=family == "llama", kind=kind)
    path = folder / "model-compose.yml"
    path.write_text(tiny.YAML.replace("model: ./base", "model: ./base.gguf"), encoding="utf-8")
    return path


def exported(yaml_file: Path, format: str, output: str, **order: Any) -> Path:
    path = yaml_file.parent / output
    export(load([yaml_file]), Order(format, path, **order))
    return path


def adapters_of(folder: Path) -> dict[str, LoraAdapter]:
    return {name: read_adapter(folder / name, name) for name in WEIGHTS}


def unpacked(file: Path) -> Any:
    """A GGUF file, dequantised by transformers' own reader."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


def reference(folder: Path) -> Any:
    return oracle.dense(unpacked(folder / "base.gguf"), adapters_of(folder).values(), WEIGHTS)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_merged_model_of_a_gguf_base_is_the_sum_with_its_dequantised_weights(
    family: str, kind: Kind, tmp_path: Path
) -> None:
    merged = exported(project(tmp_path, family, kind), "merged", "merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.dtype == torch.float32
    assert oracle.error(logits(model), logits(reference(tmp_path))) <= oracle.TOLERANCE
    assert AutoTokenizer.from_pretrained(merged)("Ahoy")["input_ids"] == tiny.tokenizer()("Ahoy")["input_ids"]


def test_merged_model_of_a_float16_gguf_is_float16(tmp_path: Path) -> None:
    merged = exported(project(tmp_path, kind=Kind.F16), "merged", "merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.dtype == torch.float16
    base = unpacked(tmp_path / "base.gguf").state_dict()
    change = delta(Blend(WEIGHTS), adapters_of(tmp_path), "model.layers.1.self_attn.k_proj")
    assert change is not None
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(model.state_dict()[name], (base[name] + change).half())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_gguf_is_the_sum_and_otherwise_the_same_file(family: str, tmp_path: Path) -> None:
    file = exported(project(tmp_path, family), "gguf-merged", "merged.gguf", precision="float32")
    assert oracle.error(logits(unpacked(file)), logits(reference(tmp_path))) <= oracle.TOLERANCE
    before, after = gguf.GGUFReader(tmp_path / "base.gguf"), gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in after.tensors}
    touched = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_down.weight")
    for tensor in before.tensors:
        if tensor.name.endswith(touched):
            assert stored[tensor.name].tensor_type == Kind.F32
        else:
            assert stored[tensor.name].tensor_type == tensor.tensor_type
            assert np.array_equal(stored[tensor.name].data, tensor.data)
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents(), name


def test_quantised_tensors_that_the_blend_changes_become_float16(tmp_path: Path) -> None:
    file = exported(project(tmp_path), "gguf-merged", "merged.gguf")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_up.weight"]) == (Kind.F16, Kind.Q8_0)
    state, dense = unpacked(file).state_dict(), reference(tmp_path).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[name].half(), dense[name].half())


def test_gguf_adapter_is_the_blend(tmp_path: Path) -> None:
    file = exported(project(tmp_path), "gguf", "blend.gguf")
    factors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}
    product = factors["blk.1.ffn_down.weight.lora_b"] @ factors["blk.1.ffn_down.weight.lora_a"]
    change = delta(Blend(WEIGHTS), adapters_of(tmp_path), "model.layers.1.mlp.down_proj")
    assert change is not None
    assert oracle.error(product, change.double()) <= oracle.TOLERANCE


def test_tied_embedding_of_a_gguf_can_be_merged_only_into_safetensors(tmp_path: Path) -> None:
    path = project(tmp_path, kind=Kind.F32)
    drop_head(tmp_path / "base.gguf")
    file = tmp_path / "pirate" / "adapter_model.safetensors"
    prefix = "base_model.model.lm_head"
    a, b = torch.full((2, 32), 0.05), torch.full((VOCABULARY, 2), 0.05)  # VOCABULARY is one more than the checkpoint's
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, file)
    with pytest.raises(AdapterError, match=r"lm_head.*--format merged"):
        exported(path, "gguf-merged", "merged.gguf")
    model = AutoModelForCausalLM.from_pretrained(exported(path, "merged", "merged"))
    assert oracle.error(logits(model), logits(reference(tmp_path))) <= oracle.TOLERANCE


def drop_head(file: Path) -> None:
    """Remove the output head; readers then tie it to the embedding."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_suffix(".tied"), "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name != "output.weight":
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".tied").replace(file)


def test_gguf_adapter_in_another_precision_than_float32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="float32"):
        exported(project(tmp_path), "gguf", "blend.gguf", precision="bfloat16")
