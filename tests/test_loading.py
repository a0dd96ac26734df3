"""Loading: what a file may say, and what somebody who says it wrongly is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_compose.errors import ConfigError
from model_compose.loading import ComposeFile, environment, find_files, load
from model_compose.lora.blend import Blend
from model_compose.lora.methods.svd import Svd
from model_compose.lora.methods.ties import Ties
from tests.tiny import YAML

FILE = "model-compose.yml"
Write = Callable[..., tuple[Path, ...]]
Message = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files into an empty current folder: model-compose.yml, then those given by name."""
    monkeypatch.chdir(tmp_path)

    def write_files(yaml: str, **others: str) -> tuple[Path, ...]:
        texts = {FILE: yaml} | {f"{name}.yml": text for name, text in others.items()}
        for name, text in texts.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return find_files([Path(name) for name in texts])

    return write_files


@pytest.fixture
def read(write: Write) -> Callable[..., ComposeFile]:
    """Loads a YAML with an environment."""
    return lambda yaml, **env: load(write(yaml), env)


@pytest.fixture
def message(write: Write) -> Message:
    """What the user of a YAML is told, with one part of the tiny project's replaced."""

    def told(old: str, new: str, **env: str) -> str:
        assert old in YAML, old
        with pytest.raises(ConfigError) as caught:
            load(write(YAML.replace(old, new, 1)), env)
        return str(caught.value)

    return told


def told_of(write: Write, yaml: str) -> str:
    """What the user of this whole YAML is told."""
    with pytest.raises(ConfigError) as caught:
        load(write(yaml), {})
    return str(caught.value)


UNKNOWN_KEYS = [
    ("workflow:\n", "workflw:\n", "3: unknown key 'workflw'; did you mean 'workflow'?"),
    ("  precision:", "  precisoin:", "12: component: unknown key 'precisoin'; did you mean 'precision'?"),
    ("weight: 0.7", "wieght: 0.7", "14: component.peft_adapters.0: unknown key 'wieght'; did you mean 'weight'?"),
    ("max_output", "max_outputs", "22: component.action: unknown key 'max_outputs_length'; did you mean 'max_output_"),
    ("do_sample", "do_smaple", "23: component.action.params: unknown key 'do_smaple'; did you mean 'do_sample'?"),
    ("base_path", "basepath", "2: controller.adapter: unknown key 'basepath'; did you mean 'base_path'?"),
    ("  adapter:", "  adaptr:", "2: controller: unknown key 'adaptr'; did you mean 'adapter'?"),
    (
        "controller:\n",
        "controller:\n  webui: {drivr: x}\n",
        "2: controller.webui: unknown key 'drivr'; did you mean 'dr",
    ),
    ("    input:", "    inputs:", "6: workflow.job: unknown key 'inputs'; did you mean 'input'?"),
    ("  title:", "  titel:", "4: workflow: unknown key 'titel'; did you mean 'title'?"),
    (
        "model: ./base",
        "model: {repositry: a/b, path: c}",
        "11: component.model: unknown key 'repositry'; valid: filename, path, provider",
    ),
    # A key that is right elsewhere in the component: the line is that of the wrong one.
    (
        "  blends:",
        "  weight: 3\n  blends:",
        "16: component: unknown key 'weight'; valid: action, actions, allow_runtime_adapters, blends, ",
    ),
    ("  precision: float32", "  3: float32", "12: component: unknown key '3'; valid: action, "),
]


@pytest.mark.parametrize(("old", "new", "expected"), UNKNOWN_KEYS, ids=[case[2] for case in UNKNOWN_KEYS])
def test_unknown_key_names_its_line_and_the_nearest_key(message: Message, old: str, new: str, expected: str) -> None:
    assert message(old, new).startswith(f"{FILE}:{expected}")


ADAPTERS = YAML[YAML.index("  peft_adapters:") : YAML.index("  blends:")]
JOB = '  job:\n    input: ${input}\n    output: {generated: "${output}"}\n'

