"""Options that several commands share, and what they mean: files, variables, blends, the log."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from model_compose.commands import completion
from model_compose.errors import InputError
from model_compose.request_log import RequestFilter

if TYPE_CHECKING:
    from model_compose.loading import ComposeFile

FILE_HELP = "YAML file; repeatable, later files win. Default: model-compose.yml in this folder"
Files = Annotated[list[Path] | None, typer.Option("--file", "-f", metavar="FILE", help=FILE_HELP)]
EnvFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--env-file", metavar="FILE", help="File of NAME=VALUE lines for ${env.NAME}; repeatable. Default: .env"
    ),
]
EnvPairs = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="NAME=VALUE", help="One variable for ${env.NAME}; repeatable"),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, and show tracebacks")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]

BLEND_FORMS = "NAME|JSON|A=0.7,B=0.8"
"""The forms of --blend, which `parse_blend` reads."""


def blend_option(help: str) -> Any:
    return typer.Option("--blend", "-b", metavar=BLEND_FORMS, help=help, autocompletion=completion.blends)


def component_option(help: str) -> Any:
    return typer.Option("--component", metavar="ID", help=help, autocompletion=completion.components)


class Group(TyperGroup):
    """Commands whose help wraps the first sentence of each command. typer cuts what is longer than one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx) if not self.commands[name].hidden]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(len(one.help or ""))) for name, one in commands])


global_files: list[Path] = []
"""The files that -f named before the command."""


def all_files(files: list[Path] | None) -> list[Path]:
    """The files named before and after the command, in this order."""
    return [*global_files, *(files or [])]


def load_files(files: list[Path] | None, env_files: list[Path] | None, env: list[str] | None) -> "ComposeFile":
    """Reads and checks the files. Raises ConfigError."""
    from model_compose.loading import environment, find_files, load

    found = find_files(all_files(files))
    return load(found, environment(env_files or (), env or ()))


def check_new_file(path: Path, option: str) -> None:
    """Raises InputError, which names the option, if there can be no file at the path: a folder, or in no folder."""
    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder")
    if not path.parent.is_dir():
        raise InputError(f"{option}: no folder {path.parent}")


def parse_json(text: str, option: str, example: str) -> Any:
    """Raises InputError, which names the option and shows the example."""
    from model_compose.expressions import strict_json

    try:
        return strict_json(text)
    except ValueError as error:
        raise InputError(f"{option} is not valid JSON: {error}; example: '{example}'") from None


def parse_blend(given: str | None) -> Any:
    """A name stays text; JSON and a=0.7,b=0.8 become a mapping. Raises InputError."""
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
    """Starts the log. kept_in: the log file of a service in the background, which then gets standard error too."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if kept_in is not None:
        from model_compose.running import ServiceLog

        handler = ServiceLog(kept_in)
    handler.addFilter(RequestFilter())
    logging.basicConfig(level=logging.WARNING, format=format, handlers=[handler])
    logging.getLogger("model_compose").setLevel(logging.DEBUG if verbose else level)
