"""Exported adapters and merged models: each equals the blend exactly."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from model_compose.checkpoint.shards import INDEX, Entry, write_shards
from model_compose.errors import AdapterError, InputError, LoadError
from model_compose.export import Order, export
from model_compose.loading import load
from model_compose.lora.adapter import LoraAdapter, read_adapter
from model_compose.lora.blend import Blend, delta
from model_compose.lora.layers import LoraModel
from model_compose.lora.methods.ties import Ties
from tests import tiny
from tests.lora import oracle

IDS = torch.tensor([[5, 77, 130, 9, 41, 200, 3]])
WEIGHTS = {"alpaca": 0.7, "pirate": 0.8}


def gpt2_config() -> GPT2Config:
    return GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=tiny.VOCABULARY, n_positions=256, initializer_range=0.2,
        bos_token_id=tiny.BOS, eos_token_id=tiny.EOS,
    )  # fmt: skip


FAMILIES: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "llama": (tiny.llama_config, ("q_proj", "v_proj"), ("o_proj", "down_proj", "lm_head")),
    "tied, neither": (lambda: tiny.llama_config(tie_word_embeddings=True), ("q_proj",), ("o_proj",)),
    "tied, embedding": (lambda: tiny.llama_config(tie_word_embeddings=True), ("embed_tokens",), ("q_proj",)),
    "tied, head": (lambda: tiny.llama_config(tie_word_embeddings=True), ("lm_head", "q_proj"), ("v_proj",)),
    "tied, both": (lambda: tiny.llama_config(tie_word_embeddings=True), ("lm_head",), ("embed_tokens",)),
    "gpt2": (gpt2_config, ("c_attn", "c_proj"), ("c_fc", "wte")),
}


def project(
    folder: Path, family: str = "llama", *, dtype: torch.dtype | None = None, shards: str | None = None
) -> Path:
    """Write a project with a base of that family and two adapters of different ranks. Returns the YAML's path."""
    config, first, second = FAMILIES[family]
    base = tiny.save_base(folder / "base", config())
    tiny.save_adapter(folder / "alpaca", base, seed=1, target_modules=list(first))
    tiny.save_adapter(folder / "pirate", base, seed=2, r=2, lora_alpha=6, target_modules=list(second))
    if dtype is not None or shards is not None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or torch.float32)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size=shards or "5GB")
    path = folder / "model-compose.yml"
    path.write_text(tiny.YAML, encoding="utf-8")
    return path


def exported(yaml_file: Path, format: str = "merged", **order: Any) -> Path:
    output: Path = yaml_file.parent / "out"
    export(load([yaml_file]), Order(format, output, **order))
    return output


def adapters_of(yaml_file: Path) -> dict[str, LoraAdapter]:
    return {name: read_adapter(yaml_file.parent / name, name) for name in WEIGHTS}


def load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def reference(yaml_file: Path, weights: dict[str, float] = WEIGHTS) -> Any:
    """The base with the dense float64 sum in its weights."""
    return oracle.dense(load_model(yaml_file.parent / "base"), adapters_of(yaml_file).values(), weights)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# A merged model is the sum.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [None, "10KB"])
def test_merged_float32_model_is_the_float64_sum(family: str, shards: str | None, tmp_path: Path) -> None:
    path = project(tmp_path, family, shards=shards)
    model = load_model(exported(path, shard_size=None if shards is None else 20_000))
    dense = reference(path)
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        allowed = oracle.TOLERANCE * parameters[name].abs().max()
        assert bool(((parameter.double() - parameters[name]).abs() <= allowed).all()), name
    assert oracle.error(logits(model), logits(dense)) <= oracle.TOLERANCE
    assert (tmp_path / "out" / INDEX).is_file() == (shards is not None)


