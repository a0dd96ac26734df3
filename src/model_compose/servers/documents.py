"""The shapes that the OpenAPI document describes: answers, errors, and the three forms of a run's body."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float


class UsedBlend(BaseModel):
    """The blend that answered. identity: a digest over base, adapters' contents, weights and method."""

    name: str | None = None
    weights: dict[str, float]
    identity: str


class Failure(BaseModel):
    code: str
    message: str


class RunState(BaseModel):
    """A run's state; `output` once it has completed, `error` once it has failed."""

    task_id: str
    status: str
    workflow_id: str
    output: Any = None
    usage: Usage | None = None
    blend: UsedBlend | None = None
    error: Failure | None = None
    session_id: str | None = None
    metadata: dict[str, Any] | None = None


class WrongField(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(title="Problem")
    type: str
    title: str
    status: int
    detail: str
    errors: list[WrongField] | None = None
    task_id: str | None = None


class OpenAIFault(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    error: OpenAIFault


_MEANINGS = {
    400: "The request is wrong; `errors` names the fields",
    401: "An API key is needed",
    404: "There is no such thing",
    409: "Not in this state",
    413: "The body is too large",
    422: "Never sent: bad input is 400",
    500: "The run failed",
    503: "Still loading, or shutting down",
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
    for status, text in _MEANINGS.items()
}
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": OpenAIError} for status, text in _MEANINGS.items()
}


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """An OpenAPI request body that takes the model as JSON or as either kind of form."""
    schema = model.model_json_schema()
    kinds = ("application/json", "multipart/form-data", "application/x-www-form-urlencoded")
    return {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}
