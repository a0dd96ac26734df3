"""Components are what jobs run. Here: their protocol, the options that all of them have, and their registry.

A new component type is one file here plus its line in COMPONENTS: a class with the methods of `Component` and `Options`.
"""

from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from pydantic import Field, model_validator

from model_compose.errors import Keys, NotFound
from model_compose.expressions import Path as ValuePath
from model_compose.expressions import Template, parse
from model_compose.generation import Finish, Usage
from model_compose.lora.blend import Blend
from model_compose.progress import Report
from model_compose.registry import Registry
from model_compose.room import Place
from model_compose.schema import Named, Options, TemplateValue, invalid

DEFAULT_ID = "__default__"


@dataclass(frozen=True)
class Delta:
    """The next piece of the text that stands at `path` of the component's value."""

    path: ValuePath
    text: str


@dataclass(frozen=True)
class Answer:
    """Which model component answered, under which blend, at what cost, and how its text ended.

    finish_reason: one for each text if the component's value is a list of texts. notes: sentences for a person.
    """

    component: str
    blend: Blend
    identity: str
    usage: Usage
    finish_reason: Finish | tuple[Finish, ...] = "stop"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A component's whole value; the last item of every run."""

    value: Any
    answer: Answer | None = None


class ActionOptions(Options):
    """What every action has. `output` maps the component's `result`.

    needs: fields of which the action needs one; an input that only other fields read is optional. structured: dotted
    fields that plain text cannot fill, so a form asks for JSON.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    structured: ClassVar[tuple[str, ...]] = ()
    id: str = Field(default="__action__", description="The name by which a job chooses this action")
    output: TemplateValue = Field(
        default=None, description="What the action gives, as `${result}` or around it; the result if unset"
    )
    default: bool = Field(default=False, description="Whether this is the action of a job that names none")

    @cached_property
    def templates(self) -> Mapping[str, Template]:
        """What the YAML gives for the action's own fields, parsed once; those that the action needs come first."""
        common = set(ActionOptions.model_fields)
        given = self.model_dump(include=self.model_fields_set - common, exclude_unset=True, warnings=False)
        return {name: parse(given[name]) for name in sorted(given, key=lambda name: name not in self.needs)}

    @cached_property
    def output_template(self) -> Template | None:
        """How the YAML maps `result`, parsed once; None where the action gives its result as it is."""
        return None if self.output is None else parse(self.output)


class ComponentOptions(Named):
    """What every component has."""

    type: str = Field(description="The kind of component")
    runtime: Literal["native", "embedded"] = Field(
        default="native", description="Accepted for files of the original; both run in this process"
    )
    max_concurrent_count: int = Field(
        default=0, ge=0, description="Jobs that run in this component at once; further ones wait. 0 is unlimited"
    )
    default: bool = Field(default=False, description="Whether this is the component of a job that names none")

    @model_validator(mode="after")
    def _id_has_no_colon(self) -> Self:
        if ":" in self.id or self.id == DEFAULT_ID:
            raise invalid(f"a component's id holds no ':' and is not '{DEFAULT_ID}'; got '{self.id}'", "id")
        return self

    def located_actions(self, at: Keys = ()) -> list[tuple[Keys, ActionOptions]]:
        """The actions, under `action` or `actions`, each with its keys. at: what the keys start with.

        A derived class declares both fields.
        """
        both: Any = self
        return [((*at, *keys), action) for keys, action in located(both.action, both.actions, "action")]

    @property
    def all_actions(self) -> tuple[ActionOptions, ...]:
        return tuple(action for _, action in self.located_actions())

    def find_action(self, id: str) -> ActionOptions:
        """Raises NotFound."""
        return pick(self.all_actions, id, "action")


class Component(Protocol):
    """What a component does. It is opened once and then runs any number of jobs at the same time."""

    Options: ClassVar[Any]

    def __init__(self, options: Any, base_dir: Path) -> None: ...
    async def open(self, report: Report) -> None: ...

    def run(
        self, action: ActionOptions, context: Mapping[str, Any], *, blend: Blend | None = None, sampling: Any = None,
        place: Place | None = None,
    ) -> AsyncGenerator[Delta | Result]:  # fmt: skip
        """Runs one of the component's actions. Yields deltas as the text is made, then one Result.

        context: what the action's expressions read: `input` and `context`. The other arguments are for models alone, and
        None where the caller says nothing. blend: replaces the action's own. sampling: values that replace the action's
        own (SamplingOverrides). place: what the run was accepted with; without one, each text takes a place of its own.
        """

    async def close(self) -> None: ...


COMPONENTS: Registry[type[Component]] = Registry(
    "component type", "model_compose.components", {"model": "model_compose.components.model:ModelComponent"}
)


class Picked(Protocol):
    """Something that has an id and may be marked as the default."""

    @property
    def id(self) -> str: ...
    @property
    def default(self) -> bool: ...


P = TypeVar("P", bound=Picked)
T = TypeVar("T")


def pick(items: tuple[P, ...], id: str, what: str) -> P:
    """The item with the id. "__default__" stands for the only item, or else for the one that is marked as the default.

    Raises NotFound.
    """
    found = _default(items) if id == DEFAULT_ID else next((item for item in items if item.id == id), None)
    if found is None:
        known = ", ".join(item.id for item in items) or "none"
        wish = f"there is no default {what}" if id == DEFAULT_ID else f"there is no {what} '{id}'"
        raise NotFound(f"{wish}; known: {known}")
    return found


def _default(items: tuple[P, ...]) -> P | None:
    return items[0] if len(items) == 1 else next((item for item in items if item.default), None)


def one_or_many(one: T | None, many: tuple[T, ...]) -> Iterator[T]:
    """The dialect's `component` and `components`, as one."""
    if one is not None:
        yield one
    yield from many


def located(one: Any, many: Collection[Any], key: str) -> list[tuple[Keys, Any]]:
    """What stands under a key of the dialect and under its plural, each with its path in the YAML."""
    alone = [] if one is None else [((key,), one)]
    return [*alone, *(((f"{key}s", number), each) for number, each in enumerate(many))]
