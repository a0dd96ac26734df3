"""Reads YAML files into nodes, which know their file and line. Knows YAML, and not what the keys mean.

Plain data does not say where in a file it came from. So we read and merge files as nodes, and every later error can name
the line of its cause.
"""

import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from model_compose.errors import ConfigError, Keys

FILE_NAMES = ("model-compose.yml", "model-compose.yaml")
"""The names of a folder's file, where the user names none. The first one that exists counts."""

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("map", "seq", "str", "null", "bool", "int", "float", "merge")}

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
"""The most values of a file, each alias counted as a copy of its anchor. Ten lines of aliases can stand for more values
than any memory holds."""
MAX_DEPTH = 100
"""How deep mappings and lists may be nested. Python allows about 1,000 nested calls."""


class _Types(yaml.resolver.Resolver):
    """Gives plain text the types of JSON: null, true and false, and decimal numbers with or without an exponent.

    YAML 1.1 has more types and changes what was written: there `no` is false, 012 is 10 and 1:30 is 90. Here these stay
    text, as in YAML 1.2. A field of another type may still accept the text: `streaming: yes` is true.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]  # without those of YAML 1.1


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Types.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


# libyaml's loader if PyYAML was built with it, as it is much faster.
Loader: Any = type("Loader", (_Types, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), {})


def compose(path: Path, name: str) -> MappingNode:
    """Reads one file into nodes. Replaces `<<` by the entries that it brings in and marks every node with its file.

    name: what messages call the file. Raises ConfigError.
    """
    text = _read(path, name)
    loader = Loader(text)
    try:
        if next(
            islice(yaml.parse(text, Loader), MAX_VALUES, None), None
        ):  # composing that many nodes would take 20 times as long
            raise ConfigError(f"{name}: holds more than {MAX_VALUES:,} values")
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
    preparing = _Preparing(name)
    preparing.visit(node, ())
    if preparing.problems:
        raise ConfigError(*preparing.problems)
    return node


def _code(character: Any) -> str:
    return f"{character if isinstance(character, int) else ord(character):#04x}"


def _read(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(
                f"{name}: the file is longer than {MAX_BYTES >> 20} MiB; give a model-compose file, which has a few lines"
            )
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None


def _yaml_problem(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    """What the YAML parser reports. For mistakes that are common in our files, with the remedy."""
    problem = (error.problem or error.context or "it cannot be parsed").removeprefix("but ")
    lines = text.splitlines()
    near = "\n".join(lines[max(0, line - 1) : line + 1])
    if "another document" in problem:
        return "a second document starts here (---); one file holds one"
    if "\t" in near:
        return f"{problem}; a tab cannot indent YAML, use spaces"
    if "${" in near and "{" in near.replace("${", ""):
        return f'{problem}; inside {{…}} an expression stands in quotes: {{generated: "${{output}}"}}'
    if "mapping values are not allowed" in problem:
        return f"{problem}; check the indentation of this line, or quote a value that holds ': '"
    return problem


class _Preparing:
    """Marks nodes with their file, replaces `<<` by its entries, and collects problems of keys and tags.

    Counts how many values the aliases stand for, before any other code follows them. Raises ConfigError for too many.
    """

    def __init__(self, name: str) -> None:
        self.problems: list[str] = []
        self._name = name
        self._extent: dict[int, tuple[int, int]] = {}
        """By the id of a visited node: how many values it holds and how deep they are nested, with aliases as copies."""
        self._brought = 0

    def visit(self, node: Node, above: tuple[int, ...]) -> None:
        """above: the ids of the nodes that contain this one."""
        node.file = self._name  # type: ignore[attr-defined]  # the marks of libyaml's loader do not carry it
        if id(node) in above:
            raise ConfigError(f"{at(node)}: an anchor cannot contain its own alias; remove the alias")
        if id(node) in self._extent:
            return
        if len(above) > MAX_DEPTH:
            raise ConfigError(f"{at(node)}: mappings and lists are nested deeper than {MAX_DEPTH}; nest fewer")
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_TAG, "!!")
            self.problems.append(f"{at(node)}: the tag {tag} is not supported; write the value without it")
        for child in _children(node):
            self.visit(child, (*above, id(node)))
        if isinstance(node, MappingNode):
            node.value = self._spread(node)
        self._measure(node)

    def _measure(self, node: Node) -> None:
        extents = [self._extent[id(child)] for child in _children(node)]
        values, depth = 1 + sum(count for count, _ in extents), 1 + max((depth for _, depth in extents), default=0)
        if values > MAX_VALUES:
            raise ConfigError(
                f"{at(node)}: holds {values:,} values with its aliases written out; a file may hold {MAX_VALUES:,}"
            )
        if depth > MAX_DEPTH:
            raise ConfigError(f"{at(node)}: its aliases nest mappings and lists deeper than {MAX_DEPTH}")
        self._extent[id(node)] = values, depth

    def _spread(self, node: MappingNode) -> list[tuple[Node, Node]]:
        """The mapping's own entries, and those that `<<` brings in for keys that the mapping does not have."""
        own: list[tuple[Node, Node]] = []
        brought: list[tuple[Node, Node]] = []
        names: set[str] = set()
        before: Node | None = None
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self.problems.append(f"{at(key)}: a key must be text")
            elif key.tag == _MERGE:
                brought += self._brings(key, value)
            elif decimal := _split_at_comma(before, key, value):
                self.problems.append(f"{at(key)}: in {{…}} a comma ends the value; write {decimal}")
            elif key.value in names:
                self.problems.append(f"{at(key)}: this mapping has the key '{key.value}' twice; remove one of them")
            else:
                names.add(key.value)
                own.append((key, value))
            before = value
        for key, value in brought:
            if key.value not in names:
                names.add(key.value)
                own.append((key, value))
        return own

    def _brings(self, key: Node, value: Node) -> list[tuple[Node, Node]]:
        sources = value.value if isinstance(value, SequenceNode) else [value]
        if not all(isinstance(source, MappingNode) for source in sources):
            self.problems.append(f"{at(key)}: '<<' takes a mapping or a list of mappings")
            return []
        entries = []
        for source in sources:
            self._brought += len(source.value)
            if self._brought > MAX_VALUES:
                raise ConfigError(f"{at(key)}: '<<' brings in more than the {MAX_VALUES:,} values that a file may hold")
            entries += source.value
        return entries


