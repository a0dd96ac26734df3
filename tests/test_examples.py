"""Every example loads and runs, the quickstart on its real weights; every YAML block of the documents is valid."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_compose.compose import Compose
from model_compose.errors import SourceError
from model_compose.loading import load
from tests import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/**/model-compose.yml"))
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("examples/**/README*.md"))]


def test_there_are_examples() -> None:
    assert {path.parent.name for path in EXAMPLES} >= {"quickstart", "text-generation-lora"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_it_loads(path: Path) -> None:
    load([path], env={})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_in_documents_is_valid(path: Path, tmp_path: Path) -> None:
    """Whole files are loaded; excerpts (with an ellipsis) are put onto the first example first."""
    excerpt_of = ROOT / "examples/model-tasks/text-generation-lora/model-compose.yml"
    blocks = re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        file = tmp_path / "model-compose.yml"
        file.write_text(block, encoding="utf-8")
        load([excerpt_of, file] if "# …" in block else [file], env={"KEY": "secret"})


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
