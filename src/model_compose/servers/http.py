"""The workflow API under base_path: runs, tasks, workflows, health. `create_app` adds OpenAI's API at /v1, and /metrics."""

import json
import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, FastAPI, Path, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile

from model_compose import __version__
from model_compose.components import Delta
from model_compose.components.model_actions import SamplingOverrides
from model_compose.compose import Compose
from model_compose.errors import ComposeError, InputError
from model_compose.expressions import strict_json
from model_compose.metrics import MEDIA_TYPE
from model_compose.schema import LONGEST_NAME, Options
from model_compose.server_options import HttpServerOptions
from model_compose.servers.access import REQUEST_ID
from model_compose.servers.answers import Health, RunState, VariableInfo, WorkflowInfo, shown
from model_compose.servers.callbacks import Callback
from model_compose.servers.documents import (
    RUN_STREAM,
    Responses,
    add_documents,
    add_index,
    answers,
    body_schema,
    problems,
)
from model_compose.servers.guard import Guard, Hosts, Keys
from model_compose.servers.openai import ChatBody, CompletionBody
from model_compose.servers.openai import create_router as create_openai_router
from model_compose.servers.runtime_adapters import LoadBody, UnloadBody
from model_compose.servers.runtime_adapters import create_router as create_adapters_router
from model_compose.servers.tasks import Task, Tasks
from model_compose.servers.wire import (
    add_error_handlers,
    attended,
    beside,
    content_type,
    error_response,
    event,
    parse_body,
    problem,
    read_body,
    start_stream,
)
from model_compose.workflow import variables
from model_compose.workflow.jobs import WorkflowOptions

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

LARGEST = {"session_id": 1 << 10, "metadata": 64 << 10, "callback_url": 8 << 10, "callback_headers": 16 << 10}
"""The largest size, in bytes, of what is kept or sent on of a request besides its input."""

DEEPEST_KEY = 32
"""The most parts of a form's key."""


class RunBody(Options):
    """A run. `input` holds what the workflow's schema names; everything else is optional."""

    later: ClassVar[Mapping[str, Any]] = {"subscribe_task": False}
    workflow_id: str | None = Field(
        default=None, max_length=LONGEST_NAME, description="The default workflow if left out"
    )
    input: Any = Field(
        default=None,
        description="The workflow's input, usually an object; keys that nothing reads are refused",
        examples=[{"prompt": "Hello"}],
    )
    blend: str | dict[str, Any] | None = Field(
        default=None, description="A blend's name, {adapter: weight}, or {component: blend}", examples=[{"alpaca": 0.7}]
    )
    sampling: SamplingOverrides | None = Field(
        default=None,
        description="In place of what the file says, for every model of the workflow: temperature, max_output_length, seed",
        examples=[{"temperature": 0}],
    )
    stream: bool = Field(default=False, description="Answer as server-sent events: delta, then done or error")
    output_only: bool = Field(default=False, description="Answer with the bare output")
    wait_for_completion: bool = Field(default=True, description="false: answer at once with the task's id")
    session_id: str | None = Field(default=None, description="Shown in the task's state; at most 1 KiB")
    metadata: dict[str, Any] | None = Field(
        default=None, description="Shown in the task's state; at most 64 KiB of JSON"
    )
    callback_url: str | None = Field(
        default=None, description="Gets a POST when the task ends; needs wait_for_completion=false"
    )
    callback_headers: dict[str, str] | None = Field(default=None, description="At most 16 KiB in all")

    def check(self) -> None:
        """Raises InputError for fields that are too large, or contradict each other."""
        for name, largest in LARGEST.items():
            if (size := _size(getattr(self, name))) > largest:
                raise InputError(f"{name} has {size} bytes, and it may have at most {largest}", field=name)
        for name in ("stream", "output_only"):
            if getattr(self, name) and not self.wait_for_completion:
                raise InputError(f"{name} needs wait_for_completion=true", field=name)
        if self.callback_url is not None and self.wait_for_completion:
            raise InputError("callback_url needs wait_for_completion=false", field="callback_url")
        if self.callback_headers and self.callback_url is None:
            raise InputError("callback_headers needs callback_url", field="callback_headers")


def _size(value: Any) -> int:
    """The size in bytes as JSON; of a text, without its quotes."""
    if value is None:
        return 0
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return len(text.encode(errors="surrogatepass"))


