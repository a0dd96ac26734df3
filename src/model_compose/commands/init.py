"""`model-compose init`: a YAML file to start from."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from model_compose import templates
from model_compose.commands import completion
from model_compose.commands.options import check_new_file
from model_compose.errors import InputError
from model_compose.nodes import FILE_NAMES


def init(
    template: Annotated[
        str, typer.Argument(metavar="TEMPLATE", help="What to start from", autocompletion=completion.templates)
    ] = templates.DEFAULT,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write")
    ] = Path(FILE_NAMES[0]),
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists")] = False,
    show: Annotated[bool, typer.Option("--list", "-l", help="List the templates, and write nothing")] = False,
) -> None:  # fmt: skip
    """Write a short YAML file to start from.

    The default template blends two small adapters on a small model, and runs on a laptop at once.
    """
    from model_compose.terminal import write_whole

    if show:
        for name in templates.names():
            print(f"{name:<10}{templates.read(name).summary}")
        return
    chosen = templates.read(template)
    _check_place(output, force=force)
    try:
        copied = _copy_adapters(chosen, output.parent)
        write_whole(output, chosen.text_for(output))
    except OSError as error:
        raise InputError(f"--output: {output} cannot be written ({error.strerror})") from None
    print(output)
    for line in (*copied, "next:", *(f"  {command}" for command in chosen.next_steps(output))):
        print(line, file=sys.stderr)


def _check_place(output: Path, *, force: bool) -> None:
    """Raises InputError where a file would be overwritten or could not be written."""
    check_new_file(output, "--output")
    same = FILE_NAMES if output.name in FILE_NAMES else (output.name,)
    taken = [path for name in same if (path := output.with_name(name)).exists()]
    if taken and not force:
        raise InputError(f"{taken[0]} exists; name another file with --output, or overwrite it with --force")


def _copy_adapters(template: templates.Template, folder: Path) -> list[str]:
    """Copies the adapters that the template names as ./adapters/NAME. What exists is kept. Returns what it did."""
    said = []
    for source in template.adapters:
        target = folder / "adapters" / source.name
        if target.exists():
            said.append(f"{target} exists, so it is kept")
            continue
        target.parent.mkdir(exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        try:
            shutil.copytree(source, part)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        said.append(f"{target} copied")
    return said
