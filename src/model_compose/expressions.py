"""Parses and evaluates expressions, ${...}. Knows neither workflows nor configs.

    ${key.path[0] as type[]/subtype;format | default @(description text)}

The order of the parts is fixed: as, then |, then @(). A string that consists of one expression gives the value with its own
type. An expression inside a longer string is inserted as text. An inserted value is never searched for expressions.
Missing values are null.
"""

import base64
import codecs
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from model_compose.errors import Keys, RunError

CONVERTED_TYPES = frozenset(
    ["string", "text", "markdown", "integer", "number", "boolean", "list", "object", "json", "base64"]
)
FORM_TYPES = frozenset(["select", "slider", "any", "none"])
MEDIA_TYPES = frozenset(["image", "audio", "video", "file", "stream"])
TYPES = CONVERTED_TYPES | FORM_TYPES | MEDIA_TYPES

OPERATOR_KEYS = frozenset(("...", "*", "?", "+", "|"))

Step = str | int | slice
Path = tuple[Step, ...]
ALL = slice(None)


class SyntaxProblem(ValueError):
    """An expression that cannot be parsed. The message quotes it.

    at: the keys from the value that `parse` was given down to the text or the mapping with the problem.
    """

    def __init__(self, message: str, at: Keys = ()) -> None:
        super().__init__(message)
        self.at = at


@dataclass(frozen=True)
class Type:
    """`as name[]/subtype;format`."""

    name: str
    is_list: bool = False
    subtype: str | None = None
    format: str | None = None


@dataclass(frozen=True)
class Reference:
    """One ${...}. source: its text, for messages. default: a literal, another expression, or None."""

    key: str
    path: Path
    source: str
    type: Type | None = None
    default: "str | Reference | None" = None
    description: str | None = None

    def evaluate(self, context: Mapping[str, Any]) -> Any:
        value = _walk(context.get(self.key), self.path)
        if value is None and self.default is not None:
            value = self.default.evaluate(context) if isinstance(self.default, Reference) else self.default
        return convert(value, self.type, self.source) if self.type else value

    @property
    def name(self) -> str:
        """The path as text: "a.b[0]"."""
        return "".join(f"[{_show(step)}]" if not isinstance(step, str) else f".{step}" for step in self.path).lstrip(
            "."
        )


@dataclass(frozen=True)
class Splice:
    """A text that contains expressions. parts: pieces of text and expressions, in order."""

    parts: tuple["str | Reference", ...]

    def evaluate(self, context: Mapping[str, Any]) -> str:
        return "".join(part if isinstance(part, str) else _text(part.evaluate(context)) for part in self.parts)


@dataclass(frozen=True)
class Template:
    """A parsed YAML value: a constant, an expression, or a mapping or list of Templates."""

    node: Any  # a constant, Reference, Splice, dict[str, Template] or list[Template]

    def evaluate(self, context: Mapping[str, Any]) -> Any:
        """The value of the template. context: the sources by name. Raises RunError if a conversion fails."""
        if isinstance(self.node, Reference | Splice):
            return self.node.evaluate(context)
        if isinstance(self.node, dict):
            return {key: item.evaluate(context) for key, item in self.node.items()}
        if isinstance(self.node, list):
            return [item.evaluate(context) for item in self.node]
        return self.node

    def references(self) -> Iterator[Reference]:
        """Every expression, including those in defaults."""
        for _, item in self.leaves():
            for part in item.parts if isinstance(item, Splice) else (item,):
                while isinstance(part, Reference):
                    yield part
                    part = part.default

    def leaves(self, at: Path = ()) -> Iterator[tuple[Path, Any]]:
        """Every leaf with its path: constants, References and Splices."""
        if isinstance(self.node, dict | list):
            children = self.node.items() if isinstance(self.node, dict) else enumerate(self.node)
            for step, item in children:
                yield from item.leaves((*at, step))
        else:
            yield at, self.node

    def places(self, key: str, path: Path) -> list[Path]:
        """The paths in this template's result at which the value of `key.path` appears unchanged."""
        found = []
        for at, item in self.leaves():
            if isinstance(item, Reference) and item.key == key and path[: len(item.path)] == item.path:
                verbatim = item.type is None or (item.type.name in ("text", "string") and not item.type.format)
                if verbatim:
                    found.append((*at, *path[len(item.path) :]))
        return found


