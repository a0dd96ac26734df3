"""Workflow runs through the Python API: graphs of jobs, deltas, blends, inputs, and ends."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest

from model_compose.components import ActionOptions, ComponentOptions, Delta, Result
from model_compose.components.model_actions import SamplingOverrides
from model_compose.compose import Compose
from model_compose.errors import (
    AdapterError,
    ComposeError,
    ConfigError,
    InputError,
    NotFound,
    NotReady,
    Overloaded,
    RunError,
    SourceError,
)
from model_compose.generation import Completion, Request, collect
from model_compose.loading import load
from model_compose.progress import Report
from model_compose.servers.answers import VariableInfo, shown
from model_compose.workflow import runner
from model_compose.workflow.jobs import WorkflowOptions
from model_compose.workflow.runner import Done, Graph, PreparedRun, Step
from tests import tiny
from tests.waiting import held, until

PROMPT = {"prompt": "Once upon a time"}
TOKENS = 40

TWO_MODELS = """\
workflows:
  - id: chain
    default: true
    jobs:
      - {id: first, component: a, output: {text: "${output}"}}
      - {id: second, component: b, depends_on: [first], input: {prompt: "${jobs.first.output.text}", blend: {}}}
    output: {draft: "${jobs.first.output.text}", final: "${jobs.second.output}", said: "${input.prompt} / ${context.who}"}
  - id: both
    jobs:
      - {id: left, component: a, output: {left: "${output}"}}
      - {id: right, component: b, output: {right: "${output}"}}
  - id: mapped
    jobs:
      - {id: left, component: a}
      - {id: right, component: b, output: {inner: ["${output}", "${output as text}"]}}
    output: {nested: {list: ["${jobs.left.output}", "${jobs.right.output.inner}"]}, copy: "${jobs.left.output}"}
  - id: renamed
    job: {component: a, input: {prompt: "${input.question}"}}
  - id: in_text
    job: {component: a, input: {prompt: "Q: ${input.question} A:", blend: "${input.mix}"}}
  - id: fixed
    job: {component: a, action: fixed}
  - id: several
    job: {component: a, action: several, output: {texts: "${output}"}}
  - id: failing
    jobs:
      - {id: bad, component: b, input: {prompt: x, blend: nope}}
      - {id: long, component: a, action: long}
  - id: long
    job: {component: a, action: long}
  - id: twice
    jobs:
      - {id: left, component: a, action: long, output: {left: "${output}"}}
      - {id: right, component: a, action: long, output: {right: "${output}"}}
components:
  - id: a
    type: model
    task: text-generation
    model: ./base
    precision: float32
    peft_adapters:
      - {type: lora, name: alpaca, model: ./alpaca, weight: 0.7}
      - {type: lora, name: pirate, model: ./pirate, weight: 0.8}
    blends: {strong: {alpaca: 2.0}, plain: {}}
    actions:
      - &action
        id: tell
        default: true
        prompt: ${input.prompt as text}
        blend: ${input.blend}
        max_output_length: 40
        min_output_length: 40
        params: {do_sample: false}
      - {<<: *action, id: fixed, default: false, blend: strong}
      - {id: several, prompt: "${input.prompts}", num_return_sequences: "${input.n as integer | 1}", batch_size: 2,
         max_output_length: 6, params: {seed: 1, temperature: 1.5}}
      - {id: long, prompt: x, max_output_length: 240, min_output_length: 240, params: {do_sample: false}}
  - id: b
    type: model
    task: text-generation
    model: ./base
    precision: float32
    peft_adapters:
      - {type: lora, name: pirate, model: ./pirate, weight: 1.0}
    action: {<<: *action, id: tell, default: true}
