"""Runs a workflow's graph: each job as soon as the jobs that it depends on are done, all text as one stream of deltas."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model_compose.components import ActionOptions, Answer, Component, Delta, Result
from model_compose.errors import RunError
from model_compose.expressions import Path
from model_compose.lora.blend import Blend
from model_compose.room import Place
from model_compose.workflow.jobs import JobOptions, WorkflowOptions
from model_compose.workflow.variables import Variable

if TYPE_CHECKING:
    from model_compose.components.model_actions import SamplingOverrides


@dataclass(frozen=True)
class Step:
    """One job with what it runs.

    component_id: the id of `component` in the file. turns: entered for each run of the component; it lets in as many at
    once as the file allows.
    """

    job: JobOptions
    component_id: str
    component: Component
    action: ActionOptions
    turns: AbstractAsyncContextManager[Any]


@dataclass(frozen=True)
class Graph:
    """A workflow as the file fixes it, looked up and parsed once. Every run of the workflow shares it.

    inputs: what a run's input holds. hands_out_all: whether the input as a whole is part of the output, so that it may
    hold anything.
    """

    workflow: WorkflowOptions
    steps: tuple[Step, ...]
    inputs: tuple[Variable, ...]
    hands_out_all: bool

    @property
    def streams(self) -> bool:
        """Whether the dialect's `streaming: true` stands on the action of a job at the workflow's end."""
        last = self.workflow.terminal_jobs
        return any(getattr(step.action, "streaming", False) is True for step in self.steps if step.job in last)


@dataclass(frozen=True)
class PreparedRun:
    """One run, checked: `Compose.prepare` makes it, and nothing of it is looked up or checked again.

    input: the workflow's input. blends: what the caller chose, by the component's id; a component that is not there
    answers under its action's blend. sampling: what goes before the sampling of every action; None changes nothing.
    context: what expressions see as `context`.
    """

    graph: Graph
    input: Any
    blends: Mapping[str, Blend] = field(default_factory=dict)
    sampling: "SamplingOverrides | None" = None
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def workflow(self) -> WorkflowOptions:
        return self.graph.workflow


@dataclass(frozen=True)
class Done:
    """The end of a run: the workflow's output, and which models answered."""

    output: Any
    answers: tuple[Answer, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a person should know about the texts. Where several models answered, each note names its component."""
        several = len(self.answers) > 1
        return [f"{each.component}: {note}" if several else note for each in self.answers for note in each.notes]


async def run(
    prepared: PreparedRun, turn: AbstractAsyncContextManager[Mapping[str, Place]]
) -> AsyncGenerator[Delta | Done]:
    """Yields deltas at paths of the workflow's output as they come, then one Done. Closing the iterator stops every job.

    turn: held while the run lasts; it gives the run's places, by the component's id. Raises what the first failing job
    raised.
    """
    sources: dict[str, Any] = {"input": prepared.input, "context": dict(prepared.context), "jobs": {}}
    answers: list[Answer] = []
    pending = {step.job.id: step for step in prepared.graph.steps}
    finished: set[str] = set()
    queue: asyncio.Queue[Delta | tuple[str, Result] | Exception] = asyncio.Queue()

    async def work(step: Step, place: Place | None) -> None:
        job, result = step.job, None
        places: dict[Path, list[Path]] = {}
        try:
            inputs = {"input": job.input_template.evaluate(sources), "context": sources["context"]}
            of_component = step.component.run(
                step.action,
                inputs,
                blend=prepared.blends.get(step.component_id),
                sampling=prepared.sampling,
                place=place,
            )
            async with step.turns, aclosing(of_component) as items:
                async for item in items:
                    if isinstance(item, Result):
                        result = item
                        continue
                    if item.path not in places:
                        places[item.path] = _places(prepared.workflow, job, item.path)
                    for at in places[item.path]:
                        queue.put_nowait(Delta(at, item.text))
            if result is None:
                raise RunError(f"job '{job.id}': the component ended without a result")
            output = job.output_template.evaluate({**sources, "output": result.value})
            queue.put_nowait((job.id, Result(output, result.answer)))
        except Exception as error:
            queue.put_nowait(error)

    tasks: set[asyncio.Task[None]] = set()
    async with turn as taken:
        try:
            while len(finished) < len(prepared.graph.steps):
                for step in [step for step in pending.values() if finished.issuperset(step.job.depends_on)]:
                    del pending[step.job.id]
                    tasks.add(asyncio.create_task(work(step, taken.get(step.component_id))))
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Delta):
                    yield item
                    continue
                id, result = item
                finished.add(id)
                sources["jobs"][id] = {"output": result.value}
                if result.answer:
                    answers.append(result.answer)
            yield Done(_output(prepared.workflow, sources), tuple(answers))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _places(workflow: WorkflowOptions, job: JobOptions, path: Path) -> list[Path]:
    """Where the part at `path` of a job's raw result stands unchanged in the workflow's output: what can be streamed."""
    of_job = job.output_template.places("output", path)
    template = workflow.output_template
    if template is None:
        terminal = workflow.terminal_jobs
        merged = job in terminal and (job == terminal[-1] or isinstance(job.output_template.node, dict))
        return of_job if merged else []
    return [place for at in of_job for place in template.places("jobs", (job.id, "output", *at))]


def _output(workflow: WorkflowOptions, sources: Mapping[str, Any]) -> Any:
    if workflow.output_template is not None:
        return workflow.output_template.evaluate(sources)
    outputs = [sources["jobs"][job.id]["output"] for job in workflow.terminal_jobs]
    if len(outputs) > 1 and all(isinstance(output, dict) for output in outputs):
        return {key: value for output in outputs for key, value in output.items()}
    return outputs[-1]
