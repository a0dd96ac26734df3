"""What the page asks and shows, without a browser: widgets, blends, texts, and the calls for chains of models."""

import re
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from model_compose.compose import Compose
from model_compose.errors import InputError
from model_compose.expressions import Type
from model_compose.loading import load
from model_compose.lora.blend import Blend, Blends
from model_compose.lora.methods.ties import Ties
from model_compose.servers import webui_runs, webui_snippets
from model_compose.servers.tasks import usage_and_blend
from model_compose.servers.webui_form import Field, Form, _draw_mixer, draw_form
from model_compose.servers.webui_snippets import Call
from model_compose.workflow.variables import Variable, as_messages
from tests import tiny

CHAIN = """\
controller:
  adapter: {type: http-server, port: 0, base_path: /api}
workflow:
  jobs:
    - {id: draft, component: writer}
    - id: final
      component: editor
      depends_on: [draft]
      input: {draft: "${jobs.draft.output}", hints: "${input.how.hints as json}"}
  output: {draft: "${jobs.draft.output}", final: "${jobs.final.output}"}
components:
  - id: writer
    type: model
    task: text-generation
    model: ./base
    precision: float32
    peft_adapters: [{type: lora, name: alpaca, model: ./alpaca, weight: -0.5}]
    action:
      prompt: ${input.prompt as text}
      blend: ${input.blend}
      max_output_length: ${input.length as integer | 5}
      params: {temperature: "${input.heat as slider/0,2,0.1 | 0.5}", do_sample: "${input.draw as boolean | false}"}
  - id: editor
    type: model
    task: chat-completion
    model: ./base
    precision: float32
    peft_adapters: [{type: lora, name: pirate, model: ./pirate}]
    blends: {loud: {pirate: 2}}
    action:
      messages: [{role: system, content: "${input.hints}"}, {role: user, content: "${input.draft}"}]
      blend: loud
      max_output_length: 5
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_project(tmp_path_factory.mktemp("chain"), CHAIN)


@pytest.fixture
def chain(path: Path) -> Compose:
    """Two models in one workflow, not loaded."""
    return Compose(load([path], None))


@pytest.fixture
def form(chain: Compose) -> Form:
    with gr.Blocks(analytics_enabled=False):
        return draw_form(chain, chain.config.all_workflows[0])


def test_each_variable_has_its_widget_and_the_blends_have_sliders(form: Form) -> None:
    drawn = {field.variable.name: type(field.widget) for field in form.fields}
    assert drawn == {
        "prompt": gr.Textbox, "length": gr.Number, "heat": gr.Slider, "draw": gr.Checkbox, "how.hints": gr.Textbox,
    }  # fmt: skip
    assert [(mixer.component, mixer.adapters) for mixer in form.mixers] == [
        ("writer", ("alpaca",)),
        ("editor", ("pirate",)),
    ]


def test_input_nests_and_leaves_out_what_is_empty(form: Form) -> None:
    values = {"prompt": "Ahoy", "length": None, "heat": 0.5, "draw": False, "how.hints": '{"a": [1]}'}
    given = [values[field.variable.name] for field in form.fields]
    assert form.read_input(given) == {"prompt": "Ahoy", "heat": 0.5, "draw": False, "how": {"hints": {"a": [1]}}}


def test_untouched_sliders_leave_the_blend_to_the_file(form: Form) -> None:
    fields = [None] * len(form.fields)
    presets = [widget.value for mixer in form.mixers for widget in mixer.widgets]
    assert presets == [-0.5, "0", 2.0, "0"]  # 2 is what the editor's action says
    assert form.read_blend([*fields, *presets]) is None
    assert form.read_blend([*fields, -0.5, "0", 0.3, "custom"]) == {"editor": {"pirate": 0.3}}
    assert form.read_blend([*fields, 0, "custom", 1, "custom"]) == {"writer": {}, "editor": "pirate"}
    with pytest.raises(InputError, match="weight of alpaca is empty"):
        form.read_blend([*fields, None, "0", 2.0, "0"])


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a": 1, "a": 2}', "{"])
def test_json_that_cannot_be_read_is_left_to_the_workflow(value: str) -> None:
    assert Field(Variable(("x",), Type("json")), None).read(value) == value


def test_weights_mean_their_sum_and_the_picker_alone_means_a_method() -> None:
    ties = Ties(density=0.3)
    named = {"merged": Blend({"a": 1.0, "b": 0.5}, "merged", ties), "mix": Blend({"a": 2.0}, "mix")}
    with gr.Blocks(analytics_enabled=False):
        mixer = _draw_mixer("llm", Blends(("a", "b"), named, Blend({"a": 0.7}, "default")), None, titled=False)
    labels = [choice.label for choice in mixer.choices]
    assert labels == ["Default (YAML)", "merged (ties)", "mix", "a alone", "b alone", "Bare base"]
    assert mixer.read([1, 0.5, "1"]) == "merged"
    assert mixer.shown([1, 0.5, "1"]) == "a 1 · b 0.5 (ties)"
    assert mixer.read([1, 0.5, "custom"]) == {"a": 1.0, "b": 0.5}
    assert mixer.shown([1, 0.5, "custom"]) == "a 1 · b 0.5"
    assert mixer.read([1, 0.6, "1"]) == {"a": 1.0, "b": 0.6}
    assert mixer.read([2, 0, "1"]) == "mix"


async def test_two_models_are_labelled_and_called_by_component(chain: Compose) -> None:
    await chain.load()
    try:
        input = {"prompt": "Ahoy", "how": {"hints": '"be brief"'}}
        done = await chain.answer(input, blend={"writer": {"alpaca": 1.5}})
    finally:
        await chain.close()
    run = webui_runs.Run("", webui_runs.texts(done.output), "done", 1.0, done.answers)
    shown = webui_runs.current(run)
    assert "<h4>draft</h4>" in shown
    assert "<h4>final</h4>" in shown
    assert "writer — blend: <b>alpaca 1.5 (custom)</b>" in shown
    assert "editor — blend: <b>pirate 2 (loud)</b>" in shown
    call = Call(chain.config.all_workflows[0], input, done.answers)
    assert '"blend": {"writer": {"alpaca": 1.5}, "editor": "loud"}' in webui_snippets.curl(chain, "http://x", call)
    assert webui_snippets.openai(chain, "http://x", call) is None


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
    assert webui_runs.blend_shown(answer) == "alpaca 2 (merged, ties)"
    assert answer.identity != other.identity
    assert done.output != exact.output
    call = Call(compose.config.all_workflows[0], {"prompt": "Ahoy"}, done.answers)
    assert '"blend": "merged"' in webui_snippets.curl(compose, "http://x", call)
    shown = webui_snippets.openai(compose, "http://x", call)
    assert shown is not None
    assert 'model="default:merged"' in shown
    assert "lora" not in shown


def test_text_is_never_markup() -> None:
    run = webui_runs.Run("<i>asked</i>", {"": "<script>alert(1)</script>"}, "failed", 1.0, (), "<b>bad</b>")
    for shown in (webui_runs.current(run), webui_runs.earlier([run]), webui_runs.snippet("<i>", "<b>")):
        assert not re.search(r"<(script|b|i)>", shown)


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
    with gr.Blocks(analytics_enabled=False):
        form = draw_form(compose, compose.config.all_workflows[0])
    messages, format = form.fields
    assert (messages.variable.name, messages.variable.role, messages.widget.lines) == ("messages", "messages", 7)
    assert format.widget.placeholder == "JSON"  # no plain text would do there either
    given = form.read_input([typed, '{"type": "json_object"}'])
    assert given == {"format": {"type": "json_object"}} | ({} if sent is None else {"messages": sent})
    if sent is not None:
        compose.prepare(given)


def test_a_conversation_with_a_mistake_in_it_is_not_sent_as_a_message(project: Path) -> None:
    path = project.with_name("chat.yml")
    path.write_text(CHAT, encoding="utf-8")
    compose = Compose(load([path]))
    with pytest.raises(InputError, match=r"^input\.messages: expected a list of messages, such as \[\{"):
        compose.prepare({"messages": as_messages('[{"role": "user", "content": "Hi"}')})


def test_an_empty_text_is_told_once() -> None:
    """By the note, which says why; where there are several texts, each empty one is marked too."""
    note = "the text is empty: the model ended at once"
    alone = webui_runs.current(webui_runs.Run("", {"": ""}, "done", notes=[note]))
    assert "empty text" not in alone
    assert '<div class="mc-notice">The text is empty: the model ended at once.</div>' in alone
    assert "empty text" in webui_runs.current(webui_runs.Run("", {"": ""}, "done"))
    several = webui_runs.current(webui_runs.Run("", {"a": "", "b": "x"}, "done", notes=[note]))
    assert several.count("empty text") == 1


def test_one_message_is_shown_as_it_was_asked() -> None:
    turn = {"role": "user", "content": "Hi"}
    assert webui_runs.asked({"messages": [turn]}) == "Hi"
    assert webui_runs.asked({"messages": [turn, turn]}).startswith('[{"role": "user"')
