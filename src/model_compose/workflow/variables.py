"""What a workflow takes and gives, read off its expressions: the source of forms, API schemas and input checks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from model_compose.components import ActionOptions, ComponentOptions, pick
from model_compose.errors import FieldError, InputError, RunError
from model_compose.expressions import SHORT, Path, Reference, Template, Type, convert, parse
from model_compose.workflow.jobs import JobOptions, WorkflowOptions


@dataclass(frozen=True)
class Variable:
    """One input of a workflow, or one output. path: where it stands in the input; () is the input as a whole.

    role "blend": it chooses the blend of `component`, so a page draws sliders for it.
    """

    path: Path
    type: Type
    required: bool = False
    default: Any = None
    description: str | None = None
    role: Literal["value", "blend"] = "value"
    component: str | None = None

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def options(self) -> tuple[str, ...]:
        """The choices of a select."""
        return tuple((self.type.subtype or "").split(",")) if self.type.name == "select" else ()

    @property
    def range(self) -> tuple[float, float, float] | None:
        """minimum, maximum, step of a slider."""
        if self.type.name != "slider":
            return None
        low, high, step = [float(part) for part in (self.type.subtype or "0,1,0.1").split(",")]
        return low, high, step


def inputs(workflow: WorkflowOptions, components: Sequence[ComponentOptions]) -> tuple[Variable, ...]:
    """The workflow's inputs, in the order in which they appear; the first mention of a path describes it."""
    found: dict[Path, Variable] = {}
    for job in workflow.all_jobs:
        for variable in _job_inputs(job, components):
            seen = found.get(variable.path)
            found[variable.path] = (
                variable if seen is None else replace(seen, required=seen.required or variable.required)
            )
    return tuple(found.values())


def outputs(workflow: WorkflowOptions) -> tuple[Variable, ...]:
    """The leaves of the workflow's output; one without a name where the output is a single value."""
    templates = [parse(workflow.output)] if workflow.output is not None else [
        job.output_template for job in workflow.terminal_jobs
    ]  # fmt: skip
    found = {}
    for template in templates:
        for path, leaf in template.leaves():
            as_type = leaf.type if isinstance(leaf, Reference) and leaf.type else Type("string" if path else "any")
            found[path] = Variable(path, as_type)
    return tuple(found.values())


def check(variables: Sequence[Variable], value: Any) -> None:
    """Raises InputError that names every missing or unconvertible field. `value` is the workflow's input."""
    problems = []
    for variable in variables:
        field = f"input.{variable.name}".rstrip(".")
        given = Template(Reference("input", variable.path, field)).evaluate({"input": value})
        if given is None:
            if variable.required:
                problems.append(FieldError(field, f"{field} is required ({_wanted(variable)})"))
            continue
        try:
            converted = convert(given, variable.type, field)
        except RunError as error:
            problems.append(FieldError(field, str(error)))
            continue
        if variable.options and converted not in variable.options:
            allowed = ", ".join(variable.options)
            problems.append(FieldError(field, f"{field} is {SHORT.repr(given)}; allowed: {allowed}"))
    if problems:
        raise InputError("; ".join(problem.message for problem in problems), problems)


def _job_inputs(job: JobOptions, components: Sequence[ComponentOptions]) -> Iterator[Variable]:
    """What a job asks of the workflow's input: its own expressions, with what the action makes of them."""
    component = pick(tuple(components), job.component, "component")
    of_action = {v.path: v for v in _action_inputs(component, component.find_action(job.action))}
    for path, leaf in job.input_template.leaves():
        if isinstance(leaf, Reference) and leaf.key == "input":
            # `input: ${input}` hands the action's variables through; `{prompt: ${input.question}}` renames one.
            for inner in of_action.values():
                if inner.path[: len(path)] == path:
                    outer = (*leaf.path, *inner.path[len(path) :])
                    own = leaf.type if inner.path == path else None
                    default = leaf.default if inner.path == path and leaf.default is not None else inner.default
                    yield replace(
                        inner, path=outer, type=own or inner.type, default=default,
                        required=inner.required and default is None, description=leaf.description or inner.description,
                    )  # fmt: skip
            # A whole input that the action takes nothing of is no variable.
            if leaf.path and not any(inner.path[: len(path)] == path for inner in of_action.values()):
                yield _variable(leaf, required=False)
        else:
            for reference in Template(leaf).references():
                if reference.key == "input":
                    yield _variable(reference, required=path in of_action and of_action[path].required)
    yield from (_variable(r, required=False) for r in job.output_template.references() if r.key == "input" and r.path)


def _action_inputs(component: ComponentOptions, action: ActionOptions) -> Iterator[Variable]:
    for field, template in action.fields().items():
        for reference in template.references():
            if reference.key == "input":
                variable = _variable(reference, required=field in action.needs)
                if field == "blend":
                    variable = replace(variable, role="blend", component=component.id)
                yield variable


def _variable(reference: Reference, *, required: bool) -> Variable:
    default = reference.default
    if isinstance(default, Reference):
        default = None
    elif default is not None and reference.type is not None:
        default = convert(default, reference.type, reference.source)
    return Variable(
        reference.path,
        reference.type or Type("string" if reference.path else "any"),
        required and reference.default is None,
        default,
        reference.description,
    )


def describe(variable: Variable) -> Mapping[str, Any]:
    """The variable as the API's schema route gives it; keys without a value are left out."""
    low_high_step = variable.range or (None, None, None)
    entry = {
        "name": variable.name or None,
        "type": variable.type.name,
        "is_list": variable.type.is_list,
        "subtype": variable.type.subtype,
        "format": variable.type.format,
        "default": variable.default,
        "required": variable.required or None,
        "description": variable.description,
        "options": list(variable.options) or None,
        **dict(zip(("minimum", "maximum", "step"), low_high_step, strict=True)),
        "role": variable.role if variable.role != "value" else None,
        "component": variable.component,
    }
    return {key: value for key, value in entry.items() if value is not None}


def _wanted(variable: Variable) -> str:
    return f"one of {', '.join(variable.options)}" if variable.options else variable.type.name
