"""From tokens to text, over every kind of vocabulary: a stream shows what decoding the whole shows."""

import codecs
from collections.abc import Collection
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model_compose.engines.served.text import ServedText
from model_compose.engines.text import LONGEST_RUN, Detokenizer, Transcript, token_bytes
from model_compose.generation import Sampling

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
WORDS = ["▁", "a", "b", "é", "▁a", "ab", "▁ab", "▁ein", "😀", "\n", "▁▁", "\ufffd"]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what each token stands for in the middle of a text."""

    tokenizer: PreTrainedTokenizerFast
    stands_for: dict[int, bytes]

    def ids(self, *names: str) -> list[int]:
        known = self.tokenizer.get_vocab()
        return [known[name] for name in names]

    def decode(self, tokens: Collection[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def whole(self, prompt: Collection[int], tokens: Collection[int]) -> str:
        """The text behind the prompt. A last character that is incomplete is left out: no stream can show it."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        shown = [token for token in tokens if self.tokenizer.decode([token]) not in SPECIAL]
        for token in shown:
            utf8.decode(self.stands_for[token])
        text = self.decode([*prompt, *shown])
        if cut := len(utf8.getstate()[0]):  # the characters of an incomplete one: one in all, or one for each byte
            complete = self.decode([*prompt, *shown[:-cut]])
            text = complete if self.is_bytewise(shown[-1]) else text.removesuffix("\ufffd")
        return text[len(self.decode(prompt)) :]

    def is_bytewise(self, token: int) -> bool:
        return self.tokenizer.convert_ids_to_tokens(token) in BYTES


def _made(inner: Tokenizer, stands_for: dict[str, bytes]) -> Vocabulary:
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    ids = inner.get_vocab()
    named = {ids[name]: text for name, text in stands_for.items()}
    return Vocabulary(tokenizer, named)


def byte_level() -> Vocabulary:
    alphabet = bytes_to_unicode()
    words = ["é", " a", "ab", "😀", "\ufffd"]
    stands_for = {alphabet[byte]: bytes([byte]) for byte in range(256)}
    stands_for |= {"".join(alphabet[byte] for byte in word.encode()): word.encode() for word in words}
    stands_for |= {
        "".join(alphabet[byte] for byte in part): part for part in (b" \xf0", b"\x9f\x98", b"\x80a", b"\x80\xc3")
    }
    inner = Tokenizer(models.BPE(vocab={name: id for id, name in enumerate([*SPECIAL, *stands_for])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    added = ["<think>", "<｜user｜>"]
    inner.add_tokens(added)
    return _made(inner, stands_for | {name: name.encode() for name in added})


def byte_fallback(*, strip: bool) -> Vocabulary:
    """As Llama 2 has it, or without stripping as Gemma has it."""
    stands_for = BYTES | {word: word.replace("▁", " ").encode() for word in WORDS}
    vocabulary = {name: id for id, name in enumerate([*SPECIAL, *stands_for])}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    begin = [normalizers.Prepend("▁")] if strip else []
    inner.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    end = [decoders.Strip(" ", 1, 0)] if strip else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return _made(inner, stands_for)


def sentencepiece(*, bytewise: bool) -> Vocabulary:
    """A Unigram model in metaspace, with or without bytes for what it does not know."""
    stands_for = (BYTES if bytewise else {}) | {word: word.replace("▁", " ").encode() for word in WORDS}
    scored = [(name, 0.0 if name in SPECIAL else -2.0) for name in [*SPECIAL, *stands_for]]
    inner = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=bytewise))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]) if bytewise else decoders.Metaspace()
    )
    return _made(inner, stands_for)


def word_piece() -> Vocabulary:
    stands_for = {"a": b" a", "##a": b"a", "ab": b" ab", "##b": b"b", ".": b"."}
    vocabulary = {name: id for id, name in enumerate([*SPECIAL, *stands_for])}
    inner = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    return _made(inner, stands_for)


