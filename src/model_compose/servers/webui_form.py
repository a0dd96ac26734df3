"""The page's form: a widget for each input of a workflow, and a mixer of sliders for each model's blend.

A mixer's truth is its number boxes, which take any number; the sliders follow as far as 0 to 2. Both, and the picker of
named blends, are kept in step inside the browser (webui.js), so that no click is ahead of the server. Weights mean their
sum; a blend by another method is what the picker says, as long as the numbers are its own.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import gradio as gr

from model_compose.components import pick
from model_compose.components.model import ModelComponent
from model_compose.compose import Compose
from model_compose.errors import ComposeError, InputError
from model_compose.expressions import Type, strict_json
from model_compose.lora.blend import Blend, Blends
from model_compose.lora.methods import Method
from model_compose.servers.webui_runs import mixed
from model_compose.workflow.jobs import WorkflowOptions
from model_compose.workflow.variables import Variable, as_messages

SLIDER_MAXIMUM = 2
SLIDER_STEP = 0.05
JSON_TYPES = frozenset(("json", "list", "object"))
CUSTOM = "custom"


@dataclass(frozen=True)
class Field:
    """A variable and the widget that asks for it."""

    variable: Variable
    widget: Any

    def read(self, value: Any) -> Any:
        """The widget's value as the workflow takes it; an empty box is a value that is not given."""
        if isinstance(value, str) and not value.strip():
            return None
        if isinstance(value, str) and self.variable.role == "messages":
            return as_messages(value)
        if isinstance(value, str) and _is_json(self.variable):
            try:
                parsed = strict_json(value)
            except ValueError:
                return value  # the workflow's own check says what is wrong with it
            return value if isinstance(parsed, str) else parsed  # text is JSON text to the workflow
        return value


@dataclass(frozen=True)
class Choice:
    """One entry of the picker. value: what a run is sent for it. method: of a blend that is not the sum."""

    label: str
    value: Any
    weights: tuple[float, ...]
    method: Method | None = None


@dataclass(frozen=True)
class Mixer:
    """The sliders of one model component."""

    component: str
    adapters: tuple[str, ...]
    choices: tuple[Choice, ...]
    numbers: tuple[Any, ...]
    picker: Any

    @property
    def widgets(self) -> list[Any]:
        return [*self.numbers, self.picker]

    def read(self, values: Sequence[Any]) -> Any:
        """The blend for a run, by the values of `widgets`: None as the file says, a name, or {adapter: weight}.

        Raises InputError.
        """
        for adapter, value in zip(self.adapters, values, strict=False):
            if value is None:
                raise InputError(
                    f"the weight of {adapter} is empty; type a number, 0 leaves the adapter out", field="blend"
                )
        weights = tuple(map(float, values[:-1]))
        chosen = self._chosen(weights, values[-1])
        if chosen is not None:
            return chosen.value
        return {adapter: weight for adapter, weight in zip(self.adapters, weights, strict=True) if weight}

    def shown(self, values: Sequence[Any]) -> str:
        """The blend in words, by the values of `widgets`."""
        weights = tuple(float(value or 0) for value in values[:-1])
        chosen = self._chosen(weights, values[-1])
        method = f" ({chosen.method.method})" if chosen and chosen.method else ""
        return mixed(dict(zip(self.adapters, weights, strict=True))) + method

    def _chosen(self, weights: tuple[float, ...], picked: str) -> Choice | None:
        """The entry that is picked, if the weights are still its own; else the one whose sum they are."""
        alike = {str(at): choice for at, choice in enumerate(self.choices) if choice.weights == weights}
        return alike.get(picked) or next((choice for choice in alike.values() if choice.method is None), None)


