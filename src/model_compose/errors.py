"""Every class of error that model-compose raises on purpose.

Each class says which HTTP status it becomes, so that servers need no tables. The message is a sentence for a person. It
names the place, the value and the remedy, and never contains a secret or a traceback.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

Keys = tuple[str | int, ...]
"""Where a value stands in a file or a request: the keys of mappings and the indices of lists that lead to it."""


class ComposeError(Exception):
    """The base of all errors raised on purpose. status: the HTTP status. title: the problem's short name.

    at: the keys from the refused value, or from the options that were read, down to the wrong part; () means all of it.
    """

    status = 500
    title = "Internal error"
    at: Keys = ()

    @property
    def code(self) -> str:
        """The machine-readable name: the title in snake case."""
        return self.title.lower().replace(" ", "_")


def reason(error: BaseException) -> str:
    """One line of a library's error about a file that it cannot read.

    When torch refuses a pickle, it suggests weights_only=False, which would execute the pickle. We leave that out.
    """
    text = str(error)
    if found := re.search(r"(?i:unsupported) (?:global: )?GLOBAL ([\w.]+)", text):
        return f"reading it would call {found[1]}, which no tensors need; it may be an attack"
    if "weights_only" in text:
        return "it is damaged, or torch.save did not write it"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


# Before anything runs: the file, the sources, the adapters.


class ConfigError(ComposeError):
    """The YAML is wrong. Each problem is one line that starts with file:line."""

    title = "Invalid configuration"

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PluginError(ConfigError, ValueError):
    """Something that another package registers cannot be used: two have one name, or its module does not import.

    A ValueError too, so that pydantic tells at which line of the file the name stands.
    """

    title = "Plug-in not usable"


class SourceError(ComposeError):
    """Weights are not available: missing, gated, damaged, or no network."""

    title = "Model not available"


class AdapterError(ComposeError):
    """An adapter cannot be applied exactly to this base."""

    title = "Adapter not usable"


class LoadError(ComposeError):
    """The base model cannot be loaded, for instance because memory is too small."""

    title = "Model not loadable"

    def __init__(self, message: str, *, at: Keys = ()) -> None:
        super().__init__(message)
        self.at = at


class AddressInUse(ComposeError):
    """A server cannot listen on its address. port: the port, if a program listens on it already."""

    title = "Address in use"

    def __init__(self, message: str, *, port: int | None = None) -> None:
        super().__init__(message)
        self.port = port


# A request that cannot be served. The 4xx are mistakes of the caller.


@dataclass(frozen=True)
class FieldError:
    """One field of a request and what is wrong with it."""

    field: str
    message: str


class InputError(ComposeError):
    """A request is wrong: `fields` names each field and the allowed values."""

    status = 400
    title = "Invalid request"

    def __init__(
        self, message: str, fields: Collection[FieldError] = (), *, field: str | None = None, at: Keys = ()
    ) -> None:
        super().__init__(message)
        self.fields = tuple(fields) or ((FieldError(field, message),) if field else ())
        self.at = at


class NotFound(ComposeError):
    """A workflow, component, task or model id that does not exist."""

    status = 404
    title = "Not found"


class Unauthorized(ComposeError):
    status = 401
    title = "Unauthorized"


class Forbidden(ComposeError):
    """A web page of another site made the browser send this request, or the file does not allow it."""

    status = 403
    title = "Forbidden"


class Conflict(ComposeError):
    """The thing exists but is in the wrong state for this call."""

    status = 409
    title = "Conflict"


class SlowBody(ComposeError):
    """The request's body arrives too slowly, or not at all."""

    status = 408
    title = "Request timeout"


class PayloadTooLarge(ComposeError):
    status = 413
    title = "Payload too large"


class Misdirected(ComposeError):
    """The request's Host header names another host than this server."""

    status = 421
    title = "Misdirected request"


class Overloaded(ComposeError):
    """Too many requests are waiting already; try again later."""

    status = 429
    title = "Too many requests"


class Crowded(ComposeError):
    """There are too many connections; try again later."""

    status = 503
    title = "Too many connections"


class NotReady(ComposeError):
    """The models are still loading, or the service is shutting down; try again later."""

    status = 503
    title = "Not ready"


# A run that failed.


class RunError(ComposeError):
    """A job failed while it ran. The cause is chained. It goes to the log and never to the client."""

    title = "Run failed"


class Cancelled(ComposeError):
    """A person or program stopped the run."""

    status = 409
    title = "Cancelled"
