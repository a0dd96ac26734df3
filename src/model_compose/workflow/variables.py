"""A workflow's inputs and outputs, found by reading its expressions. Forms, the API's schemas and checks of inputs use
them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from model_compose.components import ActionOptions, ComponentOptions, pick
from model_compose.components.model_actions import EXPECTED_MESSAGES
from model_compose.errors import FieldError, InputError, RunError
from model_compose.expressions import SHORT, Path, Reference, Splice, Template, Type, convert, strict_json
from model_compose.schema import nearest, shown
from model_compose.workflow.jobs import JobOptions, WorkflowOptions

MOST_STRAYS = 64
"""Unknown fields of one input that an error names. Looking for the nearest valid name takes time."""


@dataclass(frozen=True)
class Variable:
    """One input of a workflow, or one output. path: where it stands in the input; () is the whole input.

    role "blend": the input chooses the blend of `component`, so a page shows sliders for it. role "messages": the input is
    a whole conversation, so a person may type one message instead.
    """

    path: Path
    type: Type
    required: bool = False
    default: Any = None
    description: str | None = None
    role: Literal["value", "blend", "messages"] = "value"
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


def inputs(workflow: WorkflowOptions, components: Collection[ComponentOptions]) -> tuple[Variable, ...]:
    """The workflow's inputs, in the order in which expressions read them. The first mention of a path describes it."""
    found: dict[Path, Variable] = {}
    of_jobs = (variable for job in workflow.all_jobs for variable in _job_inputs(job, components))
    for variable in (*of_jobs, *_handed_out(workflow.output_template)):
        seen = found.get(variable.path)
        found[variable.path] = variable if seen is None else replace(seen, required=seen.required or variable.required)
    return tuple(found.values())


def outputs(workflow: WorkflowOptions) -> tuple[Variable, ...]:
    """The leaves of the workflow's output; a single one without a name if the output is one value."""
    whole = workflow.output_template
    templates = [job.output_template for job in workflow.terminal_jobs] if whole is None else [whole]
    found = {}
    for template in templates:
        for path, leaf in template.leaves():
            as_type = leaf.type if isinstance(leaf, Reference) and leaf.type else Type("string" if path else "any")
            found[path] = Variable(path, as_type)
    return tuple(found.values())


def check(variables: Collection[Variable], value: Any, *, hands_out_all: bool = False) -> None:
    """Raises InputError that names every missing, unconvertible or unknown field. `value` is the workflow's input.

    hands_out_all: the whole input is part of the output, so it may hold any keys.
    """
    problems = [problem for variable in variables if (problem := _problem(variable, value))]
    if not hands_out_all:
        problems += islice(_strays([variable.path for variable in variables], value, ("input",)), MOST_STRAYS)
    if problems:
        raise InputError("; ".join(problem.message for problem in problems), problems)


def hands_out_all(workflow: WorkflowOptions) -> bool:
    """Whether the input as a whole is part of the workflow's output."""
    outputs = [workflow.output_template, *(job.output_template for job in workflow.all_jobs)]
    return any(r.key == "input" and not r.path for output in outputs if output for r in output.references())


def as_messages(text: str) -> Any:
    """The conversation that a person typed: messages as JSON, or any other text as one message of the user."""
    found = _from_json(text)
    if isinstance(found, list | dict):
        return found
    broken = text.lstrip().startswith(("[{", '{"'))  # JSON with a mistake; `check` refuses it
    return text if broken else [{"role": "user", "content": text}]


