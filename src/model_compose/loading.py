"""From YAML files and an environment to a Config. Every error carries file:line and what to do about it.

Works on YAML nodes, which know their lines: files are merged node by node, ${env.…} is filled in scalar by scalar (never
in comments, never changing the structure), and pydantic's error locations are walked back to the node they speak of.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from model_compose.config import Config
from model_compose.errors import ConfigError
from model_compose.expressions import Reference, SyntaxProblem, convert, parse_reference, split
from model_compose.schema import nearest

FILE_NAMES = ("model-compose.yml", "model-compose.yaml")

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Loaded:
    """A config with the files it came from; relative paths in it are relative to base_dir."""

    config: Config
    files: tuple[Path, ...]
    base_dir: Path


def find_files(given: Sequence[Path] = ()) -> tuple[Path, ...]:
    """The files to load: those given, else model-compose.yml in the current folder. Raises ConfigError."""
    paths = list(given) or [Path(name) for name in FILE_NAMES if Path(name).is_file()][:1]
    if not paths:
        raise ConfigError(f"no {' or '.join(FILE_NAMES)} in {Path.cwd()}; go to its folder, or name it with -f FILE")
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
    return tuple(path.resolve() for path in paths)


def load(files: Sequence[Path], env: Mapping[str, str] | None = None) -> Loaded:
    """Reads, merges and checks the files; later ones win. `env` fills ${env.…}. Raises ConfigError."""
    names = {str(path): _short(path) for path in files}
    root: Node | None = None
    for path in files:
        node = _compose(path, names[str(path)])
        root = node if root is None else _merge(root, node)
    assert root is not None
    problems: list[str] = []
    data = _construct(root, os.environ if env is None else env, (), problems)
    if problems:
        raise ConfigError(*problems)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(*_explain(error, root)) from None
    return Loaded(config, tuple(files), files[0].parent)


def environment(env_files: Sequence[Path] = (), pairs: Sequence[str] = ()) -> dict[str, str]:
    """--env-file files in order (./.env without any), over them the process's environment, over that -e K=V.

    Raises ConfigError.
    """
    from dotenv import dotenv_values

    merged: dict[str, str] = {}
    for path in env_files or [path for path in [Path(".env")] if path.is_file()]:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file (--env-file)")
        merged |= {key: value for key, value in dotenv_values(path).items() if value is not None}
    merged |= os.environ
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"-e {pair}: expected NAME=VALUE")
        merged[key] = value
    return merged


def _compose(path: Path, name: str) -> Node:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    loader = Loader(text)
    loader.name = name
    try:
        node: Node | None = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{place}: invalid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: invalid YAML: {error}") from None
    finally:
        loader.dispose()
    if node is None:
        raise ConfigError(f"{name}: the file is empty; see `model-compose schema` for what it may hold")
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: expected a mapping with component, workflow, controller")
    for part in _all_nodes(node):
        part.file = name  # type: ignore[attr-defined]  # marks of a C loader do not carry the name
    return node


def _all_nodes(node: Node) -> Iterable[Node]:
    yield node
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield from _all_nodes(value)
    elif isinstance(node, SequenceNode):
        for item in node.value:
            yield from _all_nodes(item)


def _merge(base: Node, over: Node) -> Node:
    """Mappings merge deeply; scalars and lists are replaced by the later file's."""
    if not (isinstance(base, MappingNode) and isinstance(over, MappingNode)):
        return over
    merged = {key.value: (key, value) for key, value in base.value}
    for key, value in over.value:
        merged[key.value] = (key, _merge(merged[key.value][1], value) if key.value in merged else value)
    base.value = list(merged.values())
    return base


