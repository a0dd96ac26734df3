"""Turns the tokens that a server generates into text, and decides where the text ends, with the embedded engine's code."""

from collections.abc import Collection, Iterable
from typing import Any

from model_compose.engines.text import Transcript, token_bytes
from model_compose.generation import Finish, Sampling, TokenLogprob


class ServedText:
    """Text `index` of a request. budget: the most tokens that it may have. eos: the tokens that end it."""

    def __init__(
        self, index: int, tokenizer: Any, prompt: list[int], sampling: Sampling, budget: int, eos: Collection[int]
    ) -> None:
        self.index, self.budget, self.eos = index, budget, eos
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._tokenizer = tokenizer
        self._text = Transcript(tokenizer, prompt, sampling.stop_sequences)
        self._position = 0

    def push(self, token: int) -> str:
        """Add a token. Returns the text that can be sent now, and sets `finish` if the token ends the text."""
        self.tokens.append(token)
        self._position = self._text.position
        if token in self.eos:
            return self.end("stop")
        ready, stopped = self._text.push(token)
        if stopped:
            self.finish = "stop"
        elif len(self.tokens) >= self.budget:
            ready += self.end("length")
        return ready

    def end(self, finish: Finish) -> str:
        """End the text. Returns the text that was held back, since no stop string can follow any more."""
        self.finish = finish
        return self._text.end()

    def logprob(self, token: int, value: float, top: Iterable[tuple[int, float]]) -> TokenLogprob:
        """The log-probability of the token that was pushed last. top: the likeliest tokens with their log-probabilities."""
        likeliest = tuple((token_bytes(self._tokenizer, other), logprob) for other, logprob in top)
        return TokenLogprob(token_bytes(self._tokenizer, token), value, likeliest, self._position)
