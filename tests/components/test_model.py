"""How an action says in which way tokens are drawn: constants, expressions, and what is wrong with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from model_compose.components import Answer
from model_compose.compose import Compose
from model_compose.config import Config
from model_compose.errors import ConfigError, InputError
from model_compose.generation import ResponseFormat, Sampling, Usage
from model_compose.loading import load
from model_compose.running import fingerprint
from model_compose.servers.openai import CompletionBody
from model_compose.servers.webui import snippets
from model_compose.servers.wire import parse_body

COMPONENT = """\
component:
  type: model
  task: text-generation
  model: ./base
  action:
    text: ${input.prompt}
"""
SCHEMA = """\
{type: json_schema, json_schema: {name: a, schema: {type: object, properties: {ö: {default: null}, a: {const: "1"}}}}}"""

Read = Callable[[str], Compose]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_action(action: str) -> Compose:
        path = tmp_path / "model-compose.yml"
        path.write_text(f"{COMPONENT}    {action}\n", encoding="utf-8")
        return Compose(load([path]))

    return read_action


def sampling(compose: Compose, **input: Any) -> Sampling:
    (model,) = compose.models.values()
    action = model.options.find_action("__default__")
    return model.evaluate(action, {"input": {"prompt": "Hi", **input}}).sampling


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{type: text}", None),
        ("{type: json_object}", ResponseFormat("json_object")),
        ('{type: regex, regex: "a{2}$"}', ResponseFormat("regex", "a{2}$")),
        (
            SCHEMA,
            ResponseFormat(
                "json_schema", '{"type":"object","properties":{"ö":{"default":null},"a":{"const":"1"}}}'
            ),
        ),
    ],
)  # fmt: skip
def test_a_response_format_is_constant_or_an_expression(read: Read, written: str, expected: Any) -> None:
    constant = read(f"response_format: {written}")
    assert sampling(constant).response_format == expected
    # /v1 takes the sampling of the action, but answers with text unless the request says otherwise.
    (model,) = constant.models.values()
    assert model.sampling().response_format is None
    given = read("response_format: ${input.format as json}")
    assert sampling(given, format=yaml.safe_load(written)).response_format == expected
    assert sampling(given).response_format is None


def test_a_part_of_a_response_format_may_be_an_expression(read: Read) -> None:
    compose = read('response_format: {type: json_schema, json_schema: {schema: "${input.schema as json}"}}')
    assert sampling(compose, schema='{"type": "null"}').response_format == ResponseFormat(
        "json_schema", '{"type":"null"}'
    )
    with pytest.raises(InputError, match=r"response_format\.json_schema\.schema: "):
        sampling(compose)


def test_penalties_and_biases_are_params(read: Read) -> None:
    expected = Sampling(
        min_p=0.1, presence_penalty=-2.0, frequency_penalty=2.0, logit_bias=((3, 2.5), (50, -100.0))
    )  # fmt: skip
    params = "{min_p: 0.1, presence_penalty: -2, frequency_penalty: 2, logit_bias: {50: -100, 3: 2.5}}"
    constant = read(f"params: {params}")
    assert sampling(constant) == expected
    (model,) = constant.models.values()
    assert model.sampling() == expected
    given = read(
        'params: {min_p: "${input.min_p}", presence_penalty: "${input.presence_penalty}", '
        'frequency_penalty: "${input.frequency_penalty}", logit_bias: {50: "${input.low | -100}", 3: "${input.high}"}}'
    )
    assert sampling(given, min_p=0.1, presence_penalty=-2, frequency_penalty="2", high=2.5) == expected
    assert sampling(read("params: {logit_bias: '${input.bias}'}"), bias={"5": 1}).logit_bias == ((5, 1.0),)
    assert sampling(read("params: {logit_bias: '${input.bias}'}")) == Sampling()
    with pytest.raises(InputError, match=r"params\.logit_bias\.3: .*less than or equal to 100"):
        sampling(given, high=300)
    with pytest.raises(InputError, match=r"params\.logit_bias: the token 5 is named twice: '5' and '05'"):
        sampling(read("params: {logit_bias: '${input.bias}'}"), bias={"5": 1, "05": 2})


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ("params: {min_p: 2}", "params.min_p: must be less than or equal to 1, not 2"),
        ("params: {presence_penalty: 3}", "params.presence_penalty: must be less than or equal to 2, not 3"),
        ("params: {frequency_penalty: -3}", "params.frequency_penalty: must be greater than or equal to -2, not -3"),
        ("params: {logit_bias: {a: 1}}", "params.logit_bias.a: expected a whole number, not 'a'"),
        ("params: {logit_bias: {5: 101}}", "params.logit_bias.5: must be less than or equal to 100, not 101"),
        ("response_format: json", "response_format: expected a mapping, not 'json'"),
        ("response_format: {type: jsn}", "response_format: unknown type 'jsn'; valid: text, json_object, json_schema"),
        ("response_format: {type: regex, regex: 5}", "response_format.regex: expected text, not 5; put it in quotes"),
        (
            "response_format: {type: json_schema, json_schema: {shema: {}}}",
            "response_format.json_schema: unknown key 'shema'; did you mean 'schema'?",
        ),
        (
            "response_format: {type: json_schema, json_schema: {schema: {const: .nan}}}",
            "response_format.json_schema.schema: Out of range float values are not JSON compliant",
        ),
    ],
)
def test_a_wrong_constant_is_found_at_load(read: Read, action: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(action)
    assert f":7: component.action.{problem}" in str(caught.value)


def test_the_editors_schema_knows_them() -> None:
    validator = jsonschema_rs.Draft202012Validator(Config.model_json_schema())
    for action, valid in (
        (f"response_format: {SCHEMA}", True),
        ("response_format: ${input.format}", True),
        ("response_format: {type: json_schema, json_schema: {shema: {}}}", False),
        ("response_format: {type: regex}", False),
        ('params: {min_p: 0.1, logit_bias: {"5": 3}}', True),
        ('params: {logit_bias: {"5": 300}}', False),
    ):
        assert validator.is_valid(yaml.safe_load(f"{COMPONENT}    {action}\n")) is valid, action


def test_files_with_other_formats_are_other_files(read: Read) -> None:
    actions = (
        f"response_format: {SCHEMA}",
        f"response_format: {SCHEMA.replace('default', 'enum').replace('null', '[null]')}",
        "response_format: {type: json_object}",
        "response_format: ${input.format}",
        "params: {logit_bias: {5: 1}}",
        "params: {logit_bias: {5: 2}}",
    )
    assert len({fingerprint(read(action).config) for action in actions}) == len(actions)


def test_the_pages_python_call_says_the_same(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    compose = read(
        f"response_format: {SCHEMA}\n    params:\n      min_p: ${{input.min_p}}\n"
        "      presence_penalty: ${input.often}\n      frequency_penalty: ${input.often}\n"
        "      logit_bias: ${input.bias}"
    )
    input = {"prompt": "Hi", "min_p": 0.25, "often": -1.5, "bias": {"7": -100, "5": 0.5}}
    (model,) = compose.models.values()
    answer = Answer("__component__", model.blends.resolve(None), "", Usage())
    call = snippets.Call(compose.config.all_workflows[0], input, (answer,))
    code = snippets.openai(compose, "http://x", call)
    assert code is not None
    body: dict[str, Any] = {}
    argument_list = code[code.index("create(") + len("create") : code.index("print(")]
    eval(f"gather{argument_list}", {"gather": lambda **arguments: body.update(arguments)})
    body |= body.pop("extra_body")
    assert parse_body(CompletionBody, body).sampling(model.sampling()) == sampling(compose, **input)
