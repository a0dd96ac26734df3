"""The metrics that /metrics exports, in Prometheus' text format and under vLLM's names. Each Compose has one `Metrics`.

Requests are counted while their chunks pass. Engines are asked for their own figures when Prometheus scrapes. This module
knows nothing of HTTP. It imports prometheus_client, which takes long; so import it inside the function that needs it.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from model_compose.engines import Engine, Stats
from model_compose.errors import Cancelled, ComposeError
from model_compose.generation import Chunk, Finish, Request, Usage
from model_compose.lora.blend import Blend, Blends
from model_compose.request_log import tell

PREFIX = "model_compose:"
REQUEST = ("component", "blend")
MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# vLLM's bounds, in seconds, so that dashboards made for vLLM work here too.
TO_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

Family = type[GaugeMetricFamily] | type[CounterMetricFamily]
OF_ENGINES: tuple[tuple[Family, str, str, Callable[[Stats], float | None]], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Texts being computed", lambda stats: stats.running),
    (
        GaugeMetricFamily, "num_requests_waiting", "Texts that wait for the engine, and runs whose text is not there yet",
        lambda stats: stats.waiting,
    ),
    (
        GaugeMetricFamily, "kv_cache_usage_perc",
        "Share of the KV cache that running texts hold, 0 to 1; the prefix cache gives way to them and is not counted",
        lambda stats: stats.kv_cache_used / stats.kv_cache_total,
    ),
    (
        GaugeMetricFamily, "prefix_cache_usage_perc",
        "Share of the KV cache that the prefix cache holds in addition, 0 to 1; texts may take all of it",
        lambda stats: None if stats.kv_cache_prefixes is None else stats.kv_cache_prefixes / stats.kv_cache_total,
    ),
    (GaugeMetricFamily, "kv_cache_bytes", "Size of the KV cache", lambda stats: stats.kv_cache_total),
    (GaugeMetricFamily, "num_adapters_loaded", "LoRA adapters in memory", lambda stats: stats.adapters),
    (
        CounterMetricFamily, "prefix_cache_queries", "Prompt tokens looked for in the prefix cache",
        lambda stats: stats.prefix_queries,
    ),
    (
        CounterMetricFamily, "prefix_cache_hits", "Prompt tokens found in the prefix cache",
        lambda stats: stats.prefix_hits,
    ),
    (
        CounterMetricFamily, "num_preemptions", "Texts put back into the queue because the KV cache had no room",
        lambda stats: stats.preemptions,
    ),
)  # fmt: skip
"""Kind, name, description, and the function that reads the value (None if the engine does not know it). Each has the label
component."""


class Metrics:
    """The counters and histograms of one Compose, in a registry of its own."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of completed requests")
        self.generation_tokens = self._counter("generation_tokens", "Tokens made for completed requests")
        self.successes = self._counter(
            "request_success", "Completed requests; length where any of their texts was cut", "finished_reason"
        )
        self.failures = self._counter(
            "request_failure", "Requests that ended with an error, or with their client (cancelled)", "error"
        )
        self.to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival at the component to its first text", TO_FIRST
        )
        self.per_output_token = self._histogram(
            "time_per_output_token_seconds",
            "Between a text's tokens after the first: a mean for each request",
            PER_TOKEN,
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival at the component to its end, if completed", WHOLE
        )

    def watch(self, component: str, engine: Engine) -> "Meter":
        """Includes this engine from now on. Returns what counts its requests. component: its public name."""
        self._engines[component] = engine
        return Meter(self, component)

    def text(self) -> bytes:
        """Everything as of now, of MEDIA_TYPE. May be called from any thread."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engines' figures, which the registry asks for at each scrape. An engine that is not loaded has none."""
        known = [(id, stats) for id, engine in self._engines.items() if (stats := engine.stats()) is not None]
        for kind, name, meaning, read in OF_ENGINES:
            family = kind(PREFIX + name, meaning, labels=("component",))
            for component, stats in known:
                if (value := read(stats)) is not None:
                    family.add_metric((component,), value)
            yield family

    def families(self) -> Iterator[Any]:
        """Every metric with its samples as of now, as prometheus_client has them."""
        yield from self._registry.collect()

    def _counter(self, name: str, meaning: str, *more: str) -> Counter:
        return Counter(PREFIX + name, meaning, (*REQUEST, *more), registry=self._registry)

    def _histogram(self, name: str, meaning: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, meaning, REQUEST, registry=self._registry, buckets=bounds)


@dataclass(frozen=True)
class Meter:
    """Counts the requests to one component. component: its public id."""

    metrics: Metrics
    component: str

    @contextmanager
    def measure(self, request: Request, blends: Blends) -> Iterator["Measured"]:
        """Counts one request. Show its chunks to the result's `see`. The request counts as completed once `see` gets its
        last chunk; otherwise it counts, at the end of the block, with the error that ended it."""
        measured = Measured(self.metrics, (self.component, label(request.blend, blends)), request)
        try:
            yield measured
        except BaseException as error:  # closing and cancelling a generator raise here too
            if not measured.completed:
                self.metrics.failures.labels(*measured.labels, _code(error)).inc()
            raise

    def refuse(self, blend: Blend, blends: Blends, error: ComposeError) -> None:
        """Counts a request that was refused before it began."""
        self.metrics.failures.labels(self.component, label(blend, blends), error.code).inc()


class Measured:
    """One request on its way. labels: its component and its blend."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str], request: Request) -> None:
        self.labels, self.completed = labels, False
        self._metrics, self._texts = metrics, request.sampling.num_return_sequences
        self._start, self._first = time.perf_counter(), 0.0
        self._finishes: set[Finish | None] = set()

    def see(self, chunk: Chunk) -> None:
        """Takes note of the request's next chunk, before it is passed on."""
        if not self._first:
            self._first = time.perf_counter()
            self._metrics.to_first_token.labels(*self.labels).observe(self._first - self._start)
        self._finishes.add(chunk.finish)
        if chunk.usage:
            self.completed = True
            self._complete(chunk.usage)

    def _complete(self, usage: Usage) -> None:
        metrics, labels, end = self._metrics, self.labels, time.perf_counter()
        tell(usage.prompt_tokens, usage.completion_tokens, blend=labels[1])
        metrics.prompt_tokens.labels(*labels).inc(usage.prompt_tokens)
        metrics.generation_tokens.labels(*labels).inc(usage.completion_tokens)
        metrics.successes.labels(*labels, "length" if "length" in self._finishes else "stop").inc()
        metrics.whole.labels(*labels).observe(end - self._start)
        # The texts of one request are made together: each step gives each of them one token.
        steps = usage.completion_tokens / self._texts - 1
        if steps > 0:
            metrics.per_output_token.labels(*labels).observe((end - self._first) / steps)


def label(blend: Blend, blends: Blends) -> str:
    """The label of a blend: its name if the file names it, the adapter's name if it has only one adapter (at any weight),
    `base` if it has none, else `custom`. Weights are not part of labels, so the number of labels is bounded by the file
    and by the adapters that clients may load."""
    if blend.name in ("default", *blends.named):
        return str(blend.name)
    active = list(blend.active)
    if not active:
        return "base"
    return active[0] if len(active) == 1 and active[0] in blends.adapters else "custom"


def _code(error: BaseException) -> str:
    if isinstance(error, GeneratorExit | asyncio.CancelledError):
        return Cancelled().code
    return error.code if isinstance(error, ComposeError) else ComposeError().code
