"""One text in the making on llama-server: a slot for all of it, a turn for every few tokens."""

import random
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import httpx

from model_compose.engines.llamacpp.completion import Ask, LeftOut, Told, distribution, next_tokens
from model_compose.engines.llamacpp.slots import Slot, Slots
from model_compose.engines.served.text import ServedText
from model_compose.errors import NotReady
from model_compose.generation import LEAST_LOGPROB, Chunk, Sampling, TokenLogprob


@dataclass(frozen=True)
class Job:
    """What the texts of one request have in common. weights: of all adapters, in the server's order. eos: the tokens that
    end a text; plain: one of whole characters."""

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
    """Text `index` of a request. cached: how many tokens of its prompt were not computed."""

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
        """To its end. Raises NotReady, InputError, RunError, and httpx's errors where the connection breaks."""
        job, text = self._job, self.text
        async with job.slots.take(job.identity, job.tokens) as slot:
            while text.finish is None:
                async with job.slots.turn(job.identity):
                    if not job.is_up():
                        raise NotReady("llama-server has ended and is being started again; try again in a moment")
                    ask = self._ask(slot)
                    async with aclosing(self._next(ask)) as tokens:
                        async for told in tokens:
                            slot.identity, slot.tokens = job.identity, ask.tokens
                            chunk = await self._take(told, ask)
                            if chunk.text or chunk.logprobs or chunk.finish:
                                emit(chunk)
                            if chunk.finish:
                                break

    def _ask(self, slot: Slot) -> Ask:
        job, made = self._job, self.text.tokens
        reuse = slot.identity == job.identity
        if not reuse:
            slot.identity = ""  # until it is known to hold this blend
        return Ask(
            [*job.tokens, *made], len(made), job.sampling, job.eos, slot.number, job.weights, reuse, job.budget,
            self._seeds.getrandbits(31),
        )  # fmt: skip

    async def _next(self, ask: Ask) -> AsyncGenerator[Told]:
        """As many tokens as a turn has, or fewer. Where a stream leaves one out, the same ones come again without a stream,
        drawn by the same seed, and so do all others of this text."""
        said: deque[int] = deque()
        if self._streams and ask.count > 1:
            try:
                async with aclosing(next_tokens(self._job.client, ask, stream=True)) as items:
                    async for told in items:
                        said.append(told.token)
                        yield told
                return
            except LeftOut as left_out:
                self._begin(left_out.cached)
                self._streams, ask = False, replace(ask, reuse=True)  # the slot holds this blend by now
        async with aclosing(next_tokens(self._job.client, ask, stream=False)) as items:
            async for told in items:
                if not said:
                    yield told
                elif said.popleft() != told.token:  # drawn near a tie; the text goes on behind what has been said
                    return

    def _begin(self, cached: int) -> None:
        if not self.has_begun:
            self.has_begun, self.cached = True, cached

    async def _take(self, told: Told, ask: Ask) -> Chunk:
        self._begin(told.cached)
        text = self.text.push(told.token)
        wanted = self._job.sampling.logprobs is not None and told.token not in self._job.eos
        logprobs = (await self._logprob(told, ask),) if wanted else ()
        return Chunk(self.text.index, text, self.text.finish, logprobs)

    async def _logprob(self, told: Told, ask: Ask) -> TokenLogprob:
        if told.probabilities is None:
            all_of_them = await distribution(
                self._job.client, replace(ask, reuse=True), self._job.plain, self._job.vocabulary
            )
            own, top = all_of_them[told.token], list(all_of_them.items())
        else:
            own = told.probabilities["logprob"]
            top = [(each["id"], each["logprob"]) for each in told.probabilities["top_logprobs"]]
        best = [(token, max(value, LEAST_LOGPROB)) for token, value in top[: self._job.sampling.logprobs]]
        return self.text.logprob(told.token, max(own, LEAST_LOGPROB), best)
