"""What a file says of the servers that show a Compose. Needs no FastAPI."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr
from pydantic_core import PydanticCustomError

from model_compose.schema import Options, Secret, SecretText, shown

DEFAULT_MAX_BODY = 10 << 20
DEFAULT_MAX_TASKS_SIZE = 256 << 20
NO_KEY = "the API key would be missing, so the server refuses to start"


def _listed(value: Any) -> Any:
    """One value, a comma-separated string, or a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _keys(value: Any) -> Any:
    """API keys fail closed: a list that was given but holds no usable key is an error, not an open door."""
    keys = _listed(value)
    usable = isinstance(keys, list | tuple) and keys and all(_is_key(key) for key in keys)
    if not usable:  # null too: an empty `api_keys:` is a slip, not a wish for an open server
        raise PydanticCustomError(
            "api_keys", "api_keys must be a list of strings of visible ASCII characters (usually ${env.…})"
        )
    return keys


def _is_key(key: Any) -> bool:
    """What an Authorization header can carry."""
    return isinstance(key, str) and key.isascii() and key.isprintable() and bool(key) and " " not in key


def _hosts(value: Any) -> Any:
    """Host names as a Host header has them, in lower case."""
    names = _listed(value)
    for name in names if isinstance(names, list | tuple) else ():
        if not isinstance(name, str) or not re.fullmatch(r"\*|(\*\.)?[\w.-]+|[0-9a-fA-F:]+", name, re.ASCII):
            raise PydanticCustomError(
                "allowed_hosts",
                "allowed_hosts takes names without http:// and port (chat.example.com, *.example.com or *), not {name}",
                {"name": shown(name)},
            )
    return [name.lower().removesuffix(".") for name in names] if isinstance(names, list | tuple) else names


def _prefix(value: Any) -> Any:
    """ "/api/" and "api" are "/api"; "/" is ""."""
    if not isinstance(value, str):
        return value
    if value.strip("/").partition("/")[0] == "v1":
        raise PydanticCustomError("base_path", "base_path cannot be /v1, where OpenAI's API stands; choose another one")
    return f"/{value.strip('/')}".rstrip("/")


AllowedHosts = Annotated[tuple[str, ...], BeforeValidator(_hosts)]
ALLOWED_HOSTS = (
    "Host names that clients may use for this server besides its own addresses and names, such as the name of a proxy; "
    "*.example.com and * are understood"
)


class HttpServerOptions(Options):
    """`type: http-server`: workflows under base_path, OpenAI's API under /v1."""

    later: ClassVar[Mapping[str, Any]] = {"websocket": False}
    type: Literal["http-server"] = Field(default="http-server", description="The kind of server")
    host: str = Field(
        default="127.0.0.1", description="The address to listen on; 0.0.0.0 listens on all of the machine's addresses"
    )
    port: int = Field(default=8080, ge=0, le=65535, description="The port; 0 takes a free one")
    base_path: Annotated[str, BeforeValidator(_prefix)] = Field(
        default="/api", description="The path under which the workflow API stands; /v1 and /metrics stay at the root"
    )
    origins: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        default=(),
        description="Origins (https://example.com) whose pages may call this server from a browser (CORS); none by default",
    )
    allowed_hosts: AllowedHosts = Field(default=(), description=ALLOWED_HOSTS)
    api_keys: Annotated[tuple[SecretStr, ...] | None, BeforeValidator(_keys), Secret(danger=NO_KEY)] = Field(
        default=None,
        description="Keys that clients must send as `Authorization: Bearer KEY`; only the health needs none. A list, or "
        "text with commas. An empty one is an error, so that a missing variable opens no door",
    )
    max_body_size: int = Field(default=DEFAULT_MAX_BODY, ge=1, description="Largest request body, in bytes")
    max_tasks_size: ByteSize = Field(
        default=ByteSize(DEFAULT_MAX_TASKS_SIZE),
        ge=1,
        description="Memory for the inputs of running tasks, beyond which a run is answered 429. As much again keeps the "
        "answers of finished tasks, of which the oldest are dropped",
    )
    max_connections: int | None = Field(
        default=None, ge=1, description="Connections at once; if unset, what the limit on open files allows"
    )
    max_connections_per_client: int | None = Field(
        default=None, ge=1, description="Connections at once from one address; if unset, half of all"
    )
    callback_private_hosts: bool = Field(
        default=False, description="Let callback_url reach private and loopback addresses"
    )
    callback_secret: SecretText | None = Field(
        default=None, description="The secret that signs callbacks (HMAC-SHA256)"
    )


class WebuiOptions(Options):
    """The web page. Files of the dialect say `driver: gradio`; the page that they get is our own."""

    driver: Literal["gradio"] = Field(default="gradio", description="Has no effect: every file gets the same page")
    host: str = Field(
        default="127.0.0.1", description="The address to listen on; 0.0.0.0 listens on all of the machine's addresses"
    )
    port: int = Field(default=8081, ge=0, le=65535, description="The port; 0 takes a free one")
    allowed_hosts: AllowedHosts = Field(default=(), description=ALLOWED_HOSTS)
