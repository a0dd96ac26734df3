"""`type: model`: generates text with a base model and its blended adapters, on any engine."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model_compose.components import DEFAULT_ID, ActionOptions, Answer, ComponentOptions, Delta, Result, one_or_many
from model_compose.components.notes import notes
from model_compose.components.response_format import AnyFormat
from model_compose.engines import ENGINES, AdapterOptions, Engine, ModelOptions
from model_compose.errors import Conflict, FieldError, Forbidden, InputError, NotFound, Overloaded
from model_compose.expressions import parse, strict_json
from model_compose.generation import Chunk, Finish, Message, Request, Sampling, Usage
from model_compose.lora.blend import Blend
from model_compose.progress import Report, silent
from model_compose.room import Place
from model_compose.schema import Options, at_most, field_of, has_expression, templated
from model_compose.sources.confine import confine

if TYPE_CHECKING:
    from model_compose.metrics import Meter

MOST_MESSAGES = 4096
MOST_PROMPTS = 4096
"""Of one request; each is a request to the engine."""

MOST_TEXTS = 256
"""Of one run that are with the engine at the same time."""

MOST_BIASES = 4096
MOST_STOPS = 64
LONGEST_STOP = 1024
"""In bytes. Every token that is made is compared with all stop strings."""


def _short_stops(stops: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    for stop in (stops,) if isinstance(stops, str) else stops or ():
        if (size := len(stop.encode(errors="surrogatepass"))) > LONGEST_STOP:
            raise PydanticCustomError(
                "stop_too_long", "a stop string of {size} bytes, and it may have at most {most}",
                {"size": size, "most": LONGEST_STOP},
            )  # fmt: skip
    return stops


def _one_bias_a_token(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """In JSON a token may be spelt "5" and "05"."""
    biases = read(value)
    spelt = dict[int, str]()
    for name, bias in value.items() if len(biases) < len(value) else ():
        (token,) = read({name: bias})
        if token in spelt:
            names = f"'{spelt[token]}' and '{name}'"
            raise PydanticCustomError(
                "token", "the token {token} is named twice: {names}", {"token": token, "names": names}
            )
        spelt[token] = str(name)
    return biases


LogitBias = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
    WrapValidator(_one_bias_a_token),
    at_most(MOST_BIASES, "tokens"),
]
Stops = Annotated[str | tuple[str, ...] | None, at_most(MOST_STOPS, "stop strings"), AfterValidator(_short_stops)]

EXPECTED_MESSAGES = 'expected a list of messages, such as [{"role": "user", "content": "Hello"}]'
STRUCTURED = ("response_format", "params.logit_bias")


class Params(Options):
    """How tokens are drawn; the dialect's defaults, and our own keys after OpenAI's."""

    later: ClassVar[Mapping[str, Any]] = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": True}
    do_sample: bool = True
    temperature: float = Field(default=0.7, ge=0, description="0 is greedy")
    top_p: float = Field(default=0.9, gt=0, le=1)
    top_k: int = Field(default=50, ge=0, description="0 is off")
    min_p: float = Field(default=0.0, ge=0, le=1, description="0 is off")
    repetition_penalty: float = Field(default=1.0, gt=0)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="0 is off")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="0 is off")
    logit_bias: LogitBias = Field(default={}, description="{token id: what is added to its score, -100 to 100}")
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class Generation(Options):
    """What an action of a language model takes besides its prompt. Lengths are in tokens."""

    blend: str | dict[str, Any] | None = Field(default=None, description="A named blend, or {adapter: weight}")
    max_input_length: int | None = Field(default=None, ge=1, description="Truncates longer prompts")
    max_output_length: int | None = Field(default=None, ge=1, description="Until EOS or the context's end if unset")
    min_output_length: int = Field(default=1, ge=0)
    num_return_sequences: int = Field(default=1, ge=1, le=64)
    stop_sequences: Stops = None
    batch_size: int = Field(default=1, ge=1, le=MOST_TEXTS, description="Prompts of a list that run at the same time")
    streaming: bool = Field(default=False, description="With output_only, answer as the dialect's event stream")
    response_format: AnyFormat | None = Field(
        default=None, description="What the whole text must be: JSON, or a pattern"
    )
    params: Params = Params()

    @property
    def sampling(self) -> Sampling:
        params = self.params.model_dump()
        stops = (self.stop_sequences,) if isinstance(self.stop_sequences, str) else self.stop_sequences or ()
        return Sampling(
            max_output_length=self.max_output_length,
            min_output_length=self.min_output_length,
            num_return_sequences=self.num_return_sequences,
            stop_sequences=tuple(stop for stop in stops if stop),
            response_format=self.response_format.format if self.response_format else None,
            logit_bias=tuple(sorted(params.pop("logit_bias").items())),
            **params,
        )


Prompts = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)] | None, at_most(MOST_PROMPTS, "prompts")]


class TextGeneration(Generation):
    """`task: text-generation`: a raw prompt. `text` is the same as `prompt`."""

    prompt: Prompts = None
    text: Prompts = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.text is None):
            raise ValueError("give one of 'prompt' and 'text'")
        return self

    @property
    def takes_many(self) -> bool:
        """Whether the prompt is a list, so that the result is one too."""
        return isinstance(self.prompt if self.prompt is not None else self.text, tuple)

    def prompts(self) -> tuple[str, ...]:
        prompt = self.prompt if self.prompt is not None else self.text
        assert prompt is not None
        return (prompt,) if isinstance(prompt, str) else prompt


class ChatMessage(Options):
    """One turn of a conversation."""

    role: str
    content: str


def _turns(value: Any) -> Any:
    """One turn as a list of one; JSON text as what it says, since forms send it so. Raises ValueError."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = strict_json(value)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple) or not turns or isinstance(turns[0], str):
        raise PydanticCustomError("messages", EXPECTED_MESSAGES)
    return turns