def _construct(node: Node, env: Mapping[str, str], path: tuple[str, ...], problems: list[str]) -> Any:
    """Node -> plain data with ${env.…} filled in. Problems are collected with their places."""
    if isinstance(node, MappingNode):
        result: dict[str, Any] = {}
        for key, value in node.value:
            name = key.value
            if not isinstance(key, ScalarNode):
                problems.append(f"{_at(key)}: a key must be text")
            elif name in result:
                problems.append(f"{_at(key)}: the key '{name}' stands here a second time")
            else:
                result[name] = _construct(value, env, (*path, name), problems)
        return result
    if isinstance(node, SequenceNode):
        return [_construct(item, env, (*path, str(index)), problems) for index, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    try:
        return _scalar(node, env, path)
    except (SyntaxProblem, ConfigError) as error:
        problems.append(f"{_at(node)}: {'.'.join(path)}: {error}")
        return None


def _scalar(node: ScalarNode, env: Mapping[str, str], path: tuple[str, ...]) -> Any:
    text: str = node.value
    filled = text
    if "${" in text:
        pieces = [
            _env_value(piece, env, path) if is_expression and _is_env(piece) else piece
            for piece, is_expression in split(text)
        ]
        if len(pieces) == 1 and not isinstance(pieces[0], str):
            return pieces[0]
        filled = "".join("" if piece is None else str(piece) for piece in pieces)
    # A plain scalar is typed as YAML would have typed the filled-in text; a quoted one stays text.
    resolver = yaml.resolver.Resolver()
    tag = node.tag if filled == text else resolver.resolve(ScalarNode, filled, (node.style is None, False))
    return yaml.SafeLoader("").construct_object(ScalarNode(tag, filled, node.start_mark, node.end_mark))


def _is_env(piece: str) -> bool:
    return parse_reference(piece).key == "env"


def _env_value(piece: str, env: Mapping[str, str], path: tuple[str, ...]) -> Any:
    reference = parse_reference(piece)
    (name,) = reference.path if len(reference.path) == 1 else (None,)
    if not isinstance(name, str):
        raise ConfigError(f"{piece}: expected ${{env.NAME}}")
    value: Any = env.get(name)
    if value is None and isinstance(reference.default, Reference):
        value = _env_value(reference.default.source, env, path) if reference.default.key == "env" else None
    elif value is None:
        value = reference.default
    if value is None:
        if path[-1] == "token":
            return None
        key = "the API key would be missing, so the server refuses to start; " if "api_keys" in path else ""
        raise ConfigError(
            f"the environment variable {name} is not set; {key}set it, use --env-file or -e {name}=…, or write a default: "
            f"${{env.{name} | …}}"
        )
    return convert(value, reference.type, piece) if reference.type else value


def _explain(error: ValidationError, root: Node) -> list[str]:
    """One line a problem: file:line: path: what is wrong. The value itself is shown only where it is no secret."""
    lines = []
    for item in error.errors(include_url=False):
        context = item.get("ctx", {})
        node, path = _locate(root, item["loc"], context.get("key"))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            message = f"the key '{path[-1] if path else ''}' is missing"
        elif item["type"] in ("union_tag_not_found", "union_tag_invalid"):
            message = _explain_tag(item, context)
        elif item["type"].endswith(("_type", "_parsing", "_error")) and "api_keys" not in path and "token" not in path:
            message = f"{message[0].lower()}{message[1:]}, not {_shown(item['input'])}"
        where = ".".join(path)
        line = f"{_at(node)}: {where}: {message}" if where else f"{_at(node)}: {message}"
        if line not in lines:
            lines.append(line)
    return lines


def _explain_tag(item: Any, context: Mapping[str, Any]) -> str:
    key = str(context.get("discriminator", "")).strip("'")
    expected = context.get("expected_tags")
    if item["type"] == "union_tag_not_found":
        return f"the key '{key}' is missing"
    names = [name.strip("' ") for name in str(expected).split(",")]
    tag = str(context.get("tag"))
    return f"{key} '{tag}' is not known; {nearest(tag, names)}"


def _locate(root: Node, loc: Sequence[str | int], key: str | None) -> tuple[Node, list[str]]:
    """The node that a pydantic location speaks of, and its path as the user wrote it.

    Parts of the location that are no keys (a union's tags) are skipped. `key` is a key below, named by our own errors.
    """
    node, path = root, []
    for position, part in enumerate(loc):
        found: Node | None = None
        if isinstance(node, MappingNode):
            found = next((value for name, value in node.value if name.value == part), None)
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
        if found is not None:
            node = found
            path.append(str(part))
        elif position == len(loc) - 1 and isinstance(part, str):
            path.append(part)  # a missing key: the mapping's own line
    if key is not None:
        node = next((found for found in _all_nodes(node) if isinstance(found, ScalarNode) and found.value == key), node)
    return node, path


def _at(node: Node) -> str:
    return f"{getattr(node, 'file', '?')}:{node.start_mark.line + 1}"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else {dict: "a mapping", list: "a list"}[type(value)]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(path: Path) -> str:
    """Relative to the current folder where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
