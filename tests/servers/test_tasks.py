"""Tasks: asked for, cancelled, left alone; and what they must not hold on to."""

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.compose import Compose
from model_compose.errors import ComposeError, Conflict, NotFound, Overloaded, RunError
from model_compose.servers import tasks as tasks_module
from model_compose.servers.tasks import Task, Tasks
from model_compose.workflow.runner import Done
from tests.conftest import serving
from tests.servers.conftest import Live
from tests.servers.test_http import PROMPT, events, is_problem, post
from tests.waiting import wait_until

RUN = "/api/workflows/runs"
HELLO = {"prompt": "Hello"}


def wait_for(url: str, task_id: str) -> dict[str, Any]:
    def state() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{url}/api/tasks/{task_id}").json()
        return found

    wait_until(lambda: state()["status"] not in ("pending", "processing"), "ended")
    return state()


# Over HTTP.


def test_a_task_is_answered_at_once_and_found_by_its_id(server: str) -> None:
    whole = post(server, {"input": PROMPT}).json()
    started = post(server, {"input": PROMPT, "wait_for_completion": False, "session_id": "s"})
    assert started.status_code == 200
    assert started.json()["status"] == "pending"
    assert set(started.json()) == {"task_id", "status", "workflow_id", "session_id"}
    task_id = started.json()["task_id"]
    state = wait_for(server, task_id)
    assert state["status"] == "completed"
    assert state["output"] == whole["output"]
    assert state["blend"] == whole["blend"]
    assert state["session_id"] == "s"
    assert httpx.get(f"{server}/api/tasks/{task_id}?output_only=true").json() == whole["output"]
    is_problem(httpx.post(f"{server}/api/tasks/{task_id}/cancel"), 409)


def test_every_run_can_be_asked_for_later(server: str) -> None:
    for options in ({}, {"stream": True}):
        answer = post(server, {"input": PROMPT, **options})
        done = events(answer.text)[-1][1] if options else answer.json()
        assert httpx.get(f"{server}/api/tasks/{done['task_id']}").json() == done


def test_a_failed_task_is_a_200_with_its_error(server: str) -> None:
    failed = is_problem(post(server, {"input": {"prompt": "x" * 300}}), 400)
    state = httpx.get(f"{server}/api/tasks/{failed['task_id']}")
    assert state.status_code == 200
    assert state.json()["status"] == "failed"
    assert state.json()["error"] == {"code": "invalid_request", "message": failed["detail"]}
    assert is_problem(httpx.get(f"{server}/api/tasks/{failed['task_id']}?output_only=true"), 400) == failed


def test_wrong_input_starts_no_task_even_when_nobody_waits(server: str) -> None:
    document = is_problem(post(server, {"input": {}, "wait_for_completion": False}), 400)
    assert "task_id" not in document


