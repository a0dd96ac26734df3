"""The base class of everything that a user writes in YAML or sends as a request: frozen, and unknown keys are errors.

Knows no particular option. Each driver, component and server derives its own options from `Options`, beside its code.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SecretStr,
    TypeAdapter,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from model_compose.expressions import SyntaxProblem, parse

LONGEST_NAME = 256
"""Characters of a key that are compared and shown. Comparing takes time that grows with the square of the length."""


def invalid(message: str, *at: str | int) -> PydanticCustomError:
    """The error that a validator raises about a part of the value that it validates.

    at: the keys from the validated value down to the wrong part; without any, the whole value is wrong. Messages about a
    file name the line of that part.
    """
    return PydanticCustomError("invalid", "{message}", {"message": message, "at": at})


# Annotations by which a field declares more than its type.


@dataclass(frozen=True)
class Secret:
    """Annotation: no message shows the value. The value of a variable stays text, even if it looks like a number.

    unset_is_none: whether an unset variable means null, instead of an error. danger: what would happen without a value,
    for messages; if given, an empty value is an error too.
    """

    unset_is_none: bool = False
    danger: str | None = None


@dataclass(frozen=True)
class RelativeToFile:
    """Annotation: the value is a path or a list of paths. A relative path counts from the folder of the file that has it.

    is_path: whether a text is a path, for fields that take other texts too. By default every text that is not empty is.
    """

    is_path: Callable[[str], bool] = bool


@dataclass(eq=False)
class AnyOf:
    """Annotation: the value is of one of several classes, which another field chooses.

    classes: returns them. It is called only when the classes are needed, since it imports them.
    """

    classes: Callable[[], Iterable[Any]]

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        every: Any = Union[tuple(self.classes())]  # noqa: UP007
        return handler(TypeAdapter(every).core_schema)


SecretText = Annotated[SecretStr, Secret()]
LocalPath = Annotated[str, RelativeToFile()]


class Options(BaseModel):
    """A frozen pydantic model. It refuses an unknown key and suggests the nearest valid one.

    later: keys of the original model-compose that this version does not support, with their defaults. It accepts such a
    key only with its default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    later: ClassVar[Mapping[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        valid = {field.alias or name for name, field in cls.model_fields.items()}
        for key, value in data.items():
            if key in cls.later and value is not None and _boolean(value) != cls.later[key]:
                raise invalid(f"'{key}' is not supported in this version; leave it out", key)
            if key not in valid and key not in cls.later:
                raise unknown_key(str(key), sorted(valid))
        return {key: value for key, value in data.items() if key not in cls.later}


UNNAMED = "__component__"
"""The id of a component that the file gives none."""
PUBLIC_NAME = "default"
"""How clients call that component."""


def public_name(id: str) -> str:
    """What clients call the component with this id, on /v1 and in metrics."""
    return PUBLIC_NAME if id == UNNAMED else id


class Named(Options):
    """What a component, and what a driver sees of one, have in common."""

    id: str = Field(
        default=UNNAMED,
        description=f"The name by which jobs and clients choose this component; `{PUBLIC_NAME}` on /v1 if unset",
    )

    @property
    def public_name(self) -> str:
        """What clients call this component, on /v1 and in metrics."""
        return public_name(self.id)


def _boolean(value: Any) -> Any:
    """True or False for a word that YAML 1.1 and pydantic read as that; any other value unchanged."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def unknown_key(key: str, valid: list[str]) -> PydanticCustomError:
    """The error for a key that is not in `valid`."""
    return invalid(f"unknown key '{_cut(key)}'; {nearest(key, valid)}", key)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def at_most(count: int, things: str) -> BeforeValidator:
    """Annotation: refuses a list or mapping of more than `count` items before pydantic checks the items.

    Otherwise a request of a million wrong items would get a million errors.
    """

    def check(value: Any) -> Any:
        if isinstance(value, list | tuple | Mapping) and len(value) > count:
            raise PydanticCustomError(
                "too_many", "{given} {things}, and at most {count} are taken",
                {"given": len(value), "things": things, "count": count},
            )  # fmt: skip
        return value

    return BeforeValidator(check)


def field_of(item: ErrorDetails, data: Any) -> str:
    """The dotted path of the field that a pydantic error is about, in the keys that the caller used.

    pydantic's location also names members of unions, which are not in `data`; those parts are left out.
    """
    path = []
    for part in item["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            path.append(str(part))
            data = data[part]
    if item["type"] == "missing":
        path.append(str(item["loc"][-1]))
    path += (_cut(str(part)) for part in item.get("ctx", {}).get("at", ()))
    return ".".join(path)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid name, or all valid names if none is near."""
    valid = list(valid)
    near = difflib.get_close_matches(name[:LONGEST_NAME], valid, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"valid: {', '.join(valid)}" if valid else "there are none"


def shown(value: Any) -> str:
    """The value as messages show it: short and in YAML's words. The contents of mappings and lists are never shown."""
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else str(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_DECIMAL = re.compile(r"\s*[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?\s*", re.ASCII | re.IGNORECASE)


def finite_number(value: Any) -> float:
    """The value as a finite float. Accepts decimal text too, since forms send text.

    Raises PydanticCustomError for anything else, such as true, NaN and infinity.
    """
    problem = PydanticCustomError(
        "weight", "a weight must be a finite number, not {value}{advice}",
        {"value": shown(value), "advice": decimal_advice(value)},
    )  # fmt: skip
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise problem
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        raise problem
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise problem from None
    if not math.isfinite(number):
        raise problem
    return number


def decimal_advice(value: Any) -> str:
    """Advice on how to write a number that was written as 0,7 or in a form of YAML 1.1 (012, 0x1F, 1:30, 1_000); or ""."""
    if not isinstance(value, str) or len(value) > 40:
        return ""
    if re.fullmatch(r"[-+]?[0-9]*,[0-9]+", value):
        return f"; write {value.replace(',', '.')}"
    import yaml

    node = yaml.ScalarNode(yaml.SafeLoader("").resolve(yaml.ScalarNode, value, (True, False)), value)
    if not node.tag.endswith((":int", ":float")):
        return ""
    try:
        number = yaml.SafeLoader("").construct_object(node)
    except (ValueError, OverflowError):
        return ""
    return f"; YAML 1.1 reads it as {number}: write {number} if you mean that" if math.isfinite(number) else ""


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}


def _seconds(value: Any) -> Any:
    """A duration in seconds: a number of seconds, or text such as 500ms, 30s, 5m, 1h, 1d."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise PydanticCustomError(
                "duration", "a duration is a number of seconds or like 500ms, 30s, 5m; got '{value}'", {"value": value}
            )
        return float(match[1]) * _SECONDS[match[2]]
    return value


Seconds = Annotated[float, BeforeValidator(_seconds)]
Weight = Annotated[float, BeforeValidator(finite_number)]


def has_expression(value: Any) -> bool:
    """Whether a YAML value contains a ${...} anywhere."""
    if isinstance(value, Mapping):
        return any(has_expression(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(has_expression(item) for item in value)
    return isinstance(value, str) and "${" in value


def checked_expression(value: Any) -> Any:
    """Returns the value unchanged. Parses its expressions once, so that mistakes are found when the file is loaded."""
    try:
        parse(value)
    except SyntaxProblem as problem:
        raise invalid(str(problem), *problem.at) from None
    return value


TemplateValue = Annotated[Any, BeforeValidator(checked_expression)]
"""Any YAML value that may contain expressions. It is kept as written and parsed where it is used."""


class OrExpression:
    """Annotation: the field takes its own type, or a value with expressions, which is checked once they are evaluated."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            return checked_expression(value) if has_expression(value) else inner(value)

        return core_schema.no_info_wrap_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "string", "pattern": r"\$\{"}]}


def templated(model: type[Options], base: type[Options]) -> type[Any]:
    """A class with the fields of `model`, each of which may also hold expressions: what the YAML says for it.

    A field that is an Options class itself (params) is templated in the same way, so that its unknown keys are errors too.
    """
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        annotation: Any = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Options):
            fields[name] = (
                templated(annotation, Options),
                FieldInfo(default_factory=dict, description=info.description),
            )
        else:
            field = FieldInfo.merge_field_infos(info, annotation=info.annotation)
            fields[name] = (Annotated[(annotation, *info.metadata, OrExpression())], field)
            field.metadata = []
    made = create_model(model.__name__, __base__=base, __module__=model.__module__, **fields)
    made.later = {**base.later, **model.later}
    return made
