"""Checks an adapter source that comes in a request: it must be in a folder or Hub repository that the YAML file
lists."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from model_compose.errors import Forbidden, InputError
from model_compose.schema import RelativeToFile, shown
from model_compose.sources import HuggingfaceSource, LocalSource, ModelSource
from model_compose.sources.hub import is_repository
from model_compose.sources.local import absolute, is_path

MAX_FILES = 10_000
"""The most files and folders that a caller's folder may hold. An adapter has a handful, and walking a whole disk would
take minutes."""


def _check(pattern: str) -> str:
    organisation, slash, name = pattern.rpartition("/")
    whole = slash and name == "*" and "/" not in organisation and is_repository(organisation)
    if not (is_path(pattern) or is_repository(pattern) or whole):
        raise PydanticCustomError(
            "source_pattern",
            "{pattern} is neither a folder (which starts with ./, ../, ~ or /), nor a Hub repository (org/name), nor all "
            "repositories of an organisation (org/*)",
            {"pattern": shown(pattern)},
        )
    return pattern


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


SourcePattern = Annotated[str, AfterValidator(_check)]
"""A folder (with everything below it), `org/name`, or `org/*`."""
SourcePatterns = Annotated[tuple[SourcePattern, ...], BeforeValidator(_listed), RelativeToFile(is_path)]


def confine(reference: str, allowed: Collection[str], base_dir: Path, *, field: str) -> ModelSource:
    """The source that a caller's `org/name` or path means, if one of the patterns in `allowed` permits it. Reads the
    disk.

    Symbolic links and `..` are resolved first, for the folder and for every file in it: only the real location counts.
    A folder outside the allowed ones is refused whether or not it exists, so callers cannot find out. Raises Forbidden
    for a source that is not allowed, and InputError (for `field`) for one that cannot be read.
    """
    source = _parse(reference, field)
    if isinstance(source, HuggingfaceSource):
        organisation = source.repository.rpartition("/")[0]
        if source.repository not in allowed and f"{organisation}/*" not in allowed:
            raise _forbidden(reference, allowed)
        return source
    try:
        folder = absolute(source.path, base_dir).resolve()
        roots = [absolute(pattern, base_dir).resolve() for pattern in allowed if is_path(pattern)]
        if not _within(folder, roots):
            raise _forbidden(reference, allowed)
        if not folder.is_dir():
            raise InputError(f"there is no folder '{reference}'", field=field)
        if not all(_within(link.resolve(), roots) for link in _links(folder, reference, field)):
            raise Forbidden(f"'{reference}' holds links to files outside the folders that this service may load from")
    except (OSError, ValueError, RuntimeError) as error:  # no permission, an impossible file name, a circle of links
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a valid path"
        raise InputError(f"'{reference}' cannot be read ({reason})", field=field) from error
    return LocalSource(path=str(folder))


def _links(folder: Path, reference: str, field: str) -> Iterator[Path]:
    """All symbolic links below `folder`, at any depth. Raises InputError for more than MAX_FILES files."""
    seen = 0
    for parent, folders, files in os.walk(folder, onerror=_raise):
        seen += len(folders) + len(files)
        if seen > MAX_FILES:
            raise InputError(
                f"'{reference}' holds more than {MAX_FILES} files, so it cannot be the folder of one adapter",
                field=field,
            )
        yield from (path for name in (*folders, *files) if (path := Path(parent, name)).is_symlink())


def _raise(error: OSError) -> None:
    raise error


def _parse(reference: str, field: str) -> LocalSource | HuggingfaceSource:
    try:
        source = TypeAdapter[Any](ModelSource).validate_python(reference)
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"], field=field) from None
    assert isinstance(source, LocalSource | HuggingfaceSource)  # a string never means a wheel
    return source


def _within(path: Path, roots: Collection[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _forbidden(reference: str, allowed: Collection[str]) -> Forbidden:
    hint = "" if is_path(reference) else "; a local folder starts with ./, ../, ~ or /"
    return Forbidden(
        f"this service may not load adapters from '{reference}', only from: {', '.join(allowed) or 'nowhere'} "
        f"(`runtime_adapter_sources` in the YAML file){hint}"
    )