class ChatCompletion(Generation):
    """`task: chat-completion`: messages, through the base's chat template."""

    messages: Annotated[
        tuple[ChatMessage, ...],
        at_most(MOST_MESSAGES, "messages"),
        BeforeValidator(_turns, json_schema_input_type=ChatMessage | tuple[ChatMessage, ...]),
    ]

    @property
    def takes_many(self) -> bool:
        return False

    def prompts(self) -> tuple[tuple[Message, ...]]:
        return (tuple(Message(turn.role, turn.content) for turn in self.messages),)


class TextGenerationTemplate(ActionOptions):
    needs: ClassVar[tuple[str, ...]] = ("prompt", "text")
    structured: ClassVar[tuple[str, ...]] = STRUCTURED

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if len({"prompt", "text"} & self.model_fields_set) != 1:
            raise ValueError("an action of a text-generation model needs exactly one of 'prompt' and 'text'")
        return self


class ChatCompletionTemplate(ActionOptions):
    needs: ClassVar[tuple[str, ...]] = ("messages",)
    structured: ClassVar[tuple[str, ...]] = ("messages", *STRUCTURED)


TextGenerationAction = templated(TextGeneration, TextGenerationTemplate)
ChatCompletionAction = templated(ChatCompletion, ChatCompletionTemplate)


class LanguageModelOptions(ModelOptions, ComponentOptions):
    """A `model` component, whatever its task."""

    type: Literal["model"]

    @model_validator(mode="after")
    def _constant_blends_are_known(self) -> Self:
        for action, blend in self._constant_blends():
            try:
                self.to_blends().resolve(blend)
            except InputError as error:
                raise ValueError(f"the action '{action}': {error}") from None
        return self

    def _constant_blends(self) -> Iterator[tuple[str, Any]]:
        """The actions' ids, each with the blend that its YAML fixes."""
        for action in self.all_actions:
            blend = getattr(action, "blend", None)
            if not has_expression(blend):
                yield action.id, blend

    def users(self, adapter: str) -> list[str]:
        """What of the file needs the adapter with a weight that is not 0: its blends, and actions with a fixed blend."""
        blends = self.to_blends()
        used: list[tuple[str, Blend]] = [(f"the blend '{b.name}'", b) for b in (blends.default, *blends.named.values())]
        used += [(f"the action '{id}'", blends.resolve(blend)) for id, blend in self._constant_blends()]
        return [user for user, blend in used if adapter in blend.active]

    @property
    def all_actions(self) -> tuple[ActionOptions, ...]:
        both: Any = self
        return tuple(one_or_many(both.action, both.actions))


class TextGenerationOptions(LanguageModelOptions):
    task: Literal["text-generation"]
    action: TextGenerationAction | None = None  # type: ignore[valid-type]  # made by templated()
    actions: tuple[TextGenerationAction, ...] = ()  # type: ignore[valid-type]