def create_app(compose: Compose, options: HttpServerOptions, page: str | None = None) -> FastAPI:
    """The whole HTTP application of one server. page: the web page's address."""
    app = FastAPI(
        title="model-compose", version=__version__, description="Language models with blended LoRA adapters.",
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    add_error_handlers(app)
    app.include_router(
        _create_router(compose, Tasks(compose, options.max_tasks_size), options), prefix=options.base_path
    )
    app.include_router(create_openai_router(compose), prefix="/v1")
    app.include_router(create_adapters_router(compose), prefix="/v1")
    _add_metrics(app, compose)
    health = f"{options.base_path}/health"
    links = {
        "docs": "/docs", "openapi": "/openapi.json", "health": health, "workflows": f"{options.base_path}/workflows",
        "models": "/v1/models", "metrics": "/metrics",
    }  # fmt: skip
    add_index(app, links if page is None else {**links, "page": page})
    bodies = (RunBody, CompletionBody, ChatBody, LoadBody, UnloadBody)
    add_documents(app, bodies=bodies, open_path=health, with_keys=bool(options.api_keys))
    app.add_middleware(
        Guard, hosts=Hosts(options.host, options.allowed_hosts), max_body=options.max_body_size,
        keys=Keys(options.api_keys) if options.api_keys else None, open_paths=(health,), origins=options.origins,
    )  # fmt: skip
    if options.origins:  # the outermost one, so that browsers can read the guard's errors too
        app.add_middleware(
            CORSMiddleware, allow_origins=options.origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=[REQUEST_ID], max_age=600,
        )  # fmt: skip
    return app


def _add_metrics(app: FastAPI, compose: Compose) -> None:
    described: Responses = {200: {"description": "Prometheus' text format"}}

    @app.get("/metrics", tags=["metrics"], response_class=PlainTextResponse, responses=described)
    def metrics() -> Response:  # not async, so FastAPI writes the text in a thread, beside the event loop
        """Requests, tokens, latencies and the engines' state, for Prometheus, under the names of vLLM."""
        return Response(compose.metrics.text(), media_type=MEDIA_TYPE)


def _create_router(compose: Compose, tasks: Tasks, options: HttpServerOptions) -> APIRouter:
    router = APIRouter(tags=["workflows"])
    TaskId = Annotated[str, Path(description="The id that a run answered with")]

    @router.get("/health", responses={200: {"model": Health}, 503: {"model": Health, "description": "Not yet ready"}})
    async def health() -> JSONResponse:
        """Whether the models are loaded. Needs no key."""
        state = Health.of(compose)
        later = {"Retry-After": "1"} if state.status == "loading" else None
        return JSONResponse(shown(state), 200 if state.status == "ok" else 503, later)

    @router.get("/workflows", responses={200: {"model": list[WorkflowInfo]}, **problems(400)})
    async def workflows(include_schema: Annotated[bool, Query()] = False) -> JSONResponse:
        """The workflows that are not private."""
        public = [workflow for workflow in compose.config.all_workflows if not workflow.private]
        return JSONResponse([_describe(compose, workflow, with_schema=include_schema) for workflow in public])

    @router.get("/workflows/{workflow_id}/schema", responses={200: {"model": WorkflowInfo}, **problems(404)})
    async def schema(workflow_id: str) -> JSONResponse:
        """A workflow's inputs and outputs."""
        return JSONResponse(_describe(compose, compose.config.find_workflow(workflow_id), with_schema=True))

    @router.post(
        "/workflows/runs",
        openapi_extra={"requestBody": body_schema(RunBody, "application/json", *FORMS)},
        responses={200: answers(RunState, RUN_STREAM), **problems(400, 403, 404, 409, 413, 429, 500, 503)},
    )
    async def runs(request: Request) -> Response:
        """Runs a workflow. Forms nest their keys: input[prompt] or input.prompt; files are read as text."""
        body, size = await _read_body(request, options.max_body_size)
        callback = None
        if body.callback_url is not None:
            headers = body.callback_headers or {}
            callback = Callback(body.callback_url, headers, options.callback_private_hosts, options.callback_secret)
            compose.check_ready()  # before the host is looked up, and again afterwards, as that may take long
            await callback.check()
        compose.check_ready()
        prepared = compose.prepare(body.input, workflow=body.workflow_id, blend=body.blend, sampling=body.sampling)
        raw = body.output_only and (body.stream or prepared.graph.streams)
        extras = {"session_id": body.session_id, "metadata": body.metadata}
        streaming = raw or body.stream
        task = tasks.start(prepared, extras, streaming=streaming, size=size)
        if not body.wait_for_completion:
            if callback:
                task.follow(callback.send_when_done(task))
            return JSONResponse(task.state())
        try:
            if streaming:
                events = _raw_events(task, tasks) if raw else _events(task, tasks)
                return await start_stream(request, events)
            async with attended(request):
                try:
                    await task.wait()
                finally:
                    await tasks.abandon(task)
        except ComposeError as error:
            return error_response(request, error, task.id)
        return JSONResponse(task.state()["output"]) if body.output_only else _state_of(task)

    @router.get(
        "/tasks/{task_id}",
        responses={
            200: answers(RunState),
            202: {"model": RunState, "description": "Still running"},
            **problems(400, 404, 409, 500, 503),
        },
    )
    async def task(request: Request, task_id: TaskId, output_only: Annotated[bool, Query()] = False) -> Response:
        """A task's state; with output_only the bare output, 202 while it runs, and its error once it has failed."""
        found = tasks.find(task_id)
        if not output_only:
            return _state_of(found)
        if not found.finished:
            return JSONResponse(found.state(), 202)
        if found.error:
            return error_response(request, found.error, found.id)
        return JSONResponse(found.state()["output"])

    @router.post("/tasks/{task_id}/cancel", responses={200: {"model": RunState}, **problems(400, 403, 404, 409)})
    async def cancel(task_id: TaskId, wait_for_completion: Annotated[bool, Query()] = True) -> JSONResponse:
        """Stops a task; its computation ends within one token. 409 for one that has already ended."""
        found = tasks.find(task_id)
        await tasks.cancel(found, wait=wait_for_completion)
        return JSONResponse(found.state())

    return router


def _describe(compose: Compose, workflow: WorkflowOptions, *, with_schema: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": workflow.name,
        "title": workflow.title,
        "description": workflow.description if with_schema else None,
        "default": (workflow.default or len(compose.config.all_workflows) == 1) or None,
    }
    if with_schema:
        fields["input"] = [VariableInfo.of(variable) for variable in compose.inputs(workflow.id)]
        fields["output"] = [VariableInfo.of(variable) for variable in variables.outputs(workflow)]
    given = {key: value for key, value in fields.items() if value is not None}
    return shown(WorkflowInfo(workflow_id=workflow.id, **given))


def _state_of(task: Task) -> Response:
    """The task's state."""
    return Response(task.document, media_type="application/json") if task.finished else JSONResponse(task.state())


async def _events(task: Task, tasks: Tasks) -> AsyncGenerator[str]:
    """`delta` events, then `done` with the ordinary response, or `error` with the problem."""
    started = False
    try:
        async for delta in task.deltas():
            started = True
            yield event({"path": _show(delta), "text": delta.text}, "delta")
        yield event(task.state(), "done")
    except ComposeError as error:
        if not started:
            raise
        yield event(problem(error, task.id), "error")
    finally:
        await tasks.abandon(task)


async def _raw_events(task: Task, tasks: Tasks) -> AsyncGenerator[str]:
    """The dialect's stream: only the text, one `data:` line for each of its lines. An error ends the connection."""
    try:
        async for delta in task.deltas():
            yield "".join(f"data: {line}\n" for line in re.split(r"\r\n|\r|\n", delta.text)) + "\n"
    finally:
        await tasks.abandon(task)


def _show(delta: Delta) -> str:
    return ".".join(map(str, delta.path))


async def _read_body(request: Request, largest: int) -> tuple[RunBody, int]:
    """The run that a request's body holds, as JSON or a form, and the body's size in bytes. Raises InputError."""
    kind = content_type(request)
    if kind == "application/json":
        body, size = await read_body(RunBody, request), len(await request.body())
    elif kind in FORMS:
        body, size = await _read_form(request, largest)
    else:
        raise InputError(
            f"Content-Type '{kind[:64]}' is not supported; send application/json, {' or '.join(FORMS)}",
            field="Content-Type",
        )
    body.check()
    return body, size


async def _read_form(request: Request, largest: int) -> tuple[RunBody, int]:
    """A form's keys nest: input[prompt] or input.prompt. Values that start like JSON are read as JSON; files are text."""
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise InputError("a form must be UTF-8; leave 'charset' out", field="Content-Type")
    async with request.form(max_part_size=largest) as form:
        fields = [(key, await _form_text(key, value)) for key, value in form.multi_items()]
    size = sum(len(key) + len(value.encode()) for key, value in fields)
    return await beside(lambda: parse_body(RunBody, _nested(fields)), size), size


async def _form_text(key: str, value: UploadFile | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return (await value.read()).decode()
    except UnicodeDecodeError:
        raise InputError(f"the file in '{key}' is not UTF-8 text", field=key) from None


def _nested(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in fields:
        path = [part for part in re.split(r"[\[\].]+", key) if part]
        if not path:
            raise InputError(f"the form key '{key}' names no field", field="body")
        if len(path) > DEEPEST_KEY:
            raise InputError(f"a form key has {len(path)} parts, and it may have at most {DEEPEST_KEY}", field="body")
        node = result
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise InputError(f"the form key '{key}' goes below a plain value", field=key)
        if path[-1] in node:
            raise InputError(f"the form gives '{'.'.join(path)}' a second time", field=key)
        node[path[-1]] = _form_value(value)
    return result


def _form_value(value: str) -> Any:
    if value[:1] in ("{", "["):
        try:
            return strict_json(value)
        except ValueError:
            return value  # a prompt may well start with a bracket
    return value
