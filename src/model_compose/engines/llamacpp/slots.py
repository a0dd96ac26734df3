"""Decides which slot of llama-server a text gets, and which blend has its turn.

llama-server computes the texts of one blend together, and starts with another blend only when none of them is left, so the
other blend might wait forever. Therefore a text asks for a turn every few tokens, and the blend that has waited longest is
next.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from model_compose.engines.prompts import common


@dataclass
class Slot:
    """A row of keys and values in the server. It holds `tokens`, computed with the blend `identity` ("": unknown)."""

    number: int
    identity: str = ""
    tokens: list[int] = field(default_factory=list)


class Slots:
    """The slots of one server. Use it only in the event loop's thread."""

    def __init__(self, count: int) -> None:
        self._all = [Slot(number) for number in range(count)]
        self._free = list(self._all)  # the least recently used first
        self._any_free = asyncio.Semaphore(count)
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._turn, self._computing = "", 0

    @property
    def used(self) -> list[Slot]:
        """The slots that texts are using."""
        return [slot for slot in self._all if slot not in self._free]

    def forget(self) -> None:
        """Forget the slots' content, because the server has been started again."""
        for slot in self._all:
            slot.identity = ""

    @asynccontextmanager
    async def take(self, identity: str, tokens: Collection[int]) -> AsyncGenerator[Slot]:
        """Yield a slot for a text: the free slot of the same blend that has the longest beginning in common with
        `tokens`."""

        def shared(slot: Slot) -> int:
            return common(slot.tokens, tokens) if slot.identity == identity else 0

        async with self._any_free:
            slot = max(self._free, key=shared)
            self._free.remove(slot)
            try:
                yield slot
            finally:
                self._free.append(slot)

    @asynccontextmanager
    async def turn(self, identity: str) -> AsyncGenerator[None]:
        """Wait for the blend's turn: until no other blend computes, and blends that waited longer have had theirs."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((identity, mine))
        self._admit()
        try:
            await mine
            yield
        finally:
            self._computing -= not mine.cancelled()  # a cancelled future had no turn, unless its turn had begun
            self._admit()

    def _admit(self) -> None:
        """Start the turn of the blend that has waited longest, if no other computes. All its waiting texts share a
        batch."""
        self._waiting = [each for each in self._waiting if not each[1].cancelled()]
        while self._waiting and (not self._computing or self._waiting[0][0] == self._turn):
            self._turn = self._waiting[0][0]
            for _, turn in [each for each in self._waiting if each[0] == self._turn]:
                turn.set_result(None)
                self._computing += 1
            self._waiting = [each for each in self._waiting if each[0] != self._turn]
