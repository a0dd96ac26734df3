"""The YAML's frame: its shapes, its defaults, its JSON Schema."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from model_compose.config import Config
from model_compose.errors import ConfigError, NotFound
from model_compose.loading import load
from tests.tiny import YAML

FIRST_EXAMPLE = """\
controller:
  adapter: {type: http-server, port: 8080, base_path: /api}
  webui: {driver: gradio, port: 8081}
workflow:
  title: Generate Text with LoRA Adapters
  description: Generate text using a base model enhanced with multiple LoRA adapters.
  job:
    input: ${input}
    output: {generated: "${output}"}
component:
  type: model
  task: text-generation
  model: {provider: huggingface, repository: meta-llama/Llama-2-7b-hf, token: "${env.HUGGINGFACE_TOKEN}"}
  peft_adapters:
    - {type: lora, name: alpaca, model: tloen/alpaca-lora-7b, weight: 0.7}
    - {type: lora, name: assistant, model: plncmm/guanaco-lora-7b, weight: 0.8}
  max_concurrent_count: 1
  action:
    text: ${input.prompt as text}
    max_output_length: 2048
    params: {temperature: 0.7, top_p: 0.9}
"""
COMPONENT = YAML[YAML.index("component:") :]
DESIGN_EXAMPLE = FIRST_EXAMPLE.replace("    text: ${input.prompt as text}\n", """\
    prompt: ${input.prompt as text}
    blend: ${input.blend}