"""

Open = Callable[[str], AbstractAsyncContextManager[Compose]]


@pytest.fixture(scope="module")
def two_models(project: Path) -> Path:
    path = project.parent / "two-models.yml"
    path.write_text(TWO_MODELS, encoding="utf-8")
    return path


@pytest.fixture
async def both(two_models: Path) -> AsyncIterator[Compose]:
    async with Compose.open(two_models) as opened:
        yield opened


@pytest.fixture
def opening(project: Path) -> Open:
    """Opens the tiny project with its YAML changed."""

    @asynccontextmanager
    async def open_changed(yaml: str) -> AsyncIterator[Compose]:
        path = project.parent / "changed.yml"
        path.write_text(yaml, encoding="utf-8")
        async with Compose.open(path) as opened:
            yield opened

    return open_changed


async def streamed(compose: Compose, input: Any = PROMPT, **how: Any) -> tuple[list[Delta], Done]:
    """A run's deltas in order, and its end."""
    deltas: list[Delta] = []
    async with aclosing(compose.run(input, **how)) as events:
        async for event in events:
            if isinstance(event, Done):
                return deltas, event
            deltas.append(event)
    raise AssertionError("no Done")


def collected(deltas: list[Delta]) -> dict[Any, str]:
    texts: dict[Any, str] = {}
    for delta in deltas:
        texts[delta.path] = texts.get(delta.path, "") + delta.text
    return texts


def at(value: Any, path: Any) -> Any:
    for step in path:
        value = value[step]
    return value


# Graphs.


async def test_chained_job_takes_what_the_first_one_made(both: Compose) -> None:
    deltas, done = await streamed(both, context={"who": "me"})
    draft, final = done.output["draft"], done.output["final"]
    assert done.output["said"] == "Once upon a time / me"
    alone = (await both.answer(PROMPT, workflow="both")).output["left"]
    assert draft == alone
    again = await both.answer({"prompt": draft, "blend": {}}, workflow="both", blend={"b": {}})
    assert final == again.output["right"]
    first_of_second = next(i for i, delta in enumerate(deltas) if delta.path == ("final",))
    assert all(delta.path == ("final",) for delta in deltas[first_of_second:])  # strictly after the first job


async def test_independent_jobs_run_at_the_same_time(both: Compose) -> None:
    deltas, done = await streamed(both, {}, workflow="twice")
    sides = [delta.path[0] for delta in deltas]
    assert sides.index("left") < len(sides) - 1 - sides[::-1].index("right")  # each starts before the other ends
    assert sides.index("right") < len(sides) - 1 - sides[::-1].index("left")
    assert done.output["left"] == done.output["right"]


@pytest.mark.parametrize(
    ("workflow", "input"),
    [
        ("chain", PROMPT), ("both", PROMPT), ("mapped", PROMPT), ("renamed", {"question": "Why?"}),
        ("in_text", {"question": "Why?", "mix": None}), ("fixed", PROMPT),
        ("several", {"prompts": ["a", "b", "c"], "n": 2}),
    ],
)  # fmt: skip
async def test_deltas_collected_are_the_output_at_their_paths(both: Compose, workflow: str, input: Any) -> None:
    deltas, done = await streamed(both, input, workflow=workflow, context={"who": "me"})
    texts = collected(deltas)
    assert texts
    assert {path: at(done.output, path) for path in texts} == texts


async def test_output_of_a_workflow_is_mapped(both: Compose) -> None:
    deltas, done = await streamed(both, workflow="mapped")
    left, (right, same) = done.output["nested"]["list"]
    assert right == same
    assert done.output["copy"] == left
    assert set(collected(deltas)) == {
        ("nested", "list", 0), ("copy",), ("nested", "list", 1, 0), ("nested", "list", 1, 1),
    }  # fmt: skip


async def test_answers_name_the_models_their_blends_and_what_they_cost(both: Compose) -> None:
    done = await both.answer(PROMPT, workflow="both", blend={"a": "strong", "b": {"pirate": -0.5}})
    answers = {answer.component: answer for answer in done.answers}
    assert dict(answers["a"].blend.weights) == {"alpaca": 2.0}
    assert answers["a"].blend.name == "strong"
    assert dict(answers["b"].blend.weights) == {"pirate": -0.5}
    assert answers["a"].identity != answers["b"].identity
    assert answers["a"].usage.completion_tokens == TOKENS
    assert answers["a"].usage.prompt_tokens == len(PROMPT["prompt"])
    assert answers["a"].usage.seconds > 0


