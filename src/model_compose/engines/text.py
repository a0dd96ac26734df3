"""From tokens to text: whole characters only, and cut before a stop string."""

import codecs
import re
from collections.abc import Callable, Collection
from typing import Any

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTABLE)
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}
"""GPT-2's characters for the 256 bytes, in which byte-level vocabularies spell their tokens."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
Utf8Decoder = codecs.getincrementaldecoder("utf-8")

ANY = "a"
"""A token that stands for whatever came before."""

LONGEST_RUN = 64
"""Tokens of single bytes that are held back. All of them are decoded again for each that comes."""


class Spelling:
    """How a vocabulary spells what its tokens say. A byte-level one spells bytes of UTF-8. Any other one spells pieces of
    text, some of which may stand for single bytes (byte fallback)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = self._tokenizer.decoder
        state = b"" if self._decoder is None else self._decoder.__getstate__()
        self.is_byte_level = b'"ByteLevel"' in state
        self._falls_back = b'"ByteFallback"' in state

    def name(self, token: int) -> str | None:
        """How the vocabulary spells the token; None for one that no text shows: a special or an unknown one."""
        name: str | None = self._tokenizer.id_to_token(token)
        is_special = not self._tokenizer.decode([token]) and self._tokenizer.decode([token], skip_special_tokens=False)
        return None if is_special else name

    def byte(self, name: str) -> bytes:
        """The one byte that a byte-fallback token stands for, b"" for any other."""
        found = _BYTE_TOKEN.fullmatch(name) if self._falls_back else None
        return bytes([int(found[1], 16)]) if found else b""

    def utf8(self, name: str) -> bytes:
        """A byte-level token's bytes. Tokens that were added to the vocabulary may be spelt as they are."""
        spelt = all(character in _ALPHABET for character in name)
        return bytes(_ALPHABET[character] for character in name) if spelt else name.encode()

    def text(self, names: Collection[str], before: Collection[str]) -> str:
        """What pieces say behind those before them."""
        join = " ".join if self._decoder is None else self._decoder.decode
        text: str = join([*before, *names])
        return text[len(join(list(before))) :]


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """A token's own bytes, in the middle of a text. A special token's are those of its name."""
    spelling = Spelling(tokenizer)
    name = spelling.name(token)
    if name is None:
        return (tokenizer.backend_tokenizer.id_to_token(token) or "").encode()
    if spelling.is_byte_level:
        return spelling.utf8(name)
    return spelling.byte(name) or spelling.text([name], before=[ANY]).encode()


class Detokenizer:
    """The text of one sequence, token by token. With `rest` at the end it is what decoding all tokens at once gives, except
    that a last character is left out where its bytes are incomplete.

    Tokens of single bytes are held back until another token ends their run: tokenizers decode a run as a whole, and one
    byte that is no part of a character turns all of its bytes into U+FFFD. Of a run of more than LONGEST_RUN tokens each
    part is decoded by itself, which differs only where the run holds such a byte.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._spelling = Spelling(tokenizer)
        self._utf8 = Utf8Decoder("replace")
        self._held: list[str] = []
        self._length = 0
        # The token before a text decides about a leading space.
        before = next((name for token in reversed(prompt) if (name := self._spelling.name(token)) is not None), None)
        # Bytes of the prompt are no part of a run in the text, so another token stands for them.
        self._before = [] if before is None else [ANY if self._spelling.byte(before) else before]

    @property
    def rest(self) -> str:
        """What the tokens that are held back say where the text ends with them."""
        return self._spelling.text(self._held[: self._complete()], self._before) if self._held else ""

    def _complete(self) -> int:
        """How many of the tokens that are held back belong to whole characters."""
        run = Utf8Decoder("replace")
        run.decode(b"".join(map(self._spelling.byte, self._held)))
        return len(self._held) - len(run.getstate()[0])

    @property
    def position(self) -> int:
        """How many characters the text has so far: where the next token starts."""
        return self._length + len(self.rest)

    def push(self, token: int) -> str:
        """The text that this token completes, "" while it may still change."""
        name = self._spelling.name(token)
        text = "" if name is None else self._take(name)
        self._length += len(text)
        return text

    def _take(self, name: str) -> str:
        if self._spelling.is_byte_level:
            return self._utf8.decode(self._spelling.utf8(name))
        self._held.append(name)
        if self._spelling.byte(name):
            if len(self._held) < LONGEST_RUN:
                return ""
            text, self._held, self._before = self.rest, self._held[self._complete() :], [ANY]
            return text
        text = self._spelling.text(self._held, self._before)
        self._held, self._before = [], [name]
        return text


class Transcript:
    """The text of one sequence as it may be sent: whole characters that will not change, and nothing of a stop string."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: Collection[str]) -> None:
        self._text, self._stops = Detokenizer(tokenizer, prompt), StopStrings(stops)

    @property
    def position(self) -> int:
        """Where the next token starts, in characters of the whole text."""
        return self._text.position

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is safe to send, and whether a stop string was reached (the rest is dropped)."""
        text = self._text.push(token)
        return self._stops.push(text, lambda: self._text.rest)

    def end(self) -> str:
        """What was held back, at the end of the text."""
        return self._stops.flush() + self._text.rest


class _Stop:
    """One stop string, and how many of its first characters the text ends with.

    Each character is looked at about once, however often the string repeats itself (Knuth, Morris and Pratt): every token
    is compared with all stop strings of its request, in the thread that all requests share.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._borders = [0, 0]
        """Of the first n characters: how many of them stand at the end of these again. Found when they are needed."""

    def follow(self, text: str, matched: int) -> tuple[int, int | None]:
        """After this text: how much is matched then, and, where the whole is, after how many characters."""
        stop = self.text
        if not matched and stop[0] not in text:
            return 0, None
        for number, character in enumerate(text, 1):
            while matched and stop[matched] != character:
                matched = self._border(matched)
            matched += stop[matched] == character
            if matched == len(stop):
                return matched, number
        return matched, None

    def _border(self, size: int) -> int:
        stop, borders = self.text, self._borders
        while len(borders) <= size:
            character, border = stop[len(borders) - 1], borders[-1]
            while border and stop[border] != character:
                border = borders[border]
            borders.append(border + (stop[border] == character))
        return borders[size]


class StopStrings:
    """Holds back text that may be the start of a stop string, also where the string spans tokens."""

    def __init__(self, stops: Collection[str]) -> None:
        self._stops = [_Stop(stop) for stop in stops]
        self._held = ""

    def push(self, text: str, ahead: Callable[[], str] = str) -> tuple[str, bool]:
        """Returns the text that is safe to send, and whether a stop string was reached (the rest is dropped).

        ahead: gives what would follow if the text ended here; a stop string in it counts.
        """
        if not self._stops:
            return text, False
        tail, before, found = ahead(), len(self._held), []
        self._held += text
        for stop in self._stops:
            stop.matched, end = stop.follow(text, stop.matched)
            if end is None:
                _, end = stop.follow(tail, stop.matched)
                end = None if end is None else len(text) + end
            if end is not None:
                found.append(before + end - len(stop.text))
        if found:
            return (self._held + tail)[: min(found)], True
        keep = max(stop.matched for stop in self._stops)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready, False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held
