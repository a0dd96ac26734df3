"""Job types: what a node of the graph does. A new type is a class here plus its line in JobOptions."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from model_compose.components import DEFAULT_ID, one_or_many
from model_compose.expressions import Template, parse
from model_compose.schema import Options, TemplateValue


class ComponentJob(Options):
    """Runs an action of a component. `input` left out is the workflow's input; `output` left out is the raw result."""

    later: ClassVar[Mapping[str, Any]] = {
        "interrupt": None, "hook": None, "retry": 1, "on_error": None, "max_run_count": 25, "repeat_count": 1,
    }  # fmt: skip
    type: Literal["component"] = "component"
    id: str = "__job__"
    name: str | None = None
    depends_on: tuple[str, ...] = ()
    component: str = DEFAULT_ID
    action: str = DEFAULT_ID
    input: TemplateValue = None
    output: TemplateValue = None

    @cached_property
    def input_template(self) -> Template:
        """How the component's input is made, parsed once."""
        return parse(self.input or "${input}")

    @cached_property
    def output_template(self) -> Template:
        """How the component's result becomes the job's output, parsed once."""
        return parse(self.output or "${output}")


JobOptions = ComponentJob


class WorkflowOptions(Options):
    """Jobs and how their outputs become the workflow's. Without jobs: one job that runs the default component."""

    id: str = "__workflow__"
    name: str | None = None
    title: str | None = None
    description: str | None = None
    job: JobOptions | None = None
    jobs: tuple[JobOptions, ...] = ()
    output: TemplateValue = None
    default: bool = False
    private: bool = Field(default=False, description="Hidden from lists and pages; still runs by its id")

    @model_validator(mode="after")
    def _graph_is_sound(self) -> Self:
        jobs = {job.id: job for job in self.all_jobs}
        if len(jobs) != len(self.all_jobs):
            ids = [job.id for job in self.all_jobs]
            twice = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"two jobs of workflow '{self.id}' have the id '{twice}'; give each its own id")
        for job in jobs.values():
            for other in job.depends_on:
                if other not in jobs:
                    raise ValueError(f"job '{job.id}' depends on the unknown job '{other}'; known: {', '.join(jobs)}")
        settled: set[str] = set()
        while ready := [id for id, job in jobs.items() if id not in settled and settled.issuperset(job.depends_on)]:
            settled.update(ready)
        if len(settled) != len(jobs):
            raise ValueError(f"these jobs depend on each other in a circle: {', '.join(sorted(set(jobs) - settled))}")
        return self

    @cached_property
    def output_template(self) -> Template | None:
        """How the jobs' outputs become the workflow's, parsed once; None where the YAML does not say."""
        return None if self.output is None else parse(self.output)

    @cached_property
    def all_jobs(self) -> tuple[JobOptions, ...]:
        """The jobs, wherever the YAML has them (job or jobs)."""
        return tuple(one_or_many(self.job, self.jobs)) or (ComponentJob(),)

    @cached_property
    def terminal_jobs(self) -> tuple[JobOptions, ...]:
        """The jobs that no other depends on; their outputs are the workflow's where it maps none itself."""
        needed = {id for job in self.all_jobs for id in job.depends_on}
        return tuple(job for job in self.all_jobs if job.id not in needed)