async def test_a_cancelled_task_stops_at_once(live: Live) -> None:
    started = (await live.client.post(live.url + RUN, json={"input": HELLO, "wait_for_completion": False})).json()
    task = f"{live.url}/api/tasks/{started['task_id']}"
    await live.running()
    assert (await live.client.get(task)).json()["status"] == "processing"
    pending = await live.client.get(task, params={"output_only": True})
    assert (pending.status_code, pending.json()["status"]) == (202, "processing")
    cancelled = await live.client.post(f"{task}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert live.compose.busy == 0
    await live.stopped()
    assert (await live.client.get(task)).json()["status"] == "cancelled"
    is_problem(await live.client.get(task, params={"output_only": True}), 409)
    is_problem(await live.client.post(f"{task}/cancel"), 409)


async def test_a_cancel_need_not_be_waited_for(live: Live) -> None:
    started = (await live.client.post(live.url + RUN, json={"input": HELLO, "wait_for_completion": False})).json()
    await live.running()
    task = f"{live.url}/api/tasks/{started['task_id']}"
    answer = await live.client.post(f"{task}/cancel", params={"wait_for_completion": False})
    assert answer.json()["status"] in ("cancelling", "cancelled")
    is_problem(await live.client.post(f"{task}/cancel"), 409)
    await live.stopped()
    assert (await live.client.get(task)).json()["status"] == "cancelled"


async def test_whoever_waits_for_a_cancelled_task_is_told(live: Live) -> None:
    def cancel() -> None:
        running = [t for t in asyncio.all_tasks() if "Tasks._work" in str(t.get_coro())]
        running[0].cancel()

    waiting = asyncio.create_task(live.client.post(live.url + RUN, json={"input": HELLO}))
    await live.running()
    cancel()
    assert is_problem(await waiting, 409)["title"] == "Cancelled"
    async with live.client.stream("POST", live.url + RUN, json={"input": HELLO, "stream": True}) as streamed:
        parts = streamed.aiter_text()
        text = await anext(parts)  # a stream that has begun, so that its end is an event
        cancel()
        async for part in parts:
            text += part
    name, data = events(text)[-1]
    assert (name, data["status"], data["title"]) == ("error", 409, "Cancelled")


# From within.


async def test_a_task_cancelled_before_its_first_step_ends_as_cancelled(live: Live) -> None:
    tasks = Tasks(live.compose)
    task = tasks.start(live.compose.prepare(HELLO), {}, streaming=True)
    await tasks.cancel(task)
    assert task.status == "cancelled"
    with pytest.raises(Conflict):
        await tasks.cancel(task)
    with pytest.raises(Exception, match="cancelled"):
        async for _ in task.deltas():
            pass


async def test_text_that_nobody_reads_is_not_kept(live: Live) -> None:
    tasks = Tasks(live.compose)
    silent, read = (tasks.start(live.compose.prepare(HELLO), {}, streaming=streaming) for streaming in (False, True))
    seen = 0
    async for _ in read.deltas():
        seen += 1
        if seen == 5:
            break
    assert silent._deltas.empty()
    await asyncio.gather(tasks.cancel(silent), tasks.cancel(read))


async def settled(task: Task) -> None:
    while task.work is not None:
        await asyncio.sleep(0)


class Held(dict[str, Any]):
    """An input that can be watched."""


@pytest.mark.parametrize(("prompt", "end"), [("Hello", "completed"), ("x" * 300, "failed"), ("Hello", "cancelled")])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_finished_task_holds_no_input(compose: Compose, prompt: Any, end: str, streaming: bool) -> None:
    tasks = Tasks(compose)
    given, metadata = Held(prompt=prompt), Held(a=[[]])
    watched = [weakref.ref(given), weakref.ref(metadata)]
    task = tasks.start(compose.prepare(given), {"metadata": metadata, "session_id": None}, streaming=streaming)
    del given, metadata
    if end == "cancelled":
        await tasks.cancel(task)
    for _ in range(2):  # an error that is raised again has gathered no frames of those who waited
        with suppress(ComposeError):
            await task.wait()
    await tasks.abandon(task)
    await settled(task)
    assert task.status == end
    for _ in range(500):  # the thread that tokenized may be just about to let go of it
        gc.collect()
        if not any(ref() for ref in watched):
            break
        await asyncio.sleep(0.01)
    assert [ref() for ref in watched] == [None, None]
    state = tasks.find(task.id).state()
    assert state["status"] == end
    assert state["metadata"] == {"a": [[]]}
    assert "session_id" not in state
    assert task._deltas.empty()


async def test_finished_tasks_are_forgotten_by_their_bytes_the_oldest_first(compose: Compose) -> None:
    tasks = Tasks(compose, 5_000)
    ids = []
    for number in range(4):
        task = tasks.start(compose.prepare(HELLO), {"metadata": {"a": f"{number}" * 2_000}})
        await task.wait()
        await settled(task)
        ids.append(task.id)
    with pytest.raises(NotFound, match=r"kept for 1 h, at most 10000 and 5000 bytes of them \(max_tasks_size\)"):
        tasks.find(ids[1])
    assert [tasks.find(id).id for id in ids[2:]] == ids[2:]
    large = tasks.start(compose.prepare(HELLO), {"metadata": {"a": "x" * 9_000}})
    await large.wait()
    await settled(large)
    assert tasks.find(large.id) is large  # the last one stays, whatever its size
    with pytest.raises(NotFound):
        tasks.find(ids[3])


async def test_the_inputs_of_running_tasks_have_a_bound_in_bytes(live: Live) -> None:
    tasks = Tasks(live.compose, 5_000)
    first = tasks.start(live.compose.prepare(HELLO), {}, size=6_000)  # one may always run
    with pytest.raises(Overloaded, match=r"inputs of running tasks have reached 5000 bytes \(max_tasks_size\)"):
        tasks.start(live.compose.prepare(HELLO), {}, size=1)
    await tasks.cancel(first)
    second, third = (tasks.start(live.compose.prepare(HELLO), {}, size=2_500) for _ in range(2))
    await asyncio.gather(tasks.cancel(second), tasks.cancel(third))


def test_a_run_counts_with_the_size_of_its_body(endless_file: Path) -> None:
    path = endless_file.with_name("small.yml")
    adapter = "controller: {type: http-server, port: 0, max_tasks_size: 60kB}\n"
    path.write_text(adapter + endless_file.read_text(encoding="utf-8"), encoding="utf-8")
    body = {"input": {"prompt": "x" * 40_000}, "wait_for_completion": False}
    with serving(path) as url:
        first = post(url, body).json()
        for refused in (post(url, body), httpx.post(url + RUN, data={"input[prompt]": "x" * 40_000})):
            assert "max_tasks_size" in is_problem(refused, 429)["detail"]
        cancelled = httpx.post(f"{url}/api/tasks/{first['task_id']}/cancel").json()
        assert cancelled["status"] == "cancelled"
        again = post(url, body).json()
        assert httpx.post(f"{url}/api/tasks/{again['task_id']}/cancel").status_code == 200


async def test_an_output_that_is_no_json_fails_the_run(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks(compose)

    async def execute(*_: Any) -> AsyncGenerator[Done]:
        yield Done({"generated": float("nan")})

    monkeypatch.setattr(compose, "execute", execute)
    task = tasks.start(compose.prepare(HELLO), {})
    with pytest.raises(RunError, match="the run failed"):
        await task.wait()
    assert task.state()["status"] == "failed"


async def test_a_run_that_is_cancelled_before_its_first_step_gives_its_place_back(live: Live) -> None:
    tasks, room = Tasks(live.compose), live.compose.models["__component__"].engine.room
    task = tasks.start(live.compose.prepare(HELLO), {})
    assert (room.texts, room.promised) == (1, 1)
    await tasks.cancel(task)
    assert (room.texts, room.promised) == (0, 0)


async def test_a_run_that_cannot_be_shown_takes_no_place(live: Live) -> None:
    room = live.compose.models["__component__"].engine.room
    with pytest.raises(UnicodeEncodeError):
        Tasks(live.compose).start(live.compose.prepare(HELLO), {"metadata": {"a": "\ud800"}})
    assert (room.texts, room.promised) == (0, 0)


async def test_finished_tasks_are_forgotten_by_age_and_number(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks(live.compose)
    monkeypatch.setattr(tasks_module, "KEPT_TASKS", 2)
    ids = []
    for _ in range(4):
        task = tasks.start(live.compose.prepare(HELLO), {})
        await tasks.cancel(task)
        ids.append(task.id)
    running = tasks.start(live.compose.prepare(HELLO), {})
    with pytest.raises(NotFound, match="kept for 1 h"):
        tasks.find(ids[1])
    assert tasks.find(ids[2]).id == ids[2]
    monkeypatch.setattr(tasks_module, "KEPT_SECONDS", -1.0)
    with pytest.raises(NotFound):
        tasks.find(ids[3])
    assert tasks.find(running.id) is running
    await tasks.cancel(running)
