"""Runs as tasks: each has an id, a state that can be asked for, and events for whoever waits. Kept for an hour."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from model_compose.components import Answer, Delta
from model_compose.compose import Compose
from model_compose.errors import Cancelled, ComposeError, Conflict, NotFound, RunError
from model_compose.workflow.runner import Done

log = logging.getLogger(__name__)

KEPT_SECONDS = 3600.0

Status = Literal["pending", "processing", "cancelled", "completed", "failed"]


@dataclass
class Task:
    """One run. Its own asyncio task changes it; everybody else reads, waits or cancels."""

    id: str
    workflow_id: str
    extras: Mapping[str, Any]
    status: Status = "pending"
    done: Done | None = None
    error: ComposeError | None = None
    ended: float | None = None
    work: asyncio.Task[None] | None = None
    _events: list[Delta] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def finished(self) -> bool:
        return self.status in ("cancelled", "completed", "failed")

    def state(self) -> dict[str, Any]:
        """The task as the API shows it; keys without a value are left out."""
        state: dict[str, Any] = {"task_id": self.id, "status": self.status, "workflow_id": self.workflow_id}
        if self.done is not None:
            state["output"] = self.done.output
            if len(self.done.answers) == 1:
                state |= usage_and_blend(self.done.answers[0])
        if self.error is not None and self.status == "failed":
            state["error"] = {"code": self.error.code, "message": str(self.error)}
        return state | {key: value for key, value in self.extras.items() if value is not None}

    async def deltas(self) -> AsyncIterator[Delta]:
        """The text from the start, as it comes, until the task has finished. Raises the error that ended it."""
        position = 0
        while True:
            self._changed.clear()
            for delta in self._events[position:]:
                position += 1
                yield delta
            if self.finished:
                break
            await self._changed.wait()
        self.raise_error()

    async def wait(self) -> None:
        """Until the task has finished. Raises the error that ended it."""
        async for _ in self.deltas():
            pass

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def publish(self, delta: Delta) -> None:
        self._events.append(delta)
        self._changed.set()

    def finish(self, status: Status, *, done: Done | None = None, error: ComposeError | None = None) -> None:
        self.status, self.done, self.error, self.ended = status, done, error, time.monotonic()
        self._changed.set()


def usage_and_blend(answer: Answer) -> dict[str, Any]:
    """`usage` and `blend` of a response."""
    usage, blend = answer.usage, answer.blend
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "tokens_per_second": usage.tokens_per_second,
        },
        "blend": {"name": blend.name, "weights": dict(blend.weights), "identity": answer.identity},
    }


class Tasks:
    """The tasks of one server."""

    def __init__(self, compose: Compose) -> None:
        self._compose = compose
        self._tasks: dict[str, Task] = {}

    def start(self, workflow: str | None, input: Any, blend: Any, extras: Mapping[str, Any]) -> Task:
        """Starts a run. Raises NotFound for an unknown workflow."""
        self._drop_old()
        chosen = self._compose.config.find_workflow(workflow)
        task = Task(uuid.uuid4().hex, chosen.id, extras)
        context = {"task_id": task.id, "session_id": extras.get("session_id"), "metadata": extras.get("metadata")}
        events = self._compose.run(input, workflow=chosen.id, blend=blend, context=context)
        task.work = asyncio.create_task(self._work(task, events))
        self._tasks[task.id] = task
        return task

    def find(self, id: str) -> Task:
        """Raises NotFound."""
        self._drop_old()
        if id not in self._tasks:
            raise NotFound(f"there is no task '{id}'; finished tasks are kept for {KEPT_SECONDS / 3600:g} h")
        return self._tasks[id]

    async def cancel(self, task: Task) -> None:
        """Stops a running task and waits until its computation has ended. Raises Conflict for a finished one."""
        if task.finished or task.work is None:
            raise Conflict(f"task '{task.id}' has already ended ({task.status})")
        task.work.cancel()
        await asyncio.wait([task.work])

    @property
    def running(self) -> list[Task]:
        return [task for task in self._tasks.values() if not task.finished]

    async def _work(self, task: Task, events: AsyncGenerator[Delta | Done]) -> None:
        task.status = "processing"
        log.info("[task-%s] workflow '%s' started", task.id, task.workflow_id)
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Done):
                        task.finish("completed", done=event)
                    else:
                        task.publish(event)
        except asyncio.CancelledError:
            task.finish("cancelled", error=Cancelled(f"task '{task.id}' was cancelled"))
        except ComposeError as error:
            level = logging.ERROR if error.status >= 500 else logging.INFO
            log.log(level, "[task-%s] %s", task.id, error, exc_info=error.__cause__ if error.status >= 500 else None)
            task.finish("failed", error=error)
        except Exception:
            log.exception("[task-%s] failed", task.id)
            task.finish(
                "failed", error=RunError("the run failed; the server's log has the details under the task's id")
            )
        log.info("[task-%s] %s", task.id, task.status)

    def _drop_old(self) -> None:
        limit = time.monotonic() - KEPT_SECONDS
        self._tasks = {id: task for id, task in self._tasks.items() if task.ended is None or task.ended > limit}
