"""What the classes of options declare about a key of the file, and which parts of pydantic's locations are keys.

Walks the types alone: it never sees a value.
"""

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import Tag

from model_compose.errors import Keys
from model_compose.registry import ByName
from model_compose.schema import AnyOf, Options

M = TypeVar("M")


def declarations(model: Any, keys: Keys, mark: type[M]) -> Iterator[M]:
    """The annotations of one class, such as Secret, on the way from the type `model` down `keys`.

    Where a field's type is a union, the annotations of all members count.
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
    """Whether `keys` lead into a key of the dialect that this version does not support (see Options.later)."""
    plain, annotations = _taken_apart(model)
    if not keys:
        return False
    if members := _members(plain, annotations):
        return any(is_later(member, keys) for member in members)
    if _is_options(plain) and keys[0] in plain.later:
        return True
    return any(is_later(inner, keys[1:]) for inner in _inside(plain, keys[0]))


def keys_in(model: Any, location: Keys) -> Keys:
    """The keys and indices in the location of one of pydantic's errors about the type `model`.

    A location has one more part for each union on its way, which says what member pydantic had tried: a union's tag, or
    the name of a type. Such a part may have the same text as a key of the file.
    """
    plain, annotations = _taken_apart(model)
    if not location:
        return ()
    members = _members(plain, annotations)
    if len(members) > 1 and not _chosen(annotations):
        if named := [member for member in members if location[0] in _labels(member)]:
            return _longest(keys_in(member, location[1:]) for member in named)
        return _longest(keys_in(member, rest) for member in members for rest in (location, location[1:]))
    if members:
        return _longest(keys_in(member, location) for member in members)
    return _longest((location[0], *keys_in(inner, location[1:])) for inner in _inside(plain, location[0]))


def _longest(found: Iterator[Keys]) -> Keys:
    return max(found, key=len, default=())


def _taken_apart(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type without its annotations, and these."""
    if get_origin(annotation) is Annotated:
        plain, *annotations = get_args(annotation)
        return plain, tuple(annotations)
    return annotation, ()


def _members(plain: Any, annotations: tuple[Any, ...]) -> list[Any]:
    """The types that a value may have, where there is a choice or the type is another's optional form. null is left out."""
    if chosen := _chosen(annotations):
        return [kind for each in chosen for kind in each.classes()]
    if get_origin(plain) not in (Union, UnionType):
        return []
    return [member for member in get_args(plain) if member is not NoneType]


def _chosen(annotations: tuple[Any, ...]) -> list[AnyOf | ByName]:
    return [each for each in annotations if isinstance(each, AnyOf | ByName)]


def _labels(member: Any) -> set[Any]:
    """The parts by which pydantic's location may name a member of a union."""
    plain, annotations = _taken_apart(member)
    tags = {each.tag for each in annotations if isinstance(each, Tag)}
    if not _is_options(plain):
        return tags | {str(plain), getattr(plain, "__name__", None)}
    literals = [field.annotation for field in plain.model_fields.values() if get_origin(field.annotation) is Literal]
    return tags | {plain.__name__} | {value for literal in literals for value in get_args(literal)}


def _inside(kind: Any, key: str | int) -> Iterator[Any]:
    """The type of what stands under a key or an index of a value of this type."""
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
