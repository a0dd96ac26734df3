"""`model-compose setup`: Python environments for engines that need other versions of our libraries."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from model_compose.errors import InputError


def setup(
    driver: Annotated[str, typer.Argument(metavar="DRIVER", help="The driver: vllm")],
    gpu: Annotated[
        bool | None,
        typer.Option("--gpu/--cpu", help="Which build to install. Default: by whether there is an NVIDIA card"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Install into DIR, instead of where the driver looks")
    ] = None,
) -> None:
    """Install an engine that needs a Python environment of its own.

    It takes some gigabytes and minutes. stdout gets the path of its Python.
    """
    from model_compose import environments

    if driver not in environments.RECIPES:
        raise InputError(
            f"'{driver}' needs no environment of its own; those that do: {', '.join(environments.RECIPES)}"
        )
    recipe = environments.RECIPES[driver](gpu=environments.has_gpu() if gpu is None else gpu)
    where = folder.absolute() if folder else environments.environment_folder(driver)
    print(environments.make(where, recipe, lambda step: print(step, file=sys.stderr)))
