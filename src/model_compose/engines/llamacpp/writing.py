"""Generates one text on llama-server: it keeps a slot for the whole text, and waits for a turn every few tokens."""

import random
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import httpx

from model_compose.engines.llamacpp.completion import Ask, LeftOut, Sampled, distribution, next_tokens
from model_compose.engines.llamacpp.slots import Slot, Slots
from model_compose.engines.served.text import ServedText
from model_compose.errors import NotReady
from model_compose.generation import LEAST_LOGPROB, Chunk, Sampling, TokenLogprob


@dataclass(frozen=True)
class Job:
    """What the texts of one request have in common. weights: the weights of all adapters, in the server's order.
    budget: the most tokens of a text. eos: the tokens that end a text. plain: a token of complete characters."""

    client: httpx.AsyncClient
    slots: Slots
    is_up: Callable[[], bool]
    tokenizer: Any
    vocabulary: int
    tokens: list[int]
    sampling: Sampling
    identity: str
    weights: tuple[float, ...]
    budget: int
    eos: tuple[int, ...]
    plain: int


class Writing:
    """Text `index` of a request. cached: how many tokens of its prompt came from the server's cache."""

    def __init__(self, job: Job, index: int) -> None:
        self.has_begun, self.cached = False, 0
        self._job = job
        self.text = ServedText(index, job.tokenizer, job.tokens, job.sampling, job.budget, job.eos)
        self._streams = True
        seed = job.sampling.seed
        self._seeds = random.Random(None if seed is None else seed + index)

    @property
    def prompt(self) -> list[int]:
        return self._job.tokens

    async def run(self, emit: Callable[[Chunk], None]) -> None:
        """Generate the whole text; emit(chunk) is called for each chunk.

        Raises NotReady, InputError or RunError, and httpx's errors if the connection breaks.
        """
        job, text = self._job, self.text
        async with job.slots.take(job.identity, job.tokens) as slot:
            while text.finish is None:
                async with job.slots.turn(job.identity):
                    if not job.is_up():
                        raise NotReady("llama-server has ended and is being started again; try again in a moment")
                    ask = self._ask(slot)
                    async with aclosing(self._next(ask)) as tokens:
                        async for sampled in tokens:
                            slot.identity, slot.tokens = job.identity, ask.tokens
                            chunk = await self._take(sampled, ask)
                            if chunk.text or chunk.logprobs or chunk.finish:
                                emit(chunk)
                            if chunk.finish:
                                break

    def _ask(self, slot: Slot) -> Ask:
        job, made = self._job, self.text.tokens
        reuse = slot.identity == job.identity
        if not reuse:
            slot.identity = ""  # unknown, until an answer shows that the slot holds this blend
        return Ask(
            [*job.tokens, *made], len(made), job.sampling, job.eos, slot.number, job.weights, reuse, job.budget,
            self._seeds.getrandbits(31),
        )  # fmt: skip

    async def _next(self, ask: Ask) -> AsyncGenerator[Sampled]:
        """Yield the tokens of one turn.

        If a stream leaves a token out, we ask for the same tokens again without a stream, with the same seed, and skip
        those that we have already. From then on, this text does not stream.
        """
        streamed: deque[int] = deque()
        if self._streams and ask.count > 1:
            try:
                async with aclosing(next_tokens(self._job.client, ask, stream=True)) as items:
                    async for sampled in items:
                        streamed.append(sampled.token)
                        yield sampled
                return
            except LeftOut as left_out:
                self._begin(left_out.cached)
                self._streams, ask = False, replace(ask, reuse=True)  # now the slot does hold this blend
        async with aclosing(next_tokens(self._job.client, ask, stream=False)) as items:
            async for sampled in items:
                if not streamed:
                    yield sampled
                elif (
                    streamed.popleft() != sampled.token
                ):  # rounding decided a near tie; continue after the streamed tokens
                    return

    def _begin(self, cached: int) -> None:
        if not self.has_begun:
            self.has_begun, self.cached = True, cached

    async def _take(self, sampled: Sampled, ask: Ask) -> Chunk:
        self._begin(sampled.cached)
        text = self.text.push(sampled.token)
        wanted = self._job.sampling.logprobs is not None and sampled.token not in self._job.eos
        logprobs = (await self._logprob(sampled, ask),) if wanted else ()
        return Chunk(self.text.index, text, self.text.finish, logprobs)

    async def _logprob(self, sampled: Sampled, ask: Ask) -> TokenLogprob:
        if sampled.probabilities is None:
            all_of_them = await distribution(
                self._job.client, replace(ask, reuse=True), self._job.plain, self._job.vocabulary
            )
            own, top = all_of_them[sampled.token], list(all_of_them.items())
        else:
            own = sampled.probabilities["logprob"]
            top = [(each["id"], each["logprob"]) for each in sampled.probabilities["top_logprobs"]]
        best = [(token, max(value, LEAST_LOGPROB)) for token, value in top[: self._job.sampling.logprobs]]
        return self.text.logprob(sampled.token, max(own, LEAST_LOGPROB), best)
