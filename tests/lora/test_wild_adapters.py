"""Adapters from strangers: they load unchanged if we can apply them exactly, and else raise one clear AdapterError."""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from model_compose.errors import AdapterError
from model_compose.lora.adapter import LoraAdapter, check, read_adapter
from model_compose.lora.blend import Blend
from model_compose.lora.layers import LoraModel, module_shapes
from model_compose.lora.peft_config import read_config
from tests import tiny
from tests.lora.oracle import TOLERANCE, error

IDS = torch.arange(3, 15)[None]
MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
TENSORS = {A: torch.full((4, 32), 0.5), B: torch.full((32, 4), 0.25)}
EMBEDDING = "base_model.model.model.embed_tokens.weight"


def folder(
    path: Path, tensors: Mapping[str, torch.Tensor] = TENSORS, config: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """An adapter of one module, with changes to its config."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**(config or CONFIG), **changes}), encoding="utf-8")
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path / "adapter_model.safetensors")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(AdapterError, match=r"^adapter 'x': ") as caught:
        read_adapter(path, "x")
    assert "weights_only" not in str(caught.value)
    return str(caught.value)


def read_or_refused(read: Callable[[], object]) -> bool:
    """Whether `read` returns something true, or raises an AdapterError with the adapter's name. Others pass through."""
    try:
        return bool(read())
    except AdapterError as error:
        return str(error).startswith("adapter 'x': ")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("bases")
    tiny.save_base(at / "plain")
    tiny.save_base(at / "tied", tiny.llama_config(tie_word_embeddings=True))
    return at


def logits(base: Path, adapter: LoraAdapter) -> torch.Tensor:
    lora = LoraModel(AutoModelForCausalLM.from_pretrained(base).eval(), [adapter])
    with torch.inference_mode(), lora.use([Blend({adapter.name: 1.0})]):
        found: torch.Tensor = lora.model(IDS).logits
    return found


def pefts(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.inference_mode():
        found: torch.Tensor = PeftModel.from_pretrained(model, adapter).eval()(IDS).logits
    return found


# Two things where there may be only one.


def test_the_error_for_several_adapters_in_one_file_names_them(tmp_path: Path) -> None:
    several = {
        key.replace(".weight", f".{name}.weight"): tensor + number
        for number, name in enumerate(("reference", "default"))
        for key, tensor in TENSORS.items()
    }
    message = refusal(folder(tmp_path, several))
    assert "holds several adapters: 'default', 'reference'; save only the one that you want" in message
    folder(tmp_path / "reference")  # where PEFT saves further adapters
    assert f"point to the folder of the one that you want: {tmp_path / 'reference'}" in refusal(tmp_path)
    assert read_adapter(tmp_path / "reference", "x").modules
    (tmp_path / "adapter_config.json").unlink()
    assert "name one of the adapters in it: reference" in refusal(tmp_path)


def test_tensors_with_and_without_an_adapter_name_are_two_adapters(tmp_path: Path) -> None:
    both = TENSORS | {key.replace(".weight", ".default.weight"): tensor + 1 for key, tensor in TENSORS.items()}
    assert "'default', one without a name" in refusal(folder(tmp_path, both))


def test_the_error_for_one_factor_under_two_names_names_both(tmp_path: Path) -> None:
    short = A.removeprefix("base_model.model.")
    message = refusal(folder(tmp_path, TENSORS | {short: TENSORS[A] + 1}))
    assert f"'{A}'" in message
    assert f"'{short}'" in message
    embedding = TENSORS | {f"base_model.model.{MODULE}.lora_embedding_A": torch.zeros(4, 258)}
    assert "lora_embedding_A' and" in refusal(folder(tmp_path, embedding)) or "and 'base_model" in refusal(tmp_path)


def test_two_different_copies_of_one_base_weight_are_refused(tmp_path: Path) -> None:
    other = EMBEDDING.replace(".weight", ".base_layer.weight")
    both = TENSORS | {EMBEDDING: torch.zeros(258, 32), other: torch.zeros(258, 32)}
    assert list(read_adapter(folder(tmp_path, both), "x").copies) == ["model.embed_tokens.weight"]
    assert "two different copies" in refusal(folder(tmp_path, both | {other: torch.ones(258, 32)}))


def test_a_config_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path) / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 4, "lora_alpha": 16'))
    assert "the key 'lora_alpha' stands in one object twice" in refusal(tmp_path)


def test_a_rank_other_than_the_configs_is_refused(tmp_path: Path) -> None:
    """PEFT refuses such shapes too; we would have to guess alpha / r."""
    message = refusal(folder(tmp_path, r=8))
    assert MODULE in message
    assert "has rank 4" in message
    assert "says 8 (r, rank_pattern)" in message
    assert read_adapter(folder(tmp_path, r=8, rank_pattern={"q_proj": 4}), "x").modules[MODULE].scaling == 2
    assert "says 6" in refusal(folder(tmp_path, rank_pattern={"layers.0.self_attn.q_proj": 6}))
    assert read_adapter(folder(tmp_path, rank_pattern={r"layers\.[1-9]\..*": 6}), "x")
    without = {key: value for key, value in CONFIG.items() if key != "r"}
    assert "says 8" in refusal(folder(tmp_path, config=without))  # PEFT's default


# Numbers as they are stored.


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_factors_are_exact_in_float32(bases: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(1)
    small = {key: (torch.randn(tensor.shape, generator=drawn) / 8).to(dtype) for key, tensor in TENSORS.items()}
    assert read_adapter(folder(tmp_path / "small", small), "x").modules[MODULE].a.dtype == torch.float32
    wide = folder(tmp_path / "wide", {key: tensor.float() for key, tensor in small.items()})
    ours = logits(bases / "plain", read_adapter(tmp_path / "small", "x"))
    assert torch.equal(ours, logits(bases / "plain", read_adapter(wide, "x")))
    bad = small | {A: torch.full((4, 32), float("nan")).to(dtype)}
    assert "NaN" in refusal(folder(tmp_path / "bad", bad))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(4, 32, dtype=torch.int8), "is int8, not floating-point"),
        (torch.ones(4, 32, dtype=torch.bool), "is bool"),
        (torch.ones(4, 32, dtype=torch.complex64), "is complex64"),
        (torch.full((4, 32), 1e300, dtype=torch.float64), "NaN or infinite"),  # finite, but not in float32
        (torch.full((4, 32), float("inf")), "NaN or infinite"),
        (torch.ones(0, 32), "expected (r, in) and (out, r)"),
        (torch.ones(4, 32, 1), "expected (r, in) and (out, r)"),
        (torch.ones(128), "expected (r, in) and (out, r)"),
        (torch.ones(3, 32), "expected (r, in) and (out, r)"),
    ],
    ids=str,
)
def test_tensors_that_cannot_be_factors_are_refused(tmp_path: Path, tensor: torch.Tensor, words: str) -> None:
    assert words in refusal(folder(tmp_path, TENSORS | {A: tensor}))