# Blends.


async def weights(compose: Compose, input: Any = PROMPT, **how: Any) -> dict[str, float]:
    (answer,) = (await compose.answer(input, **how)).answers
    return dict(answer.blend.weights)


async def test_blend_of_the_body_goes_before_the_action_before_the_default(both: Compose) -> None:
    default = {"alpaca": 0.7, "pirate": 0.8}
    renamed = {"workflow": "renamed"}
    question = {"question": "x"}
    assert await weights(both, question, **renamed) == default
    assert await weights(both, workflow="fixed") == {"alpaca": 2.0}
    assert await weights(both, workflow="fixed", blend={"pirate": 1}) == {"pirate": 1.0}
    mix = {"question": "x", "mix": "strong"}
    assert await weights(both, mix, workflow="in_text") == {"alpaca": 2.0}
    assert await weights(both, mix, workflow="in_text", blend={"a": "plain"}) == {}
    for unset in (None, ""):
        assert await weights(both, question, **renamed, blend=unset) == default
        assert await weights(both, {**mix, "mix": unset}, workflow="in_text") == default
        assert await weights(both, workflow="fixed", blend=unset) == {"alpaca": 2.0}
    assert await weights(both, question, **renamed, blend={"a": {}}) == {}
    assert await weights(both, question, **renamed, blend={"a": "pirate"}) == {"pirate": 1.0}


async def test_blends_change_the_text_and_an_empty_one_is_the_base(compose: Compose) -> None:
    texts = {}
    for blend in (None, {}, "plain", "strong", {"alpaca": 2}, {"alpaca": "2.0"}, {"alpaca": 0, "pirate": 0}, "alpaca"):
        texts[str(blend)] = (await compose.answer(PROMPT, blend=blend)).output["generated"]
    assert texts["{}"] == texts["plain"] == texts["{'alpaca': 0, 'pirate': 0}"]
    by_component = [(await compose.answer(PROMPT, blend={id: "strong"})).output for id in ("default", "__component__")]
    assert by_component == [{"generated": texts["strong"]}] * 2
    assert texts["strong"] == texts["{'alpaca': 2}"] == texts["{'alpaca': '2.0'}"]
    assert len({texts["None"], texts["{}"], texts["strong"], texts["alpaca"]}) == 4


