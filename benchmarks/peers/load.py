"""The client: prompts of a given length, and waves of streaming requests with the times of their tokens."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from tokenizers import Tokenizer

from benchmarks.blend_exactness import ROOT
from benchmarks.peers.systems import System

ANSWER_SECONDS = 900
"""The longest silence before a server is taken for stuck: those that answer one at a time let the others wait."""


@dataclass(frozen=True)
class Query:
    """What a request asks for. row: its number, which tells requests of one wave apart where each has its own weights."""

    row: int
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Answer:
    """Seconds from the request to the first and to the last text. tokens: what the server counted."""

    first: float
    last: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Seconds, over the tokens after the first; NaN for one token."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else float("nan")


@dataclass(frozen=True)
class Wave:
    """Requests that were sent at the same time. seconds: until the last had ended."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds


class Prompts:
    """Texts of a given number of tokens; each starts with a number of its own, so that no cache of prefixes helps."""

    def __init__(self, base: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        lines = (ROOT / "examples" / "quickstart" / "data" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
        self._texts: Iterator[str] = itertools.cycle(json.loads(line)["text"] for line in lines)
        self._numbers = iter(random.Random(0).sample(range(100_000, 1_000_000), 100_000))
        self.eos = self._token_id(json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"])

    def take(self, tokens: int) -> str:
        """The next text of so many tokens."""
        while True:
            text = f"{next(self._numbers)} "
            while len(ids := self._tokenizer.encode(text).ids) < tokens:
                text += next(self._texts) + " "
            text = self._tokenizer.decode(ids[:tokens])
            if len(self._tokenizer.encode(text).ids) == tokens:  # the cut may have made another split of the last word
                return text

    def _token_id(self, token: str) -> int:
        id: int | None = self._tokenizer.token_to_id(token)
        if id is None:
            raise ValueError(f"the tokenizer has no token '{token}'")
        return id


def create_client() -> httpx.AsyncClient:
    """No connection is kept: servers close those that have been idle while others were measured."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(10, read=ANSWER_SECONDS)
    return httpx.AsyncClient(limits=limits, timeout=timeout, verify=False, trust_env=False)


async def ask(
    client: httpx.AsyncClient, system: System, blend: str, query: Query, on_first: Callable[[], None] = lambda: None
) -> Answer:
    """One request, greedy. Raises SystemFailed where the answer is an error or ends early."""
    body: dict[str, object] = {"prompt": query.prompt, "max_tokens": query.tokens, "temperature": 0, "stream": True}
    body |= system.body(blend, query.row) | ({"stream_options": {"include_usage": True}} if system.with_usage else {})
    start = time.perf_counter()
    first = last = 0.0
    counted: int | None = None
    finish = None
    try:
        async with client.stream("POST", f"{system.url}/v1/completions", json=body) as response:
            if response.is_error:
                raise system.failure(f"answered {response.status_code}: {(await response.aread()).decode()[:500]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("usage"):
                    counted = event["usage"]["completion_tokens"]
                for choice in event.get("choices", ()):
                    finish = choice.get("finish_reason") or finish
                    if choice.get("text"):
                        last = time.perf_counter() - start
                        if not first:
                            first = last
                            on_first()
    except httpx.HTTPError as error:
        raise system.failure(f"broke off ({type(error).__name__}: {error})") from None
    if counted is None and finish == "length":  # a server that does not count has made all it was asked for
        counted = query.tokens
    if counted != query.tokens:
        raise system.failure(f"made {counted} tokens instead of {query.tokens} (finish_reason {finish})")
    return Answer(first, last, counted)


async def send_wave(client: httpx.AsyncClient, system: System, blend: str, queries: Collection[Query]) -> Wave:
    start = time.perf_counter()
    answers = await asyncio.gather(*(ask(client, system, blend, query) for query in queries))
    return Wave(time.perf_counter() - start, tuple(answers))


async def ask_under_load(
    client: httpx.AsyncClient, system: System, blend: str, others: Collection[Query], late: Query
) -> Answer:
    """The answer to `late`, sent once all the others have their first token and while they go on."""
    decoding = asyncio.Semaphore(0)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(client, system, blend, query, decoding.release)) for query in others]
            for _ in others:
                await decoding.acquire()
            answer = await ask(client, system, blend, late)
            if any(task.done() for task in tasks):
                raise system.failure("ended some of the other answers before the late one; ask for more --tokens")
    except BaseExceptionGroup as group_of_failures:
        raise group_of_failures.exceptions[0] from None
    return answer
