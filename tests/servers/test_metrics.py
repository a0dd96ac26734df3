"""/metrics: what it counts is what clients were told, to the token, over both faces and for each blend."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_compose.generation import Chunk, Request, Usage
from model_compose.lora.blend import Blend, Blends
from model_compose.metrics import Meter, Metrics, label
from tests.conftest import serving
from tests.servers.conftest import Live
from tests.servers.test_guard import KEY
from tests.servers.test_http import events, is_problem, post
from tests.servers.test_leaving import COMPLETION, RUN

Values = dict[tuple[str, ...], float]
"""Label values in the order of the labels' names -> a sample's value."""


def samples(text: str) -> dict[str, Values]:
    """The samples of each name, without the prefix that all of them have."""
    found: dict[str, Values] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            name = sample.name.removeprefix("model_compose:")
            assert name != sample.name
            found.setdefault(name, {})[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def scrape(url: str) -> dict[str, Values]:
    answer = httpx.get(f"{url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(answer.text)


@pytest.fixture
def fresh(project: Path) -> Iterator[str]:
    """A server that nobody has asked anything yet."""
    with serving(project) as url:
        yield url


def complete(url: str, **body: Any) -> Any:
    whole = {"model": "default", "prompt": "Hello", "max_tokens": 6, "temperature": 0} | body
    return httpx.post(f"{url}/v1/completions", json=whole, timeout=60).raise_for_status().json()


def test_the_numbers_are_those_that_clients_were_told(fresh: str) -> None:
    prompt, generated, reasons, texts = Counter[str](), Counter[str](), Counter[tuple[str, str]](), Counter[str]()

    def told(blend: str, usage: dict[str, Any], *finishes: str) -> None:
        prompt[blend] += usage["prompt_tokens"]
        generated[blend] += usage["completion_tokens"]
        for finish in finishes:
            reasons[blend, finish] += 1
        texts[blend] += 1

    runs: list[tuple[str, Any]] = [
        ("default", None), ("strong", "strong"), ("plain", "plain"), ("pirate", "pirate"), ("base", {}),
        ("alpaca", {"alpaca": 0.25}), ("custom", {"alpaca": 0.25, "pirate": 1}), ("custom", {"alpaca": 0.5, "pirate": 1}),
    ]  # fmt: skip
    for name, blend in runs:
        answer = post(fresh, {"input": {"prompt": "Hello"}, "blend": blend}).json()
        told(name, answer["usage"])
    streamed = post(fresh, {"input": {"prompt": "Streamed"}, "stream": True})
    told("default", events(streamed.text)[-1][1]["usage"])
    by_run = sum(texts.values())

    asked: list[tuple[str, dict[str, Any]]] = [
        ("default", {}), ("strong", {"model": "default:strong"}), ("base", {"lora": []}), ("default", {"n": 2}),
        ("alpaca", {"lora": {"alpaca": 0.25, "pirate": 0}}), ("pirate", {"model": "default:pirate", "max_tokens": 1}),
        ("default", {"logit_bias": {"1": 100}}),
    ]  # fmt: skip
    for name, body in asked:
        answer = complete(fresh, **body)
        finishes = {choice["finish_reason"] for choice in answer["choices"]}
        told(name, answer["usage"], "length" if "length" in finishes else "stop")
    refused = httpx.post(f"{fresh}/v1/completions", json={"model": "default", "prompt": "x" * 999})
    assert refused.status_code == 400

    found = scrape(fresh)
    assert found["prompt_tokens_total"] == {(name, "default"): count for name, count in prompt.items()}
    assert found["generation_tokens_total"] == {(name, "default"): count for name, count in generated.items()}
    successes = found["request_success_total"]
    assert sum(successes.values()) == sum(texts.values()) == by_run + len(asked)
    for (name, finish), count in reasons.items():
        assert successes[name, "default", finish] >= count
    assert successes["default", "default", "stop"] >= 1  # the one whose first token is the end
    assert found["request_failure_total"] == {("default", "default", "invalid_request"): 1}
    for histogram in ("e2e_request_latency_seconds", "time_to_first_token_seconds"):
        assert found[f"{histogram}_count"] == {(name, "default"): count for name, count in texts.items()}
    for labels, seconds in found["e2e_request_latency_seconds_sum"].items():
        assert 0 < found["time_to_first_token_seconds_sum"][labels] <= seconds
        assert found["time_per_output_token_seconds_sum"].get(labels, 0.0) < seconds
    assert found["time_per_output_token_seconds_count"]["pirate", "default"] == 1  # one token has none after it


def test_an_engine_tells_of_its_prefixes_its_adapters_and_its_rest(fresh: str) -> None:
    before = scrape(fresh)
    assert before["num_adapters_loaded"] == {("default",): 2}
    for name in ("kv_cache_usage_perc", "prefix_cache_queries_total", "num_preemptions_total"):
        assert before[name] == {("default",): 0}
    usages = [complete(fresh, prompt="A beginning that they share. " * 2 + end)["usage"] for end in ("One", "Another")]
    found = scrape(fresh)
    assert found["prefix_cache_queries_total"] == {("default",): sum(usage["prompt_tokens"] for usage in usages)}
    hits = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert found["prefix_cache_hits_total"] == {("default",): hits}
    assert hits >= 58
    # Kept prefixes give way to requests, so they are no use of the cache; what they hold is told apart.
    cache, kept = found["kv_cache_bytes"]["default",], found["prefix_cache_usage_perc"]["default",]
    assert before["prefix_cache_usage_perc"] == {("default",): 0}
    token = 2 * 2 * 2 * 8 * 4  # bytes: layers, keys and values, heads, head_dim, float32
    first, second = (usage["total_tokens"] - 1 for usage in usages)  # the last token of a text is never computed
    assert kept * cache == pytest.approx(token * (first + second))
    for name in ("num_requests_running", "num_requests_waiting", "num_preemptions_total", "kv_cache_usage_perc"):
        assert found[name] == {("default",): 0}


async def _scrape(live: Live) -> dict[str, Values]:
    return samples((await live.client.get(f"{live.url}/metrics")).text)


async def test_a_client_that_leaves_is_counted_as_cancelled(live: Live) -> None:
    async with live.client.stream("POST", live.url + RUN[0], json={**RUN[1], "stream": True}) as response:
        lines = response.aiter_lines()  # kept: the connection closes when it is collected
        await anext(lines)
        during = await _scrape(live)
        assert during["num_requests_running"] == {("default",): 1}
        assert during["num_requests_waiting"] == {("default",): 0}
        assert 0 < during["kv_cache_usage_perc"]["default",] <= 1
    await live.stopped()
    waiting = asyncio.create_task(live.client.post(live.url + COMPLETION[0], json=COMPLETION[1]))
    await live.running()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await live.stopped()
    found = await _scrape(live)
    assert found["request_failure_total"] == {("default", "default", "cancelled"): 2}
    assert found["num_requests_running"] == {("default",): 0}
    assert not {"request_success_total", "prompt_tokens_total", "e2e_request_latency_seconds_count"} & found.keys()


async def test_a_refusal_for_want_of_room_is_counted_by_either_face(live: Live) -> None:
    engine: Any = live.compose.models["__component__"].engine
    engine.room.rows, engine.room.queue = 1, 0
    first = asyncio.create_task(live.client.post(live.url + RUN[0], json=RUN[1]))
    await live.running()
    for path, body in (RUN, COMPLETION):
        assert (await live.client.post(live.url + path, json=body)).status_code == 429
    assert (await _scrape(live))["request_failure_total"] == {("default", "default", "too_many_requests"): 2}
    first.cancel()
    await live.stopped()


async def test_closing_leaves_the_counts_and_no_engine_to_ask(live: Live) -> None:
    running = asyncio.create_task(live.client.post(live.url + RUN[0], json=RUN[1]))
    await live.running()
    await live.compose.close()
    assert (await running).status_code == 503
    found = await _scrape(live)
    assert found["request_failure_total"] == {("default", "default", "not_ready"): 1}
    assert "num_requests_running" not in found


def test_keys_lock_the_metrics_and_what_is_not_loaded_has_none(locked: str) -> None:
    is_problem(httpx.get(f"{locked}/metrics"), 401)
    answer = httpx.get(f"{locked}/metrics", headers=KEY)
    assert answer.status_code == 200
    assert "# TYPE model_compose:num_requests_running gauge" in answer.text
    assert samples(answer.text) == {}


def test_the_document_describes_the_route(fresh: str) -> None:
    described = httpx.get(f"{fresh}/openapi.json").json()["paths"]["/metrics"]["get"]
    assert described["responses"]["200"]["content"] == {"text/plain": {"schema": {"type": "string"}}}


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        (Blend({"a": 1.0}, "default"), "default"), (Blend({}, "calm"), "calm"), (Blend({"a": 1.0}, "a"), "a"),
        (Blend({"a": 0.3, "b": 0.0}), "a"), (Blend({"a": 0.0}), "base"), (Blend({"a": 1.0, "b": 1.0}), "custom"),
        (Blend({"a": 1.0, "b": 1.0}, "somebody's own"), "custom"), (Blend({"unknown": 1.0}), "custom"),
    ],
)  # fmt: skip
def test_no_request_can_make_a_label_of_its_own(blend: Blend, expected: str) -> None:
    assert label(blend, Blends(("a", "b"), {"calm": Blend({}, "calm")}, Blend({"a": 1.0}, "default"))) == expected


def test_a_client_that_leaves_after_the_last_chunk_has_a_completed_request() -> None:
    metrics = Metrics()
    with (
        suppress(GeneratorExit),
        Meter(metrics, "default").measure(Request("x", Blend()), Blends((), {}, Blend())) as one,
    ):
        one.see(Chunk(0, "x", "stop", usage=Usage(1, 1)))
        raise GeneratorExit
    found = samples(metrics.text().decode())
    assert sum(found["request_success_total"].values()) == 1
    assert not found.get("request_failure_total")
