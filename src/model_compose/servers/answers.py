"""The answers of both APIs, each as one model: routes build them, and the OpenAPI document describes them.

A field that an answer does not set is left out of it (`shown`); one that is set to None is null.
"""

from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import BaseModel

from model_compose import generation
from model_compose.compose import Compose
from model_compose.generation import Finish
from model_compose.lora.blend import Blend
from model_compose.workflow.variables import Variable

Status = Literal["pending", "processing", "cancelling", "cancelled", "completed", "failed"]


def shown(answer: BaseModel) -> dict[str, Any]:
    """The answer as it is sent: the fields that were set, in the model's order."""
    return answer.model_dump(exclude_unset=True)


# Under base_path.


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float

    @classmethod
    def of(cls, usage: generation.Usage) -> Self:
        return cls(
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
            tokens_per_second=usage.tokens_per_second,
        )  # fmt: skip


class UsedBlend(BaseModel):
    """The blend that answered. identity: a digest over the base, the adapters' contents, the weights and the method.
    method, options and approximate are there if the blend is not the exact sum."""

    name: str | None = None
    weights: dict[str, float]
    method: str | None = None
    options: dict[str, Any] | None = None
    approximate: bool | None = None
    identity: str

    @classmethod
    def of(cls, blend: Blend, identity: str) -> Self:
        how: dict[str, Any] = {}
        if (method := blend.method) is not None:
            options = method.model_dump(exclude={"method"})
            how = {"method": method.method, "options": options, "approximate": method.approximate}
        return cls(name=blend.name, weights=dict(blend.weights), identity=identity, **how)


class Failure(BaseModel):
    code: str
    message: str


class RunState(BaseModel):
    """A run's state, with `output` once it has completed, and `error` once it has failed.

    finish_reason: stop (the model ended the text, or a stop sequence did) or length (the text was cut at max_output_length,
    or at the context's end); a list if the model made a list of texts. finish_reason, usage and blend are there if one
    model answered. notes: sentences for a person, such as why a text is empty.
    """

    task_id: str
    status: Status
    workflow_id: str
    output: Any = None
    finish_reason: Finish | list[Finish] | None = None
    usage: Usage | None = None
    blend: UsedBlend | None = None
    notes: list[str] | None = None
    error: Failure | None = None
    session_id: str | None = None
    metadata: dict[str, Any] | None = None


class Index(BaseModel):
    """What is served, and where: each link by what it leads to."""

    name: str
    version: str
    links: dict[str, str]


class LoadProgress(BaseModel):
    what: str
    done: int
    total: int | None = None
    unit: str


class Health(BaseModel):
    status: Literal["ok", "loading", "shutting_down"]
    progress: LoadProgress | None = None

    @classmethod
    def of(cls, compose: Compose) -> Self:
        if compose.ready:
            return cls(status="ok")
        if compose.progress is None:
            return cls(status="shutting_down")
        return cls(status="loading", progress=LoadProgress(**asdict(compose.progress)))


class VariableInfo(BaseModel):
    """An input or output of a workflow. One without a name is the input as a whole. role blend: it takes a blend."""

    name: str | None = None
    type: str
    is_list: bool
    subtype: str | None = None
    format: str | None = None
    default: Any = None
    required: bool | None = None
    description: str | None = None
    options: list[str] | None = None
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    role: str | None = None
    component: str | None = None

    @classmethod
    def of(cls, variable: Variable) -> Self:
        minimum, maximum, step = variable.range or (None, None, None)
        fields = {
            "name": variable.name or None,
            "type": variable.type.name,
            "is_list": variable.type.is_list,
            "subtype": variable.type.subtype,
            "format": variable.type.format,
            "default": variable.default,
            "required": variable.required or None,
            "description": variable.description,
            "options": list(variable.options) or None,
            "minimum": minimum,
            "maximum": maximum,
            "step": step,
            "role": variable.role if variable.role != "value" else None,
            "component": variable.component,
        }
        return cls(**{name: value for name, value in fields.items() if value is not None})


class WorkflowInfo(BaseModel):
    workflow_id: str
    name: str | None = None
    title: str | None = None
    description: str | None = None
    default: bool | None = None
    input: list[VariableInfo] | None = None
    output: list[VariableInfo] | None = None


class WrongField(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[WrongField] | None = None
    task_id: str | None = None


# Under /v1, as OpenAI's API defines them.


class ModelCard(BaseModel):
    """A component, or a component:blend. parent: the component's id."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class CachedTokens(BaseModel):
    cached_tokens: int


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, usage: generation.Usage) -> Self:
        return cls(
            prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=CachedTokens(cached_tokens=usage.cached_tokens),
        )  # fmt: skip


class Completed(BaseModel):
    """What all answers of the two routes have in common. notes: ours; sentences for a person, such as why a text is
    empty."""

    id: str
    object: str
    created: int
    model: str
    notes: list[str] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: Finish | None
    logprobs: dict[str, Any] | None = None


class CompletionReply(Completed):
    """A whole answer. An event of a stream is the same with a piece of the text, and without `usage` but at the end."""

    choices: list[CompletionChoice]
    usage: TokenUsage | None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: Finish
    logprobs: dict[str, Any] | None = None


class ChatReply(Completed):
    choices: list[ChatChoice]
    usage: TokenUsage


class MessagePiece(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatPiece(BaseModel):
    index: int
    delta: MessagePiece
    finish_reason: Finish | None
    logprobs: dict[str, Any] | None = None


class ChatChunk(Completed):
    """One event of a stream; `usage` is in the last one, if the request asks for it."""

    choices: list[ChatPiece]
    usage: TokenUsage | None = None


class OpenAIFault(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    error: OpenAIFault


ANSWERS: tuple[type[BaseModel], ...] = (
    RunState, Index, Health, WorkflowInfo, Problem, ModelCard, ModelList, CompletionReply, ChatReply, ChatChunk, OpenAIError
)  # fmt: skip
"""What the OpenAPI document describes."""
