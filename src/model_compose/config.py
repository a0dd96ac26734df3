"""The top level of a YAML file, as frozen models.

Each driver, component, job and server declares its options beside its own code. This module takes them from the registries.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from model_compose.components import COMPONENTS, DEFAULT_ID, ComponentOptions, located, one_or_many, pick
from model_compose.engines.options import ModelOptions
from model_compose.errors import Keys, NotFound
from model_compose.registry import ByName
from model_compose.schema import Options, Seconds, invalid
from model_compose.server_options import HttpServerOptions, WebuiOptions
from model_compose.workflow.jobs import ComponentJob, JobOptions, WorkflowOptions

if TYPE_CHECKING:
    AnyComponent = ComponentOptions
else:
    AnyComponent = Annotated[ComponentOptions, ByName(COMPONENTS, "type", lambda component: component.Options)]


class _Serving(Options):
    """A controller's keys, apart from its adapter."""

    later: ClassVar[Mapping[str, Any]] = {"queue": None, "threaded": False, "shutdown_pending_period": "0s"}
    name: str | None = Field(default=None, description="A name for people; nothing depends on it")
    runtime: Literal["native", "embedded"] = Field(
        default="native", description="Accepted for files of the original; both run in this process"
    )
    webui: WebuiOptions | None = Field(default=None, description="The web page; none if unset")
    max_concurrent_count: int = Field(
        default=0, ge=0, description="Workflows that run at once; further ones wait. 0 is unlimited"
    )
    shutdown_timeout: Seconds = Field(
        default=10.0,
        ge=0,
        description="Time that running requests get to finish when the service stops: seconds, or 500ms, 30s, 5m",
    )


class Controller(_Serving):
    """How the workflows are served, and how many runs may go on at once."""

    adapter: HttpServerOptions | None = Field(default=None, description="The HTTP server; none if unset")
    adapters: tuple[HttpServerOptions, ...] = Field(default=(), max_length=1, description="The same as a list of one")

    @model_validator(mode="after")
    def _one_adapter(self) -> Self:
        if self.adapter is not None and self.adapters:
            raise invalid(
                "there are 'adapter' and 'adapters'; this version serves one, so keep one of the two", "adapters"
            )
        return self

    @property
    def server(self) -> HttpServerOptions | None:
        return next(one_or_many(self.adapter, self.adapters), None)


