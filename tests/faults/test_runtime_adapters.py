"""Adapters that a caller made to break the service: each is refused at once, in a few megabytes, and others are served."""

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.conftest import serving

YAML = tiny.YAML.replace(
    "  blends:\n", "  allow_runtime_adapters: true\n  runtime_adapter_sources: [./loose]\n  blends:\n"
)
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
Change = Callable[[Path, dict[str, Any]], None]
MOST_BYTES = 64 << 20
"""What the largest of these files takes to read, with room to spare: the tensors that they claim take terabytes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    tiny.save_project(folder, YAML)
    tiny.save_adapter(folder / "loose/good", folder / "base", seed=5, std=0.5)
    (folder / "secret").mkdir()
    (folder / "secret/key").write_text("hush")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder / "model-compose.yml") as url:
        yield url


def configured(text: Callable[[dict[str, Any]], str]) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        (folder / "adapter_config.json").write_text(text(config))

    return change


def pickled(**tensors: torch.Tensor) -> Change:
    def change(folder: Path, _: dict[str, Any]) -> None:
        (folder / "adapter_model.safetensors").unlink()
        torch.save(
            {f"{MODULE}.lora_{side}.weight": tensor for side, tensor in tensors.items()}, folder / "adapter_model.bin"
        )

    return change


def linked(place: str, target: str) -> Change:
    def change(folder: Path, _: dict[str, Any]) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).unlink(missing_ok=True)
        (folder / place).symlink_to(target)

    return change


def sparse(folder: Path, _: dict[str, Any]) -> None:
    os.truncate(folder / "adapter_model.safetensors", 1 << 40)


def many(folder: Path, _: dict[str, Any]) -> None:
    for number in range(10_001):
        (folder / f"{number}.json").touch()


def costly(folder: Path, config: dict[str, Any]) -> None:
    """Python's re would look for this pattern until the next ice age."""
    tensors = load_file(folder / "adapter_model.safetensors")
    long = {key.replace("q_proj", "a" * 80): tensor for key, tensor in tensors.items()}
    save_file(long, folder / "adapter_model.safetensors")
    configured(lambda config: json.dumps(config | {"rank_pattern": {"(a|aa)+b": 4}}))(folder, config)


CASES: dict[str, tuple[Change, int, str]] = {
    "config nested 100,000 deep": (
        configured(lambda config: json.dumps(config)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        400, "recursion limit exceeded",
    ),
    "config of r 1,000,000,000": (
        configured(lambda config: json.dumps(config | {"r": 10**9})), 400, "r is 1000000000",
    ),
    "config of 17 MiB": (
        configured(lambda config: json.dumps(config) + " " * (17 << 20)), 400, "larger than 16 MiB",
    ),
    "pattern without end": (costly, 400, "no module"),
    "pickle of a matrix of 4 TB": (
        pickled(A=torch.ones(1).expand(10**6, 10**6), B=torch.ones(32, 4)), 400, "unpacks to more bytes",
    ),
    "weights of 1 TB": (sparse, 400, "of main memory, but only"),
    "weights from a pipe": (linked("adapter_model.safetensors", "/dev/stdin"), 403, "links to files outside"),
    "link out of the folder": (linked("adapter_model.safetensors", "../../secret/key"), 403, "links to files outside"),
    "nested link out": (linked("deep/er/key", "../../../../secret/key"), 403, "links to files outside"),
    "nested folder link out": (linked("deep/er", "../../../secret"), 403, "links to files outside"),
    "nested link to nothing outside": (linked("deep/er", "/nowhere/at/all"), 403, "links to files outside"),
    "link in a circle": (linked("deep/er", "er"), 400, "cannot be read"),
    "10,001 files": (many, 400, "more than 10000 files"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_at_once(url: str, folder: Path, record: Callable[[str, int, str], None], case: str) -> None:
    change, status, words = CASES[case]
    path = folder / "loose" / f"bad{list(CASES).index(case)}"
    path.mkdir()
    for file in (folder / "loose/good").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    change(path, json.loads((path / "adapter_config.json").read_text()))
    body = {"lora_name": "new", "lora_path": f"./loose/{path.name}"}
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    response = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)
    took = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    record(f"load_lora_adapter: {case}", 1, f"{response.status_code} after {took * 1000:.0f} ms, +{grown >> 20} MiB")
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]
    assert "hush" not in response.text
    assert grown < MOST_BYTES
    assert httpx.post(f"{url}/v1/load_lora_adapter", json=body | {"lora_path": "./loose/good"}).status_code == 200
    assert httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