def parse(value: Any, at: Keys = ()) -> Template:
    """Parses a YAML value and all that is in it. Raises SyntaxProblem. at: what its `at` starts with."""
    if isinstance(value, dict):
        for key in value:
            if key in OPERATOR_KEYS:
                raise SyntaxProblem(
                    f"the structural operator '{key}' is not supported in this version; leave it out", (*at, key)
                )
        return Template({key: parse(item, (*at, key)) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return Template([parse(item, (*at, index)) for index, item in enumerate(value)])
    if not isinstance(value, str) or "${" not in value:
        return Template(value)
    if value.startswith("...${"):
        raise SyntaxProblem("the structural operator '...' is not supported in this version; leave it out", at)
    try:
        parts = tuple(_parts(value))
    except SyntaxProblem as problem:
        raise SyntaxProblem(str(problem), at) from None
    return Template(parts[0] if len(parts) == 1 and isinstance(parts[0], Reference) else Splice(parts))


def split(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a string, in order: text, or an expression with its braces. The bool is True for an expression.

    Raises SyntaxProblem.
    """
    at = 0
    while (start := text.find("${", at)) >= 0:
        if start > at:
            yield text[at:start], False
        depth, end = 1, start + 2
        while depth and end < len(text):
            if text.startswith("${", end):
                depth, end = depth + 1, end + 2
            else:
                depth, end = depth - (text[end] == "}"), end + 1
        if depth:
            raise SyntaxProblem(f"'{text[start:]}' has no closing brace; add one at its end")
        yield text[start:end], True
        at = end
    if at < len(text):
        yield text[at:], False


def _parts(text: str) -> Iterator[str | Reference]:
    for piece, is_expression in split(text):
        yield parse_reference(piece) if is_expression else piece


_HEAD = re.compile(
    r"""\s*(?P<key>[A-Za-z_][^.\[\s|}]*(?:\[\])?)
    (?P<path>(?:\.[-\w]+|\[(?:\*|-?\d+|-?\d*:-?\d*)\])*)
    (?:\s+as\s+(?P<type>[-\w]+)(?P<list>\[\])?(?:/(?P<subtype>[^\s;|}]+))?(?:;(?P<format>[-\w]+))?)?
    (?P<rest>\s*(?:\|.*|@\(.*)?)$""",
    re.VERBOSE | re.DOTALL,
)
_ANNOTATION = re.compile(r"\s*@\((?P<name>\w+)\s(?P<text>.*?)\)(?=\s*@\(|\s*$)", re.DOTALL)


def parse_reference(text: str) -> Reference:
    """Parses "${...}". Raises SyntaxProblem."""
    match = _HEAD.match(text[2:-1])
    if not match:
        raise SyntaxProblem(
            f"'{text}' is not an expression; expected ${{name.path as type | default @(description …)}}"
        )
    rest, description = match["rest"], None
    if (at := rest.find("@(")) >= 0 and (at == 0 or rest[at - 1].isspace()):
        for annotation in _ANNOTATION.finditer(rest, at):
            if annotation["name"] == "description":
                description = annotation["text"].strip()
        rest = rest[:at]
    default: str | Reference | None = None
    if rest.strip():
        literal = rest.strip()[1:].strip()
        default = parse_reference(literal) if literal.startswith("${") else _unquote(literal)
    as_type = Type(match["type"], bool(match["list"]), match["subtype"], match["format"]) if match["type"] else None
    return Reference(match["key"], tuple(_steps(match["path"])), text, as_type, default, description)


def _steps(path: str) -> Iterator[Step]:
    for name, bracket in re.findall(r"\.([-\w]+)|\[([^\]]+)\]", path):
        if name:
            yield name
        elif bracket == "*":
            yield ALL
        elif ":" in bracket:
            start, stop = bracket.split(":")
            # [0:] keeps its 0 and so differs from ALL: only [*] applies the rest of the path to each item.
            yield slice(int(start or 0), int(stop) if stop else None)
        else:
            yield int(bracket)


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _walk(value: Any, path: Path) -> Any:
    """The value at a path; None if there is none. After [*], the rest of the path applies to each item of the list."""
    for at, step in enumerate(path):
        if step == ALL and isinstance(step, slice):
            return [_walk(item, path[at + 1 :]) for item in value] if isinstance(value, list | tuple) else None
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, Mapping) else None
        elif isinstance(value, list | tuple):
            value = value[step] if isinstance(step, slice) or -len(value) <= step < len(value) else None
        else:
            return None
    return value


def convert(value: Any, to: Type, source: str = "the value") -> Any:
    """Converts the value to a type. null stays null. A type without a conversion returns the value unchanged.

    Raises RunError that names `source` and the value.
    """
    if value is None:
        return None
    if to.is_list:
        if not isinstance(value, list | tuple):
            raise RunError(f"{source}: `{to.name}[]` needs a list, got {_kind(value)} {SHORT.repr(value)}")
        element = Type(to.name, False, to.subtype, to.format)
        return [convert(item, element, source) for item in value]
    try:
        if to.format == "base64" and to.name in ("text", "string"):
            return base64.b64decode(value, validate=True).decode()
        conversion = _CONVERSIONS.get(to.name)
        return conversion(value, to) if conversion else value
    except (ValueError, TypeError, OverflowError) as error:
        what, why = (
            _ARTICLES.get(to.name, to.name),
            str(error)[: SHORT.maxstring],
        )  # some of Python's messages quote the whole value
        raise RunError(f"{source}: {SHORT.repr(value)} is not {what} ({why})") from error


SHORT = reprlib.Repr()
"""Shortens a caller's value, which may have any size, for messages."""
SHORT.maxstring = SHORT.maxother = 200

MOST_VALUES = 1 << 18
"""The most values of one JSON text. An empty list takes two bytes as text, and about a hundred as a Python object."""

_OUTSIDE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([,\[{])', re.DOTALL)
"""Matches a whole string, or a character (in group 1) that comes before a value."""


def _check_values(text: bytes) -> None:
    """Raises ValueError if a JSON text has more than MOST_VALUES values."""
    if sum(map(text.count, (b",", b"[", b"{"))) < MOST_VALUES:  # counts those in strings too, so it is an upper limit
        return
    values = 1
    for match in _OUTSIDE.finditer(text):
        values += match.lastindex is not None
        if values > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES} values")


def strict_json(text: str | bytes) -> Any:
    """Reads JSON that can also be written again. Skips a byte order mark.

    Refuses NaN, infinity, half a surrogate pair, a key that an object has twice, more than 200 levels and more than
    MOST_VALUES values. Raises ValueError.
    """
    _check_values(text.encode() if isinstance(text, str) else text)
    text = text.removeprefix("\ufeff") if isinstance(text, str) else text.removeprefix(codecs.BOM_UTF8)
    value = from_json(text, allow_inf_nan=False)
    json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
    if isinstance(value, dict | list):
        json.loads(text, object_pairs_hook=_once)
    return value


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Refuses a key that an object has twice: some parsers take the first of its values, and others the last."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key '{key}' stands in one object twice")
        seen.add(key)


def _boolean(value: Any, _: Type) -> bool:
    return str(value).lower() in ("true", "1")


def _json(value: Any, _: Type) -> Any:
    return strict_json(value) if isinstance(value, str | bytes) else value


def _list(value: Any, to: Type) -> Any:
    found = _json(value, to)
    if not isinstance(found, list):
        raise ValueError(f"it is {_kind(found)}")
    return found


def _object(value: Any, to: Type) -> Any:
    found = _json(value, to)
    if not isinstance(found, dict):
        raise ValueError(f"it is {_kind(found)}")
    if not to.subtype:
        return found
    paths = [tuple(path.split(".")) for path in to.subtype.split(",")]
    return {path[-1]: _walk(found, path) for path in paths}


def _encode(value: Any, _: Type) -> str:
    return base64.b64encode(value if isinstance(value, bytes) else str(value).encode()).decode()


def _text(value: Any, _: Type | None = None) -> str:
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value.decode() if isinstance(value, bytes) else str(value)


def _number(value: Any, to: Type) -> float:
    if isinstance(value, bool):
        raise ValueError("it is a boolean")
    number = int(value) if to.name == "integer" else float(value)
    if not math.isfinite(number):
        raise ValueError("it is not finite")
    return number


_CONVERSIONS: dict[str, Callable[[Any, Type], Any]] = {
    "string": _text,
    "text": _text,
    "select": _text,
    "markdown": _text,
    "integer": _number,
    "number": _number,
    "slider": _number,
    "boolean": _boolean,
    "json": _json,
    "list": _list,
    "object": _object,
    "base64": _encode,
}
_ARTICLES = {
    "integer": "an integer",
    "number": "a number",
    "slider": "a number",
    "list": "a list",
    "object": "an object",
}


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def _show(step: Step) -> str:
    if isinstance(step, slice):
        return "*" if step == ALL else f"{step.start}:{'' if step.stop is None else step.stop}"
    return str(step)
