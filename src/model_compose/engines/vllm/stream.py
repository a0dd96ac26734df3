"""Sends one request to vLLM's /v1/completions, in token ids, and turns the answer into Chunks.

vLLM only chooses tokens. Text, stop strings and the end of a text are decided here, with the embedded engine's code.
"""

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx

from model_compose.engines.served.connection import error_of
from model_compose.engines.served.text import ServedText
from model_compose.errors import InputError, NotReady, RunError
from model_compose.generation import Chunk, Finish, ResponseFormat, Sampling, TokenLogprob

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Prompt:
    """One request for the server. model: the blend's model id there. room: the tokens that the context has left after the
    prompt. eos: the tokens that end a text."""

    model: str
    tokens: list[int]
    sampling: Sampling
    room: int
    eos: tuple[int, ...]

    @property
    def budget(self) -> int:
        """The most tokens that a text may have."""
        return min(self.sampling.max_output_length or self.room, self.room)


def body(prompt: Prompt) -> dict[str, Any]:
    """The request's JSON. It gives all sampling options, so that the server's defaults do not apply."""
    sampling = prompt.sampling
    greedy = sampling.greedy
    least = sampling.min_output_length if sampling.min_output_length > 1 else 0
    fields: dict[str, Any] = {
        "model": prompt.model,
        "prompt": prompt.tokens,
        "max_tokens": prompt.budget,
        "min_tokens": min(least, prompt.budget),
        "n": sampling.num_return_sequences,
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0 if greedy else sampling.min_p,
        **{name: getattr(sampling, name) for name in PENALTIES},
        "seed": sampling.seed,
        "stop": list(sampling.stop_sequences),
        "stop_token_ids": list(prompt.eos),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": sampling.logprobs,
    }
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.response_format is not None:
        fields["structured_outputs"] = _structured(sampling.response_format)
    return fields


def _structured(format: ResponseFormat) -> dict[str, Any]:
    """The grammar for vLLM. JSON must have no white space: vLLM's llguidance (1.7) cannot limit it, and small models would
    write it without end."""
    if format.kind == "regex":
        return {"regex": format.text}
    schema = json.loads(format.text) if format.kind == "json_schema" else {"type": "object"}
    return {"json": json.dumps({**schema, "x-guidance": {"whitespace_flexible": False, "lenient": False}})}


class Text(ServedText):
    """One text, made from the choices of a stream."""

    def __init__(self, index: int, prompt: Prompt, tokenizer: Any) -> None:
        super().__init__(index, tokenizer, prompt.tokens, prompt.sampling, prompt.budget, prompt.eos)
        self._alternatives = prompt.sampling.logprobs or 0

    def take(self, choice: dict[str, Any]) -> Chunk:
        """The chunk for one choice of a stream's event. Raises RunError if the server gave up the text."""
        logprobs: list[TokenLogprob] = []
        text = ""
        for position, token in enumerate(choice["token_ids"] or ()):
            text += self.push(token)
            if choice.get("logprobs") and token not in self.eos:
                logprobs.append(self._logprob(token, choice["logprobs"], position))
            if self.finish is not None:
                break
        if self.finish is None and choice["finish_reason"] is not None:
            text += self.end(_finish(choice["finish_reason"]))
        return Chunk(self.index, text, self.finish, tuple(logprobs))

    def _logprob(self, token: int, logprobs: dict[str, Any], position: int) -> TokenLogprob:
        best = sorted(logprobs["top_logprobs"][position].items(), key=lambda item: -item[1])[: self._alternatives]
        top = ((int(name.removeprefix("token_id:")), value) for name, value in best)
        return self.logprob(token, logprobs["token_logprobs"][position], top)


def _finish(reason: str) -> Finish:
    if reason in ("stop", "length"):
        return "stop" if reason == "stop" else "length"
    raise RunError(f"vLLM gave the request up ({reason}); its log has the details")


async def complete(client: httpx.AsyncClient, prompt: Prompt, texts: list[Text]) -> AsyncGenerator[Chunk | int]:
    """Yield the chunks of all texts and, at the end, the number of prompt tokens that came from vLLM's prefix cache.

    Closing the iterator closes the connection, which makes vLLM stop. Raises InputError, NotReady or RunError, and httpx's
    TransportError if the connection breaks.
    """
    ended = [False] * len(texts)
    async with client.stream("POST", "/v1/completions", json=body(prompt)) as response:
        if not response.is_success:
            await response.aread()
            raise refusal(response.status_code, error_of(response))
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if error := event.get("error"):
                raise refusal(int(error.get("code") or 500), str(error.get("message")))
            for choice in event["choices"]:
                text = texts[choice["index"]]
                ended[choice["index"]] = choice["finish_reason"] is not None
                if text.finish is None:
                    chunk = text.take(choice)
                    if chunk.text or chunk.logprobs or chunk.finish:
                        yield chunk
            if all(text.finish for text in texts) and not all(ended):
                break  # our stop strings ended the texts; vLLM would continue them
            if usage := event.get("usage"):
                yield int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
                return
    if not all(text.finish for text in texts):
        raise RunError("vLLM's answer ended too early; its log has the details")
    yield 0


def refusal(status: int, message: str) -> InputError | NotReady | RunError:
    """The error for a status that vLLM answers with."""
    if status == 404:
        return NotReady("vLLM has lost this blend's adapter, which is loaded again: try again in a moment")
    if status in (400, 422):
        grammar = message.startswith("Grammar error") or "grammar" in message.lower()
        field = "response_format" if grammar else None
        text = (
            f"the response_format cannot be kept to: {message}" if grammar else f"vLLM refuses the request: {message}"
        )
        return InputError(text, field=field)
    return RunError(f"vLLM failed while generating: {message}")