def word_ends() -> Vocabulary:
    """As the first GPT has it: the space behind a word comes with the next one."""
    vocabulary = {name: id for id, name in enumerate([*SPECIAL, "a", "b", "a</w>", "b</w>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], end_of_word_suffix="</w>", unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.BPEDecoder()
    return _made(inner, {"a": b"a", "b": b"b", "a</w>": b"a", "b</w>": b"b"})


VOCABULARIES = {
    "byte-level": byte_level(),
    "byte-fallback": byte_fallback(strip=True),
    "byte-fallback-unstripped": byte_fallback(strip=False),
    "sentencepiece": sentencepiece(bytewise=False),
    "sentencepiece-bytes": sentencepiece(bytewise=True),
    "word-piece": word_piece(),
    "word-ends": word_ends(),
}
KINDS = pytest.mark.parametrize("kind", VOCABULARIES)
BYTEWISE = pytest.mark.parametrize("kind", ["byte-fallback", "byte-fallback-unstripped", "sentencepiece-bytes"])
LAW = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def texts(vocabulary: Vocabulary) -> st.SearchStrategy[list[int]]:
    """Random tokens, those that make up characters by bytes among them often."""
    every = st.sampled_from([*vocabulary.stands_for, *vocabulary.ids(*SPECIAL)])
    likely = [
        id
        for id, text in vocabulary.stands_for.items()
        if text in (b"A", b" ", b"\n", *map(bytes, zip("é😀".encode())))
    ]
    return st.lists(every | st.sampled_from(likely or [*vocabulary.stands_for]), max_size=12)


def streamed(detokenizer: Detokenizer, tokens: Collection[int]) -> str:
    return "".join([*(detokenizer.push(token) for token in tokens), detokenizer.rest])


@KINDS
def test_a_stream_shows_what_decoding_the_whole_shows(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]

    @LAW
    @given(tokens=texts(vocabulary), has_prompt=st.booleans())
    def law(tokens: list[int], has_prompt: bool) -> None:
        prompt = vocabulary.tokenizer("<s>" + ("ab a" if has_prompt else ""))["input_ids"]
        assert streamed(Detokenizer(vocabulary.tokenizer, prompt), tokens) == vocabulary.whole(prompt, tokens)

    law()


@KINDS
def test_texts_of_servers_and_sequences_show_the_same(kind: str) -> None:
    """llama-server's and vLLM's tokens, and those that are drawn here, also where something stops or cuts them."""
    vocabulary = VOCABULARIES[kind]
    prompt = vocabulary.tokenizer("ab a")["input_ids"]

    @LAW
    @given(
        tokens=texts(vocabulary).filter(bool),
        stops=st.lists(st.sampled_from(["a", "\n", "A", "é\n", "  ", "AA"]), max_size=2),
    )
    def law(tokens: list[int], stops: list[str]) -> None:
        served = ServedText(
            0, vocabulary.tokenizer, prompt, Sampling(stop_sequences=tuple(stops)), len(tokens), eos=(-1,)
        )
        text = ""
        for token in tokens:
            text += served.push(token)
            if served.finish is not None:
                break
        whole = vocabulary.whole(prompt, served.tokens)
        found = [whole.index(stop) for stop in stops if stop in whole]
        assert (text, served.finish) == ((whole[: min(found)], "stop") if found else (whole, "length"))
        for length in range(len(served.tokens)):  # no token before the last one has completed a stop string
            assert not any(stop in vocabulary.whole(prompt, served.tokens[:length]) for stop in stops)

    law()


@BYTEWISE
def test_bytes_that_are_no_character_end_no_text(kind: str) -> None:
    """The sequence that made tokenizers' DecodeStream raise "Invalid prefix encountered"."""
    vocabulary = VOCABULARIES[kind]
    detokenizer = Detokenizer(vocabulary.tokenizer, vocabulary.tokenizer("ab")["input_ids"])
    pieces = [detokenizer.push(token) for token in vocabulary.ids("<0x41>", "<0xF0>", "a", "<0x41>", "b")]
    assert pieces == ["", "", "\ufffd\ufffda", "", "Ab"]


def test_a_character_is_shown_by_the_token_that_completes_it() -> None:
    vocabulary = VOCABULARIES["byte-level"]
    detokenizer = Detokenizer(vocabulary.tokenizer, [])
    tokens = vocabulary.tokenizer("a😀")["input_ids"]
    assert [detokenizer.push(token) for token in tokens] == ["a", "", "", "", "😀"]


@BYTEWISE
def test_a_stop_string_in_bytes_ends_the_text_at_once(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    transcript = Transcript(vocabulary.tokenizer, vocabulary.tokenizer("ab")["input_ids"], ["A"])
    assert [transcript.push(token) for token in vocabulary.ids("b", "<0x42>", "<0x41>")] == [
        ("b", False), ("", False), ("B", True),
    ]  # fmt: skip


@BYTEWISE
def test_a_run_of_bytes_may_follow_bytes_of_the_prompt(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    prompt = vocabulary.ids("▁ab", "<0x0A>")
    assert streamed(Detokenizer(vocabulary.tokenizer, prompt), vocabulary.ids("<0x41>", "▁a", "<0x41>")) == "A aA"


BYTEWISE = pytest.mark.parametrize("kind", ["byte-fallback", "byte-fallback-unstripped", "sentencepiece-bytes"])


@BYTEWISE
@given(
    text=st.text(st.sampled_from("aé€👍ก \n"), min_size=1, max_size=120), prompt=st.sampled_from(["", "a", "<0x41>"])
)
def test_a_long_run_of_bytes_comes_in_parts_and_is_the_same_text(kind: str, text: str, prompt: str) -> None:
    vocabulary = VOCABULARIES[kind]
    before = vocabulary.ids(prompt) if prompt else []
    tokens = vocabulary.ids(*(f"<0x{byte:02X}>" for byte in text.encode()))
    detokenizer = Detokenizer(vocabulary.tokenizer, before)
    parts = [detokenizer.push(token) for token in tokens]
    assert "".join(parts) + detokenizer.rest == vocabulary.whole(before, tokens)
    assert len(detokenizer.rest.encode()) < LONGEST_RUN


@KINDS
def test_a_tokens_bytes_are_its_own(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    found = {token: token_bytes(vocabulary.tokenizer, token) for token in vocabulary.stands_for}
    assert found == vocabulary.stands_for
    assert [token_bytes(vocabulary.tokenizer, token) for token in vocabulary.ids(*SPECIAL)] == [
        name.encode() for name in SPECIAL
    ]
    assert token_bytes(vocabulary.tokenizer, 100_000) == b""  # of a vocabulary that is padded


@KINDS
def test_positions_are_characters_of_the_text(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    prompt = vocabulary.tokenizer("ab a")["input_ids"]

    @LAW
    @given(tokens=texts(vocabulary))
    def law(tokens: list[int]) -> None:
        detokenizer = Detokenizer(vocabulary.tokenizer, prompt)
        for count, token in enumerate(tokens):
            assert detokenizer.position == len(vocabulary.whole(prompt, tokens[:count]))
            detokenizer.push(token)

    law()
