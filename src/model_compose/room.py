"""Places in an engine: how many texts may run or wait there, and how many places accepted runs hold.

Knows nothing of engines or HTTP. Only one event loop uses it, so counting needs no lock.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from model_compose.errors import Overloaded


class Room:
    """The room of one engine. rows: texts that run at once. queue: further texts, which may wait.

    texts: how many run or wait, plus one for each place without a text. promised: how many places are without a text.
    """

    def __init__(self, rows: int, queue: int) -> None:
        self.rows, self.queue = rows, queue
        self.texts = self.promised = 0

    def take(self) -> "Place":
        """A place, which the caller must give back. Raises Overloaded if rows and queue are full."""
        if self.texts >= self.rows + self.queue:
            raise Overloaded(
                f"{self.texts} texts run or wait already (max_batch_size {self.rows}, max_queue {self.queue}); "
                "try again in a moment"
            )
        return Place(self)

    @contextmanager
    def hold(self, texts: int, place: "Place | None" = None) -> Iterator[None]:
        """Within the block, `texts` texts run or wait in `place`, or in a place taken for them. Raises Overloaded."""
        own = self.take() if place is None else place
        try:
            with own.hold(texts):
                yield
        finally:
            if place is None:
                own.give_back()


class Place:
    """What one run or request has of a room. It counts as the texts that it holds, and as one text while it holds none.

    All texts of its owner go into it, those of later jobs too. So a run that was let in is not refused later.
    """

    def __init__(self, room: Room) -> None:
        self._room, self._texts, self._kept = room, 0, True
        room.texts += 1
        room.promised += 1

    def give_back(self) -> None:
        """Has no effect the second time."""
        self._become(self._texts, kept=False)

    @contextmanager
    def hold(self, texts: int) -> Iterator[None]:
        """Within the block, the place holds these texts."""
        self._become(self._texts + texts, kept=self._kept)
        try:
            yield
        finally:
            self._become(self._texts - texts, kept=self._kept)

    def _become(self, texts: int, *, kept: bool) -> None:
        room, promised = self._room, self._promised
        room.texts -= self._texts + promised
        room.promised -= promised
        self._texts, self._kept = texts, kept
        room.texts += self._texts + self._promised
        room.promised += self._promised

    @property
    def _promised(self) -> int:
        return int(self._kept and not self._texts)


class Admission:
    """The places of one run, by component: one in every component's room, or none at all. A `with` block gives them back
    at its end."""

    def __init__(self, takes: Mapping[str, Callable[[], Place]]) -> None:
        """takes: for each component, the function that takes a place there. Raises Overloaded."""
        self.places: dict[str, Place] = {}
        try:
            for component, take in takes.items():
                self.places[component] = take()
        except Overloaded:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Has no effect the second time."""
        for place in self.places.values():
            place.give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()