WRONG_VALUES = [
    ("precision: float32", "precision: float8", "12: component.precision: expected 'auto', 'float32', 'float16' or "
     "'bfloat16', not 'float8'; did you mean 'float32'?"),
    ("port: 0", "port: eight", "2: controller.adapter.port: expected a whole number, not 'eight'"),
    ("port: 0", "port: 70000", "2: controller.adapter.port: must be less than or equal to 65535, not 70000"),
    ("port: 0", "port: [1]", "2: controller.adapter.port: expected a whole number, not a list"),
    (ADAPTERS, "  peft_adapters: {alpaca: 1}\n", "13: component.peft_adapters: expected a list, not a mapping"),
    ("{type: lora, name: alpaca, model: ./alpaca, weight: 0.7}", "./alpaca",
     "14: component.peft_adapters.0: expected a mapping, not './alpaca'"),
    ("model: ./alpaca, ", "", "14: component.peft_adapters.0: the key 'model' is missing"),
    ("{type: lora, name: alpaca", "{type: dora, name: alpaca",
     "14: component.peft_adapters.0.type: expected 'lora', not 'dora'"),
    ("title: Tiny", "title: 2024", "4: workflow.title: expected text, not 2024; put it in quotes"),
    ("blend: ${input.blend}", "blend: [a]", "21: component.action.blend: expected text or a mapping, not a list"),
    ("do_sample: false", "temperature: hot", "23: component.action.params.temperature: expected a number, not 'hot'"),
    ("do_sample: false", "top_p: 2", "23: component.action.params.top_p: must be less than or equal to 1, not 2"),
    ("do_sample: false", "seed: 1.5", "23: component.action.params.seed: expected a whole number, not 1.5"),
    ("max_output_length: 12", "max_output_length: 0",
     "22: component.action.max_output_length: must be greater than or equal to 1, not 0"),
    ("model: ./base", "model: base dir", "11: component.model: 'base dir' is neither a Hub repository (org/name) nor a "
     "local path (which starts with ./, ../, ~ or /); if it is a local folder, write './base dir'"),
    ("model: ./base", "model:", "11: component.model: a model source must be org/name, a local path, or a mapping, "
     "not null"),
    ("model: ./base", "model: {provider: hugginface, repository: a/b}",
     "11: component.model: unknown provider 'hugginface'; did you mean 'huggingface'?"),
    ("task: text-generation", "task: text-genration", "9: component: unknown task 'text-genration'; did you mean "
     "'text-generation'?"),
    ("  task: text-generation\n", "", "9: component: the key 'task' is missing"),
    ("type: model", "type: modle", "9: component: unknown type 'modle'; did you mean 'model'?"),
    ("type: http-server", "type: mcp-server", "2: controller.adapter.type: expected 'http-server', not 'mcp-server'"),
    (JOB, "  job: {type: delay}\n", "5: workflow.job.type: expected 'component', not 'delay'"),
    (JOB, "  jobs: [{depends_on: a}]\n", "5: workflow.jobs.0.depends_on: expected a list, not 'a'"),
    ("    text: ${input.prompt as text}\n", "",
     "20: component.action: an action of a text-generation model needs exactly one of 'prompt' and 'text'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), WRONG_VALUES, ids=[case[2] for case in WRONG_VALUES])
def test_wrong_value_names_place_value_and_what_was_expected(
    message: Message, old: str, new: str, expected: str
) -> None:
    assert message(old, new) == f"{FILE}:{expected}"


METHOD = "m: {method: ties, density: 0.3, weights: {alpaca: 1, pirate: 0.5}}"
METHODS = [
    ("ties,", "tise,", "component.blends.m: unknown method 'tise'; did you mean 'ties'?"),
    ("method: ties, ", "", "component.blends.m: the key 'method' is missing"),
    ("density", "densty", "component.blends.m: unknown key 'densty'; did you mean 'density'?"),
    ("density: 0.3, ", "", "component.blends.m: the key 'density' is missing"),
    ("0.3", "0", "component.blends.m.density: must be greater than 0, not 0"),
    ("0.3", "0.3, rank: 4", "component.blends.m: unknown key 'rank'; valid: density, majority_sign_method, method, w"),
    ("0.3", "0.3, majority_sign_method: totl", "component.blends.m.majority_sign_method: expected 'total' or 'frequency', "
     "not 'totl'; did you mean 'total'?"),
    ("weights: {alpaca: 1, pirate: 0.5}", "alpaca: 1", "component.blends.m: unknown key 'alpaca'; valid: density, "),
    (", weights: {alpaca: 1, pirate: 0.5}", "", "component.blends.m: the key 'weights' is missing"),
    ("alpaca: 1", "alpaca: x", "component.blends.m.weights.alpaca: a weight must be a finite number, not 'x'"),
    ("alpaca: 1, pirate: 0.5", "alpaca: 0", "component.blends.m.weights: a method needs an adapter whose weight is not 0"),
    ("pirate: 0.5", "pirat: 0.5", "component: blend 'm' names the unknown adapter 'pirat'; known: alpaca, pirate"),
    ("0.5}}", "0.5}}\n    n: {method: dare_linear, density: 0.3, weights: {alpaca: 1}}",
     "component: the blends 'm' (ties) and 'n' (dare_linear) have full rank"),
    (METHOD, METHOD + "\n  options: {fold: never}", "component: the blend 'm' (ties) has full rank and runs folded into "
     "the weights only, and fold is never; use method: svd, or set fold: auto"),
    (METHOD, METHOD + "\n  quantization: int8", "component: the blend 'm' (ties) has full rank and runs folded into the "
     "weights only, and a quantised base is never folded; use method: svd, or leave quantization out"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), METHODS, ids=[case[2] for case in METHODS])
def test_a_blend_by_a_method_that_cannot_be(message: Message, old: str, new: str, expected: str) -> None:
    told = message("plain: {}", METHOD.replace(old, new, 1))
    line = 19 if "dare_linear" in expected else 18
    assert told.startswith(f"{FILE}:{line}: {expected}")
    assert "\n" not in told


def test_blends_by_methods_load(read: Callable[..., ComposeFile]) -> None:
    small = "small: {method: svd, rank: 4, weights: {pirate: '${env.W}'}}"
    same = "same: {method: ties, density: 0.3, weights: {pirate: 0.5, alpaca: 1.0}}"
    yaml = YAML.replace("plain: {}", "\n    ".join((METHOD, small, same)))
    component: Any = read(yaml, W="0.25").config.component
    blends = component.to_blends()
    assert blends.named["m"] == Blend({"alpaca": 1.0, "pirate": 0.5}, "m", Ties(density=0.3))
    assert blends.named["small"] == Blend({"pirate": 0.25}, "small", Svd(rank=4))
    assert [blend.name for blend in blends.full_rank] == ["m"], "two names of one function are one copy"


def test_an_adapter_may_be_called_method(read: Callable[..., ComposeFile]) -> None:
    yaml = YAML.replace("pirate", "method").replace("plain: {}", "m: {method: 0.5}\n    n: {method: '1', alpaca: 2}")
    component: Any = read(yaml).config.component
    named = component.to_blends().named
    assert named["m"] == Blend({"method": 0.5}, "m")
    assert named["n"] == Blend({"method": 1.0, "alpaca": 2.0}, "n")
    both: Any = read(yaml.replace("{method: 0.5}", "{method: svd, rank: 1, weights: {method: 0.5}}")).config.component
    assert both.to_blends().named["m"] == Blend({"method": 0.5}, "m", Svd(rank=1))


def test_unknown_driver_lists_the_known_ones(message: Message) -> None:
    told = message("  precision: float32", "  driver: vlm")
    assert told.startswith(f"{FILE}:12: component.driver: unknown driver 'vlm'; available: huggingface")


NAMES = [
    ("name: pirate", "name: alpaca", "15: component: the name 'alpaca' is used twice; adapters and blends"),
    ("plain: {}", "pirate: {}", "18: component: the name 'pirate' is used twice; adapters and blends"),
    ("plain: {}", "'a:b': {}", "18: component: a blend's name must not contain ':'; got 'a:b'"),
    ("name: pirate", "name: 'a:b'", "15: component.peft_adapters.1.name: an adapter's name must not contain ':', which"),
    ("{alpaca: 2.0}", "{alpacca: 2.0}", "17: component: blend 'strong' names the unknown adapter 'alpacca'; known: alpaca"),
    (JOB, "  jobs:\n    - {id: a}\n    - {id: a}\n", "7: workflow: two jobs of workflow '__workflow__' have the id 'a'"),
    (JOB, "  jobs:\n    - {id: a}\n    - {id: b, depends_on: [c]}\n",
     "7: workflow: job 'b' depends on the unknown job 'c'; known: a, b"),
    (JOB, "  jobs:\n    - {id: a, depends_on: [b]}\n    - {id: b, depends_on: [a]}\n    - {id: d, depends_on: [b]}\n",
     "6: workflow: these jobs depend on each other in a circle: a, b"),
    (JOB, "  job:\n    component: llm\n", "6: workflow '__workflow__', job '__job__': there is no component 'llm'; known"),
    (JOB, "  job:\n    action: write\n",
     "6: workflow '__workflow__', job '__job__': component '__component__': there is no action 'write'; known: __action__"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), NAMES, ids=[case[2] for case in NAMES])
def test_names_that_clash_or_lead_nowhere(message: Message, old: str, new: str, expected: str) -> None:
    assert message(old, new).startswith(f"{FILE}:{expected}")


def test_a_job_that_waits_for_a_circle_is_no_part_of_it(message: Message) -> None:
    jobs = "  jobs:\n    - {id: d, depends_on: [b]}\n    - {id: a, depends_on: [b]}\n    - {id: b, depends_on: [a]}\n"
    assert message(JOB, jobs) == f"{FILE}:7: workflow: these jobs depend on each other in a circle: a, b"


COMPONENT = "{type: model, task: text-generation, model: ./b, action: {text: x}, id: "


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        (f"components:\n- {COMPONENT}a}}\n- {COMPONENT}a}}\n", "3: two components have the id 'a'; give each its own id"),
        (f"workflows: [{{id: w}},\n  {{id: w}}]\ncomponent: {COMPONENT}a}}\n", "2: two workflows have the id 'w'; give ea"),
        (f"components:\n- {COMPONENT}a, default: true}}\n- {COMPONENT}b, default: true}}\n",
         "3: two components say 'default: true': 'a' and 'b'; only one can"),
        ("component: {type: model, task: text-generation, model: ./b,\n actions: [{id: x, text: a},\n {id: x, text: b}]}\n",
         "3: component '__component__': two actions have the id 'x'; give each its own id"),
        (f"components:\n- {COMPONENT}a}}\n- {COMPONENT}b}}\n", "1: without a workflow: there is no default component; "
         "known: a, b; name one with component: in the job, or mark one with default: true"),
        ("component: {type: model, task: text-generation, model: ./b}\n",
         "1: without a workflow: the component '__component__' has no action; add one, for example action: {text: …}"),
        ("controller:\n  adapter: {port: 1}\n  adapters: [{port: 2}]\ncomponent: {type: model, task: text-generation, "
         "model: ./b, action: {text: x}}\n",
         "3: controller: there are 'adapter' and 'adapters'; this version serves one, so keep one of the two"),
        ("workflow: {}\n", "1: there is no component; add one, for example {type: model, task: text-generation, …}"),
    ],
)  # fmt: skip
def test_ids_and_defaults(write: Write, yaml: str, expected: str) -> None:
    assert told_of(write, yaml).startswith(f"{FILE}:{expected}")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("true", "true"), (".nan", "nan"), (".inf", "inf"), ("-.inf", "-inf"), ("heavy", "'heavy'"), ("[1]", "a list"),
        ("{a: 1}", "a mapping"), ("", "null"), ("1e999", "inf"),
    ],
)  # fmt: skip
def test_weight_that_is_no_number(message: Message, written: str, shown: str) -> None:
    problem = f"a weight must be a finite number, not {shown}"
    assert message("weight: 0.7", f"weight: {written}") == f"{FILE}:14: component.peft_adapters.0.weight: {problem}"
    assert message("{alpaca: 2.0}", f"{{alpaca: {written}}}") == f"{FILE}:17: component.blends.strong.alpaca: {problem}"


