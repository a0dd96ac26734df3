"""The nouns of generation: what a request asks for and what comes back. All frozen; engines and servers share them."""

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
"""Why a text ended: by itself or at a stop string; or at max_output_length or the end of the context."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, as the base's chat template takes it. name: of who speaks, for templates that show it."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True)
class ResponseFormat:
    """What the whole text must be: any JSON object, JSON of a schema, or a match of a regular expression.

    text: the schema as JSON with its keys in their order, which is the order in which they are written; the regex; or "".
    """

    kind: Literal["json_object", "json_schema", "regex"]
    text: str = ""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Lengths count new tokens only; max_output_length None is until EOS or the end of the context.

    min_p: tokens less probable than this share of the best one's probability are out. presence_penalty is subtracted from
    the score of a token that the new text has already, frequency_penalty for each time that it has it. logit_bias: token
    ids, each with what is added to its score. logprobs: how many alternatives to report for each token (0 reports the
    chosen one alone), None for no report.
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

    max_input_length truncates a longer prompt to that many tokens; None refuses one that exceeds the context. place: the
    one in the engine's room that its run was accepted with; None takes one of its own.
    """

    prompt: str | tuple[Message, ...]
    blend: Blend
    sampling: Sampling = Sampling()
    max_input_length: int | None = None
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's bytes, which may be a part of a character, and its natural-log probability under the model, before
    temperature and filters. top: the likeliest tokens with theirs. position: where it starts in the sequence's text, in
    characters."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()
    position: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, over all its sequences, and the seconds from its start to its last token.

    cached_tokens: those of the prompt that were not computed again, as a text before started alike.
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
