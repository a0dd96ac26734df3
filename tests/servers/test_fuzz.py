"""Whatever is sent: never a 5xx, always the documented form. Bounded and deterministic."""

import json
import re
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from model_compose.servers.openai_fields import UNSUPPORTED
from tests.servers.test_documents import OPERATIONS
from tests.servers.test_http import PROMPT

pytestmark = pytest.mark.slow

CONFORMANCE = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
CLIENT = httpx.Client(timeout=60)
BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large,
                           HealthCheck.filter_too_much],
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)  # fmt: skip


@pytest.fixture(scope="module")
def openapi(server: str) -> Any:
    return schemathesis.openapi.from_url(f"{server}/openapi.json")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_route_does_what_its_description_says(openapi: Any, method: str, path: str) -> None:
    operation = openapi[path][method]

    @BOUNDED
    @given(case=operation.as_strategy(), likely=st.booleans())
    def conforms(case: Any, likely: bool) -> None:
        if likely and isinstance(case.body, dict):  # a random id or prompt would not get past the first check
            case.body |= {"input": PROMPT} if "runs" in path else {"model": "default", "n": 1, "max_tokens": 2}
        case.call_and_validate(checks=CONFORMANCE, timeout=60)

    conforms()


@pytest.mark.parametrize(("method", "path"), [(m, p) for m, p in OPERATIONS if m == "post" or "task" in p])
def test_what_breaks_the_description_breaks_nothing_else(openapi: Any, method: str, path: str) -> None:
    operation = openapi[path][method]

    @BOUNDED
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def survives(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error], timeout=60)

    survives()


# Bodies that are nearly right.

NUMBERS = st.integers(-5, 5) | st.floats(-5, 5)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(categories=None)),
    st.sampled_from([1e-300, 1e300, 2**63, 2**64, -(2**63), 10**400, "", "\ud800", "\x00", "${input.x}", "a" * 999, "nan"]),
)  # fmt: skip
ODD = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
WEIGHTS = st.dictionaries(st.sampled_from(["alpaca", "pirate"]), NUMBERS | LEAVES)