@given(weight=st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_weight_loads_as_number_and_as_text(
    tmp_path_factory: pytest.TempPathFactory, weight: float
) -> None:
    path = tmp_path_factory.mktemp("weights") / FILE
    for written in ('"${env.W}"', repr(str(weight))):
        path.write_text(YAML.replace("weight: 0.7", f"weight: {written}"))
        component: Any = load([path], {"W": repr(weight)}).config.component
        assert component.peft_adapters[0].weight == weight


def test_weight_from_the_input_is_refused_with_the_way_to_do_it(message: Message) -> None:
    assert message("weight: 0.7", 'weight: "${input.w}"') == (
        f"{FILE}:14: component.peft_adapters.0.weight: a weight in the file is a number or ${{env.NAME}}, not "
        f"'${{input.w}}'; for weights that come with a request, set the action's `blend`"
    )


NOT_YET = [
    (JOB, JOB + "    retry: 3\n", "8: workflow.job: 'retry'"),
    (JOB, JOB + "    hook: {before: x}\n", "8: workflow.job: 'hook'"),
    ("component:\n", "listeners: [{type: http-callback}]\ncomponent:\n", "8: 'listeners'"),
    ("component:\n", "gateway: {type: x}\ncomponent:\n", "8: 'gateway'"),
    ("workflow:\n", "  queue: {driver: redis}\nworkflow:\n", "3: controller: 'queue'"),
    ("base_path: /api", "base_path: /api, websocket: true", "2: controller.adapter: 'websocket'"),
    ("do_sample: false", "num_beams: 4", "23: component.action.params: 'num_beams'"),
    ("do_sample: false", "early_stopping: false", "23: component.action.params: 'early_stopping'"),
    ("do_sample: false", 'length_penalty: "${input.penalty}"', "23: component.action.params: 'length_penalty'"),
]


@pytest.mark.parametrize(("old", "new", "expected"), NOT_YET, ids=[case[2] for case in NOT_YET])
def test_what_the_dialect_has_and_this_version_has_not_is_refused_by_name(
    message: Message, old: str, new: str, expected: str
) -> None:
    assert message(old, new) == f"{FILE}:{expected} is not supported in this version; leave it out"


def test_what_has_no_effect_at_its_default_loads(read: Callable[..., ComposeFile]) -> None:
    beams = "num_beams: 1, early_stopping: true, length_penalty: 1.0, do_sample: false"
    read(YAML.replace("do_sample: false", beams).replace(JOB, JOB + "    retry: 1\n    max_run_count: 25\n"))


@pytest.mark.parametrize("key", ["on_demand: true", "preload: false", "fast_tokenizer: false"])
def test_what_the_driver_cannot_honour_is_refused_by_name(message: Message, key: str) -> None:
    told = message("  precision: float32", f"  {key}")
    assert told.startswith(f"{FILE}:12: component: driver huggingface cannot honour '{key.split(':')[0]}': ")


EXPRESSIONS = [
    (
        "${input prompt}",
        "'${input prompt}' is not an expression; expected ${name.path as type | default @(description …)}",
    ),
    ('"${input.prompt"', "'${input.prompt' has no closing brace"),
    ("${input.prompt as int}", "${input.prompt as int}: unknown type 'int'; did you mean 'integer'?"),
    ("${input.prompt as txt}", "${input.prompt as txt}: unknown type 'txt'; did you mean 'text'?"),
    ("${a | ${input.b as float}}", "${input.b as float}: unknown type 'float'; did you mean 'number'?"),
    (
        "${input.n as integer | abc}",
        "the default does not fit the type: ${input.n as integer | abc}: 'abc' is not an int",
    ),
    (
        "${input.n as slider/0,2}",
        "${input.n as slider/0,2}: a slider's numbers are minimum,maximum,step: as slider/0,2,0.1",
    ),
    ("${input.n as select}", "${input.n as select}: a select needs its options: as select/first,second"),
]


@pytest.mark.parametrize(("written", "expected"), EXPRESSIONS, ids=[case[0] for case in EXPRESSIONS])
def test_mistakes_in_expressions(message: Message, written: str, expected: str) -> None:
    assert message("${input.prompt as text}", written).startswith(f"{FILE}:20: component.action.text: {expected}")


def test_unknown_type_in_an_output(message: Message) -> None:
    assert message('"${output}"', '"${output as sse-text}"') == (
        f"{FILE}:7: workflow.job.output.generated: ${{output as sse-text}}: unknown type 'sse-text'; did you mean 'text'?"
    )


@pytest.mark.parametrize(
    ("written", "operator"),
    [
        ('{"+": ["${output}", b]}', "+"),
        ('{"...": "${output}"}', "..."),
        ('["...${output}"]', "..."),
        ('{"?": {}}', "?"),
    ],
)
def test_structural_operators_are_refused_with_their_place(message: Message, written: str, operator: str) -> None:
    assert message('{generated: "${output}"}', written) == (
        f"{FILE}:7: workflow.job.output: the structural operator '{operator}' is not supported in this version; "
        "leave it out"
    )


def test_every_problem_is_told_at_once(message: Message) -> None:
    told = message("workflow:\n  title: Tiny", "workflow:\n  titel: Tiny").splitlines()
    assert len(told) == 1
    told = message(
        "port: 0, base_path: /api}\nworkflow:\n  title: Tiny", "port: x}\nworkflow:\n  titel: y"
    ).splitlines()
    assert [line.split(" ")[0] for line in told] == [f"{FILE}:2:", f"{FILE}:4:"]


WITH_CONTROLLER = "controller: {}\ncomponent: {{type: model, task: text-generation, model: x, action: {{text: y}}}}\n"


@pytest.mark.parametrize(
    ("controller", "line", "port"),
    [
        ("{adapter: {type: http-server}, webui: {port: 8080}}", 1, 8080),
        ("{adapter: {type: http-server, port: 8081},\n  webui: {}}", 2, 8081),
        ("{type: http-server, port: 9000, host: 127.0.0.1,\n  webui: {port: 9000, host: localhost}}", 2, 9000),
        ("{type: http-server, port: 9000, webui: {host: 0.0.0.0,\n  port: 9000}}", 2, 9000),
        ("{type: http-server, port: 9000, host: '::', webui: {host: '::1', port: 9000}}", 1, 9000),
    ],
)
def test_api_and_page_on_one_port(write: Write, controller: str, line: int, port: int) -> None:
    assert told_of(write, WITH_CONTROLLER.format(controller)) == (
        f"{FILE}:{line}: the API and the page would both listen on port {port}; give one of them another port"
    )


@pytest.mark.parametrize(
    "controller",
    [
        "{type: http-server, port: 0, webui: {port: 0}}",
        "{type: http-server, port: 9000, webui: {port: 9000, host: 127.0.0.2}}",
        "{type: http-server, port: 9000, host: 0.0.0.0, webui: {port: 9000, host: '::1'}}",
        "{webui: {port: 8080}}",
    ],
)
def test_api_and_page_on_free_ports_or_other_addresses(read: Callable[..., ComposeFile], controller: str) -> None:
    assert read(WITH_CONTROLLER.format(controller)).config.serving.webui is not None


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("", ": the file is empty; it needs at least a component, see `model-compose schema`"),
        ("# only a comment\n", ": the file is empty; it needs at least a component, see `model-compose schema`"),
        ("\n- a\n", ":2: expected a mapping with component, workflow, controller"),
        ("hello\n", ":1: expected a mapping with component, workflow, controller"),
        ("component: {type: model\nfoo: bar\n", ":2: invalid YAML: did not find expected ',' or '}'"),
        ("component:\n\ttype: model\n", ":2: invalid YAML: found character that cannot start any token; a tab cannot "
         "indent YAML, use spaces"),
        ("component: {}\n---\ncomponent: {}\n", ":2: invalid YAML: a second document starts here (---); one file "
         "holds one"),
        ("workflow:\n  job: {output: {generated: ${output}}}\n", ":2: invalid YAML: did not find expected ',' or '}'; "
         'inside {…} an expression stands in quotes: {generated: "${output}"}'),
        ("component:\n  type: model\n   task: x\n", ":3: invalid YAML: mapping values are not allowed in this context; "
         "check the indentation of this line, or quote a value that holds ': '"),
        ("workflow: {}\ncontroller:\n  name: a: b\n", ":3: invalid YAML: mapping values are not allowed in this context; "
         "check the indentation of this line, or quote a value that holds ': '"),
        ("component: *base\n", ":1: invalid YAML: found undefined alias"),
        ("a: 1\nb: \a\n", ":2: a character (code 0x07) cannot stand in YAML"),
        ("component: &a\n  options: *a\n", ":1: an anchor cannot contain its own alias"),
        ("component: !include base.yml\n", ":1: the tag !include is not supported; write the value without it"),
        ("component: {a: !!python/name:os.system x}\n", ":1: the tag !!python/name:os.system is not supported; write"),
        ("component:\n  ? [a]\n  : b\n", ":2: a key must be text"),
        ("component:\n  model: a\n  model: b\n", ":3: this mapping has the key 'model' twice; remove one of them"),
    ],
)  # fmt: skip
def test_files_that_are_not_the_yaml_we_expect(write: Write, yaml: str, expected: str) -> None:
    assert told_of(write, yaml).startswith(FILE + expected)


