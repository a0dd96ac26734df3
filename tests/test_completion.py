"""The shell's completion, asked as bash asks: a process with the words so far, which answers a line for each proposal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model_compose import templates
from tests import tiny
from tests.test_cli import SOURCE, state
from tests.waiting import SECONDS

__all__ = ["state"]

# Names what was imported in vain, after the proposals. sys.argv[0] is how the program is called.
SCRIPT = """
import atexit, sys
heavy = {'torch', 'transformers', 'numpy', 'httpx', 'fastapi', 'huggingface_hub', 'model_compose.config'}
atexit.register(lambda: print(*sorted(heavy & set(sys.modules)), file=sys.stderr))
sys.argv[0] = 'model-compose'
from model_compose.cli import execute
sys.exit(execute(sys.argv[1:]))
"""


def proposals(words: str, cwd: Path) -> list[str]:
    """What completes the last of the words, which may be empty."""
    line = words.split(" ")
    env = {**os.environ, "_MODEL_COMPOSE_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(line)}
    env |= {"COMP_CWORD": str(len(line) - 1), "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=cwd, env=env, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.stderr == "\n"
    return done.stdout.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model-compose.yml").write_text(tiny.YAML.replace("Tiny", "Tiny\n  id: write"), encoding="utf-8")
    (tmp_path / "other.yml").write_text(
        "components: [{id: one, peft_adapters: [{name: nautic}, {model: x}], blends: {night: {}}}, {id: two}]\n"
        "workflows: [{id: draft}, {id: polish}, {}]\n"
    )
    (tmp_path / "broken.yml").write_text("component: {blends: [")
    (tmp_path / "odd.yml").write_text("component: [1]\ncomponents: {a: 1}\nworkflow: 3\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("model-compose s", ["status", "schema", "setup"]),
        ("model-compose run --st", ["--stream"]),
        ("model-compose init ", templates.names()),
        ("model-compose init ch", ["chat"]),
        ("model-compose run --blend ", ["strong", "plain", "alpaca", "pirate"]),
        ("model-compose run -b p", ["plain", "pirate"]),
        ("model-compose export --blend st", ["strong"]),
        ("model-compose run -f other.yml -b n", ["night", "nautic"]),
        ("model-compose -f other.yml run -b n", ["night", "nautic"]),
        ("model-compose -f model-compose.yml run -f other.yml -b n", ["night", "nautic"]),
        ("model-compose run ", ["write"]),
        ("model-compose -f other.yml run ", ["draft", "polish"]),
        ("model-compose -f other.yml export --component ", ["one", "two"]),
        ("model-compose adapters inspect ", ["alpaca", "pirate"]),
        ("model-compose run -f broken.yml -b ", []),
        ("model-compose run -f odd.yml -b ", []),
        ("model-compose run -f nowhere.yml -b ", []),
    ],
)
def test_what_is_proposed_and_that_nothing_heavy_is_imported(folder: Path, words: str, expected: list[str]) -> None:
    assert proposals(words, folder) == expected


def test_a_folder_without_a_file_has_nothing_to_propose(tmp_path: Path) -> None:
    assert proposals("model-compose run -b ", tmp_path) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_the_program_and_its_variable(shell: str, tmp_path: Path) -> None:
    program = tmp_path / "model-compose"
    program.write_text(f"#!{sys.executable}\nfrom model_compose.cli import main\nmain()\n")
    program.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [program, "--show-completion", shell], env=env, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert f"_MODEL_COMPOSE_COMPLETE=complete_{shell}" in done.stdout
    assert "model-compose" in done.stdout
