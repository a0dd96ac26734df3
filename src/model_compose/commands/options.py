"""Options that several commands share, and what they mean: files, variables, the log."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_compose.errors import InputError
from model_compose.request_log import RequestFilter

if TYPE_CHECKING:
    from model_compose.loading import Loaded

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

global_files: list[Path] = []
"""What -f named before the command."""


def all_files(files: list[Path] | None) -> list[Path]:
    return [*global_files, *(files or [])]


def load_files(files: list[Path] | None, env_files: list[Path] | None, env: list[str] | None) -> "Loaded":
    from model_compose.loading import environment, find_files, load

    found = find_files(all_files(files))
    return load(found, environment(env_files or (), env or ()))


def parse_json(text: str, option: str) -> Any:
    """Raises InputError that names the option."""
    from model_compose.expressions import strict_json

    try:
        return strict_json(text)
    except ValueError as error:
        raise InputError(f'{option} is not valid JSON: {error}; example: \'{{"prompt": "Hello"}}\'') from None


def log_to_stderr(verbose: bool, level: int = logging.INFO, format: str = "%(levelname)-8s %(message)s") -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestFilter())
    logging.basicConfig(level=logging.WARNING, format=format, handlers=[handler])
    logging.getLogger("model_compose").setLevel(logging.DEBUG if verbose else level)
