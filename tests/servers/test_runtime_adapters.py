"""Adapters that clients load and unload while the service runs: where from, who may, and what it does to requests."""

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model_compose.components.model import ModelComponent
from model_compose.compose import Compose
from model_compose.engines.huggingface.engine import HuggingfaceEngine
from model_compose.errors import ConfigError, InputError
from model_compose.generation import Request, Sampling, collect
from model_compose.loading import load
from model_compose.lora.blend import Blend
from model_compose.servers.http import create_app
from tests import tiny
from tests.conftest import serving
from tests.hub import Hub, running_hub
from tests.servers.test_fuzz import BOUNDED, ODD, TEXTS
from tests.servers.test_guard import KEY
from tests.servers.test_openai import client_of, text_of
from tests.waiting import held

YAML = tiny.YAML.replace(
    "  blends:\n",
    "    - {type: lora, name: idle, model: ./alpaca, weight: 0}\n  allow_runtime_adapters: true\n  blends:\n",
)
SOURCES = YAML.replace(
    "  blends:\n", "  runtime_adapter_sources: [./loose, tiny/one, friends/*, /nowhere]\n  blends:\n"
)
LONG = Sampling(max_output_length=120, min_output_length=120, do_sample=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project, two further adapters in it, and one outside of it."""
    folder = tmp_path_factory.mktemp("runtime")
    tiny.save_project(folder / "app", YAML)
    for seed, place in enumerate(("app/loose/first", "app/loose/second", "app/other", "outside"), start=5):
        tiny.save_adapter(folder / place, folder / "app/base", seed=seed, std=0.5)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder / "app/model-compose.yml") as url:
        yield url


@pytest.fixture
async def model(folder: Path) -> AsyncIterator[ModelComponent]:
    async with Compose.open(folder / "app/model-compose.yml") as compose:
        yield compose.models["__component__"]


def load_adapter(url: str, name: str, path: str, **more: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path} | more
    return httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)


def unload_adapter(url: str, name: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name} | more, timeout=60)


def refused(response: httpx.Response, status: int) -> str:
    """The message of an error of /v1."""
    assert response.status_code == status, response.text
    message: str = response.json()["error"]["message"]
    return message


def active(engine: Any) -> set[str]:
    """What the engine holds, under its own names."""
    assert isinstance(engine, HuggingfaceEngine)
    assert engine._loaded is not None
    return set(engine._loaded.lora.names)


# What a client sees.


def test_loaded_used_replaced_and_unloaded_through_the_openai_client(url: str) -> None:
    with client_of(url) as client:
        without = text_of(client, model="default:plain")
        loaded = client.post("/load_lora_adapter", body={"lora_name": "new", "lora_path": "./loose/first"}, cast_to=str)
        assert loaded == "Success: LoRA adapter 'new' added successfully."
        assert "default:new" in {model.id for model in client.models.list()}
        first = text_of(client, model="default:new")
        assert first != without
        assert first == text_of(client, extra_body={"lora": {"new": 1.0}})
        assert first != text_of(client, extra_body={"lora": {"new": 1.0, "pirate": 2.0}})
        run = httpx.post(f"{url}/api/workflows/runs", json={"input": {"prompt": "Hello"}, "blend": {"new": 1.0}}).json()
        assert run["blend"]["weights"] == {"new": 1.0}
        message = refused(load_adapter(url, "new", "./loose/second"), 400)
        assert (
            message == "the adapter 'new' is loaded already; to put another one in its place, set load_inplace to true"
        )
        assert load_adapter(url, "new", "./loose/second", load_inplace=True).text == loaded
        assert text_of(client, model="default:new") != first
        again = httpx.post(f"{url}/api/workflows/runs", json={"input": {"prompt": "Hello"}, "blend": {"new": 1.0}})
        assert again.json()["blend"]["identity"] != run["blend"]["identity"]
        done = unload_adapter(url, "new", component="default")
        assert (done.text, done.status_code) == ("Success: LoRA adapter 'new' removed successfully.", 200)
        assert done.headers["content-type"].startswith("text/plain")
        assert "default:new" not in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError):
            text_of(client, model="default:new")
        assert text_of(client, model="default:plain") == without


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_path": "./loose/first"}, "lora_name"),
        ({"lora_name": "", "lora_path": "./loose/first"}, "lora_name"),
        ({"lora_name": "a:b", "lora_path": "./loose/first"}, "lora_name"),
        ({"lora_name": "strong", "lora_path": "./loose/first"}, "lora_name"),
        ({"lora_name": "default", "lora_path": "./loose/first"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "./loose/first", "lora_id": 5}, "lora_id"),
        ({"lora_name": "x", "lora_path": "./loose/first", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"lora_name": "x", "lora_path": "loose/a b"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "./nowhere"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "./model-compose.yml"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "./base"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "./\0"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "./" + "a" * 999}, "lora_path"),
    ],
)
def test_wrong_requests_name_the_field(url: str, body: dict[str, Any], field: str) -> None:
    response = httpx.post(f"{url}/v1/load_lora_adapter", json=body)
    assert refused(response, 400)
    assert response.json()["error"]["param"] == field
    assert "x" not in httpx.get(f"{url}/v1/models").text.replace("default:", "")


def test_an_adapter_that_does_not_fit_is_the_clients_fault(url: str, folder: Path, tmp_path: Path) -> None:
    wide = tiny.save_base(tmp_path / "wide", tiny.llama_config(hidden_size=64))
    tiny.save_adapter(folder / "app/loose/wide", wide)
    tiny.save_adapter(folder / "app/loose/dora", folder / "app/base", use_dora=True)
    for _ in range(2):  # also in the place of another one, which stays
        assert "adapter 'wide'" in refused(load_adapter(url, "wide", "./loose/wide"), 400)
        message = refused(load_adapter(url, "alpaca", "./loose/wide", load_inplace=True), 400)
        assert "adapter 'alpaca': model.layers.0.self_attn.q_proj has A" in message
        assert "DoRA" in refused(load_adapter(url, "dora", "./loose/dora"), 400)
    with client_of(url) as client:
        assert text_of(client, model="default:alpaca")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "`git lfs pull`"),
        (b"<html>503</html>" * 99, "header too large"),
        (b"", "header too small"),
        (None, "holds neither adapter_model.safetensors nor adapter_model.bin"),
    ],
    ids=["git-lfs", "page", "empty", "missing"],
)
def test_files_that_are_no_weights_are_the_clients_fault(
    url: str, folder: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = folder / "app/loose" / tmp_path.name
    shutil.copytree(folder / "app/loose/first", path)
    weights = path / "adapter_model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    assert words in refused(load_adapter(url, "odd", f"./loose/{path.name}"), 400)


def test_two_adapters_in_one_file_are_named_and_one_of_8_bits_serves(url: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "app/loose" / tmp_path.name
    shutil.copytree(folder / "app/loose/first", path)
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}, weights)
    assert load_adapter(url, "small", f"./loose/{path.name}").status_code == 200
    with client_of(url) as client:
        assert text_of(client, model="default:small") != text_of(client, model="default:plain")
    assert unload_adapter(url, "small").status_code == 200
    several = {
        key.replace(".weight", f".{name}.weight"): tensor.clone()
        for key, tensor in tensors.items()
        for name in ("default", "reference")
    }
    save_file(several, weights)
    assert "several adapters: 'default', 'reference'" in refused(
        load_adapter(url, "small", f"./loose/{path.name}"), 400
    )


def test_unloading_what_is_unknown_or_needed(url: str) -> None:
    message = refused(unload_adapter(url, "nobody"), 404)
    said, _, known = message.partition("; known: ")
    assert said == "there is no adapter 'nobody'"
    assert {"alpaca", "pirate"} <= set(known.split(", "))  # other tests load and unload further ones
    assert refused(unload_adapter(url, "pirate"), 409) == "the blend 'default' of the file uses the adapter 'pirate'"
    assert refused(unload_adapter(url, ""), 400)
    assert load_adapter(url, "own", "./alpaca").status_code == 200
    assert unload_adapter(url, "own").status_code == 200


async def test_an_adapter_of_the_file_that_nothing_needs_is_unloaded(model: ModelComponent) -> None:
    await model.unload_adapter("idle")
    assert active(model.engine) == {"alpaca", "pirate"}
    assert model.blends.adapters == ("alpaca", "pirate")


def test_an_action_with_a_fixed_blend_needs_its_adapter(folder: Path) -> None:
    text = YAML.replace("blend: ${input.blend}", "blend: {idle: 1}")
    path = folder / "app/fixed.yml"
    path.write_text(text, encoding="utf-8")
    (model,) = Compose(load([path])).models.values()
    assert model.options.users("idle") == ["the action '__action__'"]
    assert model.options.users("alpaca") == ["the blend 'default'", "the blend 'strong'"]


# Where adapters may come from.


def test_paths_are_followed_before_they_are_judged(url: str, folder: Path) -> None:
    app = folder / "app"
    links = {"linked": folder / "outside", "up": folder, "inner": app / "loose"}
    for name, target in links.items():
        (app / name).symlink_to(target)
    (app / "hollow").mkdir()
    for file in (folder / "outside").iterdir():
        (app / "hollow" / file.name).symlink_to(file)
    (app / "circle").symlink_to(app / "circle")
    try:
        for outside in (
            "../outside", "./../outside", "./loose/../../outside", str(folder / "outside"), "./linked", "./up/outside",
            "/etc", "/", "~", "../", "../app2", "./loose/first/../../../nowhere", str(folder / "app") + "2",
        ):  # fmt: skip
            message = refused(load_adapter(url, "x", outside), 403)
            assert "this service may not load adapters from" in message
            assert "only from: ./ " in message
            assert str(folder) not in message.replace(outside, "")
        assert "a local folder starts with ./" in refused(load_adapter(url, "x", "loose/first"), 403)
        assert "links to files outside" in refused(load_adapter(url, "x", "./hollow"), 403)
        refused(load_adapter(url, "x", "./circle"), 400)
        for inside in ("./inner/first", "./loose/../loose/first", str(app / "loose/first"), "../app/loose/first"):
            assert load_adapter(url, "x", inside, load_inplace=True).status_code == 200, inside
    finally:
        for name in (*links, "circle"):
            (app / name).unlink()
        shutil.rmtree(app / "hollow")
        unload_adapter(url, "x")


def test_only_the_listed_folders_and_repositories(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = folder / "app/sources.yml"
    path.write_text(SOURCES, encoding="utf-8")
    files = {file.name: file.read_bytes() for file in (folder / "app/other").iterdir()}
    with running_hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        for name in ("tiny/one", "tiny/two", "friends/any", "foes/any"):
            hub.add(name, files)
        hub.add("friends/secret", files, private=True)
        with serving(path) as url:
            for allowed in ("./loose/first", "tiny/one", "friends/any"):
                assert load_adapter(url, "x", allowed, load_inplace=True).status_code == 200, allowed
            before = len(hub.requests)
            for other in ("./other", "./", "tiny/two", "foes/any", "friends", "tiny/one2", "Friends/any", "one"):
                message = refused(load_adapter(url, "x", other, load_inplace=True), 403)
                assert "./loose, tiny/one, friends/*, /nowhere (`runtime_adapter_sources` in the YAML file)" in message
            assert len(hub.requests) == before, "nothing is asked of the Hub for what is not allowed"
            missing(url, hub)


def missing(url: str, hub: Hub) -> None:
    """Allowed, but it cannot be had."""
    with_token = {"HF_TOKEN": "hf_secret_1234"}
    os.environ |= with_token
    try:
        for repository in ("friends/secret", "friends/none"):
            message = refused(load_adapter(url, "y", repository), 400)
            assert repository in message
            assert "hf_secret" not in message
        hub.status = 500
        assert "friends/other" in refused(load_adapter(url, "y", "friends/other"), 400)
    finally:
        del os.environ["HF_TOKEN"]


def test_sources_are_checked_when_the_file_is_read(folder: Path) -> None:
    path = folder / "app/wrong.yml"
    for sources, message in (
        ("[loose/a/b]", "'loose/a/b' is neither a folder"),
        ("['*/*']", "'*/*' is neither a folder"),
        ("['org/a*']", "'org/a*' is neither a folder"),
        ("[5]", "runtime_adapter_sources.0: expected text, not 5"),
    ):
        path.write_text(YAML.replace("  blends:\n", f"  runtime_adapter_sources: {sources}\n  blends:\n"))
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            load([path])
        assert "wrong.yml:18" in str(caught.value)
    path.write_text(SOURCES.replace("  allow_runtime_adapters: true\n", ""))
    with pytest.raises(ConfigError, match=r"'runtime_adapter_sources' has no effect without allow_runtime_adapters"):
        load([path])
    path.write_text(YAML.replace("  blends:\n", "  options: {fold: always}\n  blends:\n"))
    with pytest.raises(ConfigError, match="fold: always cannot be with 'allow_runtime_adapters'"):
        load([path])
    over = folder / "over.yml"  # relative paths count from the file that says them
    over.write_text("component: {runtime_adapter_sources: ./outside}\n")
    (model,) = Compose(load([folder / "app/model-compose.yml", over])).models.values()
    assert model.runtime_adapter("x", "../outside").name == "x"


# Who may.


def test_off_unless_the_file_says_so(server: str, locked: str) -> None:
    for response in (load_adapter(server, "x", "./alpaca"), unload_adapter(server, "alpaca")):
        assert "allow_runtime_adapters: true" in refused(response, 403)
    assert "allow_runtime_adapters: true" in refused(load_adapter(server, "x", "./alpaca", component="default"), 403)
    assert refused(load_adapter(server, "x", "./alpaca", component="nobody"), 404).endswith("known: default")
    assert "API key" in refused(load_adapter(locked, "x", "./alpaca"), 401)
    assert httpx.post(f"{locked}/v1/unload_lora_adapter", json={"lora_name": "x"}, headers=KEY).status_code == 403


def test_another_sites_page_cannot_load_adapters(url: str) -> None:
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    body = json.dumps({"lora_name": "x", "lora_path": "./loose/first"})
    for route in ("load", "unload"):
        assert refused(httpx.post(f"{url}/v1/{route}_lora_adapter", content=body, headers=headers), 403)


def test_nothing_is_loaded_before_the_models_are(folder: Path) -> None:
    with serving(folder / "app/model-compose.yml", load_models=False) as url:
        assert load_adapter(url, "x", "./loose/first").status_code == 503
        assert unload_adapter(url, "x").status_code == 503


def test_which_of_several_models(folder: Path) -> None:
    one = {
        "type": "model", "task": "text-generation", "model": "./base", "precision": "float32",
        "action": {"text": "${input.prompt}"},
    }  # fmt: skip
    path = folder / "app/several.yml"
    for allowing, status in (((), 403), (("b",), 200), (("a", "b"), 400)):
        components = [{**one, "id": id, "allow_runtime_adapters": id in allowing} for id in ("a", "b", "c")]
        workflow = {"job": {"component": "a", "output": "${output}"}}
        path.write_text(json.dumps({"components": components, "workflow": workflow}))
        with serving(path) as url:
            response = load_adapter(url, "x", "./loose/first")
            assert response.status_code == status
            if status == 400:
                assert refused(response, 400) == "several models take adapters; name one of them by 'component': a, b"
                assert load_adapter(url, "x", "./loose/first", component="a").status_code == 200
            if status == 200:
                models = {card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]}
                assert models == {"a", "b", "b:x", "c"}


# What happens to requests.


async def text(model: ModelComponent, name: str, sampling: Sampling = LONG) -> str:
    done = await collect(model.generate(Request("Hello", Blend({name: 1.0}), sampling)))
    return done.texts[0].text


async def put(model: ModelComponent, name: str, path: str) -> None:
    await model.load_adapter(model.runtime_adapter(name, path))


async def test_requests_in_flight_finish_on_the_old_content(model: ModelComponent) -> None:
    await put(model, "x", "./loose/first")
    first = await text(model, "x")
    with held(model.engine) as thread:
        running = [asyncio.create_task(text(model, "x")) for _ in range(3)]
        await thread.until(lambda: sum(thread.generated) >= 3)
        await thread.during(put(model, "x", "./loose/second"))
        second = asyncio.create_task(text(model, "x"))
        await thread.until(lambda: len(thread.generated) == 4 and all(thread.generated))
        await thread.during(model.unload_adapter("x"))
        assert all(0 < count < 120 for count in thread.generated)
    assert await asyncio.gather(*running) == [first] * 3
    assert await second != first
    with pytest.raises(InputError, match="'x' has been unloaded"):
        await text(model, "x")
    await text(model, "alpaca")
    assert active(model.engine) == {"alpaca", "pirate", "idle"}


async def test_of_loads_at_once_the_last_one_stays_and_nothing_else(model: ModelComponent) -> None:
    await put(model, "reference", "./loose/second")
    expected = await text(model, "reference")
    before = active(model.engine)
    places = ["./loose/first", "./alpaca", "./loose/first", "./loose/second"]
    await asyncio.gather(*(put(model, name, place) for place in places for name in ("x", "x'")))
    assert await text(model, "x") == await text(model, "x'") == expected
    assert len(active(model.engine) - before) == 2
    assert model.blends.adapters == ("alpaca", "pirate", "idle", "reference", "x", "x'")


async def test_requests_never_fail_while_adapters_are_replaced(model: ModelComponent) -> None:
    """Whatever the moment: a text is that of the one content or of the other, and an error is none of the server's."""
    short = Sampling(max_output_length=6, min_output_length=6, do_sample=False)
    texts = set()
    for place in ("./loose/first", "./loose/second"):
        await put(model, "x", place)
        texts.add(await text(model, "x", short))
    assert len(texts) == 2

    async def replace_it() -> None:
        for place in ["./loose/first", "./loose/second"] * 6:
            await put(model, "x", place)

    replacing = asyncio.create_task(replace_it())
    found: list[str] = []
    while not replacing.done():
        found += await asyncio.gather(*(text(model, "x", short) for _ in range(3)))
    await replacing
    assert set(found) <= texts
    await text(model, "alpaca", short)
    assert len(active(model.engine)) == 4


async def test_a_prefix_of_the_old_content_is_not_reused(model: ModelComponent) -> None:
    prompt = "A rather long prompt that the prefix cache keeps. " * 3
    for place in ("./loose/first", "./loose/second"):
        await put(model, "x", place)
        await put(model, f"fresh {place}", place)
        for name in ("x", f"fresh {place}"):
            await collect(model.generate(Request(prompt, Blend({name: 1.0}), LONG)))
    done = [await collect(model.generate(Request(prompt, Blend({name: 1.0}), LONG))) for name in
            ("x", "fresh ./loose/second")]  # fmt: skip
    assert done[0].texts[0].text == done[1].texts[0].text
    assert done[0].usage.cached_tokens > 0


async def test_the_precision_of_a_files_adapter_stays(model: ModelComponent) -> None:
    options = model.runtime_adapter("alpaca", "./loose/first")
    assert (options.name, options.weight) == ("alpaca", 0.7)
    assert model.runtime_adapter("x", "./loose/first").weight == 1.0


def test_the_routes_are_described_where_adapters_are_on_and_off(folder: Path) -> None:
    compose = Compose(load([folder / "app/model-compose.yml"]))
    server = compose.config.serving.server
    assert server is not None
    document = create_app(compose, server).openapi()
    operation = document["paths"]["/v1/load_lora_adapter"]["post"]
    refusals = {"400", "403", "404", "408", "409", "413", "421", "500", "503"}
    assert set(operation["responses"]) == {"200", *refusals}
    assert set(operation["responses"]["200"]["content"]) == {"text/plain"}
    body = document["components"]["schemas"]["LoadBody"]
    assert set(body["required"]) == {"lora_name", "lora_path"}
    assert set(body["properties"]) == {"lora_name", "lora_path", "load_inplace", "component"}


@settings(BOUNDED, max_examples=80)
@given(
    name=st.sampled_from(["x", "idle", "strong"]) | TEXTS,
    path=st.sampled_from(["./loose/first", "../outside", "tiny/one", "~", "./base", "/dev/null", "/proc/self/fd/0"])
    | TEXTS.map(lambda text: f"./{text}")
    | ODD,
    more=st.dictionaries(st.sampled_from(["load_inplace", "component", "is_3d_lora_weight"]), ODD, max_size=2),
)
def test_odd_requests_never_fail_inside(url: str, name: str, path: Any, more: Any) -> None:
    for route, body in (
        ("load", {"lora_name": name, "lora_path": path} | more),
        ("unload", {"lora_name": name, "component": more.get("component")}),
    ):
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{url}/v1/{route}_lora_adapter", content=json.dumps(body), headers=headers, timeout=60)
        assert response.status_code in (200, 400, 403, 404, 409), f"{response.text} for {body}"
        assert response.is_success or response.json()["error"]["message"]
