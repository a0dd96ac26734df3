"""Bodies as OpenAI's clients send them: what changes nothing is taken, what would change the answer is refused by name."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from model_compose.generation import Message, Sampling
from model_compose.servers.openai import Body, ChatBody, CompletionBody
from model_compose.servers.openai_fields import UNSUPPORTED
from model_compose.servers.wire import parse_body
from tests.servers.test_openai import MESSAGES, chat, client_of, complete

CHAT: dict[str, Any] = {"model": "default", "messages": MESSAGES, "max_tokens": 4}
COMPLETION: dict[str, Any] = {"model": "default", "prompt": "Hello", "max_tokens": 4}
ROUTES = {"chat/completions": CHAT, "completions": COMPLETION}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[OpenAI]:
    with client_of(server) as opened:
        yield opened


def post(server: str, route: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server}/v1/{route}", json=ROUTES[route] | fields, timeout=60)


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [choice.get("text") or choice["message"]["content"] for choice in answer.json()["choices"]]


def refusal(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# What changes nothing.

LANGCHAIN: dict[str, Any] = {
    "stream": False,
    "n": 1,
    "temperature": None,
    "stop": None,
    "logprobs": None,
    "reasoning_effort": None,
}
LLAMA_INDEX: dict[str, Any] = {"tools": [], "tool_choice": "auto", "stream": False, "parallel_tool_calls": True}
LITE_LLM: dict[str, Any] = {
    "stream_options": None,
    "functions": [],
    "function_call": "none",
    "logit_bias": {},
    "user": "",
    "tools": None,
}
OPEN_WEBUI = {"stream": False, "metadata": {"chat_id": "1"}, "stream_options": {}, "seed": None, "service_tier": "auto"}
SILLY_TAVERN = {
    "seed": -1, "top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1,
    "stop": [], "logit_bias": {}, "typical_p": 1, "top_a": 0, "tfs": 1, "mirostat_mode": 0, "logprobs": 0, "n": 1,
}  # fmt: skip
CONTINUE = {"prediction": {"type": "content", "content": "a"}, "parallel_tool_calls": False, "suffix": "", "best_of": 1}
OPENAI_SDK = {
    "echo": False, "modalities": ["text"], "store": True, "response_format": {"type": "text"}, "audio": None,
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s", "verbosity": "medium",
    "web_search_options": None, "logprobs": False, "stream_options": {"include_usage": False},
}  # fmt: skip
VLLM: dict[str, Any] = {
    "use_beam_search": False, "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "guided_json": None,
    "stop_token_ids": [], "length_penalty": 1.0, "spaces_between_special_tokens": True, "priority": None,
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "fields", [LANGCHAIN, LLAMA_INDEX, LITE_LLM, OPEN_WEBUI, SILLY_TAVERN, CONTINUE, OPENAI_SDK, VLLM]
)
def test_what_clients_send_as_usual_changes_nothing(server: str, route: str, fields: dict[str, Any]) -> None:
    if route == "completions":
        fields = {name: value for name, value in fields.items() if name != "parallel_tool_calls"}
    plain, answer = post(server, route), post(server, route, **fields)
    assert texts(answer) == texts(plain)
    logprobs = answer.json()["choices"][0]["logprobs"]
    assert (logprobs is not None) == (
        route == "completions" and fields.get("logprobs") == 0 and fields["logprobs"] is not False
    )


def test_every_neutral_value_is_taken_on_both_routes() -> None:
    for neutral in UNSUPPORTED.values():
        for name, values in neutral.items():
            for value in (None, *values):
                assert parse_body(ChatBody, CHAT | {name: value}) == parse_body(ChatBody, CHAT)
                said = parse_body(CompletionBody, COMPLETION | {name: value})
                assert said.sampling(Sampling()) == parse_body(CompletionBody, COMPLETION).sampling(Sampling())


def test_the_official_client_may_send_them_too(client: OpenAI) -> None:
    text = complete(client, best_of=1, suffix="", echo=False, logit_bias={}, extra_body={"top_k": -1, "seed": -1})
    assert text.choices[0].text == complete(client).choices[0].text
    said: Any = chat(client, tool_choice="auto", tools=[], parallel_tool_calls=False, top_logprobs=0, logprobs=False)
    assert said.choices[0].message.content == chat(client).choices[0].message.content
    assert chat(client, tool_choice="none", function_call="auto", stream_options=None).choices
    turn = said.choices[0].message.model_dump()  # with its nulls, as programs keep a conversation
    assert chat(client, messages=[*MESSAGES, turn, MESSAGES[-1]]).choices


def test_a_null_is_a_field_that_was_left_out_also_of_an_unknown_field(server: str) -> None:
    for route in ROUTES:
        assert texts(post(server, route, never_heard_of=None)) == texts(post(server, route))
        everything = dict.fromkeys(Body.model_fields.keys() - {"model"})
        assert parse_body(CompletionBody, COMPLETION | everything | {"max_tokens": 4}).sampling(Sampling()) == Sampling(
            4
        )
    turn = {"role": "user", "content": "a", "tool_calls": None, "audio": None, "thoughts": None, "name": None}
    assert parse_body(ChatBody, CHAT | {"messages": [turn]}).messages[0].message == Message("user", "a")


def test_minus_one_is_off_and_another_seed_each_time(server: str) -> None:
    action = Sampling(seed=5, top_k=7)
    assert parse_body(CompletionBody, COMPLETION | {"seed": -1, "top_k": -1}).sampling(action).seed is None
    assert parse_body(CompletionBody, COMPLETION | {"top_k": -1}).sampling(action) == Sampling(4, seed=5, top_k=0)
    drawn = [texts(post(server, "completions", seed=-1, temperature=2, top_p=1, max_tokens=12)) for _ in range(3)]
    assert len({text for (text,) in drawn}) == 3
    for field in ("seed", "top_k"):
        assert refusal(post(server, "completions", **{field: -2}))["param"] == field


def test_best_of_as_many_as_n_draws_and_answers_all(server: str) -> None:
    assert len(texts(post(server, "completions", n=2, best_of=2))) == 2
    error = refusal(post(server, "completions", n=2, best_of=3))
    assert error["param"] == "best_of"
    assert "every text that is drawn is answered" in error["message"]


# What would change the answer.


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"suffix": "end"}, "only at the end of the prompt"),
        ({"echo": True}, "only the new text"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "calls no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "calls no tools"),
        ({"function_call": {"name": "f"}}, "calls no tools"),
        ({"modalities": ["text", "audio"]}, "text alone"),
        ({"reasoning_effort": "high"}, "no such control"),
        ({"typical_p": 0.5}, "does not draw tokens this way"),
        ({"min_tokens": 5}, "does not draw tokens this way"),
        ({"ignore_eos": True}, "does not draw tokens this way"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "template is used as it is"),
        ({"unheard_of": 0}, "unknown key"),
        ({"unheard_of": []}, "unknown key"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "neither padding nor running usage"),
        ({"stream_options": {"include_usage": True}}, "needs stream=true"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_what_would_change_the_answer_is_refused_with_the_reason(
    server: str, route: str, fields: dict[str, Any], reason: str
) -> None:
    error = refusal(post(server, route, **fields))
    name = list(fields)[-1]
    assert (error["param"] or name).split(".")[0] == name
    assert name in error["message"]
    assert reason in error["message"]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_a_boolean_is_no_number(server: str, route: str, value: bool) -> None:
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "presence_penalty"):
        error = refusal(post(server, route, **{field: value}))
        assert error["param"] == field
        assert "number" in error["message"]


def test_an_adapter_is_named_once(client: OpenAI) -> None:
    twice = [{"name": "alpaca", "scale": 1}, {"name": "pirate"}, {"name": "alpaca", "scale": 1}]
    for call in (chat, complete):
        with pytest.raises(openai.BadRequestError, match="'alpaca' is named 2 times") as caught:
            call(client, extra_body={"lora": twice})
        assert caught.value.param == "lora"
    assert complete(client, extra_body={"lora": twice[:2]}).choices


# What messages say.

MISSING = object()


def part(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in ({"type": "text"} | fields).items() if value is not MISSING}


@pytest.mark.parametrize("text", [None, 5, 1.5, True, {"value": "a"}, ["a"], MISSING])
def test_the_text_of_a_part_is_a_string(server: str, text: Any) -> None:
    content = [part(text="Hi"), part(text=text)]
    error = refusal(post(server, "chat/completions", messages=[MESSAGES[0], {"role": "user", "content": content}]))
    assert error["param"] == "messages.1.content.1.text"
    assert "messages.1.content.1.text" in error["message"]


@pytest.mark.parametrize(
    ("turn", "place"),
    [
        ({"role": "user", "content": None}, "content"),
        ({"role": "system", "content": None}, "content"),
        ({"role": "user"}, "content"),
        ({"role": "assistant"}, "content"),
        ({"role": "user", "content": 5}, "content"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": ["a"]}, "content.0"),
        ({"role": "user", "content": [{"text": "a"}]}, "content.0.type"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "content.0"),
        ({"role": "user", "content": [part(text="a", lang="de")]}, "content.0.lang"),
        ({"role": "user", "content": "a", "name": 5}, "name"),
        ({"role": 5, "content": "a"}, "role"),
        ({"role": None, "content": "a"}, "role"),
        ({"role": "tool", "content": "a"}, "role"),
        ({"role": "tool", "content": "a", "tool_call_id": "b"}, "tool_call_id"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "b"}]}, "tool_calls"),
        ({"role": "assistant", "content": None, "refusal": "No."}, "refusal"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "reasoning_content"),
        ("hello", ""),
    ],
)
def test_a_turn_that_is_no_text_is_refused_at_its_place(server: str, turn: Any, place: str) -> None:
    error = refusal(post(server, "chat/completions", messages=[MESSAGES[0], turn]))
    assert (error["param"] + ".").startswith(f"messages.1.{place}".rstrip(".") + ".")


def test_turns_that_say_nothing_by_right() -> None:
    def read(turn: dict[str, Any]) -> Message:
        return parse_body(ChatBody, CHAT | {"messages": [turn]}).messages[0].message

    assert read({"role": "assistant", "content": None, "tool_calls": []}) == Message("assistant", "")
    assert read({"role": "user", "content": ""}) == Message("user", "")
    assert read({"role": "user", "content": [part(text="")]}) == Message("user", "")
    cached = part(text="a", cache_control={"type": "ephemeral"})
    assert read({"role": "user", "content": [cached, part(text="b")], "name": "Ann"}) == Message("user", "ab", "Ann")


@pytest.mark.parametrize("prompt", [None, 5, True, {"text": "a"}, [None], [5], [["a"]], []])
def test_a_prompt_is_text(server: str, prompt: Any) -> None:
    error = refusal(post(server, "completions", prompt=prompt))
    assert error["param"].split(".")[0] == "prompt"


@pytest.mark.parametrize("field", ["model", "user", "stop", "service_tier", "prompt_cache_key", "safety_identifier"])
@pytest.mark.parametrize("value", [5, True, {"a": "b"}, [5], [None]])
def test_no_other_value_becomes_a_string(server: str, field: str, value: Any) -> None:
    for route in ROUTES:
        assert refusal(post(server, route, **{field: value}))["param"].split(".")[0] == field


def test_texts_of_a_run_are_strings_too(server: str) -> None:
    """On /api the file's `as text` may ask for a number to be written out; null and a missing text are errors."""
    for input in ({"prompt": None}, {}, None):
        answer = httpx.post(f"{server}/api/workflows/runs", json={"input": input}, timeout=60)
        assert answer.status_code == 400
        assert "prompt" in json.dumps(answer.json())