def bodies(plausible: dict[str, st.SearchStrategy[Any]], needed: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Objects with plausible fields, half of them with an odd one among them, and now and then something else entirely."""
    good = st.fixed_dictionaries({}, optional=plausible).map(lambda body: needed | body)
    name = st.sampled_from(sorted(plausible))
    odd = st.builds(lambda body, name, value: body | {name: value}, good, name, ODD)
    return st.one_of(good, odd, odd, ODD)


RUNS = bodies(
    {
        "input": st.fixed_dictionaries({"prompt": st.just("Hi") | TEXTS}, optional={"blend": WEIGHTS}),
        "blend": WEIGHTS | st.sampled_from(["strong", "plain", "alpaca", ""]),
        "workflow_id": st.sampled_from(["__workflow__", "__default__", None, ""]),
        "stream": st.booleans(),
        "output_only": st.booleans(),
        "wait_for_completion": st.just(True) | st.booleans(),
        "session_id": TEXTS,
        "metadata": st.dictionaries(TEXTS, TEXTS, max_size=2),
        "callback_url": st.none() | st.none() | st.sampled_from(["http://127.0.0.1/", "http://[::1", "https://"]),
        "callback_headers": st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2),
    },
    {"input": PROMPT},
)
TYPED = st.fixed_dictionaries(
    {"prompt": st.just("Hi") | TEXTS},
    optional={name: NUMBERS | ODD | st.sampled_from(["1", "nan", "inf", "-1e999", "calm", "9" * 5000])
              for name in ("tone", "heat", "seed", "blend")},
)  # fmt: skip
FORMATS: list[Any] = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "regex", "regex": "[a-z]+"},
    {"type": "regex", "regex": "("},
    {"type": "json_schema", "json_schema": {"schema": {"type": ["integer", "null"]}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "poem", "$ref": "#/nowhere"}}},
]
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just("default") | st.sampled_from(["default:strong", "default:alpaca"]),
    "max_tokens": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 2**70),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
    "response_format": st.sampled_from(FORMATS),
    "repetition_penalty": st.floats(0, exclude_min=True, allow_infinity=False),
    "n": st.integers(1, 3),
    "seed": st.integers(-1, 2**63 - 1),
    "stop": TEXTS | st.lists(TEXTS, max_size=3),
    "stream": st.booleans(),
    "lora": WEIGHTS | st.lists(st.fixed_dictionaries({"name": st.just("alpaca"), "scale": NUMBERS}), max_size=2),
    "user": TEXTS,
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans() | st.none()}),
    **{name: st.sampled_from([None, *values]) for neutral in UNSUPPORTED.values() for name, values in neutral.items()},
}
COMPLETIONS = bodies(
    SAMPLING | {"prompt": TEXTS, "logprobs": st.integers(0, 20) | st.just(False)},
    {"model": "default", "prompt": "Hi", "max_tokens": 2},
)
PART = st.fixed_dictionaries(
    {"type": st.just("text") | st.sampled_from(["image_url", None])},
    optional={"text": TEXTS | ODD, "detail": st.none()},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "developer"])},
    optional={
        "content": TEXTS | st.none() | st.lists(PART, max_size=2),
        "name": TEXTS | st.none(),
        "tool_calls": st.none() | st.just([]),
        "refusal": st.none() | TEXTS,
    },
)
CHATS = bodies(
    SAMPLING
    | {
        "messages": st.lists(MESSAGE, min_size=1, max_size=3),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 20),
    },
    {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
)
DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]


def assert_is_the_callers(error: Any) -> None:
    """Sampling so extreme that it fails at the second token can only be told in the stream."""
    assert error.get("status") == 400 or error["error"]["type"] == "invalid_request_error", error


def send(url: str, body: Any) -> httpx.Response:
    """The body as JSON, also where it is none: NaN, infinity, half a surrogate pair. Checks the answer's form."""
    response = CLIENT.post(url, content=json.dumps(body), headers={"Content-Type": "application/json"})
    if response.is_success:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("\n\n")
            for error in re.findall(r'^event: error\ndata: (.*)|^data: (\{"error".*)', response.text, re.MULTILINE):
                assert_is_the_callers(json.loads("".join(error)))
        else:
            response.json()
        return response
    assert response.status_code in (400, 404), f"{response.text} for {body}"
    document = response.json()
    if "/v1/" in url:
        assert document["error"]["message"]
        assert document["error"]["type"] in ("invalid_request_error", "not_found_error")
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert document["detail"]
    return response


@settings(BOUNDED, max_examples=100)
@given(body=RUNS)
@example(body={"input": PROMPT, "metadata": {"deep": DEEP}})
@example(body={"input": PROMPT, "blend": {"alpaca": 1e308}})
def test_odd_runs_never_fail_inside(server: str, body: Any) -> None:
    send(f"{server}/api/workflows/runs", body)


@settings(BOUNDED, max_examples=100)
@given(input=TYPED)
@example(input={"prompt": "Hi", "heat": 10**400})
@example(input={"prompt": "Hi", "seed": 10**400})
@example(input={"prompt": "Hi", "seed": "inf"})
@example(input={"prompt": "Hi", "heat": "inf"})
@example(input={"prompt": "Hi", "heat": "nan"})
def test_odd_values_of_typed_inputs_never_fail_inside(wide: str, input: Any) -> None:
    send(f"{wide}/api/workflows/runs", {"workflow_id": "typed", "input": input})


@settings(BOUNDED, max_examples=100)
@given(body=COMPLETIONS)
@example(body={"model": "default", "prompt": "Hi", "max_tokens": 10**30, "temperature": 1})
@example(body={"model": "default", "prompt": "Hi", "temperature": 1e-300})
@example(body={"model": "default", "prompt": "Hi", "max_tokens": 9, "stream": True, "repetition_penalty": 1e-30})
@example(body={"model": "default", "prompt": "Hi", "temperature": 1, "repetition_penalty": 1e-300})
@example(body={"model": "default", "prompt": "Hi", "temperature": 1, "lora": {"alpaca": 1e308}})
@example(body={"model": "default", "prompt": "Hi", "temperature": 1, "seed": 2**63 - 1, "n": 3, "top_k": 2**62})
def test_odd_completions_never_fail_inside(server: str, body: Any) -> None:
    send(f"{server}/v1/completions", body)


@settings(BOUNDED, max_examples=100)
@given(body=CHATS)
def test_odd_chats_never_fail_inside(server: str, body: Any) -> None:
    send(f"{server}/v1/chat/completions", body)


FIELD = st.sampled_from(["input[prompt]", "input.prompt", "blend[alpaca]", "blend", "input", "stream", "metadata[a]"])
FORM_TEXT = st.text(st.characters(codec="utf-8")) | st.sampled_from(["[1", "{}", "{", "[1e999]", "true", "0.7"])


@settings(BOUNDED, max_examples=60)
@given(fields=st.dictionaries(FIELD | FORM_TEXT, FORM_TEXT, max_size=4), multipart=st.booleans())
def test_odd_forms_never_fail_inside(server: str, fields: dict[str, str], multipart: bool) -> None:
    sent: dict[str, Any] = {"files": {k: (None, v) for k, v in fields.items()}} if multipart else {"data": fields}
    response = CLIENT.post(f"{server}/api/workflows/runs", **sent)
    assert response.status_code in (200, 400, 404), f"{response.text} for {fields}"


@settings(BOUNDED, max_examples=60)
@given(
    kind=st.sampled_from(["application/json", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"]),
    content=st.binary()
    | st.binary().map(lambda part: b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + part),
)
def test_any_bytes_are_answered(server: str, kind: str, content: bytes) -> None:
    headers = {"Content-Type": kind}
    for path in ("/api/workflows/runs", "/v1/completions"):
        assert CLIENT.post(server + path, content=content, headers=headers).status_code in (400, 404)