def test_file_that_is_not_text(write: Write) -> None:
    (path,) = write("")
    path.write_bytes(b"title: \xff\n")
    with pytest.raises(ConfigError, match=r"model-compose.yml: is not UTF-8 text \(invalid start byte at byte 7\)"):
        load([path], {})


def test_byte_order_mark_is_no_part_of_the_file(read: Callable[..., ComposeFile]) -> None:
    assert read("\ufeff" + YAML).config == read(YAML).config


def test_duplicate_key_is_found_in_a_file_that_is_merged(write: Write) -> None:
    files = write(YAML.replace("  precision:", "  model: ./x\n  precision:"), over="workflow: {title: Other}")
    with pytest.raises(ConfigError, match=f"{FILE}:12: this mapping has the key 'model' twice; remove one of them"):
        load(files, {})


def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_files()
    assert str(caught.value) == (
        f"no model-compose.yml or model-compose.yaml in {tmp_path}; go to its folder, or name it with -f FILE"
    )
    with pytest.raises(ConfigError, match=r"^other\.yml: there is no such file$"):
        find_files([Path("other.yml")])
    with pytest.raises(ConfigError, match="is a folder; name the file in it"):
        find_files([tmp_path])
    (tmp_path / "model-compose.yaml").touch()
    assert find_files() == (tmp_path / "model-compose.yaml",)
    (tmp_path / "model-compose.yml").touch()
    assert find_files() == (tmp_path / "model-compose.yml",)


