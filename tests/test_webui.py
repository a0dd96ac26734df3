"""The web page in a headless browser: what a person types, presses and reads, and that the calls it shows do the same."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.compose import Compose
from model_compose.loading import load
from model_compose.progress import Progress
from model_compose.servers.http import create_app
from model_compose.servers.serve import address, bind, listening
from model_compose.servers.webui import create_page
from tests import tiny
from tests.waiting import held, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
in_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")

YAML = """\
controller:
  name: Workshop
  adapter: {type: http-server, port: 0, base_path: /api}
workflows:
  - {id: short, title: Short, default: true, description: A few words., job: {output: {generated: "${output}"}}}
  - {id: long, title: Long, job: {action: long}}
  - {id: hidden, title: Hidden, private: true}
component:
  type: model
  task: text-generation
  model: ./base
  precision: float32
  peft_adapters:
    - {type: lora, name: alpaca, model: ./alpaca, weight: 0.7}
    - {type: lora, name: pirate, model: ./pirate, weight: 0.8}
  blends:
    strong: {alpaca: 2.0}
    merged: {method: ties, density: 0.4, weights: {alpaca: 2.0}}
  actions:
    - id: short
      default: true
      text: "Tell: ${input.prompt as text}"
      blend: ${input.blend}
      max_output_length: 24
      min_output_length: 24
      params: {do_sample: false}
    - id: long
      prompt: ${input.prompt as text}
      max_output_length: 60000
      min_output_length: 60000
"""
LOCKED = YAML.replace("base_path: /api", 'base_path: /api, api_keys: ["${env.KEY}"]')


@dataclass(frozen=True)
class Site:
    """A served page, with the loop it runs on."""

    compose: Compose
    page: str
    api: str
    loop: asyncio.AbstractEventLoop


@contextmanager
def served(path: Path, *, load_models: bool = True, env: dict[str, str] | None = None) -> Iterator[Site]:
    """API and page of a file on free ports, in a thread with an event loop of its own."""
    sites: list[Site | BaseException] = []
    ready, stop = threading.Event(), threading.Event()

    @asynccontextmanager
    async def opened() -> AsyncIterator[Site]:
        compose = Compose(load([path], env))
        options = compose.config.serving.server
        assert options is not None
        api, page = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
        try:
            async with (
                listening(create_app(compose, options), api),
                listening(create_page(compose, address(api)), page),
            ):
                if load_models:
                    await compose.load()
                yield Site(compose, str(address(page)), str(address(api)), asyncio.get_running_loop())
        finally:
            await compose.close()

    async def main() -> None:
        async with opened() as site:
            sites.append(site)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            sites.insert(0, error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(120)
    site = sites[0]
    if isinstance(site, BaseException):
        raise RuntimeError("the test server failed") from site
    try:
        yield site
    finally:
        stop.set()
        thread.join(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose context is long enough for a run that takes minutes."""
    folder = tmp_path_factory.mktemp("webui")
    path = tiny.save_project(folder, YAML)
    tiny.save_base(folder / "base", tiny.llama_config(max_position_embeddings=1 << 16))
    return path.parent


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Site]:
    with served(folder / "model-compose.yml") as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    """The open page. No request may leave this machine, and none may fail."""
    yield from _open(browser, site.page)


def _open(browser: Any, url: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    asked: list[str] = []
    broken: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda answer: broken.append(answer.url) if answer.status >= 500 else None)
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert broken == []


def run(page: Any, prompt: str) -> None:
    page.get_by_role("textbox", name="prompt *").fill(prompt)
    page.get_by_role("button", name="Run Workflow").click()


def finished(page: Any, blend: str) -> str:
    """Waits until a run under `blend` has ended. Returns its text."""
    done = page.locator(".mc-done", has_text=f"blend: {blend}")
    done.wait_for()
    return str(done.locator("[data-text]").text_content())


@in_browser
def test_a_run_shows_its_text_blend_speed_and_identity(page: Any, site: Site) -> None:
    playwright.expect(page.get_by_role("heading", name="Workshop")).to_be_visible()
    playwright.expect(page.get_by_role("tab")).to_have_text(["Short", "Long"])
    playwright.expect(page.get_by_text("A few words.")).to_be_visible()
    run(page, "Ahoy")
    text = finished(page, "alpaca 0.7 · pirate 0.8 (default)")
    done = asyncio.run_coroutine_threadsafe(site.compose.answer({"prompt": "Ahoy"}), site.loop).result(30)
    assert text == done.output["generated"]
    facts = page.locator(".mc-done .mc-facts").inner_text()
    notice = page.locator(".mc-done .mc-notice").inner_text()
    assert notice == "The text was cut at max_output_length (24 tokens)."
    assert re.search(r"— 24 tokens, [\d.]+ tok/s — [\d.]+ s — identity [0-9a-f]{8}$", facts)


