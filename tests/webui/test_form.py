"""What the page asks and is told, without a browser: fields, models, blends, and the calls for chains of models."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.components.model_actions import SamplingOverrides
from model_compose.compose import Compose
from model_compose.errors import InputError
from model_compose.expressions import Type
from model_compose.loading import load
from model_compose.lora.blend import Blend, Blends
from model_compose.lora.methods.ties import Ties
from model_compose.servers.tasks import usage_and_blend
from model_compose.servers.webui import create_page, form, snippets
from model_compose.servers.webui.snippets import Call
from model_compose.workflow.variables import Variable, as_messages
from tests import tiny
from tests.webui.conftest import CHAIN


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_project(tmp_path_factory.mktemp("chain"), CHAIN)


@pytest.fixture
def chain(path: Path) -> Compose:
    """Two models in one workflow, not loaded."""
    return Compose(load([path], None))


def described(compose: Compose) -> dict[str, Any]:
    """The first workflow, as the page gets it."""
    return form.describe_workflow(compose, compose.config.all_workflows[0])


def test_each_variable_has_its_widget_and_each_model_its_blends(chain: Compose) -> None:
    shown = described(chain)
    assert shown["name"] == "model-compose"  # the page's title, as the file names neither the workflow nor itself
    assert {field["name"]: field["kind"] for field in shown["fields"]} == {
        "prompt": "text", "length": "integer", "heat": "slider", "draw": "boolean", "how.hints": "json",
    }  # fmt: skip
    heat = next(field for field in shown["fields"] if field["name"] == "heat")
    assert [heat[key] for key in ("minimum", "maximum", "step", "default")] == [0, 2, 0.1, 0.5]
    writer, editor = shown["models"]
    assert writer["base"] == {"source": "./base", "driver": "huggingface", "precision": "float32"}
    assert writer["adapters"] == [{"name": "alpaca", "source": "./alpaca", "weight": -0.5, "ranks": [4]}]
    assert writer["choices"][0] == {
        "label": "Default · alpaca -0.5", "value": None, "weights": [-0.5], "method": None,
    }  # fmt: skip
    assert editor["choices"][0]["weights"] == [2]  # what the editor's action says
    assert (shown["by_component"], shown["markdown"]) == (True, True)


def test_sampling_that_the_input_decides_has_no_second_box(chain: Compose, project: Path) -> None:
    assert described(chain)["sampling"] == {"seed": ""}
    tiny_one = described(Compose(load([project])))
    assert tiny_one["sampling"] == {"temperature": 0, "max_output_length": 12, "seed": None}


def test_an_adapter_that_cannot_be_read_still_has_a_slider(path: Path, tmp_path: Path) -> None:
    (tmp_path / "model-compose.yml").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    writer, _ = described(Compose(load([tmp_path / "model-compose.yml"])))["models"]
    assert writer["adapters"] == [{"name": "alpaca", "source": "./alpaca", "weight": -0.5, "ranks": []}]


def test_input_nests_and_leaves_out_what_is_empty(chain: Compose) -> None:
    fields = form.asked(chain.inputs(chain.config.all_workflows[0].id))
    typed = {"prompt": "Ahoy", "length": "", "heat": "0.5", "draw": False, "how.hints": '{"a": [1]}'}
    given = form.read_input(fields, typed)
    assert given == {"prompt": "Ahoy", "heat": "0.5", "draw": False, "how": {"hints": {"a": [1]}}}
    chain.prepare(given)


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a": 1, "a": 2}', "{"])
def test_json_that_cannot_be_read_is_left_to_the_workflow(value: str) -> None:
    assert form.read_input([Variable(("x",), Type("json"))], {"x": value}) == {"x": value}


def test_the_picker_has_each_function_once_and_names_its_method() -> None:
    ties = Ties(density=0.3)
    named = {
        "merged": Blend({"a": 1.0, "b": 0.5}, "merged", ties),
        "mix": Blend({"a": 2.0}, "mix"),
        "b1": Blend({"b": 1}),
    }
    choices = form._choices(Blends(("a", "b"), named, Blend({"a": 0.7, "b": 0}, "default")), None)
    assert [(choice["label"], choice["value"], choice["weights"], choice["method"]) for choice in choices] == [
        ("Default · a 0.7", {"a": 0.7, "b": 0}, [0.7, 0], None),
        ("merged (ties) · a 1 · b 0.5", "merged", [1, 0.5], "ties"),
        ("mix · a 2", "mix", [2, 0], None),
        ("b1 · b 1", "b1", [0, 1], None),  # so "b alone" is not there again
        ("a alone", "a", [1, 0], None),
        ("Bare base", {}, [0, 0], None),
    ]


async def test_two_models_are_labelled_and_called_by_component(chain: Compose) -> None:
    await chain.load()
    try:
        input = {"prompt": "Ahoy", "how": {"hints": '"be brief"'}}
        done = await chain.answer(input, blend={"writer": {"alpaca": 1.5}})
    finally:
        await chain.close()
    call = Call(chain.config.all_workflows[0], input, done.answers, SamplingOverrides(temperature=0, seed=3))
    assert '"blend": {"writer": {"alpaca": 1.5}, "editor": "loud"}' in snippets.curl(chain, "http://x", call)
    assert '"sampling": {"temperature": 0.0, "seed": 3}' in snippets.curl(chain, "http://x", call)
    assert snippets.openai(chain, "http://x", call) is None
    assert snippets.named_blend(chain, done.answers) is None


async def test_answers_and_calls_tell_the_method(project: Path, tmp_path: Path) -> None:
    """`lora` of the same weights would be their sum: the call names the blend instead."""
    for name in ("base", "alpaca", "pirate"):
        (tmp_path / name).symlink_to(project.parent / name)
    merged = "merged: {method: ties, density: 0.4, weights: {alpaca: 2.0}}"
    (tmp_path / "model-compose.yml").write_text(tiny.YAML.replace("plain: {}", merged))
    async with Compose.open(tmp_path / "model-compose.yml") as compose:
        done = await compose.answer({"prompt": "Ahoy"}, blend="merged")
        exact = await compose.answer({"prompt": "Ahoy"}, blend="strong")
    (answer,), (other,) = done.answers, exact.answers
    assert usage_and_blend(answer)["blend"] == {
        "name": "merged", "weights": {"alpaca": 2.0}, "method": "ties", "approximate": True,
        "options": {"density": 0.4, "majority_sign_method": "total"}, "identity": answer.identity,
    }  # fmt: skip
    assert usage_and_blend(other)["blend"].keys() == {"name", "weights", "identity"}
    assert answer.identity != other.identity
    assert done.output != exact.output
    call = Call(compose.config.all_workflows[0], {"prompt": "Ahoy"}, done.answers)
    assert '"blend": "merged"' in snippets.curl(compose, "http://x", call)
    shown = snippets.openai(compose, "http://x", call)
    assert shown is not None
    assert 'model="default:merged"' in shown
    assert "lora" not in shown


CHAT = tiny.YAML.replace("task: text-generation", "task: chat-completion").replace(
    "text: ${input.prompt as text}", "messages: ${input.messages}\n    response_format: ${input.format}"
)


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("What is a haiku?", [{"role": "user", "content": "What is a haiku?"}]),
        ("[Act 1] Go on.", [{"role": "user", "content": "[Act 1] Go on."}]),
        ("42", [{"role": "user", "content": "42"}]),
        ('[{"role": "system", "content": "Be brief."}]', [{"role": "system", "content": "Be brief."}]),
        ('{"role": "user", "content": "Hi"}', {"role": "user", "content": "Hi"}),
        (' \n', None),
    ],
)  # fmt: skip
def test_a_message_is_typed_as_it_is_and_a_conversation_as_json(project: Path, typed: str, sent: Any) -> None:
    path = project.with_name("chat.yml")
    path.write_text(CHAT, encoding="utf-8")
    compose = Compose(load([path]))
    fields = form.asked(compose.inputs(compose.config.all_workflows[0].id))
    kinds = {field["name"]: field["kind"] for field in described(compose)["fields"]}
    assert kinds == {"messages": "messages", "format": "json"}
    given = form.read_input(fields, {"messages": typed, "format": '{"type": "json_object"}'})
    assert given == {"format": {"type": "json_object"}} | ({} if sent is None else {"messages": sent})
    if sent is not None:
        compose.prepare(given)


async def test_what_the_page_is_told_of_a_file(project: Path) -> None:
    compose = Compose(load([project]))
    transport = httpx.ASGITransport(create_page(compose, "http://127.0.0.1:8080"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8081") as client:
        told = (await client.get("/page.json")).json()
        state = (await client.get("/state")).json()
    assert told["api"] == "http://127.0.0.1:8080"
    assert told["workflows"] == [described(compose)]
    assert state == {"status": "loading", "progress": {"what": "starting", "done": 0, "total": None, "unit": "B"}}


def test_a_conversation_with_a_mistake_in_it_is_not_sent_as_a_message(project: Path) -> None:
    path = project.with_name("chat.yml")
    path.write_text(CHAT, encoding="utf-8")
    compose = Compose(load([path]))
    with pytest.raises(InputError, match=r"^input\.messages: expected a list of messages, such as \[\{"):
        compose.prepare({"messages": as_messages('[{"role": "user", "content": "Hi"}')})
