"""Which tokens a response_format allows next, by llguidance (https://github.com/guidance-ai/llguidance).

This module knows tokenizers, formats and the scores of one next token; it knows nothing of models and requests.
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

# A gap of white space is at most this long: otherwise a small model may fill its whole budget with newlines.
_GAP = r"[\x20\x0A\x0D\x09]{1,40}"
_CACHED_FORMATS = 8
"""How many compiled formats are kept. One takes up to 50 MB; compiling most formats takes milliseconds."""
_COMPILING_FUEL = 300_000
"""A limit for the work of compiling. A schema of 60 KB needs a third of it. Without a limit, a regex such as
((a{100}){100}){99} takes three seconds and 200 MB."""


_LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=_COMPILING_FUEL)


class Grammars:
    """Makes constraints for one model's tokenizer.

    tokenizer: a fast tokenizer of transformers. vocabulary: the width of the logits, which may be larger than the
    tokenizer's. eos: the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self._lock = Lock()
        self._tokens: LLTokenizer | None = None
        self._compiled = lru_cache(_CACHED_FORMATS)(self._compile)

    def start(self, format: ResponseFormat) -> "Constraint":
        """The constraint for a new text. Blocks; the first call reads the whole vocabulary (0.4 s for 49152 tokens).

        Raises InputError with llguidance's reason if a schema or regex is wrong, or if llguidance cannot enforce it.
        """
        if not self._eos:
            raise _refusal("this model has no token that ends a text, so its text could not end with the format")
        return Constraint(self._compiled(format).deep_copy(), self._eos)

    def _compile(self, format: ResponseFormat) -> LLMatcher:
        """A matcher at the start of the grammar.

        Its first mask is computed, which finds formats that no text can have.
        """
        return _compile(self._read, format)

    def _read(self) -> LLTokenizer:
        with self._lock:
            if self._tokens is None:
                backend = self._tokenizer.backend_tokenizer
                width = max(self._vocabulary, backend.get_vocab_size(with_added_tokens=True))
                self._tokens = LLTokenizer(backend.to_str(), n_vocab=width, eos_token=self._eos)
            return self._tokens


class Constraint:
    """The state of one sequence in its grammar. For each token: `mask` the scores, draw, `accept`."""

    def __init__(self, matcher: LLMatcher, eos: list[int]) -> None:
        self._matcher, self._eos = matcher, eos

    def mask(self, scores: "Tensor") -> None:
        """Sets the scores of forbidden tokens to -inf, in place. scores: float32 of shape (vocabulary,), on the CPU.

        At the end of the grammar, only EOS tokens are allowed. If other filters have forbidden all tokens that the
        grammar allows (min_output_length forbids EOS tokens, for instance), the grammar wins and one of its tokens is
        drawn.

        Raises InputError if the format has become too complex to follow.
        """
        values: Any = scores.numpy()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=len(values), bitorder="little").view(np.bool_)
        if not self._matcher.is_accepting():
            allowed[self._eos] = False  # the grammar may allow an EOS token that is also a piece of text
        if self._matcher.is_error() or not allowed.any():
            raise _refusal(f"it cannot be followed any further here: {_reason(self._matcher)}")
        # numpy, since giving such little work to torch's threads takes longer than the work
        np.copyto(values, -np.inf, where=~allowed)
        if values.max() == -np.inf:
            values[allowed] = 0.0

    def accept(self, token: int) -> None:
        """Moves on by the drawn token. Raises InputError if the grammar does not allow it."""
        if not self._matcher.consume_token(token):
            raise _refusal(f"token {token} is not allowed here: {_reason(self._matcher)}")


def check_format(format: ResponseFormat) -> None:
    """Raises InputError, with the reason, for a format that no model could follow. Checks with bytes as the tokens."""
    _compile(lambda: LLTokenizer("byte"), format)


def _compile(tokens: Callable[[], LLTokenizer], format: ResponseFormat) -> LLMatcher:
    try:
        matcher = LLMatcher(tokens(), _grammar(format), log_level=0, limits=_LIMITS)
    except ValueError as error:  # the schema is no JSON, or llguidance cannot read the tokenizer
        raise _refusal(str(error)) from None
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(_reason(matcher))
    return matcher


def _grammar(format: ResponseFormat) -> str:
    if format.kind == "regex":
        return LLMatcher.grammar_from_regex(format.text)
    schema = format.text if format.kind == "json_schema" else '{"type":"object"}'
    # The overrides come after the schema's own "x-guidance", which could turn checks off otherwise.
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _GAP, "lenient": False})


def _reason(matcher: LLMatcher) -> str:
    """llguidance's message, without its state dump and its drawing of where the error is in a regex."""
    lines = matcher.get_error().removesuffix("<non-verbose/>").strip().splitlines() or ["no token fits"]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return re.sub(r"^at \d+\(\d+\): ", "", said)


def _refusal(reason: str) -> InputError:
    return InputError(f"the response_format cannot be kept to: {reason}", field="response_format")
