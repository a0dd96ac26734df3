"""What a request asks of an engine and what comes back. All of it is frozen; engines and servers share it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from model_compose.lora.blend import Blend
from model_compose.room import Place

SMALLEST_TEMPERATURE = 1e-5
"""A lower temperature means greedy decoding: scores divided by it would not be finite."""

LEAST_LOGPROB = -9999.0
"""The log-probability of a token that cannot occur, as in OpenAI's API: JSON has no infinity."""

Finish = Literal["stop", "length"]
"""Why a text ended. stop: the model ended it, or a stop string did. length: it was cut at max_output_length, or at the end
of the context."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, as the base's chat template takes it. name: the speaker's, for templates that show it."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """What the whole text must be: any JSON object, JSON of a schema, or a match of a regular expression.

    text: the schema as JSON, the regex, or "" for any object. The model writes keys in the order that the schema has them.
    """

    kind: Literal["json_object", "json_schema", "regex"]
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Lengths count new tokens only. With max_output_length None, a text ends at EOS or at the end of
    the context.

    min_p: leaves out tokens less probable than this share of the best token's probability. presence_penalty: subtracted
    once from the score of a token that the new text contains already. frequency_penalty: subtracted as often as the text
    contains the token. logit_bias: token ids, each with the number that is added to its score. logprobs: how many
    alternatives to report for each token; 0 reports the chosen token only, None reports nothing.
    """

    max_output_length: int | None = None
    min_output_length: int = 1
    do_sample: bool = True
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    num_return_sequences: int = 1
    stop_sequences: tuple[str, ...] = ()
    response_format: ResponseFormat | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return not self.do_sample or self.temperature < SMALLEST_TEMPERATURE


@dataclass(frozen=True)
class Request:
    """One prompt (raw text, or messages for the chat template) with the blend to answer it and the way to draw.

    max_input_length: a longer prompt is truncated to that many tokens; with None, a prompt that does not fit into the
    context is refused. place: the place in the engine's room that the run took when it was accepted; with None, the
    request takes a place of its own.
    """

    prompt: str | tuple[Message, ...]
    blend: Blend
    sampling: Sampling = Sampling()
    max_input_length: int | None = None
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's bytes, which may be a part of a character, and the natural logarithm of its probability under the model,
    before temperature and filters. top: the most probable tokens with their logarithms. position: where the token starts
    in the sequence's text, in characters."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()
    position: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, over all its sequences, and the seconds from its start to its last token.

    cached_tokens: prompt tokens that were not computed again, because an earlier text started with the same tokens.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cached_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return round(self.completion_tokens / self.seconds, 2) if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of the text of sequence `index`. Whole characters only; the last chunk of a sequence has `finish`, the last
    chunk of the request has `usage`."""

    index: int = 0
    text: str = ""
    finish: Finish | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Text:
    """One sequence, collected."""

    text: str
    finish: Finish
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A collected stream: the sequences in order, and the usage."""

    texts: tuple[Text, ...]
    usage: Usage


async def collect(chunks: AsyncIterator[Chunk]) -> Completion:
    """The non-streaming answer, which is the collected stream."""
    parts: dict[int, list[Chunk]] = {}
    usage = Usage()
    async for chunk in chunks:
        parts.setdefault(chunk.index, []).append(chunk)
        usage = chunk.usage or usage
    texts = tuple(
        Text(
            "".join(chunk.text for chunk in parts[index]),
            next((chunk.finish for chunk in parts[index] if chunk.finish), "stop"),
            tuple(logprob for chunk in parts[index] for logprob in chunk.logprobs),
        )
        for index in sorted(parts)
    )
    return Completion(texts, usage)