def _children(node: Node) -> Collection[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, SequenceNode) else ()


def _split_at_comma(before: Node | None, key: ScalarNode, value: Node) -> str | None:
    """The decimal number that was meant by {weight: 0,7}. YAML reads this as weight: 0 and a key 7 without a value."""
    if not isinstance(before, ScalarNode) or value.value or before.end_mark.index + 1 != key.start_mark.index:
        return None
    decimal = f"{before.value}.{key.value}"
    return decimal if re.fullmatch(r"[-+]?[0-9]*\.[0-9]+", decimal) else None


def merge(base: Node, over: Node) -> Node:
    """Merges mappings key by key, at every depth. A scalar or list of `over`, the later file, replaces that of `base`."""
    if not (isinstance(base, MappingNode) and isinstance(over, MappingNode)):
        return over
    entries = {key.value: (key, value) for key, value in base.value}
    for key, value in over.value:
        entries[key.value] = (key, merge(entries[key.value][1], value) if key.value in entries else value)
    # We make a new node because an anchored one may be used in other places too.
    merged = MappingNode(base.tag, list(entries.values()), base.start_mark, base.end_mark)
    merged.file = base.file  # type: ignore[attr-defined]
    return merged


def typed(node: ScalarNode, text: str) -> Any:
    """The value of a scalar, with `text` in place of what the file has. Plain text gets a type, quoted text stays text.

    Raises ValueError if the text does not fit an explicit tag.
    """
    types: Any = _Types()
    found = types.resolve(ScalarNode, text, (True, False))
    tag = node.tag if text == node.value else types.resolve(ScalarNode, text, (not node.style, bool(node.style)))
    if tag in (f"{_TAG}str", _MERGE):
        return text
    if tag != found and not (tag.endswith("float") and found.endswith("int")):
        raise ValueError(text)
    return yaml.SafeLoader("").construct_object(ScalarNode(tag, text, node.start_mark, node.end_mark))


def child(node: Node | None, part: str | int) -> Node | None:
    """The node under a key or an index; None if there is none."""
    if isinstance(node, MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        found: Node = node.value[part]
        return found
    return None


def follow(root: Node, keys: Keys) -> tuple[Node, Keys]:
    """The node at the end of `keys`, and the keys that lead to it. Keys that the file does not have are skipped."""
    node, found = root, []
    for key in keys:
        inner = child(node, key)
        if inner is not None:
            node = inner
            found.append(key)
    return node, tuple(found)


def culprit(node: Node, keys: Keys) -> Node:
    """The node that an error below `node` points at: the last of `keys`, for a mapping the key itself and not its value.

    Where the file does not have all keys, the nearest node that it has.
    """
    found: Node = node
    for key in keys:
        inner = child(node, key)
        if inner is None:
            break
        names = [name for name, _ in node.value if name.value == key] if isinstance(node, MappingNode) else []
        found, node = (names or [inner])[0], inner
    return found


def file_of(node: Node) -> str:
    """What messages call the file in which a node stands."""
    file: str = node.file  # type: ignore[attr-defined]
    return file


def at(node: Node) -> str:
    """ "file:line" of a node."""
    return f"{file_of(node)}:{node.start_mark.line + 1}"
