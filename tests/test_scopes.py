"""Expressions that lead nowhere are errors at load, with the place, the name and the nearest valid one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model_compose.errors import ConfigError
from model_compose.loading import load

TWO_JOBS = """\
component:
  type: model
  task: text-generation
  model: ./base
  action: {text: "${input.prompt as text}", params: {seed: "${input.seed as integer}"}}
workflow:
  jobs:
    - {id: draft, input: {prompt: "${input.question}"}, output: {text: "${output}"}}
    - {id: final, depends_on: [draft], input: {prompt: "Mend: ${jobs.draft.output.text}"}}
  output: {answer: "${jobs.final.output}", by: "${context.metadata.user}"}
"""

Problems = Callable[[str, str], list[str]]


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Problems:
    """What is wrong with the file of two jobs once something in it is replaced."""
    monkeypatch.chdir(tmp_path)

    def changed(old: str, new: str) -> list[str]:
        text = TWO_JOBS.replace(old, new)
        assert text != TWO_JOBS or old == new
        path = tmp_path / "model-compose.yml"
        path.write_text(text, encoding="utf-8")
        try:
            load([path], {"NAME": "x"})
        except ConfigError as error:
            return list(error.problems)
        return []

    return changed


def test_the_file_of_two_jobs_is_valid(problems: Problems) -> None:
    assert problems("", "") == []


NOWHERE = [
    ("input.prompt as text", "inputs.prompt as text",
     "5: component.action.text: ${inputs.prompt as text}: there is no 'inputs' here; did you mean 'input'?"),
    ("${input.prompt as text}", "${jobs.draft.output}",
     "5: component.action.text: ${jobs.draft.output}: there is no 'jobs' here; valid: input, context"),
    ("${input.seed as integer}", "${input.seed as integer | ${contxt.seed}}",
     "5: component.action.params.seed: ${contxt.seed}: there is no 'contxt' here; did you mean 'context'?"),
    ("prompt: \"${input.question}\"", "prompt: \"${inptu.question}\"",
     "8: workflow.jobs.0.input.prompt: ${inptu.question}: there is no 'inptu' here; did you mean 'input'?"),
    ("text: \"${output}\"", "text: \"${result}\"",
     "8: workflow.jobs.0.output.text: ${result}: there is no 'result' here; valid: input, context, jobs, output"),
    ("text: \"${output}\"", "text: \"${output.generated}\"",
     "8: workflow.jobs.0.output.text: ${output.generated}: 'output' is text and has no 'generated'"),
    ("${jobs.draft.output.text}", "${job.draft.output.text}",
     "9: workflow.jobs.1.input.prompt: ${job.draft.output.text}: there is no 'job' here; did you mean 'jobs'?"),
    ("${jobs.draft.output.text}", "${jobs.drft.output.text}",
     "9: workflow.jobs.1.input.prompt: ${jobs.drft.output.text}: 'jobs' has no 'drft'; did you mean 'draft'?"),
    ("${jobs.draft.output.text}", "${jobs.draft.text}",
     "9: workflow.jobs.1.input.prompt: ${jobs.draft.text}: 'jobs.draft' has no 'text'; valid: output"),
    ("${jobs.draft.output.text}", "${jobs.draft.output.txt}",
     "9: workflow.jobs.1.input.prompt: ${jobs.draft.output.txt}: 'jobs.draft.output' has no 'txt'; did you "
     "mean 'text'?"),
    ("${jobs.draft.output.text}", "${jobs.draft.output.text.line}",
     "9: workflow.jobs.1.input.prompt: ${jobs.draft.output.text.line}: 'jobs.draft.output.text' is text and "
     "has no 'line'"),
    ("${jobs.draft.output.text}", "${jobs.final.output}",
     "9: workflow.jobs.1.input.prompt: ${jobs.final.output}: a job cannot read its own output here; in its "
     "output it is ${output}"),
    ("depends_on: [draft], ", "",
     "9: workflow.jobs.1.input.prompt: ${jobs.draft.output.text}: the job 'draft' may not have ended when "
     "'final' starts; name it in depends_on"),
    ("${jobs.final.output}", "${output}",
     "10: workflow.output.answer: ${output}: there is no 'output' here; valid: input, context, jobs"),
    ("{prompt: \"${input.question}\"}", "{promt: \"${input.question}\"}",
     "5: component.action.text: ${input.prompt as text}: the job 'draft' runs this action and its input has "
     "no 'prompt'; did you mean 'promt'?"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), NOWHERE, ids=[new for _, new, _ in NOWHERE])
def test_a_name_that_leads_nowhere(problems: Problems, old: str, new: str, expected: str) -> None:
    assert problems(old, new) == [f"model-compose.yml:{expected}"]


def test_the_output_of_an_action(problems: Problems) -> None:
    action = '{text: "${input.prompt}", output: {said: "${result}"}}'
    whole = '{text: "${input.prompt as text}", params: {seed: "${input.seed as integer}"}}'
    assert problems(whole, action) == []
    (problem,) = problems(whole, action.replace("${result}", "${response.text}"))
    assert (
        "component.action.output.said: ${response.text}: there is no 'response' here; valid: input, context, result"
        in (problem)
    )
    (problem,) = problems(whole, action.replace("${result}", "${result.generated_text}"))
    assert "'result' is text and has no 'generated_text'" in problem


def test_a_job_reads_what_its_action_gives(problems: Problems) -> None:
    said = '{text: "${input.prompt}", output: {said: "${result}"}}'
    text = TWO_JOBS.replace('{text: "${input.prompt as text}", params: {seed: "${input.seed as integer}"}}', said)
    assert "'output' has no 'sad'; did you mean 'said'?" in problems(
        TWO_JOBS, text.replace('text: "${output}"', 'text: "${output.sad}"')
    )[0]  # fmt: skip
    assert problems(TWO_JOBS, text.replace('text: "${output}"', 'text: "${output.said}"')) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("${jobs.draft.output.text}", "${jobs.draft.output}"),
        ("text: \"${output}\"", "text: \"${output[0]}\""),  # a list of prompts or texts gives a list
        ("text: \"${output}\"", "text: \"${output as object}\""),
        ("${context.metadata.user}", "${context.who}"),  # what calls from Python hand in
        ("${context.metadata.user}", "${env.NAME}"),
        ("${context.metadata.user}", "${input.a.b[0].c | ${env.NAME}}"),
        ("prompt: \"${input.question}\"", "prompt: \"${input.question | ${context.session_id}}\""),
        ("{prompt: \"${input.question}\"}", "\"${input}\""),
        ("{prompt: \"${input.question}\"}", "\"${input.request}\""),
        ("{prompt: \"${input.question}\"}", "\"${input as json}\""),
        ("${input.prompt as text}", "${input.promt | Hello}"),
        ("output: {text: \"${output}\"}", "output: \"${output as json}\""),
    ],
)  # fmt: skip
def test_what_may_be_there_is_left_alone(problems: Problems, old: str, new: str) -> None:
    assert problems(old, new) == []


def test_every_problem_is_told_at_once(problems: Problems) -> None:
    assert len(problems(TWO_JOBS, TWO_JOBS.replace("${input", "${inputs").replace("jobs.final", "jobs.fnal"))) == 4


def test_what_comes_from_several_files_names_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = tmp_path / "one.yml", tmp_path / "two.yml"
    one.write_text(TWO_JOBS)
    two.write_text("workflow:\n  output: ${jobs.finale.output}\n")
    with pytest.raises(ConfigError) as caught:
        load([one, two], {})
    assert caught.value.problems == (
        "two.yml:2: workflow.output: ${jobs.finale.output}: 'jobs' has no 'finale'; did you mean 'final'?",
    )
