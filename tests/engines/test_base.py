"""What BaseEngine does for an engine of another package: lengths, stop strings, turns, refusals."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from model_compose.components.model import TextGenerationOptions
from model_compose.engines.base import BaseEngine
from model_compose.errors import Conflict, InputError, Overloaded
from model_compose.generation import Message, Request, ResponseFormat, Sampling, collect
from model_compose.lora.blend import Blend
from model_compose.progress import silent


class Words(BaseEngine):
    """Says the prompt, word by word."""

    rows = 1
    queue = 1
    closed = 0

    async def write(self, request: Request) -> AsyncGenerator[str]:
        try:
            for word in str(request.prompt).split():
                yield f"{word} "
        finally:
            self.closed += 1


def options(**changes: Any) -> TextGenerationOptions:
    adapter = {"type": "lora", "name": "alpaca", "model": "./alpaca"}
    file = {"type": "model", "task": "text-generation", "model": "./base", "peft_adapters": [adapter], **changes}
    return TextGenerationOptions.model_validate(file)


def engine(kind: type[Words] = Words) -> Words:
    chosen = options()
    return kind(chosen, chosen.to_blends(), Path())


async def test_the_text_is_what_is_written() -> None:
    completion = await collect(engine().generate(Request("one two three", Blend())))
    assert [(text.text, text.finish) for text in completion.texts] == [("one two three ", "stop")]
    assert completion.usage.completion_tokens == 3


async def test_a_text_ends_after_its_length_and_before_a_stop_string() -> None:
    words = engine()
    short = await collect(words.generate(Request("one two three", Blend(), Sampling(max_output_length=2))))
    assert [(text.text, text.finish) for text in short.texts] == [("one two ", "length")]
    spans = Sampling(stop_sequences=("e t",))
    stopped = await collect(words.generate(Request("one two three", Blend(), spans)))
    assert [(text.text, text.finish) for text in stopped.texts] == [("on", "stop")]
    not_at_all = Sampling(stop_sequences=("three four",))
    held = await collect(words.generate(Request("one two three", Blend(), not_at_all)))
    assert held.texts[0].text == "one two three "
    assert words.closed == 3


async def test_several_texts_of_one_request() -> None:
    request = Request("one two", Blend(), Sampling(num_return_sequences=2))
    chunks = [chunk async for chunk in engine().generate(request)]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert {chunk.index for chunk in chunks} == {0, 1}
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 4


async def test_who_leaves_frees_the_row() -> None:
    words = engine()
    async with aclosing(words.generate(Request("one two", Blend()))) as chunks:
        await anext(chunks)
        assert (words.closed, words.room.texts) == (0, 1)
    assert (words.closed, words.room.texts) == (1, 0)


async def test_a_request_without_a_place_is_refused() -> None:
    words = engine()
    with words.room.hold(2), pytest.raises(Overloaded):
        await collect(words.generate(Request("one", Blend())))


class Careful(Words):
    honours = frozenset({"precision", "logit_bias"})


@pytest.mark.parametrize(("key", "value"), [("precision", "float32"), ("device", "cpu"), ("quantization", "int8")])
def test_keys_that_an_engine_does_not_honour_are_refused_by_name(key: str, value: str) -> None:
    chosen = options(**{key: value})
    with pytest.raises(PydanticCustomError, match=f"driver huggingface cannot honour '{key}'"):
        Words.refuse(chosen)
    if key in Careful.honours:
        Careful.refuse(chosen)
    Words.refuse(options())


async def test_fields_that_an_engine_does_not_honour_are_refused_by_name() -> None:
    biased = Request("one", Blend(), Sampling(logit_bias=((1, 5.0),)))
    with pytest.raises(InputError, match="does not act on 'logit_bias'"):
        await collect(engine().generate(biased))
    assert (await collect(engine(Careful).generate(biased))).texts[0].text == "one "
    for sampling in (Sampling(logprobs=0), Sampling(response_format=ResponseFormat("json_object"))):
        with pytest.raises(InputError, match="does not act on"):
            await collect(engine(Careful).generate(Request("one", Blend(), sampling)))
    with pytest.raises(InputError, match="no chat template"):
        await collect(engine().generate(Request((Message("user", "Hi"),), Blend())))


async def test_adapters_are_those_of_the_file() -> None:
    words = engine()
    identities = {words.identity(Blend({"alpaca": weight})) for weight in (0.0, 0.5, 1.0)}
    assert len(identities) == 3
    assert words.identity(Blend({"alpaca": 0.0})) == words.identity(Blend())
    with pytest.raises(InputError, match="'pirate' has been unloaded"):
        words.identity(Blend({"pirate": 1.0}))
    with pytest.raises(Conflict, match="cannot load adapters while it runs"):
        await words.load_adapter(words.options.peft_adapters[0], silent)
