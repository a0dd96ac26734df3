"""The web page: a form for each workflow, its text as it is made, and the calls that would do the same.

Runs go through Compose.run in this process; the API's address is only shown. What a run looks like is in webui_runs, the
form in webui_form, the calls in webui_snippets, the login in webui_auth.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp

from model_compose.compose import Compose
from model_compose.errors import ComposeError, InputError
from model_compose.progress import Progress
from model_compose.server_options import DEFAULT_MAX_BODY, WebuiOptions
from model_compose.servers import webui_runs, webui_snippets
from model_compose.servers.guard import Guard, Hosts
from model_compose.servers.webui_auth import ICON, Door
from model_compose.servers.webui_form import Form, draw_form
from model_compose.servers.webui_runs import Run
from model_compose.servers.webui_snippets import Call
from model_compose.workflow.jobs import WorkflowOptions
from model_compose.workflow.runner import Done

log = logging.getLogger(__name__)

TICK_SECONDS = 0.05
"""Text is sent to the browser this often, not token by token."""
IDLE_SECONDS = 0.5
"""A run without new text still reports this often; that is also when gradio notices a closed tab."""
KEPT_RUNS = 8
KEPT_SESSIONS = 200
ASSETS = Path(__file__).parent
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

Key = tuple[str | None, str]
"""The session of an open page, and a workflow on it."""


@dataclass(frozen=True)
class Sessions:
    """What the open pages are running and have run. Not gr.State: it keeps a connection open for as long as a page is,
    and the server would wait for that when it stops."""

    running: dict[Key, "asyncio.Task[Done]"] = field(default_factory=dict)
    earlier: dict[Key, tuple[Run, ...]] = field(default_factory=dict)

    def remember(self, key: Key, run: Run) -> None:
        """Newest first; the pages that were used longest ago are forgotten."""
        self.earlier[key] = (run, *self.earlier.pop(key, ()))[:KEPT_RUNS]
        while len(self.earlier) > KEPT_SESSIONS:
            del self.earlier[next(iter(self.earlier))]


@dataclass(frozen=True)
class Panel:
    """One workflow on the page: what it asks, and where its results go."""

    workflow: WorkflowOptions
    form: Form
    run: gr.Button
    stop: gr.Button
    output: gr.HTML
    earlier: gr.HTML
    api: gr.Accordion
    calls: gr.HTML


def create_page(compose: Compose, api_address: str | None) -> ASGIApp:
    """The page as an application of its own. With api_keys on the server, all of it is behind them."""
    server = compose.config.serving.server
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app, _draw_page(compose, api_address if server else None), path="/", footer_links=[], run_history=False,
        show_error=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, max_file_size=1,
        theme=_theme(), css_paths=[ASSETS / "webui.css"], head=_head(),
    )  # fmt: skip
    keys = server.api_keys if server else None
    page = compose.config.serving.webui or WebuiOptions()
    max_body = server.max_body_size if server else DEFAULT_MAX_BODY
    return Guard(Door(app, keys, _title(compose)) if keys else app, Hosts(page.host, page.allowed_hosts), max_body)


def _draw_page(compose: Compose, api_address: str | None) -> gr.Blocks:
    workflows = [workflow for workflow in compose.config.all_workflows if not workflow.private]
    sessions = Sessions()
    page = gr.Blocks(title=_title(compose), analytics_enabled=False)
    with page:
        _html(f'<h1 class="mc-title">{escape(_title(compose))}</h1>')
        if any(model.options.allow_runtime_adapters for model in compose.models.values()):
            # Adapters come and go, so whoever opens the page gets the sliders of that moment.
            @gr.render(triggers=[page.load], queue=False, show_progress="hidden")  # type: ignore[untyped-decorator]
            def draw() -> None:
                _draw_panels(compose, workflows, api_address, sessions)
        else:
            look, watched = _draw_panels(compose, workflows, api_address, sessions)
            page.load(look, outputs=watched, queue=False, **QUIET)
    return page


def _draw_panels(
    compose: Compose, workflows: Sequence[WorkflowOptions], api_address: str | None, sessions: Sessions
) -> tuple[Callable[[], list[Any]], list[Any]]:
    """What tells whether the models are loaded, and what it changes."""
    loading = _html("" if compose.ready else _loading(compose.progress), visible=not compose.ready)
    if len(workflows) == 1:
        panels = [_draw_panel(compose, workflows[0], api_address, sessions)]
    else:
        panels = []
        with gr.Tabs(elem_classes="mc-tabs"):
            for workflow in workflows:
                with gr.Tab(_name(workflow) or workflow.id):
                    panels.append(_draw_panel(compose, workflow, api_address, sessions))
    timer = gr.Timer(1.0, active=not compose.ready)

    def look() -> list[Any]:
        """Whether the models are loaded; until then the page asks once a second."""
        ready = compose.ready
        shown = "" if ready else _loading(compose.progress)
        buttons = [gr.Button(interactive=ready) for _ in panels]
        return [gr.HTML(shown, visible=not ready), gr.Timer(active=not ready), *buttons]

    watched = [loading, timer, *(panel.run for panel in panels)]
    timer.tick(look, outputs=watched, queue=False, **QUIET)
    return look, watched


def _draw_panel(compose: Compose, workflow: WorkflowOptions, api_address: str | None, sessions: Sessions) -> Panel:
    if workflow.description:
        gr.Markdown(workflow.description, elem_classes="mc-description")
    with gr.Row(elem_classes="mc-columns"):
        with gr.Column(scale=5, min_width=320, elem_classes="mc-form"):
            form = draw_form(compose, workflow)
            with gr.Row(elem_classes="mc-buttons"):
                run = gr.Button("Run Workflow", variant="primary", scale=3, min_width=0, interactive=compose.ready)
                stop = gr.Button("Stop", interactive=False, scale=1, min_width=0)
        with gr.Column(scale=7, min_width=320):
            output = _html(webui_runs.NOTHING)
            with gr.Accordion("Do this by API", open=False, visible=False, elem_classes="mc-api") as api:
                calls = _html()
            earlier = _html()
    panel = Panel(workflow, form, run, stop, output, earlier, api, calls)
    _connect(compose, panel, api_address, sessions)
    return panel


def _connect(compose: Compose, panel: Panel, api_address: str | None, sessions: Sessions) -> None:
    async def start(request: gr.Request, *values: Any) -> AsyncGenerator[dict[Any, Any]]:
        """One run: its state of affairs every TICK_SECONDS, then how it ended."""
        key = (request.session_hash, panel.workflow.id)
        yield {panel.run: gr.Button(interactive=False), panel.stop: gr.Button(interactive=True),
               panel.earlier: webui_runs.earlier(sessions.earlier.get(key, ()))}  # fmt: skip
        run, call = Run(""), None
        async with aclosing(_runs(compose, panel, values, key, sessions)) as states:
            async for state in states:
                run, call = state
                yield {panel.output: webui_runs.current(run)}
        if run.texts:  # what failed at once is nothing to compare
            sessions.remember(key, run)
        yield {panel.run: gr.Button(interactive=True), panel.stop: gr.Button(interactive=False)}
        shown = _calls(compose, api_address, call) if call and api_address else ""
        yield {panel.calls: shown, panel.api: gr.Accordion(visible=bool(shown))}

    def stop(request: gr.Request) -> None:
        """Ends the computation; what there is of the text stays."""
        if work := sessions.running.get((request.session_hash, panel.workflow.id)):
            work.cancel()

    prompts = [field.widget.submit for field in panel.form.fields if isinstance(field.widget, gr.Textbox)]
    gr.on(
        [panel.run.click, *prompts], start, inputs=panel.form.widgets,
        outputs=[panel.output, panel.earlier, panel.calls, panel.api, panel.run, panel.stop],
        concurrency_limit=None, trigger_mode="once", **QUIET,
    )  # fmt: skip
    panel.stop.click(stop, queue=False, **QUIET)


async def _runs(
    compose: Compose, panel: Panel, values: Sequence[Any], key: Key, sessions: Sessions
) -> AsyncGenerator[tuple[Run, Call | None]]:
    """Runs the workflow and tells how it stands, at last how it ended. Closing it stops the computation."""
    texts: dict[str, str] = {}
    started = shown = time.monotonic()
    input = panel.form.read_input(values)
    run = Run(webui_runs.asked(input))
    yield run, None
    work = asyncio.create_task(_follow(compose, panel, input, values, texts))
    sessions.running[key] = work
    try:
        while not work.done():
            await asyncio.wait([work], timeout=TICK_SECONDS)
            now = time.monotonic()
            if texts != run.texts or now - shown >= IDLE_SECONDS:
                shown, run = now, replace(run, texts=dict(texts), seconds=now - started)
                yield run, None
        run = replace(run, texts=dict(texts), seconds=time.monotonic() - started)
        yield _ended(run, work, panel, input, values)
    finally:
        sessions.running.pop(key, None)
        work.cancel()
        await asyncio.wait([work])


async def _follow(compose: Compose, panel: Panel, input: Any, values: Sequence[Any], texts: dict[str, str]) -> Done:
    """Collects the deltas into `texts`, by label, as they come."""
    blend = panel.form.read_blend(values)
    async with aclosing(compose.run(input, workflow=panel.workflow.id, blend=blend)) as events:
        async for event in events:
            if isinstance(event, Done):
                return event
            label = webui_runs.label(event.path)
            texts[label] = texts.get(label, "") + event.text
    raise AssertionError("a run ends with Done")


def _ended(
    run: Run, work: "asyncio.Task[Done]", panel: Panel, input: Any, values: Sequence[Any]
) -> tuple[Run, Call | None]:
    workflow = panel.workflow
    if work.cancelled():
        return replace(run, status="stopped", mixed=panel.form.mixed(values)), None
    error = work.exception()
    if error is None:
        done = work.result()
        texts = webui_runs.texts(done.output)
        for note in done.notes:
            log.info("workflow '%s': %s", workflow.id, note)
        run = replace(run, status="done", texts=texts, answers=done.answers, notes=done.notes)
        return run, Call(workflow, input, done.answers)
    if not isinstance(error, ComposeError):
        log.error("workflow '%s' failed", workflow.id, exc_info=error)
        return replace(run, status="failed", error="The run failed; the server's log has the details."), None
    if error.status >= 500:
        log.error("workflow '%s': %s", workflow.id, error, exc_info=error.__cause__)
    message = str(error)
    if isinstance(error, InputError) and error.fields:  # on a form a field is called by its label
        message = "; ".join(field.message.removeprefix("input.") for field in error.fields)
    return replace(run, status="failed", error=message), None


def _calls(compose: Compose, api_address: str, call: Call) -> str:
    by_client = webui_snippets.openai(compose, api_address, call)
    python = (
        webui_runs.snippet("Python, with the openai package", by_client)
        if by_client
        else '<p class="mc-note">The OpenAI API asks one model once; this run took more than that.</p>'
    )
    return webui_runs.snippet("curl", webui_snippets.curl(compose, api_address, call)) + python


def _html(value: str = "", *, visible: bool = True) -> gr.HTML:
    """HTML that webui.css styles alone."""
    return gr.HTML(value, visible=visible, apply_default_css=False, padding=False, elem_classes="mc-html")


def _loading(progress: Progress | None) -> str:
    """How far the loading is, with a bar where that is known."""
    what = progress.what if progress else "shutting down"
    percent, bar = "", ""
    if progress and progress.total:
        share = 100 * progress.done / progress.total
        percent, bar = f" {share:.0f} %", f'<progress max="100" value="{share:.0f}"></progress>'
    return f'<div class="mc-loading" role="status"><p>Loading…{percent} <span>{escape(what)}</span></p>{bar}</div>'


def _title(compose: Compose) -> str:
    workflows = [workflow for workflow in compose.config.all_workflows if not workflow.private]
    alone = _name(workflows[0]) if len(workflows) == 1 else None
    return alone or compose.config.serving.name or "model-compose"


def _name(workflow: WorkflowOptions) -> str | None:
    """What people call the workflow; None where the file gives it no name at all."""
    return workflow.title or workflow.name or (None if workflow.id.startswith("__") else workflow.id)


def _theme() -> gr.themes.Base:
    """System fonts: the page asks no other host for anything."""
    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    theme = gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", font=sans, font_mono=mono, radius_size="md")
    return theme.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        input_background_fill="white", input_background_fill_dark="*neutral_900",
        input_border_width="1px", input_border_color="*neutral_300", input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500", input_border_color_focus_dark="*primary_400",
        input_placeholder_color="*neutral_500", input_radius="*radius_md",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_500",
    )  # fmt: skip


def _head() -> str:
    return f"{ICON}<script>{(ASSETS / 'webui.js').read_text(encoding='utf-8')}</script>"
