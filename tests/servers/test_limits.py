"""What a request may hold: each list, map and text has a bound, which is refused by the name of its field."""

import json
from typing import Any

import httpx
import pytest

from model_compose import expressions
from model_compose.components.model_actions import MOST_BIASES, MOST_MESSAGES, MOST_PROMPTS, MOST_STOPS
from model_compose.components.response_format import LARGEST_SCHEMA
from model_compose.expressions import strict_json
from model_compose.schema import LONGEST_NAME
from model_compose.servers.http import DEEPEST_KEY, LARGEST
from model_compose.servers.openai import MOST_ADAPTERS
from model_compose.servers.wire import MOST_ERRORS
from tests.servers.test_http import CLIENT, PROMPT, is_problem, post

COMPLETE = {"model": "default", "prompt": "Hello", "max_tokens": 1}
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
RUN = {"input": PROMPT}


def refused(response: httpx.Response, field: str, said: str) -> None:
    """A 400 that names the field and the bound, and does not repeat what was sent."""
    assert response.status_code == 400, response.text
    assert len(response.content) < 3_000
    document = response.json()
    if "errors" in document:
        assert field in [error["field"] for error in document["errors"]]
        assert said in document["detail"]
    else:
        assert document["error"]["param"] == field
        assert said in document["error"]["message"]


@pytest.mark.parametrize("charset", ["unicode_escape", "punycode", "utf-16", "nonsense"])
def test_a_form_is_utf8(server: str, charset: str) -> None:
    """Other codecs can make texts that no JSON holds."""
    part = b'--B\r\nContent-Disposition: form-data; name="metadata[\\ud800]"\r\n\r\nx\r\n--B--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=B; charset={charset}"}
    answer = httpx.post(f"{server}/api/workflows/runs", content=part, headers=headers)
    refused(answer, "Content-Type", "a form must be UTF-8; leave 'charset' out")


