"""What one request may cost: the memory that it leaves behind, the time that it takes from others; and a full queue."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import model_compose
from tests import tiny
from tests.servers.test_serve import PROGRAM

Record = Callable[[str, int, str], None]

YAML = """\
controller: {type: http-server, port: 0}
workflows:
  - {id: plain, default: true, job: {action: plain}}
  - {id: cut, job: {action: cut}}
component:
  type: model
  task: text-generation
  model: ./base
  precision: float32
  options: {max_batch_size: 2, max_queue: 30}
  actions:
    - {id: plain, text: "${input.prompt}", stop_sequences: "${input.stop}", max_output_length: 4}
    - {id: cut, text: "${input.prompt}", max_input_length: 64, max_output_length: 4}
"""
RUNS = "/api/workflows/runs"
MIB = 1 << 20
BODY = 9_900_000


@dataclass
class Service:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    url: str

    def memory(self) -> float:
        """Resident, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    def post(self, body: Any, path: str = RUNS) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return httpx.post(self.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=300)

    def end(self) -> float:
        """Seconds from SIGTERM to the end of the process."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(300)
        return time.monotonic() - started


@contextmanager
def started(folder: Path) -> Iterator[Service]:
    tiny.save_base(folder / "base", tiny.llama_config(max_position_embeddings=1 << 13))
    (folder / "model-compose.yml").write_text(YAML, encoding="utf-8")
    sources = str(Path(model_compose.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder / "model-compose.yml")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        service = Service(process, process.stdout.readline().strip())
        assert process.stdout.readline() == "ready\n"
        service.post({"input": {"prompt": "warm"}}).raise_for_status()
        yield service
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with started(tmp_path_factory.mktemp("bounds")) as running:
        yield running


def slowest(service: Service, work: Callable[[], httpx.Response]) -> tuple[httpx.Response, float]:
    """The answer to `work`, and the longest that health took meanwhile, in seconds."""
    over, times = threading.Event(), [0.0]

    def watch() -> None:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            while not over.is_set():
                started = time.monotonic()
                client.get("/api/health")
                times.append(time.monotonic() - started)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        answer = work()
    finally:
        over.set()
        watching.join()
    return answer, max(times)


def many_values(key: str, rest: str = "") -> bytes:
    return f'{{"{key}": {{"prompt": [{",".join(["[]"] * (BODY // 3))}]}}{rest}}}'.encode()


def test_metadata_leaves_no_memory_behind(service: Service, record: Record) -> None:
    before = service.memory()
    for _ in range(2):
        refused = service.post(many_values("metadata", ', "input": {"prompt": "a"}'))
        assert refused.status_code == 400
    large = {"input": {"prompt": "a"}, "metadata": {"a": "x" * (70 << 10)}}
    assert "metadata has 71688 bytes, and it may have at most 65536" in service.post(large).json()["detail"]
    parsed: dict[str, Any] = {"a": [[]] * 20_000}
    for _ in range(25):
        kept = service.post({"input": {"prompt": "a"}, "metadata": parsed})
    assert kept.json()["metadata"] == parsed
    grown = service.memory() - before
    record("metadata of 9.9 MB in lists (2), then of 60 KB (25)", 27, f"memory grew by {grown:.0f} MiB")
    assert grown < 64


def test_a_finished_task_keeps_no_input(service: Service, record: Record) -> None:
    before, ids = service.memory(), []
    for number in range(10):
        for workflow in ("cut", "plain"):  # the second does not fit
            run = {"workflow_id": workflow, "input": {"prompt": f"{number}" * 4 * MIB}}
            answer = service.post(run)
            ids.append(answer.json()["task_id"])
            ids.append(service.post({**run, "wait_for_completion": False}).json()["task_id"])
    for id in ids:
        while (state := httpx.get(f"{service.url}/api/tasks/{id}").json())["status"] in ("pending", "processing"):
            time.sleep(0.01)
        assert state["status"] in ("completed", "failed")
    grown = service.memory() - before
    record("inputs of 4 MiB, completed and failed", len(ids), f"memory grew by {grown:.0f} MiB")
    assert grown < 80  # of 160


def test_long_prompts_hold_up_nobody(tmp_path: Path, record: Record) -> None:
    """Prompts of 3 MB: without a bound by characters (cut to 64 tokens), and beyond it."""
    with started(tmp_path) as service:
        before = service.memory()
        words = "".join(random.Random(1).choices("abcdefghijklmnop    ", k=3_000_000))
        bodies = [
            {"input": {"prompt": words}, "workflow_id": workflow} for workflow in ("plain", "cut") for _ in range(6)
        ]
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda body=body: answers.append(service.post(body))) for body in bodies]
        for thread in threads:
            thread.start()
        times: list[float] = []
        peak = 0.0
        while any(thread.is_alive() for thread in threads) or not times:
            began = time.monotonic()
            service.post({"input": {"prompt": "a"}}).raise_for_status()
            times.append(time.monotonic() - began)
            peak = max(peak, service.memory() - before)
        record("twelve prompts of 3 MB", 12, f"a neighbour waited {max(times):.1f} s; {peak:.0f} MiB more memory")
        assert sorted(answer.status_code for answer in answers) == [200] * 6 + [400] * 6
        assert sum("the prompt has 3000000 characters" in answer.text for answer in answers) == 6
        assert peak < 500
        assert max(times) < 10

        threads = [
            threading.Thread(
                target=service.post, args=({"input": {"prompt": words}, "workflow_id": "cut"},), daemon=True
            )
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        seconds = service.end()
        record("SIGTERM while prompts of 3 MB come in", 12, f"ended after {seconds:.1f} s")
        assert seconds < 10


def test_bodies_hold_up_nobody(service: Service, record: Record) -> None:
    """Each of about 9.9 MB, refused for what it holds, while health answers."""
    strings = ",".join(['"a"'] * (BODY // 4))
    cases: dict[str, tuple[str, bytes]] = {
        "lists": (RUNS, many_values("input")),
        "one text": (RUNS, json.dumps({"input": {"prompt": "a" * BODY}}).encode()),
        "stop strings": ("/v1/completions", f'{{"model": "default", "prompt": "a", "stop": [{strings}]}}'.encode()),
        "wrong stop strings": (
            "/v1/completions", f'{{"model": "default", "prompt": "a", "stop": [{"1," * 100_000}1]}}'.encode()
        ),
        "wrong biases": (
            "/v1/completions",
            json.dumps({"model": "default", "prompt": "a", "logit_bias": {f"x{n}": 1 for n in range(100_000)}}).encode(),
        ),
        "one key": ("/v1/completions", json.dumps({"model": "default", "prompt": "a", "k" * BODY: 1}).encode()),
        "messages": (
            "/v1/chat/completions", f'{{"model": "default", "messages": [{"1," * 100_000}1]}}'.encode()
        ),
    }  # fmt: skip
    for name, (path, body) in cases.items():
        before = service.memory()
        answer, longest = slowest(service, partial(service.post, body, path))
        assert answer.status_code == 400, answer.text[:500]
        assert len(answer.content) < 10_000
        record(
            f"a body of {name}, {len(body) / 1e6:.1f} MB", 1,
            f"health took {longest * 1000:.0f} ms; {service.memory() - before:.0f} MiB more memory",
        )  # fmt: skip
        assert longest < 1.5


def test_stop_strings_are_few_and_short(service: Service, record: Record) -> None:
    most = [f"{number:03}" * 341 for number in range(64)]
    for path, body, field in (
        (RUNS, lambda stop: {"input": {"prompt": "a", "stop": stop}}, "stop_sequences"),
        ("/v1/completions", lambda stop: {"model": "default", "prompt": "a", "max_tokens": 4, "stop": stop}, "stop"),
    ):
        assert service.post(body(most), path).status_code == 200
        for stop, said in (
            ([*most, "x"], "65 stop strings, and at most 64 are taken"),
            ("x" * 1025, "a stop string of 1025 bytes, and it may have at most 1024"),
            (["x" * 1025], "a stop string of 1025 bytes, and it may have at most 1024"),
            (["é" * 513], "a stop string of 1026 bytes, and it may have at most 1024"),
        ):
            refused = service.post(body(stop), path)
            assert refused.status_code == 400
            assert f"{field}: {said}" in refused.text
    record("stop strings beyond 64 of 1 KiB", 8, "refused by name")


async def test_what_is_accepted_runs_and_the_rest_is_429(service: Service, record: Record) -> None:
    """More runs at once than the queue takes: asynchronous ones, streams, answers that are waited for, and /v1."""
    run = {"input": {"prompt": "a"}}
    kinds: list[tuple[str, dict[str, Any]]] = [
        (RUNS, {**run, "wait_for_completion": False}), (RUNS, {**run, "stream": True}), (RUNS, run),
        ("/v1/completions", {"model": "default", "prompt": "a", "max_tokens": 4}),
    ]  # fmt: skip
    async with httpx.AsyncClient(base_url=service.url, timeout=120) as client:
        calls = [client.post(path, json=body) for _ in range(40) for path, body in kinds]
        answers = await asyncio.gather(*calls)
        accepted = [answer.json()["task_id"] for answer in answers[0::4] if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert accepted
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in refused:
            assert answer.headers["Retry-After"]
            assert "task_id" not in answer.text
        assert not [answer for answer in answers if answer.status_code == 200 and "too_many" in answer.text]
        for id in accepted:
            while (state := (await client.get(f"/api/tasks/{id}")).json())["status"] in ("pending", "processing"):
                await asyncio.sleep(0.01)
            assert state["status"] == "completed", state
        record(
            "more runs at once than the queue takes", len(answers),
            f"{len(accepted)} asynchronous accepted and done, {len(refused)} of all 429",
        )  # fmt: skip
        text = (await client.get("/metrics")).text
        assert 'model_compose:num_requests_waiting{component="default"} 0.0' in text
