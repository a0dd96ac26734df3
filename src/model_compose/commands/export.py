"""`model-compose export`: writes a blend as files."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model_compose.commands.options import (
    EnvFiles,
    EnvPairs,
    Files,
    Verbose,
    blend_option,
    component_option,
    load_files,
    log_to_stderr,
    parse_blend,
)
from model_compose.errors import InputError

if TYPE_CHECKING:
    from model_compose.engines.options import Precision


def export(
    format: Annotated[str, typer.Option("--format", metavar="peft|merged|gguf|gguf-merged", help="What to write")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER|FILE.gguf", help="Where to write it; nothing is overwritten"),
    ],
    component: Annotated[str | None, component_option("The model, where the file has several")] = None,
    blend: Annotated[
        str | None, blend_option("The blend: its name, or weights. Default: the file's own weights")
    ] = None,
    precision: Annotated[
        str,
        typer.Option("--precision", metavar="DTYPE", help="float32, float16 or bfloat16; auto keeps the files' own"),
    ] = "auto",
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="Largest file of --format merged. Default: 5GB")
    ] = None,
    files: Files = None,
    env_files: EnvFiles = None,
    env: EnvPairs = None,
    verbose: Verbose = False,
) -> None:
    """Write a blend as a PEFT adapter, merged model or GGUF file."""
    from model_compose.export import Order
    from model_compose.export import export as write
    from model_compose.terminal import bars

    order = Order(format, output, component, parse_blend(blend), _precision(precision), _size(shard_size))
    loaded = load_files(files, env_files, env)
    log_to_stderr(verbose, level=logging.WARNING)
    with bars() as report:
        write(loaded, order, report)
    print(output)


def _precision(given: str) -> "Precision":
    from pydantic import TypeAdapter, ValidationError

    from model_compose.engines.options import Precision

    try:
        found: Precision = TypeAdapter(Precision).validate_python(given)
    except ValidationError:
        raise InputError(f"--precision: unknown '{given}'; known: auto, float32, float16, bfloat16") from None
    return found


def _size(given: str | None) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if given is None:
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError:
        size = 0
    if size <= 0:
        raise InputError(f"--shard-size: '{given}' is not a size; examples: 5GB, 500MB")
    return size
