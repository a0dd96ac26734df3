"""Errors point at the line of what is wrong, whatever the names and values in the file are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_compose.errors import ConfigError
from model_compose.loading import load

FILE = "model-compose.yml"
Told = Callable[[str], tuple[str, ...]]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the user of a YAML is told, a line for each problem."""
    monkeypatch.chdir(tmp_path)

    def problems(yaml: str) -> tuple[str, ...]:
        (tmp_path / FILE).write_text(yaml, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load([tmp_path / FILE], {})
        return caught.value.problems

    return problems


BLOCKS = """\
controller:
  adapter:
    port: 0
workflows:
  - id: first
    jobs:
      - id: draft
        component: writer
      - id: final
        component: writer
        depends_on:
          - draft
  - id: second
    job:
      component: writer
components:
  - id: writer
    type: model
    task: text-generation
    model: ./base
    peft_adapters:
      - type: lora
        name: ties
        model: ./draft
      - type: lora
        name: it's "b" 'writer'; so
        model: ./final
        weight: 0.5
    blends:
      by weights:
        ties: 0.5
        it's "b" 'writer'; so: 1.0
      m:
        method: ties
        density: 0.5
        weights:
          ties: 0.5
    actions:
      - id: a
        default: true
        text: ${input.prompt}
        blend:
          ties: 0.5
      - id: b
        text: ${input.prompt}
  - id: other
    type: model
    task: chat-completion
    model: ./base
    action:
      messages:
        - role: user
          content: ${input.prompt}
"""
"""One key or item a line. Its names and values stand in it several times, hold quotes, or are words of the schema."""

CULPRITS = {
    "a key twice in different parents": ("        weight: 0.5", "        density: 0.5"),
    "an unknown key that is another's value": ("        default: true", "        writer: true"),
    "a key with quotes": ("        weight: 0.5", "        it's 'id' and 'name': 1"),
    "a key that is a long text": ("    port: 0", f"    ? {'x' * 300}\n    : 1"),
    "a component's id": ("  - id: other", "  - id: writer"),
    "a component's id with a colon": ("  - id: other", "  - id: a:writer"),
    "a second default": ("  - id: other", "    default: true\n  - id: other\n    default: true  # <-"),
    "a workflow's id": ("  - id: second", "  - id: first"),
    "a job's id": ("      - id: final", "      - id: draft"),
    "what a job depends on": ("          - draft", "          - draft\n          - writer  # <-"),
    "a job's component": ("      component: writer", "      component: draft"),
    "the second job's component": (
        "        component: writer\n        depends_on", "        component: nobody  # <-\n        depends_on",
    ),
    "a job's action": ("      component: writer", "      component: writer\n      action: other  # <-"),
    "an action's id": ("      - id: b", "      - id: a"),
    "an adapter's name": ("        name: it's \"b\" 'writer'; so", "        name: ties"),
    "an adapter's name with a colon": ("        name: ties", "        name: 'a: ties'"),
    "an adapter that is called default": ("        name: ties", "        name: default"),
    "a blend's name": ("      m:", "      ties:"),
    "a blend that is called default": ("      m:", "      default:"),
    "a blend's name with a colon": ("      m:", "      'm:m':"),
    "an unknown adapter of a blend": ("        it's \"b\" 'writer'; so: 1.0", "        it's \"b\" 'writer': 1.0"),
    "an unknown adapter of a method": ("          ties: 0.5\n    actions", "          m: 0.5  # <-\n    actions"),
    "a key of a method that is its name": ("        density: 0.5", "        density: 0.5\n        ties: 1  # <-"),
    "a method's wrong value beside its name": (
        "        density: 0.5\n", "        majority_sign_method: ties  # <-\n        density: 0.5\n",
    ),
    "a blend's weight": ("        ties: 0.5\n        it's", "        ties: heavy  # <-\n        it's"),
    "an unknown adapter of an action": ("          ties: 0.5\n      - id", "          tie: 0.5  # <-\n      - id"),
    "a weight of an action": ("          ties: 0.5\n      - id", "          ties: heavy  # <-\n      - id"),
    "a method in an action": ("          ties: 0.5\n      - id", "          method: ties  # <-\n      - id"),
    "a named blend of an action": (
        "        text: ${input.prompt}\n  - id", "        text: x\n        blend: a  # <-\n  - id",
    ),
    "two prompts": ("        text: ${input.prompt}\n  - id", "        text: x  # <-\n        prompt: y\n  - id"),
    "a driver's own option": ("    peft_adapters:", "    options:\n      fold: ties  # <-\n    peft_adapters:"),
    "what the driver cannot honour": ("    peft_adapters:", "    preload: false  # <-\n    peft_adapters:"),
    "a server's option without the server": (
        "    action:\n",
        "    driver: llamacpp\n    options:\n      n_threads: 1\n      env:  # <-\n        a: b\n    action:\n",
    ),
    "an option of a server of one's own": (
        "    action:\n",
        "    driver: vllm\n    options:\n      base_url: http://a\n      env:  # <-\n        a: b\n    action:\n",
    ),
    "vLLM and a device of an adapter": (
        "        weight: 0.5\n", "        weight: 0.5\n        device: cpu  # <-\n", "ties\n        density: 0.5",
        "svd\n        rank: 1", "    task: text-generation", "    task: text-generation\n    driver: vllm",
    ),
    "two blends of full rank": (
        "    actions:\n",
        "      n:  # <-\n        method: ties\n        density: 1\n        weights:\n          ties: 1\n    actions:\n",
    ),
    "sources without runtime adapters": ("    blends:\n", "    runtime_adapter_sources:  # <-\n      - ./\n    blends:\n"),
    "adapter and adapters": ("workflows:", "  adapters:  # <-\n    - port: 1\nworkflows:"),
    "an operator deep in an output": (
        "  - id: second\n", "  - id: second\n    output:\n      a:\n        - b\n        - +: 1  # <-\n",
    ),
    "three dots deep in an output": (
        "  - id: second\n", "  - id: second\n    output:\n      a:\n        - b\n        - ...${input}  # <-\n",
    ),
    "an expression that cannot be parsed": ("          content: ${input.prompt}", "          content: ${input prompt}"),
    "a token that is none": (
        "      - id: b\n",
        "      - id: b\n        params:\n          logit_bias:\n            5: 1\n            b: 1  # <-\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edits", CULPRITS.values(), ids=CULPRITS)
def test_the_line_is_that_of_the_culprit(told: Told, edits: tuple[str, ...]) -> None:
    """edits: texts of BLOCKS, each followed by its replacement. The culprit is marked `# <-`, or is changed."""
    yaml = BLOCKS
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert old in yaml
        yaml = yaml.replace(old, new if "# <-" in "".join(edits) else f"{new}  # <-", 1)
    line = next(number for number, text in enumerate(yaml.splitlines(), 1) if "# <-" in text or len(text) > 300)
    problems = told(yaml)
    assert [text.split(" ")[0] for text in problems] == [f"{FILE}:{line}:"], problems


NAMES = st.text(alphabet="ab'\" ;.", min_size=1) | st.sampled_from(
    ["ties", "weights", "by weights", "name", "blends", "str"]
)


@given(names=st.lists(NAMES, unique=True, min_size=2, max_size=6), data=st.data())
def test_an_unknown_adapter_is_found_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    """Of several blends one names an adapter that there is not. Each weight stands in its own line."""
    unknown, *known = names
    blends = data.draw(st.lists(st.lists(st.sampled_from(known), unique=True), min_size=1, max_size=4))
    wrong = data.draw(st.integers(0, len(blends) - 1))
    lines = ["component:", "  type: model", "  task: text-generation", "  model: ./base", "  action: {text: x}"]
    lines += ["  peft_adapters:", *(f"  - {{type: lora, model: ./a, name: {json.dumps(name)}}}" for name in known)]
    lines.append("  blends:")
    expected = 0
    for number, adapters in enumerate(blends):
        weights = [f"      {json.dumps(name)}: 0.5" for name in adapters]
        if number == wrong:
            place = data.draw(st.integers(0, len(weights)))
            weights.insert(place, f"      {json.dumps(unknown)}: 0.5")
            expected = len(lines) + 2 + place
        lines += [f"    blend {number}:{'' if weights else ' {}'}", *weights]
    path = tmp_path_factory.mktemp("names") / FILE
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load([path], {})
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"{path}:{expected}: component: blend 'blend {wrong}' names the unknown adapter '{unknown}'"
    )
