"""Loads YAML files and an environment into a Config. Every error names file:line and says what to do.

${env.…} is filled in within each scalar. So a variable in a comment is never looked up, and no value of a variable can
change the structure of the file.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from model_compose import scopes
from model_compose.config import Config
from model_compose.declared import declarations, is_later
from model_compose.errors import ConfigError, Keys, RunError
from model_compose.explain import explain, place
from model_compose.expressions import TYPES, Reference, SyntaxProblem, Type, convert, parse_reference, split
from model_compose.nodes import FILE_NAMES, at, child, compose, file_of, merge, typed
from model_compose.schema import Options, RelativeToFile, Secret, nearest

# The names that other languages have for our types.
_OTHER_NAMES = {
    "int": "integer", "float": "number", "double": "number", "bool": "boolean", "str": "string", "dict": "object",
    "map": "object", "array": "list",
}  # fmt: skip


@dataclass(frozen=True)
class ComposeFile:
    """What one or several YAML files say together.

    files: the absolute paths, in order. base_dir: the first file's folder; relative paths in `config` count from it.
    root: the merged YAML.
    """

    config: Config
    files: tuple[Path, ...]
    base_dir: Path
    root: Node = field(repr=False)

    def place(self, keys: Keys) -> str:
        """ "file:line: keys" of the value at `keys`."""
        return place(self.root, keys)


def find_files(given: Collection[Path] = ()) -> tuple[Path, ...]:
    """The files to load: those given, or else model-compose.yml in the current folder. Raises ConfigError."""
    paths = list(given) or [Path(name) for name in FILE_NAMES if Path(name).is_file()][:1]
    if not paths:
        raise ConfigError(f"no {' or '.join(FILE_NAMES)} in {Path.cwd()}; go to its folder, or name it with -f FILE")
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"{path}: this is a folder; name the file in it")
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file")
    return tuple(path.resolve() for path in paths)


def load(files: list[Path] | tuple[Path, ...], env: Mapping[str, str] | None = None) -> ComposeFile:
    """Reads, merges and checks the files. Later files override earlier ones. Raises ConfigError.

    env: the variables for ${env.…}; the process's environment if None.
    """
    base_dir = files[0].parent
    root: Node = compose(files[0], _short(files[0]))
    for path in files[1:]:
        root = merge(root, compose(path, _short(path)))
    problems: list[str] = []
    data = _construct(root, os.environ if env is None else env, (), problems)
    if problems:
        raise ConfigError(*problems)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(*explain(error, root)) from None
    folders = {_short(path): os.path.relpath(path.parent, base_dir) for path in files if path.parent != base_dir}
    if folders:
        config = _with_paths_moved(config, root, folders)
    if nowhere := [f"{place(root, problem.keys)}: {problem.message}" for problem in scopes.problems(config)]:
        raise ConfigError(*nowhere)
    return ComposeFile(config, tuple(files), base_dir, root)


def environment(env_files: Collection[Path] = (), pairs: Collection[str] = ()) -> dict[str, str]:
    """The variables for ${env.…}. Where several sources have a variable, the last of these wins: the --env-file files in
    order (./.env if there are none), the process's environment, the -e NAME=VALUE pairs. Raises ConfigError.
    """
    from dotenv import dotenv_values

    merged: dict[str, str] = {}
    for path in env_files or [path for path in [Path(".env")] if path.is_file()]:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file (--env-file)")
        try:
            values = dotenv_values(path, encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: the file is not UTF-8 text (--env-file); save it as UTF-8") from None
        except OSError as error:
            raise ConfigError(f"{path}: the file cannot be read ({error.strerror})") from None
        merged |= {key: value for key, value in values.items() if value is not None}
    merged |= os.environ
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:  # we show no more, since the pair may hold a secret
            raise ConfigError(f"-e {key}{equals}{'…' if value else ''}: expected NAME=VALUE")
        merged[key] = value
    return merged


def _with_paths_moved(value: Any, node: Node, folders: Mapping[str, str]) -> Any:
    """A copy of options in which relative paths of other folders' files count from the first file's folder.

    node: the YAML of `value`. folders: for each file outside the first file's folder, by the name that messages give it,
    its folder relative to the first file's. A path that starts with ${...} is not changed: the value of a variable counts
    from the first file's folder.
    """
    if isinstance(value, tuple):
        return tuple(_with_paths_moved(item, child(node, index) or node, folders) for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _with_paths_moved(item, child(node, key) or node, folders) for key, item in value.items()}
    if not isinstance(value, Options):
        return value
    changed = {}
    for name in value.model_fields_set:
        given = getattr(value, name)
        stands = child(node, name) or node  # a model may be written as one text, which has no node for the key
        path = next(declarations(type(value), (name,), RelativeToFile), None)
        changed[name] = (
            _moved(given, stands, path, folders) if path is not None else _with_paths_moved(given, stands, folders)
        )
    return value.model_copy(update=changed)


def _moved(value: Any, node: Node, path: RelativeToFile, folders: Mapping[str, str]) -> Any:
    """A path, or a tuple of paths, with the folder of its file in front; see _with_paths_moved."""
    if isinstance(value, tuple):
        return tuple(_moved(item, child(node, index) or node, path, folders) for index, item in enumerate(value))
    if not isinstance(value, str) or not path.is_path(value) or value.startswith(("/", "~")):
        return value
    folder = folders.get(file_of(node))
    if folder is None or (isinstance(node, ScalarNode) and node.value.startswith("${")):
        return value
    return os.path.join(".", folder, value)


def _construct(node: Node, env: Mapping[str, str], path: Keys, problems: list[str]) -> Any:
    """The plain data of a node, with ${env.…} filled in. path: the keys to the node. Adds each problem to `problems`."""
    if isinstance(node, MappingNode):
        return {key.value: _construct(value, env, (*path, key.value), problems) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_construct(item, env, (*path, index), problems) for index, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    try:
        return _scalar(node, env, path)
    except (SyntaxProblem, ConfigError) as error:
        if is_later(Config, path):
            return node.value  # the error is that the key is not supported, whatever its value
        problems.append(f"{at(node)}: {'.'.join(map(str, path))}: {error}")
        return None


def _scalar(node: ScalarNode, env: Mapping[str, str], path: Keys) -> Any:
    text: str = node.value
    filled = text
    if "${" in text:
        secret = next(declarations(Config, path, Secret), None)
        pieces = [_fill(piece, env, secret) if is_expression else piece for piece, is_expression in split(text)]
        if len(pieces) == 1 and not isinstance(pieces[0], str):
            return pieces[0]
        filled = "".join("" if piece is None else str(piece) for piece in pieces)
        if filled != text and secret is not None:
            if secret.danger and not filled.strip():
                raise ConfigError(f"the value is empty; {secret.danger}; give the variable a value")
            return filled
    try:
        return typed(node, filled)
    except ValueError:
        raise ConfigError(
            f"{filled!r} does not fit the tag {node.tag}; correct the value, or leave the tag out"
        ) from None


def _fill(piece: str, env: Mapping[str, str], secret: Secret | None) -> Any:
    """The value of ${env.…}. Any other expression stays as it is, except that a ${env.…} in its default is filled in."""
    reference = parse_reference(piece)
    _check_type(reference)
    if reference.key == "env":
        return _env_value(reference, env, secret)
    if isinstance(reference.default, Reference):
        inner = reference.default.source
        value = _fill(inner, env, secret)
        if value != inner:
            literal = str(value)
            if "}" in literal or "@(" in literal:
                raise ConfigError(
                    f"{inner}: the default of an expression cannot hold '}}' or '@('; give the variable another value"
                )
            return piece.replace(inner, f'"{literal}"')
    return piece


def _env_value(reference: Reference, env: Mapping[str, str], secret: Secret | None) -> Any:
    (name,) = reference.path if len(reference.path) == 1 else (None,)
    if not isinstance(name, str):
        raise ConfigError(f"{reference.source}: expected ${{env.NAME}}, with the name of one variable")
    value: Any = env.get(name)
    if value is None and isinstance(reference.default, Reference):
        value = _fill(reference.default.source, env, secret)
        if value == reference.default.source and reference.type:
            raise ConfigError(
                f"{reference.source}: write the type in the default: {value[:-1]} as {reference.type.name}}}"
            )
    elif value is None:
        value = reference.default
    if value is None:
        if secret is not None and secret.unset_is_none:
            return None
        danger = secret.danger if secret is not None else None
        raise ConfigError(
            f"the environment variable {name} is not set; {f'{danger}; ' if danger else ''}set it, use --env-file or "
            f"-e {name}=…" + ("" if danger else f", or write a default: ${{env.{name} | …}}")
        )
    try:
        return convert(value, reference.type) if reference.type else value
    except RunError:  # the message of that error shows the value, which may be a secret
        assert reference.type is not None
        raise ConfigError(
            f"{reference.source}: the value of the variable {name} is not of type {reference.type.name}; change one of them"
        ) from None


def _check_type(reference: Reference) -> None:
    """Checks that the type exists, that its options make sense, and that a literal default fits it. Raises ConfigError."""
    to = reference.type
    if to is None:
        return
    if to.name not in TYPES:
        hint = (
            f"did you mean '{_OTHER_NAMES[to.name]}'?" if to.name in _OTHER_NAMES else nearest(to.name, sorted(TYPES))
        )
        raise ConfigError(f"{reference.source}: unknown type '{to.name}'; {hint}")
    if to.name == "select" and not to.subtype:
        raise ConfigError(f"{reference.source}: a select needs its options: as select/first,second")
    if to.name == "slider" and to.subtype and not _is_range(to):
        raise ConfigError(f"{reference.source}: a slider's numbers are minimum,maximum,step: as slider/0,2,0.1")
    if isinstance(reference.default, str):
        try:
            convert(reference.default, to, reference.source)
        except RunError as error:
            raise ConfigError(f"the default does not fit the type: {error}") from None


def _is_range(to: Type) -> bool:
    try:
        low, high, step = [float(part) for part in (to.subtype or "").split(",")]
    except ValueError:
        return False
    return low < high and step > 0


def _short(path: Path) -> str:
    """What messages call the file: its path relative to the current folder, if it is inside that folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
