"""Things that a YAML file refers to by name: engines, components, methods, export formats.

Each name stands for "module:attribute", and the module is imported only when the name is used. Other packages add names
through entry points (docs/how-to/extend.md). This module does not know what the named things are.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from model_compose.errors import PluginError
from model_compose.schema import AnyOf, Options, invalid, nearest, shown

log = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Generic[T]):
    """Names -> "module:attribute". Looking a name up imports its module, so a table costs nothing to keep.

    what: what a name names, for messages. group: the entry points that other packages register theirs under.
    attributes: what each entry has. An entry of another package that lacks one of them cannot be used.
    """

    def __init__(self, what: str, group: str, entries: Mapping[str, str], attributes: Collection[str]) -> None:
        self.what, self.group, self.attributes = what, group, attributes
        self._own = entries

    @cached_property
    def _claims(self) -> Mapping[str, list[EntryPoint]]:
        """Each name with everything that is registered under it: our own first, which has no distribution."""
        found = {name: [EntryPoint(name, value, self.group)] for name, value in self._own.items()}
        for entry in sorted(entry_points(group=self.group), key=lambda entry: entry.name):
            found.setdefault(entry.name, []).append(entry)
        return found

    def __getitem__(self, name: str) -> T:
        """Raises KeyError, and PluginError for another package's entry that cannot be used."""
        claims = self._claims[name]
        if len(claims) > 1:
            owners = " and by ".join(map(_owner, claims))
            raise PluginError(f"the {self.what} '{name}' is registered twice: by {owners}; uninstall one of them")
        try:
            found: T = claims[0].load()
        except Exception as error:  # another package's module may raise anything
            if claims[0].dist is None:
                raise
            raise PluginError(
                f"the {self.what} '{name}' comes from {_owner(claims[0])}, which cannot be imported: "
                f"{type(error).__name__}: {error}; mend or uninstall that package"
            ) from error
        if lacks := [name for name in self.attributes if not hasattr(found, name)]:
            raise PluginError(
                f"the {self.what} '{name}' comes from {_owner(claims[0])}, which has no {', '.join(lacks)}; it may be made "
                "for another version of model-compose: update or uninstall that package"
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._claims

    def __iter__(self) -> Iterator[str]:
        return iter(self._claims)

    @cached_property
    def usable(self) -> Mapping[str, T]:
        """All entries, imported, but for those of other packages that cannot be used: a warning names each of these."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except PluginError as error:
                log.warning("%s", error)
        return found


def _owner(claim: EntryPoint) -> str:
    if claim.dist is None:
        return "model-compose itself"
    return f"the package {claim.dist.name} {claim.dist.version} ({claim.value})"


class ByName(AnyOf):
    """Annotation: a mapping whose `key` names an entry of a registry; it is checked as that entry's options.

    options: entry -> the type that pydantic checks the mapping as.
    """

    def __init__(self, registry: Registry[Any], key: str, options: Callable[[Any], Any]) -> None:
        super().__init__(lambda: map(options, registry.usable.values()))
        self._registry, self._key, self._options = registry, key, options
        self._adapters: dict[str, TypeAdapter[Any]] = {}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> Any:
        name = self._name(value)
        if name not in self._adapters:
            try:
                entry = self._registry[name]
            except PluginError as error:
                raise invalid(str(error), self._key) from None
            self._adapters[name] = TypeAdapter(self._options(entry))
        return self._adapters[name].validate_python(value)

    def _name(self, value: Any) -> str:
        if isinstance(value, Mapping):
            if self._key not in value:
                raise invalid(f"the key '{self._key}' is missing")
            name = value[self._key]
        elif isinstance(value, Options):  # checked already
            name = getattr(value, self._key, None)
        else:
            raise PydanticKnownError("dict_type")
        if not isinstance(name, str) or name not in self._registry:
            raise invalid(f"unknown {self._key} {shown(name)}; {nearest(str(name), self._registry)}", self._key)
        return name
