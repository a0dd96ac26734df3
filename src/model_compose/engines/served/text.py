"""A text whose tokens another server decides: what they say, and where it ends. By the embedded engine's code for both."""

from collections.abc import Collection, Iterable
from typing import Any

from model_compose.engines.text import Transcript, token_bytes
from model_compose.generation import Finish, Sampling, TokenLogprob


class ServedText:
    """Sequence `index` of a request. budget: the most tokens that it may have; eos: those that end it."""

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
        """The text that this token completes; it may end the whole."""
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
        """What was held back, as it was no stop string after all."""
        self.finish = finish
        return self._text.end()

    def logprob(self, token: int, value: float, top: Iterable[tuple[int, float]]) -> TokenLogprob:
        """Of the token that was pushed last. top: the likeliest tokens with theirs."""
        told = tuple((token_bytes(self._tokenizer, other), chance) for other, chance in top)
        return TokenLogprob(token_bytes(self._tokenizer, token), value, told, self._position)
