"""Progress of long work (downloads, loading), reported by a callable so that the work knows no bars and no servers."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far one piece of work has come. `total` is None while it is unknown; `unit` is "B" for bytes, else a noun."""

    what: str
    done: int = 0
    total: int | None = None
    unit: str = "B"


Report = Callable[[Progress], None]
"""Called from any thread, often; must be quick and never raise."""


def silent(_: Progress) -> None:
    """The report that tells nobody."""
