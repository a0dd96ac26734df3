"""Follows keys of the file through the classes of options, to find what the classes declare about a place.

Also tells which parts of pydantic's locations are keys. Looks at the types alone and never at a value.
"""

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import Tag

from model_compose.errors import Keys
from model_compose.schema import AnyOf, Options

M = TypeVar("M")


def declarations(model: Any, keys: Keys, mark: type[M]) -> Iterator[M]:
    """Every annotation of class `mark`, such as Secret, that is met when `keys` are followed from the type `model`.

    Where a type is a union, all its members are followed.
    """
    plain, annotations = _taken_apart(model)
    yield from (each for each in annotations if isinstance(each, mark))
    members = _members(plain, annotations)
    for member in members:
        yield from declarations(member, keys, mark)
    if keys and not members:
        for inner in _inside(plain, keys[0]):
            yield from declarations(inner, keys[1:], mark)


def is_later(model: Any, keys: Keys) -> bool:
    """Whether `keys` pass a key that this version does not support (see Options.later)."""
    plain, annotations = _taken_apart(model)
    if not keys:
        return False
    if members := _members(plain, annotations):
        return any(is_later(member, keys) for member in members)
    if _is_options(plain) and keys[0] in plain.later:
        return True
    return any(is_later(inner, keys[1:]) for inner in _inside(plain, keys[0]))


def keys_in(model: Any, location: Keys) -> Keys:
    """The keys and indices in the location of a pydantic error about the type `model`.

    For each union on the way, a location has one more part. It names the member that pydantic tried, by its tag or its
    type. Such a part may have the same text as a key of the file, so we follow the types to tell them apart.
    """
    plain, annotations = _taken_apart(model)
    if not location:
        return ()
    members = _members(plain, annotations)
    if len(members) > 1 and not _chosen(annotations):
        named = [member for member in members if location[0] in _labels(member)]
        return _longest(keys_in(member, location[1:]) for member in named or members)
    if members:
        return _longest(keys_in(member, location) for member in members)
    return _longest((location[0], *keys_in(inner, location[1:])) for inner in _inside(plain, location[0]))


def _longest(found: Iterator[Keys]) -> Keys:
    return max(found, key=len, default=())


def _taken_apart(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations, and the annotations."""
    if get_origin(annotation) is Annotated:
        plain, *annotations = get_args(annotation)
        return plain, tuple(annotations)
    return annotation, ()


def _members(plain: Any, annotations: tuple[Any, ...]) -> list[Any]:
    """The members of a union, without None; the classes of an AnyOf; otherwise nothing."""
    if chosen := _chosen(annotations):
        return [kind for each in chosen for kind in each.classes()]
    if get_origin(plain) not in (Union, UnionType):
        return []
    return [member for member in get_args(plain) if member is not NoneType]


def _chosen(annotations: tuple[Any, ...]) -> list[AnyOf]:
    return [each for each in annotations if isinstance(each, AnyOf)]


def _labels(member: Any) -> set[Any]:
    """The parts of a location by which pydantic may name this member of a union."""
    plain, annotations = _taken_apart(member)
    tags = {each.tag for each in annotations if isinstance(each, Tag)}
    if not _is_options(plain):
        return tags | {str(plain), getattr(plain, "__name__", None)}
    literals = [field.annotation for field in plain.model_fields.values() if get_origin(field.annotation) is Literal]
    return tags | {plain.__name__} | {value for literal in literals for value in get_args(literal)}


def _inside(kind: Any, key: str | int) -> Iterator[Any]:
    """The type of the values that a value of type `kind` has under a key or an index; nothing if it has none there."""
    if _is_options(kind):
        for name, field in kind.model_fields.items():
            if key in (name, field.alias):
                yield Annotated[(field.annotation, *field.metadata, None)]
        return
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (tuple, list) and isinstance(key, int):
        yield arguments[0]
    elif origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        yield arguments[1]


def _is_options(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)
