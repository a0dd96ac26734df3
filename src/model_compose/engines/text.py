"""Turns tokens into text as they come: only complete characters, and nothing from a stop string on."""

import codecs
import re
from collections.abc import Callable, Collection
from typing import Any

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTABLE)
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}
"""Byte-level vocabularies spell each of the 256 bytes as one character, by GPT-2's table: {character: byte}."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
Utf8Decoder = codecs.getincrementaldecoder("utf-8")

ANY = "a"
"""A stand-in for whatever token came before."""

LONGEST_RUN = 64
"""The most single-byte tokens that are held back. Each new one means decoding all of them again."""


class Spelling:
    """What the tokens of a vocabulary stand for. In a byte-level vocabulary, a token is a sequence of UTF-8 bytes. In any
    other one, a token is a piece of text, and some tokens may be single bytes (byte fallback)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._decoder = self._tokenizer.decoder
        state = b"" if self._decoder is None else self._decoder.__getstate__()
        self.is_byte_level = b'"ByteLevel"' in state
        self._falls_back = b'"ByteFallback"' in state

    def name(self, token: int) -> str | None:
        """The token as the vocabulary spells it; None for a special or unknown token, which does not appear in texts."""
        name: str | None = self._tokenizer.id_to_token(token)
        is_special = not self._tokenizer.decode([token]) and self._tokenizer.decode([token], skip_special_tokens=False)
        return None if is_special else name

    def byte(self, name: str) -> bytes:
        """The byte that a byte-fallback token stands for; b"" for any other token."""
        found = _BYTE_TOKEN.fullmatch(name) if self._falls_back else None
        return bytes([int(found[1], 16)]) if found else b""

    def utf8(self, name: str) -> bytes:
        """A byte-level token's bytes. A token that was added to the vocabulary later may be spelt in plain text."""
        spelt = all(character in _ALPHABET for character in name)
        return bytes(_ALPHABET[character] for character in name) if spelt else name.encode()

    def text(self, names: Collection[str], before: Collection[str]) -> str:
        """The text that the pieces `names` add after the pieces `before`."""
        join = " ".join if self._decoder is None else self._decoder.decode
        text: str = join([*before, *names])
        return text[len(join(list(before))) :]


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for in the middle of a text; for a special token, those of its name."""
    spelling = Spelling(tokenizer)
    name = spelling.name(token)
    if name is None:
        return (tokenizer.backend_tokenizer.id_to_token(token) or "").encode()
    if spelling.is_byte_level:
        return spelling.utf8(name)
    return spelling.byte(name) or spelling.text([name], before=[ANY]).encode()


class Detokenizer:
    """Decodes one sequence token by token. All texts of `push` and the final `rest` together equal the text of decoding all
    tokens at once, except that an incomplete last character is left out.

    Single-byte tokens are held back until another token ends their run. Tokenizers decode a run as a whole, and if one of
    its bytes is not part of a character, all bytes of the run become U+FFFD. A run longer than LONGEST_RUN tokens is
    decoded in parts; the result differs only if the run contains such a byte.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._spelling = Spelling(tokenizer)
        self._utf8 = Utf8Decoder("replace")
        self._held: list[str] = []
        self._length = 0
        # The token before the text decides whether the text starts with a space.
        before = next((name for token in reversed(prompt) if (name := self._spelling.name(token)) is not None), None)
        # A byte at the prompt's end must not join a run at the text's start, so ANY stands for it.
        self._before = [] if before is None else [ANY if self._spelling.byte(before) else before]

    @property
    def rest(self) -> str:
        """The text of the tokens that are held back, if no further token comes."""
        return self._spelling.text(self._held[: self._complete()], self._before) if self._held else ""

    def _complete(self) -> int:
        """The number of tokens held back whose bytes form complete characters."""
        run = Utf8Decoder("replace")
        run.decode(b"".join(map(self._spelling.byte, self._held)))
        return len(self._held) - len(run.getstate()[0])

    @property
    def position(self) -> int:
        """The length of the text so far, in characters: where the next token starts."""
        return self._length + len(self.rest)

    def push(self, token: int) -> str:
        """Add a token. Returns the text that can no longer change, or "" if this token's text may still change."""
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
    """The text of one sequence that may be sent to the client: complete, final characters, without stop strings."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: Collection[str]) -> None:
        self._text, self._stops = Detokenizer(tokenizer, prompt), StopStrings(stops)

    @property
    def position(self) -> int:
        """Where the next token starts, in characters of the whole text."""
        return self._text.position

    def push(self, token: int) -> tuple[str, bool]:
        """Add a token. Returns the text that is safe to send, and whether a stop string was reached (text from it on is
        dropped)."""
        text = self._text.push(token)
        return self._stops.push(text, lambda: self._text.rest)

    def end(self) -> str:
        """Return the text that was held back. Call this at the end of the text."""
        return self._stops.flush() + self._text.rest


class _Stop:
    """One stop string. matched: how many of its first characters the text ends with.

    It uses the algorithm of Knuth, Morris and Pratt, which looks at each character about once, even if the stop string
    repeats itself. Speed matters, since all requests share the thread that compares each token with all stop strings.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._borders = [0, 0]
        """borders[n]: the length of the longest proper prefix of the first n characters that is also their suffix. The list
        grows as needed."""

    def follow(self, text: str, matched: int) -> tuple[int, int | None]:
        """Read `text`, starting with `matched` characters matched. Returns the characters matched at its end, and None; or,
        if the whole stop string was found, its length and the number of characters read until then."""
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
    """Holds back text that may be the start of a stop string, even if the string spans several tokens."""

    def __init__(self, stops: Collection[str]) -> None:
        self._stops = [_Stop(stop) for stop in stops]
        self._held = ""

    def push(self, text: str, ahead: Callable[[], str] = str) -> tuple[str, bool]:
        """Add text. Returns the text that is safe to send, and whether a stop string was reached (text from it on is
        dropped).

        ahead(): the text that would follow if the sequence ended here; a stop string in it counts too.
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
        """Return the text that was held back. Call this at the end of the text."""
        held, self._held = self._held, ""
        return held
