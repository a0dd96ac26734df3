"""The page in a headless browser: a served site, and a page on it that asks no other host and raises no error."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from model_compose.compose import Compose
from model_compose.loading import load
from model_compose.servers.http import create_app
from model_compose.servers.serve import address, bind, listening
from model_compose.servers.webui import create_page
from tests import tiny

CHROMIUM = Path("/usr/bin/chromium")
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
CHAIN = """\
controller:
  adapter: {type: http-server, port: 0, base_path: /api}
workflow:
  jobs:
    - {id: draft, component: writer}
    - id: final
      component: editor
      depends_on: [draft]
      input: {draft: "${jobs.draft.output}", hints: "${input.how.hints as json}"}
  output: {draft: "${jobs.draft.output}", final: "${jobs.final.output}"}
components:
  - id: writer
    type: model
    task: text-generation
    model: ./base
    precision: float32
    peft_adapters: [{type: lora, name: alpaca, model: ./alpaca, weight: -0.5}]
    action:
      prompt: ${input.prompt as text}
      blend: ${input.blend}
      max_output_length: ${input.length as integer | 5}
      params: {temperature: "${input.heat as slider/0,2,0.1 | 0.5}", do_sample: "${input.draw as boolean | false}"}
  - id: editor
    type: model
    task: chat-completion
    model: ./base
    precision: float32
    peft_adapters: [{type: lora, name: pirate, model: ./pirate}]
    blends: {loud: {pirate: 2}}
    action:
      messages: [{role: system, content: "${input.hints}"}, {role: user, content: "${input.draft}"}]
      blend: loud
      max_output_length: 5
"""


@dataclass(frozen=True)
class Site:
    """A served page, with the loop it runs on."""

    compose: Compose
    page: str
    api: str
    loop: asyncio.AbstractEventLoop

    def answer(self, input: Any, **said: Any) -> Any:
        """The output of a run that goes past the page."""
        run = self.compose.answer(input, **said)
        return asyncio.run_coroutine_threadsafe(run, self.loop).result(60).output


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose context is long enough for a run that takes minutes."""
    folder = tmp_path_factory.mktemp("webui")
    path = tiny.save_project(folder, YAML)
    tiny.save_base(folder / "base", tiny.llama_config(max_position_embeddings=1 << 16))
    return path.parent


@pytest.fixture(scope="session")
def site(folder: Path) -> Iterator[Site]:
    with served(folder / "model-compose.yml") as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For one file of tests: while it is open, no other event loop can run in this thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield opened
        opened.close()


@contextmanager
def browsing(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A browser of its own (storage, clipboard) on the page. No request may leave this machine, and none may fail."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(60_000)
    asked: list[str] = []
    broken: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("response", lambda answer: broken.append(answer.url) if answer.status == 500 else None)
    context.on("weberror", lambda error: broken.append(str(error.error)))
    context.on("console", lambda said: broken.append(said.text) if "Content Security Policy" in said.text else None)
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    assert broken == []


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    with browsing(browser, site.page) as opened:
        ready(opened)
        yield opened


def ready(page: Any) -> None:
    """Waits until the page knows that the models are loaded: before that, Enter runs nothing."""
    page.locator(".primary[aria-disabled=false]").first.wait_for()


def run(page: Any, prompt: str) -> None:
    page.get_by_role("textbox", name="prompt").fill(prompt)
    page.get_by_role("button", name="Run", exact=True).click()


def finished(page: Any, blend: str) -> str:
    """Waits until the newest run has ended, under `blend`. Returns its text."""
    done = page.locator(".stage .done", has_text=f"blend {blend}")
    done.wait_for()
    return str(done.locator(".text").text_content())


def show_calls(page: Any) -> list[str]:
    """Opens the calls of the newest run. Returns them."""
    page.get_by_text("Do this by API").click()
    return [str(code) for code in page.locator(".calls:visible code").all_text_contents()]