""").replace("weight: 0.8}", "weight: 0.8, precision: float16, device: cuda:0}").replace("  max_concurrent", """\
  driver: huggingface
  precision: bfloat16
  blends:
    concise: {alpaca: 1.2}
    plain: {}
  max_concurrent""")  # fmt: skip

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    path = tmp_path / "model-compose.yml"

    def read_text(yaml: str, **env: str) -> Config:
        path.write_text(yaml, encoding="utf-8")
        return load([path], env).config

    return read_text


@pytest.mark.parametrize("token", [None, "hf_secret"])
@pytest.mark.parametrize("yaml", [FIRST_EXAMPLE, DESIGN_EXAMPLE], ids=["issue", "design"])
def test_first_example_loads_as_written(read: Read, yaml: str, token: str | None) -> None:
    config = read(yaml, **({"HUGGINGFACE_TOKEN": token} if token else {}))
    component: Any = config.component
    assert (component.model.token and component.model.token.get_secret_value()) == token
    assert component.to_blends().default.weights == {"alpaca": 0.7, "assistant": 0.8}
    assert component.max_concurrent_count == 1
    assert config.serving.server is not None
    assert config.serving.webui is not None
    assert (config.serving.server.port, config.serving.server.base_path, config.serving.webui.port) == (
        8080,
        "/api",
        8081,
    )
    assert "hf_secret" not in repr(config)


def test_no_controller_is_a_server_on_loopback_and_no_page(read: Read) -> None:
    controller = read(COMPONENT).serving
    assert controller.server is not None
    assert (controller.server.host, controller.server.port, controller.server.base_path) == ("127.0.0.1", 8080, "/api")
    assert controller.webui is None
    assert controller.server.api_keys is None
    assert controller.server.origins == ()


@pytest.mark.parametrize(
    ("controller", "port", "page"),
    [
        ("{type: http-server, port: 9}", 9, None),
        ("{port: 9}", 9, None),
        ("{host: 127.0.0.2}", 8080, None),
        ("{type: http-server, port: 9, webui: {port: 7}, max_concurrent_count: 2}", 9, 7),
        ("{adapter: {port: 9}}", 9, None),
        ("{adapters: [{port: 9}], webui: {}}", 9, 8081),
        ("{adapters: [], webui: {}}", None, 8081),
        ("{webui: {driver: gradio}}", None, 8081),
    ],
)
def test_ways_to_write_a_controller(read: Read, controller: str, port: int | None, page: int | None) -> None:
    serving = read(f"controller: {controller}\n{COMPONENT}").serving
    assert (serving.server and serving.server.port) == port
    assert (serving.webui and serving.webui.port) == page
    assert serving.max_concurrent_count == (2 if "count" in controller else 0)


def test_flat_controller_keeps_its_options_and_refuses_unknown_ones(read: Read) -> None:
    flat = "{port: 9, base_path: v2, api_keys: [k1, k2], origins: 'http://a, http://b'}"
    server = read(f"controller: {flat}\n{COMPONENT}").serving.server
    assert server is not None
    assert (server.base_path, server.origins) == ("/v2", ("http://a", "http://b"))
    assert [key.get_secret_value() for key in server.api_keys or ()] == ["k1", "k2"]
    with pytest.raises(ConfigError, match=r":1: controller: unknown key 'prt'; did you mean 'port'\?"):
        read(f"controller: {{type: http-server, prt: 9}}\n{COMPONENT}")


@pytest.mark.parametrize(
    ("written", "expected"), [("/api/", "/api"), ("api", "/api"), ("/", ""), ("''", ""), ("/a/b", "/a/b")]
)
def test_base_path_is_normalised(read: Read, written: str, expected: str) -> None:
    server = read(f"controller: {{adapter: {{base_path: {written}}}}}\n{COMPONENT}").serving.server
    assert server is not None
    assert server.base_path == expected


def test_singular_and_plural_are_the_same_and_add_up(read: Read) -> None:
    model = "type: model, task: text-generation, model: ./b, action: {text: x}"
    one = read(f"component: {{{model}}}\nworkflow: {{id: w, job: {{id: j}}}}\n")
    many = read(f"components: [{{{model}}}]\nworkflows: [{{id: w, jobs: [{{id: j}}]}}]\n")
    assert one.all_components == many.all_components
    assert [w.all_jobs for w in one.all_workflows] == [w.all_jobs for w in many.all_workflows]
    both = read(f"component: {{{model}, default: true}}\ncomponents: [{{id: b, {model}}}]\n")
    assert [component.id for component in both.all_components] == ["__component__", "b"]
    actions = read("component: {type: model, task: text-generation, model: ./b, action: {text: x, default: true},\n"
                   " actions: [{id: other, prompt: y}]}\n").all_components[0].all_actions  # fmt: skip
    assert [action.id for action in actions] == ["__action__", "other"]


def test_workflow_by_id_the_only_one_and_the_default_one(read: Read) -> None:
    two = "workflows: [{id: a}, {id: b%s}]\n" + COMPONENT
    assert read(two % ", default: true").find_workflow(None).id == "b"
    assert read(two % "").find_workflow("a").id == "a"
    assert read(COMPONENT).find_workflow(None).id == "__workflow__"
    with pytest.raises(NotFound, match=r"^there is no default workflow; known: a, b$"):
        read(two % "").find_workflow(None)
    with pytest.raises(NotFound, match=r"^there is no workflow 'c'; known: a, b$"):
        read(two % "").find_workflow("c")


def test_a_config_never_changes(read: Read) -> None:
    config = read(YAML)
    with pytest.raises(ValueError, match="frozen"):
        config.workflow = None


# The JSON Schema, for editors.


@pytest.fixture(scope="module")
def validator() -> jsonschema_rs.Draft202012Validator:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    jsonschema_rs.meta.validate(schema)
    return jsonschema_rs.Draft202012Validator(schema)


def as_written(yaml: str) -> Any:
    import yaml as parser

    return parser.safe_load(yaml)


@pytest.mark.parametrize(
    "yaml",
    [FIRST_EXAMPLE, DESIGN_EXAMPLE, YAML, COMPONENT, "controller: {type: http-server, port: 8080}\n" + COMPONENT],
    ids=["issue", "design", "tiny", "no controller", "flat"],
)
def test_schema_accepts_what_loads(validator: jsonschema_rs.Draft202012Validator, yaml: str) -> None:
    assert [error.message for error in validator.iter_errors(as_written(yaml))] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  task:", "  taks:"),
        ("type: lora, name: alpaca", "type: lora, nmae: alpaca"),
        ("task: text-generation", "task: text-generatoin"),
        ("max_output_length: 12", "max_output_length: [1]"),
        ("do_sample: false", "do_smaple: false"),
        ("base_path", "basepath"),
        ("    input: ${input}", "    inputs: ${input}"),
    ],
)
def test_schema_refuses_what_does_not_load(validator: jsonschema_rs.Draft202012Validator, old: str, new: str) -> None:
    assert old in YAML
    assert not validator.is_valid(as_written(YAML.replace(old, new)))
