"""Log-probabilities of tokens as OpenAI's API writes them, in its two forms."""

from typing import Any

from model_compose.generation import TokenLogprob


def _spelt(token: bytes, prefix: str = "") -> str:
    """A token as text. Bytes that are no whole character are spelt as OpenAI's API does it: "\\xf0\\x9f", in completions
    behind "bytes:"."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return prefix + token.decode(errors="backslashreplace")


def completion_logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    """Completions' form; text_offset is in characters of the whole text, also in a stream."""

    def spelt(token: bytes) -> str:
        return _spelt(token, "bytes:")

    if not tokens:
        return None
    return {
        "tokens": [spelt(token.token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # reversed: of tokens with the same text (a character, and the byte that it is), the most probable one is told
        "top_logprobs": [{spelt(other): value for other, value in reversed(token.top)} for token in tokens],
        "text_offset": [token.position for token in tokens],
    }


def chat_logprobs(tokens: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    """Chat completions' form, with the bytes of each token: joined, they are the text."""

    def entry(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": _spelt(token), "logprob": logprob, "bytes": list(token)}

    content = [
        {**entry(token.token, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None} if content else None
