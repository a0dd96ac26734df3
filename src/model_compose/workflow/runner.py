"""Runs a workflow's graph: every job as soon as the ones it depends on are done, all text as one stream of deltas."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from model_compose.components import Answer, Delta, Result
from model_compose.errors import RunError
from model_compose.expressions import Path, parse
from model_compose.workflow.jobs import JobOptions, WorkflowOptions


@dataclass(frozen=True)
class Done:
    """The end of a run: the workflow's output, and which models answered."""

    output: Any
    answers: tuple[Answer, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a person should know about the texts; of several models each says whose text it is."""
        several = len(self.answers) > 1
        return [f"{each.component}: {note}" if several else note for each in self.answers for note in each.notes]


class RunComponent(Protocol):
    """How a job reaches a component; the runner is handed one."""

    def __call__(
        self, component: str, action: str, context: Mapping[str, Any], /
    ) -> AsyncGenerator[Delta | Result]: ...


async def run(
    workflow: WorkflowOptions, value: Any, context: Mapping[str, Any], run_component: RunComponent
) -> AsyncGenerator[Delta | Done]:
    """Deltas at paths of the workflow's output as they come, then one Done. Closing the iterator stops every job.

    value: the workflow's input. context: what expressions see as `context`. Raises what the first failing job raised.
    """
    sources: dict[str, Any] = {"input": value, "context": dict(context), "jobs": {}}
    answers: list[Answer] = []
    pending = {job.id: job for job in workflow.all_jobs}
    finished: set[str] = set()
    queue: asyncio.Queue[Delta | tuple[str, Result] | Exception] = asyncio.Queue()

    async def work(job: JobOptions) -> None:
        result: Result | None = None
        try:
            inputs = {"input": job.input_template.evaluate(sources), "context": sources["context"]}
            async with aclosing(run_component(job.component, job.action, inputs)) as items:
                async for item in items:
                    if isinstance(item, Result):
                        result = item
                    else:
                        for place in _places(workflow, job, item.path):
                            queue.put_nowait(Delta(place, item.text))
            if result is None:
                raise RunError(f"job '{job.id}': the component ended without a result")
            output = job.output_template.evaluate({**sources, "output": result.value})
            queue.put_nowait((job.id, Result(output, result.answer)))
        except Exception as error:
            queue.put_nowait(error)

    tasks: set[asyncio.Task[None]] = set()
    try:
        while len(finished) < len(workflow.all_jobs):
            for job in [job for job in pending.values() if finished.issuperset(job.depends_on)]:
                tasks.add(asyncio.create_task(work(pending.pop(job.id))))
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
        yield Done(_output(workflow, sources), tuple(answers))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _places(workflow: WorkflowOptions, job: JobOptions, path: Path) -> list[Path]:
    """Where the part at `path` of a job's raw result stands unchanged in the workflow's output: what can be streamed."""
    of_job = job.output_template.places("output", path)
    if workflow.output is None:
        terminal = workflow.terminal_jobs
        merged = job in terminal and (job == terminal[-1] or isinstance(job.output_template.node, dict))
        return of_job if merged else []
    template = parse(workflow.output)
    return [place for at in of_job for place in template.places("jobs", (job.id, "output", *at))]


def _output(workflow: WorkflowOptions, sources: Mapping[str, Any]) -> Any:
    if workflow.output is not None:
        return parse(workflow.output).evaluate(sources)
    outputs = [sources["jobs"][job.id]["output"] for job in workflow.terminal_jobs]
    if len(outputs) > 1 and all(isinstance(output, dict) for output in outputs):
        return {key: value for output in outputs for key, value in output.items()}
    return outputs[-1]