BY_METHOD = (
    "a request can give weights, but no method (ties, dare_linear, dare_ties, magnitude_prune, svd); define the blend in "
    "the file under 'blends', and send its name"
)


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        ("strng", "blend: unknown blend 'strng'; did you mean 'strong'? known: default, strong, plain, alpaca, pirate"),
        ({"alpacca": 1}, "blend: unknown adapter 'alpacca'; did you mean 'alpaca'? known: alpaca, pirate"),
        ({"alpaca": True}, "blend.alpaca: a weight must be a finite number, not true"),
        ({"alpaca": None}, "blend.alpaca: a weight must be a finite number, not null"),
        ({"alpaca": float("nan")}, "blend.alpaca: a weight must be a finite number, not nan"),
        ({"alpaca": "inf"}, "blend.alpaca: a weight must be a finite number, not 'inf'"),
        ({"alpaca": "heavy"}, "blend: the weight of alpaca must be a number, not 'heavy'"),
        ({"alpaca": 1, "pirate": "x"}, "blend: the weight of pirate must be a number, not 'x'"),
        ({"alpaca": {}}, "blend: the weight of alpaca must be a number, not a mapping"),
        ({"method": "ties", "weights": {"alpaca": 1}}, f"blend: {BY_METHOD}"),
        ({"__component__": {"method": "ties", "density": 0.3}}, f"blend.__component__: {BY_METHOD}"),
        ({"other": {}}, "blend: there is no model component 'other'; known: default. Weights of adapters are "
         "numbers, blends of components are names or mappings"),
        ({"alpaca": 1, "default": "strong"}, "blend: there is no model component 'alpaca'; known: default. Weights of "
         "adapters are numbers, blends of components are names or mappings"),
        ({"default": "strong", "__component__": "plain"}, "blend: 'default' and '__component__' are the same model "
         "component; name it once"),
        ({"default": {"alpacca": 1}}, "blend.default: unknown adapter 'alpacca'; did you mean 'alpaca'? known: alpaca, "
         "pirate"),
        ({"__component__": {"alpacca": 1}}, "blend.__component__: unknown adapter 'alpacca'; did you mean 'alpaca'? known: "
         "alpaca, pirate"),
    ],
)  # fmt: skip
async def test_wrong_blend_names_the_field_and_the_known_names(compose: Compose, blend: Any, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        await compose.answer(PROMPT, blend=blend)
    assert str(caught.value) == expected
    assert all(field.field.startswith("blend") for field in caught.value.fields)
    assert caught.value.fields


async def test_wrong_blend_in_the_input_of_an_action(compose: Compose) -> None:
    with pytest.raises(InputError, match=r"unknown blend 'strng'; did you mean 'strong'\? known: "):
        await compose.answer({**PROMPT, "blend": "strng"})


# Inputs.


def names(compose: Compose, workflow: str) -> dict[str, bool]:
    return {variable.name: variable.required for variable in compose.inputs(workflow)}


async def test_inputs_are_read_off_the_expressions(both: Compose) -> None:
    assert names(both, "renamed") == {"question": True}
    assert names(both, "in_text") == {"question": True, "mix": False}
    assert names(both, "both") == {"prompt": True, "blend": False}
    assert names(both, "chain") == {"prompt": True, "blend": False}
    assert names(both, "several") == {"prompts": True, "n": False}
    assert names(both, "long") == {}
    blends = [variable for variable in both.inputs("both") if variable.role == "blend"]
    assert [variable.component for variable in blends] == ["a"]


@pytest.mark.parametrize(("workflow", "field"), [("both", "prompt"), ("renamed", "question"), ("several", "prompts")])
@pytest.mark.parametrize("input", [None, {}])
async def test_missing_input_names_the_field(both: Compose, workflow: str, field: str, input: Any) -> None:
    with pytest.raises(InputError, match=rf"^input\.{field} is required \((text|string)\)$") as caught:
        await both.answer(input, workflow=workflow)
    assert [problem.field for problem in caught.value.fields] == [f"input.{field}"]


@pytest.mark.parametrize(
    ("workflow", "input", "problems"),
    [
        ("both", {"promt": "x"}, {
            "input.prompt": "input.prompt is required (text)",
            "input.promt": "input.promt is not an input of this workflow; did you mean 'prompt'?",
        }),
        ("several", {"prompts": "x", "m": 2}, {
            "input.m": "input.m is not an input of this workflow; valid: prompts, n",
        }),
        ("renamed", {"question": "x", "blend": {"alpaca": 1}}, {
            "input.blend": "input.blend is not an input of this workflow; a run's blend stands beside its input",
        }),
        ("twice", {"prompt": "x"}, {
            "input.prompt": "input.prompt is not an input of this workflow; there are none",
        }),
        ("both", "x", {
            "input.prompt": "input.prompt is required (text)",
            "input": "input must be an object with prompt, blend, not 'x'",
        }),
        ("both", [1], {
            "input.prompt": "input.prompt is required (text)",
            "input": "input must be an object with prompt, blend, not a list",
        }),
    ],
)  # fmt: skip
async def test_input_that_nothing_reads_is_named(
    both: Compose, workflow: str, input: Any, problems: dict[str, str]
) -> None:
    """It would be ignored otherwise, and a misspelt name would silently be its default."""
    with pytest.raises(InputError) as caught:
        await both.answer(input, workflow=workflow)
    assert {problem.field: problem.message for problem in caught.value.fields} == problems
    assert str(caught.value) == "; ".join(problems.values())


async def test_of_many_keys_that_nothing_reads_some_are_told(both: Compose) -> None:
    with pytest.raises(InputError) as caught:
        await both.answer({"prompt": "x", **{f"promp{number}": 1 for number in range(1_000)}}, workflow="both")
    assert len(caught.value.fields) == 64


async def test_what_an_actions_output_reads_is_an_input(opening: Open) -> None:
    text = "text: ${input.prompt as text}"
    assert text in tiny.YAML
    changed = tiny.YAML.replace(text, f'{text}\n    output: "${{result}} in ${{input.language | German}}"')
    async with opening(changed) as compose:
        done = await compose.answer({"prompt": "Hello", "language": "French"})
        assert done.output["generated"].endswith(" in French")
        assert "language" in [variable.name for variable in compose.inputs(compose.config.all_workflows[0].id)]


READING = """\
workflows:
  - {id: nested, job: {output: {text: "${output}", hints: "${input.how.hints}", turn: "${input.turns[0].text}"}}}
  - {id: open, job: {output: {text: "${output}", asked: "${input}"}}}
  - {id: below, job: {output: {text: "${output}", all: "${input.how}", one: "${input.how.hints}"}}}
  - {id: in_output, job: {id: only}, output: {text: "${jobs.only.output}", number: "${input.number}"}}
  - {id: instead, job: {input: {prompt: "${input.question | ${input.other}}"}}}
component:
  type: model
  task: text-generation
  model: ./base
  action: {prompt: "${input.prompt | ${input.spare}}", max_output_length: 1}
"""


@pytest.mark.parametrize(
    ("workflow", "input", "stray"),
    [
        ("nested", {"prompt": "x", "spare": "y", "how": {"hints": 1}, "turns": [{"text": 1, "more": 2}]}, None),
        ("nested", {"prompt": "x", "how": {"hint": 1}}, "input.how.hint"),
        ("nested", {"prompt": "x", "how": 5}, "input.how"),
        ("open", {"prompt": "x", "anything": 1}, None),
        ("below", {"prompt": "x", "how": {"anything": 1}}, None),
        ("in_output", {"prompt": "x", "number": 7}, None),
        ("instead", {"other": "x"}, None),
        ("instead", {"prompt": "x"}, "input.prompt"),
    ],
)
def test_whatever_an_expression_reads_is_an_input(project: Path, workflow: str, input: Any, stray: str | None) -> None:
    path = project.with_name("reading.yml")
    path.write_text(READING, encoding="utf-8")
    compose = Compose(load([path]))
    if stray is None:
        compose.prepare(input, workflow=workflow)
    else:
        with pytest.raises(InputError) as caught:
            compose.prepare(input, workflow=workflow)
        assert stray in [problem.field for problem in caught.value.fields]
    for variable in compose.inputs(workflow):
        json.dumps(shown(VariableInfo.of(variable)))  # as the API's schema gives it


async def test_input_that_cannot_be_converted_names_field_and_value(both: Compose) -> None:
    with pytest.raises(InputError, match=r"^input\.n: 'many' is not an integer"):
        await both.answer({"prompts": "a", "n": "many"}, workflow="several")
    with pytest.raises(InputError, match="num_return_sequences"):
        await both.answer({"prompts": "a", "n": 0}, workflow="several")


@pytest.mark.parametrize(
    ("prompts", "n", "count"),
    [("one", 1, None), ("one", 3, 3), (["a", "b", "c"], 1, 3), (["a", "b"], 2, 4), (["a"], 1, 1)],
)
async def test_several_texts_are_a_list(both: Compose, prompts: Any, n: int, count: int | None) -> None:
    done = await both.answer({"prompts": prompts, "n": n}, workflow="several")
    texts = done.output["texts"]
    assert isinstance(texts, str) if count is None else len(texts) == count
    (answer,) = done.answers
    assert answer.usage.completion_tokens <= 6 * (count or 1)


async def test_unknown_workflow_lists_the_known_ones(compose: Compose) -> None:
    with pytest.raises(NotFound, match=r"^there is no workflow 'nope'; known: __workflow__$"):
        await compose.answer(PROMPT, workflow="nope")


# Ends.


async def test_closing_the_iterator_stops_the_computation(both: Compose) -> None:
    engine: Any = both.models["a"].engine
    async with aclosing(both.run({}, workflow="long")) as events:
        async for _ in events:
            break
        assert both.busy == 1
    assert both.busy == 0
    await until(lambda: not engine._loop.running)
    assert len((await both.answer(PROMPT, workflow="both")).output["left"]) > 0  # the engine goes on


async def test_cancelled_run_stops_the_computation(both: Compose) -> None:
    engine: Any = both.models["a"].engine
    task = asyncio.create_task(both.answer({}, workflow="long"))
    await until(lambda: bool(engine._loop.running))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert both.busy == 0
    await until(lambda: not engine._loop.running)


async def test_error_of_one_job_ends_the_others_at_once(both: Compose) -> None:
    engine: Any = both.models["a"].engine
    with pytest.raises(InputError, match=r"^blend: unknown blend 'nope'; known: default, pirate$"):
        await both.answer({}, workflow="failing")
    assert both.busy == 0
    await until(lambda: not engine._loop.running)


async def test_max_concurrent_count_of_a_component_lets_one_run_at_a_time(opening: Open) -> None:
    async with opening(tiny.YAML.replace("  action:", "  max_concurrent_count: 1\n  action:")) as compose:
        engine: Any = compose.models["__component__"].engine
        with held(engine) as thread:
            runs = [asyncio.create_task(compose.answer(PROMPT)) for _ in range(3)]
            await until(lambda: engine._loop.load)
            most = 0
            while not all(run.done() for run in runs):
                most = max(most, engine._loop.load)
                thread.step()
                await asyncio.sleep(0.001)
        assert most == 1
        assert len({run.result().output["generated"] for run in runs}) == 1


async def test_run_before_loading_and_after_closing_is_not_ready(two_models: Path) -> None:
    async with Compose.open(two_models) as compose:
        assert compose.ready
    with pytest.raises(NotReady, match="the models are still loading, or the service is shutting down"):
        await compose.answer(PROMPT)


async def test_conversion_that_fails_in_a_job_fails_the_run(opening: Open) -> None:
    yaml = tiny.YAML.replace('"${output}"', '"${output as integer}"')
    async with opening(yaml) as compose:
        with pytest.raises(RunError, match=r"\$\{output as integer\}: .* is not an integer"):
            await compose.answer(PROMPT)
        assert compose.busy == 0


# Room.


async def test_an_accepted_run_is_not_refused_later_and_others_are_at_once(both: Compose) -> None:
    room = both.models["a"].engine.room
    room.rows, room.queue = 1, 0
    accepted = asyncio.create_task(both.answer({}, workflow="twice"))  # two texts
    await until(lambda: room.texts == 2)
    with pytest.raises(Overloaded):
        await both.answer({}, workflow="long")
    output = (await accepted).output
    assert output["left"] == output["right"]
    assert (room.texts, room.promised) == (0, 0)


async def test_a_run_that_finds_one_of_its_models_full_takes_no_place_with_the_others(both: Compose) -> None:
    rooms = {id: model.engine.room for id, model in both.models.items()}
    place = rooms["b"].take()
    rooms["b"].rows, rooms["b"].queue = 1, 0
    with pytest.raises(Overloaded):
        await both.answer(PROMPT, workflow="both")
    assert (rooms["a"].texts, rooms["b"].texts) == (0, 1)
    place.give_back()
    assert await both.answer(PROMPT, workflow="both")
    assert (rooms["a"].texts, rooms["b"].texts) == (0, 0)


async def test_who_waits_for_a_component_that_runs_few_at_once_has_a_place(opening: Open) -> None:
    limits = "  max_concurrent_count: 1\n  options: {max_batch_size: 2, max_queue: 1}\n"
    yaml = tiny.YAML.replace("  action:", f"{limits}  action:")
    async with opening(yaml) as compose:
        model = compose.models["__component__"]
        request = Request("Hello", model.blends.default, model.sampling())

        async def complete() -> Completion:
            return await collect(compose.generate("__component__", request))

        calls = [compose.answer(PROMPT), compose.answer(PROMPT), complete(), compose.answer(PROMPT), complete()]
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [isinstance(result, Overloaded) for result in results]
        assert refused == [False, False, False, True, True]
        assert not [result for result in results[:3] if isinstance(result, Exception)]
        assert (model.engine.room.texts, model.engine.room.promised) == (0, 0)


async def test_a_run_of_many_prompts_has_few_texts_at_once(both: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    room = both.models["a"].engine.room
    room.rows, room.queue = 1, 0
    most = 0
    running = asyncio.create_task(both.answer({"prompts": ["a"] * 6, "n": 2}, workflow="several"))
    monkeypatch.setattr("model_compose.components.model.MOST_TEXTS", 2)  # for a batch_size of 2
    while not running.done():
        most = max(most, room.texts)
        await asyncio.sleep(0)
    assert most == 2
    assert len(running.result().output["texts"]) == 12


# What cannot be loaded.


async def refused(opening: Open, old: str, new: str) -> ComposeError:
    assert old in tiny.YAML
    with pytest.raises(ComposeError) as caught:
        async with opening(tiny.YAML.replace(old, new)):
            pass
    return caught.value


async def test_adapter_path_that_does_not_exist(opening: Open, project: Path) -> None:
    error = await refused(opening, "model: ./alpaca", "model: ./alpacca")
    assert isinstance(error, SourceError)
    assert f"There is no file or folder {project.parent / 'alpacca'} ('./alpacca' counted from" in str(error)


async def test_base_path_that_does_not_exist(opening: Open, project: Path) -> None:
    error = await refused(opening, "model: ./base", "model: ./bass")
    assert isinstance(error, SourceError)
    assert f"There is no file or folder {project.parent / 'bass'}" in str(error)


async def test_adapter_of_the_wrong_shape_names_module_and_shapes(opening: Open, project: Path) -> None:
    folder = project.parent
    if not (folder / "wide").exists():
        wide = tiny.save_base(folder / "wide-base", tiny.llama_config(hidden_size=64, intermediate_size=96))
        tiny.save_adapter(folder / "wide", wide)
    error = await refused(opening, "model: ./alpaca", "model: ./wide")
    assert isinstance(error, AdapterError)
    assert "alpaca" in str(error)
    assert "q_proj" in str(error)
    assert "64" in str(error)
    assert "32" in str(error)


async def test_unknown_file_says_so() -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        async with Compose.open("/nope/model-compose.yml"):
            pass


MODELS_APART = """\
workflows:
  - {id: one, job: {component: a, input: {prompt: "${input.prompt}"}}, default: true}
  - id: both
    jobs:
      - {id: x, component: a, output: {x: "${output}"}}
      - {id: y, component: b, output: {y: "${output}"}}
components:
  - id: a
    type: model
    task: text-generation
    model: ./base
    peft_adapters: [{type: lora, name: alpaca, model: ./alpaca}]
    blends: {plain: {}}
    action: {prompt: "${input.prompt}", max_output_length: 2}
  - id: b
    type: model
    task: text-generation
    model: ./base
    peft_adapters: [{type: lora, name: pirate, model: ./pirate}]
    action: {prompt: "${input.prompt}", max_output_length: 2}
"""


async def test_a_bare_blend_goes_to_the_models_that_know_its_names(project: Path) -> None:
    path = project.parent / "two-models-at-once.yml"
    path.write_text(MODELS_APART)
    async with Compose.open(path) as compose:
        one = await compose.answer({"prompt": "Hi"}, workflow="one", blend="plain")
        assert [answer.blend.weights for answer in one.answers] == [{}]
        both = await compose.answer({"prompt": "Hi"}, workflow="both", blend={"pirate": 0.5})
        used = {answer.component: answer.blend.weights for answer in both.answers}
        assert used == {"a": {"alpaca": 1.0}, "b": {"pirate": 0.5}}
        with pytest.raises(InputError, match="unknown blend 'plan'; did you mean 'plain'"):
            await compose.answer({"prompt": "Hi"}, workflow="one", blend="plan")


def test_a_constant_blend_of_an_action_is_checked_at_load(project: Path) -> None:
    path = project.parent / "constant.yml"
    path.write_text(project.read_text().replace("blend: ${input.blend}", "blend: {alpacca: 1}"))
    with pytest.raises(ConfigError, match=r"constant\.yml:\d+: .*unknown adapter 'alpacca'; did you mean 'alpaca'"):
        load([path])


async def test_an_empty_list_of_prompts_is_refused(project: Path) -> None:
    path = project.parent / "list.yml"
    yaml = project.read_text().replace("${input.prompt as text}", "${input.prompt}")  # noqa: ASYNC240  # nothing else runs
    path.write_text(yaml)
    async with Compose.open(path) as compose:
        with pytest.raises(InputError, match="at least 1 item"):
            await compose.answer({"prompt": []})
        assert len((await compose.answer({"prompt": ["a", "b"]})).output["generated"]) == 2


class Silent:
    """A component that yields nothing."""

    Options: ClassVar[Any] = ComponentOptions

    def __init__(self, options: Any, base_dir: Path) -> None: ...

    async def open(self, report: Report) -> None: ...

    async def close(self) -> None: ...

    async def run(
        self, action: ActionOptions, context: Mapping[str, Any], **caller: Any
    ) -> AsyncGenerator[Delta | Result]:
        return
        yield


async def test_a_component_that_ends_without_a_result_fails_the_run() -> None:
    workflow = WorkflowOptions()
    step = Step(workflow.all_jobs[0], "silent", Silent(None, Path()), ActionOptions(), nullcontext())
    prepared = PreparedRun(Graph(workflow, (step,), (), hands_out_all=True), {})
    with pytest.raises(RunError, match="job '__job__': the component ended without a result"):
        async for _ in runner.run(prepared, nullcontext({})):
            pass


def test_default_names_the_adapters_own_weights_alone(project: Path) -> None:
    path = project.parent / "named-default.yml"
    path.write_text(project.read_text().replace("  plain: {}", "  default: {}"))
    with pytest.raises(ConfigError, match="the name 'default' is reserved for the blend of the adapters' own weights"):
        load([path])


async def test_a_run_may_override_the_sampling_of_its_action(compose: Compose) -> None:
    whole = await compose.answer(PROMPT)
    cut = await compose.answer(PROMPT, sampling={"max_output_length": 3})
    assert cut.answers[0].usage.completion_tokens == 3
    assert whole.output["generated"].startswith(cut.output["generated"])
    warm = {"temperature": 1.5, "seed": 3}  # the action says do_sample: false
    drawn = [(await compose.answer(PROMPT, sampling=warm)).output for _ in range(2)]
    assert drawn[0] == drawn[1] != whole.output
    assert (await compose.answer(PROMPT, sampling={"temperature": None})).output == whole.output
    assert (await compose.answer(PROMPT, sampling=SamplingOverrides(temperature=0))).output == whole.output


@pytest.mark.parametrize(
    ("sampling", "field", "message"),
    [
        ({"temprature": 1}, "sampling.temprature", "did you mean 'temperature'"),
        ({"temperature": -1}, "sampling.temperature", "greater than or equal to 0"),
        ({"seed": 1.5}, "sampling.seed", "integer"),
        ({"max_output_length": 0}, "sampling.max_output_length", "greater than or equal to 1"),
        ({"do_sample": True}, "sampling.do_sample", "unknown key"),
    ],
)
def test_overrides_that_no_action_could_take_are_refused(
    project: Path, sampling: Any, field: str, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Compose(load([project])).prepare(PROMPT, sampling=sampling)
    assert [problem.field for problem in caught.value.fields] == [field]
