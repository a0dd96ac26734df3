"""Tokenizes prompts outside the event loop. Prompts that cannot fit are refused early, and short prompts do not wait for
long ones.

Only tokenizing tells how many tokens a prompt has, and it takes about two microseconds and a hundred bytes per character.
Two bounds limit this work: a text with more characters than the context can ever hold is refused at once, and of a long
text we tokenize only as much as is needed to decide whether it fits.
"""

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from model_compose.daemon import Lane
from model_compose.engines.on_disk import NO_CHAT_TEMPLATE
from model_compose.errors import InputError
from model_compose.generation import Message, Request

SHORT_CHARACTERS = 16_384
"""Prompts up to this length are tokenized in a thread of their own, so they never wait for longer ones."""

MESSAGE_CHARACTERS = 64
"""The characters that a chat template is assumed to add around each message."""

PIECE_CHARACTERS = 8
"""The first piece of a long text has so many characters per wanted token. Ordinary texts have 2 to 5 per token."""

SPARE_TOKENS = 64
"""Next to a cut, tokens may differ from those of the whole text, so this many more are made and not used."""

BORDER_CHARACTERS = 1024
"""How far before the cut we look for the start of a word, when the end of a text is kept."""

COMPOSED = 4
"""Unicode's NFC and NFKC join at most this many characters into one."""

_KEEPING_NORMALIZERS = ("Prepend", "ByteLevel", "Lowercase", "NFD", "NFKD")
_COMPOSING_NORMALIZERS = ("NFC", "NFKC")
_KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits")
_SPLITTING_PRE_TOKENIZERS = ("Split", "Punctuation")

_BORDER = re.compile(r"(?<=\S) (?=\S)")


class Prompts:
    """Tokenizes the prompts of one engine. context: the most tokens that prompt and answer may have together."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self._longest = characters_per_token(tokenizer.backend_tokenizer)
        self._short, self._long = Lane("short prompts"), Lane("long prompts")

    async def read(self, request: Request) -> list[int]:
        """The prompt's token ids. Raises InputError for a prompt that does not fit, and for a chat if the base has no chat
        template; NotReady after `close`."""
        prompt = request.prompt
        if isinstance(prompt, str):
            size = len(prompt)
            self._check_characters(prompt, request)
        else:
            size = sum(len(message.content) + MESSAGE_CHARACTERS for message in prompt)
        lane = self._short if size <= SHORT_CHARACTERS else self._long
        return await lane.run(lambda: self._tokenize(request))

    def close(self) -> None:
        """End all requests that are waiting here, with NotReady."""
        self._short.close()
        self._long.close()

    def _tokenize(self, request: Request) -> list[int]:
        is_text = isinstance(request.prompt, str)
        text = request.prompt if isinstance(request.prompt, str) else render_chat(self.tokenizer, request)
        self._check_characters(text, request)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "the prompt holds half of a surrogate pair, which is not a character", field="prompt"
            ) from None
        most, cut = request.max_input_length, self.tokenizer.truncation_side if request.max_input_length else "right"
        enough = min(most or self.context, self.context) + SPARE_TOKENS
        ids, whole = _tokens(self.tokenizer, text, enough, special=is_text, end=cut == "left")
        if most is not None and len(ids) > most:
            ids = ids[-most:] if cut == "left" else ids[:most]
        if not ids:
            raise InputError(
                "the prompt is empty, and this model has no begin-of-text token to start from", field="prompt"
            )
        if len(ids) >= self.context:
            count = f"{len(ids)}" if whole else f"more than {self.context}"
            holds = f"this model's context holds {self.context} with the answer"
            raise self._too_long(f"the prompt has {count} tokens, and {holds}")
        return ids

    def _check_characters(self, text: str, request: Request) -> None:
        """Raise InputError for a text with too many characters to fit, whatever its tokens are."""
        if self._longest is None or request.max_input_length is not None:
            return
        if len(text) > self.context * self._longest:
            raise self._too_long(
                f"the prompt has {len(text)} characters, and this model's context holds at most "
                f"{self.context * self._longest}: {self.context} tokens of up to {self._longest}"
            )

    def _too_long(self, why: str) -> InputError:
        return InputError(f"{why}; shorten it, or set max_input_length to truncate it", field="prompt")


def render_chat(tokenizer: Any, request: Request) -> str:
    """The text that the base's chat template makes from the messages. Raises InputError."""
    import jinja2

    if not tokenizer.chat_template:
        raise InputError(NO_CHAT_TEMPLATE, field="messages")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise InputError(
            f"the base model has several chat templates, but none of them is called default: "
            f"{', '.join(tokenizer.chat_template)}; give one of them this name in the base's tokenizer_config.json, or use "
            "/v1/completions with the full prompt text",
            field="messages",
        )
    messages = [_turn(message) for message in request.prompt if not isinstance(message, str)]
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise InputError(f"the base's chat template refuses these messages: {error}", field="messages") from error
    except Exception as error:  # a template is a program, which may raise anything
        raise InputError(
            f"the base's chat template fails on these messages: {type(error).__name__}: {error}; send other messages, or "
            "use /v1/completions with the full prompt text",
            field="messages",
        ) from error
    return text


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content} | ({"name": message.name} if message.name else {})