def test_merged_model_answers_like_the_live_blend_and_tokenizes_like_the_base(tmp_path: Path) -> None:
    path = project(tmp_path)
    merged = exported(path, blend={"alpaca": -0.5, "pirate": 1.5})
    live = LoraModel(load_model(tmp_path / "base"), adapters_of(path).values())
    with live.use([Blend({"alpaca": -0.5, "pirate": 1.5})]):
        assert oracle.error(logits(load_model(merged)), logits(live.model).double()) <= oracle.TOLERANCE
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (merged, tmp_path / "base"))
    messages = [{"role": "user", "content": "Ahoy"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert (merged / "generation_config.json").read_bytes() == (tmp_path / "base/generation_config.json").read_bytes()


@pytest.mark.parametrize(("stored", "precision"), [("bfloat16", "auto"), ("float32", "bfloat16"), ("float16", "auto")])
def test_merged_16_bit_weights_are_the_sum_rounded_once(stored: str, precision: Any, tmp_path: Path) -> None:
    path = project(tmp_path, dtype=getattr(torch, stored))
    merged = exported(path, precision=precision)
    dtype = getattr(torch, stored if precision == "auto" else precision)
    adapters, before, dense = adapters_of(path), tensors_of(tmp_path / "base"), reference(path).state_dict()
    ulp = torch.finfo(dtype).eps
    for name, tensor in tensors_of(merged).items():
        change = delta(Blend(WEIGHTS), adapters, name.removesuffix(".weight"))
        whole = before[name] if change is None else before[name].float() + change
        assert torch.equal(tensor.view(torch.uint8), whole.to(dtype).view(torch.uint8)), name
        # One rounding may lose half a unit in the last place; the 0.1 % beyond that is float32's own error.
        allowed = (dense[name].abs() * ulp / 2).clamp(min=torch.finfo(dtype).tiny) * 1.001
        assert bool(((tensor.double() - dense[name]).abs() <= allowed).all()), name
    assert json.loads((merged / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_tensors_that_the_blend_does_not_change_are_copied_bit_for_bit(tmp_path: Path) -> None:
    path = project(tmp_path, dtype=torch.bfloat16, shards="10KB")
    merged, base = tensors_of(exported(path, blend={"alpaca": 1.0})), tensors_of(tmp_path / "base")
    changed = {name for name in base if not torch.equal(merged[name].view(torch.uint8), base[name].view(torch.uint8))}
    assert merged.keys() == base.keys()
    assert changed == {f"{path}.weight" for path in adapters_of(path)["alpaca"].modules}


def test_bare_base_is_copied(tmp_path: Path) -> None:
    path = project(tmp_path)
    merged, base = tensors_of(exported(path, blend="plain")), tensors_of(tmp_path / "base")
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("family", ["tied, embedding", "tied, head", "gpt2"])
def test_tied_embeddings_are_untied_if_one_of_them_changes(family: str, tmp_path: Path) -> None:
    merged = exported(project(tmp_path, family))
    model = load_model(merged)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_tied_embeddings_stay_tied_if_neither_changes(tmp_path: Path) -> None:
    merged = exported(project(tmp_path, "tied, neither"))
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_of(merged)


# Bases in other forms, and bases that are refused.


def test_gpt2_stored_without_its_prefix(tmp_path: Path) -> None:
    path = project(tmp_path, "gpt2")
    stored = tensors_of(tmp_path / "base")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    assert bare.keys() != stored.keys()
    save_file(bare, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert oracle.error(logits(load_model(exported(path))), logits(reference(path))) <= oracle.TOLERANCE


@pytest.mark.parametrize("family", ["llama", "tied, neither", "tied, head"])
def test_pickled_base(family: str, tmp_path: Path) -> None:
    path = project(tmp_path, family)
    state = load_model(tmp_path / "base").state_dict()  # pickles hold tied weights under both names
    torch.save(state, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    merged = exported(path)
    assert oracle.error(logits(load_model(merged)), logits(reference(path))) <= oracle.TOLERANCE
    assert not list(merged.glob("*.bin"))


def test_adapter_on_a_weight_that_is_not_stored_is_refused_by_name(tmp_path: Path) -> None:
    path = project(tmp_path)
    tensors = tensors_of(tmp_path / "base")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.o_proj"):
        exported(path)
    assert not (tmp_path / "out").exists()


def test_the_error_for_a_tensor_in_two_shards_names_both(tmp_path: Path) -> None:
    path = project(tmp_path)
    base, tensors = tmp_path / "base", tensors_of(tmp_path / "base")
    (base / "model.safetensors").unlink()
    half = len(tensors) // 2
    names = list(tensors)
    files = {"model-1.safetensors": names[: half + 1], "model-2.safetensors": names[half:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, base / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (base / "model.safetensors.index.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(index).encode())
    with pytest.raises(LoadError, match=rf"model-1\.safetensors and .*model-2\.safetensors both hold '{names[half]}'"):
        exported(path)


def test_a_file_of_weights_comes_before_an_index_of_shards(tmp_path: Path) -> None:
    """As in transformers, which loads the base that is served."""
    path = project(tmp_path)
    expected = tensors_of(tmp_path / "base")
    save_file({name: tensor * 2 for name, tensor in expected.items()}, tmp_path / "base/older.safetensors")
    index = {"weight_map": dict.fromkeys(expected, "older.safetensors")}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    exported(path, blend={})
    assert tensors_of(tmp_path / "out").keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(tmp_path / "out").items())


class Evil:
    def __reduce__(self) -> Any:
        return os.getpid, ()


@pytest.mark.parametrize("content", [b"garbage" * 99, b"", pickle.dumps([]), b"PK\3\4" * 99, Evil()])
def test_the_error_for_a_damaged_pickle_is_one_sentence_without_torchs_advice(tmp_path: Path, content: Any) -> None:
    path = project(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (tmp_path / "base" / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save({"x": content}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pytorch_model\.bin .*(cannot be read|a mapping)") as caught:
        exported(path)
    assert "weights_only" not in str(caught.value)


def test_quantised_base_is_refused(tmp_path: Path) -> None:
    path = project(tmp_path)
    config = tmp_path / "base" / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(LoadError, match="bitsandbytes"):
        exported(path)


def test_adapter_with_a_trained_embedding_is_refused(tmp_path: Path) -> None:
    path = project(tmp_path, "tied, embedding")
    file = tmp_path / "alpaca" / "adapter_model.safetensors"
    tensors = load_file(file)
    copy = next(name for name in tensors if "lora_" not in name)
    save_file(tensors | {copy: tensors[copy] + 1}, file)
    for format in ("peft", "merged"):
        with pytest.raises(AdapterError, match="embed_tokens"):
            exported(path, format)


def test_the_error_for_an_overflow_of_float16_names_bfloat16(tmp_path: Path) -> None:
    path = project(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 70_000.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight.*bfloat16"):
        exported(path, precision="float16")


# Adapters.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_exported_adapter_in_peft_equals_the_blend(family: str, tmp_path: Path) -> None:
    path = project(tmp_path, family)
    folder = exported(path, "peft")
    model = PeftModel.from_pretrained(load_model(tmp_path / "base"), folder)
    assert oracle.error(logits(model), logits(reference(path))) <= oracle.TOLERANCE


def test_exported_adapter_has_one_rank_and_no_patterns(tmp_path: Path) -> None:
    path = project(tmp_path)
    tiny.save_adapter(tmp_path / "pirate", tmp_path / "base", r=2, target_modules=["q_proj", "o_proj"])
    folder = exported(path, "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (6, 6, {}, {})
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {6}
    assert {shape[1] for name, shape in shapes.items() if "lora_B" in name} == {6}


def test_adapter_in_another_dtype(tmp_path: Path) -> None:
    folder = exported(project(tmp_path), "peft", precision="bfloat16")
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_adapter_whose_factors_overflow_float16_is_refused(tmp_path: Path) -> None:
    path = project(tmp_path)
    file = tmp_path / "alpaca" / "adapter_model.safetensors"
    save_file({name: tensor * 1e6 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"q_proj.*65504.*--precision bfloat16"):
        exported(path, "peft", precision="float16")
    assert not (tmp_path / "out").exists()


# The model card.


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_card_says_what_the_export_was_made_from(format: str, tmp_path: Path) -> None:
    path = project(tmp_path)
    text = (exported(path, format) / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(text.split("---\n")[1])["model_compose"]
    assert facts["base"]["source"] == "./base"
    assert {name: adapter["weight"] for name, adapter in facts["adapters"].items()} == WEIGHTS
    assert {n: a["sha256"] for n, a in facts["adapters"].items()} == {n: a.digest for n, a in adapters_of(path).items()}


# The files.


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 200),
)
def test_safetensors_reads_the_shards(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[torch.dtype, list[int]]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in specs.items()}
    entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    written: list[int] = []
    write_shards(folder, entries, tensors.__getitem__, size, written.append)
    found = tensors_of(folder)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())


# Blends by a method.


def test_a_blend_of_full_rank_is_exported_as_a_merged_model_only(tmp_path: Path) -> None:
    path = project(tmp_path)
    ties = "  blends:\n    voted: {method: ties, density: 0.5, weights: {alpaca: 0.7, pirate: 0.8}}\n"
    path.write_text(path.read_text(encoding="utf-8").replace("  blends:\n", ties), encoding="utf-8")
    with pytest.raises(InputError, match=r"'voted' \(ties\) has full rank and is not a LoRA"):
        exported(path, "peft", blend="voted")
    assert not (tmp_path / "out").exists()
    merged = tensors_of(exported(path, blend="voted"))
    base = tensors_of(tmp_path / "base")
    blend = Blend(WEIGHTS, method=Ties(density=0.5))
    for module in ("q_proj", "o_proj"):
        key = f"model.layers.0.self_attn.{module}"
        added = delta(blend, adapters_of(path), key)
        assert added is not None
        assert torch.allclose(merged[f"{key}.weight"], base[f"{key}.weight"] + added, atol=1e-6)
    assert "ties, approximate (density 0.5" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
