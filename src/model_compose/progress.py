"""Progress of long work: downloads, loading. The work calls a `Report`, and so need not know of bars or servers."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far one piece of work has come. `total` is None while it is unknown. `unit` is "B" for bytes, else a noun."""

    what: str
    done: int = 0
    total: int | None = None
    unit: str = "B"


Report = Callable[[Progress], None]
"""Takes the progress. It is called often and from any thread, so it must be quick and never raise."""


def silent(_: Progress) -> None:
    """A report that shows nothing."""
