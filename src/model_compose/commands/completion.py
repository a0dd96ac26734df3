"""Values for the shell's completion, read from the YAML files as they are, without checking them.

The shell runs these while a person types. So they import nothing heavy, and whatever goes wrong means that there is nothing
to propose.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from model_compose.errors import ConfigError

if TYPE_CHECKING:
    from yaml.nodes import Node


def blends(context: typer.Context, incomplete: str) -> list[str]:
    """The names of blends and adapters."""
    found = []
    for component in _items(context, "component"):
        found += _names(component, "blends")
        found += [name for adapter in _list(component, "peft_adapters") if (name := _text(adapter, "name"))]
    return _matching(found, incomplete)


def adapters(context: typer.Context, incomplete: str) -> list[str]:
    """The names of adapters."""
    named = [_text(each, "name") for part in _items(context, "component") for each in _list(part, "peft_adapters")]
    return _matching(filter(None, named), incomplete)


def workflows(context: typer.Context, incomplete: str) -> list[str]:
    """The ids of workflows."""
    return _matching(filter(None, (_text(each, "id") for each in _items(context, "workflow"))), incomplete)


def components(context: typer.Context, incomplete: str) -> list[str]:
    """The ids of components."""
    return _matching(filter(None, (_text(each, "id") for each in _items(context, "component"))), incomplete)


def templates(incomplete: str) -> list[str]:
    """The templates of `init`."""
    from model_compose.templates import names

    return _matching(names(), incomplete)


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]


def _items(context: typer.Context, kind: str) -> "Iterator[Node]":
    """What stands under `component` or in `components` of the files that the command line names so far."""
    from model_compose.nodes import child

    root = _root([*_files(context.parent), *_files(context)])
    if (one := child(root, kind)) is not None:
        yield one
    yield from _list(root, f"{kind}s")


def _files(context: Any) -> list[Path]:
    return [] if context is None else [*(context.params.get("files") or ())]


def _root(files: list[Path]) -> "Node | None":
    """The files, merged."""
    from model_compose.nodes import FILE_NAMES, compose, merge

    files = files or [Path(name) for name in FILE_NAMES if Path(name).is_file()][:1]
    root: Node | None = None
    try:
        for path in files:
            node = compose(path, path.name)
            root = node if root is None else merge(root, node)
    except ConfigError:
        return None
    return root


def _list(node: "Node | None", key: str) -> "list[Node]":
    from yaml.nodes import SequenceNode

    from model_compose.nodes import child

    found = child(node, key)
    return found.value if isinstance(found, SequenceNode) else []


def _names(node: "Node", key: str) -> list[str]:
    """The keys of the mapping there."""
    from yaml.nodes import MappingNode

    from model_compose.nodes import child

    found = child(node, key)
    return [name.value for name, _ in found.value] if isinstance(found, MappingNode) else []


def _text(node: "Node", key: str) -> str:
    from yaml.nodes import ScalarNode

    from model_compose.nodes import child

    found = child(node, key)
    return found.value if isinstance(found, ScalarNode) else ""
