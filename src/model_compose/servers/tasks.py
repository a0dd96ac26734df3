"""Runs as tasks: each has an id, a state that can be asked for, and events for whoever waits. Kept for an hour."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from model_compose.components import Answer, Delta
from model_compose.compose import Compose
from model_compose.errors import Cancelled, ComposeError, Conflict, NotFound, RunError
from model_compose.lora.blend import Blend
from model_compose.workflow.runner import Done

log = logging.getLogger(__name__)

KEPT_SECONDS = 3600.0
KEPT_TASKS = 10_000
"""Finished tasks, by age; running ones are always kept."""

Status = Literal["pending", "processing", "cancelling", "cancelled", "completed", "failed"]
ENDED = ("cancelled", "completed", "failed")


@dataclass
class Task:
    """One run. Its own asyncio task changes it; everybody else reads, waits or cancels.

    streaming: its text is kept for `deltas` until it is read; else only the output is.
    """

    id: str
    workflow_id: str
    extras: Mapping[str, Any]
    streaming: bool = False
    status: Status = "pending"
    done: Done | None = None
    error: ComposeError | None = None
    ended: float | None = None
    work: asyncio.Task[None] | None = None
    follower: asyncio.Task[None] | None = None
    """Tells somebody of the end; kept here, since asyncio itself keeps only weak references."""
    _deltas: asyncio.Queue[Delta | None] = field(default_factory=asyncio.Queue)
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def finished(self) -> bool:
        return self.status in ENDED

    def state(self) -> dict[str, Any]:
        """The task as the API shows it; keys without a value are left out."""
        state: dict[str, Any] = {"task_id": self.id, "status": self.status, "workflow_id": self.workflow_id}
        if self.done is not None:
            state["output"] = self.done.output
            if len(self.done.answers) == 1:
                state |= {"finish_reason": self.done.answers[0].finish_reason}
                state |= usage_and_blend(self.done.answers[0])
            if self.done.notes:
                state["notes"] = self.done.notes
        if self.error is not None and self.status == "failed":
            state["error"] = {"code": self.error.code, "message": str(self.error)}
        return state | {key: value for key, value in self.extras.items() if value is not None}

    async def deltas(self) -> AsyncIterator[Delta]:
        """The text as it comes, until the task has finished; for one reader. Raises the error that ended it."""
        while (delta := await self._deltas.get()) is not None:
            yield delta
        self.raise_error()

    async def wait(self) -> None:
        """Until the task has finished. Raises the error that ended it."""
        await self._over.wait()
        self.raise_error()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def publish(self, delta: Delta) -> None:
        if self.streaming:
            self._deltas.put_nowait(delta)

    def finish(self, status: Status, *, done: Done | None = None, error: ComposeError | None = None) -> None:
        self.status, self.done, self.error, self.ended = status, done, error, time.monotonic()
        self._deltas.put_nowait(None)
        self._over.set()


def usage_and_blend(answer: Answer) -> dict[str, Any]:
    """`usage` and `blend` of a response."""
    usage, blend = answer.usage, answer.blend
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "tokens_per_second": usage.tokens_per_second,
        },
        "blend": {"name": blend.name, "weights": dict(blend.weights), **_method(blend), "identity": answer.identity},
    }


def _method(blend: Blend) -> dict[str, Any]:
    """How the adapters were combined, where it was not by the exact sum."""
    method = blend.method
    if method is None:
        return {}
    options = method.model_dump(exclude={"method"})
    return {"method": method.method, "options": options, "approximate": method.approximate}


class Tasks:
    """The tasks of one server."""

    def __init__(self, compose: Compose) -> None:
        self._compose = compose
        self._tasks: dict[str, Task] = {}

    def start(
        self, workflow: str | None, input: Any, blend: Any, extras: Mapping[str, Any], *, streaming: bool = False
    ) -> Task:
        """Starts a run. Raises NotFound for an unknown workflow."""
        self._drop_old()
        chosen = self._compose.config.find_workflow(workflow)
        task = Task(uuid.uuid4().hex, chosen.id, extras, streaming)
        context = {"task_id": task.id, "session_id": extras.get("session_id"), "metadata": extras.get("metadata")}
        events = self._compose.run(input, workflow=chosen.id, blend=blend, context=context)
        task.work = asyncio.create_task(self._work(task, events))
        task.work.add_done_callback(lambda work: _settle(task, work))
        self._tasks[task.id] = task
        return task

    def find(self, id: str) -> Task:
        """Raises NotFound."""
        self._drop_old()
        if id not in self._tasks:
            raise NotFound(f"there is no task '{id}'; finished tasks are kept for {KEPT_SECONDS / 3600:g} h")
        return self._tasks[id]

    async def cancel(self, task: Task, *, wait: bool = True) -> None:
        """Stops a running task; `wait` until its computation has ended. Raises Conflict for one that is ending or has."""
        if task.finished or task.status == "cancelling" or task.work is None:
            raise Conflict(f"task '{task.id}' is {task.status} already")
        task.status = "cancelling"
        task.work.cancel()
        if wait:
            await asyncio.wait([task.work])

    async def abandon(self, task: Task) -> None:
        """Nobody waits for this task any more: stops it if it still runs."""
        with suppress(Conflict):
            await self.cancel(task)

    async def _work(self, task: Task, events: AsyncGenerator[Delta | Done]) -> None:
        task.status = "processing"
        log.info("[task-%s] workflow '%s' started", task.id, task.workflow_id)
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Done):
                        for note in event.notes:
                            log.info("[task-%s] %s", task.id, note)
                        task.finish("completed", done=event)
                    else:
                        task.publish(event)
        except ComposeError as error:
            level = logging.ERROR if error.status >= 500 else logging.INFO
            log.log(level, "[task-%s] %s", task.id, error, exc_info=error.__cause__ if error.status >= 500 else None)
            task.finish("failed", error=error)
        except Exception:
            log.exception("[task-%s] failed", task.id)
            task.finish(
                "failed", error=RunError("the run failed; the server's log has the details under the task's id")
            )

    def _drop_old(self) -> None:
        limit = time.monotonic() - KEPT_SECONDS
        ended = [task for task in self._tasks.values() if task.ended is not None]
        spare = len(ended) - KEPT_TASKS
        for at, task in enumerate(ended):
            if at < spare or (task.ended or 0) < limit:
                del self._tasks[task.id]


def _settle(task: Task, work: "asyncio.Task[None]") -> None:
    """The end of a task's work; also of work that was cancelled before its first step."""
    if work.cancelled() and not task.finished:
        task.finish("cancelled", error=Cancelled(f"task '{task.id}' was cancelled"))
    log.info("[task-%s] %s", task.id, task.status)