@dataclass(frozen=True)
class Form:
    """All that a workflow asks."""

    fields: tuple[Field, ...]
    mixers: tuple[Mixer, ...]
    by_component: bool

    @property
    def widgets(self) -> list[Any]:
        """What a run reads, in the order in which `read` takes the values."""
        return [field.widget for field in self.fields] + [widget for mixer in self.mixers for widget in mixer.widgets]

    def read_input(self, values: Sequence[Any]) -> Any:
        """The workflow's input: one value without a name, or an object; fields left empty are not in it."""
        given = [(field.variable.path, field.read(value)) for field, value in zip(self.fields, values, strict=False)]
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

    def mixed(self, values: Sequence[Any]) -> str:
        """The blends that the mixers show, in words."""
        return "; ".join(mixer.shown(part) for mixer, part in self._by_mixer(values))

    def read_blend(self, values: Sequence[Any]) -> Any:
        """What Compose.run takes as `blend`. Raises InputError."""
        blends = {mixer.component: mixer.read(part) for mixer, part in self._by_mixer(values)}
        if self.by_component:
            return {id: blend for id, blend in blends.items() if blend is not None} or None
        return next(iter(blends.values()), None)

    def _by_mixer(self, values: Sequence[Any]) -> Iterator[tuple[Mixer, list[Any]]]:
        rest = iter(values[len(self.fields) :])
        for mixer in self.mixers:
            yield mixer, [next(rest) for _ in mixer.widgets]


def draw_form(compose: Compose, workflow: WorkflowOptions) -> Form:
    """Draws the widgets into the block that is open."""
    fields = tuple(
        Field(variable, _draw(variable, alone=alone)) for variable, alone in _asked(compose.inputs(workflow.id))
    )
    models = list(_models(compose, workflow))
    mixers = tuple(
        _draw_mixer(id, model.blends, preset, titled=len(models) > 1)
        for id, model, preset in models
        if model.blends.adapters
    )
    return Form(fields, mixers, by_component=len(compose.models) > 1)


def _asked(variables: Sequence[Variable]) -> Iterator[tuple[Variable, bool]]:
    """The variables that get a widget, and whether it is the only one: blends have sliders, and a path into a list is
    asked for as the whole list."""
    found: dict[Any, Variable] = {}
    for variable in variables:
        if variable.role == "blend":
            continue
        path = tuple(takewhile(lambda step: isinstance(step, str), variable.path))
        whole = variable if path == variable.path else replace(variable, path=path, type=Type("json"), default=None)
        found.setdefault(path, whole)
    if len(found) > 1:
        found.pop((), None)
    for variable in found.values():
        yield variable, len(found) == 1


def _draw(variable: Variable, *, alone: bool) -> Any:
    name, kind, default = variable.name or "input", variable.type.name, variable.default
    common: dict[str, Any] = {"label": f"{name} *" if variable.required else name, "info": variable.description}
    if variable.role == "messages":
        common["info"] = variable.description or 'Or a whole conversation: [{"role": "user", "content": "Hello"}, …]'
        return gr.Textbox(lines=7, max_lines=24, placeholder="One message; Shift+Enter runs it", **common)
    if _is_json(variable):
        shown = None if default is None else default if isinstance(default, str) else json.dumps(default)
        return gr.Textbox(shown, lines=3, max_lines=16, placeholder="JSON", elem_classes="mc-json", **common)
    if kind in ("integer", "number"):
        return gr.Number(
            default, precision=0 if kind == "integer" else None, step=1 if kind == "integer" else 0.1, **common
        )
    if kind == "boolean":
        return gr.Checkbox(bool(default), **common)
    if variable.options:
        first = default if default in variable.options else variable.options[0] if variable.required else None
        return gr.Dropdown(list(variable.options), value=first, filterable=len(variable.options) > 8, **common)
    if variable.range:
        low, high, step = variable.range
        return gr.Slider(low, high, value=low if default is None else default, step=step, **common)
    long = kind in ("text", "markdown") or alone
    hint = "Type here; Shift+Enter runs it" if long else None
    return gr.Textbox(default, lines=7 if long else 1, max_lines=24 if long else 1, placeholder=hint, **common)


def _is_json(variable: Variable) -> bool:
    return variable.type.is_list or variable.type.name in JSON_TYPES