class ChatCompletionOptions(LanguageModelOptions):
    task: Literal["chat-completion"]
    action: ChatCompletionAction | None = None  # type: ignore[valid-type]
    actions: tuple[ChatCompletionAction, ...] = ()  # type: ignore[valid-type]

    @property
    def chats(self) -> bool:
        return True


INPUTS: dict[str, type[TextGeneration] | type[ChatCompletion]] = {
    "text-generation": TextGeneration,
    "chat-completion": ChatCompletion,
}


class ModelComponent:
    """One engine with its base and adapters, and the actions that ask it."""

    Options: ClassVar[Any] = Annotated[TextGenerationOptions | ChatCompletionOptions, Field(discriminator="task")]

    def __init__(self, options: TextGenerationOptions | ChatCompletionOptions, base_dir: Path) -> None:
        self.options = options
        self.blends = options.to_blends()
        self.engine: Engine = ENGINES[options.driver](options, self.blends, base_dir)
        self.meter: Meter | None = None
        """Counts requests, where Compose has given one."""
        self._inputs = INPUTS[options.task]
        self._base_dir = base_dir
        self._changing = asyncio.Lock()
        """Adapters come and go one after the other, so of two loads of one name the later one stays."""

    async def open(self, report: Report) -> None:
        await self.engine.open(report)

    async def close(self) -> None:
        await self.engine.close()

    def sampling(self) -> Sampling:
        """The default action's sampling as far as it is constant: what /v1 uses for fields that a request leaves out."""
        try:
            given: Any = self.options.find_action(DEFAULT_ID).model_dump(exclude_unset=True, warnings=False)
        except NotFound:  # no action, or several and none is the default
            given = {}
        params = {name: value for name, value in given.get("params", {}).items() if not has_expression(value)}
        constant = {
            name: value
            for name, value in given.items()
            if name in ("max_output_length", "min_output_length", "stop_sequences") and not has_expression(value)
        }
        return Generation(params=Params(**params), **constant).sampling

    async def load_adapter(self, options: AdapterOptions, report: Report = silent, *, in_place: bool = True) -> None:
        """One more adapter while requests run, or, in place, another one of the same name; its weight is 0 unless a request
        or a blend of the file names it.

        Raises InputError for a name that is taken, SourceError, AdapterError, Conflict.
        """
        name = options.name
        if not name or name in (*self.blends.named, "default"):
            raise InputError(f"an adapter cannot be called '{name}' here: that is a blend's name", field="lora_name")
        async with self._changing:
            if name in self.blends.adapters and not in_place:
                raise InputError(
                    f"the adapter '{name}' is loaded already; to put another one in its place, set load_inplace to true",
                    field="lora_name",
                )
            await self.engine.load_adapter(options, report)
            if name not in self.blends.adapters:
                self.blends = replace(self.blends, adapters=(*self.blends.adapters, name))

    async def unload_adapter(self, name: str) -> None:
        """Takes an adapter away; running requests finish with it. Raises NotFound, Conflict where the file needs it."""
        async with self._changing:
            if name not in self.blends.adapters:
                raise NotFound(f"there is no adapter '{name}'; known: {', '.join(self.blends.adapters) or 'none'}")
            if users := self.options.users(name):
                raise Conflict(f"{users[0]} of the file uses the adapter '{name}'")
            self.blends = replace(self.blends, adapters=tuple(each for each in self.blends.adapters if each != name))
            await self.engine.unload_adapter(name)

    def check_runtime_adapters(self) -> None:
        """Raises Forbidden unless clients may load and unload adapters here."""
        if not self.options.allow_runtime_adapters:
            raise Forbidden(
                "this model takes no adapters from clients; allow_runtime_adapters: true in the file would let it"
            )

    def runtime_adapter(self, name: str, reference: str) -> AdapterOptions:
        """A client's adapter as `load_adapter` takes it, confined to the file's runtime_adapter_sources. Reads the disk.

        One of the file's names keeps its precision and device. Raises Forbidden, InputError.
        """
        self.check_runtime_adapters()
        source = confine(reference, self.options.runtime_adapter_sources, self._base_dir, field="lora_path")
        files = dict(zip(self.options.adapter_names, self.options.peft_adapters, strict=True))
        given = files.get(name, AdapterOptions(type="lora", model=source))
        return given.model_copy(update={"name": name, "model": source})

    def take(self, blend: Blend | None = None) -> Place:
        """A place in the engine's room. blend: under which a refusal is counted. Raises Overloaded."""
        try:
            return self.engine.room.take()
        except Overloaded as error:
            if self.meter is not None:
                self.meter.refuse(blend or self.blends.default, self.blends, error)
            raise

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """The engine's text, counted: the way of every request, from workflows and from /v1."""
        chunks = self.engine.generate(request)
        return chunks if self.meter is None else self.meter.measure(request, self.blends, chunks)

    async def run(
        self, action: str, context: Mapping[str, Any], blend: Any = None, place: Place | None = None
    ) -> AsyncGenerator[Delta | Result]:
        chosen = self.options.find_action(action)
        inputs = self.evaluate(chosen, context)
        used = self.blends.resolve(inputs.blend if blend in (None, "") else blend)
        prompts, sampling = inputs.prompts(), inputs.sampling
        several = inputs.takes_many
        requests = [Request(prompt, used, sampling, inputs.max_input_length, place) for prompt in prompts]
        as_list = several or sampling.num_return_sequences > 1
        identity = self.engine.identity(used)  # now: the adapters may be others when the text ends
        output = parse(chosen.output)
        paths = output.places("result", ()) if chosen.output is not None else [()]

        texts = [""] * (len(requests) * sampling.num_return_sequences)
        finishes: list[Finish] = ["stop"] * len(texts)
        usage, start = Usage(), time.perf_counter()
        async with aclosing(_merge(self.generate, requests, inputs.batch_size)) as chunks:
            async for chunk in chunks:
                texts[chunk.index] += chunk.text
                finishes[chunk.index] = chunk.finish or finishes[chunk.index]
                usage = _add(usage, chunk.usage) if chunk.usage else usage
                if chunk.text:
                    for path in paths:
                        yield Delta((*path, chunk.index) if as_list else path, chunk.text)
        usage = replace(usage, seconds=time.perf_counter() - start)
        value: Any = texts if as_list else texts[0]
        if chosen.output is not None:
            value = output.evaluate({**context, "result": value})
        past_template = isinstance(prompts[0], str) and self.engine.has_chat_template
        said = notes(texts, finishes, sampling, usage, past_template=past_template)
        finish = tuple(finishes) if as_list else finishes[0]
        yield Result(value, Answer(self.options.id, used, identity, usage, finish, said))

    def evaluate(self, action: ActionOptions, context: Mapping[str, Any]) -> TextGeneration | ChatCompletion:
        """The action's fields with expressions evaluated; null leaves a field at its default. Raises InputError."""
        values = {name: _drop_nulls(field.evaluate(context)) for name, field in action.fields().items()}
        try:
            return self._inputs.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            fields = [FieldError(field_of(e, values) or "input", e["msg"]) for e in error.errors()]
            summary = "; ".join(f"{field.field}: {field.message}" for field in fields)
            raise InputError(f"the action '{action.id}' cannot take this input: {summary}", fields) from None


