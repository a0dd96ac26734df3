"""Runs as tasks: each has an id, a state that can be asked for, and events for whoever waits.

A finished task is kept for an hour, as the JSON of its answer: its input, and the objects that ran it, are let go.
"""

import asyncio
import copy
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from model_compose.components import Answer, Delta
from model_compose.compose import Compose
from model_compose.errors import Cancelled, ComposeError, Conflict, NotFound, Overloaded, RunError
from model_compose.room import Admission
from model_compose.server_options import DEFAULT_MAX_TASKS_SIZE
from model_compose.servers.answers import Failure, RunState, Status, Usage, UsedBlend, shown
from model_compose.workflow.runner import Done, PreparedRun

log = logging.getLogger(__name__)

KEPT_SECONDS = 3600.0
KEPT_TASKS = 10_000
"""Finished tasks, by age; running ones are always kept."""

ENDED = ("cancelled", "completed", "failed")


@dataclass
class Task:
    """One run. Its own asyncio task changes it; everybody else reads, waits or cancels.

    streaming: its text is kept for `deltas` until it is read; else only the output is.
    """

    id: str
    workflow_id: str
    extras: bytes = b"{}"
    """JSON of what the caller wants to see in its state."""
    streaming: bool = False
    status: Status = "pending"
    error: ComposeError | None = None
    document: bytes = b""
    """JSON of the state, once finished."""
    ended: float = 0.0
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
        if not self.finished:
            return self._state(self.status)
        state: dict[str, Any] = json.loads(self.document)
        return state

    def _state(self, status: Status, done: Done | None = None, error: ComposeError | None = None) -> dict[str, Any]:
        more: dict[str, Any] = json.loads(self.extras)
        if done is not None:
            more["output"] = done.output
            if len(done.answers) == 1:
                more |= {"finish_reason": done.answers[0].finish_reason, **usage_and_blend(done.answers[0])}
            if done.notes:
                more["notes"] = done.notes
        if error is not None and status == "failed":
            more["error"] = Failure(code=error.code, message=str(error))
        return shown(RunState(task_id=self.id, status=status, workflow_id=self.workflow_id, **more))

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
            raise copy.copy(self.error)  # one that was raised holds on to every frame that it went through

    def follow(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`, which tells somebody of the end."""
        self.follower = asyncio.create_task(work)
        self.follower.add_done_callback(lambda _: setattr(self, "follower", None))

    def leave(self) -> None:
        """Nobody reads its text any more."""
        self.streaming, self._deltas = False, asyncio.Queue()

    def publish(self, delta: Delta) -> None:
        if self.streaming:
            self._deltas.put_nowait(delta)

    def finish(self, status: Status, *, done: Done | None = None, error: ComposeError | None = None) -> None:
        """Raises ValueError for an output that is no JSON; the task goes on then."""
        self.document = _json(self._state(status, done, error))
        self.status, self.error, self.ended = status, copy.copy(error), time.monotonic()
        self._deltas.put_nowait(None)
        self._over.set()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def usage_and_blend(answer: Answer) -> dict[str, Any]:
    """`usage` and `blend` of a response."""
    return {
        "usage": shown(Usage.of(answer.usage)),
        "blend": shown(UsedBlend.of(answer.blend, answer.identity)),
    }


class Tasks:
    """The tasks of one server."""

    def __init__(self, compose: Compose, kept_bytes: int = DEFAULT_MAX_TASKS_SIZE) -> None:
        """kept_bytes: for the inputs of running ones, and for the documents of finished ones, the last of which is always
        kept."""
        self._compose, self._kept_bytes = compose, kept_bytes
        self._tasks: dict[str, Task] = {}
        self._ended: deque[Task] = deque()
        """The finished ones, the oldest first."""
        self._size = 0
        """Of their documents, in bytes."""
        self._inputs = 0
        """Of running ones, in bytes."""

    def start(
        self, prepared: PreparedRun, extras: Mapping[str, Any], *, streaming: bool = False, size: int = 0
    ) -> Task:
        """Starts the run, after it has taken a place with every model that it uses.

        extras: what the caller wants to see in the task's state; expressions read them as `context`. size: of the run's
        input, in bytes. Raises InputError for extras that are not JSON, and Overloaded.
        """
        self._drop_old()
        if self._inputs and self._inputs + size > self._kept_bytes:
            raise Overloaded(
                f"the inputs of running tasks have reached {self._kept_bytes} bytes (max_tasks_size); try again in a moment"
            )
        shown = {key: value for key, value in extras.items() if value is not None}
        task = Task(uuid.uuid4().hex, prepared.workflow.id, _json(shown), streaming)
        context = {"task_id": task.id, "session_id": extras.get("session_id"), "metadata": extras.get("metadata")}
        admission = self._compose.admit(prepared)  # the last that may fail: `_settle` gives it back
        events = self._compose.execute(replace(prepared, context=context), admission)
        task.work = asyncio.create_task(self._work(task, events))
        task.work.add_done_callback(partial(self._settle, task, admission, size))
        self._inputs += size
        self._tasks[task.id] = task
        return task

    def find(self, id: str) -> Task:
        """Raises NotFound."""
        self._drop_old()
        if id not in self._tasks:
            raise NotFound(
                f"there is no task '{id[:64]}'; finished tasks are kept for {KEPT_SECONDS / 3600:g} h, "
                f"at most {KEPT_TASKS} and {self._kept_bytes} bytes of them (max_tasks_size)"
            )
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
        task.leave()
        with suppress(Conflict):
            await self.cancel(task)

    async def _work(self, task: Task, events: AsyncGenerator[Delta | Done]) -> None:
        task.status = "processing"
        log.info("[task-%s] workflow '%s' started", task.id, task.workflow_id)
        done = None
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Done):
                        done = event
                        for note in event.notes:
                            log.info("[task-%s] %s", task.id, note)
                    else:
                        task.publish(event)
            task.finish("completed", done=done)  # now that its place is free
        except ComposeError as error:
            level = logging.ERROR if error.status >= 500 else logging.INFO
            # The message, not the error: a log that keeps its records would keep the frames that raised it.
            cause = error.__cause__ if error.status >= 500 else None
            log.log(level, "[task-%s] %s", task.id, str(error), exc_info=cause)
            task.finish("failed", error=error)
        except Exception:
            log.exception("[task-%s] failed", task.id)
            task.finish(
                "failed", error=RunError("the run failed; the server's log has the details under the task's id")
            )

    def _settle(self, task: Task, admission: Admission, size: int, work: "asyncio.Task[None]") -> None:
        """The end of a task's work; also of work that was cancelled before its first step."""
        if work.cancelled() and not task.finished:
            task.finish("cancelled", error=Cancelled(f"task '{task.id}' was cancelled"))
        task.work = None  # it holds on to what it ran
        admission.give_back()
        self._inputs -= size
        log.info("[task-%s] %s", task.id, task.status)
        self._ended.append(task)
        self._size += len(task.document)
        self._drop_old()

    def _drop_old(self) -> None:
        limit = time.monotonic() - KEPT_SECONDS
        while self._ended and (
            self._ended[0].ended < limit
            or len(self._ended) > KEPT_TASKS
            or (self._size > self._kept_bytes and len(self._ended) > 1)
        ):
            task = self._ended.popleft()
            self._size -= len(task.document)
            del self._tasks[task.id]
