"""/v1, driven by the official client as it is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from model_compose.components.model_actions import Params
from model_compose.engines.stepping.sequence import Sequence
from model_compose.errors import InputError
from model_compose.generation import ResponseFormat, Sampling
from model_compose.servers.openai import ChatBody
from model_compose.servers.wire import parse_body
from tests import tiny
from tests.conftest import serving

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def client_of(url: str, key: str = "unused") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[OpenAI]:
    with client_of(server) as opened:
        yield opened


def complete(client: OpenAI, **options: Any) -> Any:
    body: Any = {"model": "default", "prompt": "Hello", "max_tokens": 10} | options
    return client.completions.create(**body)


def chat(client: OpenAI, **options: Any) -> Any:
    body: Any = {"model": "default", "messages": MESSAGES, "max_tokens": 10} | options
    return client.chat.completions.create(**body)


def text_of(client: OpenAI, **options: Any) -> str:
    text: str = complete(client, **options).choices[0].text
    return text


# Models.


def test_models_are_components_blends_and_single_adapters(client: OpenAI) -> None:
    models = {model.id: model.model_dump()["parent"] for model in client.models.list()}
    blends = ("default:strong", "default:plain", "default:alpaca", "default:pirate")
    assert models == {"default": None} | dict.fromkeys(blends, "default")
    for id, parent in models.items():
        model = client.models.retrieve(id)
        assert (model.id, model.object, model.model_dump()["parent"]) == (id, "model", parent)
    with pytest.raises(openai.NotFoundError, match="known: default, default:strong"):
        client.models.retrieve("default:nope")


def test_a_named_component_keeps_its_id(wide: str) -> None:
    with client_of(wide) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "tiny:alpaca", "tiny:pirate"]
        assert complete(client, model="tiny:pirate").model == "tiny:pirate"


# Both kinds of completions.


def test_a_completion_has_text_reason_and_usage(client: OpenAI) -> None:
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.model == "default"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.completion_tokens <= 15


def test_a_completion_is_the_workflows_text(client: OpenAI, server: str) -> None:
    run = httpx.post(f"{server}/api/workflows/runs", json={"input": {"prompt": "Hello"}}, timeout=60).json()
    # max_tokens is left out, so it is the action's
    assert complete(client, max_tokens=None).choices[0].text == run["output"]["generated"]


def test_a_chat_goes_through_the_template(client: OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    rendered = "<system>Be brief.</s><user>Hi</s><assistant>"
    assert answer.choices[0].message.content == text_of(client, prompt=rendered)
    developer = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert chat(client, messages=developer).choices[0].message.content == answer.choices[0].message.content
    parts = [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert chat(client, messages=parts).choices[0].message.content == answer.choices[0].message.content


def test_streamed_text_equals_collected_text(client: OpenAI) -> None:
    for n in (1, 2):
        options: Any = {"n": n, "temperature": 1.0, "seed": 3}
        whole, parts = complete(client, **options), list(complete(client, stream=True, **options))
        for choice in whole.choices:
            own = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
            assert "".join(part.text for part in own) == choice.text
            assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        whole, parts = chat(client, **options), list(chat(client, stream=True, **options))
        for choice in whole.choices:
            own = [part.choices[0] for part in parts if part.choices[0].index == choice.index]
            assert "".join(part.delta.content or "" for part in own) == choice.message.content
            assert [part.delta.role for part in own if part.delta.role] == ["assistant"]
        assert len({part.id for part in parts}) == 1
        assert {part.object for part in parts} == {"chat.completion.chunk"}


def test_usage_at_the_end_of_a_stream_comes_on_request_only(client: OpenAI) -> None:
    with_usage = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert with_usage[-1].choices == []
    assert with_usage[-1].usage == chat(client).usage
    assert all(part.usage is None for part in with_usage[:-1])
    assert all(part.usage is None and part.choices for part in chat(client, stream=True))


def test_n_gives_different_texts_and_one_seed_the_same_ones(client: OpenAI) -> None:
    first = [choice.text for choice in complete(client, n=2, temperature=1.5, top_p=1, seed=7).choices]
    again = [choice.text for choice in complete(client, n=2, temperature=1.5, top_p=1, seed=7).choices]
    other = [choice.text for choice in complete(client, n=2, temperature=1.5, top_p=1, seed=8).choices]
    assert first == again != other
    assert first[0] != first[1]


def test_temperature_0_is_greedy(client: OpenAI) -> None:
    assert text_of(client, temperature=0, seed=1) == text_of(client, temperature=0, seed=2)
    assert text_of(client, temperature=0) == text_of(client)  # the action says do_sample: false
    assert text_of(client, temperature=1.5, top_p=1, seed=1) != text_of(client)


def test_max_tokens_in_both_spellings(client: OpenAI) -> None:
    for options in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}):
        answer = chat(client, **options)
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"


def test_a_stop_string_that_spans_tokens_is_not_in_the_text(client: OpenAI) -> None:
    whole = text_of(client, max_tokens=30)
    stop = whole[2:4]
    expected = whole[: whole.index(stop)]
    answer = complete(client, max_tokens=30, stop=[stop, "never in there"])
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(part.choices[0].text for part in complete(client, max_tokens=30, stop=stop, stream=True)) == expected


def test_logprobs_in_both_forms(client: OpenAI) -> None:
    choice = complete(client, logprobs=2).choices[0]
    old = choice.logprobs
    new = chat(client, messages=MESSAGES, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(old.tokens) == len(old.token_logprobs) == len(old.top_logprobs) == len(old.text_offset) == 10
    for token, offset in zip(old.tokens, old.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[offset] == token
    assert all(value <= 0 for value in old.token_logprobs)
    assert all(old.token_logprobs[i] == max(top.values()) for i, top in enumerate(old.top_logprobs))  # greedy
    assert len(new) == 10
    for token in new:
        assert bytes(token.bytes).decode(errors="backslashreplace") == token.token
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
        assert len(token.top_logprobs) == 2
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert complete(client).choices[0].logprobs is None


def test_streamed_logprobs_equal_collected_ones(client: OpenAI) -> None:
    whole = complete(client, logprobs=1).choices[0].logprobs
    parts = [part.choices[0].logprobs for part in complete(client, logprobs=1, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in parts if part for value in getattr(part, name)] == getattr(whole, name)


# Sampling.


def parsed(**fields: Any) -> ChatBody:
    return parse_body(ChatBody, {"model": "default", "messages": MESSAGES, **fields})


def test_sampling_is_the_bodys_and_else_the_actions() -> None:
    action = Sampling(min_p=0.2, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias=((7, 1.0),))
    assert parsed().sampling(action) == action
    said = parsed(min_p=0, presence_penalty=-2, frequency_penalty=2, logit_bias={"50": -100, "6": 2.5})
    assert said.sampling(action) == Sampling(
        min_p=0.0, presence_penalty=-2.0, frequency_penalty=2.0, logit_bias=((6, 2.5), (50, -100.0))
    )
    assert parsed(logit_bias={}).sampling(action).logit_bias == ()
    nulls = parsed(min_p=None, presence_penalty=None, frequency_penalty=None, logit_bias=None, response_format=None)
    assert nulls.sampling(action) == action


def test_the_response_format_is_the_bodys_alone() -> None:
    def read(format: Any) -> ResponseFormat | None:
        return parsed(response_format=format).sampling(Sampling()).response_format

    assert read(None) is read({"type": "text"}) is None
    assert read({"type": "json_object"}) == ResponseFormat("json_object")
    assert read({"type": "regex", "regex": "a+"}) == ResponseFormat("regex", "a+")
    # The order of a schema's properties is the order in which they are written.
    schema = {"type": "object", "properties": {"ö": {"type": "null"}, "a": {"const": None}}}
    wrapped = {"name": "a", "description": "b", "strict": True, "schema": schema}
    text = '{"type":"object","properties":{"ö":{"type":"null"},"a":{"const":null}}}'
    assert read({"type": "json_schema", "json_schema": wrapped}) == ResponseFormat("json_schema", text)


@pytest.mark.parametrize(
    ("fields", "name", "reason"),
    [
        ({"min_p": -0.1}, "min_p", "greater than or equal to 0"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": -2.1}, "presence_penalty", "greater than or equal to -2"),
        ({"presence_penalty": "much"}, "presence_penalty", "number"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": [5]}, "logit_bias", "dictionary"),
        ({"logit_bias": {"hello": 1}}, "logit_bias.hello", "integer"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "greater than or equal to 0"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"5": None}}, "logit_bias.5", "number"),
        ({"logit_bias": {"5": 1, "7": 1, "05": -1}}, "logit_bias", "the token 5 is named twice: '5' and '05'"),
        ({"logit_bias": {"5": 1, " 5.0 ": -1}}, "logit_bias", "the token 5 is named twice"),
        ({"response_format": "json_object"}, "response_format", "dictionary"),
        ({"response_format": {"type": "xml"}}, "response_format", "'text', 'json_object', 'json_schema', 'regex'"),
        ({"response_format": {}}, "response_format", "'type'"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "unknown key 'schema'"),
        ({"response_format": {"type": "regex"}}, "response_format.regex", "required"),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex", "at least 1"),
        ({"response_format": {"type": "regex", "regex": "a" * 5000}}, "response_format.regex", "at most 4096"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}},
            "response_format.json_schema.shema",
            "did you mean 'schema'?",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
            "dictionary",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_is_allowed(fields: Any, name: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(**fields)
    assert name in [field.field for field in caught.value.fields]
    assert reason in str(caught.value)


def test_a_body_may_say_whatever_an_action_may() -> None:
    assert set(Params.model_fields) - {"do_sample"} <= set(ChatBody.model_fields)


# Blends.


def test_lora_in_both_forms_and_model_ids_mean_the_same_blends(client: OpenAI) -> None:
    def mixed(lora: Any) -> str:
        return text_of(client, extra_body={"lora": lora})

    strong = text_of(client, model="default:strong")
    assert strong == mixed({"alpaca": 2.0}) == mixed([{"name": "alpaca", "scale": 2}]) == mixed({"alpaca": "2"})
    single = text_of(client, model="default:alpaca")
    assert single == mixed({"alpaca": 1}) == mixed([{"name": "alpaca"}])
    base = text_of(client, model="default:plain")
    assert base == mixed([]) == mixed({})
    default = text_of(client)
    assert default == mixed({"alpaca": 0.7, "pirate": 0.8}) == mixed(None)
    assert len({strong, single, base, default}) == 4


def test_a_blend_in_the_model_id_and_lora_is_a_400(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="names a blend already") as caught:
        complete(client, model="default:strong", extra_body={"lora": {"alpaca": 1}})
    assert caught.value.param == "lora"


# Errors.


def test_an_unknown_model_is_a_404_that_lists_the_known_ones(client: OpenAI) -> None:
    for model in ("gpt-4", "default:nope", "default:default", "", ":", "default:alpaca:alpaca"):
        with pytest.raises(openai.NotFoundError) as caught:
            complete(client, model=model)
        assert "known: default, default:strong, default:plain, default:alpaca, default:pirate" in str(caught.value)
        assert caught.value.type == "not_found_error"
        assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "xml"}},
        {"logit_bias": {"5": 101}},
        {"presence_penalty": 2.5},
        {"frequency_penalty": "often"},
        {"extra_body": {"min_p": 1.5}},
        {"reasoning_effort": "low"},
        {"temperature": 3},
        {"temperature": "warm"},
        {"top_p": 0},
        {"n": 0},
        {"max_tokens": 0},
        {"stop": 5},
        {"top_logprobs": 21, "logprobs": True},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        {"extra_body": {"lora": {"nobody": 1}}},
        {"extra_body": {"lora": {"alpaca": "much"}}},
        {"extra_body": {"lora": [{"nme": "alpaca"}]}},
        {"extra_body": {"unheard_of": 1}},
    ],
)
def test_a_field_that_cannot_be_honoured_is_a_400_that_names_it(client: OpenAI, field: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **field)
    name = next(iter(field.get("extra_body", field)))
    assert (caught.value.param or "").split(".")[0] == name
    assert name in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code == "invalid_request"


def test_fields_that_only_make_sense_together(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="needs logprobs=true") as caught:
        chat(client, top_logprobs=2)
    assert caught.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="needs stream=true") as caught:
        chat(client, stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


def test_fields_without_effect_are_accepted(client: OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    answer = chat(
        client, user="me", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
        presence_penalty=0, frequency_penalty=0, logit_bias={}, response_format={"type": "text"}, tools=[],
        tool_choice="none", prompt_cache_key="k", safety_identifier="s", modalities=["text"],
    )  # fmt: skip
    assert answer.choices[0].message.content == plain


def test_what_the_engine_refuses_is_a_400_also_in_a_stream(client: OpenAI) -> None:
    for options in ({"stream": False}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match="context holds 256"):
            complete(client, prompt="x" * 300, **options)
        with pytest.raises(openai.BadRequestError, match="empty"):
            complete(client, prompt="", **options)
    with pytest.raises(openai.BadRequestError, match="one text"):
        complete(client, prompt=["a", "b"])
    assert complete(client, prompt=["Hello"]).choices[0].text == text_of(client)


def test_a_base_without_a_chat_template_points_to_completions(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", chat=False)
    path = tmp_path / "model-compose.yml"
    path.write_text(
        "component: {type: model, task: text-generation, model: ./base, precision: float32, action: {text: a}}"
    )
    with serving(path) as url, client_of(url) as client:
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            chat(client)
        assert complete(client).usage.completion_tokens > 0


def test_errors_outside_the_routes_have_openais_shape_too(server: str) -> None:
    for response in (
        httpx.get(f"{server}/v1/nowhere"),
        httpx.get(f"{server}/v1/completions"),
        httpx.post(f"{server}/v1/completions", content=b"{"),
        httpx.post(f"{server}/v1/completions", content=b"[]"),
        httpx.post(f"{server}/v1/completions", json={"prompt": "a"}),
        httpx.post(f"{server}/v1/completions", json={"model": "default", "prompt": "a" * (11 << 20)}),
    ):
        assert response.status_code in (400, 404, 405, 413)
        assert response.headers["content-type"] == "application/json"
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_an_error_in_mid_stream_reaches_the_client(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Sequence.take

    def fail_later(sequence: Sequence, *drawn: Any) -> None:
        if sequence.generated == 6:
            raise ZeroDivisionError("the secret is 42")
        take(sequence, *drawn)

    monkeypatch.setattr(Sequence, "take", fail_later)
    with serving(project) as url, client_of(url) as client:
        parts = complete(client, stream=True)
        assert next(parts).choices
        with pytest.raises(openai.APIError, match="failed while generating") as caught:
            list(parts)
        assert "42" not in str(caught.value)
        with pytest.raises(openai.InternalServerError):
            complete(client)


def test_an_empty_text_says_why(tmp_path: Path) -> None:
    path = tiny.save_project(tmp_path, tiny.YAML.replace("precision: float32", "precision: float32\n  id: tiny"))
    tiny.teach_to_say(tmp_path / "base", "ab")
    silence = {"logit_bias": {str(tiny.EOS): 100}, "max_tokens": 4, "model": "tiny", "lora": []}
    raw: dict[str, Any] = {"prompt": "ab", **silence}
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "ab"}], **silence}
    with serving(path) as url:
        for route, body, why in (
            ("completions", raw, "use /v1/chat/completions, or write the prompt in the template"),
            ("chat/completions", chat, "the text is empty: the model ended at once"),
        ):
            answer = httpx.post(f"{url}/v1/{route}", json=body).json()
            assert why in answer["notes"][0]
            events = httpx.post(f"{url}/v1/{route}", json={**body, "stream": True}).text.split("\n\n")
            chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
            assert chunks[-1]["notes"] == answer["notes"]
            assert not any("notes" in chunk for chunk in chunks[:-1])
            said = httpx.post(f"{url}/v1/{route}", json={**body, "logit_bias": {}}).json()
            assert "notes" not in said
