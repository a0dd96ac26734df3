"""Which slot of llama-server a text has, and which blend's turn it is. Knows nothing of requests.

llama-server computes the texts of one blend together, and those of others only once none of it is left: another blend might
wait for ever. So a text asks for a turn for every few tokens, and the blend that waits longest is next.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from model_compose.engines.prompts import common


@dataclass
class Slot:
    """A row of keys and values in the server: of `tokens` under the blend `identity`, "" for what nobody knows."""

    number: int
    identity: str = ""
    tokens: list[int] = field(default_factory=list)


class Slots:
    """Those of one server. Belongs to the event loop."""

    def __init__(self, count: int) -> None:
        self._all = [Slot(number) for number in range(count)]
        self._free = list(self._all)  # the least recently used first
        self._any_free = asyncio.Semaphore(count)
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._turn, self._computing = "", 0

    @property
    def used(self) -> list[Slot]:
        """Those that a text has."""
        return [slot for slot in self._all if slot not in self._free]

    def forget(self) -> None:
        """The server has been started again, and its slots are empty."""
        for slot in self._all:
            slot.identity = ""

    @asynccontextmanager
    async def take(self, identity: str, tokens: Collection[int]) -> AsyncGenerator[Slot]:
        """A slot for a text: of the free ones that which starts most alike under the same blend."""

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
        """Waits until no other blend computes and those that came before have had their turn."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((identity, mine))
        self._admit()
        try:
            await mine
            yield
        finally:
            self._computing -= not mine.cancelled()  # one that is cancelled in between has had its turn
            self._admit()

    def _admit(self) -> None:
        """All texts of the blend that waits longest, once no other computes: together they share a batch."""
        self._waiting = [each for each in self._waiting if not each[1].cancelled()]
        while self._waiting and (not self._computing or self._waiting[0][0] == self._turn):
            self._turn = self._waiting[0][0]
            for _, turn in [each for each in self._waiting if each[0] == self._turn]:
                turn.set_result(None)
                self._computing += 1
            self._waiting = [each for each in self._waiting if each[0] != self._turn]