async def _merge(
    generate: Callable[[Request], AsyncGenerator[Chunk]], requests: list[Request], at_once: int
) -> AsyncGenerator[Chunk]:
    """The chunks of all requests, at most `at_once` running, renumbered so that every sequence has its own index."""
    if len(requests) == 1:
        async with aclosing(generate(requests[0])) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    width = requests[0].sampling.num_return_sequences
    queue: asyncio.Queue[Chunk | None] = asyncio.Queue()
    limit = asyncio.Semaphore(max(1, min(at_once, MOST_TEXTS // width)))

    async def feed(number: int, request: Request) -> None:
        async with limit, aclosing(generate(request)) as chunks:
            async for chunk in chunks:
                await queue.put(replace(chunk, index=number * width + chunk.index))

    async def feed_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for number, request in enumerate(requests):
                    group.create_task(feed(number, request))
        finally:
            queue.put_nowait(None)

    feeding = asyncio.create_task(feed_all())
    try:
        while (item := await queue.get()) is not None:
            yield item
        await _reraise(feeding)
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _reraise(task: asyncio.Task[None]) -> None:
    """A task group wraps what failed; the first failure is the one to tell."""
    try:
        await task
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _add(one: Usage, other: Usage) -> Usage:
    """The tokens of both. Seconds do not add up where requests run at the same time."""
    return Usage(
        one.prompt_tokens + other.prompt_tokens, one.completion_tokens + other.completion_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
    )  # fmt: skip


def _drop_nulls(value: Any) -> Any:
    """A null inside params leaves that parameter at its default."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