@in_browser
def test_text_appears_while_it_is_made(page: Any) -> None:
    page.get_by_role("tab", name="Long").click()
    run(page, "Ahoy")
    text = page.locator(".mc-running [data-text]")
    playwright.expect(text).not_to_be_empty()
    before = text.text_content()
    wait_until(lambda: len(text.text_content()) > len(before))
    page.get_by_role("button", name="Stop").click()


@in_browser
def test_sliders_and_numbers_change_the_blend_and_earlier_texts_stay(page: Any) -> None:
    run(page, "Ahoy")
    first = finished(page, "alpaca 0.7 · pirate 0.8 (default)")
    page.get_by_role("slider", name="alpaca").fill("1.5")
    assert page.get_by_label("alpaca weight").input_value() == "1.5"
    assert page.get_by_role("combobox", name="Blend").input_value() == "Custom"
    run(page, "Ahoy")
    second = finished(page, "alpaca 1.5 · pirate 0.8 (custom)")
    page.get_by_label("pirate weight").fill("-3.25")
    assert page.get_by_role("slider", name="pirate").input_value() == "0"
    run(page, "Ahoy")
    third = finished(page, "alpaca 1.5 · pirate -3.25 (custom)")
    assert len({first, second, third}) == 3
    cards = page.locator(".mc-card .mc-text")
    playwright.expect(cards).to_have_count(2)
    assert cards.all_text_contents() == [second, first]


@in_browser
def test_the_picker_sets_the_sliders(page: Any) -> None:
    def choose(name: str) -> None:
        page.get_by_role("combobox", name="Blend").click()
        page.get_by_role("option", name=name, exact=True).click()

    def weights() -> list[str]:
        return [page.get_by_label(f"{name} weight").input_value() for name in ("alpaca", "pirate")]

    choose("strong")
    wait_until(lambda: weights() == ["2", "0"])
    assert page.get_by_role("slider", name="alpaca").input_value() == "2"
    run(page, "Ahoy")
    finished(page, "alpaca 2 (strong)")
    choose("merged (ties)")  # other text under the same numbers
    run(page, "Ahoy")
    finished(page, "alpaca 2 (merged, ties)")
    page.get_by_label("alpaca weight").fill("1.9")
    page.get_by_label("alpaca weight").fill("2")  # typed weights are their sum
    playwright.expect(page.get_by_role("combobox", name="Blend")).to_have_value("strong")
    choose("merged (ties)")
    playwright.expect(page.get_by_role("combobox", name="Blend")).to_have_value("merged (ties)")
    choose("Bare base")
    wait_until(lambda: weights() == ["0", "0"])
    run(page, "Ahoy")
    finished(page, "bare base")
    page.get_by_label("alpaca weight").fill("0.7")
    page.get_by_label("pirate weight").fill("0.8")  # moved back by hand: the picker says what it is
    playwright.expect(page.get_by_role("combobox", name="Blend")).to_have_value("Default (YAML)")


@in_browser
def test_stop_ends_the_computation_and_keeps_the_text(page: Any, site: Site) -> None:
    page.get_by_role("tab", name="Long").click()
    run(page, "Ahoy")
    playwright.expect(page.locator(".mc-running [data-text]")).not_to_be_empty()
    with held(site.compose.models["__component__"].engine):  # so that the run cannot end by itself
        assert site.compose.busy == 1
        page.get_by_role("button", name="Stop").click()
        wait_until(lambda: site.compose.busy == 0)
    stopped = page.locator(".mc-stopped")
    stopped.wait_for()
    assert re.search(r"stopped after [\d.]+ s — blend: alpaca 0.7 · pirate 0.8$", stopped.inner_text())
    assert stopped.locator("[data-text]").text_content()
    playwright.expect(page.get_by_role("button", name="Run Workflow")).to_be_enabled()


@in_browser
def test_closing_the_tab_ends_the_computation(browser: Any, site: Site) -> None:
    with ExitStack() as stack:
        for page in _open(browser, site.page):
            page.get_by_role("tab", name="Long").click()
            run(page, "Ahoy")
            playwright.expect(page.locator(".mc-running [data-text]")).not_to_be_empty()
            stack.enter_context(held(site.compose.models["__component__"].engine))
            assert site.compose.busy == 1
        wait_until(lambda: site.compose.busy == 0)


@in_browser
def test_the_calls_shown_do_what_the_page_did(page: Any) -> None:
    page.get_by_label("pirate weight").fill("-0.5")
    run(page, 'It\'s "so" $HOME\nand ünïcode')
    text = finished(page, "alpaca 0.7 · pirate -0.5 (custom)")
    page.get_by_role("button", name="Do this by API").click()
    curl, python = page.locator(".mc-snippet [data-text]").all_text_contents()
    answer = json.loads(subprocess.check_output(["bash", "-c", curl.replace("curl ", "curl -sS ", 1)]))
    assert answer["output"] == {"generated": text}
    assert answer["blend"]["weights"] == {"alpaca": 0.7, "pirate": -0.5}
    assert subprocess.check_output([sys.executable, "-c", python]).decode() == f"{text}\n"


