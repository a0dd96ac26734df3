"""What an action of `type: model` takes: its fields, how much of each, and the form of it that may hold expressions."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

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

from model_compose.components import ActionOptions
from model_compose.components.response_format import AnyFormat
from model_compose.errors import FieldError, InputError
from model_compose.expressions import strict_json
from model_compose.generation import Message, Sampling
from model_compose.schema import Options, at_most, field_of, invalid, templated

MOST_MESSAGES = 4096
MOST_PROMPTS = 4096
"""Prompts of one run. Each becomes a request to the engine."""

MOST_TEXTS = 256
"""Texts of one run that are in the engine at the same time."""

MOST_BIASES = 4096
MOST_STOPS = 64
LONGEST_STOP = 1024
"""In bytes. Each new token is compared with all stop strings."""


def _short_stops(stops: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    for stop in (stops,) if isinstance(stops, str) else stops or ():
        if (size := len(stop.encode(errors="surrogatepass"))) > LONGEST_STOP:
            raise PydanticCustomError(
                "stop_too_long", "a stop string of {size} bytes, and it may have at most {most}",
                {"size": size, "most": LONGEST_STOP},
            )  # fmt: skip
    return stops


def _one_bias_a_token(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """Refuses a token that is named twice: in JSON it may be spelt "5" and "05"."""
    biases = read(value)
    spelt = dict[int, str]()
    for name, bias in value.items() if len(biases) < len(value) else ():
        (token,) = read({name: bias})
        if token in spelt:
            names = f"'{spelt[token]}' and '{name}'"
            raise invalid(f"the token {token} is named twice: {names}")
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


Length = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Params(Options):
    """How tokens are drawn; the dialect's defaults, and our own keys after OpenAI's."""

    later: ClassVar[Mapping[str, Any]] = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": True}
    do_sample: bool = Field(
        default=True, description="Whether tokens are drawn at random; false always takes the most likely one (greedy)"
    )
    temperature: Temperature = Field(
        default=0.7, description="Flattens the distribution above 1 and sharpens it below; 0 is greedy"
    )
    top_p: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Draw from the most likely tokens that together have this probability; 1 is off",
    )
    top_k: int = Field(default=50, ge=0, description="Draw from this many of the most likely tokens; 0 is off")
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Leave out tokens below this share of the most likely one's probability; 0 is off",
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Divides the scores of tokens that were used already; 1 is off"
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        description="Subtracted from the score of each token that the answer has used already; 0 is off",
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="The same, times how often the answer has used it; 0 is off"
    )
    logit_bias: LogitBias = Field(
        default={}, description="{token id: number from -100 to 100 that is added to its score}"
    )
    seed: Seed | None = Field(default=None, description="Makes the draws repeatable; a new one each time if unset")


class SamplingOverrides(Options):
    """Sampling that one run asks for in place of what its actions say. A field that is left out stays as in the action."""

    max_output_length: Length | None = Field(default=None, description="The text is cut at this many tokens")
    temperature: Temperature | None = Field(
        default=None,
        description="0 is greedy; every other value draws at random, also if the file says do_sample: false",
    )
    seed: Seed | None = Field(default=None, description="Makes the draws repeatable")

    @classmethod
    def read(cls, value: "Self | Mapping[str, Any] | None") -> Self | None:
        """The overrides, checked where they come as a mapping. Raises InputError that names each wrong field."""
        if value is None or isinstance(value, cls):
            return value
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            fields = wrong_fields(error, value, "sampling")
            raise InputError("; ".join(f"{each.field}: {each.message}" for each in fields), fields) from None

    def over(self, sampling: Sampling) -> Sampling:
        """`sampling` with the given fields in place of its own."""
        given = self.model_dump(exclude_none=True)
        if self.temperature is not None:
            given["do_sample"] = self.temperature > 0
        return replace(sampling, **given)


class Generation(Options):
    """What an action of a language model takes besides its prompt. Lengths are in tokens."""

    blend: str | dict[str, Any] | None = Field(
        default=None,
        description="The blend of requests that name none: a named blend, or {adapter: weight}; the default blend if unset",
    )
    max_input_length: int | None = Field(
        default=None, ge=1, description="Longer prompts are truncated to this many tokens"
    )
    max_output_length: Length | None = Field(
        default=None,
        description="The text is cut at this many tokens; if unset, the end of the context is the limit",
    )
    min_output_length: int = Field(default=1, ge=0, description="Tokens before which the text may not end")
    num_return_sequences: int = Field(
        default=1, ge=1, le=64, description="Texts for each prompt; with more than one, the result is a list"
    )
    stop_sequences: Stops = Field(
        default=None, description="Texts at which generation stops; they are not part of the result"
    )
    batch_size: int = Field(default=1, ge=1, le=MOST_TEXTS, description="Prompts of a list that run at the same time")
    streaming: bool = Field(
        default=False, description="With output_only, answer as an event stream in the original's form"
    )
    response_format: AnyFormat | None = Field(
        default=None, description="What the whole text must be: JSON, JSON of a schema, or text of a pattern"
    )
    params: Params = Field(default=Params(), description="How tokens are drawn")

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

    prompt: Prompts = Field(
        default=None,
        description="The prompt, or a list of prompts; the model continues it as it stands, without a chat template",
    )
    text: Prompts = Field(default=None, description="The same as prompt; give one of the two")

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.text is None):
            raise ValueError("give one of 'prompt' and 'text'")
        return self

    @property
    def takes_many(self) -> bool:
        """Whether the prompt is a list; then the result is a list too."""
        return isinstance(self.prompt if self.prompt is not None else self.text, tuple)

    def prompts(self) -> tuple[str, ...]:
        prompt = self.prompt if self.prompt is not None else self.text
        assert prompt is not None
        return (prompt,) if isinstance(prompt, str) else prompt


class ChatMessage(Options):
    """One turn of a conversation."""

    role: str = Field(description="Who speaks: system, user, assistant, or what else the chat template knows")
    content: str = Field(description="What is said")


def _turns(value: Any) -> Any:
    """A list of turns: of a single turn, or read from JSON text, which is how forms send it. Raises ValueError."""
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
    ] = Field(description="The conversation so far, which the base's chat template turns into a prompt")

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
            raise invalid("an action of a text-generation model needs exactly one of 'prompt' and 'text'", "text")
        return self


class ChatCompletionTemplate(ActionOptions):
    needs: ClassVar[tuple[str, ...]] = ("messages",)
    structured: ClassVar[tuple[str, ...]] = ("messages", *STRUCTURED)


def wrong_fields(error: ValidationError, data: Any, at: str = "") -> list[FieldError]:
    """What is wrong with each field of `data`, which stands at `at`."""
    found = [(field_of(item, data), item["msg"]) for item in error.errors()]
    return [FieldError(".".join(filter(None, (at, field))) or "input", message) for field, message in found]


TextGenerationAction = templated(TextGeneration, TextGenerationTemplate)
ChatCompletionAction = templated(ChatCompletion, ChatCompletionTemplate)