def test_a_rank_of_0_is_refused(tmp_path: Path) -> None:
    nothing = {A: torch.ones(0, 32), B: torch.ones(32, 0)}
    assert "expected (r, in) and (out, r)" in refusal(folder(tmp_path, nothing))


def test_overwriting_a_file_does_not_change_the_loaded_adapter(tmp_path: Path) -> None:
    """If the file were mapped, its new content would be served under the old identity, or the process would die
    (SIGBUS)."""
    adapter = read_adapter(folder(tmp_path), "x")
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(0)
        file.write(save({key: tensor * 2 for key, tensor in TENSORS.items()}))
    assert torch.equal(adapter.modules[MODULE].a, TENSORS[A])


# Configs with suspicious options whose adapters are exact all the same.


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias_options_on_a_base_without_biases(bases: Path, tmp_path: Path, bias: Any) -> None:
    """Llama has no biases, so PEFT saves none."""
    path = tiny.save_adapter(tmp_path, bases / "plain", bias=bias)
    ours = logits(bases / "plain", read_adapter(path, "x"))
    assert error(ours, pefts(bases / "plain", path).double()) <= TOLERANCE
    weights = path / "adapter_model.safetensors"
    trained = f"base_model.model.{MODULE}.bias"
    save_file(load_file(weights) | {trained: torch.ones(32)}, weights)
    assert f"'{trained}' is a trained bias" in refusal(path)


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("plain", ["q_proj"]), ("plain", ["q_proj", "embed_tokens"]), ("plain", ["embed_tokens", "lm_head"]),
        ("tied", ["q_proj"]), ("tied", ["q_proj", "embed_tokens"]), ("tied", ["lm_head"]),
    ],
)  # fmt: skip
def test_tied_factors_equal_pefts(bases: Path, tmp_path: Path, base: str, targets: list[str]) -> None:
    """With ensure_weight_tying, PEFT trains one pair of factors for both modules and saves it for each."""
    path = tiny.save_adapter(tmp_path, bases / base, ensure_weight_tying=True, target_modules=targets)
    ours = logits(bases / base, read_adapter(path, "x"))
    assert error(ours, pefts(bases / base, path).double()) <= TOLERANCE


