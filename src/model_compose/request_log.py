"""What the log says of requests: the id on each line, and what is known at the end. Knows nothing of HTTP.

The request that a task works for is in a context variable, which asyncio hands on to the tasks that it starts.
"""

import logging
from contextvars import ContextVar
from dataclasses import dataclass, field

REQUEST_FORMAT = "%(asctime)s %(levelname)-8s %(request)s%(message)s"


@dataclass
class Ongoing:
    """A request that is being served. blends: the labels of what answered it, as in the metrics."""

    id: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    blends: list[str] = field(default_factory=list)


ONGOING: ContextVar[Ongoing | None] = ContextVar("ongoing", default=None)


def tell(prompt_tokens: int, completion_tokens: int, blend: str) -> None:
    """Notes a completed generation for the line at the request's end. Does nothing outside of a request."""
    if ongoing := ONGOING.get():
        ongoing.prompt_tokens += prompt_tokens
        ongoing.completion_tokens += completion_tokens
        ongoing.blends.append(blend)


class RequestFilter(logging.Filter):
    """Gives each record the `request` that REQUEST_FORMAT shows: the id in brackets, or nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        ongoing = ONGOING.get()
        record.request = f"[{ongoing.id}] " if ongoing else ""
        return True
