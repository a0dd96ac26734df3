"""The base class of everything a user writes in YAML or sends as a request: frozen, and unknown keys are errors.

Knows nothing of any particular option; each driver, component and server derives its own options from `Options`
beside its code.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SecretStr,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from model_compose.expressions import SyntaxProblem, parse

LONGEST_NAME = 256
"""Characters of a key that are compared and shown. Comparing takes time that grows with the square of the length."""


def invalid(message: str, *at: str | int) -> PydanticCustomError:
    """The error that a validator raises about a part of what it validates, so that the file's line of it can be told.

    at: the keys from the validated value down to the wrong part; none means the whole value.
    """
    return PydanticCustomError("invalid", "{message}", {"message": message, "at": at})


# What a field declares about itself, beside its type.


@dataclass(frozen=True)
class Secret:
    """Annotation: no message shows the value, and a variable's value stays text however much it looks like a number.

    unset_is_none: an unset variable means no value, instead of an error. danger: what would happen without a value, which
    makes an empty one an error too.
    """

    unset_is_none: bool = False
    danger: str | None = None


@dataclass(frozen=True)
class RelativeToFile:
    """Annotation: the value is a path, or a list of paths, and counts from the folder of the file that says it.

    is_path: tells paths from other texts, where the field takes both.
    """

    is_path: Callable[[str], bool] = bool


@dataclass(frozen=True)
class AnyOf:
    """Annotation: the field's value is of one of these classes; another field says of which. classes: called when needed,
    since it imports them."""

    classes: Callable[[], Iterable[type["Options"]]]


SecretText = Annotated[SecretStr, Secret()]
LocalPath = Annotated[str, RelativeToFile()]


class Options(BaseModel):
    """A frozen pydantic model that refuses unknown keys and names the nearest valid one.

    later: keys of the dialect that this version accepts only at the given default; anything else is refused by name.
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


def _boolean(value: Any) -> Any:
    """The value, where it is one of YAML 1.1's words for true and false as fields of that type take it."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def unknown_key(key: str, valid: list[str]) -> PydanticCustomError:
    """The error for a key that is not in `valid`."""
    return invalid(f"unknown key '{_cut(key)}'; {nearest(key, valid)}", key)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def at_most(count: int, things: str) -> BeforeValidator:
    """Annotation: refuses a longer list or mapping before its items are looked at, as each wrong one would be an error."""

    def check(value: Any) -> Any:
        if isinstance(value, list | tuple | Mapping) and len(value) > count:
            raise PydanticCustomError(
                "too_many", "{given} {things}, and at most {count} are taken",
                {"given": len(value), "things": things, "count": count},
            )  # fmt: skip
        return value

    return BeforeValidator(check)


def field_of(item: ErrorDetails, data: Any) -> str:
    """The field of `data` that pydantic speaks of, as the caller wrote it: without the names of a union's members."""
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
    """A hint for a misspelt name: the nearest valid one, else all of them."""
    valid = list(valid)
    near = difflib.get_close_matches(name[:LONGEST_NAME], valid, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"valid: {', '.join(valid)}" if valid else "there are none"


def shown(value: Any) -> str:
    """The value as a message shows it: short, in YAML's words, and never what is inside a mapping or a list."""
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
    """A finite number, or a decimal string as forms send it. true, NaN and infinity are errors."""
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
    """How to write the number that a text means: 0,7, or one in a form that YAML 1.1 knows (012, 0x1F, 1:30, 1_000)."""
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
    """The dialect's durations: a number of seconds, or 500ms, 30s, 5m, 1h, 1d."""
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
    """Whether there is a ${...} anywhere in a YAML value."""
    if isinstance(value, Mapping):
        return any(has_expression(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(has_expression(item) for item in value)
    return isinstance(value, str) and "${" in value


def checked_expression(value: Any) -> Any:
    """The value as it is, after its expressions have been parsed once to find mistakes at load."""
    try:
        parse(value)
    except SyntaxProblem as problem:
        raise invalid(str(problem), *problem.at) from None
    return value


TemplateValue = Annotated[Any, BeforeValidator(checked_expression)]
"""Any YAML value with expressions in it; kept as written, parsed where it is used."""


class OrExpression:
    """Annotation: the field's own type, or a value that contains expressions and is checked after they are evaluated."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            return checked_expression(value) if has_expression(value) else inner(value)

        return core_schema.no_info_wrap_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "string", "pattern": r"\$\{"}]}


def templated(model: type[Options], base: type[Options]) -> type[Any]:
    """The class for what the YAML holds of `model`: the same fields, each of which may hold expressions instead.

    Fields that are Options themselves (params) are taken apart, so their unknown keys are found at load too.
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