def _models(compose: Compose, workflow: WorkflowOptions) -> Iterator[tuple[str, ModelComponent, Blend | None]]:
    """The model components that the workflow's jobs use, each with the blend that the file gives it there; None for one
    that cannot be known before there is input."""
    seen = set()
    for job in workflow.all_jobs:
        id = pick(compose.config.all_components, job.component, "component").id
        model = compose.models.get(id)
        if model is None or id in seen:
            continue
        seen.add(id)
        nothing: Mapping[str, Any] = {"input": {}, "context": {}, "jobs": {}}
        try:
            action = model.options.find_action(job.action).templates.get("blend")
            inputs = {**nothing, "input": job.input_template.evaluate(nothing)}
            yield id, model, model.blends.resolve(action.evaluate(inputs) if action else None)
        except ComposeError:
            yield id, model, None


def _draw_mixer(component: str, blends: Blends, preset: Blend | None, *, titled: bool) -> Mixer:
    choices = tuple(_choices(blends, preset))
    rows = []
    with gr.Group(elem_classes="mc-mixer"):
        picker = gr.Dropdown(
            [*((choice.label, str(index)) for index, choice in enumerate(choices)), ("Custom", CUSTOM)],
            value="0", label=f"Blend of {component}" if titled else "Blend", filterable=False, interactive=True,
            elem_classes="mc-picker",
        )  # fmt: skip
        for adapter, weight in zip(blends.adapters, choices[0].weights, strict=True):
            with gr.Row(elem_classes="mc-weight", equal_height=True):
                slider = gr.Slider(
                    0, SLIDER_MAXIMUM, value=min(max(weight, 0), SLIDER_MAXIMUM), step=SLIDER_STEP, label=adapter,
                    buttons=[], interactive=True, min_width=0, elem_classes="mc-slider",
                )  # fmt: skip
                number = gr.Number(
                    weight, label=f"{adapter} weight", show_label=False, container=False, step=SLIDER_STEP,
                    interactive=True, min_width=0, elem_classes="mc-number",
                )  # fmt: skip
            rows.append((slider, number))
    sliders, numbers = [slider for slider, _ in rows], [number for _, number in rows]
    table = json.dumps([choice.weights for choice in choices])
    approximate = json.dumps([choice.method is not None for choice in choices])
    in_browser: dict[str, Any] = {"fn": None, "queue": False, "show_progress": "hidden", "api_visibility": "private"}
    for slider, number in rows:
        slider.input(inputs=slider, outputs=number, js="(weight) => weight", **in_browser)
        number.input(inputs=number, outputs=slider, js="(weight) => modelCompose.clamp(weight)", **in_browser)
    picker.input(
        inputs=[picker, *numbers], outputs=[*numbers, *sliders],
        js=f"(choice, ...weights) => modelCompose.pick({table}, choice, weights)", **in_browser,
    )  # fmt: skip
    gr.on(
        [number.change for number in numbers], inputs=[picker, *numbers], outputs=picker,
        js=f"(choice, ...weights) => modelCompose.match({table}, {approximate}, choice, weights)", **in_browser,
    )  # fmt: skip
    return Mixer(component, blends.adapters, choices, tuple(numbers), picker)


def _choices(blends: Blends, preset: Blend | None) -> Iterator[Choice]:
    """The file's own blend first, then the named ones, each adapter alone, and the bare base; each function only once."""

    def row(blend: Blend) -> tuple[float, ...]:
        return tuple(float(blend.weights.get(adapter, 0)) for adapter in blends.adapters)

    default = preset or blends.default
    offered = [
        Choice("Default (YAML)", None if preset else dict(default.weights), row(default), default.method),
        *(Choice(_label(blend), name, row(blend), blend.method) for name, blend in blends.named.items()),
        *(Choice(f"{name} alone", name, row(Blend({name: 1.0}))) for name in blends.adapters),
        Choice("Bare base", {}, row(Blend({}))),
    ]
    taken = set()
    for choice in offered:
        if (choice.weights, choice.method) not in taken:
            taken.add((choice.weights, choice.method))
            yield choice


def _label(blend: Blend) -> str:
    return str(blend.name) if blend.method is None else f"{blend.name} ({blend.method.method})"