class FlatController(_Serving, HttpServerOptions):
    """A controller with the keys of its one adapter directly in it: {type: http-server, port: 8080, webui: …}."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": [key]} for key in ("type", "host", "port")]})
    later: ClassVar[Mapping[str, Any]] = {**_Serving.later, **HttpServerOptions.later}

    @property
    def server(self) -> HttpServerOptions:
        return HttpServerOptions.model_construct(
            **{name: getattr(self, name) for name in HttpServerOptions.model_fields}
        )


def _controller_shape(value: Any) -> str:
    """ "flat" if type, host or port is directly under `controller`, and not in a mapping under `adapter`."""
    flat = (
        isinstance(value, dict) and not {"adapter", "adapters"} & set(value) and {"type", "port", "host"} & set(value)
    )
    return "flat" if flat or isinstance(value, FlatController) else "controller"


class Config(Options):
    """What one YAML file holds, or several that are merged."""

    later: ClassVar[Mapping[str, Any]] = {
        key: None
        for one in ("listener", "gateway", "system", "tracer", "logger")
        for key in (one, f"{one}s")
    }  # fmt: skip
    controller: Annotated[
        Annotated[Controller, Tag("controller")] | Annotated[FlatController, Tag("flat")],
        Discriminator(_controller_shape),
    ] = Field(
        default=Controller(adapter=HttpServerOptions()),
        description="Who serves the workflows; if unset, an HTTP server on 127.0.0.1:8080 without a page",
    )
    workflow: WorkflowOptions | None = Field(
        default=None, description="The only workflow; without any, requests run the default component's default action"
    )
    workflows: tuple[WorkflowOptions, ...] = Field(default=(), description="Several workflows")
    component: AnyComponent | None = Field(default=None, description="The only component")
    components: tuple[AnyComponent, ...] = Field(default=(), description="Several components")

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        components = located(self.component, self.components, "component")
        workflows = located(self.workflow, self.workflows, "workflow")
        if not components:
            raise invalid("there is no component; add one, for example {type: model, task: text-generation, …}")
        _check_ids(components, "component")
        _check_ids(workflows, "workflow")
        for at, component in components:
            _check_ids(component.located_actions(at), "action", f"component '{component.id}': ")
        if not workflows:
            self._check_job(ComponentJob(), (), "without a workflow: ")
        for at, workflow in workflows:
            jobs = located(workflow.job, workflow.jobs, "job")
            for place, job in jobs or [((), ComponentJob())]:
                self._check_job(job, (*at, *place), f"workflow '{workflow.id}', job '{job.id}': ")
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        api, page = self.serving.server, self.serving.webui
        if api is not None and page is not None and api.port == page.port != 0 and _overlap(api.host, page.host):
            problem = f"the API and the page would both listen on port {page.port}; give one of them another port"
            raise invalid(problem, "controller", "webui", "port")
        return self

    def _check_job(self, job: JobOptions, at: Keys, where: str) -> None:
        """Checks that the job's component and action exist. at: the job's keys. where: what the message starts with."""
        try:
            component = pick(self.all_components, job.component, "component")
        except NotFound as error:
            remedy = "" if job.component != DEFAULT_ID else _remedy(self.all_components, "component")
            raise invalid(f"{where}{error}{remedy}", *at, "component") from None
        if not component.all_actions:
            problem = f"the component '{component.id}' has no action; add one, for example action: {{text: …}}"
            (place,) = (
                keys for keys, each in located(self.component, self.components, "component") if each is component
            )
            raise invalid(where + problem, *place)
        try:
            component.find_action(job.action)
        except NotFound as error:
            remedy = "" if job.action != DEFAULT_ID else _remedy(component.all_actions, "action")
            raise invalid(f"{where}component '{component.id}': {error}{remedy}", *at, "action") from None

    @property
    def serving(self) -> Controller | FlatController:
        """The controller, in either of its two forms."""
        return self.controller

    @property
    def all_components(self) -> tuple[ComponentOptions, ...]:
        return tuple(one_or_many(self.component, self.components))

    @property
    def models(self) -> list[tuple[str, ModelOptions]]:
        """The model components with their names on /v1."""
        return [
            (component.public_name, component)
            for component in self.all_components
            if isinstance(component, ModelOptions)
        ]

    @property
    def all_workflows(self) -> tuple[WorkflowOptions, ...]:
        """The workflows of the file. If it has none, one workflow that runs the default component."""
        return tuple(one_or_many(self.workflow, self.workflows)) or (WorkflowOptions(),)

    def find_workflow(self, id: str | None) -> WorkflowOptions:
        """Raises NotFound."""
        return pick(self.all_workflows, id or DEFAULT_ID, "workflow")


def _overlap(host: str, other: str) -> bool:
    """Whether two servers that listen on one port at these hosts are in each other's way."""
    hosts = {"127.0.0.1" if each == "localhost" else each for each in (host, other)}
    one_family = len({":" in each for each in hosts}) == 1
    return len(hosts) == 1 or (one_family and not hosts.isdisjoint({"0.0.0.0", "::"}))


def _check_ids(items: Collection[tuple[Keys, Any]], what: str, where: str = "") -> None:
    """Checks that ids are unique and at most one item is the default. items: each with its keys."""
    seen = set[str]()
    for at, item in items:
        if item.id in seen:
            raise invalid(f"{where}two {what}s have the id '{item.id}'; give each its own id", *at, "id")
        seen.add(item.id)
    defaults = [(at, item.id) for at, item in items if item.default]
    if len(defaults) > 1:
        (_, first), (at, second) = defaults[:2]
        raise invalid(f"{where}two {what}s say 'default: true': '{first}' and '{second}'; only one can", *at, "default")


def _remedy(items: Collection[Any], what: str) -> str:
    """The end of a message that says how to choose one of several items."""
    return f"; name one with {what}: in the job, or mark one with default: true" if items else ""
