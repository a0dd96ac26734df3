"""Routes that load and unload adapters while the service runs, with the names and fields of vLLM's /v1/load_lora_adapter
and /v1/unload_lora_adapter."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import Field

from model_compose.components.model import ModelComponent
from model_compose.compose import Compose
from model_compose.daemon import in_daemon_thread
from model_compose.errors import AdapterError, Forbidden, InputError, NotFound, SourceError
from model_compose.schema import Options
from model_compose.servers.documents import body_schema, openai_errors, text_answer
from model_compose.servers.wire import read_body

log = logging.getLogger(__name__)

ERRORS = openai_errors(400, 403, 404, 409, 413, 500, 503)
Name = Annotated[str, Field(min_length=1, max_length=200)]


class UnloadBody(Options):
    """POST /v1/unload_lora_adapter."""

    later: ClassVar[Mapping[str, Any]] = {"lora_int_id": None}
    lora_name: Name = Field(description="What blends call the adapter")
    component: str | None = Field(default=None, description="The model's id; the only one that allows it if left out")


class LoadBody(UnloadBody):
    """POST /v1/load_lora_adapter."""

    later: ClassVar[Mapping[str, Any]] = {"is_3d_lora_weight": False}
    lora_name: Name = Field(pattern="^[^:]*$", description="What blends call the adapter; no ':' in it")
    lora_path: str = Field(
        min_length=1,
        max_length=4096,
        description="org/name on the Hub, or a folder (which starts with ./, ../, ~ or /; relative to the YAML)",
    )
    load_inplace: bool = Field(default=False, description="Take the place of an adapter with this name")


def create_router(compose: Compose) -> APIRouter:
    router = APIRouter(tags=["adapters"])

    @router.post(
        "/load_lora_adapter",
        response_class=PlainTextResponse,
        openapi_extra={"requestBody": body_schema(LoadBody, "application/json")},
        responses={200: text_answer("Success: LoRA adapter 'pirate' added successfully."), **ERRORS},
    )
    async def load(request: Request) -> PlainTextResponse:
        """Loads an adapter, which requests may name from now on. Running requests finish with what they began with."""
        body = await read_body(LoadBody, request)
        component = _find(compose, body.component)
        compose.check_ready()
        try:
            options = await in_daemon_thread(lambda: component.runtime_adapter(body.lora_name, body.lora_path))
            await component.load_adapter(options, in_place=body.load_inplace)
        except (AdapterError, SourceError) as error:  # the adapter that the client named is at fault, not the server
            raise InputError(str(error), field="lora_path") from error
        except OSError as error:
            raise InputError(
                f"'{body.lora_path}' cannot be read ({error.strerror or error})", field="lora_path"
            ) from error
        log.info("loaded the adapter %r of %r from %r", body.lora_name, component.options.id, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(
        "/unload_lora_adapter",
        response_class=PlainTextResponse,
        openapi_extra={"requestBody": body_schema(UnloadBody, "application/json")},
        responses={200: text_answer("Success: LoRA adapter 'pirate' removed successfully."), **ERRORS},
    )
    async def unload(request: Request) -> PlainTextResponse:
        """Unloads an adapter. Running requests finish with it. 409 if a blend of the file uses it."""
        body = await read_body(UnloadBody, request)
        component = _find(compose, body.component)
        compose.check_ready()
        await component.unload_adapter(body.lora_name)
        log.info("unloaded the adapter %r of %r", body.lora_name, component.options.id)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _find(compose: Compose, id: str | None) -> ModelComponent:
    """The model that the client means, if it allows runtime adapters. Raises NotFound, Forbidden, InputError."""
    models = {model.options.public_name: model for model in compose.models.values()}
    allowing = {id: model for id, model in models.items() if model.options.allow_runtime_adapters}
    if id is not None:
        if id not in models:
            raise NotFound(f"there is no model component '{id}'; known: {', '.join(models)}")
        models[id].check_runtime_adapters()
        return models[id]
    if not allowing:
        raise Forbidden("this service takes no adapters from clients; allow_runtime_adapters: true would let a model")
    if len(allowing) > 1:
        raise InputError(
            f"several models take adapters; name one of them by 'component': {', '.join(allowing)}", field="component"
        )
    return next(iter(allowing.values()))
