"""Log-probabilities on /v1 where tokens are parts of characters: their own bytes, and offsets that index the text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests import tiny
from tests.conftest import serving
from tests.engines.test_text import byte_fallback
from tests.servers.test_openai import client_of

SAID = "a😀é b"
YAML = """\
component:
  type: model
  task: text-generation
  model: ./base
  precision: float32
  action: {text: "${input.prompt}", params: {do_sample: false}}
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of a model that repeats SAID, a byte a token."""
    folder: Path = tmp_path_factory.mktemp("emoji")
    base = tiny.save_base(folder / "base")
    tiny.teach_to_say(base, SAID)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")  # so that a chat ends in "b" too
    path = folder / "model-compose.yml"
    path.write_text(YAML, encoding="utf-8")
    with serving(path) as url, client_of(url) as opened:
        yield opened


def complete(client: OpenAI, count: int = 2 * len(SAID.encode()), **options: Any) -> Any:
    """Behind "b" the model says SAID from its beginning."""
    body: Any = {"model": "default", "prompt": "b", "max_tokens": count, "logprobs": 3} | options
    return client.completions.create(**body)


def chat(client: OpenAI, **options: Any) -> Any:
    body: Any = {"model": "default", "messages": [{"role": "user", "content": "b"}], "max_tokens": 9} | options
    return client.chat.completions.create(**body, logprobs=True, top_logprobs=3)


def test_text_offsets_index_the_text(client: OpenAI) -> None:
    choice = complete(client).choices[0]
    assert choice.text == SAID * 2
    once = [0, 1, 1, 1, 1, 2, 2, 3, 4]
    assert choice.logprobs.text_offset == once + [len(SAID) + offset for offset in once]
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset] == token


def test_tokens_of_a_part_of_a_character_are_spelt_as_openai_does_it(client: OpenAI) -> None:
    logprobs = complete(client, 9).choices[0].logprobs
    assert logprobs.tokens == [
        "a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "bytes:\\xc3", "bytes:\\xa9", " ", "b"
    ]  # fmt: skip
    assert all(
        token == max(top, key=top.get) for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    )
    assert all(len(top) == 3 for top in logprobs.top_logprobs)  # no two of them have the same name


def test_bytes_are_the_tokens_own(client: OpenAI) -> None:
    choice = chat(client).choices[0]
    assert choice.message.content == SAID
    assert [bytes(token.bytes) for token in choice.logprobs.content] == [bytes([byte]) for byte in SAID.encode()]
    for token in choice.logprobs.content:
        assert bytes(token.top_logprobs[0].bytes) == bytes(token.bytes)
        for one in (token, *token.top_logprobs):
            assert one.token == bytes(one.bytes).decode(errors="backslashreplace")


def test_a_stream_tells_the_same(client: OpenAI) -> None:
    whole = complete(client).choices[0].logprobs
    parts = [part.choices[0].logprobs for part in complete(client, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts if part for value in getattr(part, name)] == getattr(whole, name)
    parts = [part.choices[0].logprobs for part in chat(client, stream=True)]
    assert [token for part in parts if part for token in part.content] == chat(client).choices[0].logprobs.content


def test_special_tokens_have_the_bytes_of_their_name_and_no_place_in_the_text(client: OpenAI) -> None:
    forced = complete(client, 3, logit_bias={str(tiny.BOS): 100}).choices[0]  # no end of a text, and hidden in it
    assert forced.text == ""
    assert forced.logprobs.tokens == ["<s>"] * 3
    assert forced.logprobs.text_offset == [0, 0, 0]
    (token, *_) = chat(client, logit_bias={str(tiny.BOS): 100}).choices[0].logprobs.content
    assert bytes(token.bytes) == b"<s>"


def test_a_model_of_bytes_and_words_may_say_whatever_it_likes(tmp_path: Path) -> None:
    """Random bytes and words, as an untaught Llama 2 says them: tokenizers' own stream raises in nearly every such text."""
    base = tiny.save_base(tmp_path / "base", tiny.llama_config(vocab_size=300))
    byte_fallback(strip=True).tokenizer.save_pretrained(base)
    path = tmp_path / "model-compose.yml"
    path.write_text(YAML, encoding="utf-8")
    options: Any = {"prompt": "ab a", "n": 8, "temperature": 2, "top_p": 1, "seed": 1, "logprobs": None}
    with serving(path) as url, client_of(url) as client:
        whole = complete(client, 80, **options).choices
        texts = [""] * 8
        for part in complete(client, 80, stream=True, **options):
            texts[part.choices[0].index] += part.choices[0].text
    assert [choice.text for choice in whole] == texts
    assert "\ufffd" in "".join(texts)
    assert "ab" in "".join(texts)
