"""Runs for the page: what the browser posts, and the run as server-sent events. A browser that leaves ends its run."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import Field

from model_compose.components import Delta
from model_compose.components.model_actions import SamplingOverrides
from model_compose.compose import Compose
from model_compose.errors import ComposeError, RunError
from model_compose.schema import Options
from model_compose.servers.tasks import usage_and_blend
from model_compose.servers.webui import form, snippets
from model_compose.servers.wire import event, problem
from model_compose.workflow.runner import Done

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
HEARTBEAT = ": still running\n\n"
"""A comment, which readers of events skip. Proxies close a connection on which nothing comes for long."""


class RunBody(Options):
    """What the page posts. values: what was typed, by the fields' names."""

    workflow: str
    values: dict[str, Any] = Field(default_factory=dict)
    blend: str | dict[str, Any] | None = None
    sampling: SamplingOverrides | None = None


async def events(compose: Compose, body: RunBody, api_address: str | None) -> AsyncGenerator[str]:
    """`delta` events with the text as it is made, then `done`. Closing it stops the run. Raises what the run raises."""
    workflow = compose.config.find_workflow(body.workflow)
    input = form.read_input(form.asked(compose.inputs(workflow.id)), body.values)
    running = compose.run(input, workflow=workflow.id, blend=body.blend, sampling=body.sampling)
    try:
        async with aclosing(running) as items:
            async for item in items:
                if isinstance(item, Delta):
                    yield event({"label": _label(item.path), "text": item.text}, "delta")
                else:
                    call = snippets.Call(workflow, input, item.answers, body.sampling)
                    yield event(_result(compose, call, item, api_address), "done")
    except ComposeError as error:
        if error.status >= 500:
            log.error("workflow '%s': %s", workflow.id, error, exc_info=error.__cause__)
        raise
    except Exception:
        log.exception("workflow '%s' failed", workflow.id)
        raise RunError("the run failed; the server's log has the details") from None


async def beating(events: AsyncGenerator[str], seconds: float = HEARTBEAT_SECONDS) -> AsyncGenerator[str]:
    """The events, with a heartbeat whenever none has come for so long.

    What fails before anything was sent is raised, so that it gets a status of its own; later it is an `error` event.
    """
    started = False
    async with aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait([coming], timeout=seconds))[0]:
                    started = True
                    yield HEARTBEAT
                if (item := coming.result()) is None:
                    return
            except ComposeError as error:
                if not started:
                    raise
                item = event(problem(error), "error")
            finally:
                coming.cancel()
                await asyncio.wait([coming])
            started = True
            yield item


def _result(compose: Compose, call: snippets.Call, done: Done, api_address: str | None) -> dict[str, Any]:
    for note in done.notes:
        log.info("workflow '%s': %s", call.workflow.id, note)
    return {
        "input": call.input,
        "texts": {_label(path): _text(value) for path, value in _leaves(done.output, ())},
        "answers": [{"component": answer.component, **usage_and_blend(answer)} for answer in done.answers],
        "notes": done.notes,
        "calls": [] if api_address is None else snippets.all_of(compose, api_address, call),
    }


def _label(path: tuple[Any, ...]) -> str:
    """A path of the output, dotted; "" is that of a bare value."""
    return ".".join(map(str, path))


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What stands at the ends of a workflow's output, each with its path."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
