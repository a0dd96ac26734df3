"""Whatever the scores, what is drawn under a response_format keeps to it."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_compose.engines.stepping.grammar import Constraint, Grammars
from model_compose.errors import InputError
from model_compose.generation import ResponseFormat
from tests import tiny
from tests.tiny import EOS

WIDTH = tiny.VOCABULARY + 70
"""Bases often have more rows of logits than their tokenizer has tokens."""

OBJECT = ResponseFormat("json_object")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama's kind: ▁ for a space, whole bytes where a character has no token, pieces of several characters."""
    pieces = ["<unk>", "</s>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *map(chr, range(0x21, 0x7F)), '{"', '":', '",', '"}', "},", "▁a", "ab", "abc", "▁▁", "é"]
    # The merges that make the pieces of two characters; one of three has its own.
    merges = [(piece[0], piece[1]) for piece in pieces[259:] if len(piece) == 2] + [("ab", "c")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": tiny.tokenizer(), "pieces": sentencepiece()}
GRAMMARS = {name: Grammars(tokenizer, len(tokenizer) + 70, (EOS,)) for name, tokenizer in TOKENIZERS.items()}


@pytest.fixture(params=sorted(TOKENIZERS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def schema(described: Any) -> ResponseFormat:
    return ResponseFormat("json_schema", json.dumps(described))


def walk(constraint: Constraint, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[str]:
    """Draws at random until EOS. Yields "" for each token, at last the text."""
    generator = torch.Generator().manual_seed(seed)
    prompt = tokenizer.encode("a", add_special_tokens=False)  # a decoder of Llama's kind strips a text's first space
    closing = tokenizer.convert_tokens_to_ids(["]", "}", '"', tokenizer.eos_token])
    tokens: list[int] = []
    while len(tokens) < 1000:
        scores = torch.randn(len(tokenizer) + 70, generator=generator)
        if len(tokens) > 80:  # come to an end
            scores[closing] += torch.tensor([10.0, 20.0, 30.0, 40.0])
        constraint.mask(scores)
        token = int(scores.argmax())
        constraint.accept(token)
        if token == EOS:
            yield str(tokenizer.decode(prompt + tokens)).removeprefix("a")
            return
        tokens.append(token)
        yield ""
    pytest.fail(f"no end: {tokenizer.decode(tokens)}")


def drawn(kind: str, format: ResponseFormat, seed: int) -> str:
    return "".join(walk(GRAMMARS[kind].start(format), TOKENIZERS[kind], seed))


def allowed(constraint: Constraint, width: int = WIDTH) -> set[int]:
    scores = torch.zeros(width)
    constraint.mask(scores)
    return set(scores.isfinite().nonzero().flatten().tolist())


PEOPLE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mail": {"type": "string", "pattern": "^[a-z]{1,5}@[a-z]{1,5}\\.org$"},
        "born": {"type": "string", "format": "date"},
        "pets": {"type": "array", "items": {"enum": ["cat", "dög", None]}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "mail", "born", "pets"],
    "additionalProperties": False,
}


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Schemas of objects with these schemas for properties, of which some are required."""
    properties = st.dictionaries(st.text('aé"\\ ', max_size=3), values, max_size=3)
    return st.tuples(properties, st.booleans(), st.booleans()).map(
        lambda parts: {
            "type": "object",
            "properties": parts[0],
            "required": sorted(parts[0]) if parts[1] else [],
            "additionalProperties": parts[2],
        }
    )


LEAVES: tuple[Any, ...] = (
    {"type": "string", "minLength": 1, "maxLength": 4},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "exclusiveMinimum": -3, "maximum": 40},
    {"type": "number", "minimum": -1.5, "maximum": 2},
    {"type": ["boolean", "null"]},
    {"enum": ["é\n", 1, None, [{}]]},
    {"const": {"a": "}"}},
)
SCHEMAS = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda item, least: {"type": "array", "items": item, "minItems": least}, inner, st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=2).map(lambda choices: {"anyOf": choices}),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(described=SCHEMAS, seed=st.integers(0, 2**32), kind=st.sampled_from(sorted(TOKENIZERS)))
@example(described=PEOPLE, seed=1, kind="bytes")
@example(described=PEOPLE, seed=2, kind="pieces")
def test_json_of_any_schema_is_valid(described: Any, seed: int, kind: str) -> None:
    text = drawn(kind, schema(described), seed)
    jsonschema_rs.validator_for(described, validate_formats=True).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(20))
def test_a_json_object_is_any_object(kind: str, seed: int) -> None:
    assert isinstance(json.loads(drawn(kind, OBJECT, seed)), dict)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "regex",
    ["yes|no", r"[a-c]{2,40}!?", "[0-9]{3}-[^a-z]{4}", '(é|日本|/\\\\|"\n){1,9}', r"^a .{0,9}b$", r" ?(?i:abc)*", "a?"],
)
def test_text_of_a_regex_matches_it_as_a_whole(kind: str, regex: str, seed: int) -> None:
    assert re.fullmatch(regex, drawn(kind, ResponseFormat("regex", regex), seed))


def test_properties_come_in_the_schemas_order() -> None:
    described = {"type": "object", "properties": {name: {"const": 1} for name in "zam"}, "required": ["z", "a", "m"]}
    assert [*json.loads(drawn("bytes", schema(described), 0))][:3] == ["z", "a", "m"]


def test_white_space_comes_to_an_end() -> None:
    constraint = GRAMMARS["bytes"].start(OBJECT)
    space = TOKENIZERS["bytes"].encode(" ")[0]
    constraint.accept(TOKENIZERS["bytes"].encode("{")[0])
    for count in range(100):
        if space not in allowed(constraint):
            assert 16 <= count < 100  # enough for indentation
            return
        constraint.accept(space)
    pytest.fail("endless")


# Ends.


def test_a_complete_text_can_only_end_even_where_that_was_ruled_out() -> None:
    tokenizer = TOKENIZERS["bytes"]
    constraint = GRAMMARS["bytes"].start(ResponseFormat("regex", "ab"))
    for token in tokenizer.encode("ab"):
        assert allowed(constraint) == {token}
        constraint.accept(token)
    for _ in range(2):
        scores = torch.zeros(WIDTH)
        scores[EOS] = -torch.inf  # by min_output_length
        constraint.mask(scores)
        assert scores.isfinite().nonzero().flatten().tolist() == [EOS]
        constraint.accept(EOS)


def test_a_text_may_end_where_it_could_also_go_on() -> None:
    constraint = GRAMMARS["bytes"].start(ResponseFormat("regex", "a+"))
    a = TOKENIZERS["bytes"].encode("a")[0]
    assert allowed(constraint) == {a}
    constraint.accept(a)
    assert allowed(constraint) == {a, EOS}


def test_an_eos_that_is_also_text_only_ends() -> None:
    tokenizer = TOKENIZERS["bytes"]
    a, quote = tokenizer.encode('a"')
    constraint = Grammars(tokenizer, WIDTH, (EOS, a)).start(OBJECT)
    for token in tokenizer.encode('{"b'):
        constraint.accept(token)
    assert quote in allowed(constraint)
    assert not {a, EOS} & allowed(constraint)
    for token in tokenizer.encode('":{}}'):
        constraint.accept(token)
    assert allowed(constraint) == {a, EOS}


def test_allowed_scores_stay_as_they_are() -> None:
    constraint = GRAMMARS["bytes"].start(ResponseFormat("regex", "[ab]"))
    before = torch.randn(WIDTH)
    after = before.clone()
    constraint.mask(after)
    kept = after.isfinite()
    assert kept.sum() == 2
    assert torch.equal(after[kept], before[kept])


# Several at once.


def test_constraints_at_the_same_time_do_not_disturb_each_other(kind: str) -> None:
    formats = [OBJECT, OBJECT, schema(PEOPLE), schema(PEOPLE), ResponseFormat("regex", "[a-z]{3,50}"), OBJECT]
    alone = [drawn(kind, format, seed) for seed, format in enumerate(formats)]
    assert len(set(alone)) == len(alone)
    walks = [walk(GRAMMARS[kind].start(format), TOKENIZERS[kind], seed) for seed, format in enumerate(formats)]
    texts = [""] * len(walks)
    running = set(range(len(walks)))
    while running:
        for index in tuple(running):
            if (piece := next(walks[index], None)) is None:
                running.remove(index)
            else:
                texts[index] += piece
    assert texts == alone


def test_requests_may_arrive_in_several_threads() -> None:
    fresh = Grammars(TOKENIZERS["bytes"], WIDTH, (EOS,))
    formats = [schema(PEOPLE), OBJECT, ResponseFormat("regex", "[a-z]{3,50}")] * 8
    expected = [drawn("bytes", format, seed) for seed, format in enumerate(formats)]

    def draw(seed: int) -> str:
        return "".join(walk(fresh.start(formats[seed]), TOKENIZERS["bytes"], seed))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(draw, range(len(formats)))) == expected


# What cannot be kept to.


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        (schema({"type": "objct"}), "Invalid type: objct"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (schema({"$ref": "https://example.com/schema"}), "example.com"),
        (schema({"type": "string", "pattern": "^(?=a)"}), "look-around"),
        (schema({"type": "string", "format": "poem"}), "poem"),
        (schema({"type": "object", "required": ["a"], "properties": {"a": False}}), "'a' is unsatisfiable"),
        (ResponseFormat("json_schema", "{"), "line 1 column"),
        (ResponseFormat("regex", "("), "unclosed group"),
        (ResponseFormat("regex", r"(a)\1"), "backreferences are not supported"),
        (ResponseFormat("regex", r"a\b"), "lookarounds not supported"),
        (ResponseFormat("regex", r"[^\s\S]"), "NoExtension"),
    ],
)
def test_a_format_that_cannot_be_kept_to_is_refused_with_the_reason(format: ResponseFormat, reason: str) -> None:
    for _ in range(2):  # not remembered as a good one
        with pytest.raises(InputError, match=re.escape(reason)) as caught:
            GRAMMARS["bytes"].start(format)
        assert [field.field for field in caught.value.fields] == ["response_format"]
        assert "\n" not in str(caught.value)


def test_a_format_that_gets_too_complex_ends_with_an_error_not_with_half_a_text() -> None:
    with pytest.raises(InputError, match=r"followed any further here: .*too many expressions") as caught:
        drawn("bytes", ResponseFormat("regex", "(.{0,1000}){0,1000}x"), 0)
    assert caught.value.fields[0].field == "response_format"


def test_a_token_against_the_grammar_is_an_error() -> None:
    constraint = GRAMMARS["bytes"].start(ResponseFormat("regex", "ab"))
    with pytest.raises(InputError, match="not allowed here"):
        constraint.accept(EOS)


def test_a_model_without_an_end_cannot_end_a_format() -> None:
    with pytest.raises(InputError, match="no token that ends a text"):
        Grammars(TOKENIZERS["bytes"], WIDTH, ()).start(OBJECT)
