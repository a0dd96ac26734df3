"""Health under load: whoever watches a service must not take a busy one for a dead one."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests import tiny
from tests.faults.service import seconds_of_health, up

Record = Callable[[str, int, str], None]

WAITING = 400
PROBES = 200
YAML = """\
controller: {type: http-server, port: 0}
component:
  type: model
  task: text-generation
  model: ./base
  precision: float32
  action:
    text: ${input.prompt}
    min_output_length: 4000
    max_output_length: 4000
    params: {do_sample: false}
"""
LOAD = """
import asyncio, sys
import httpx

async def main(url, count):
    async def one(number):
        body = {"input": {"prompt": f"{number} " + "word " * 100}, "stream": number % 2 == 0}
        while True:
            async with client.stream("POST", f"{url}/api/workflows/runs", json=body) as response:
                async for _ in response.aiter_raw():
                    pass
            if response.status_code == 429:
                await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        await asyncio.gather(*(one(number) for number in range(count)))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_health_answers_while_many_requests_wait(tmp_path: Path, record: Record) -> None:
    tiny.save_base(tmp_path / "base", tiny.llama_config(max_position_embeddings=1 << 13))
    path = tmp_path / "model-compose.yml"
    path.write_text(YAML, encoding="utf-8")
    with up(path, tmp_path) as service, httpx.Client() as client:
        load = subprocess.Popen([sys.executable, "-c", LOAD, service.url, str(WAITING)], stderr=subprocess.DEVNULL)
        try:
            service.until(lambda: waiting(client, service.url) > WAITING / 4, "overloaded")
            seconds = []
            for _ in range(PROBES):
                took, told = seconds_of_health(service.port)
                assert told == {"status": "ok"}
                seconds.append(took)
                time.sleep(0.02)
        finally:
            load.kill()
            load.wait()
    cuts = statistics.quantiles(seconds, n=100)
    figure = f"median {1000 * cuts[49]:.0f} ms, 99 % {1000 * cuts[98]:.0f} ms, most {1000 * max(seconds):.0f} ms"
    record(f"health beside {WAITING} requests", PROBES, figure)
    assert cuts[49] < 2


def waiting(client: httpx.Client, url: str) -> float:
    """How many texts wait for the engine."""
    lines = client.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("model_compose:num_requests_waiting{"))
