"""A response_format as the tokens that it allows next, by llguidance (https://github.com/guidance-ai/llguidance).

Knows nothing of models and requests: a tokenizer, a format, and the scores of one next token.
"""

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from model_compose.errors import InputError
from model_compose.generation import ResponseFormat

if TYPE_CHECKING:
    from torch import Tensor

# One gap of white space at most this wide: a small model may else fill its whole budget with newlines.
_GAP = r"[\x20\x0A\x0D\x09]{1,40}"
_CACHED_FORMATS = 8
"""A compiled one takes up to 50 MB; compiling takes milliseconds for most."""
_COMPILING_FUEL = 300_000
"""A schema of 60 KB needs a third of it. Without it, a regex such as ((a{100}){100}){99} takes three seconds and 200 MB."""


_LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=_COMPILING_FUEL)


class Grammars:
    """What a tokenizer may say under a response format; one a model.

    tokenizer: a fast one of transformers. vocabulary: the logits' width, which may be padded beyond the tokenizer's.
    eos: the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self._lock = Lock()
        self._tokens: LLTokenizer | None = None
        self._compiled = lru_cache(_CACHED_FORMATS)(self._compile)

    def start(self, format: ResponseFormat) -> "Constraint":
        """A text's beginning under the format. Blocks; the first call reads the whole vocabulary (0.4 s for 49152 tokens).

        Raises InputError with llguidance's reason where a schema or regex is wrong or beyond what it can keep to.
        """
        if not self._eos:
            raise _refusal("this model has no token that ends a text, so its text could not end with the format")
        return Constraint(self._compiled(format).deep_copy(), self._eos)

    def _compile(self, format: ResponseFormat) -> LLMatcher:
        """The grammar's beginning, with the first mask computed: it finds formats that no text can have."""
        return _compile(self._read, format)

    def _read(self) -> LLTokenizer:
        with self._lock:
            if self._tokens is None:
                backend = self._tokenizer.backend_tokenizer
                width = max(self._vocabulary, backend.get_vocab_size(with_added_tokens=True))
                self._tokens = LLTokenizer(backend.to_str(), n_vocab=width, eos_token=self._eos)
            return self._tokens


class Constraint:
    """One sequence's place in its grammar. A token is drawn from masked scores, then accepted."""

    def __init__(self, matcher: LLMatcher, eos: list[int]) -> None:
        self._matcher, self._eos = matcher, eos

    def mask(self, scores: "Tensor") -> None:
        """Sets the scores of forbidden tokens to -inf, in place. scores: float32 of shape (vocabulary,), on the CPU.

        At the end of the grammar only an EOS token is left. Where other filters have ruled out all that the grammar allows
        (min_output_length the EOS tokens, say), it prevails: one of its tokens must be drawn.

        Raises InputError where the format has become too complex to follow.
        """
        values: Any = scores.numpy()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=len(values), bitorder="little").view(np.bool_)
        if not self._matcher.is_accepting():
            allowed[self._eos] = False  # an EOS token that is also a piece of text would be allowed as one
        if self._matcher.is_error() or not allowed.any():
            raise _refusal(f"it cannot be followed any further here: {_reason(self._matcher)}")
        # numpy, not torch: handing such small work to torch's threads costs more than the work
        np.copyto(values, -np.inf, where=~allowed)
        if values.max() == -np.inf:
            values[allowed] = 0.0

    def accept(self, token: int) -> None:
        """Goes on with the drawn token. Raises InputError if the grammar does not have it there."""
        if not self._matcher.consume_token(token):
            raise _refusal(f"token {token} is not allowed here: {_reason(self._matcher)}")


def check_format(format: ResponseFormat) -> None:
    """Raises InputError for a format that no model could keep to, with the reason. Bytes stand for its tokens."""
    _compile(lambda: LLTokenizer("byte"), format)


def _compile(tokens: Callable[[], LLTokenizer], format: ResponseFormat) -> LLMatcher:
    try:
        matcher = LLMatcher(tokens(), _grammar(format), log_level=0, limits=_LIMITS)
    except ValueError as error:  # the text is no JSON, or llguidance cannot read such a tokenizer
        raise _refusal(str(error)) from None
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(_reason(matcher))
    return matcher


def _grammar(format: ResponseFormat) -> str:
    if format.kind == "regex":
        return LLMatcher.grammar_from_regex(format.text)
    schema = format.text if format.kind == "json_schema" else '{"type":"object"}'
    # overrides: over the schema's own "x-guidance", which could else turn checks off
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _GAP, "lenient": False})


def _reason(matcher: LLMatcher) -> str:
    """llguidance's message without its state dump, and without the drawing of where in a regex the error is."""
    lines = matcher.get_error().removesuffix("<non-verbose/>").strip().splitlines() or ["no token fits"]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return re.sub(r"^at \d+\(\d+\): ", "", said)


def _refusal(reason: str) -> InputError:
    return InputError(f"the response_format cannot be kept to: {reason}", field="response_format")
