"""Runs as tasks. Each has an id, a state that clients can ask for, and events for the client that waits.

A finished task is kept for an hour, as the JSON of its answer. Its input and the objects that ran it are not kept.
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
"""The most finished tasks that are kept, the newest ones. Running ones are always kept."""

ENDED = ("cancelled", "completed", "failed")


@dataclass
class Task:
    """One run. Only its own asyncio task changes it; all others read it, wait for it or cancel it.

    streaming: whether the text is kept for `deltas` until it is read. The output is kept in any case.
    """

    id: str
    workflow_id: str
    extras: bytes = b"{}"
    """JSON of the fields that the caller wants to see in the state."""
    streaming: bool = False
    status: Status = "pending"
    error: ComposeError | None = None
    document: bytes = b""
    """JSON of the state, once finished."""
    ended: float = 0.0
    work: asyncio.Task[None] | None = None
    follower: asyncio.Task[None] | None = None
    """Sends the callback at the end. Kept here, since asyncio itself keeps only weak references."""
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
        """The text as it is made, until the task has finished. For one reader. Raises the error that ended the task."""
        while (delta := await self._deltas.get()) is not None:
            yield delta
        self.raise_error()

    async def wait(self) -> None:
        """Until the task has finished. Raises the error that ended it."""
        await self._over.wait()
        self.raise_error()

    def raise_error(self) -> None:
        if self.error is not None:
            raise copy.copy(self.error)  # a raised error keeps all frames alive that it went through

    def follow(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`, which waits for the end and reports it."""
        self.follower = asyncio.create_task(work)
        self.follower.add_done_callback(lambda _: setattr(self, "follower", None))

    def leave(self) -> None:
        """Drops the text, which nobody reads any more."""
        self.streaming, self._deltas = False, asyncio.Queue()

    def publish(self, delta: Delta) -> None:
        if self.streaming:
            self._deltas.put_nowait(delta)

    def finish(self, status: Status, *, done: Done | None = None, error: ComposeError | None = None) -> None:
        """Ends the task. Raises ValueError, and does not end it, if the output cannot be written as JSON."""
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
        """kept_bytes: the most that inputs of running tasks may have, and again what documents of finished ones may have.
        The document of the last finished task is always kept."""
        self._compose, self._kept_bytes = compose, kept_bytes
        self._tasks: dict[str, Task] = {}
        self._ended: deque[Task] = deque()
        """The finished tasks, the oldest first."""
        self._size = 0
        """The size of their documents, in bytes."""
        self._inputs = 0
        """The size of running tasks' inputs, in bytes."""

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
        admission = self._compose.admit(prepared)  # nothing after this may fail; `_settle` gives the places back
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
        """Stops a running task. wait: whether to wait until its computation has ended. Raises Conflict if the task
        is ending or has ended."""
        if task.finished or task.status == "cancelling" or task.work is None:
            raise Conflict(f"task '{task.id}' is {task.status} already")
        task.status = "cancelling"
        task.work.cancel()
        if wait:
            await asyncio.wait([task.work])

    async def abandon(self, task: Task) -> None:
        """Stops the task, if it still runs, because nobody waits for it any more."""
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
            task.finish("completed", done=done)  # only here, since its place is free now
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
        """Called at the end of a task's work, also if the work was cancelled before its first step."""
        if work.cancelled() and not task.finished:
            task.finish("cancelled", error=Cancelled(f"task '{task.id}' was cancelled"))
        task.work = None  # it would keep alive what it ran
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
