"""Job types: what a node of a workflow's graph does. A new type is a class here and its line in JobOptions."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from model_compose.components import DEFAULT_ID, located, one_or_many
from model_compose.expressions import Template, parse
from model_compose.schema import Options, TemplateValue, invalid


class ComponentJob(Options):
    """Runs an action of a component. `input` left out is the workflow's input; `output` left out is the raw result."""

    later: ClassVar[Mapping[str, Any]] = {
        "interrupt": None, "hook": None, "retry": 1, "on_error": None, "max_run_count": 25, "repeat_count": 1,
    }  # fmt: skip
    type: Literal["component"] = Field(default="component", description="The kind of job; a component runs")
    id: str = Field(default="__job__", description="The name by which other jobs and expressions refer to this job")
    name: str | None = Field(default=None, description="A name for people; nothing depends on it")
    depends_on: tuple[str, ...] = Field(
        default=(), description="Ids of the jobs that must be done before this one starts"
    )
    component: str = Field(default=DEFAULT_ID, description="Id of the component; the default one if unset")
    action: str = Field(default=DEFAULT_ID, description="Id of the component's action; the default one if unset")
    input: TemplateValue = Field(default=None, description="What the component gets; the workflow's input if unset")
    output: TemplateValue = Field(
        default=None, description="What the job gives, as `${output}` or parts of it; all of it if unset"
    )

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
    """Jobs and how their outputs become the workflow's. Without jobs, one job runs the default component."""

    id: str = Field(default="__workflow__", description="The name by which a request chooses this workflow")
    name: str | None = Field(default=None, description="A name for people; nothing depends on it")
    title: str | None = Field(default=None, description="The heading on the page")
    description: str | None = Field(default=None, description="The text under the heading")
    job: JobOptions | None = Field(
        default=None, description="The only job; without any, one runs the default component"
    )
    jobs: tuple[JobOptions, ...] = Field(default=(), description="Several jobs")
    output: TemplateValue = Field(
        default=None, description="What the workflow gives; the output of its last jobs if unset"
    )
    default: bool = Field(default=False, description="Whether this is the workflow of a request that names none")
    private: bool = Field(
        default=False, description="Whether lists and the page leave this workflow out; a request may still name its id"
    )

    @model_validator(mode="after")
    def _graph_is_sound(self) -> Self:
        jobs = dict[str, JobOptions]()
        written = located(self.job, self.jobs, "job")
        for at, job in written:
            if job.id in jobs:
                raise invalid(
                    f"two jobs of workflow '{self.id}' have the id '{job.id}'; give each its own id", *at, "id"
                )
            jobs[job.id] = job
        for at, job in written:
            for index, other in enumerate(job.depends_on):
                if other not in jobs:
                    raise invalid(
                        f"job '{job.id}' depends on the unknown job '{other}'; known: {', '.join(jobs)}",
                        *at, "depends_on", index,
                    )  # fmt: skip
        settled: set[str] = set()
        while ready := [id for id, job in jobs.items() if id not in settled and settled.issuperset(job.depends_on)]:
            settled.update(ready)
        circle = set(jobs) - settled
        while waiting := circle - {other for id in circle for other in jobs[id].depends_on}:
            circle -= waiting  # these only wait for a job of the circle
        if circle:
            at = next(at for at, job in written if job.id in circle)
            names = ", ".join(sorted(circle))
            raise invalid(f"these jobs depend on each other in a circle: {names}", *at, "depends_on")
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
        """The jobs that no other job depends on. Their outputs are the workflow's if the workflow has no `output`."""
        needed = {id for job in self.all_jobs for id in job.depends_on}
        return tuple(job for job in self.all_jobs if job.id not in needed)
