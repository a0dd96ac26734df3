"""`Compose`: opens what a file declares, runs its workflows, closes it again. The Python API, and what servers call.

async with Compose.open("model-compose.yml") as compose:
    done = await compose.answer({"prompt": "Hello"}, blend={"alpaca": 0.7})
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from model_compose.components import COMPONENTS, Component, Delta, Result, pick
from model_compose.components.model import ModelComponent
from model_compose.config import Config
from model_compose.daemon import in_daemon_thread
from model_compose.errors import InputError, NotFound, NotReady
from model_compose.generation import Chunk, Request
from model_compose.loading import ComposeFile, find_files, load
from model_compose.lora.blend import Blend, names_method
from model_compose.preflight import check_files
from model_compose.progress import Progress, Report, silent
from model_compose.room import Admission
from model_compose.workflow import runner, variables
from model_compose.workflow.jobs import JobOptions, WorkflowOptions
from model_compose.workflow.runner import Done

log = logging.getLogger(__name__)


class Compose:
    """The components of one file, and its workflows over them.

    `load` opens the components; until it has, runs raise NotReady. Lifetimes are the caller's: `open` as a context
    manager does load and close.
    """

    def __init__(self, loaded: ComposeFile) -> None:
        from model_compose.metrics import Metrics  # its library takes a while to import, and `validate` needs none

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
        for id, model in self.models.items():
            model.meter = self.metrics.watch(id, model.engine)
        self._limits: dict[str, AbstractAsyncContextManager[Any]] = {
            options.id: _limit(options.max_concurrent_count) for options in loaded.config.all_components
        }
        self._runs = _limit(loaded.config.serving.max_concurrent_count)
        self._inputs = {
            workflow.id: variables.inputs(workflow, loaded.config.all_components)
            for workflow in loaded.config.all_workflows
        }

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: str | Path | Sequence[Path] = (), *, env: Mapping[str, str] | None = None, report: Report = silent
    ) -> AsyncGenerator["Compose"]:
        """Reads the file (model-compose.yml of the current folder by default), loads its models, and closes them after.

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
        """Opens every component, one after the other, once the files on this machine say that all of them can be."""
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
        return self._inputs[workflow]

    def check_input(self, input: Any, workflow: str | None, blend: Any) -> tuple[WorkflowOptions, dict[str, Blend]]:
        """The workflow and the blends that a run would take. Needs no model. Raises NotFound, InputError."""
        chosen = self.config.find_workflow(workflow)
        blends = self._resolve_blends(blend, chosen)
        variables.check(self._inputs[chosen.id], input, hands_out_all=variables.hands_out_all(chosen))
        return chosen, blends

    def streams(self, job: JobOptions) -> bool:
        """Whether the dialect's `streaming: true` stands on the job's action."""
        action = pick(self.config.all_components, job.component, "component").find_action(job.action)
        return getattr(action, "streaming", False) is True

    @property
    def models(self) -> dict[str, ModelComponent]:
        """The model components by id."""
        return {id: part for id, part in self._components.items() if isinstance(part, ModelComponent)}

    async def run(
        self,
        input: Any = None,
        *,
        workflow: str | None = None,
        blend: Any = None,
        context: Mapping[str, Any] | None = None,
        admission: Admission | None = None,
    ) -> AsyncGenerator[Delta | Done]:
        """Runs a workflow: deltas of its output as they are made, then Done. Closing the iterator stops the run.

        blend: a name, {adapter: weight}, or {component: blend}; None leaves it to the actions. admission: from `admit`,
        given back at the end; None asks for one.
        Raises NotFound, InputError, NotReady, Overloaded, RunError.
        """
        self.check_ready()
        chosen, blends = self.check_input(input, workflow, blend)
        admission = admission or self.admit(chosen, blends)

        async def run_component(
            component: str, action: str, sources: Mapping[str, Any]
        ) -> AsyncGenerator[Delta | Result]:
            id = pick(self.config.all_components, component, "component").id
            of_component = self._components[id].run(action, sources, blends.get(id), admission.places.get(id))
            async with self._limits[id], aclosing(of_component) as items:
                async for item in items:
                    yield item

        running = runner.run(chosen, input, context or {}, run_component)
        with admission, self._counted():
            async with self._runs, aclosing(running) as events:
                async for event in events:
                    yield event

    def admit(self, workflow: WorkflowOptions, blends: Mapping[str, Blend]) -> Admission:
        """A place for one run with every model that the workflow uses, for all that its jobs ask: what was let in is not
        refused later. Raises Overloaded where a model has none left."""
        models = {id: self.models[id] for id in sorted(self.models.keys() & self._used(workflow))}
        return Admission({id: partial(model.take, blends.get(id)) for id, model in models.items()})

    def _used(self, workflow: WorkflowOptions) -> set[str]:
        """The ids of the components that the workflow's jobs name."""
        return {pick(self.config.all_components, job.component, "component").id for job in workflow.all_jobs}

    async def answer(self, input: Any = None, *, workflow: str | None = None, blend: Any = None) -> Done:
        """`run`, collected."""
        async with aclosing(self.run(input, workflow=workflow, blend=blend)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event
        raise AssertionError("a run ends with Done")

    async def generate(self, component: str, request: Request) -> AsyncGenerator[Chunk]:
        """Asks a model component directly, past workflows and actions. Raises NotFound, InputError, NotReady, Overloaded,
        RunError."""
        self.check_ready()
        if component not in self.models:
            raise NotFound(f"there is no model component '{component}'; known: {', '.join(self.models)}")
        model = self.models[component]
        place = model.take(request.blend)  # before it waits for its turn
        try:
            with self._counted():
                async with self._limits[component], aclosing(model.generate(replace(request, place=place))) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            place.give_back()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Within the block a request counts as `busy`, also while it waits for its turn."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1

    def check_ready(self) -> None:
        """Raises NotReady."""
        if not self.ready:
            raise NotReady("the models are still loading, or the service is shutting down; try again in a moment")

    def _resolve_blends(self, blend: Any, workflow: WorkflowOptions) -> dict[str, Blend]:
        """A caller's blend -> one for each model component that it speaks of. In {k: v} a number means an adapter, a
        mapping or a name means a component; without components it goes to all models of the workflow that know its names.
        Raises InputError."""
        if blend is None or blend == "":
            return {}
        by_component = isinstance(blend, Mapping) and any(_names_blend(value) for value in blend.values())
        if by_component and ("method" in self.models or not names_method(blend)):
            if unknown := [id for id in blend if id not in self.models]:
                raise InputError(
                    f"blend: there is no model component '{unknown[0]}'; known: {', '.join(self.models)}. Weights of "
                    "adapters are numbers, blends of components are names or mappings",
                    field="blend",
                )
            return {id: self.models[id].blends.resolve(value, place=f"blend.{id}") for id, value in blend.items()}
        resolved, refusals = {}, []
        for id in self.models.keys() & self._used(workflow):
            try:
                resolved[id] = self.models[id].blends.resolve(blend)
            except InputError as error:
                refusals.append(error)
        if refusals and not resolved:
            raise refusals[0]
        return resolved


def _limit(count: int) -> AbstractAsyncContextManager[Any]:
    """At most `count` at once; 0 is unlimited."""
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
