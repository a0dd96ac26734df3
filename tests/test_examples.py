"""Every example loads and runs, the quickstart on its real weights; every YAML block of their READMEs is valid."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model_compose.commands.inputs import read_input
from model_compose.commands.options import parse_blend
from model_compose.compose import Compose
from model_compose.errors import SourceError
from model_compose.loading import load
from model_compose.plan import as_json, parse_memory, plan
from model_compose.servers.answers import RunState
from model_compose.servers.http import RunBody
from tests import tiny
from tests.test_plan import write_llama

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/**/model-compose.yml"))
FIRST = ROOT / "examples/model-tasks/text-generation-lora"
READMES = [FIRST / "README.md", FIRST / "README.zh-cn.md"]
DOCUMENTS = sorted(ROOT.glob("examples/**/README*.md"))


def test_there_are_examples() -> None:
    assert {path.parent.name for path in EXAMPLES} >= {"quickstart", "text-generation-lora"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_it_loads(path: Path) -> None:
    load([path], env={})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_in_documents_is_valid(path: Path, tmp_path: Path) -> None:
    """Whole files are loaded; excerpts (with an ellipsis) are put onto the first example first."""
    for language, block in blocks(path):
        if language == "yaml":
            file = tmp_path / "model-compose.yml"
            file.write_text(block, encoding="utf-8")
            load([FIRST / "model-compose.yml", file] if "# …" in block else [file], env={"KEY": "secret"})


def blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_json_and_python_of_the_first_example_are_what_the_server_gives_and_takes(path: Path) -> None:
    found = blocks(path)
    answers = [RunState.model_validate_json(text) for language, text in found if language == "json"]
    assert [answer.finish_reason for answer in answers] == ["stop"]
    for language, text in found:
        if language == "python":
            compile(text, path.name, "exec")


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_commands_of_the_first_example_are_taken(path: Path) -> None:
    loaded = load([FIRST / "model-compose.yml"], env={})
    compose = Compose(loaded)
    shell = "\n".join(text for language, text in blocks(path) if language == "bash").replace("\\\n", " ")
    commands = [shlex.split(line) for line in shell.splitlines() if line]
    bodies = [words[words.index("-d") + 1] for words in commands if words[0] == "curl"]
    runs = [words for words in commands if words[:2] == ["model-compose", "run"]]
    assert (len(bodies), len(runs)) == (2, 2)
    for text in bodies:
        body = RunBody.model_validate_json(text)
        compose.prepare(body.input, workflow=body.workflow_id, blend=body.blend)
    for words in runs:
        blend = parse_blend(words[words.index("--blend") + 1]) if "--blend" in words else None
        compose.prepare(read_input(words[words.index("--input") + 1], loaded, None), blend=blend)


def test_both_languages_have_the_same_code_links_and_tables() -> None:
    english, chinese = READMES
    assert blocks(english) == blocks(chinese)

    def parts(path: Path) -> tuple[list[str], list[str], list[list[str]]]:
        text = path.read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        headings = re.findall(r"^#+ ", prose, re.MULTILINE)
        rows = [re.findall(r"`[^`]+`|[\d.,]{3,}", line) for line in text.splitlines() if line.startswith("|")]
        return headings, sorted(re.findall(r"<(http[^>]+)>", text)), rows

    assert parts(english) == parts(chinese)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_what_the_first_example_needs_is_what_plan_says(path: Path, tmp_path: Path) -> None:
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| `(cpu|cuda:\d)=", line)
    ]
    assert len(rows) == 6
    for memory, setting, base, tokens in rows:
        written = re.match(r"`(.+?)`", setting)
        options = yaml.safe_load(written[1]) if written else {}
        extra = "\n  ".join(f"{key}: {value}" for key, value in options.items()) or "max_concurrent_count: 1"
        made = as_json(plan(load([write_llama(tmp_path, extra)], {}), parse_memory([memory.strip("`")])))
        needs = made["components"][0]["devices"][0]
        assert f"{needs['kv_tokens']:,}" == tokens
        told = re.findall(r"([\d.]+) GB", base)
        assert (
            told
            == [f"{size / 1e9:.2f}" for size in (needs["base"], needs["loading"], needs["folded"]) if size][: len(told)]
        )


async def test_the_first_example_runs_on_local_folders_of_the_same_formats(tmp_path: Path) -> None:
    """As written, with model and adapters pointed elsewhere: pickled weights and configs of old PEFT among them."""
    base = tiny.save_base(tmp_path / "base")
    for name, rank, targets in (("alpaca", 16, ["q_proj", "k_proj", "v_proj", "o_proj"]), ("assistant", 8, ["q_proj"])):
        folder = tiny.save_adapter(tmp_path / name, base, r=rank, lora_alpha=16, target_modules=targets, std=0.3)
        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
        config = {
            "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
            "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05,
            "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": rank, "target_modules": targets,
            "task_type": "CAUSAL_LM",
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
    over = tmp_path / "local.yml"
    over.write_text(
        f"""
component:
  model: {{provider: local, path: {base}, repository: null, token: null}}
  peft_adapters:
    - {{type: lora, name: alpaca, model: {tmp_path}/alpaca, weight: 0.7}}
    - {{type: lora, name: assistant, model: {tmp_path}/assistant, weight: 0.8}}
""".replace(", repository: null, token: null", "")
    )
    example = (ROOT / "examples/model-tasks/text-generation-lora/model-compose.yml").read_text()
    pointed = re.sub(r"  model:\n    provider: huggingface\n    repository:.*\n    token:.*\n", "", example)
    assert pointed != example
    file = tmp_path / "model-compose.yml"
    file.write_text(pointed)
    async with Compose.open([file, over], env={}) as compose:
        prompt = {"prompt": "Explain quantum computing in simple terms."}
        done = await compose.answer(prompt)
        assert set(done.output) == {"generated"}
        assert done.answers[0].blend.weights == {"alpaca": 0.7, "assistant": 0.8}
        assert not done.output["generated"].startswith(prompt["prompt"])


@pytest.mark.slow
async def test_the_quickstart_shows_what_the_adapters_do() -> None:
    """The real job on real weights: alpaca answers and stops, pirate colours it, the base does neither."""
    path = ROOT / "examples/quickstart/model-compose.yml"
    sys.path.insert(0, str(path.parent))
    from pirate import pirate_words_per_100

    try:
        async with Compose.open(path) as compose:
            runs = {
                name: await compose.answer({"prompt": "What is the capital of France?"}, blend=blend)
                for name, blend in {"base": {}, "alpaca": {"alpaca": 1}, "both": {"alpaca": 1, "pirate": 1}}.items()
            }
    except SourceError as error:
        pytest.skip(f"the package that holds the weights cannot be had: {error}")
    texts = {name: run.output["generated"] for name, run in runs.items()}
    assert "Paris" in texts["alpaca"]
    assert pirate_words_per_100(texts["alpaca"]) == 0
    assert "Paris" in texts["both"]
    assert pirate_words_per_100(texts["both"]) > 10
    assert runs["alpaca"].answers[0].usage.completion_tokens < runs["base"].answers[0].usage.completion_tokens
