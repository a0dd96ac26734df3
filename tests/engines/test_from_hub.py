"""Base and adapters from the (stand-in) Hub: the whole first example's way, and the preflight before the large download."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_compose.compose import Compose
from model_compose.errors import AdapterError, LoadError, SourceError
from model_compose.progress import Progress
from tests import tiny
from tests.hub import Hub, running_hub

YAML = """\
component:
  type: model
  task: text-generation
  model: {provider: huggingface, repository: meta/llama, token: "${env.HUGGINGFACE_TOKEN}"}
  precision: float32
  peft_adapters:
    - {type: lora, name: alpaca, model: someone/alpaca, weight: 0.7}
    - {type: lora, name: assistant, model: someone/assistant, weight: 0.8}
  action: {text: "${input.prompt as text}", max_output_length: 4}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


def publish(hub: Hub, tmp_path: Path, *, gated: bool = False, other_shape: bool = False) -> Path:
    base = tiny.save_base(tmp_path / "base")
    hub.add("meta/llama", files(base), gated=gated)
    trained_on = tiny.save_base(tmp_path / "other", tiny.llama_config(hidden_size=64)) if other_shape else base
    for seed, name in enumerate(("alpaca", "assistant")):
        hub.add(f"someone/{name}", files(tiny.save_adapter(tmp_path / name, trained_on, seed=seed)))
    path = tmp_path / "model-compose.yml"
    path.write_text(YAML)
    return path


def fetched_weights(hub: Hub, repository: str) -> bool:
    return any(r.method == "GET" and repository in r.path and r.path.endswith("safetensors") for r in hub.requests)


async def test_the_blend_is_served_from_the_hub_and_then_from_the_cache(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = publish(hub, tmp_path)
    reports: list[Progress] = []
    with caplog.at_level(logging.WARNING):
        async with Compose.open(path, env={}, report=reports.append) as compose:
            first = await compose.answer({"prompt": "Hello"})
    assert first.answers[0].blend.weights == {"alpaca": 0.7, "assistant": 0.8}
    assert any(report.unit == "B" and report.total and report.done == report.total for report in reports)
    assert all(request.authorization is None for request in hub.requests)
    hub.stop()
    async with Compose.open(path, env={}) as compose:
        again = await compose.answer({"prompt": "Hello"})
    assert again.answers[0].identity == first.answers[0].identity


async def test_a_wrong_shape_is_found_before_the_base_is_fetched(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path, other_shape=True)
    with pytest.raises(AdapterError, match=r"q_proj has A \(4, 64\) and B \(64, 4\).*the base's has 32 inputs"):
        async with Compose.open(path, env={}):
            pass
    assert fetched_weights(hub, "someone/alpaca")
    assert not fetched_weights(hub, "meta/llama")


async def test_a_refused_adapter_is_not_even_fetched(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path)
    adapter = hub.repositories["someone/alpaca"].files
    dora = adapter["adapter_config.json"].replace(b'"use_dora": false', b'"use_dora": true')
    hub.add("someone/alpaca", {**adapter, "adapter_config.json": dora})
    with pytest.raises(AdapterError, match="adapter 'alpaca': use_dora is true; DoRA"):
        async with Compose.open(path, env={}):
            pass
    assert not fetched_weights(hub, "someone/alpaca")
    assert not fetched_weights(hub, "meta/llama")


async def test_a_gated_base_says_what_to_do_and_opens_with_the_token(hub: Hub, tmp_path: Path) -> None:
    path = publish(hub, tmp_path, gated=True)
    with pytest.raises(SourceError, match="meta/llama") as caught:
        async with Compose.open(path, env={}):
            pass
    assert "token" in str(caught.value)
    async with Compose.open(path, env={"HUGGINGFACE_TOKEN": "hf_right"}) as compose:
        assert await compose.answer({"prompt": "Hello"})
    assert not any(r.authorization for r in hub.requests if "someone/" in r.path)  # the base's token is the base's


async def test_a_wrong_shape_is_not_said_to_fit(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = publish(hub, tmp_path, other_shape=True)
    name_base(hub, "meta/llama-wide")
    with caplog.at_level(logging.WARNING), pytest.raises(AdapterError, match="belongs to another base model"):
        async with Compose.open(path, env={}):
            pass
    assert "the shapes fit" not in caplog.text


async def test_an_adapter_of_another_base_is_a_warning(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = publish(hub, tmp_path)
    for named, warned in (("other/llama-chat", True), ("other/LLaMA", False), ("/home/me/llama-chat", False)):
        name_base(hub, named)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            async with Compose.open(path, env={}):
                pass
        said = "adapter 'alpaca' was trained on other/llama-chat, but the base model is meta/llama; the shapes fit"
        assert (said in caplog.text) == warned


def name_base(hub: Hub, name: str) -> None:
    """Says in the config of the adapter alpaca which base it was trained on."""
    published = hub.repositories["someone/alpaca"].files
    config = json.loads(published["adapter_config.json"]) | {"base_model_name_or_path": name}
    hub.add("someone/alpaca", {**published, "adapter_config.json": json.dumps(config).encode()})


async def test_a_base_without_a_chat_template_is_told_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    hub.add("meta/llama", files(base))  # without its chat_template.jinja
    path = tmp_path / "model-compose.yml"
    path.write_text(
        "component:\n  type: model\n  task: chat-completion\n  model: meta/llama\n  precision: float32\n"
        '  action: {messages: [{role: user, content: "${input.prompt}"}], max_output_length: 4}\n'
    )
    with pytest.raises(LoadError, match="meta/llama has no chat template"):
        async with Compose.open(path, env={}):
            pass
    assert not fetched_weights(hub, "meta/llama")
    hub.add("meta/llama", files(base) | {"chat_template.jinja": tiny.CHAT_TEMPLATE.encode()})
    async with Compose.open(path, env={}) as compose:
        assert await compose.answer({"prompt": "Hello"})