@in_browser
def test_errors_are_sentences(page: Any) -> None:
    run(page, "  ")
    error = page.get_by_role("alert")
    error.wait_for()
    assert error.inner_text() == "prompt is required (text)"
    page.get_by_label("alpaca weight").fill("")
    run(page, "Ahoy")
    playwright.expect(error).to_have_text("the weight of alpaca is empty; type a number, 0 leaves the adapter out")
    assert "Traceback" not in page.content()


@in_browser
def test_a_message_of_a_conversation_is_typed_as_it_is(browser: Any, folder: Path) -> None:
    path = folder / "chat.yml"
    chat = tiny.YAML.replace("task: text-generation", "task: chat-completion")
    path.write_text(chat.replace("text: ${input.prompt as text}", "messages: ${input.messages}"), encoding="utf-8")
    with served(path) as chat_site:
        for page in _open(browser, chat_site.page):
            box = page.get_by_role("textbox", name="messages *")
            box.fill("What is a haiku?")
            page.get_by_role("button", name="Run Workflow").click()
            text = finished(page, "alpaca 0.7 · pirate 0.8 (default)")
            page.get_by_role("button", name="Do this by API").click()
            curl = page.locator(".mc-snippet [data-text]").first.text_content()
            assert '"messages": [{"role": "user", "content": "What is a haiku?"}]' in curl
            box.fill('[{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "What is a haiku?"}]')
            page.get_by_role("button", name="Run Workflow").click()
            playwright.expect(page.locator(".mc-card .mc-asked")).to_have_text(["What is a haiku?"])
            playwright.expect(page.locator(".mc-done [data-text]").first).not_to_have_text(text)
            box.fill('[{"role": "user", "content": "What is a haiku?"}')
            page.get_by_role("button", name="Run Workflow").click()
            expected = 'messages: expected a list of messages, such as [{"role": "user", "content": "Hello"}]'
            playwright.expect(page.get_by_role("alert")).to_have_text(expected)


@in_browser
def test_behind_a_key_and_while_loading(browser: Any, folder: Path) -> None:
    path = folder / "locked.yml"
    path.write_text(LOCKED, encoding="utf-8")
    with served(path, load_models=False, env={"KEY": "sesame"}) as locked:
        for page in _open(browser, locked.page):
            assert page.url == f"{locked.page}/login"
            page.get_by_label("API key").fill("guess")
            page.get_by_role("button", name="Sign in").click()
            playwright.expect(page.get_by_role("alert")).to_have_text("This key is not known here.")
            page.get_by_label("API key").fill("sesame")
            page.get_by_role("button", name="Sign in").click()
            locked.compose.progress = Progress("base", 43, 100)
            loading = page.get_by_role("status").filter(has_text="Loading… 43 % base")
            loading.wait_for()
            assert page.get_by_role("button", name="Run Workflow").is_disabled()
            asyncio.run_coroutine_threadsafe(locked.compose.load(), locked.loop).result(60)
            playwright.expect(page.get_by_role("button", name="Run Workflow")).to_be_enabled()
            playwright.expect(loading).to_have_count(0)
            run(page, "Ahoy")
            text = finished(page, "alpaca 0.7 · pirate 0.8 (default)")
            page.get_by_role("button", name="Do this by API").click()
            curl, python = page.locator(".mc-snippet [data-text]").all_text_contents()
            assert "sesame" not in page.content()
            secret = {"MODEL_COMPOSE_API_KEY": "sesame", "PATH": "/usr/bin:/bin"}
            answer = json.loads(
                subprocess.check_output(["bash", "-c", curl.replace("curl ", "curl -sS ", 1)], env=secret)
            )
            assert answer["output"] == {"generated": text}
            assert subprocess.check_output([sys.executable, "-c", python], env=secret).decode() == f"{text}\n"


@in_browser
def test_adapters_that_were_loaded_meanwhile_have_sliders(browser: Any, folder: Path) -> None:
    path = folder / "runtime.yml"
    path.write_text(YAML.replace("  blends:\n", "  allow_runtime_adapters: true\n  blends:\n"), encoding="utf-8")
    with served(path) as site:
        for page in _open(browser, site.page):
            slider = page.get_by_label("third weight")
            page.get_by_label("alpaca weight").first.wait_for()
            playwright.expect(slider).to_have_count(0)
            body = {"lora_name": "third", "lora_path": "./pirate"}
            assert httpx.post(f"{site.api}/v1/load_lora_adapter", json=body, timeout=30).status_code == 200
            page.reload()
            slider.first.fill("1.5")
            run(page, "Ahoy")
            finished(page, "alpaca 0.7 · pirate 0.8 · third 1.5")
