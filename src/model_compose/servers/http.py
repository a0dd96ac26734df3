"""The workflow API under base_path: runs, tasks, workflows, health. `create_app` also mounts OpenAI's API at /v1."""

import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, FastAPI, Path, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile

from model_compose import __version__
from model_compose.components import Delta
from model_compose.compose import Compose
from model_compose.errors import ComposeError, Conflict, FieldError, InputError
from model_compose.schema import Options
from model_compose.servers import HttpServerOptions
from model_compose.servers.callbacks import Callback, resolve
from model_compose.servers.documents import ERRORS, RunState, body_schema
from model_compose.servers.openai import create_router as create_openai_router
from model_compose.servers.tasks import Task, Tasks
from model_compose.servers.wire import (
    EventStream,
    Guard,
    add_error_handlers,
    body_of,
    error_response,
    event,
    first_of,
    problem,
    watching,
)
from model_compose.workflow import variables
from model_compose.workflow.jobs import WorkflowOptions


class RunBody(Options):
    """A run. `input` holds what the workflow's schema names; everything else is optional."""

    later: ClassVar[Mapping[str, Any]] = {"subscribe_task": False}
    workflow_id: str | None = Field(default=None, description="The default workflow if left out")
    input: Any = Field(
        default=None, description="The workflow's input, usually an object", examples=[{"prompt": "Hello"}]
    )
    blend: str | dict[str, Any] | None = Field(
        default=None, description="A blend's name, {adapter: weight}, or {component: blend}", examples=[{"alpaca": 0.7}]
    )
    stream: bool = Field(default=False, description="Answer as server-sent events: delta, then done or error")
    output_only: bool = Field(default=False, description="Answer with the bare output")
    wait_for_completion: bool = Field(default=True, description="false: answer at once with the task's id")
    session_id: str | None = None
    metadata: dict[str, Any] | None = None
    callback_url: str | None = Field(
        default=None, description="Told when the task ends; needs wait_for_completion=false"
    )
    callback_headers: dict[str, str] | None = None


