"""What the log says about requests: the id on each line, and at the end their tokens and blends. Knows nothing of HTTP.

A context variable holds the request that a task works for. asyncio hands it on to the tasks that this task starts.
"""

import logging
from contextvars import ContextVar
from dataclasses import dataclass, field

REQUEST_FORMAT = "%(asctime)s %(levelname)-8s %(request)s%(message)s"


@dataclass
class Ongoing:
    """A request that is being served.

    blends: the blends that answered it, by their labels in the metrics. is_routine: whether only its failure is news, as
    for a file of the page; its line is then logged for debugging.
    """

    id: str
    is_routine: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    blends: list[str] = field(default_factory=list)


ONGOING: ContextVar[Ongoing | None] = ContextVar("ongoing", default=None)


def tell(prompt_tokens: int, completion_tokens: int, blend: str) -> None:
    """Adds a completed generation to the request's last log line. Does nothing outside of a request."""
    if ongoing := ONGOING.get():
        ongoing.prompt_tokens += prompt_tokens
        ongoing.completion_tokens += completion_tokens
        ongoing.blends.append(blend)


class RequestFilter(logging.Filter):
    """Sets each log record's `request`, which REQUEST_FORMAT shows: the id in brackets, or nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        ongoing = ONGOING.get()
        record.request = f"[{ongoing.id}] " if ongoing else ""
        return True
