"""Describes each workflow's form as JSON: its fields, and the base, adapters and blends of its models.

The browser draws widgets from that (assets/). `read_input` turns the typed values into a workflow's input.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

from model_compose.components import pick
from model_compose.components.model import ModelComponent
from model_compose.compose import Compose
from model_compose.errors import ComposeError
from model_compose.expressions import Type, strict_json
from model_compose.lora.blend import Blend, Blends
from model_compose.lora.header import read_header
from model_compose.schema import has_expression
from model_compose.servers.answers import VariableInfo, shown
from model_compose.sources import describe, fetch_offline
from model_compose.workflow.jobs import WorkflowOptions
from model_compose.workflow.variables import Variable, as_messages

JSON_TYPES = frozenset(("json", "list", "object"))


def shown_workflows(compose: Compose) -> list[WorkflowOptions]:
    """The workflows that the page shows: all that are not private."""
    return [workflow for workflow in compose.config.all_workflows if not workflow.private]


def title(compose: Compose) -> str:
    """The heading of the page: the name of its only workflow, else the controller's name."""
    workflows = shown_workflows(compose)
    alone = _name(workflows[0]) if len(workflows) == 1 else None
    return alone or compose.config.serving.name or "model-compose"


def _name(workflow: WorkflowOptions) -> str | None:
    """The workflow's title, name or id; None if the file gives it none of them."""
    return workflow.title or workflow.name or (None if workflow.id.startswith("__") else workflow.id)


def describe_workflow(compose: Compose, workflow: WorkflowOptions) -> dict[str, Any]:
    """Everything that the page draws the workflow's form from. Blocks: it reads the headers of the adapters' files."""
    fields = asked(compose.inputs(workflow.id))
    models = list(_models(compose, workflow))
    return {
        "id": workflow.id,
        "name": _name(workflow) or title(compose),
        "description": workflow.description,
        "fields": [_describe_field(field, alone=len(fields) == 1) for field in fields],
        "models": [_describe_model(model, preset) for _, model, preset in models],
        "by_component": len(compose.models) > 1,
        "markdown": any(model.options.chats for _, model, _ in models),
        "sampling": _sampling([(action, model) for action, model, _ in models]),
    }


# Fields.


def asked(inputs: Collection[Variable]) -> list[Variable]:
    """The inputs that get a field of their own. Blends get none, as they have sliders. A path into a list becomes a field
    for the whole list."""
    found: dict[Any, Variable] = {}
    for variable in inputs:
        if variable.role == "blend":
            continue
        path = tuple(takewhile(lambda step: isinstance(step, str), variable.path))
        whole = variable if path == variable.path else replace(variable, path=path, type=Type("json"), default=None)
        found.setdefault(path, whole)
    if len(found) > 1:
        found.pop((), None)
    return list(found.values())


def _describe_field(variable: Variable, *, alone: bool) -> dict[str, Any]:
    """The input as the API describes it, with `kind`: which widget the page draws."""
    kind = variable.type.name
    if variable.role == "messages":
        kind = "messages"
    elif _is_json(variable):
        kind = "json"
    elif variable.options:
        kind = "select"
    elif kind not in ("integer", "number", "boolean", "slider"):
        kind = "text" if kind in ("text", "markdown") or alone else "line"
    return {**shown(VariableInfo.of(variable)), "name": variable.name, "kind": kind}


def _is_json(variable: Variable) -> bool:
    return variable.type.is_list or variable.type.name in JSON_TYPES


def read_input(fields: Collection[Variable], typed: Mapping[str, Any]) -> Any:
    """The workflow's input: an object, or the value itself if the only field has no name.

    typed: what was typed, by the fields' names. Fields that are empty or missing are left out of the input.
    """
    given = [(field.path, _read(field, typed.get(field.name))) for field in fields]
    if [path for path, _ in given] == [()]:
        return given[0][1]
    result: dict[str, Any] = {}
    for path, value in given:
        if value is not None:
            node = result
            for step in path[:-1]:
                node = node.setdefault(str(step), {})
            node[str(path[-1])] = value
    return result


