"""Some tokens of a text from llama-server's /completion: ids go in, ids come out.

llama-server (tools/server/server-context.cpp, process_token) tells nothing of a token that ends within a character: it is
missing in a stream, and has no log-probability. An answer that is not streamed has all ids.
"""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from model_compose.engines.served.connection import error_of
from model_compose.errors import InputError, LoadError, RunError
from model_compose.generation import Sampling

PATH = "/completion"
TURN = 16
"""Tokens that a text gets at once, before another blend has its turn."""
FORCING = 1e6
"""Added to a score that must win, in float32."""


@dataclass(frozen=True)
class Told:
    """A token. cached: how many tokens of the prompt were not computed; probabilities: llama-server's own, if asked for."""

    token: int
    cached: int
    probabilities: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Ask:
    """The next tokens of a text. tokens: prompt and what the text has so far, which is `generated` tokens.

    slot: its number. weights: of all adapters, in the server's order. reuse: whether the slot holds keys and values of
    this very blend. seed: of these tokens alone.
    """

    tokens: list[int]
    generated: int
    sampling: Sampling
    eos: tuple[int, ...]
    slot: int
    weights: tuple[float, ...]
    reuse: bool
    budget: int
    seed: int

    @property
    def count(self) -> int:
        """One alone where llama-server counts otherwise than we do, or tells no more of the tokens before."""
        sampling = self.sampling
        if sampling.logprobs is not None or sampling.presence_penalty or sampling.frequency_penalty:
            return 1
        wanted = min(TURN, self.budget - self.generated)
        return min(wanted, sampling.min_output_length - self.generated) if self.may_not_end else wanted

    @property
    def may_not_end(self) -> bool:
        return 1 < self.sampling.min_output_length > self.generated

    def body(self, *, stream: bool) -> dict[str, Any]:
        """The request's JSON. All of the sampling is said, so that no default of the server's applies.

        Every adapter is listed: a request that names none has those of before (launch_slot_with_task). The window of the
        presence and frequency penalties is the new text, and there is one for both kinds: see `refuse`.
        """
        sampling = self.sampling
        greedy = sampling.greedy
        apart = sampling.presence_penalty or sampling.frequency_penalty
        biases: list[tuple[int, float | bool]] = [*sampling.logit_bias]
        if self.may_not_end:
            biases += [(token, False) for token in self.eos]
        return {
            "prompt": self.tokens,
            "id_slot": self.slot,
            "lora": [{"id": number, "scale": weight} for number, weight in enumerate(self.weights)],
            "cache_prompt": self.reuse,
            "n_cache_reuse": 0,  # pieces out of the middle, moved: they have seen other tokens before them
            "n_predict": self.count,
            "stream": stream,
            "return_tokens": True,
            "timings_per_token": True,
            "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "temperature": 0.0 if greedy else sampling.temperature,
            "top_k": 0 if greedy else sampling.top_k,
            "top_p": 1.0 if greedy else sampling.top_p,
            "min_p": 0.0 if greedy else sampling.min_p,
            "repeat_last_n": self.generated if apart else len(self.tokens) + self.count,
            "repeat_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "logit_bias": biases,
            "seed": self.seed,
            "n_probs": 0 if sampling.logprobs is None else max(1, sampling.logprobs),
            "stop": [],
        }


def refuse(sampling: Sampling) -> None:
    """Raises InputError for what llama-server cannot do as the other drivers do it."""
    penalised = sampling.repetition_penalty != 1.0
    problems = {
        "response_format": (
            sampling.response_format is not None, "its grammars leave out what they do not know of a schema"
        ),
        "repetition_penalty": (
            penalised and bool(sampling.presence_penalty or sampling.frequency_penalty),
            "it counts over one window for all penalties, so not together with presence_penalty or frequency_penalty",
        ),
        "logit_bias": (
            penalised and bool(sampling.logit_bias), "it adds that before it penalises, so not with repetition_penalty"
        ),
    }  # fmt: skip
    for field, (given, reason) in problems.items():
        if given:
            raise InputError(
                f"llama-server cannot do this {field} exactly: {reason}; leave it out, or leave options.server out of the "
                "file, with which llama.cpp runs in this process",
                field=field,
            )


class LeftOut(Exception):
    """A stream has left a token out, and is of no more use. cached: as in Told."""

    def __init__(self, cached: int) -> None:
        super().__init__("a token ends within a character")
        self.cached = cached


async def next_tokens(client: httpx.AsyncClient, ask: Ask, *, stream: bool) -> AsyncGenerator[Told]:
    """At most ask.count tokens. Closing the iterator closes the connection, which makes llama-server stop.

    Raises LeftOut where it streams, InputError, RunError, and httpx's TransportError where the connection breaks.
    """
    if not stream:
        answer = await _post(client, ask.body(stream=False))
        probabilities = next(iter(answer.get("completion_probabilities") or ()), None)
        for token in answer["tokens"]:
            yield Told(token, answer["timings"]["cache_n"], probabilities)
        return
    made = 0
    async with aclosing(_events(client, ask.body(stream=True))) as events:
        async for event in events:
            made += len(event["tokens"])
            if event["tokens_predicted"] != made:
                raise LeftOut(event["timings"]["cache_n"])
            for token in event["tokens"]:
                yield Told(token, event["timings"]["cache_n"])


async def distribution(client: httpx.AsyncClient, ask: Ask, plain: int, vocabulary: int) -> dict[int, float]:
    """The log-probabilities of all next tokens, the likeliest first.

    plain: a token of whole characters. It is forced, since others may tell nothing; what it tells is of the scores before.
    """
    body = ask.body(stream=False) | {"logit_bias": [(plain, FORCING)], "n_probs": vocabulary}
    (told,) = (await _post(client, body))["completion_probabilities"]
    return {each["id"]: each["logprob"] for each in told["top_logprobs"]}


async def ends(client: httpx.AsyncClient) -> tuple[int, ...]:
    """The tokens with which llama.cpp ends a text. Raises LoadError for a llama-server that is too old."""
    body = {"prompt": [0], "n_predict": 1, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    try:
        answer = await _post(client, body)
        (_,), _ = answer["tokens"], answer["timings"]["cache_n"]
        return tuple(bias["token"] for bias in answer["generation_settings"]["logit_bias"])
    except (LookupError, ValueError, TypeError) as error:
        raise LoadError(
            f"this llama-server does not tell what is needed of a text ({error!r}); use a newer one"
        ) from None


async def _post(client: httpx.AsyncClient, body: Mapping[str, Any]) -> dict[str, Any]:
    response = await client.post(PATH, json=body)
    if not response.is_success:
        raise _refusal(response.status_code, error_of(response))
    answer: dict[str, Any] = response.json()
    return answer


async def _events(client: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    async with client.stream("POST", PATH, json=body) as response:
        if not response.is_success:
            await response.aread()
            raise _refusal(response.status_code, error_of(response))
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if error := event.get("error"):
                raise _refusal(int(error.get("code") or 500), str(error.get("message")))
            yield event
            if event["stop"]:
                return
    raise RunError("llama-server's answer ended too early; its log has the details")


def _refusal(status: int, message: str) -> InputError | RunError:
    if status == 400:
        return InputError(f"llama-server refuses the request: {message}")
    return RunError(f"llama-server failed while generating: {message}")