def _from_json(value: Any) -> Any:
    """The value of JSON text; any other value unchanged."""
    try:
        return strict_json(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _problem(variable: Variable, value: Any) -> FieldError | None:
    """What is wrong with one field of the input."""
    field = f"input.{variable.name}".rstrip(".")
    given = Template(Reference("input", variable.path, field)).evaluate({"input": value})
    if given is None:
        return FieldError(field, f"{field} is required ({_wanted(variable)})") if variable.required else None
    if variable.role == "messages" and not isinstance(_from_json(given), list | Mapping):
        return FieldError(field, f"{field}: {EXPECTED_MESSAGES}")
    try:
        converted = convert(given, variable.type, field)
    except RunError as error:
        return FieldError(field, str(error))
    if variable.options and converted not in variable.options:
        return FieldError(field, f"{field} is {SHORT.repr(given)}; allowed: {', '.join(variable.options)}")
    return None


def _strays(known: Collection[Path], value: Any, at: tuple[str, ...]) -> Iterator[FieldError]:
    """An error for each part of `value` that no path of `known` reads. `value` stands at `at`."""
    if value is None or any(not path or not isinstance(path[0], str) for path in known):
        return  # an expression reads all of the value, or reads it as a list
    field, names = ".".join(at), list(dict.fromkeys(str(path[0]) for path in known))
    if not isinstance(value, Mapping):
        if names:
            yield FieldError(field, f"{field} must be an object with {', '.join(names)}, not {shown(value)}")
        return
    for key, item in value.items():
        if key in names:
            yield from _strays([path[1:] for path in known if path[0] == key], item, (*at, key))
        elif at == ("input",) and key == "blend":
            yield FieldError(
                "input.blend", "input.blend is not an input of this workflow; a run's blend stands beside its input"
            )
        else:
            problem = f"{field}.{key} is not an input of this workflow; {nearest(str(key), names)}"
            yield FieldError(f"{field}.{key}", problem)


def _job_inputs(job: JobOptions, components: Collection[ComponentOptions]) -> Iterator[Variable]:
    """The inputs that a job reads: by its own expressions, and by those of its action."""
    component = pick(tuple(components), job.component, "component")
    of_action = {v.path: v for v in _action_inputs(component, component.find_action(job.action))}
    for path, leaf in job.input_template.leaves():
        if isinstance(leaf, Reference) and leaf.key == "input":
            # `input: ${input}` passes the action's variables on; `{prompt: ${input.question}}` renames one.
            for inner in of_action.values():
                if inner.path[: len(path)] == path:
                    outer = (*leaf.path, *inner.path[len(path) :])
                    renamed = _variable(leaf, required=inner.required)
                    given = leaf.default is not None and inner.path == path
                    yield replace(
                        inner, path=outer, type=leaf.type if leaf.type and inner.path == path else inner.type,
                        default=renamed.default if given else inner.default, required=inner.required and not given,
                        description=leaf.description or inner.description,
                    )  # fmt: skip
            yield from _mentions(leaf.default, required=False)
            # The whole input is not a variable if the action reads none of it.
            if leaf.path and not any(inner.path[: len(path)] == path for inner in of_action.values()):
                yield _variable(leaf, required=False)
        else:
            yield from _mentions(leaf, required=path in of_action and of_action[path].required)
    yield from _handed_out(job.output_template)


def _handed_out(output: Template | None) -> Iterator[Variable]:
    """Inputs that are part of an output. The input as a whole is not one of its fields, so it is left out."""
    if output is not None:
        yield from (_variable(r, required=False) for r in output.references() if r.key == "input" and r.path)


def _mentions(leaf: Any, *, required: bool) -> Iterator[Variable]:
    """The inputs that a leaf of a template reads. An input that is another one's default is never required."""
    for part in leaf.parts if isinstance(leaf, Splice) else (leaf,):
        first = True
        while isinstance(part, Reference):
            if part.key == "input":
                yield _variable(part, required=required and first)
            part, first = part.default, False


def _action_inputs(component: ComponentOptions, action: ActionOptions) -> Iterator[Variable]:
    for field, template in action.templates.items():
        for path, leaf in template.leaves():
            for variable in _mentions(leaf, required=field in action.needs):
                at = ".".join(map(str, (field, *path)))
                if at in action.structured and isinstance(leaf, Reference) and leaf.type is None:
                    variable = replace(variable, type=Type("json"))
                if field == "blend":
                    variable = replace(variable, role="blend", component=component.id)
                elif at == "messages" and isinstance(leaf, Reference):
                    variable = replace(variable, role="messages")
                yield variable
    if action.output_template is not None:
        for _, leaf in action.output_template.leaves():
            yield from _mentions(leaf, required=False)


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


def _wanted(variable: Variable) -> str:
    if variable.role == "messages":
        return "a list of messages"
    return f"one of {', '.join(variable.options)}" if variable.options else variable.type.name
