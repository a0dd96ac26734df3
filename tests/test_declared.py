"""Every option that is a secret or a path says so on its field, and errors find their keys by the types."""

import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from model_compose.components import COMPONENTS
from model_compose.config import Config
from model_compose.declared import declarations, keys_in
from model_compose.engines import ENGINES
from model_compose.errors import Keys
from model_compose.lora.methods import METHODS
from model_compose.schema import Options, RelativeToFile, Secret

SECRETS = re.compile(r"(^|_)token$|secret|password|(^|_)keys?$|^env$")
PATHS = re.compile(r"path|dir|folder|file|python|server|sources|cache")

NEITHER = {
    "PypiSource.path": "a glob of names in a wheel",
    "LocalSource.filename": "within the source's folder",
    "HuggingfaceSource.filename": "within the repository",
    "HttpServerOptions.base_path": "of an address",
    "FlatController.base_path": "of an address",
    "VllmOptions.prefix_cache": "yes or no",
    "HuggingfaceOptions.prefix_cache": "yes or no",
    "VllmOptions.kv_cache": "a size",
    "HuggingfaceOptions.kv_cache": "a size",
    "LlamacppOptions.kv_cache": "a size",
    "HuggingfaceSource.local_files_only": "yes or no",
}


def classes(kind: type[Options] = Options) -> Iterator[type[Options]]:
    """Every class of options, those of every driver, component and method included."""
    for registry in (COMPONENTS, ENGINES, METHODS):
        for name in registry:
            registry[name]  # imports its module
    for inner in kind.__subclasses__():
        yield inner
        yield from classes(inner)


def of_files() -> dict[str, tuple[type[Options], FieldInfo]]:
    """The fields that stand in files: those of requests are the bodies of servers."""
    return {
        f"{kind.__name__}.{name}": (kind, field)
        for kind in classes()
        if not kind.__module__.startswith(("model_compose.servers.", "tests."))
        for name, field in kind.model_fields.items()
    }


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in typing.get_args(annotation):
        yield from types_in(inner)


def test_there_are_classes() -> None:
    assert {"VllmOptions.api_key", "LlamacppOptions.server", "HuggingfaceSource.token"} <= of_files().keys()


def test_what_looks_like_a_secret_or_a_path_is_declared() -> None:
    for name, (kind, field) in of_files().items():
        key = name.partition(".")[2]
        secret = any(declarations(kind, (key,), Secret))
        path = any(declarations(kind, (key,), RelativeToFile))
        if SecretStr in types_in(field.annotation) or SECRETS.search(key):
            assert secret, f"{name} looks like a secret; declare Secret() or SecretText"
        if PATHS.search(key) and name not in NEITHER:
            assert path, f"{name} looks like a path; declare LocalPath, or say in NEITHER what it is"
        assert not (secret and path), name


def test_nothing_is_excepted_that_is_not_there_or_declared() -> None:
    for name in NEITHER:
        kind, _ = of_files()[name]
        assert not any(declarations(kind, (name.partition(".")[2],), RelativeToFile)), name


@pytest.mark.parametrize(
    ("keys", "secret"),
    [
        (("controller", "adapter", "api_keys"), True),
        (("controller", "adapter", "api_keys", 0), True),
        (("controller", "adapters", 0, "callback_secret"), True),
        (("controller", "api_keys", 3), True),
        (("component", "model", "token"), True),
        (("components", 2, "peft_adapters", 1, "model", "token"), True),
        (("components", 2, "options", "api_key"), True),
        (("component", "options", "env", "HF_TOKEN"), True),
        (("component", "options", "python"), False),
        (("component", "model", "repository"), False),
        (("workflow", "job", "input", "token"), False),
        (("nothing", "token"), False),
    ],
)
def test_where_secrets_stand(keys: Keys, secret: bool) -> None:
    assert any(declarations(Config, keys, Secret)) == secret


MODEL = {"type": "model", "task": "text-generation", "model": "./b", "action": {"text": "x"}}

LOCATIONS: list[tuple[dict[str, Any], Keys]] = [
    ({"model": {"provider": "local", "path": 1}}, ("model", "path")),
    ({"model": {"provider": "local", "local": 1}}, ("model",)),
    ({"peft_adapters": [{"type": "lora", "model": "./a", "weight": "x"}]}, ("peft_adapters", 0, "weight")),
    ({"options": {"max_queue": "x"}}, ("options", "max_queue")),
    ({"action": {"text": "x", "stop_sequences": ["a", 1]}}, ("action", "stop_sequences", 1)),
    ({"action": {"text": "x", "params": {"top_p": 2}}}, ("action", "params", "top_p")),
    ({"action": {"text": "x", "params": {"logit_bias": {"a": 1}}}}, ("action", "params", "logit_bias", "a")),
    ({"action": {"text": "x", "response_format": {"type": "regex", "regex": 1}}}, ("action", "response_format", "regex")),
    ({"blends": {"by weights": {"ties": "x"}}}, ("blends", "by weights", "ties")),
    ({"blends": {"ties": {"method": "ties", "ties": 1, "weights": {"a": 1}}}}, ("blends", "ties")),
    ({"blends": {"ties": {"method": "ties", "density": 9, "weights": {"a": 1}}}}, ("blends", "ties", "density")),
    (
        {"blends": {"m": {"method": "ties", "density": 1, "weights": {"weights": "x"}}}},
        ("blends", "m", "weights", "weights"),
    ),
    ({"text-generation": 1}, ()),
    ({"type": "text-generation"}, ()),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "keys"), LOCATIONS, ids=[str(changes) for changes, _ in LOCATIONS])
def test_the_names_of_a_unions_members_are_no_keys(changes: dict[str, Any], keys: Keys) -> None:
    for written, at in (("component", ("component",)), ("components", ("components", 0))):
        component = MODEL | changes
        with pytest.raises(ValidationError) as caught:
            Config.model_validate({written: component if written == "component" else [component]})
        longest = max((keys_in(Config, error["loc"]) for error in caught.value.errors()), key=len)
        assert longest == (*at, *keys)
