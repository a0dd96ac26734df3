"""Options that several commands share, and what they mean: files, variables, the log."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_compose.errors import InputError
from model_compose.request_log import RequestFilter

if TYPE_CHECKING:
    from model_compose.loading import ComposeFile

Files = Annotated[
    list[Path] | None,
    typer.Option("--file", "-f", metavar="FILE", help="YAML file; repeatable, later ones win (model-compose.yml)"),
]
EnvFiles = Annotated[
    list[Path] | None, typer.Option("--env-file", metavar="FILE", help="File of NAME=VALUE lines (.env); repeatable")
]
EnvPairs = Annotated[
    list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="One variable; repeatable")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More in the log, and tracebacks")]

BLEND_FORMS = "NAME|JSON|A=0.7,B=0.8"
"""What --blend takes; `parse_blend` reads it."""

global_files: list[Path] = []
"""What -f named before the command."""


def all_files(files: list[Path] | None) -> list[Path]:
    return [*global_files, *(files or [])]


def load_files(files: list[Path] | None, env_files: list[Path] | None, env: list[str] | None) -> "ComposeFile":
    from model_compose.loading import environment, find_files, load

    found = find_files(all_files(files))
    return load(found, environment(env_files or (), env or ()))


def parse_json(text: str, option: str, example: str) -> Any:
    """Raises InputError that names the option and shows the example."""
    from model_compose.expressions import strict_json

    try:
        return strict_json(text)
    except ValueError as error:
        raise InputError(f"{option} is not valid JSON: {error}; example: '{example}'") from None


def parse_blend(given: str | None) -> Any:
    """A name as it is; JSON, or a=0.7,b=0.8, as a mapping. Raises InputError."""
    if not given:
        return None
    if given.lstrip().startswith(("{", "[")):
        return parse_json(given, "--blend", '{"alpaca": 0.7}')
    if "=" not in given:
        return given
    weights: dict[str, str] = {}
    for pair in given.split(","):
        name, equals, weight = pair.rpartition("=")
        if not equals or not name.strip() or not weight.strip():
            raise InputError(f"--blend: '{pair}' is not NAME=WEIGHT; example: --blend alpaca=0.7,pirate=0.8")
        if name.strip() in weights:
            raise InputError(f"--blend: '{name.strip()}' has two weights; leave one out")
        weights[name.strip()] = weight.strip()
    return weights


def log_to_stderr(
    verbose: bool,
    level: int = logging.INFO,
    format: str = "%(levelname)-8s %(message)s",
    kept_in: Path | None = None,
) -> None:
    """kept_in: the file that standard error goes to in a detached service."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if kept_in is not None:
        from model_compose.running import ServiceLog

        handler = ServiceLog(kept_in)
    handler.addFilter(RequestFilter())
    logging.basicConfig(level=logging.WARNING, format=format, handlers=[handler])
    logging.getLogger("model_compose").setLevel(logging.DEBUG if verbose else level)
