"""Log-probabilities of tokens as OpenAI's API writes them, in its two forms."""

from typing import Any

from model_compose.generation import TokenLogprob


def _spelt(token: bytes, prefix: str = "") -> str:
    """A token as text. Bytes that are not a whole character are written as OpenAI's API writes them: "\\xf0\\x9f", and in
    completions with "bytes:" before them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return prefix + token.decode(errors="backslashreplace")


def completion_logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    """The form of completions. text_offset counts characters of the whole text, also in a stream."""

    def spelt(token: bytes) -> str:
        return _spelt(token, "bytes:")

    if not tokens:
        return None
    return {
        "tokens": [spelt(token.token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # reversed, so that of tokens with the same text (a character, and the byte that it is) the most probable one stays
        "top_logprobs": [{spelt(other): value for other, value in reversed(token.top)} for token in tokens],
        "text_offset": [token.position for token in tokens],
    }


def chat_logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    """The form of chat completions. The bytes of all tokens, joined, are the text."""

    def entry(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": _spelt(token), "logprob": logprob, "bytes": list(token)}

    content = [
        {**entry(token.token, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None} if content else None
