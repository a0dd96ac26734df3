"""YAML text -> nodes, which know their file and line. Knows YAML and nothing of what the keys mean.

Plain data has forgotten where it came from; nodes have not, so files are read and merged as nodes and every later error can
say where its cause stands.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from model_compose.errors import ConfigError

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Keys = tuple[str | int, ...]
"""Where something stands in a file: keys of mappings, indices of lists."""

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("map", "seq", "str", "null", "bool", "int", "float")}
# YAML types these too, but to the dialect they are text.
_TEXT_TAGS = {f"{_TAG}{name}" for name in ("timestamp", "value", "merge")}


def compose(path: Path, name: str) -> MappingNode:
    """One file's nodes, with `<<` spread out and every node marked with its file. Raises ConfigError.

    name: what messages call the file.
    """
    text = _read(path, name)
    loader = Loader(text)
    try:
        node: Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        raise ConfigError(f"{name}:{line + 1}: invalid YAML: {_yaml_problem(error, text, line)}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") if isinstance(error.position, int) else 0
        raise ConfigError(
            f"{name}:{line + 1}: a character (code {_code(error.character)}) cannot stand in YAML"
        ) from None
    finally:
        loader.dispose()
    if node is None:
        raise ConfigError(f"{name}: the file is empty; it needs at least a component, see `model-compose schema`")
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: expected a mapping with component, workflow, controller")
    problems: list[str] = []
    _prepare(node, name, set(), set(), problems)
    if problems:
        raise ConfigError(*problems)
    return node


def _code(character: Any) -> str:
    return f"{character if isinstance(character, int) else ord(character):#04x}"


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None


def _yaml_problem(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    """What YAML's parser says, with the remedy for the mistakes that this dialect invites."""
    problem = (error.problem or error.context or "it cannot be parsed").removeprefix("but ")
    lines = text.splitlines()
    near = "\n".join(lines[max(0, line - 1) : line + 1])
    if "another document" in problem:
        return "a second document starts here (---); one file holds one"
    if "\t" in near:
        return f"{problem}; a tab cannot indent YAML, use spaces"
    if "${" in near and "{" in near.replace("${", ""):
        return f'{problem}; inside {{…}} an expression stands in quotes: {{generated: "${{output}}"}}'
    return problem


def _prepare(node: Node, name: str, above: set[int], done: set[int], problems: list[str]) -> None:
    """Marks the node and those below with their file, spreads `<<`, and collects what is wrong with keys and tags."""
    node.file = name  # type: ignore[attr-defined]  # the marks of libyaml's loader do not carry it
    if id(node) in above:
        raise ConfigError(f"{at(node)}: an anchor cannot hold itself")
    if id(node) in done:
        return
    done.add(id(node))
    if node.tag not in _PLAIN_TAGS | _TEXT_TAGS:
        problems.append(
            f"{at(node)}: the tag {node.tag.replace(_TAG, '!!')} is not supported; write the value without it"
        )
    children = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
    for child in children if isinstance(node, MappingNode | SequenceNode) else ():
        _prepare(child, name, above | {id(node)}, done, problems)
    if isinstance(node, MappingNode):
        node.value = _spread(node, problems)


def _spread(node: MappingNode, problems: list[str]) -> list[tuple[Node, Node]]:
    """The mapping's entries: its own, and those that `<<` brings in and it has not itself."""
    own: list[tuple[Node, Node]] = []
    brought: list[tuple[Node, Node]] = []
    names: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            problems.append(f"{at(key)}: a key must be text")
        elif key.tag == _MERGE:
            sources = value.value if isinstance(value, SequenceNode) else [value]
            if all(isinstance(source, MappingNode) for source in sources):
                brought += [entry for source in sources for entry in source.value]
            else:
                problems.append(f"{at(key)}: '<<' takes a mapping or a list of mappings")
        elif key.value in names:
            problems.append(f"{at(key)}: the key '{key.value}' stands here a second time")
        else:
            names.add(key.value)
            own.append((key, value))
    for key, value in brought:
        if key.value not in names:
            names.add(key.value)
            own.append((key, value))
    return own


def merge(base: Node, over: Node) -> Node:
    """Mappings merge deeply; scalars and lists are replaced by the later file's."""
    if not (isinstance(base, MappingNode) and isinstance(over, MappingNode)):
        return over
    entries = {key.value: (key, value) for key, value in base.value}
    for key, value in over.value:
        entries[key.value] = (key, merge(entries[key.value][1], value) if key.value in entries else value)
    # A new node: an anchored one may stand in other places too.
    merged = MappingNode(base.tag, list(entries.values()), base.start_mark, base.end_mark)
    merged.file = base.file  # type: ignore[attr-defined]
    return merged


def typed(node: ScalarNode, text: str) -> Any:
    """The value of a scalar that holds `text` by now. Plain text is typed as YAML types it; quoted text stays text.

    Raises ValueError where an explicit tag does not fit.
    """
    if text == node.value:
        tag = node.tag
    else:
        tag = yaml.resolver.Resolver().resolve(ScalarNode, text, (not node.style, bool(node.style)))
    if tag in _TEXT_TAGS:
        return text
    return yaml.SafeLoader("").construct_object(ScalarNode(tag, text, node.start_mark, node.end_mark))


def child(node: Node | None, part: str | int) -> Node | None:
    """What stands under a key or an index."""
    if isinstance(node, MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        found: Node = node.value[part]
        return found
    return None


def keys(node: Node | None) -> list[Node]:
    """The keys of a mapping, as nodes."""
    return [key for key, _ in node.value] if isinstance(node, MappingNode) else []


def below(node: Node) -> Iterator[Node]:
    """The node and all that is in it, keys included."""
    yield node
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield from below(value)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            yield from below(item)


def at(node: Node) -> str:
    """ "file:line" of a node."""
    file: str = node.file  # type: ignore[attr-defined]
    return f"{file}:{node.start_mark.line + 1}"
