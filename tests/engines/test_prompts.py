"""Prompts: refused by characters where that is certain, cut without changing what is left, and read by two threads."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_compose.engines.prompts import SHORT_CHARACTERS, SPARE_TOKENS, Prompts, characters_per_token
from model_compose.errors import InputError, NotReady
from model_compose.generation import Message, Request
from model_compose.lora.blend import Blend
from tests import tiny

MERGES = [
    ("a", "a"),
    ("aa", "aa"),
    ("Ġ", "a"),
    ("l", "l"),
    ("h", "e"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "hello"),
    ("Ġ", "Ġ"),
]


def byte_level(**parts: Any) -> PreTrainedTokenizerFast:
    """With merges over words and spaces; normalizer and pre_tokenizer as given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<s>", *alphabet, *("".join(pair) for pair in MERGES)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    inner.pre_tokenizer = parts.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    if "normalizer" in parts:
        inner.normalizer = parts["normalizer"]
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def byte_fallback() -> Tokenizer:
    """As Llama 2's: characters of its own, and a token for every byte."""
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁▁", "aa", "▁a"]
    inner = Tokenizer(
        models.BPE(
            vocab={text: number for number, text in enumerate(texts)}, merges=[("▁", "▁"), ("a", "a"), ("▁", "a")],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner


def request(prompt: Any, **how: Any) -> Request:
    return Request(prompt, Blend({}), **how)


# How much a token can stand for.


@pytest.mark.parametrize(
    ("tokenizer", "longest"),
    [
        (tiny.tokenizer().backend_tokenizer, 4),  # </s>
        (byte_level().backend_tokenizer, 6),  # " hello"
        (byte_level(normalizer=normalizers.NFC()).backend_tokenizer, 24),
        (byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])).backend_tokenizer, 24),
        (byte_fallback(), 6),  # <0x00>
    ],
)  # fmt: skip
@settings(max_examples=40)
@given(text=st.text(st.sampled_from("ae\u0301\u0327 hlo\n\ud7a3\u1112\u1161\u11ab가ǖ👍"), max_size=60))
def test_no_text_has_more_characters_than_its_tokens_can_stand_for(
    tokenizer: Tokenizer, longest: int, text: str
) -> None:
    assert characters_per_token(tokenizer) == longest
    assert len(text) <= longest * len(tokenizer.encode(text, add_special_tokens=False).ids)


def _with_token(**how: bool) -> Tokenizer:
    made = byte_level().backend_tokenizer
    made.add_special_tokens([AddedToken("<end>", **how)])
    return made


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizer=normalizers.Strip()).backend_tokenizer,
        byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])).backend_tokenizer,
        byte_level(normalizer=normalizers.Replace("  ", " ")).backend_tokenizer,
        byte_level(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
        ).backend_tokenizer,
        byte_level(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
            )
        ).backend_tokenizer,
        _with_token(rstrip=True),
        _with_token(lstrip=True),
        Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
        Tokenizer(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>", fuse_unk=True)),
        Tokenizer(models.BPE(vocab={"a": 0}, merges=[])),
    ],
)  # fmt: skip
def test_where_a_tokenizer_may_drop_or_join_characters_there_is_no_bound(tokenizer: Tokenizer) -> None:
    assert characters_per_token(tokenizer) is None
    text = "<end>" + " " * 500 + "e\u0301" * 2 + "zz" * 200
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) < len(text)


# What is cut, and what is refused.


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    prompts = Prompts(tiny.tokenizer(), 256)
    with pytest.raises(
        InputError, match=r"1025 characters, and this model's context holds at most 1024: 256 tokens of"
    ):
        await prompts.read(request("a" * 1025))
    assert prompts._short._thread is prompts._long._thread is None
    with pytest.raises(InputError, match=r"the prompt has 1024 tokens, and this model's context holds 256 with"):
        await prompts.read(request("a" * 1024))
    assert len(await prompts.read(request("a" * 255))) == 255
    with pytest.raises(InputError, match=r"100\d+ characters"):
        await prompts.read(request((Message("user", "a" * 100_000),)))
    prompts.close()


async def test_of_a_long_text_only_what_decides_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(normalizer=normalizers.Strip())
    asked: list[int] = []
    called = type(tokenizer).__call__

    def counted(self: Any, text: str, **how: Any) -> Any:
        asked.append(len(text))
        return called(self, text, **how)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    prompts = Prompts(tokenizer, 256)
    with pytest.raises(
        InputError, match=r"the prompt has more than 256 tokens, and this model's context holds 256 with"
    ):
        await prompts.read(request("x" * 1_000_000))
    assert asked == [8 * (256 + SPARE_TOKENS)]
    assert len(await prompts.read(request(" " * 20_000 + "abc" + " " * 20_000))) == 3  # stripped, so it fits
    prompts.close()


@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.sampled_from(["hello", "a", "aaaaa", " ", "  ", "\n", "é", "👍", "hellohello"]), min_size=900, max_size=1500
    ),
    st.integers(1, 60),
)
def test_a_prompt_that_is_truncated_is_cut_where_the_whole_would_be(side: str, parts: list[str], most: int) -> None:
    tokenizer = byte_level()
    tokenizer.truncation_side = side
    text = " hello ".join(parts)
    whole = tokenizer(text)["input_ids"]
    prompts = Prompts(tokenizer, 4096)
    assert len(text) > 8 * (most + SPARE_TOKENS)  # so that it is cut
    found = prompts._tokenize(request(text, max_input_length=most))
    assert found == (whole[-most:] if side == "left" else whole[:most])


async def test_half_of_a_surrogate_pair_is_refused() -> None:
    prompts = Prompts(tiny.tokenizer(), 256)
    with pytest.raises(InputError, match="surrogate"):
        await prompts.read(request("a\ud800\n"))
    prompts.close()


# Threads.


async def test_a_short_prompt_does_not_wait_for_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(byte_level(normalizer=normalizers.Strip()), 256)
    go, tokenize = threading.Event(), prompts._tokenize

    def held(asked: Request) -> list[int]:
        if len(asked.prompt) > SHORT_CHARACTERS:
            go.wait(30)
        return tokenize(asked)

    monkeypatch.setattr(prompts, "_tokenize", held)
    long = [
        asyncio.create_task(prompts.read(request("a" * (SHORT_CHARACTERS + 1), max_input_length=8))) for _ in range(3)
    ]
    assert len(await prompts.read(request("a b"))) == 3
    assert not any(task.done() for task in long)
    go.set()
    assert {len(ids) for ids in await asyncio.gather(*long)} == {8}
    prompts.close()


async def test_closing_an_engine_ends_whoever_waits_for_tokens(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model_compose.compose import Compose

    async with Compose.open(project) as compose:
        engine: Any = compose.models["__component__"].engine
        go, reading = threading.Event(), threading.Event()

        def held(asked: Request) -> list[int]:
            reading.set()
            go.wait(30)
            return [1]

        monkeypatch.setattr(engine._running.prompts, "_tokenize", held)
        waiting = asyncio.create_task(compose.answer({"prompt": "a"}))
        await asyncio.to_thread(reading.wait, 30)
        assert engine.room.texts == 1
        await compose.close()
        with pytest.raises(NotReady, match="shutting down"):
            await waiting
        assert engine.room.texts == 0
        go.set()
