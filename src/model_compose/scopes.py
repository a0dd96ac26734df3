"""Checks which names each expression of the file may use.

An expression that names something that does not exist would be null in every run, so it is an error when the file is
loaded. This module does not know the file's lines: a problem has the keys of its place.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model_compose.components import ActionOptions, ComponentOptions, located, pick
from model_compose.config import Config
from model_compose.errors import Keys
from model_compose.expressions import Path, Reference, Splice, Template
from model_compose.schema import nearest
from model_compose.workflow.jobs import JobOptions, WorkflowOptions

Shape = Mapping[str, Any] | Literal["text"] | None
"""What is known about a value: a mapping with exactly these keys, each with its shape; "text", for a text or a list of
texts; or None if nothing is known."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with an expression. keys: the keys of the YAML that lead to it."""

    keys: Keys
    message: str


def problems(config: Config) -> Iterator[Problem]:
    """Every expression of the file that names something that does not exist, or that may not be ready yet."""
    for at, workflow in located(config.workflow, config.workflows, "workflow"):
        yield from _of_workflow(at, workflow, config)
    for at, component in located(config.component, config.components, "component"):
        options: Any = component
        for place, action in located(options.action, options.actions, "action"):
            yield from _of_action((*at, *place), action, component, config)


def _of_workflow(at: Keys, workflow: WorkflowOptions, config: Config) -> Iterator[Problem]:
    done: Shape = {job.id: {"output": _output(job, config)} for job in workflow.all_jobs}
    scope = {"input": None, "context": None, "jobs": done}
    for place, job in located(workflow.job, workflow.jobs, "job"):
        own = {**scope, "output": _result(job, config)}
        before = _before(job, workflow)
        for key, template, names in (("input", job.input_template, scope), ("output", job.output_template, own)):
            for path, reference in _references(template):
                message = _nowhere(reference, names) or _too_early(reference, job, before)
                if message:
                    yield Problem((*at, *place, key, *path), message)
    if workflow.output_template is not None:
        yield from _in_scope((*at, "output"), workflow.output_template, scope)


def _of_action(at: Keys, action: ActionOptions, component: ComponentOptions, config: Config) -> Iterator[Problem]:
    scope: dict[str, Shape] = {"input": None, "context": None}
    for field, template in action.templates.items():
        found = list(_in_scope((*at, field), template, scope))
        yield from found
        if field in action.needs and isinstance(template.node, Reference) and not found:
            yield from _never_given((*at, field), template.node, action, component, config)
    if action.output_template is not None:
        yield from _in_scope((*at, "output"), action.output_template, {**scope, "result": "text"})


def _never_given(
    at: Keys, reference: Reference, action: ActionOptions, component: ComponentOptions, config: Config
) -> Iterator[Problem]:
    """The jobs that run this action and never give it the input that `reference` reads, which the action needs.

    Only a job that lists the parts of its input can be checked.
    """
    if reference.key != "input" or reference.default is not None:
        return
    for workflow in config.all_workflows:
        for job in workflow.all_jobs:
            asked = pick(config.all_components, job.component, "component")
            given = _shape(job.input_template, {})
            if (
                asked is component
                and asked.find_action(job.action) is action
                and (lost := _lost(given, reference.path))
            ):
                _, step, valid = lost
                message = f"the job '{job.id}' runs this action and its input has no '{step}'{_hint(step, valid)}"
                yield Problem(at, f"{reference.source}: {message}")


def _in_scope(at: Keys, template: Template, scope: Mapping[str, Shape]) -> Iterator[Problem]:
    for path, reference in _references(template):
        if message := _nowhere(reference, scope):
            yield Problem((*at, *path), message)


def _references(template: Template) -> Iterator[tuple[Keys, Reference]]:
    """Every expression in a template, each with its keys."""
    for path, leaf in template.leaves():
        for reference in Template(leaf).references():
            yield tuple(step for step in path if not isinstance(step, slice)), reference


def _nowhere(reference: Reference, scope: Mapping[str, Shape]) -> str | None:
    """Why an expression is null in every run; None if it may have a value."""
    if reference.key not in scope:
        return f"{reference.source}: there is no '{reference.key}' here{_hint(reference.key, scope)}"
    lost = _lost(scope[reference.key], reference.path)
    if lost is None:
        return None
    depth, step, valid = lost
    holder = Reference(reference.key, reference.path[:depth], "").name
    holder = f"{reference.key}{'' if not holder or holder.startswith('[') else '.'}{holder}"
    is_text = "" if valid is not None else " is text and"
    return f"{reference.source}: '{holder}'{is_text} has no '{step}'{_hint(step, valid)}"


def _hint(name: str, valid: Mapping[str, Any] | None) -> str:
    return "" if valid is None else f"; {nearest(name, valid)}"


def _lost(shape: Shape, path: Path) -> tuple[int, str, Mapping[str, Any] | None] | None:
    """The first step of a path that does not exist, as (how many steps exist before it, the step, the steps that would).

    The last is None if the value before the step is text. Returns None if all steps exist, or may exist.
    """
    for depth, step in enumerate(path):
        if shape is None or not isinstance(step, str):
            return None
        if shape == "text":
            return depth, step, None
        if step not in shape:
            return depth, step, shape
        shape = shape[step]
    return None


def _too_early(reference: Reference, job: JobOptions, before: set[str]) -> str | None:
    """Why the output that an expression reads may not exist when `job` starts. before: the jobs that have ended then."""
    if reference.key != "jobs" or not reference.path or (other := reference.path[0]) in before:
        return None
    if other == job.id:
        return f"{reference.source}: a job cannot read its own output here; in its output it is ${{output}}"
    return f"{reference.source}: the job '{other}' may not have ended when '{job.id}' starts; name it in depends_on"


def _before(job: JobOptions, workflow: WorkflowOptions) -> set[str]:
    """The ids of the jobs that have always ended when `job` starts."""
    jobs = {each.id: each for each in workflow.all_jobs}
    found: set[str] = set()
    waiting = list(job.depends_on)
    while waiting:
        if (id := waiting.pop()) not in found:
            found.add(id)
            waiting += jobs[id].depends_on
    return found


def _output(job: JobOptions, config: Config) -> Shape:
    return _shape(job.output_template, {"output": _result(job, config)})


def _result(job: JobOptions, config: Config) -> Shape:
    """The shape of the result of the job's action."""
    action = pick(config.all_components, job.component, "component").find_action(job.action)
    return "text" if action.output_template is None else _shape(action.output_template, {"result": "text"})


def _shape(template: Template, scope: Mapping[str, Shape]) -> Shape:
    """The shape of a template's value. scope: the shapes of the sources; nothing is known about other sources."""
    node = template.node
    if isinstance(node, dict):
        return {key: _shape(item, scope) for key, item in node.items()}
    if isinstance(node, Splice):
        return "text"
    if not isinstance(node, Reference) or node.type is not None or node.default is not None:
        return None
    shape = scope.get(node.key)
    for step in node.path:
        shape = shape.get(step) if isinstance(shape, Mapping) and isinstance(step, str) else None
    return shape
