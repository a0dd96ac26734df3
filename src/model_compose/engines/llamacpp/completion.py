"""Asks llama-server's /completion for the next tokens of a text. Token ids go in, token ids come out.

llama-server does not report a token that ends within a character (tools/server/server-context.cpp, process_token): a stream
leaves it out, and it has no log-probability. An answer that is not streamed has all token ids.
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
"""The most tokens that a text gets in one request, before another blend has its turn."""
FORCING = 1e6
"""Added to the logit of a token that must win, in float32."""


@dataclass(frozen=True)
class Sampled:
    """A token of llama-server's answer. cached: how many tokens of the prompt came from its cache. probabilities:
    llama-server's own JSON with log-probabilities, if they were asked for."""

    token: int
    cached: int
    probabilities: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Ask:
    """A request for the next tokens of a text.

    tokens: the prompt and the text so far, whose length is `generated` tokens. slot: the number of the slot. weights: the
    weights of all adapters, in the server's order. reuse: whether the slot's keys and values belong to this same blend.
    budget: the most tokens of the whole text. seed: the seed for these tokens only.
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
        """How many tokens to ask for. Only one at a time with log-probabilities (llama-server gives them for one token
        only) or with penalties that llama-server would count over another window than we do."""
        sampling = self.sampling
        if sampling.logprobs is not None or sampling.presence_penalty or sampling.frequency_penalty:
            return 1
        wanted = min(TURN, self.budget - self.generated)
        return min(wanted, sampling.min_output_length - self.generated) if self.may_not_end else wanted

    @property
    def may_not_end(self) -> bool:
        """Whether the text is still shorter than min_output_length."""
        return 1 < self.sampling.min_output_length > self.generated

    def body(self, *, stream: bool) -> dict[str, Any]:
        """The request's JSON. It gives all sampling options, so that the server's defaults do not apply.

        It lists every adapter, since a request that lists none gets those of the slot's last request
        (launch_slot_with_task). llama-server has one window of tokens for all penalties: it is the new text for presence
        and frequency penalties, else the whole text (`refuse` rejects requests that need both).
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
            "n_cache_reuse": 0,  # never shift cached pieces: their keys and values depend on the tokens before them
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
    """Raise InputError for sampling options for which llama-server's results differ from the other drivers'."""
    penalised = sampling.repetition_penalty != 1.0
    problems = {
        "response_format": (
            sampling.response_format is not None, "its grammars ignore the parts of a schema that they do not support"
        ),
        "repetition_penalty": (
            penalised and bool(sampling.presence_penalty or sampling.frequency_penalty),
            "it counts all penalties over the same tokens, so this cannot be combined with presence_penalty or "
            "frequency_penalty",
        ),
        "logit_bias": (
            penalised and bool(sampling.logit_bias),
            "it adds biases before penalties, so this cannot be combined with repetition_penalty",
        ),
    }  # fmt: skip
    for field, (given, reason) in problems.items():
        if given:
            raise InputError(
                f"llama-server cannot do this {field} exactly: {reason}; leave it out, or remove options.server from the "
                "file, so that llama.cpp runs in this process",
                field=field,
            )


class LeftOut(Exception):
    """A stream has left a token out, so it cannot be continued. cached: as in Sampled."""

    def __init__(self, cached: int) -> None:
        super().__init__("a token ends within a character")
        self.cached = cached


async def next_tokens(client: httpx.AsyncClient, ask: Ask, *, stream: bool) -> AsyncGenerator[Sampled]:
    """Yield at most ask.count tokens. Closing the iterator closes the connection, which makes llama-server stop.

    Raises LeftOut (only if `stream`), InputError or RunError, and httpx's TransportError if the connection breaks.
    """
    if not stream:
        answer = await _post(client, ask.body(stream=False))
        probabilities = next(iter(answer.get("completion_probabilities") or ()), None)
        for token in answer["tokens"]:
            yield Sampled(token, answer["timings"]["cache_n"], probabilities)
        return
    made = 0
    async with aclosing(_events(client, ask.body(stream=True))) as events:
        async for event in events:
            made += len(event["tokens"])
            if event["tokens_predicted"] != made:
                raise LeftOut(event["timings"]["cache_n"])
            for token in event["tokens"]:
                yield Sampled(token, event["timings"]["cache_n"])


async def distribution(client: httpx.AsyncClient, ask: Ask, plain: int, vocabulary: int) -> dict[int, float]:
    """The log-probabilities of all possible next tokens, the likeliest first: {token: log-probability}.

    plain: a token of complete characters. We force this token, because llama-server reports no log-probabilities for
    partial characters. The values are from before forcing.
    """
    body = ask.body(stream=False) | {"logit_bias": [(plain, FORCING)], "n_probs": vocabulary}
    (forced,) = (await _post(client, body))["completion_probabilities"]
    return {each["id"]: each["logprob"] for each in forced["top_logprobs"]}


async def ends(client: httpx.AsyncClient) -> tuple[int, ...]:
    """The tokens with which llama.cpp ends a text. Raises LoadError for a llama-server that is too old."""
    body = {"prompt": [0], "n_predict": 1, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    try:
        answer = await _post(client, body)
        (_,), _ = answer["tokens"], answer["timings"]["cache_n"]
        return tuple(bias["token"] for bias in answer["generation_settings"]["logit_bias"])
    except (LookupError, ValueError, TypeError) as error:
        raise LoadError(
            f"this llama-server's answers lack fields that model-compose needs ({error!r}); use a newer one"
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
