"""From tokens to text: whole characters only, and cut before a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Text of one sequence, token by token. The prompt's tokens come first, since they decide about a leading space."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        # A prompt that ends in half a character is no prefix of what follows; the decoder would repeat it.
        whole = not tokenizer.decode(prompt).endswith("\ufffd")
        self._stream = DecodeStream(ids=list(prompt) if whole else [], skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes, "" while a character is still incomplete."""
        return self._stream.step(self._tokenizer, token) or ""


class StopStrings:
    """Holds back text that may be the start of a stop string, also where the string spans tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that is safe to send, and whether a stop string was reached (the rest is dropped)."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max(
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(self._held)) + 1)
            if self._held.endswith(stop[:size])
        )
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