# The environment.


def test_unset_variable_names_it_and_the_ways_to_set_it(message: Message) -> None:
    assert message("weight: 0.7", 'weight: "${env.W}"') == (
        f"{FILE}:14: component.peft_adapters.0.weight: the environment variable W is not set; set it, use --env-file or "
        "-e W=…, or write a default: ${env.W | …}"
    )


@pytest.mark.parametrize("keys", ["${env.KEY}", '"${env.KEY}"', "\n      - ${env.KEY}", "\n      - '${env.KEY}'"])
@pytest.mark.parametrize("value", [None, "", " "])
def test_api_key_that_is_not_set_never_leaves_the_door_open(write: Write, keys: str, value: str | None) -> None:
    yaml = YAML.replace("{type: http-server, port: 0, base_path: /api}", f"\n    port: 0\n    api_keys: {keys}")
    with pytest.raises(ConfigError, match="the server refuses to start") as caught:
        load(write(yaml), {} if value is None else {"KEY": value})
    assert ("the environment variable KEY is not set; the API key would be missing" in str(caught.value)) == (
        value is None
    )


@pytest.mark.parametrize("keys", ["null", "", "[]", '[""]', "[7]"])
def test_api_keys_that_hold_none_are_refused(message: Message, keys: str) -> None:
    told = message("base_path: /api", f"base_path: /api, api_keys: {keys}")
    assert told.startswith(f"{FILE}:2: controller.adapter.api_keys: api_keys must be a list of ")


@pytest.mark.parametrize(("value", "expected"), [("12345", ["12345"]), ("a,b", ["a", "b"]), ("true", ["true"])])
def test_api_keys_from_the_environment_stay_text(
    read: Callable[..., ComposeFile], value: str, expected: list[str]
) -> None:
    yaml = YAML.replace("{type: http-server, port: 0, base_path: /api}", "\n    api_keys: ${env.KEY}")
    server = read(yaml, KEY=value).config.serving.server
    assert server is not None
    assert [key.get_secret_value() for key in server.api_keys or ()] == expected


def test_unset_token_is_no_token(read: Callable[..., ComposeFile]) -> None:
    def token(written: str, **env: str) -> Any:
        yaml = YAML.replace("model: ./base", f"model:\n    repository: a/b\n    token: {written}")
        component: Any = read(yaml, **env).config.component
        return component.model.token

    for written in ("${env.HF}", '"${env.HF}"'):
        assert token(written) is None
        assert token(written, HF="123").get_secret_value() == "123"


