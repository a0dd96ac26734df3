"""The workflow API as its clients use it: runs in every form, streams, errors, schemas, what is there while loading."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import serving

PROMPT = {"prompt": "Hello"}
CLIENT = httpx.Client(timeout=60)


def post(url: str, body: Any, **options: Any) -> httpx.Response:
    return CLIENT.post(f"{url}/api/workflows/runs", json=body, **options)


def events(text: str) -> list[tuple[str, Any]]:
    """The events of a stream: name and data."""
    found = []
    for block in text.strip().split("\n\n"):
        head, data = block.split("\n")
        found.append((head.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def is_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The response is an RFC 9457 problem with this status; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == "about:blank"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert "Traceback" not in response.text
    return document


@pytest.fixture(scope="module")
def loading(project: Path) -> Iterator[str]:
    with serving(project, load_models=False) as url:
        yield url


# Runs.


def test_a_run_answers_with_output_usage_and_blend(server: str) -> None:
    answer = post(server, {"input": PROMPT}).json()
    assert set(answer) == {"task_id", "status", "workflow_id", "output", "finish_reason", "usage", "blend", "notes"}
    assert answer["status"] == "completed"
    assert answer["workflow_id"] == "__workflow__"
    assert set(answer["output"]) == {"generated"}
    assert answer["usage"]["prompt_tokens"] == 5
    assert 0 < answer["usage"]["completion_tokens"] <= 12
    assert answer["usage"]["tokens_per_second"] > 0
    assert answer["blend"]["name"] == "default"
    assert answer["blend"]["weights"] == {"alpaca": 0.7, "pirate": 0.8}
    assert len(answer["blend"]["identity"]) == 16
    assert answer["finish_reason"] == "length"
    assert answer["notes"] == ["the text was cut at max_output_length (12 tokens)"]


def test_a_blend_in_the_body_goes_before_the_input_and_changes_text_and_identity(server: str) -> None:
    default = post(server, {"input": PROMPT}).json()
    mixed = post(server, {"input": PROMPT | {"blend": "plain"}, "blend": {"alpaca": 2}}).json()
    named = post(server, {"input": PROMPT | {"blend": "strong"}}).json()
    plain = post(server, {"input": PROMPT, "blend": {}}).json()
    assert mixed["blend"]["weights"] == {"alpaca": 2.0}
    assert mixed["output"] == named["output"] != default["output"]
    assert mixed["blend"]["identity"] == named["blend"]["identity"] != default["blend"]["identity"]
    assert plain["blend"] == {"name": None, "weights": {}, "identity": plain["blend"]["identity"]}
    assert len({answer["output"]["generated"] for answer in (default, mixed, plain)}) == 3


@pytest.mark.parametrize("blend", [None, "", "default"])
def test_null_and_empty_blends_and_its_name_are_the_default(server: str, blend: object) -> None:
    assert post(server, {"input": PROMPT, "blend": blend}).json()["blend"]["name"] == "default"


def test_session_and_metadata_come_back(server: str) -> None:
    answer = post(server, {"input": PROMPT, "session_id": "s-1", "metadata": {"a": [1, None]}}).json()
    assert answer["session_id"] == "s-1"
    assert answer["metadata"] == {"a": [1, None]}


def test_output_only_is_the_bare_output(server: str) -> None:
    whole = post(server, {"input": PROMPT}).json()
    assert post(server, {"input": PROMPT, "output_only": True}).json() == whole["output"]


@pytest.mark.parametrize("key", ["input[prompt]", "input.prompt"])
@pytest.mark.parametrize("multipart", [True, False])
def test_forms_nest_their_keys(server: str, key: str, multipart: bool) -> None:
    fields = {key: "Hello", "blend[alpaca]": "0.7", "output_only": "false", "metadata": '{"a": 1}'}
    sent: dict[str, Any] = {"files": {k: (None, v) for k, v in fields.items()}} if multipart else {"data": fields}
    answer = httpx.post(f"{server}/api/workflows/runs", timeout=60, **sent).json()
    same = post(server, {"input": PROMPT, "blend": {"alpaca": 0.7}}).json()
    assert answer["output"] == same["output"]
    assert answer["blend"] == same["blend"]
    assert answer["metadata"] == {"a": 1}


def test_a_file_in_a_form_is_read_as_text(server: str) -> None:
    files = {"input[prompt]": ("prompt.txt", "Grüße".encode(), "text/plain")}
    answer = httpx.post(f"{server}/api/workflows/runs", files=files, timeout=60).json()
    assert answer["output"] == post(server, {"input": {"prompt": "Grüße"}}).json()["output"]


def test_a_prompt_in_a_form_may_start_with_a_bracket(server: str) -> None:
    answer = httpx.post(f"{server}/api/workflows/runs", data={"input[prompt]": "[INST] Hi [/INST]"}, timeout=60)
    assert answer.json()["usage"]["prompt_tokens"] == len("[INST] Hi [/INST]")


def test_a_private_workflow_is_hidden_but_runs_by_its_id(wide: str) -> None:
    listed = [entry["workflow_id"] for entry in httpx.get(f"{wide}/api/workflows").json()]
    assert listed == ["main", "raw", "typed", "echo"]
    answer = post(wide, {"input": PROMPT, "workflow_id": "hidden"}).json()
    assert answer["status"] == "completed"
    assert answer["output"] == post(wide, {"input": PROMPT, "workflow_id": "main"}).json()["output"]["generated"]


def test_a_field_of_a_form_may_be_as_large_as_the_body(loading: str) -> None:
    for sent in ({"data": {"input[prompt]": "x" * (2 << 20)}}, {"files": {"input[prompt]": (None, "x" * (2 << 20))}}):
        is_problem(httpx.post(f"{loading}/api/workflows/runs", **sent), 503)  # past the body, the models are missing


# Streams.


def test_the_deltas_of_a_stream_are_the_output_and_done_is_the_ordinary_response(server: str) -> None:
    whole = post(server, {"input": PROMPT, "session_id": "s"}).json()
    response = post(server, {"input": PROMPT, "session_id": "s", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *deltas, (last, done) = events(response.text)
    assert {name for name, _ in deltas} == {"delta"}
    assert {data["path"] for _, data in deltas} == {"generated"}
    assert len(deltas) > 1
    assert "".join(data["text"] for _, data in deltas) == whole["output"]["generated"]
    assert last == "done"
    unlike = {"task_id", "usage"}  # the id, and the speed
    assert {k: v for k, v in done.items() if k not in unlike} == {k: v for k, v in whole.items() if k not in unlike}
    assert set(done) == set(whole)


def test_a_wrong_stream_is_a_problem_and_no_stream(server: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"input": {}},
        {"input": PROMPT, "blend": "nope"},
        {"input": {"prompt": "x" * 300}},
    ]
    for body in bodies:
        document = is_problem(post(server, {**body, "stream": True}), 400)
        assert document["errors"]


def test_the_dialects_stream_is_the_raw_text(wide: str) -> None:
    text = post(wide, {"input": PROMPT, "workflow_id": "raw"}).json()["output"]
    streamed = post(wide, {"input": PROMPT, "workflow_id": "raw", "output_only": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert _raw_text(streamed.text) == text
    assert "event:" not in streamed.text
    asked_for = post(wide, {"input": PROMPT, "workflow_id": "hidden", "output_only": True, "stream": True})
    assert _raw_text(asked_for.text) == text


def _raw_text(stream: str) -> str:
    chunks = stream.removesuffix("\n\n").split("\n\n")
    return "".join("\n".join(line.removeprefix("data: ") for line in chunk.split("\n")) for chunk in chunks)


# Errors.


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"input": {}}, "input.prompt", "required"),
        ({}, "input.prompt", "required"),
        ({"input": PROMPT, "blend": "stronk"}, "blend", "did you mean 'strong'"),
        ({"input": PROMPT, "blend": {"nobody": 1}}, "blend", "known: alpaca, pirate"),
        ({"input": PROMPT, "blend": {"alpaca": "much"}}, "blend", "the weight of alpaca must be a number, not 'much'"),
        ({"input": PROMPT, "blend": {"alpaca": True}}, "blend.alpaca", "finite number"),
        ({"input": PROMPT, "blend": 5}, "blend", "string, or: "),
        ({"input": PROMPT, "stream": "perhaps"}, "stream", "boolean"),
        ({"input": PROMPT | {"blend": {"alpaca": 1}, "temprature": 1}}, "input.temprature", "valid: prompt, blend"),
        ({"input": PROMPT, "inputs": 1}, "inputs", "did you mean 'input'?"),
        ({"input": PROMPT, "metadata": [1]}, "metadata", "dictionary"),
        ({"input": PROMPT, "callback_headers": {"a": 1}}, "callback_headers.a", "string"),
        ({"input": PROMPT, "subscribe_task": True}, "subscribe_task", "not supported"),
        ({"input": PROMPT, "stream": True, "wait_for_completion": False}, "stream", "wait_for_completion"),
        ({"input": PROMPT, "output_only": True, "wait_for_completion": False}, "output_only", "wait_for_completion"),
        ({"input": PROMPT, "callback_url": "http://example.com"}, "callback_url", "wait_for_completion"),
        ({"input": PROMPT, "callback_headers": {"a": "b"}}, "callback_headers", "callback_url"),
        ({"input": {"prompt": ""}}, "prompt", "empty"),
        ({"input": {"prompt": "x" * 300}}, "prompt", "300 tokens, and this model's context holds 256"),
        ([1], "body", "object"),
    ],
)
def test_a_bad_request_is_a_400_that_names_the_field(server: str, body: Any, field: str, words: str) -> None:
    document = is_problem(post(server, body), 400)
    assert [error["field"] for error in document["errors"]] == [field]
    assert words in document["errors"][0]["message"]
    assert words in document["detail"]


def test_all_wrong_fields_are_named_at_once(wide: str) -> None:
    body = {"workflow_id": "typed", "input": {"tone": "shrill", "seed": "x", "heat": "y"}}
    document = is_problem(post(wide, body), 400)
    named = {error["field"]: error["message"] for error in document["errors"]}
    assert set(named) == {"input.tone", "input.prompt", "input.seed", "input.heat"}
    assert "allowed: calm, loud" in named["input.tone"]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"nonsense", b"\xff", b'{"input": NaN}', b'{"metadata": {"a": 1e999}}', b"[" * 5000,
        b'{"session_id": "\\ud800"}', b"9" * 5000, b'"text"', b"null",
    ],
)  # fmt: skip
def test_what_is_not_json_is_a_400(server: str, text: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server}/api/workflows/runs", content=text, headers=headers)
    document = is_problem(response, 400)
    assert document["errors"][0]["field"] == "body"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/xml"])
def test_other_content_types_are_a_400_that_names_the_ones_that_work(server: str, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    response = httpx.post(f"{server}/api/workflows/runs", content=b"{}", headers=headers)
    assert "multipart/form-data" in is_problem(response, 400)["detail"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"input": "a", "input[prompt]": "b"}, "below a plain value"), ({"[]": "a"}, "names no field")],
)
def test_form_keys_that_make_no_sense_are_a_400(server: str, fields: dict[str, str], words: str) -> None:
    response = httpx.post(f"{server}/api/workflows/runs", data=fields)
    assert words in is_problem(response, 400)["detail"]


def test_what_is_given_twice_is_a_400(server: str) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'{"input": {"prompt": "Hello"}, "blend": {"alpaca": 1, "alpaca": 0.5}}'
    response = httpx.post(f"{server}/api/workflows/runs", content=body, headers=headers)
    assert "the key 'alpaca' stands in one object twice" in is_problem(response, 400)["detail"]
    for twice in (b"input.prompt=a&input[prompt]=b", b"input.prompt=a&blend.alpaca=1&blend.alpaca=2"):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        response = httpx.post(f"{server}/api/workflows/runs", content=twice, headers=headers)
        assert "a second time" in is_problem(response, 400)["detail"]


def test_a_byte_order_mark_before_a_body_is_skipped(server: str) -> None:
    headers = {"Content-Type": "application/json"}
    body = b'\xef\xbb\xbf{"input": {"prompt": "Hello"}}'
    answer = httpx.post(f"{server}/api/workflows/runs", content=body, headers=headers, timeout=60).json()
    assert answer["output"] == post(server, {"input": PROMPT}).json()["output"]


def test_a_binary_file_is_a_400(server: str) -> None:
    response = httpx.post(f"{server}/api/workflows/runs", files={"input[prompt]": b"\xff\xfe"})
    assert "UTF-8" in is_problem(response, 400)["detail"]


def test_a_broken_multipart_body_is_a_400(server: str) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        headers = {"Content-Type": kind}
        is_problem(httpx.post(f"{server}/api/workflows/runs", content=b"--y\r\n", headers=headers), 400)


@pytest.mark.parametrize("raw", ["NaN", "-Infinity", '{"a": 1e999}', '"\\ud800"', "[" * 300, "{"])
def test_values_that_no_answer_could_carry_are_refused(wide: str, raw: str) -> None:
    document = is_problem(post(wide, {"workflow_id": "echo", "input": PROMPT | {"raw": raw}}), 400)
    assert document["errors"][0]["field"] == "input.raw"


def test_unknown_things_are_404(server: str) -> None:
    workflow = is_problem(post(server, {"input": PROMPT, "workflow_id": "nope"}), 404)
    assert "known: __workflow__" in workflow["detail"]
    is_problem(httpx.get(f"{server}/api/workflows/nope/schema"), 404)
    is_problem(httpx.get(f"{server}/api/tasks/nope"), 404)
    is_problem(httpx.post(f"{server}/api/tasks/nope/cancel"), 404)
    is_problem(httpx.get(f"{server}/nowhere"), 404)


def test_a_wrong_method_is_405_and_a_wrong_query_400(server: str) -> None:
    response = httpx.get(f"{server}/api/workflows/runs")
    is_problem(response, 405)
    assert response.headers["allow"] == "POST"
    document = is_problem(httpx.get(f"{server}/api/workflows", params={"include_schema": "maybe"}), 400)
    assert document["errors"][0]["field"] == "include_schema"


def test_a_bug_of_ours_is_a_500_without_its_traceback(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the secret is hunter2")

    with serving(project) as url:
        monkeypatch.setattr("model_compose.workflow.runner._output", explode)
        document = is_problem(post(url, {"input": PROMPT}), 500)
        assert document["task_id"]
        assert "hunter2" not in str(document)
        state = httpx.get(f"{url}/api/tasks/{document['task_id']}")
        assert state.status_code == 200
        assert state.json()["status"] == "failed"
        assert state.json()["error"] == {"code": "run_failed", "message": document["detail"]}
        is_problem(httpx.get(f"{url}/api/tasks/{document['task_id']}?output_only=true"), 500)
        monkeypatch.setattr("model_compose.compose.Compose.prepare", explode)
        assert "hunter2" not in str(is_problem(post(url, {"input": PROMPT}), 500))


def test_an_error_in_mid_stream_is_an_event(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise ZeroDivisionError("the secret is hunter2")

    with serving(project) as url:
        monkeypatch.setattr("model_compose.workflow.runner._output", explode)
        response = post(url, {"input": PROMPT, "stream": True})
        assert response.status_code == 200
        name, data = events(response.text)[-1]
        assert name == "error"
        assert data["status"] == 500
        assert data["task_id"]
        assert "hunter2" not in response.text
        body = {"input": PROMPT, "stream": True, "output_only": True}
        with pytest.raises(httpx.RemoteProtocolError):  # the dialect's form has no word for it
            post(url, body)


# Workflows and their schemas.


def test_workflows_are_listed_with_title_and_default(wide: str) -> None:
    listed = httpx.get(f"{wide}/api/workflows").json()
    assert listed[0] == {"workflow_id": "main", "title": "Main", "default": True}
    assert listed[1] == {"workflow_id": "raw"}
    schemas = httpx.get(f"{wide}/api/workflows", params={"include_schema": "true"}).json()
    assert schemas[0]["description"] == "The one that is meant."
    assert schemas[0] == httpx.get(f"{wide}/api/workflows/main/schema").json()


def test_a_schema_describes_each_input(wide: str) -> None:
    schema = httpx.get(f"{wide}/api/workflows/typed/schema").json()
    inputs = {variable["name"]: variable for variable in schema["input"]}
    assert inputs["prompt"]["type"] == "text"
    assert inputs["prompt"]["required"] is True
    assert inputs["prompt"]["description"] == "What to say"
    assert inputs["tone"]["options"] == ["calm", "loud"]
    assert inputs["tone"]["default"] == "calm"
    assert "required" not in inputs["tone"]
    heat = inputs["heat"]
    assert (heat["type"], heat["minimum"], heat["maximum"], heat["step"], heat["default"]) == ("slider", 0, 2, 0.5, 1)
    assert inputs["seed"] == {"name": "seed", "type": "integer", "is_list": False}
    assert (inputs["blend"]["role"], inputs["blend"]["component"]) == ("blend", "tiny")
    assert len(schema["output"]) == 1


# Health, and the time before the models are there.


def test_health_is_ok_once_loaded(server: str) -> None:
    response = httpx.get(f"{server}/api/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_while_loading_health_shows_progress_and_runs_are_503(loading: str) -> None:
    health = httpx.get(f"{loading}/api/health")
    assert health.status_code == 503
    assert health.json()["status"] == "loading"
    assert set(health.json()["progress"]) == {"what", "done", "total", "unit"}
    assert '"done":0,' in health.text  # a count has no decimal point, which some clients would refuse
    assert health.headers["retry-after"]
    run = post(loading, {"input": PROMPT})
    is_problem(run, 503)
    assert run.headers["retry-after"]
    is_problem(post(loading, {"input": PROMPT, "stream": True}), 503)
    is_problem(post(loading, {"input": PROMPT, "wait_for_completion": False}), 503)
    for path, body in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": [{"role": "user"} | {"content": "a"}]}),
    ):
        response = httpx.post(f"{loading}/v1/{path}", json={"model": "default", **body})
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.json()["error"]["type"] == "service_unavailable_error"
    assert httpx.get(f"{loading}/v1/models").status_code == 503
    assert httpx.get(f"{loading}/api/workflows").status_code == 200


# A run's own sampling.


def test_a_run_may_say_how_long_its_text_may_be(server: str) -> None:
    body = {"input": PROMPT, "sampling": {"max_output_length": 2}}
    answer = post(server, body).json()
    assert (answer["usage"]["completion_tokens"], answer["finish_reason"]) == (2, "length")
    document = is_problem(post(server, {"input": PROMPT, "sampling": {"top": 1}}), 400)
    assert document["errors"][0]["field"] == "sampling.top"
