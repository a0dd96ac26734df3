"""`response_format`, in the YAML and on /v1: OpenAI's shapes, and {type: regex, regex: …} in addition.

This module checks only the shape. Whether the engine can follow a schema or a regex is checked there.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue

from model_compose.generation import ResponseFormat
from model_compose.schema import Options

LARGEST_SCHEMA = 64 << 10
"""In bytes, as JSON. A schema of this size is compiled in 0.2 s."""


class TextFormat(Options):
    """Free text."""

    type: Literal["text"] = Field(description="Free text, which is the default")

    @property
    def format(self) -> None:
        return None


class ObjectFormat(Options):
    """Any JSON object."""

    type: Literal["json_object"] = Field(description="A JSON object")

    @property
    def format(self) -> ResponseFormat:
        return ResponseFormat("json_object")


def _can_be_written(schema: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Refuses a schema that is too large, and NaN and infinity, which YAML has and JSON has not. Raises ValueError."""
    size = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
    if size > LARGEST_SCHEMA:
        raise ValueError(f"the schema has {size} bytes, and it may have at most {LARGEST_SCHEMA}")
    return schema


class NamedSchema(Options):
    """A JSON schema as OpenAI wraps it. name, description and strict have no effect: the text always follows the schema."""

    model_config = ConfigDict(serialize_by_alias=True)  # an action's fields are dumped and read again
    name: str | None = Field(default=None, description="Accepted for OpenAI's clients; no effect")
    description: str | None = Field(default=None, description="Accepted for OpenAI's clients; no effect")
    strict: bool | None = Field(default=None, description="Accepted for OpenAI's clients; the schema is always kept to")
    # pydantic has a method `schema`
    schema_: Annotated[dict[str, JsonValue], AfterValidator(_can_be_written)] = Field(
        alias="schema", description="The JSON Schema, at most 64 KiB"
    )


class SchemaFormat(Options):
    """JSON that a schema describes."""

    type: Literal["json_schema"] = Field(description="JSON of a schema")
    json_schema: NamedSchema = Field(description="The schema, wrapped as OpenAI does")

    @property
    def format(self) -> ResponseFormat:
        schema = json.dumps(self.json_schema.schema_, ensure_ascii=False, separators=(",", ":"))
        return ResponseFormat("json_schema", schema)


class RegexFormat(Options):
    """Text that a regular expression matches from its first to its last character."""

    type: Literal["regex"] = Field(description="Text of a pattern")
    # the time for each token grows with the length
    regex: str = Field(
        min_length=1, max_length=4096, description="The regular expression; it must match the whole text"
    )

    @property
    def format(self) -> ResponseFormat:
        return ResponseFormat("regex", self.regex)


AnyFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat | RegexFormat, Field(discriminator="type")]


def on_the_wire(format: ResponseFormat) -> Mapping[str, Any]:
    """The format as a request says it."""
    if format.kind == "json_object":
        return {"type": "json_object"}
    if format.kind == "regex":
        return {"type": "regex", "regex": format.text}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": json.loads(format.text)}}
