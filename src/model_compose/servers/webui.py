"""The web page: a form for each workflow, its text as it is made, and the calls that would do the same.

Runs go through Compose.run in this process; the API's address is only shown. What a run looks like is in webui_runs, the
form in webui_form, the calls in webui_snippets, the login in webui_auth.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.types import ASGIApp

from model_compose.compose import Compose
from model_compose.errors import ComposeError, InputError
from model_compose.progress import Progress
from model_compose.servers import webui_runs, webui_snippets
from model_compose.servers.webui_auth import Door
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
ASSETS = Path(__file__).parent
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

Key = tuple[str | None, str]
"""The session of an open page, and a workflow on it."""
Running = dict[Key, "asyncio.Task[Done]"]


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
    history: gr.State


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
    return Door(app, keys, _title(compose)) if keys else app


def _draw_page(compose: Compose, api_address: str | None) -> gr.Blocks:
    workflows = [workflow for workflow in compose.config.all_workflows if not workflow.private]
    running: Running = {}
    with gr.Blocks(title=_title(compose), analytics_enabled=False) as page:
        gr.HTML(f'<h1 class="mc-title">{escape(_title(compose))}</h1>')
        loading = gr.HTML(visible=False)
        if len(workflows) == 1:
            panels = [_draw_panel(compose, workflows[0], api_address, running)]
        else:
            panels = []
            with gr.Tabs(elem_classes="mc-tabs"):
                for workflow in workflows:
                    with gr.Tab(_name(workflow) or workflow.id):
                        panels.append(_draw_panel(compose, workflow, api_address, running))
        timer = gr.Timer(1.0, active=False)

        def look() -> list[Any]:
            """Whether the models are loaded; until then the page asks once a second."""
            ready = compose.ready
            shown = "" if ready else _loading(compose.progress)
            buttons = [gr.Button(interactive=ready) for _ in panels]
            return [gr.HTML(shown, visible=not ready), gr.Timer(active=not ready), *buttons]

        watched = [loading, timer, *(panel.run for panel in panels)]
        page.load(look, outputs=watched, queue=False, **QUIET)
        timer.tick(look, outputs=watched, queue=False, **QUIET)
    return page


def _draw_panel(compose: Compose, workflow: WorkflowOptions, api_address: str | None, running: Running) -> Panel:
    if workflow.description:
        gr.Markdown(workflow.description, elem_classes="mc-description")
    with gr.Row(elem_classes="mc-columns"):
        with gr.Column(scale=5, min_width=320):
            form = draw_form(compose, workflow)
            with gr.Row(elem_classes="mc-buttons"):
                run = gr.Button("Run Workflow", variant="primary", scale=3, min_width=0)
                stop = gr.Button("Stop", interactive=False, scale=1, min_width=0)
        with gr.Column(scale=7, min_width=320):
            output = gr.HTML(webui_runs.NOTHING, elem_classes="mc-output")
            with gr.Accordion("Do this by API", open=False, visible=False, elem_classes="mc-api") as api:
                calls = gr.HTML()
            earlier = gr.HTML()
    panel = Panel(workflow, form, run, stop, output, earlier, api, calls, gr.State(()))
    _connect(compose, panel, api_address, running)
    return panel


def _connect(compose: Compose, panel: Panel, api_address: str | None, running: Running) -> None:
    async def start(request: gr.Request, history: tuple[Run, ...], *values: Any) -> AsyncGenerator[dict[Any, Any]]:
        """One run: its state of affairs every TICK_SECONDS, then how it ended."""
        key = (request.session_hash, panel.workflow.id)
        yield {panel.run: gr.Button(interactive=False), panel.stop: gr.Button(interactive=True),
               panel.earlier: webui_runs.earlier(history)}  # fmt: skip
        run, call = Run(""), None
        async with aclosing(_runs(compose, panel, values, key, running)) as states:
            async for run, call in states:
                yield {panel.output: webui_runs.current(run)}
        yield {
            panel.run: gr.Button(interactive=True), panel.stop: gr.Button(interactive=False),
            panel.history: (run, *history)[:KEPT_RUNS],
            panel.calls: _calls(compose, api_address, call) if call and api_address else gr.skip(),
            panel.api: gr.Accordion(visible=True) if call and api_address else gr.skip(),
        }  # fmt: skip

    def stop(request: gr.Request) -> None:
        """Ends the computation; what there is of the text stays."""
        if work := running.get((request.session_hash, panel.workflow.id)):
            work.cancel()

    prompts = [field.widget.submit for field in panel.form.fields if isinstance(field.widget, gr.Textbox)]
    gr.on(
        [panel.run.click, *prompts], start, inputs=[panel.history, *panel.form.widgets],
        outputs=[panel.output, panel.earlier, panel.history, panel.calls, panel.api, panel.run, panel.stop],
        concurrency_limit=None, trigger_mode="once", **QUIET,
    )  # fmt: skip
    panel.stop.click(stop, queue=False, **QUIET)


async def _runs(
    compose: Compose, panel: Panel, values: Sequence[Any], key: Key, running: Running
) -> AsyncGenerator[tuple[Run, Call | None]]:
    """Runs the workflow and tells how it stands, at last how it ended. Closing it stops the computation."""
    texts: dict[str, str] = {}
    started = shown = time.monotonic()
    input = panel.form.read_input(values)
    run = Run(webui_runs.asked(input))
    yield run, None
    work = asyncio.create_task(_follow(compose, panel, input, values, texts))
    running[key] = work
    try:
        while not work.done():
            await asyncio.wait([work], timeout=TICK_SECONDS)
            now = time.monotonic()
            if texts != run.texts or now - shown >= IDLE_SECONDS:
                shown, run = now, replace(run, texts=dict(texts), seconds=now - started)
                yield run, None
        run = replace(run, texts=dict(texts), seconds=time.monotonic() - started)
        yield _ended(run, work, panel.workflow, input)
    finally:
        running.pop(key, None)
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


def _ended(run: Run, work: "asyncio.Task[Done]", workflow: WorkflowOptions, input: Any) -> tuple[Run, Call | None]:
    if work.cancelled():
        return replace(run, status="stopped"), None
    error = work.exception()
    if error is None:
        done = work.result()
        texts = webui_runs.texts(done.output)
        return replace(run, status="done", texts=texts, answers=done.answers), Call(workflow, input, done.answers)
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


def _loading(progress: Progress | None) -> str:
    """ "Loading… 43 %", with a bar."""
    what = progress.what if progress else "shutting down"
    share = 100 * progress.done / progress.total if progress and progress.total else None
    percent, value = ("", "") if share is None else (f" {share:.0f} %", f' value="{share:.0f}"')
    return (
        f'<div class="mc-loading" role="status"><p>Loading…{percent} <span>{escape(what)}</span></p>'
        f'<progress max="100"{value}></progress></div>'
    )


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
    return gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", font=sans, font_mono=mono, radius_size="md")


def _head() -> str:
    return f"<script>{(ASSETS / 'webui.js').read_text(encoding='utf-8')}</script>"