def create_app(compose: Compose, options: HttpServerOptions) -> FastAPI:
    """The whole HTTP application of one server."""
    app = FastAPI(
        title="model-compose", version=__version__, description="Language models with blended LoRA adapters.",
        docs_url="/docs", redoc_url=None, openapi_url="/openapi.json",
    )  # fmt: skip
    add_error_handlers(app)
    app.state.tasks = tasks = Tasks(compose)
    app.include_router(_create_router(compose, tasks, options), prefix=options.base_path, responses=ERRORS)
    app.include_router(create_openai_router(compose), prefix="/v1")
    health = f"{options.base_path}/health"
    app.add_middleware(Guard, keys=options.api_keys or (), open_paths=(health,), max_body=options.max_body_size)
    if options.origins:  # outermost, so that a browser can read the errors of the guard too
        app.add_middleware(
            CORSMiddleware, allow_origins=options.origins, allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    return app


def _create_router(compose: Compose, tasks: Tasks, options: HttpServerOptions) -> APIRouter:
    router = APIRouter(tags=["workflows"])
    task_id = Annotated[str, Path(description="The id that a run answered with")]

    @router.get("/health", responses={503: {"description": "Loading, with progress"}})
    async def health() -> JSONResponse:
        """Whether models are loaded. Needs no key."""
        if compose.ready:
            return JSONResponse({"status": "ok"})
        progress = compose.progress
        shown = {"what": progress.what, "done": progress.done, "total": progress.total} if progress else None
        return JSONResponse({"status": "loading", "progress": shown}, 503, {"Retry-After": "1"})

    @router.get("/workflows")
    async def workflows(include_schema: Annotated[bool, Query()] = False) -> list[dict[str, Any]]:
        """The workflows that are not private."""
        shown = [workflow for workflow in compose.config.all_workflows if not workflow.private]
        return [_describe(compose, workflow, with_schema=include_schema) for workflow in shown]

    @router.get("/workflows/{workflow_id}/schema")
    async def schema(workflow_id: str) -> dict[str, Any]:
        """A workflow's inputs and outputs."""
        return _describe(compose, compose.config.find_workflow(workflow_id), with_schema=True)

    @router.post(
        "/workflows/runs",
        response_model=RunState,
        response_model_exclude_none=True,
        openapi_extra={"requestBody": body_schema(RunBody)},
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def runs(request: Request) -> Response:
        """Runs a workflow: JSON, multipart/form-data or application/x-www-form-urlencoded."""
        body = await _read_body(request)
        callback = _callback(body, options)
        if callback:
            await resolve(callback.url, allow_private=callback.allow_private)
        compose.check_ready()
        extras = {"session_id": body.session_id, "metadata": body.metadata}
        task = tasks.start(body.workflow_id, body.input, body.blend, extras)
        if not body.wait_for_completion:
            if callback:
                callback.follow(task)
            return JSONResponse({**task.state(), "status": "pending"})
        if body.stream or (body.output_only and _streams(compose, task.workflow_id)):
            events = _raw_events(task, tasks) if body.output_only else _events(task, tasks)
            return EventStream(await first_of(events))
        assert task.work is not None
        async with watching(request, task.work):
            try:
                await task.wait()
            except ComposeError as error:
                return error_response(request, error, task.id)
        return JSONResponse(task.state()["output"] if body.output_only else task.state())

    @router.get("/tasks/{task_id}", response_model=RunState, response_model_exclude_none=True)
    async def task(request: Request, task_id: task_id, output_only: Annotated[bool, Query()] = False) -> Response:
        """A task's state; with output_only the bare output, 202 while it runs."""
        found = tasks.find(task_id)
        if not output_only:
            return JSONResponse(found.state())
        if not found.finished:
            return JSONResponse(found.state(), 202)
        found.raise_error()
        return JSONResponse(found.state()["output"])

    @router.post("/tasks/{task_id}/cancel", response_model=RunState, response_model_exclude_none=True)
    async def cancel(task_id: task_id, wait_for_completion: Annotated[bool, Query()] = True) -> Response:
        """Stops a task; its computation ends within one token. 409 for one that has already ended."""
        found = tasks.find(task_id)
        await tasks.cancel(found)
        return JSONResponse(found.state())

    return router


def _describe(compose: Compose, workflow: WorkflowOptions, *, with_schema: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "workflow_id": workflow.id,
        "name": workflow.name,
        "title": workflow.title,
        "description": workflow.description if with_schema else None,
        "default": (workflow.default or len(compose.config.all_workflows) == 1) or None,
    }
    if with_schema:
        entry["input"] = [variables.describe(variable) for variable in compose.inputs(workflow.id)]
        entry["output"] = [variables.describe(variable) for variable in variables.outputs(workflow)]
    return {key: value for key, value in entry.items() if value is not None}


def _streams(compose: Compose, workflow_id: str) -> bool:
    """Whether the dialect's `streaming: true` stands on an action of the workflow's last jobs."""
    config = compose.config
    return any(compose.streams(job) for job in config.find_workflow(workflow_id).terminal_jobs)


def _callback(body: RunBody, options: HttpServerOptions) -> Callback | None:
    if body.output_only and not body.wait_for_completion:
        raise InputError("output_only needs wait_for_completion=true", field="output_only")
    if body.stream and not body.wait_for_completion:
        raise InputError("stream needs wait_for_completion=true", field="stream")
    if body.callback_url is None:
        return None
    if body.wait_for_completion:
        raise InputError("callback_url needs wait_for_completion=false", field="callback_url")
    headers = body.callback_headers or {}
    return Callback(body.callback_url, headers, options.callback_private_hosts, options.callback_secret)


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
        await _abandon(task, tasks)


async def _raw_events(task: Task, tasks: Tasks) -> AsyncGenerator[str]:
    """The dialect's form: the text alone, a `data:` line for each of its lines."""
    try:
        async for delta in task.deltas():
            yield "".join(f"data: {line}\n" for line in delta.text.split("\n")) + "\n"
    finally:
        await _abandon(task, tasks)


async def _abandon(task: Task, tasks: Tasks) -> None:
    """Nobody reads this task any more."""
    if not task.finished:
        with suppress(Conflict):
            await tasks.cancel(task)


def _show(delta: Delta) -> str:
    return ".".join(map(str, delta.path))


async def _read_body(request: Request) -> RunBody:
    """The run, whatever form it came in. Raises InputError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        data = await body_of(request)
    elif kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        data = await _read_form(request)
    else:
        raise InputError(
            f"Content-Type '{kind}' is not supported; send application/json, multipart/form-data or "
            "application/x-www-form-urlencoded",
            field="Content-Type",
        )
    if not isinstance(data, dict):
        raise InputError('the request body must be an object like {"input": {…}}', field="body")
    try:
        return RunBody.model_validate(data)
    except ValidationError as error:
        fields = [FieldError(".".join(map(str, e["loc"])) or "body", e["msg"]) for e in error.errors()]
        raise InputError("; ".join(f"{f.field}: {f.message}" for f in fields), fields) from None


async def _read_form(request: Request) -> dict[str, Any]:
    """Form keys nest: input[prompt] or input.prompt. Values that start like JSON are read as JSON; files are text."""
    result: dict[str, Any] = {}
    async with request.form() as form:
        for key, value in form.multi_items():
            path = [part for part in re.split(r"[\[\].]+", key) if part]
            if not path:
                raise InputError(f"the form key '{key}' names no field", field="body")
            node = result
            for part in path[:-1]:
                node = node.setdefault(part, {})
                if not isinstance(node, dict):
                    raise InputError(f"the form key '{key}' goes below a plain value", field=key)
            node[path[-1]] = await _form_value(key, value)
    return result


async def _form_value(key: str, value: UploadFile | str) -> Any:
    if isinstance(value, UploadFile):
        try:
            return (await value.read()).decode()
        except UnicodeDecodeError:
            raise InputError(f"the file in '{key}' is not UTF-8 text", field=key) from None
    if value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
