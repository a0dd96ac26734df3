"""`type: model`: generates text with a base model and its blended adapters, on any engine."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from model_compose.components import DEFAULT_ID, ActionOptions, Answer, ComponentOptions, Delta, Result
from model_compose.components.model_actions import (
    MOST_TEXTS,
    ChatCompletion,
    ChatCompletionAction,
    Generation,
    Params,
    SamplingOverrides,
    TextGeneration,
    TextGenerationAction,
    wrong_fields,
)
from model_compose.components.notes import notes
from model_compose.engines import ENGINES, Engine
from model_compose.engines.options import AdapterOptions, ModelOptions
from model_compose.errors import Conflict, Forbidden, InputError, Keys, NotFound, Overloaded
from model_compose.generation import Chunk, Finish, Request, Sampling, Usage
from model_compose.lora.blend import Blend
from model_compose.progress import Report, silent
from model_compose.room import Place
from model_compose.schema import has_expression, invalid
from model_compose.sources.confine import confine

if TYPE_CHECKING:
    from model_compose.metrics import Meter


class LanguageModelOptions(ModelOptions, ComponentOptions):
    """A `model` component, whatever its task."""

    type: Literal["model"] = Field(description="The kind of component")

    @model_validator(mode="after")
    def _constant_blends_are_known(self) -> Self:
        for keys, action, blend in self._constant_blends():
            try:
                self.to_blends().resolve(blend)
            except InputError as error:
                raise invalid(f"the action '{action}': {error}", *keys, *error.at) from None
        return self

    def _constant_blends(self) -> Iterator[tuple[Keys, str, Any]]:
        """The blends that the YAML fixes for actions: where each stands, the action's id, the blend."""
        for keys, action in self.located_actions():
            blend = getattr(action, "blend", None)
            if not has_expression(blend):
                yield (*keys, "blend"), action.id, blend

    def users(self, adapter: str) -> list[str]:
        """What of the file needs the adapter with a weight that is not 0: its blends, and actions with a fixed blend."""
        blends = self.to_blends()
        used: list[tuple[str, Blend]] = [(f"the blend '{b.name}'", b) for b in (blends.default, *blends.named.values())]
        used += [(f"the action '{id}'", blends.resolve(blend)) for _, id, blend in self._constant_blends()]
        return [user for user, blend in used if adapter in blend.active]


class TextGenerationOptions(LanguageModelOptions):
    task: Literal["text-generation"] = Field(
        description="What actions take: text-generation a raw prompt, chat-completion messages"
    )
    action: TextGenerationAction | None = Field(default=None, description="The only action")  # type: ignore[valid-type]  # made by templated()
    actions: tuple[TextGenerationAction, ...] = Field(default=(), description="Several actions")  # type: ignore[valid-type]