def test_tied_factors_that_are_missing_or_different_are_refused(bases: Path, tmp_path: Path) -> None:
    path = tiny.save_adapter(tmp_path, bases / "tied", ensure_weight_tying=True, target_modules=["embed_tokens"])
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    head = next(key for key in tensors if "lm_head.lora_B" in key)
    save_file(tensors | {head: tensors[head] + 1}, weights)
    with pytest.raises(AdapterError, match=r"different factors for lm_head and model\.embed_tokens"):
        logits(bases / "tied", read_adapter(path, "x"))
    save_file({key: tensor for key, tensor in tensors.items() if "lm_head.lora" not in key}, weights)
    with pytest.raises(
        AdapterError, match=r"ties model\.embed_tokens to lm_head, for which the adapter has no factors"
    ):
        logits(bases / "tied", read_adapter(path, "x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_copy_of_the_bases_embedding_in_any_dtype(bases: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    own = load_file(bases / "plain/model.safetensors")["model.embed_tokens.weight"]
    path = folder(tmp_path, TENSORS | {EMBEDDING: own.to(dtype)})
    logits(bases / "plain", read_adapter(path, "x"))
    trained = own.clone()
    trained[7, 3] += 0.01
    folder(tmp_path, TENSORS | {EMBEDDING: trained.to(dtype)})
    with pytest.raises(AdapterError, match="differs from the base model's"):
        logits(bases / "plain", read_adapter(path, "x"))


GEMMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 258, "max_position_embeddings": 256,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def test_module_paths_of_older_versions_of_gemma_3(tmp_path: Path) -> None:
    config = Gemma3Config(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes, inner = module_shapes(model), "layers.1.self_attn.q_proj"
    assert f"model.language_model.{inner}" in shapes
    for prefix in ("model.language_model.", "language_model.model.", "model.language_model.model.", "model."):
        renamed = {key.replace(MODULE, prefix + inner): tensor for key, tensor in TENSORS.items()}
        copy = {f"base_model.model.{prefix}embed_tokens.weight": torch.zeros(258, 32)}
        adapter = check(read_adapter(folder(tmp_path, renamed | copy), "x"), shapes)
        assert list(adapter.modules) == [f"model.language_model.{inner}"], prefix
        assert list(adapter.copies) == ["model.language_model.embed_tokens.weight"]
    twice = {
        key.replace(MODULE, prefix + inner): tensor
        for key, tensor in TENSORS.items()
        for prefix in ("language_model.model.", "model.language_model.")
    }
    with pytest.raises(AdapterError, match=r"'language_model\.model\..*' and 'model\.language_model\..*' are the same"):
        check(read_adapter(folder(tmp_path, twice), "x"), shapes)
    with pytest.raises(AdapterError, match=r"no module 'model\.encoder"):
        check(read_adapter(folder(tmp_path, {key.replace("layers", "encoder.layers"): tensor
                                            for key, tensor in TENSORS.items()}), "x"), shapes)  # fmt: skip


# Configs.


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = folder(tmp_path) / "adapter_config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_adapter(tmp_path, "x").modules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"peft_type": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON (recursion limit exceeded"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON (recursion limit exceeded"),
        (json.dumps(CONFIG).replace("4", "1000000000"), "r is 1000000000: Input should be less than or equal to 65536"),
        (json.dumps(CONFIG).replace("4", "9" * 5000), "not valid JSON"),
        (json.dumps(CONFIG).replace("8", "NaN"), "not valid JSON"),
        (json.dumps(CONFIG).replace("8", "1e999"), "not valid JSON"),
        (json.dumps(CONFIG).replace("8", "true"), "lora_alpha is true"),
        (json.dumps(CONFIG).replace("4", "0"), "r is 0"),
        (json.dumps(CONFIG).replace("4", "4.5"), "r is 4.5"),
        (json.dumps(CONFIG | {"rank_pattern": {"(?=q)q_proj": 4}}), "uses look-around, which model-compose does not"),
        (json.dumps(CONFIG | {"rank_pattern": {"q_proj[": 4}}), "is not a valid pattern (unterminated"),
        (json.dumps(CONFIG | {"alpha_pattern": {f"(q{n})+": 4 for n in range(2000)}}), "more than 1,024 patterns"),
        (json.dumps(CONFIG | {"rank_pattern": {f"q*{'x' * 70_000}": 4}}), "longer than 65,536 characters"),
        (json.dumps(CONFIG | {"rank_pattern": {r"(q)\1": 4}}), "uses backreferences, which"),
        (json.dumps(CONFIG | {"rank_pattern": {"(q": 4}}), "is not a valid pattern (unclosed group"),
        (json.dumps(CONFIG | {"target_modules": "(q_proj"}), "target_modules"),
        (json.dumps(CONFIG | {"bias": "some"}), 'bias is "some"; known are'),
        (json.dumps(CONFIG | {"x" * 10_000: "y" * 10_000}), "does not know this option"),
        ("[]", "must hold a JSON object"), ("null", "must hold a JSON object"), ("", "not valid JSON"),
        ("\ud800", "not valid JSON"),
    ],
    ids=range(22),
)  # fmt: skip
def test_invalid_configs_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = folder(tmp_path) / "adapter_config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = refusal(tmp_path)
    assert words in message
    assert len(message) < 1000


def test_adapters_that_peft_converted_to_plain_lora_load(tmp_path: Path) -> None:
    """PEFT's conversion of CorDA and LoRA-GA leaves corda_config and lora_ga_config beside init_lora_weights: true."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = AutoModelForCausalLM.from_config(tiny.llama_config())
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(model, config, run_model=lambda: [model(IDS + number) for number in range(20)])
    trained: Any = get_peft_model(model, config)
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "first")
    trained.peft_config["default"].init_lora_weights = "corda"
    trained.save_pretrained(tmp_path / "own")
    assert "(PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ); convert the adapter" in refusal(tmp_path / "own")
    trained.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    assert read_config(tmp_path / "plain", "x")["corda_config"]
    assert len(read_adapter(tmp_path / "plain", "x").modules) == 2
    read_adapter(folder(tmp_path / "ga", lora_ga_config={"direction": "ArB2r"}), "x")


def test_a_pattern_that_would_take_pythons_re_years(tmp_path: Path) -> None:
    module = "model." + "a" * 60
    long = {key.replace(MODULE, module): tensor for key, tensor in TENSORS.items()}
    assert read_adapter(folder(tmp_path, long, rank_pattern={"(a|aa)+b": 9}), "x").modules[module].rank == 4
    assert "says 9" in refusal(folder(tmp_path, long, rank_pattern={"(a|aa)+": 9}))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"(.|..|...)+X": 4}}, {"target_modules": "(.|..|...)+X"}, {"exclude_modules": "(.|..|...)+X"},
        {"layers_pattern": "(.|..|...)+X", "layers_to_transform": 0},
    ],
    ids=str,
)  # fmt: skip
def test_the_planner_is_quick_with_costly_patterns_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    """In a separate process with a timeout: while Python's re matches, it holds the GIL, so no thread could stop it."""
    program = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from model_compose.engines.sizes import adapter_size
from model_compose.errors import AdapterError
from model_compose.lora.peft_config import read_config
from tests import tiny
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(tiny.llama_config())
try:
    print(adapter_size(read_config(Path(sys.argv[1]), "x"), model, "x").ranks)
except AdapterError as error:
    print(error)
"""
    path = folder(tmp_path, **changes)
    command = [sys.executable, "-c", program, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    if "target_modules" in changes:
        assert "has none of its target_modules" in printed
    elif "layers_pattern" in changes:
        assert "has wildcards" in printed
    else:
        assert MODULE in printed


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)"}, {"target_modules": "q_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r".*_proj", "exclude_modules": r".*\.[vq]_proj", "rank_pattern": {r".*\.1\..*": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=str,
)  # fmt: skip
def test_the_planner_chooses_modules_and_ranks_as_peft_does(changes: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    from model_compose.engines.sizes import adapter_size

    model = AutoModelForCausalLM.from_config(tiny.llama_config())
    config = LoraConfig(**{**CONFIG, "peft_type": None, **changes})
    try:
        ranks = adapter_size({**CONFIG, **changes}, model, "x").ranks
    except AdapterError:
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(model, config)
        return
    trained: Any = get_peft_model(model, config)
    own = {path: module for path, module in trained.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert ranks == {path: module.r["default"] for path, module in own.items()}


def test_layerwise_ranks_by_patterns(tmp_path: Path) -> None:
    """A pattern for each of 200 layers works; patterns that would take too much memory together are refused."""
    ranks = {rf".*layers\.{number}\..*": 4 + number for number in range(200)}
    assert read_adapter(folder(tmp_path, rank_pattern=ranks), "x").modules[MODULE].rank == 4
    huge = {rf"\w{{50}}{number}": 4 for number in range(200)}
    assert "exceeds size limit" in refusal(folder(tmp_path, rank_pattern=huge))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**30, -1, 1e308, "q_proj", "all-linear", "LORA", "(", {"q_proj": 4}, [1], ["q_proj"]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = [*CONFIG, "rank_pattern", "alpha_pattern", "use_rslora", "bias", "ensure_weight_tying", "init_lora_weights",
        "base_model_name_or_path", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora", "loftq_config",
        "modules_to_save", "auto_mapping"]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), ANY, max_size=3))
def test_any_value_under_any_key(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    """Both readers of a config, the adapter's and the planner's (which asks PEFT), accept it or raise AdapterError."""
    from model_compose.engines.sizes import adapter_size

    path = folder(tmp_path_factory.getbasetemp() / "any", config=CONFIG | changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.llama_config())
    assert read_or_refused(lambda: read_adapter(path, "x").modules[MODULE].rank == 4)
    assert read_or_refused(lambda: adapter_size(read_config(path, "x"), model, "x").ranks)


# Files.

SAFE = save(TENSORS)


def header(content: Any, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0", SAFE[:7], SAFE[:8], SAFE[:40], SAFE[:-1], SAFE + b"\0",
        header({}, 2**63), header({}, 100_000_001), header(b"[" * 100_000), header(b'{"a":' * 10_000),
        header({A: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
        header({A: {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
        header({A: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({A: {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({A: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + b"\0" * 4,
        header({A: 5}), header({}), header("text"), header(None), pickle.dumps({}), b"<html>not found</html>" * 99,
    ],
    ids=range(22),
)  # fmt: skip
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_files_that_hold_no_adapter_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = folder(tmp_path)
    (path / "adapter_model.safetensors").unlink()
    (path / name).write_bytes(data)
    assert len(refusal(path)) < 500


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data(), name=st.sampled_from(["adapter_model.safetensors", "adapter_model.bin"]))
def test_any_bytes_changed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    path = folder(tmp_path_factory.mktemp("bytes"))
    (path / "adapter_model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(TENSORS, path / name)
    else:
        (path / name).write_bytes(SAFE)
    content = bytearray((path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 700)))] = data.draw(st.integers(0, 255))
    (path / name).write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    assert read_or_refused(lambda: read_adapter(path, "x").modules)


def pickled(path: Path, content: Any, **options: Any) -> Path:
    path = folder(path)
    (path / "adapter_model.safetensors").unlink()
    torch.save(content, path / "adapter_model.bin", **options)
    return path


class Evil:
    def __reduce__(self) -> Any:
        return os.getpid, ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TENSORS | {"x": Evil()}, "reading it would call posix.getpid"),
        ([1, 2], "mapping of names to tensors"),
        ({1: torch.ones(2)}, "mapping of names to tensors"),
        ({"x": {"y": torch.ones(2)}}, "holds a value of type dict as 'x', not a tensor"),
        (TENSORS | {"epoch": 3}, "holds a value of type int as 'epoch', not a tensor"),
        ({A: torch.ones(4, 32).to_sparse()}, "as a sparse, nested, quantised or device tensor"),
        ({A: torch.ones(4, 32, device="meta")}, "as a sparse, nested, quantised or device tensor"),
        (
            {A: torch.quantize_per_tensor(torch.ones(4, 32), 1.0, 0, torch.qint8)},
            "as a sparse, nested, quantised or device tensor",
        ),
        ({A: torch.ones(1).expand(10**6, 10**6), B: TENSORS[B]}, "unpacks to more bytes"),
        ({}, "no lora_A and lora_B"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_without_plain_tensors_are_refused(tmp_path: Path, content: Any, words: str, legacy: bool) -> None:
    assert words in refusal(pickled(tmp_path, content, _use_new_zipfile_serialization=not legacy))


def test_a_compressed_pickle_is_refused(tmp_path: Path) -> None:
    path = pickled(tmp_path, {A: torch.zeros(4, 1 << 20), B: TENSORS[B]}) / "adapter_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 1 << 20
    assert "it is compressed, which torch.save never does" in refusal(tmp_path)


def test_pickled_parameters_and_shared_tensors_are_read(tmp_path: Path) -> None:
    """Old trainers pickled nn.Parameter, and an embedding together with the head that is tied to it."""
    tied = torch.zeros(258, 32)
    content = {key: torch.nn.Parameter(tensor) for key, tensor in TENSORS.items()}
    path = pickled(tmp_path, content | {EMBEDDING: tied, "base_model.model.lm_head.weight": tied})
    adapter = read_adapter(path, "x")
    assert len(adapter.copies) == 2
    assert not adapter.modules[MODULE].a.requires_grad


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_folders_pipes_and_links_in_place_of_files_are_refused(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path) / name
    path.unlink()
    path.mkdir()
    refusal(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    refusal(tmp_path)
    for target in ("nowhere", path, "/dev/zero", "/proc/self/mem"):
        path.unlink()
        path.symlink_to(target)
        refusal(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "."])
def test_files_without_permission_to_read_are_refused(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "inner") / name
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    try:
        assert "(Permission denied)" in refusal(tmp_path / "inner")
    finally:
        path.chmod(mode)