def _read(variable: Variable, value: Any) -> Any:
    """A typed value in the form that the workflow takes; None for an empty one."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    if variable.role == "messages":
        return as_messages(value)
    if _is_json(variable):
        try:
            parsed = strict_json(value)
        except ValueError:
            return value  # the workflow's own check says what is wrong with it
        return value if isinstance(parsed, str) else parsed  # text is JSON text to the workflow
    return value


# Models.


def _models(compose: Compose, workflow: WorkflowOptions) -> Iterator[tuple[str, ModelComponent, Blend | None]]:
    """The action, the model and the file's blend of each job that runs a model; each model once. The blend is None if it
    depends on the input."""
    seen = set()
    for job in workflow.all_jobs:
        id = pick(compose.config.all_components, job.component, "component").id
        model = compose.models.get(id)
        if model is None or id in seen:
            continue
        seen.add(id)
        nothing: Mapping[str, Any] = {"input": {}, "context": {}, "jobs": {}}
        try:
            blend = model.options.find_action(job.action).templates.get("blend")
            inputs = {**nothing, "input": job.input_template.evaluate(nothing)}
            yield job.action, model, model.blends.resolve(blend.evaluate(inputs) if blend else None)
        except ComposeError:
            yield job.action, model, None


def _describe_model(model: ModelComponent, preset: Blend | None) -> dict[str, Any]:
    options = model.options
    return {
        "component": options.id,
        "base": {"source": describe(options.model), "driver": options.driver, "precision": _precision(model)},
        "adapters": [_describe_adapter(model, name) for name in model.blends.adapters],
        "choices": _choices(model.blends, preset),
    }


def _precision(model: ModelComponent) -> str | None:
    """The quantization or precision that the file names; None if the driver chooses."""
    written = model.options.quantization or model.options.precision
    return None if written == "auto" else written


def _describe_adapter(model: ModelComponent, name: str) -> dict[str, Any]:
    """weight: the one in the file; None for an adapter that a client has loaded. ranks: the different ranks of the
    adapter's modules, ascending; empty until the adapter is on this machine."""
    source, adapter = model.adapters[name].model, None
    try:
        if fetched := fetch_offline(source, base_dir=model.base_dir):
            adapter = read_header(fetched.folder, name)
    except ComposeError:
        pass  # loading the models tells what is wrong with it
    ranks = sorted({factors.rank for factors in adapter.modules.values()}) if adapter else []
    weight = model.blends.default.weights.get(name)
    return {"name": name, "source": describe(source), "weight": weight, "ranks": ranks}


def _choices(blends: Blends, preset: Blend | None) -> list[dict[str, Any]]:
    """The entries of the picker: the file's own blend first, then the named ones, each adapter alone, and the bare base;
    each function once. value: what a run is sent for it. weights: in the adapters' order. method: of a blend that is not
    the sum of these weights."""
    default = preset or blends.default
    offered = [
        (_label("Default", default), None if preset else dict(default.weights), default),
        *((_label(name, blend), name, blend) for name, blend in blends.named.items()),
        *((f"{name} alone", name, Blend({name: 1.0})) for name in blends.adapters),
        ("Bare base", {}, Blend({})),
    ]
    found: list[Blend] = []
    choices = []
    for label, value, blend in offered:
        if not any(blend.equals(other) for other in found):
            found.append(blend)
            weights = [float(blend.weights.get(adapter, 0)) for adapter in blends.adapters]
            method = blend.method.method if blend.method else None
            choices.append({"label": label, "value": value, "weights": weights, "method": method})
    return choices


def _label(name: str, blend: Blend) -> str:
    """Such as "captain · alpaca 0.5 · pirate 1.25", or "merged (ties) · alpaca 2"."""
    called = name if blend.method is None else f"{name} ({blend.method.method})"
    weights = [f"{adapter} {weight:g}" for adapter, weight in blend.weights.items() if weight]
    return " · ".join([called, *(weights or ["bare base"])])


def _sampling(models: list[tuple[str, ModelComponent]]) -> dict[str, Any]:
    """What a person may set for a run instead of the file, each with the file's value: None where the file sets none, ""
    where several models have one each. Values that an action takes from the input are left out: they have a field."""
    fixed: tuple[str, ...] = ("temperature", "max_output_length", "seed")
    for action, model in models:
        written = model.options.find_action(action).model_dump(exclude_unset=True, warnings=False)
        values = {**written, **written.get("params", {})}
        fixed = tuple(name for name in fixed if not has_expression(values.get(name)))
    if len(models) != 1:
        return dict.fromkeys(fixed if models else (), "")
    drawn = models[0][1].sampling(models[0][0])
    values = {
        "temperature": drawn.temperature if drawn.do_sample else 0,
        "max_output_length": drawn.max_output_length,
        "seed": drawn.seed,
    }
    return {name: values[name] for name in fixed}