class ChatCompletionOptions(LanguageModelOptions):
    task: Literal["chat-completion"] = Field(
        description="What actions take: text-generation a raw prompt, chat-completion messages"
    )
    action: ChatCompletionAction | None = Field(default=None, description="The only action")  # type: ignore[valid-type]
    actions: tuple[ChatCompletionAction, ...] = Field(default=(), description="Several actions")  # type: ignore[valid-type]

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
        self.adapters = dict(zip(options.adapter_names, options.peft_adapters, strict=True))
        """What each adapter is, those that clients have loaded included."""
        self.meter: Meter
        """Counts requests for /metrics. Compose sets it before anything runs."""
        self._inputs = INPUTS[options.task]
        self._samplings: dict[str, Sampling] = {}
        """What `sampling` has read of the actions, by id."""
        self.base_dir = base_dir
        self._changing = asyncio.Lock()
        """Held while an adapter is loaded or unloaded. So of two loads under one name, the later one stays."""

    async def open(self, report: Report) -> None:
        await self.engine.open(report)

    async def close(self) -> None:
        await self.engine.close()

    def sampling(self, action: str = DEFAULT_ID) -> Sampling:
        """An action's sampling as far as it is constant; the default action's is what /v1 uses for fields that a request
        leaves out."""
        if action not in self._samplings:
            self._samplings[action] = self._sampling(action)
        return self._samplings[action]

    def _sampling(self, action: str) -> Sampling:
        try:
            given: Any = self.options.find_action(action).model_dump(exclude_unset=True, warnings=False)
        except NotFound:  # there is no action, or there are several and none is the default
            given = {}
        params = {name: value for name, value in given.get("params", {}).items() if not has_expression(value)}
        constant = {
            name: value
            for name, value in given.items()
            if name in ("max_output_length", "min_output_length", "stop_sequences") and not has_expression(value)
        }
        return Generation(params=Params(**params), **constant).sampling

    async def load_adapter(self, options: AdapterOptions, report: Report = silent, *, in_place: bool = True) -> None:
        """Loads an adapter while requests run. Its weight is 0 unless a request or a blend of the file names it.

        in_place: whether it may replace an adapter of the same name.
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
            self.adapters[name] = options
            if name not in self.blends.adapters:
                self.blends = replace(self.blends, adapters=(*self.blends.adapters, name))

    async def unload_adapter(self, name: str) -> None:
        """Unloads an adapter; running requests finish with it. Raises NotFound, and Conflict if the file uses it."""
        async with self._changing:
            if name not in self.blends.adapters:
                raise NotFound(f"there is no adapter '{name}'; known: {', '.join(self.blends.adapters) or 'none'}")
            if users := self.options.users(name):
                raise Conflict(f"{users[0]} of the file uses the adapter '{name}'")
            self.blends = replace(self.blends, adapters=tuple(each for each in self.blends.adapters if each != name))
            del self.adapters[name]
            await self.engine.unload_adapter(name)

    def check_runtime_adapters(self) -> None:
        """Raises Forbidden unless clients may load and unload adapters here."""
        if not self.options.allow_runtime_adapters:
            raise Forbidden(
                "this model takes no adapters from clients; allow_runtime_adapters: true in the file would let it"
            )

    def runtime_adapter(self, name: str, reference: str) -> AdapterOptions:
        """The options of an adapter that a client names, if the file's runtime_adapter_sources allow it. Reads the disk.

        An adapter with a name of the file keeps the precision and device that the file says. Raises Forbidden, InputError.
        """
        self.check_runtime_adapters()
        source = confine(reference, self.options.runtime_adapter_sources, self.base_dir, field="lora_path")
        files = dict(zip(self.options.adapter_names, self.options.peft_adapters, strict=True))
        given = files.get(name, AdapterOptions(type="lora", model=source))
        return given.model_copy(update={"name": name, "model": source})

    def take(self, blend: Blend | None = None) -> Place:
        """A place in the engine's room. blend: the label under which a refusal is counted. Raises Overloaded."""
        try:
            return self.engine.room.take()
        except Overloaded as error:
            self.meter.refuse(blend or self.blends.default, self.blends, error)
            raise

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """The engine's text, counted for /metrics. Every request comes through here, from workflows and from /v1."""
        with self.meter.measure(request, self.blends) as measured:
            async with aclosing(self.engine.generate(request)) as chunks:
                async for chunk in chunks:
                    measured.see(chunk)
                    yield chunk

    async def run(
        self, action: ActionOptions, context: Mapping[str, Any], *, blend: Blend | None = None,
        sampling: SamplingOverrides | None = None, place: Place | None = None,
    ) -> AsyncGenerator[Delta | Result]:  # fmt: skip
        inputs = self.evaluate(action, context)
        used = self.blends.resolve(inputs.blend) if blend is None else blend
        prompts, drawn = inputs.prompts(), inputs.sampling if sampling is None else sampling.over(inputs.sampling)
        requests = [Request(prompt, used, drawn, inputs.max_input_length, place) for prompt in prompts]
        as_list = inputs.takes_many or drawn.num_return_sequences > 1
        identity = self.engine.identity(used)  # asked now, because adapters may be exchanged before the text ends
        output = action.output_template
        paths = [()] if output is None else output.places("result", ())

        texts = [""] * (len(requests) * drawn.num_return_sequences)
        finishes: list[Finish] = ["stop"] * len(texts)
        usage, start = Usage(), time.perf_counter()
        one = len(requests) == 1
        generating = self.generate(requests[0]) if one else _merge(self.generate, requests, inputs.batch_size)
        async with aclosing(generating) as chunks:
            async for chunk in chunks:
                texts[chunk.index] += chunk.text
                finishes[chunk.index] = chunk.finish or finishes[chunk.index]
                usage = _add(usage, chunk.usage) if chunk.usage else usage
                if chunk.text:
                    for path in paths:
                        yield Delta((*path, chunk.index) if as_list else path, chunk.text)
        usage = replace(usage, seconds=time.perf_counter() - start)
        value: Any = texts if as_list else texts[0]
        if output is not None:
            value = output.evaluate({**context, "result": value})
        past_template = isinstance(prompts[0], str) and self.engine.has_chat_template
        said = notes(texts, finishes, drawn, usage, past_template=past_template)
        finish = tuple(finishes) if as_list else finishes[0]
        yield Result(value, Answer(self.options.id, used, identity, usage, finish, said))

    def evaluate(self, action: ActionOptions, context: Mapping[str, Any]) -> TextGeneration | ChatCompletion:
        """The action's fields with expressions evaluated; null leaves a field at its default. Raises InputError."""
        values = {name: _drop_nulls(template.evaluate(context)) for name, template in action.templates.items()}
        try:
            return self._inputs.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            fields = wrong_fields(error, values)
            summary = "; ".join(f"{field.field}: {field.message}" for field in fields)
            raise InputError(f"the action '{action.id}' cannot take this input: {summary}", fields) from None


async def _merge(
    generate: Callable[[Request], AsyncGenerator[Chunk]], requests: list[Request], at_once: int
) -> AsyncGenerator[Chunk]:
    """The chunks of several requests, at most `at_once` running, renumbered so that every sequence has its own index."""
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
    """Raises what failed in the task. A task group wraps its failures; the first one is the one to report."""
    try:
        await task
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _add(one: Usage, other: Usage) -> Usage:
    """The sum of the tokens. Seconds are left out: they do not add up when requests run at the same time."""
    return Usage(
        one.prompt_tokens + other.prompt_tokens, one.completion_tokens + other.completion_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
    )  # fmt: skip


def _drop_nulls(value: Any) -> Any:
    """A null inside params leaves that parameter at its default."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value
