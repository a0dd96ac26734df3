"""The YAML's frame, frozen. Each driver, component, job and server declares its own options beside its code; the frame
takes them in from the registries."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import Discriminator, Field, Tag, model_validator

from model_compose.components import COMPONENTS, ComponentOptions, one_or_many, pick
from model_compose.schema import Options, Seconds
from model_compose.servers import HttpServerOptions, WebuiOptions
from model_compose.workflow.jobs import WorkflowOptions

if TYPE_CHECKING:
    AnyComponent = ComponentOptions
else:
    AnyComponent = Annotated[Union[tuple(COMPONENTS[name].Options for name in COMPONENTS)], Field()]  # noqa: UP007


class Controller(Options):
    """Who serves the workflows, and how many runs at once."""

    later: ClassVar[Mapping[str, Any]] = {"queue": None, "threaded": False, "shutdown_pending_period": "0s"}
    name: str | None = None
    runtime: Literal["native", "embedded"] = "native"
    adapter: HttpServerOptions | None = None
    adapters: tuple[HttpServerOptions, ...] = Field(default=(), max_length=1)
    webui: WebuiOptions | None = None
    max_concurrent_count: int = Field(default=0, ge=0, description="Runs at once; 0 is unlimited")
    shutdown_timeout: Seconds = Field(default=0.0, ge=0, description="How long running requests may go on at shutdown")

    @property
    def server(self) -> HttpServerOptions | None:
        return next(one_or_many(self.adapter, self.adapters), None)


def _controller_shape(value: Any) -> str:
    """type, host or port directly under controller: one adapter, not a controller."""
    flat = (
        isinstance(value, dict) and not {"adapter", "adapters"} & set(value) and {"type", "port", "host"} & set(value)
    )
    return "adapter" if flat or isinstance(value, HttpServerOptions) else "controller"


class Config(Options):
    """One file."""

    later: ClassVar[Mapping[str, Any]] = {
        key: None
        for one in ("listener", "gateway", "system", "tracer", "logger")
        for key in (one, f"{one}s")
    }  # fmt: skip
    controller: Annotated[
        Annotated[Controller, Tag("controller")] | Annotated[HttpServerOptions, Tag("adapter")],
        Discriminator(_controller_shape),
    ] = Controller(adapter=HttpServerOptions())
    workflow: WorkflowOptions | None = None
    workflows: tuple[WorkflowOptions, ...] = ()
    component: AnyComponent | None = None
    components: tuple[AnyComponent, ...] = ()

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        for what, items in (("component", self.all_components), ("workflow", self.all_workflows)):
            ids = [item.id for item in items]
            if twice := next((id for id in ids if ids.count(id) > 1), None):
                raise ValueError(f"two {what}s have the id '{twice}'; give each its own id")
        if not self.all_components:
            raise ValueError("there is no component; add one, for example {type: model, task: text-generation, …}")
        for workflow in self.all_workflows:
            for job in workflow.all_jobs:
                try:
                    pick(self.all_components, job.component, "component").find_action(job.action)
                except Exception as error:
                    raise ValueError(f"workflow '{workflow.id}', job '{job.id}': {error}") from None
        return self

    @property
    def serving(self) -> Controller:
        """The controller, whichever way it was written."""
        given = self.controller
        return Controller(adapter=given) if isinstance(given, HttpServerOptions) else given

    @property
    def all_components(self) -> tuple[ComponentOptions, ...]:
        return tuple(one_or_many(self.component, self.components))

    @property
    def all_workflows(self) -> tuple[WorkflowOptions, ...]:
        """Without any, one that runs the default component."""
        return tuple(one_or_many(self.workflow, self.workflows)) or (WorkflowOptions(),)

    def find_workflow(self, id: str | None) -> WorkflowOptions:
        """Raises NotFound."""
        return pick(self.all_workflows, id or "__default__", "workflow")