def check_logit_bias(request: Request, vocabulary: int) -> None:
    """Raise InputError if the request's logit_bias names a token that the model does not have."""
    check_tokens([token for token, _ in request.sampling.logit_bias], vocabulary)


def check_tokens(tokens: Iterable[int], vocabulary: int) -> None:
    """Raise InputError for a token id of a logit_bias that is not below `vocabulary`."""
    for token in tokens:
        if token >= vocabulary:
            raise InputError(
                f"logit_bias names the token {token}, but this model has the tokens 0 to {vocabulary - 1}",
                field="logit_bias",
                at=(str(token),),
            )


def common(one: Collection[int], other: Collection[int]) -> int:
    """The length of the longest common prefix of two token sequences."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


def _tokens(tokenizer: Any, text: str, enough: int, *, special: bool, end: bool) -> tuple[list[int], bool]:
    """The text's token ids, and whether these are all of them. Of a long text, this may tokenize only the start (or the
    end, with `end`), so that there are at least `enough` tokens."""
    size = PIECE_CHARACTERS * enough
    while True:
        piece = _cut(text, size, end=end)
        ids: list[int] = tokenizer(
            piece, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        whole = len(piece) == len(text)
        if whole or len(ids) >= enough:
            return ids, whole
        size *= 2  # long tokens, or a tokenizer that drops characters


def _cut(text: str, size: int, *, end: bool) -> str:
    """About `size` characters from the text's start, or with `end` from its end. A piece of the end starts at a word, since
    tokenizers read from left to right."""
    if len(text) <= size:
        return text
    if not end:
        return text[:size]
    start = len(text) - size
    border = _BORDER.search(text, max(0, start - BORDER_CHARACTERS), start)
    return text[border.start() if border else start :]


def characters_per_token(backend: Any) -> int | None:
    """The most characters that one token can stand for, so that n tokens can hold at most n times as many characters.

    None if the tokenizer may drop characters, or join any number of them into one token: then no bound is safe. backend: a
    tokenizer of the tokenizers library.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
    composed = _normalized(normalizer)
    absorbs = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if composed is None or absorbs or not _splits_only(pre_tokenizer) or type(backend.model).__name__ != "BPE":
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if backend.model.byte_fallback:
        units = [f"<0x{byte:02X}>" for byte in range(256)]
    elif _is_bytes(normalizer) or _is_bytes(pre_tokenizer):
        units = ByteLevel.alphabet()
    else:
        return None
    # Without a token for each byte, the tokenizer may drop unknown characters, or join any number of them.
    return composed * max(map(len, vocabulary)) if all(unit in vocabulary for unit in units) else None


def _state(part: Any) -> Any:
    """The JSON description of a part of a tokenizer; None if the tokenizer has no such part."""
    return None if part is None else json.loads(part.__getstate__())


def _normalized(state: Any) -> int | None:
    """The most characters that a normalizer may join into one; None if there is no bound."""
    if state is None:
        return 1
    kind = state["type"]
    if kind == "Sequence":
        factors = [_normalized(part) for part in state["normalizers"]]
        known = [factor for factor in factors if factor is not None]
        return max(known, default=1) if len(known) == len(factors) else None
    if kind == "Replace":
        pattern = state["pattern"].get("String")
        return 1 if pattern is not None and len(state["content"]) >= len(pattern) else None
    if kind in _COMPOSING_NORMALIZERS:
        return COMPOSED
    return 1 if kind in _KEEPING_NORMALIZERS else None


def _splits_only(state: Any) -> bool:
    """Whether a pre-tokenizer keeps every character."""
    if state is None:
        return True
    kind = state["type"]
    if kind == "Sequence":
        return all(_splits_only(part) for part in state["pretokenizers"])
    return kind in _KEEPING_PRE_TOKENIZERS or (kind in _SPLITTING_PRE_TOKENIZERS and state["behavior"] != "Removed")


def _is_bytes(state: Any) -> bool:
    """Whether a normalizer or a pre-tokenizer turns characters into bytes."""
    if state is None:
        return False
    parts = state.get("normalizers") or state.get("pretokenizers") or ()
    return state["type"] == "ByteLevel" or any(_is_bytes(part) for part in parts)