def text_of(size: int) -> str:
    """So many bytes, of which a character takes two."""
    return "é" * (size // 2) + "x" * (size % 2)


@pytest.mark.parametrize(
    ("field", "of_size", "more"),
    [
        ("session_id", text_of, {}),
        ("metadata", lambda size: {"a": text_of(size - len('{"a":""}'))}, {}),
        (
            "callback_headers",
            lambda size: {"X": "x" * (size - len('{"X":""}'))},
            {"callback_url": "http://127.0.0.1:1/"},
        ),
    ],
)
def test_what_is_kept_of_a_run_has_a_size(server: str, field: str, of_size: Any, more: dict[str, Any]) -> None:
    body = {**RUN, **more, "wait_for_completion": not more}
    said = f"{field} has {LARGEST[field] + 1} bytes, and it may have at most {LARGEST[field]}"
    refused(post(server, {**body, field: of_size(LARGEST[field] + 1)}), field, said)
    answer = post(server, {**body, field: of_size(LARGEST[field])})
    if more:  # this server calls no private host, which is found out after the sizes
        refused(answer, "callback_url", "leads to 127.0.0.1, which is not a public address")
    else:
        assert answer.json()[field] == of_size(LARGEST[field])


def test_a_callback_url_has_a_size(server: str) -> None:
    body = {**RUN, "wait_for_completion": False, "callback_url": "http://x/" + "a" * LARGEST["callback_url"]}
    refused(post(server, body), "callback_url", f"at most {LARGEST['callback_url']}")


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("completions", {**COMPLETE, "stop": ["x"] * (MOST_STOPS + 1)}, "stop", f"at most {MOST_STOPS}"),
        ("completions", {**COMPLETE, "stop": [1] * 9_999}, "stop", "9999 stop strings"),
        (
            "completions", {**COMPLETE, "logit_bias": {str(n): 1 for n in range(MOST_BIASES + 1)}}, "logit_bias",
            f"{MOST_BIASES + 1} tokens, and at most {MOST_BIASES} are taken",
        ),
        (
            "completions", {**COMPLETE, "lora": {f"a{n}": 1 for n in range(MOST_ADAPTERS + 1)}}, "lora",
            f"{MOST_ADAPTERS + 1} adapters, and at most {MOST_ADAPTERS} are taken",
        ),
        ("completions", {**COMPLETE, "lora": [{"name": "a"}] * (MOST_ADAPTERS + 1)}, "lora", f"at most {MOST_ADAPTERS}"),
        ("completions", {**COMPLETE, "n": 65}, "n", "less than or equal to 64"),
        ("completions", {**COMPLETE, "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ("completions", {**COMPLETE, "model": "m" * (LONGEST_NAME + 1)}, "model", f"at most {LONGEST_NAME} characters"),
        (
            "completions",
            {**COMPLETE, "response_format": {
                "type": "json_schema", "json_schema": {"schema": {"description": "x" * LARGEST_SCHEMA}}
            }},
            "response_format.json_schema.schema", f"it may have at most {LARGEST_SCHEMA}",
        ),
        ("completions", {**COMPLETE, "response_format": {"type": "regex", "regex": "a" * 4097}},
         "response_format.regex", "at most 4096"),
        (
            "chat/completions", {**CHAT, "messages": CHAT["messages"] * (MOST_MESSAGES + 1)}, "messages",  # type: ignore[operator]
            f"{MOST_MESSAGES + 1} messages, and at most {MOST_MESSAGES} are taken",
        ),
        ("chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ],
)  # fmt: skip
def test_v1_names_the_bound_of_each_list_and_map(
    server: str, path: str, body: dict[str, Any], field: str, said: str
) -> None:
    refused(CLIENT.post(f"{server}/v1/{path}", json=body), field, said)


def test_a_run_names_the_bound_of_its_prompts_and_names(wide: str) -> None:
    listed = {"prompt": ["a"] * (MOST_PROMPTS + 1)}
    said = f"{MOST_PROMPTS + 1} prompts, and at most {MOST_PROMPTS} are taken"
    refused(post(wide, {"workflow_id": "raw", "input": listed}), "text", said)
    refused(post(wide, {"workflow_id": "w" * (LONGEST_NAME + 1)}), "workflow_id", f"at most {LONGEST_NAME} characters")


@pytest.mark.parametrize("blend", ["b" * 3_000_000, {"b" * 3_000_000: 1.0}])
def test_an_unknown_blend_is_shown_short(server: str, blend: Any) -> None:
    document = is_problem(post(server, {**RUN, "blend": blend}), 400)
    assert "unknown" in document["detail"]
    assert len(json.dumps(document)) < 3_000


def test_a_stray_key_is_shown_short_and_compared_fast(server: str) -> None:
    document = is_problem(post(server, {**RUN, "k" * 3_000_000: 1}), 400)
    assert "unknown key 'kkk" in document["detail"]
    assert len(json.dumps(document)) < 3_000


def test_of_many_errors_the_first_are_told(server: str) -> None:
    headers = {f"h{number}": number for number in range(10 * MOST_ERRORS)}
    assert len(is_problem(post(server, {**RUN, "callback_headers": headers}), 400)["errors"]) == MOST_ERRORS


def test_a_form_key_has_a_depth(server: str) -> None:
    for parts, status in ((DEEPEST_KEY, 200), (DEEPEST_KEY + 1, 400)):
        form = {"input.prompt": "Hello", ".".join(["metadata", *"a" * (parts - 1)]): "x"}
        answer = CLIENT.post(f"{server}/api/workflows/runs", data=form)
        assert answer.status_code == status, answer.text
    refused(answer, "body", f"a form key has {DEEPEST_KEY + 1} parts, and it may have at most {DEEPEST_KEY}")


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_json_has_a_number_of_values_wherever_it_comes_in(
    wide: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """size: of a text beside, as larger bodies are read by a thread."""
    monkeypatch.setattr(expressions, "MOST_VALUES", 100)
    many = json.dumps([0] * 101)
    body = f'{{"metadata": {{"a": {many}}}, "session_id": "{"," * size}"}}'
    answer = CLIENT.post(f"{wide}/api/workflows/runs", content=body, headers={"Content-Type": "application/json"})
    refused(answer, "body", "it holds more than 100 values")
    run = {"workflow_id": "echo", "input": {"prompt": "a", "raw": many}}
    refused(post(wide, run), "input.raw", "(it holds more than 100 values)")


@pytest.mark.parametrize(
    ("workflow", "given", "field"),
    [
        ("typed", {"prompt": "a", "heat": "x" * 100_000}, "input.heat"),
        ("typed", {"prompt": "a", "tone": "x" * 100_000}, "input.tone"),
        ("typed", {"prompt": "a", "seed": ["x" * 1_000] * 1_000}, "input.seed"),
        ("echo", {"prompt": "a", "raw": "x" * 100_000}, "input.raw"),
    ],
)
def test_a_value_that_is_refused_is_shown_short(wide: str, workflow: str, given: Any, field: str) -> None:
    refused(post(wide, {"workflow_id": workflow, "input": given}), field, field)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[]", 2), ("[[],[]]", 5), ('{"a": 1, "b": {}}', 4), ('[",[{,", "\\",[{", "\\\\", "[\\u005b"]', 5), ('"[,{"', 1),
        ('[1, "\\\\\\",", 2]', 4),
    ],
)  # fmt: skip
def test_values_are_counted_outside_of_strings(text: str, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MOST_VALUES", values)
    assert strict_json(text) == json.loads(text)
    monkeypatch.setattr(expressions, "MOST_VALUES", values - 1)
    with pytest.raises(ValueError, match=f"more than {values - 1} values"):
        strict_json(text.encode())


def test_a_string_that_never_ends_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "MOST_VALUES", 100)
    for text in ('"' + '\\"[' * 1_000_000, '["' + "\\" * 3_000_001, '"' * 300_001 + "," * 10):
        with pytest.raises(ValueError, match=r"JSON|line 1|more than|EOF|trailing"):
            strict_json(text)
