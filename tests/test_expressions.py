"""${...}: the dialect's checked vectors, and what its defects taught."""

import json
from pathlib import Path
from typing import Any

import pytest

from model_compose.errors import RunError
from model_compose.expressions import SyntaxProblem, parse, strict_json

# Checked against the original renderer; the structural operators (..., *, ?, +, |) come later and are refused.
VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "variable_vectors.json").read_text())


def is_structural(vector: dict[str, Any]) -> bool:
    template = vector["template"]
    if isinstance(template, dict):
        return bool({"...", "*", "?", "+", "|"} & set(template))
    return isinstance(template, list) and any(str(item).startswith("...") for item in template)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_vector(vector: dict[str, Any]) -> None:
    if is_structural(vector):
        with pytest.raises(SyntaxProblem, match="not supported in this version"):
            parse(vector["template"])
    elif vector["kind"] == "error":
        with pytest.raises(RunError):
            parse(vector["template"]).evaluate(vector["context"])
    else:
        assert parse(vector["template"]).evaluate(vector["context"]) == vector["expected"]


@pytest.mark.parametrize(
    ("text", "context", "expected"),
    [
        ("${a|5}", {}, "5"),  # no space before the bar
        ('${a | "two words"}', {}, "two words"),
        ("${a | ${b | c}}", {}, "c"),
        ("${a | ${b}}", {"b": [1]}, [1]),
        ("${a[-1]}", {"a": [1, 2]}, 2),
        ("${a[0:2]}", {"a": [1, 2, 3]}, [1, 2]),
        ("${a[*]}", {"a": [1, 2]}, [1, 2]),
        ("${a[5]}", {"a": [1]}, None),
        ("[${a}|${b}]", {"a": None, "b": {"k": 1}}, '[|{"k": 1}]'),
        ("${a as slider/0,2,0.1}", {"a": "0.5"}, 0.5),
        ("${a as select/x,y | x}", {}, "x"),
        ("${a-b.c_d}", {"a-b": {"c_d": True}}, True),
    ],
)
def test_expression(text: str, context: dict[str, Any], expected: Any) -> None:
    assert parse(text).evaluate(context) == expected


def test_description_is_kept_for_forms() -> None:
    (reference,) = parse("${input.n as integer | 3 @(description How many (1-9)) @(other x)}").references()
    assert (reference.description, reference.default, reference.name) == ("How many (1-9)", "3", "n")


@pytest.mark.parametrize("text", ["${", "${}", "${1a}", "${a as}", "${a b}", "x ${a"])
def test_malformed_expressions_are_refused(text: str) -> None:
    with pytest.raises(SyntaxProblem):
        parse(text)


def test_conversion_error_names_expression_and_value() -> None:
    with pytest.raises(RunError, match=r"\$\{n as integer\}: 'abc' is not an integer"):
        parse("${n as integer}").evaluate({"n": "abc"})


def test_json_gives_a_key_once_and_may_start_with_a_byte_order_mark() -> None:
    assert strict_json(b'\xef\xbb\xbf{"a": [{"b": 1}, {"b": 2}]}') == strict_json('\ufeff{"a": [{"b": 1}, {"b": 2}]}')
    for text in ('{"a": 1, "b": 2, "a": 1}', b'[{"x": {"\\u0061": 1, "a": 2}}]'):
        with pytest.raises(ValueError, match="the key 'a' stands in one object twice"):
            strict_json(text)


def test_places_finds_where_a_value_stands_verbatim() -> None:
    template = parse({"generated": "${output}", "note": "said ${output}", "more": ["${output as text}", "${input}"]})
    assert template.places("output", ()) == [("generated",), ("more", 0)]
    assert parse({"x": "${output.text}"}).places("output", ("text",)) == [("x",)]
    assert parse("${output}").places("output", ("text",)) == [("text",)]