SECRET = "hunter2-9f8e7d"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_path: /api", f"base_path: /api, api_keys: [[{SECRET}]]"),
        ("base_path: /api", f"base_path: /api, api_keys: {{a: {SECRET}}}"),
        ("base_path: /api", f"base_path: /api, callback_secret: [{SECRET}]"),
        ("base_path: /api", "base_path: /api, api_keys: ['${env.SECRET} ']"),
        ("model: ./base", f"model: {{repository: a/b, tokn: {SECRET}}}"),
        ("model: ./base", f"model: {{repository: a/b, token: {{a: {SECRET}}}}}"),
        ("model: ./base", f"model: [{{repository: a/b, token: {SECRET}}}]"),
        ("precision: float32", f"driver: vllm\n  options: {{base_url: http://a, api_key: [{SECRET}]}}"),
        ("precision: float32", "driver: vllm\n  options: {base_url: http://a, api_key: 55512345}"),
        ("precision: float32", f"driver: llamacpp\n  options: {{server: s, env: {{A: [{SECRET}], B: {SECRET}}}}}"),
        ("precision: float32", "driver: vllm\n  options: {env: {TOKEN: 55512345}}"),
        ("port: 0", "port: '${env.SECRET as integer}'"),
    ],
)
def test_no_secret_in_a_message(message: Message, old: str, new: str) -> None:
    told = message(old, new, SECRET=SECRET)
    assert SECRET not in told
    assert "55512345" not in told


@pytest.mark.parametrize("options", ["base_url: http://a\n    api_key: ${env.S}", "env:\n      S: ${env.S}"])
def test_a_secret_of_a_drivers_options_stays_text(read: Callable[..., ComposeFile], options: str) -> None:
    yaml = YAML.replace("precision: float32", f"driver: vllm\n  options:\n    {options}")
    component: Any = read(yaml, S="007").config.component
    own = component.options
    assert (own.api_key.get_secret_value() if own.api_key else own.env["S"]) == "007"


def test_pair_without_a_name_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"^-e =…: expected NAME=VALUE$"):
        environment((), [f"={SECRET}"])


@pytest.mark.parametrize(
    ("written", "value", "expected"),
    [
        ("${env.X}", "12", 12),
        ('"${env.X}"', "12", "12"),
        ("${env.X}", "true", True),
        ("'${env.X}'", "true", "true"),
        ("${env.X}", "1.5", 1.5),
        ("${env.X}", "a: b # c", "a: b # c"),
        ("${env.X}", "[1, 2]", "[1, 2]"),
        ("${env.X | two words}", None, "two words"),
        ("${env.X | 8}", None, 8),
        ("'${env.X | 8}'", None, "8"),
        ("'${env.X as integer | 8}'", None, 8),
        ("'${env.X as integer | 8}'", "9", 9),
        ("a-${env.X}-b", "12", "a-12-b"),
        ("${env.A | ${env.B | last}}", None, "last"),
        ("2024-01-02", None, "2024-01-02"),
    ],
)
def test_variables_are_typed_as_yaml_types_what_stands_there(
    read: Callable[..., ComposeFile], written: str, value: str | None, expected: Any
) -> None:
    yaml = YAML.replace('{generated: "${output}"}', f"\n      x: {written}")
    config = read(yaml, **({} if value is None else {"X": value})).config
    assert config.workflow is not None
    assert config.workflow.job is not None
    found = config.workflow.job.output["x"]
    assert (found, type(found)) == (expected, type(expected))


def test_variable_as_the_default_of_an_input(read: Callable[..., ComposeFile]) -> None:
    def text(written: str, **env: str) -> Any:
        component: Any = read(YAML.replace("${input.prompt as text}", written), **env).config.component
        return component.action.text

    assert text("${input.prompt | ${env.X}}", X="two words") == '${input.prompt | "two words"}'
    assert text("${input.prompt | ${env.X | none}}") == '${input.prompt | "none"}'
    assert text("${env.X | ${input.prompt}}") == "${input.prompt}"
    assert text("${env.X | ${input.prompt}}", X="Hello") == "Hello"
    with pytest.raises(ConfigError, match=r"the default of an expression cannot hold '}' or '@\('"):
        text("${input.prompt | ${env.X}}", X="a}b")


def test_variables_in_comments_are_not_looked_at(read: Callable[..., ComposeFile]) -> None:
    assert read(f"# ${{env.NOPE}} ${{broken\n{YAML}# ${{env.NOPE}}\n").config == read(YAML).config


def test_precedence_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = tmp_path / "one.env", tmp_path / "two.env"
    one.write_text("A=one\nB=one\nC=one\nD=one\n")
    two.write_text("B=two\nC=two\nD=two\n")
    (tmp_path / ".env").write_text("E=dot\nC=dot\n")
    monkeypatch.setenv("C", "process")
    monkeypatch.setenv("D", "process")
    merged = environment([one, two], ["D=pair", "F=a=b"])
    assert [merged[name] for name in "ABCDF"] == ["one", "two", "process", "pair", "a=b"]
    assert "E" not in merged  # ./.env only where no file is named
    assert [environment()[name] for name in "EC"] == ["dot", "process"]


@pytest.mark.parametrize("pair", ["FOO", "=", ""])
def test_pair_that_is_none(pair: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME=VALUE"):
        environment((), [pair])


def test_env_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.env: there is no such file \(--env-file\)"):
        environment([tmp_path / "nope.env"])
    (tmp_path / "bad.env").write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match=r"bad\.env: the file is not UTF-8 text \(--env-file\)"):
        environment([tmp_path / "bad.env"])


# Several files, anchors.


def test_later_files_win_mappings_merge_lists_are_replaced(write: Write) -> None:
    over = (
        "component:\n  precision: bfloat16\n  blends: {strong: {alpaca: 3}, n: {pirate: 1}}\nworkflow: {title: Other}\n"
    )
    config = load(write(YAML, over=over), {}).config
    component: Any = config.component
    assert (component.precision, component.model.path) == ("bfloat16", "./base")
    assert component.blends == {"strong": {"alpaca": 3}, "plain": {}, "n": {"pirate": 1}}
    assert config.workflow is not None
    assert config.workflow.title == "Other"
    one = "component:\n  peft_adapters: [{type: lora, name: alpaca, model: ./other}]\n"
    component = load(write(YAML, over=one), {}).config.component
    assert [adapter.model.path for adapter in component.peft_adapters] == ["./other"]


