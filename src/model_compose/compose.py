"""`Compose`: opens what a file declares, runs its workflows, and closes it again. The Python API; servers call it too.

async with Compose.open("model-compose.yml") as compose:
    done = await compose.answer({"prompt": "Hello"}, blend={"alpaca": 0.7})
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from model_compose.components import COMPONENTS, Component, Delta, pick
from model_compose.components.model import ModelComponent
from model_compose.components.model_actions import SamplingOverrides
from model_compose.config import Config
from model_compose.daemon import in_daemon_thread
from model_compose.errors import InputError, NotFound, NotReady
from model_compose.generation import Chunk, Request
from model_compose.loading import ComposeFile, find_files, load
from model_compose.lora.blend import Blend, names_method
from model_compose.preflight import check_files
from model_compose.progress import Progress, Report, silent
from model_compose.room import Admission, Place
from model_compose.schema import shown
from model_compose.workflow import runner, variables
from model_compose.workflow.jobs import WorkflowOptions
from model_compose.workflow.runner import Done, Graph, PreparedRun, Step

log = logging.getLogger(__name__)


class Compose:
    """The components of one file, and the workflows that run on them.

    `load` opens the components. Until it has returned, runs raise NotReady. Whoever makes a Compose calls `load` and
    `close`; `open`, a context manager, calls both.
    """

    def __init__(self, loaded: ComposeFile) -> None:
        from model_compose.metrics import Metrics  # its library takes long to import, and `validate` needs no metrics

        self._loaded = loaded
        self.config: Config = loaded.config
        self.files = loaded.files
        self.progress: Progress | None = Progress("starting")
        self.ready = False
        self.busy = 0
        self._components: dict[str, Component] = {
            options.id: COMPONENTS[options.type](options, loaded.base_dir) for options in loaded.config.all_components
        }
        self.metrics = Metrics()
        for model in self.models.values():
            model.meter = self.metrics.watch(model.options.public_name, model.engine)
        self._turns = {options.id: _turns(options.max_concurrent_count) for options in loaded.config.all_components}
        self._runs = _turns(loaded.config.serving.max_concurrent_count)
        self._graphs = {workflow.id: self._graph(workflow) for workflow in loaded.config.all_workflows}

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: str | Path | Collection[Path] = (), *, env: Mapping[str, str] | None = None, report: Report = silent
    ) -> AsyncGenerator["Compose"]:
        """Reads the file (by default model-compose.yml of the current folder) and loads its models. Closes them at the end.

        Raises ConfigError, SourceError, AdapterError, LoadError.
        """
        files = find_files((Path(path),) if isinstance(path, str | Path) else path)
        compose = cls(load(files, env))
        try:
            await compose.load(report)
            yield compose
        finally:
            await compose.close()

    async def load(self, report: Report = silent) -> None:
        """Checks the files on this machine, then opens every component, one after the other."""
        await in_daemon_thread(lambda: check_files(self._loaded))

        def keep(progress: Progress) -> None:
            self.progress = progress
            report(progress)

        for component in self._components.values():
            await component.open(keep)
        self.progress, self.ready = None, True

    async def close(self) -> None:
        """Stops all computation and frees the models."""
        self.ready = False
        await asyncio.gather(*(component.close() for component in self._components.values()))

    def inputs(self, workflow: str) -> tuple[variables.Variable, ...]:
        """What the workflow takes."""
        return self._graphs[workflow].inputs

    @property
    def models(self) -> dict[str, ModelComponent]:
        """The model components by id."""
        return {id: part for id, part in self._components.items() if isinstance(part, ModelComponent)}

    def prepare(
        self,
        input: Any = None,
        *,
        workflow: str | None = None,
        blend: Any = None,
        sampling: SamplingOverrides | Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> PreparedRun:
        """Checks everything about a run that can be wrong before it starts. Needs no model, so it may come before `load`.

        workflow: its id; None is the default one. blend: a name, {adapter: weight}, or {component: blend}; None leaves it
        to the actions. sampling: temperature, max_output_length and seed in place of what the actions of the workflow's
        models say. context: what expressions read as `context`.
        Raises NotFound, InputError.
        """
        graph = self._graphs[self.config.find_workflow(workflow).id]
        blends = self._resolve_blends(blend, graph)
        overrides = SamplingOverrides.read(sampling)
        if overrides is not None and not self._models_of(graph):
            raise InputError("sampling: this workflow runs no model; leave it out", field="sampling")
        variables.check(graph.inputs, input, hands_out_all=graph.hands_out_all)
        return PreparedRun(graph, input, blends, overrides, context or {})

    def admit(self, prepared: PreparedRun) -> Admission:
        """A place for the run with every model that its workflow uses, for all texts that its jobs ask for. A run that was
        let in is not refused later. Raises Overloaded where a model has no place left."""
        models = self._models_of(prepared.graph)
        return Admission({id: partial(model.take, prepared.blends.get(id)) for id, model in models.items()})

    def execute(self, prepared: PreparedRun, admission: Admission | None = None) -> AsyncGenerator[Delta | Done]:
        """Runs what `prepare` made: deltas of the output as they are made, then Done. Closing the iterator stops the run.

        admission: from `admit`, given back at the end; without one, the run asks for its places when it starts.
        Raises NotReady, Overloaded, RunError, and InputError for what a later job's input turns out to be.
        """
        return runner.run(prepared, self._turn(prepared, admission))

    def run(
        self,
        input: Any = None,
        *,
        workflow: str | None = None,
        blend: Any = None,
        sampling: SamplingOverrides | Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[Delta | Done]:
        """`prepare` and `execute` in one. Raises what they raise; what `prepare` finds is raised at once."""
        self.check_ready()
        return self.execute(self.prepare(input, workflow=workflow, blend=blend, sampling=sampling, context=context))

    async def answer(
        self,
        input: Any = None,
        *,
        workflow: str | None = None,
        blend: Any = None,
        sampling: SamplingOverrides | Mapping[str, Any] | None = None,
    ) -> Done:
        """`run`, collected."""
        async with aclosing(self.run(input, workflow=workflow, blend=blend, sampling=sampling)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event
        raise AssertionError("a run ends with Done")

    async def generate(self, component: str, request: Request) -> AsyncGenerator[Chunk]:
        """Asks a model component directly, past workflows and actions.

        Raises InputError, NotFound, NotReady, Overloaded, RunError.
        """
        self.check_ready()
        if component not in self.models:
            raise NotFound(f"there is no model component '{component}'; known: {', '.join(self.models)}")
        model = self.models[component]
        place = model.take(request.blend)  # before it waits for its turn
        self.busy += 1  # also while it waits for its turn
        try:
            async with self._turns[component], aclosing(model.generate(replace(request, place=place))) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.busy -= 1
            place.give_back()

    @asynccontextmanager
    async def _turn(self, prepared: PreparedRun, admission: Admission | None) -> AsyncGenerator[Mapping[str, Place]]:
        """Held while a run lasts: its places, by the component's id, and its turn among the runs that go on at once."""
        self.check_ready()
        with admission or self.admit(prepared) as taken:
            self.busy += 1  # also while it waits for its turn
            try:
                async with self._runs:
                    yield taken.places
            finally:
                self.busy -= 1

    def _graph(self, workflow: WorkflowOptions) -> Graph:
        options = self.config.all_components
        steps = []
        for job in workflow.all_jobs:
            component = pick(options, job.component, "component")
            action, id = component.find_action(job.action), component.id
            steps.append(Step(job, id, self._components[id], action, self._turns[id]))
        inputs = variables.inputs(workflow, options)
        return Graph(workflow, tuple(steps), inputs, variables.hands_out_all(workflow))

    def _models_of(self, graph: Graph) -> dict[str, ModelComponent]:
        """The models that the graph's jobs ask, by id and in the ids' order."""
        used = {step.component_id for step in graph.steps}
        return {id: model for id, model in sorted(self.models.items()) if id in used}

    def check_ready(self) -> None:
        """Raises NotReady."""
        if not self.ready:
            raise NotReady("the models are still loading, or the service is shutting down; try again in a moment")

    def _resolve_blends(self, blend: Any, graph: Graph) -> dict[str, Blend]:
        """A caller's blend -> one for each model component that it speaks of. In {k: v} a number means an adapter, a
        mapping or a name means a component. One that names no component goes to all models of the workflow that know its
        adapters. Raises InputError."""
        if blend is None or blend == "":
            return {}
        by_component = isinstance(blend, Mapping) and any(_names_blend(value) for value in blend.values())
        if by_component and ("method" in self.models or not names_method(blend)):
            return self._by_component(blend, graph)
        resolved, refusals = {}, []
        for id, model in self._models_of(graph).items():
            try:
                resolved[id] = model.blends.resolve(blend)
            except InputError as error:
                refusals.append(error)
        if refusals and not resolved:
            raise refusals[0]
        return resolved

    def _by_component(self, blend: Mapping[str, Any], graph: Graph) -> dict[str, Blend]:
        """{component: blend} -> each blend by the component's id. A key is an id or a public name. Raises InputError."""
        public = {model.options.public_name: id for id, model in self.models.items()}
        ids = public | {id: id for id in self.models}
        if unknown := [name for name in blend if name not in ids]:
            adapters = {name for model in self._models_of(graph).values() for name in model.blends.adapters}
            for name in unknown:
                if name in adapters and _names_blend(blend[name]):
                    message = f"blend: the weight of {name} must be a number, not {shown(blend[name])}"
                    raise InputError(message, field="blend")
            raise InputError(
                f"blend: there is no model component '{unknown[0]}'; known: {', '.join(public)}. Weights of adapters are "
                "numbers, blends of components are names or mappings",
                field="blend",
            )
        names: dict[str, str] = {}
        for name in blend:
            if (first := names.setdefault(ids[name], name)) != name:
                message = f"blend: '{first}' and '{name}' are the same model component; name it once"
                raise InputError(message, field="blend")
        return {id: self.models[id].blends.resolve(blend[name], place=f"blend.{name}") for id, name in names.items()}


def _turns(count: int) -> AbstractAsyncContextManager[Any]:
    """Entered by whoever takes a turn: at most `count` have one at once; 0 is unlimited."""
    return asyncio.Semaphore(count) if count else nullcontext()


def _names_blend(value: Any) -> bool:
    """Whether a value in a caller's mapping is a blend rather than a weight; forms send weights as text."""
    if not isinstance(value, str):
        return isinstance(value, Mapping)
    try:
        float(value)
    except ValueError:
        return True
    return False
