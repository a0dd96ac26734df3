"""Python code of a model's repository runs where the options of the file's driver say so, whichever driver that is."""

import json
import re
from pathlib import Path

import pytest
import transformers.dynamic_module_utils
from safetensors.torch import load_file

from model_compose.errors import LoadError
from model_compose.export import Order, export
from model_compose.inspection import Inspection, inspect
from model_compose.loading import load
from model_compose.progress import silent
from tests import tiny

CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "tiny-own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

ADVICE = (
    "cannot be loaded as a causal language model: it needs custom code from its own repository; read that code, then set "
    "options.trust_remote_code: true"
)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny project whose base brings its own code. Returns its folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "app"
    tiny.save_project(folder)
    (folder / "base/own.py").write_text(CODE)
    config = folder / "base/config.json"
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "tiny-own", "auto_map": auto}))
    return folder


def write(folder: Path, driver: str, trusted: bool) -> Path:
    path = folder / "model-compose.yml"
    options = f"  driver: {driver}\n  options: {{trust_remote_code: {str(trusted).lower()}}}"
    path.write_text(tiny.YAML.replace("  precision: float32", options))
    return path


def inspected(path: Path) -> Inspection:
    file = load([path], {})
    ((name, options),) = file.config.models
    return inspect(options, {}, file.base_dir, component=name, blend=None, report=silent)


@pytest.mark.parametrize("driver", ["huggingface", "vllm"])
def test_adapters_are_checked_against_a_base_with_its_own_code(own: Path, driver: str) -> None:
    trusted = inspected(write(own, driver, True))
    assert (trusted.unchecked, trusted.problems) == (None, ())
    refused = inspected(write(own, driver, False))
    assert refused.unchecked == f"./base {ADVICE}"


@pytest.mark.parametrize("driver", ["huggingface", "vllm"])
def test_a_blend_over_a_base_with_its_own_code_is_exported(own: Path, driver: str) -> None:
    with pytest.raises(LoadError, match=re.escape(f"./base {ADVICE}")):
        export(load([write(own, driver, False)], {}), Order("peft", own / "out"))
    export(load([write(own, driver, True)], {}), Order("peft", own / "out"))
    assert load_file(own / "out/adapter_model.safetensors")