def test_problem_in_a_later_file_names_that_file(write: Write) -> None:
    with pytest.raises(
        ConfigError, match=r"^over\.yml:2: component: unknown key 'precisoin'; did you mean 'precision'\?$"
    ):
        load(write(YAML, over="component:\n  precisoin: float16\n"), {})


def test_paths_count_from_the_file_that_says_them(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    over = tmp_path / "sub" / "over.yml"
    over.write_text("component:\n  peft_adapters:\n  - {type: lora, name: alpaca, model: ./mine}\n"
                    "  - {type: lora, name: b, model: {path: ../theirs}}\n"
                    "  - {type: lora, name: c, model: {package: p, version: '1', path: x/y}}\n"
                    "  - {type: lora, name: d, model: /absolute}\n  - {type: lora, name: e, model: org/hub}\n")  # fmt: skip
    loaded = load([*write(YAML), over], {})
    component: Any = loaded.config.component
    assert loaded.base_dir == tmp_path
    assert component.model.path == "./base"
    alpaca, b, c, d, e = (adapter.model for adapter in component.peft_adapters)
    assert (tmp_path / alpaca.path).resolve() == tmp_path / "sub" / "mine"
    assert (tmp_path / b.path).resolve() == tmp_path / "theirs"
    assert (c.path, d.path, e.repository) == ("x/y", "/absolute", "org/hub")


PATHS = {
    "a later file's path": "component: {model: ../base}\n",
    "of a base's mapping": "component: {model: {path: ../base}}\n",
    "of a folder without ./": "component: {model: {path: base}}\n",
    "the folder itself": "component: {model: .}\n",
    "of the Hub's cache": "component: {model: {repository: a/b, cache_dir: cache}}\n",
    "of an adapter's cache": "component: {peft_adapters: [{type: lora, model: {repository: a/b, cache_dir: ./x}}]}\n",
    "of llama-server": "component: {driver: llamacpp, precision: auto, options: {server: ./bin/llama-server}}\n",
    "of an interpreter": "component: {driver: vllm, options: {python: env/bin/python}}\n",
    "of a shared folder": "component: {driver: vllm, precision: auto, options: {base_url: http://a, adapter_folder: b}}\n",
    "of runtime adapters": "component: {allow_runtime_adapters: true, runtime_adapter_sources: [./x, ../y, .]}\n",
    "of one folder of runtime adapters": "component: {allow_runtime_adapters: true, runtime_adapter_sources: ./x}\n",
}


def texts(value: Any) -> list[str]:
    """Every text of a value that was dumped."""
    if isinstance(value, dict | list | tuple):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("over", PATHS.values(), ids=PATHS)
def test_every_path_of_a_later_file_counts_from_its_own_folder(write: Write, tmp_path: Path, over: str) -> None:
    """A file in sub/ means what the same text means in the first file's folder, with sub/ in front of each path."""
    yaml = YAML[: YAML.index("  blends:")] + YAML[YAML.index("  action:") :]
    alone = load(write(yaml, beside=over), {}).config.model_dump()
    (tmp_path / "sub").mkdir()
    there = tmp_path / "sub" / "over.yml"
    there.write_text(over)
    loaded = load([*write(yaml), there], {})
    pairs = list(zip(texts(alone), texts(loaded.config.model_dump()), strict=True))
    moved = [(before, after) for before, after in pairs if before != after]
    assert len(moved) == (3 if "[" in over and "runtime" in over else 1), moved
    for before, after in moved:
        assert (tmp_path / after).resolve() == (tmp_path / "sub" / before).resolve()


def test_what_is_no_path_stays_as_it_is_written_in_a_later_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    there = tmp_path / "sub" / "over.yml"
    there.write_text(
        "workflow: {job: {input: {prompt: x, model: ./m, path: ./p}}}\n"
        "component: {driver: vllm, options: {python: '${env.PYTHON}'}, allow_runtime_adapters: true,\n"
        "  runtime_adapter_sources: [org/name, 'org/*', /a, ~/b], model: {package: p, version: '1', path: x/y}}\n"
    )
    config: Any = load([*write(YAML), there], {"PYTHON": "venv/bin/python"}).config
    assert config.workflow.job.input == {"prompt": "x", "model": "./m", "path": "./p"}
    assert config.component.options.python == "venv/bin/python", "a variable's value counts from the first file"
    assert config.component.runtime_adapter_sources == ("org/name", "org/*", "/a", "~/b")
    assert config.component.model.path == "x/y"


def test_a_server_that_is_looked_for_in_path_is_no_path(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    there = tmp_path / "sub" / "over.yml"
    there.write_text("component: {driver: llamacpp, precision: auto, options: {server: llama-server}}\n")
    config: Any = load([*write(YAML), there], {}).config
    assert config.component.options.server == "llama-server"


def test_the_driver_of_one_file_decides_for_the_options_of_another(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    there = tmp_path / "sub" / "over.yml"
    there.write_text("component: {options: {python: ./p}}\n")
    config: Any = load([*write(YAML.replace("  precision: float32", "  driver: vllm")), there], {}).config
    assert (tmp_path / config.component.options.python).resolve() == tmp_path / "sub" / "p"


def test_anchors_and_merge_keys(read: Callable[..., ComposeFile]) -> None:
    yaml = YAML.replace("{type: lora, name: alpaca, model: ./alpaca, weight: 0.7}",
                        "&first {type: lora, name: alpaca, model: ./alpaca, weight: 0.7, precision: float16}")  # fmt: skip
    yaml = yaml.replace("{type: lora, name: pirate, model: ./pirate, weight: 0.8}", "{<<: *first, name: pirate}")
    component: Any = read(yaml).config.component
    assert [(a.name, a.weight, a.precision) for a in component.peft_adapters] == [
        ("alpaca", 0.7, "float16"), ("pirate", 0.7, "float16"),
    ]  # fmt: skip


def test_merging_into_an_anchored_mapping_leaves_its_other_places_alone(write: Write) -> None:
    yaml = (
        "components:\n- {id: a, type: model, task: text-generation, model: ./b, action: {text: x}, default: true}\n"
        "workflows: []\n"
        "workflow: {job: {input: &in {prompt: one}, output: *in}}\n"
    )
    config = load(write(yaml, over="workflow: {job: {input: {prompt: two}}}\n"), {}).config
    assert config.workflow is not None
    assert config.workflow.job is not None
    assert (config.workflow.job.input, config.workflow.job.output) == ({"prompt": "two"}, {"prompt": "one"})


# YAML 1.1 types more than JSON does, and changes what was written.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("012", "10"), ("-012", "-10"), ("1:30", "90"), ("1_000", "1000"), ("0x1F", "31"), ("0b11", "3"), ("1_0.5", "10.5"),
        ("'012'", "10"), ("190:20:30.15", "685230.15"),
    ],
)  # fmt: skip
def test_a_weight_that_yaml_1_1_would_rewrite_is_refused_with_its_decimal(
    message: Message, written: str, meant: str
) -> None:
    plain = written.strip("'")
    assert message("weight: 0.7", f"weight: {written}") == (
        f"model-compose.yml:14: component.peft_adapters.0.weight: a weight must be a finite number, not '{plain}'; "
        f"YAML 1.1 reads it as {meant}: write {meant} if you mean that"
    )


@pytest.mark.parametrize(
    ("written", "weight"),
    [
        ("1e3", 1000.0),
        ("1.5e3", 1500.0),
        ("1E-2", 0.01),
        (".5", 0.5),
        ("+.5", 0.5),
        ("5.", 5.0),
        ("1.10", 1.1),
        ("-0", 0),
    ],
)
def test_decimals_are_weights_however_they_are_written(
    read: Callable[..., ComposeFile], written: str, weight: float
) -> None:
    component: Any = read(YAML.replace("weight: 0.7", f"weight: {written}")).config.component
    assert component.peft_adapters[0].weight == weight


@pytest.mark.parametrize(
    ("old", "new", "advice"),
    [
        ("weight: 0.7", "weight: 0,7", ":14: in {…} a comma ends the value; write 0.7"),
        ("weight: 0.7", "weight: -0,75", ":14: in {…} a comma ends the value; write -0.75"),
        ("weight: 0.7", "weight: '0,7'", "must be a finite number, not '0,7'; write 0.7"),
        ("do_sample: false", "temperature: 0,7", "in {…} a comma ends the value; write 0.7"),
        (
            "    params: {do_sample: false}",
            "    params:\n      temperature: 0,7",
            "expected a number, not '0,7'; write 0.7",
        ),
        ("strong: {alpaca: 2.0}", "strong:\n      alpaca: 2,5", "must be a finite number, not '2,5'; write 2.5"),
    ],
)
def test_a_decimal_comma_is_told(message: Message, old: str, new: str, advice: str) -> None:
    assert message(old, new).endswith(advice)


def test_a_comma_between_two_keys_is_none_of_a_decimal(message: Message) -> None:
    assert "names the unknown adapter '7'" in message("plain: {}", "plain: {alpaca: 0,'7': 1}")


@pytest.mark.parametrize(
    "written",
    ["no", "on", "y", "012", "1:30", "1_000", "0x1F", "2024-01-01", "e3", "1e", "1e3.5", "0123456", "=", "<<"],
)
def test_text_stays_as_it_is_written(read: Callable[..., ComposeFile], written: str) -> None:
    text = YAML.replace("text: ${input.prompt as text}", f"text: {written}").replace("title: Tiny", f"title: {written}")
    config: Any = read(text).config
    assert (config.component.action.text, config.workflow.title) == (written, written)
    filled: Any = read(text.replace(f": {written}\n", ": ${env.X}\n"), X=written).config
    assert filled.workflow.title == written


@pytest.mark.parametrize(
    ("written", "number"), [("1e-3", 0.001), ("1.5e3", 1500.0), ("-2E+1", -20.0), (".5e1", 5.0), ("1.e2", 100.0)]
)
def test_an_exponent_makes_a_number_wherever_it_stands(
    read: Callable[..., ComposeFile], written: str, number: float
) -> None:
    schema = f"response_format: {{type: json_schema, json_schema: {{schema: {{minimum: {written}}}}}}}"
    config: Any = read(YAML.replace("params: {do_sample: false}", schema)).config
    assert config.component.action.response_format.json_schema.schema_ == {"minimum": number}


@pytest.mark.parametrize(
    ("written", "meant"), [("yes", True), ("on", True), ("no", False), ("OFF", False), ("True", True)]
)
def test_what_is_true_or_false_takes_yamls_words(read: Callable[..., ComposeFile], written: str, meant: bool) -> None:
    component: Any = read(YAML.replace("do_sample: false", f"do_sample: {written}")).config.component
    assert component.action.params.do_sample is meant
    read(YAML.replace("controller:\n", "controller:\n  threaded: No\n"))


@pytest.mark.parametrize(("written", "port"), [("08080", 8080), ("8080", 8080), ("8_080", 8080)])
def test_other_numbers_are_what_a_person_reads(read: Callable[..., ComposeFile], written: str, port: int) -> None:
    server: Any = read(YAML.replace("port: 0", f"port: {written}")).config.serving.server
    assert server.port == port


@pytest.mark.parametrize("tagged", ["!!int 012", "!!int 1:30", "!!bool yes", "!!float 1_000"])
def test_a_tag_does_not_bring_yaml_1_1_back(message: Message, tagged: str) -> None:
    assert "does not fit the tag" in message("weight: 0.7", f"weight: {tagged}")
