"""OpenAI's API at /v1, as the official client speaks it: models, completions, chat completions.

Requests go straight to a model component, past workflows. A model id is the component's id ("default" if the file gives
none). ":" and a name may follow the id: a blend's or an adapter's. The field `lora` mixes adapters freely.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from model_compose.components.model import ModelComponent
from model_compose.components.model_actions import MOST_MESSAGES, LogitBias, Stops
from model_compose.components.notes import empty
from model_compose.components.response_format import AnyFormat
from model_compose.compose import Compose
from model_compose.errors import ComposeError, InputError, NotFound
from model_compose.generation import Chunk, Completion, Message, Sampling, Text, Usage, collect
from model_compose.generation import Request as Generation
from model_compose.schema import LONGEST_NAME, Options, Weight, at_most
from model_compose.servers.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatPiece,
    ChatReply,
    CompletionChoice,
    CompletionReply,
    MessagePiece,
    ModelCard,
    ModelList,
    TokenUsage,
    shown,
)
from model_compose.servers.documents import OPENAI_STREAM, answers, body_schema, openai_errors
from model_compose.servers.logprobs import chat_logprobs, completion_logprobs
from model_compose.servers.openai_fields import UNSUPPORTED, ClientOptions, Neutral, wrong
from model_compose.servers.wire import attended, event, openai_error, read_body, start_stream

MOST_ADAPTERS = 256
"""The most adapters that one request may name."""


class LoraWeight(Options):
    """One entry of `lora` in its list form."""

    name: str
    scale: Weight = 1.0


class StreamOptions(ClientOptions):
    unsupported: ClassVar[Mapping[str, Neutral]] = {
        "events hold neither padding nor running usage": {
            "include_obfuscation": (False,),
            "continuous_usage_stats": (False,),
        }
    }
    include_usage: bool | None = None


class Body(ClientOptions):
    """The fields that completions and chat share. Fields without effect here are accepted; unknown ones are refused by
    name."""

    unsupported: ClassVar[Mapping[str, Neutral]] = UNSUPPORTED
    model: str = Field(max_length=LONGEST_NAME, description="A component, or component:blend, or component:adapter")
    max_tokens: int | None = Field(default=None, ge=1, description="The text is cut at this many tokens")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Flattens or sharpens the distribution; 0 is greedy"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw from the most likely tokens that together have this probability"
    )
    top_k: int | None = Field(
        default=None, ge=-1, description="Draw from this many of the most likely tokens; 0 and -1 are off"
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Leave out tokens below this share of the most likely one's probability"
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Divides the scores of tokens that were used already; 1 is off"
    )
    presence_penalty: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        description="Subtracted from the score of each token that the answer has used already",
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="The same, times how often the answer has used it"
    )
    logit_bias: LogitBias | None = Field(
        default=None, description="{token id: -100 to 100}, added to the token's score"
    )
    response_format: AnyFormat | None = Field(
        default=None, description="text, json_object, json_schema, or {type: regex, regex: …}"
    )
    n: int | None = Field(default=None, ge=1, le=64, description="Texts to make")
    seed: int | None = Field(
        default=None, ge=-1, lt=2**63, description="Makes the draws repeatable; -1 takes another seed each time"
    )
    stop: Stops = Field(default=None, description="Texts at which generation stops")
    stream: bool | None = Field(default=None, description="Answer as server-sent events")
    stream_options: StreamOptions | None = Field(
        default=None, description="{include_usage: true} sends the usage at the end of a stream"
    )
    lora: Annotated[list[LoraWeight] | dict[str, Weight] | None, at_most(MOST_ADAPTERS, "adapters")] = Field(
        default=None, description="Free mixing: {adapter: weight}, or [{name, scale}]; [] is the bare base"
    )
    user: str | None = Field(default=None, description="Accepted; no effect")
    metadata: dict[str, Any] | None = Field(default=None, description="Accepted; no effect")
    store: bool | None = Field(default=None, description="Accepted; no effect")
    service_tier: str | None = Field(default=None, description="Accepted; no effect")
    prompt_cache_key: str | None = Field(default=None, description="Accepted; no effect")
    safety_identifier: str | None = Field(default=None, description="Accepted; no effect")

    @field_validator("lora")
    @classmethod
    def _one_weight_an_adapter(cls, lora: Any) -> Any:
        names = [entry.name for entry in lora] if isinstance(lora, list) else []
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"the adapter '{twice[0]}' is named {names.count(twice[0])} times; give it one weight")
        return lora

    @model_validator(mode="after")
    def _usage_at_the_end_needs_a_stream(self) -> Self:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise wrong("stream_options", "include_usage needs stream=true")
        return self

    def sampling(self, default: Sampling) -> Sampling:
        """The request's sampling. Fields that it leaves out come from the component's action, except response_format."""
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        given: dict[str, Any] = {
            "max_output_length": self.max_tokens,
            "temperature": self.temperature,
            "do_sample": None if self.temperature is None else self.temperature > 0,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": None if self.logit_bias is None else tuple(sorted(self.logit_bias.items())),
            "response_format": self.response_format.format if self.response_format else None,
            "num_return_sequences": self.n or 1,
            "seed": self.seed,
            "stop_sequences": None if stops is None else tuple(stop for stop in stops if stop),
        }
        sampling = replace(default, **{key: value for key, value in given.items() if value is not None})
        return replace(sampling, seed=None) if self.seed == -1 else sampling


class CompletionBody(Body):
    """POST /v1/completions: raw text in, raw text out."""

    prompt: str | list[str] = Field(description="The prompt, or a list of prompts; the model continues it as it stands")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Log-probabilities of the tokens, and of this many of the most likely ones",
    )
    best_of: int | None = Field(default=None, ge=1, description="Must equal n: every text that is drawn is answered")

    @model_validator(mode="before")
    @classmethod
    def _false_is_none(cls, data: Any) -> Any:
        """Takes `logprobs: false`, as the chat route does, for no logprobs."""
        return {**data, "logprobs": None} if isinstance(data, dict) and data.get("logprobs") is False else data

    @model_validator(mode="after")
    def _every_text_is_answered(self) -> Self:
        if self.best_of not in (None, 1, self.n):
            raise wrong("best_of", "it may only be as many as n, since every text that is drawn is answered")
        return self

    def sampling(self, default: Sampling) -> Sampling:
        return replace(super().sampling(default), logprobs=self.logprobs)


class TextPart(ClientOptions):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


def _content_form(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


Parts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
Content = Annotated[Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_content_form)]


class ChatMessage(ClientOptions):
    """One turn. The assistant's content may be null, which means an empty text; clients send that for an aborted turn."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        "this server calls no tools": {"tool_calls": ([],), "tool_call_id": (), "function_call": ()},
        "a turn is its text alone": {
            "audio": (), "annotations": ([],), "refusal": ("",), "reasoning": ("",), "reasoning_content": ("",)
        },
    }  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None
    name: str | None = None

    @model_validator(mode="after")
    def _only_the_assistant_may_say_nothing(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise wrong("content", "it must be text, or a list of text parts, not null")
        return self

    @property
    def message(self) -> Message:
        """The turn as the chat template takes it."""
        parts = self.content if isinstance(self.content, list) else ()
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return Message("system" if self.role == "developer" else self.role, text, self.name)


class ChatBody(Body):
    """POST /v1/chat/completions: messages, through the base's chat template."""

    messages: Annotated[list[ChatMessage], at_most(MOST_MESSAGES, "messages")] = Field(
        min_length=1, description="The conversation so far, which the base's chat template turns into a prompt"
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same as max_tokens")
    logprobs: bool | None = Field(default=None, description="Log-probabilities of the tokens")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="How many of the most likely tokens to list at each position"
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted; no effect")

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "it needs logprobs=true")
        return self

    def sampling(self, default: Sampling) -> Sampling:
        sampling = super().sampling(default)
        if self.max_completion_tokens is not None:
            sampling = replace(sampling, max_output_length=self.max_completion_tokens)
        return replace(sampling, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


@dataclass(frozen=True)
class Shape:
    """The differences between the two routes.

    prefix: of ids. whole and part: a whole answer, and one event of a stream, each with OpenAI's name for it (`object`).
    choice: one text of a whole answer. piece: what an event holds of a chunk; told whether the chunk is its text's first.
    """

    prefix: str
    whole: tuple[type[BaseModel], str]
    part: tuple[type[BaseModel], str]
    choice: Callable[[int, Text], BaseModel]
    piece: Callable[[Chunk, bool], BaseModel]


@dataclass(frozen=True)
class Reply:
    """One answer on its way out. head: fields that all its events share. explain: why texts came out empty."""

    head: Mapping[str, Any]
    shape: Shape
    explain: Callable[[Collection[Text], Usage], tuple[str, ...]]

    def whole(self, done: Completion) -> BaseModel:
        choices = [self.shape.choice(index, text) for index, text in enumerate(done.texts)]
        notes = self.explain(done.texts, done.usage)
        return self._document(self.shape.whole, choices, notes, usage=TokenUsage.of(done.usage))

    async def events(self, chunks: AsyncGenerator[Chunk], *, with_usage: bool) -> AsyncGenerator[str]:
        """An event for each chunk. What fails after the first becomes an event too."""
        usage, texts = Usage(), dict[int, Text]()
        async with aclosing(chunks):
            try:
                async for chunk in chunks:
                    usage = chunk.usage or usage
                    piece = self.shape.piece(chunk, chunk.index not in texts)
                    texts[chunk.index] = _joined(texts.get(chunk.index), chunk)
                    notes = self.explain([*texts.values()], usage) if chunk.usage else ()
                    yield event(self._document(self.shape.part, [piece], notes))
            except ComposeError as error:
                if not texts:
                    raise
                yield event(openai_error(error))
                return
        if with_usage:
            yield event(self._document(self.shape.part, [], usage=TokenUsage.of(usage)))
        yield "data: [DONE]\n\n"

    def _document(
        self,
        kind: tuple[type[BaseModel], str],
        choices: Collection[BaseModel],
        notes: Collection[str] = (),
        **more: Any,
    ) -> BaseModel:
        model, name = kind
        if notes:
            more["notes"] = notes
        return model(**self.head, object=name, choices=choices, **more)


def _joined(before: Text | None, chunk: Chunk) -> Text:
    """What `explain` asks of a text so far: its first character that is no space, and how it ended."""
    return Text(((before.text if before else "") + chunk.text).strip()[:1], chunk.finish or "stop")


def create_router(compose: Compose) -> APIRouter:
    router = APIRouter(tags=["openai"])

    @router.get("/models", responses={200: {"model": ModelList}, **openai_errors(503)})
    async def models() -> JSONResponse:
        """Components, their named blends and their single adapters."""
        compose.check_ready()
        cards = [_card(id, parent) for id, parent in _model_ids(compose)]
        return JSONResponse(shown(ModelList(object="list", data=cards)))

    @router.get("/models/{model:path}", responses={200: {"model": ModelCard}, **openai_errors(404, 503)})
    async def model(model: str) -> JSONResponse:
        """One model."""
        compose.check_ready()
        _find(compose, model)
        id, colon, _ = model.partition(":")
        return JSONResponse(shown(_card(model, id if colon else None)))

    errors = openai_errors(400, 403, 404, 409, 413, 429, 500, 503)

    @router.post(
        "/completions",
        openapi_extra={"requestBody": body_schema(CompletionBody, "application/json")},
        responses={200: answers(CompletionReply, OPENAI_STREAM), **errors},
    )
    async def completions(request: Request) -> Response:
        """Completes raw text, whatever the component's task."""
        body = await read_body(CompletionBody, request)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1:
            raise InputError("prompt must be one text; send one request a prompt, they share a batch", field="prompt")
        return await _answer(compose, request, body, prompts[0], COMPLETION)

    @router.post(
        "/chat/completions",
        openapi_extra={"requestBody": body_schema(ChatBody, "application/json")},
        responses={200: answers(ChatReply, OPENAI_STREAM), **errors},
    )
    async def chat_completions(request: Request) -> Response:
        """Answers messages through the base's chat template, whatever the component's task."""
        body = await read_body(ChatBody, request)
        return await _answer(compose, request, body, tuple(turn.message for turn in body.messages), CHAT)

    return router


async def _answer(
    compose: Compose, request: Request, body: CompletionBody | ChatBody, prompt: str | tuple[Message, ...], shape: Shape
) -> Response:
    component, name = _find(compose, body.model)
    if body.lora is not None and name is not None:
        raise InputError(
            f"the model id '{body.model}' names a blend already; send 'lora' with the plain model id", field="lora"
        )
    mixed = {entry.name: entry.scale for entry in body.lora} if isinstance(body.lora, list) else body.lora
    blend = component.blends.resolve(name if mixed is None else mixed, place="lora")
    compose.check_ready()
    sampling = body.sampling(component.sampling())
    chunks = compose.generate(component.options.id, Generation(prompt, blend, sampling))
    head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    past_template = isinstance(prompt, str) and component.engine.has_chat_template

    def explain(texts: Collection[Text], usage: Usage) -> tuple[str, ...]:
        chat = "use /v1/chat/completions" if past_template else None
        return empty([text.text for text in texts], [text.finish for text in texts], sampling, usage, chat=chat)

    reply = Reply(head, shape, explain)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return await start_stream(request, reply.events(chunks, with_usage=bool(with_usage)))
    async with attended(request):
        done = await collect(chunks)
    return JSONResponse(shown(reply.whole(done)))


def _completion_choice(index: int, part: Text | Chunk) -> BaseModel:
    logprobs = completion_logprobs(part.logprobs)
    return CompletionChoice(index=index, text=part.text, finish_reason=part.finish, logprobs=logprobs)


def _completion_piece(chunk: Chunk, first: bool) -> BaseModel:
    return _completion_choice(chunk.index, chunk)


def _chat_choice(index: int, text: Text) -> BaseModel:
    message = AssistantMessage(role="assistant", content=text.text, refusal=None)
    return ChatChoice(index=index, message=message, finish_reason=text.finish, logprobs=chat_logprobs(text.logprobs))


def _chat_piece(chunk: Chunk, first: bool) -> BaseModel:
    delta: dict[str, Any] = {"role": "assistant"} if first else {}
    delta |= {"content": chunk.text} if chunk.text or first else {}
    return ChatPiece(
        index=chunk.index, delta=MessagePiece(**delta), finish_reason=chunk.finish,
        logprobs=chat_logprobs(chunk.logprobs),
    )  # fmt: skip


COMPLETION = Shape(
    "cmpl", (CompletionReply, "text_completion"), (CompletionReply, "text_completion"), _completion_choice,
    _completion_piece,
)  # fmt: skip
CHAT = Shape(
    "chatcmpl", (ChatReply, "chat.completion"), (ChatChunk, "chat.completion.chunk"), _chat_choice, _chat_piece
)


def _model_ids(compose: Compose) -> list[tuple[str, str | None]]:
    """All model ids, each with its parent's id."""
    ids: list[tuple[str, str | None]] = []
    for component in compose.models.values():
        own = component.options.public_name
        names = (*component.blends.named, *component.blends.adapters)
        ids += [(own, None), *((f"{own}:{name}", own) for name in names)]
    return ids


def _card(id: str, parent: str | None) -> ModelCard:
    return ModelCard(id=id, object="model", created=0, owned_by="model-compose", parent=parent)


def _find(compose: Compose, model: str) -> tuple[ModelComponent, str | None]:
    """The component that a model id names, and the blend behind its colon. Raises NotFound that lists the known ids."""
    id, colon, name = model.partition(":")
    component = next((part for part in compose.models.values() if part.options.public_name == id), None)
    if component is None or (colon and name not in (*component.blends.named, *component.blends.adapters)):
        known = ", ".join(id for id, _ in _model_ids(compose))
        raise NotFound(f"there is no model '{model}'; known: {known}")
    return component, name if colon else None
