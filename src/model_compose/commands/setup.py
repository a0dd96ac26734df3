"""`model-compose setup`: environments for engines that pin libraries of their own."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from model_compose.errors import InputError


def setup(
    driver: Annotated[str, typer.Argument(metavar="DRIVER", help="vllm")],
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--cpu", help="The build; by what the machine has if left out")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Where, instead of where the driver looks for it")
    ] = None,
) -> None:
    """Install an engine that needs an environment of its own."""
    from model_compose import environments

    if driver not in environments.RECIPES:
        raise InputError(
            f"'{driver}' needs no environment of its own; those that do: {', '.join(environments.RECIPES)}"
        )
    recipe = environments.RECIPES[driver](gpu=environments.has_gpu() if gpu is None else gpu)
    where = folder.absolute() if folder else environments.environment_folder(driver)
    print(environments.make(where, recipe, lambda step: print(step, file=sys.stderr)))
