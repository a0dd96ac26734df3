"""The command `export`: what it refuses, what is left after an interrupt, and how much memory it takes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model_compose.cli import app
from model_compose.commands.options import parse_blend
from model_compose.errors import InputError
from model_compose.export.destination import atomic, check_free
from tests import tiny
from tests.test_cli import SOURCE, called, cli, start, state  # noqa: F401 - every test here uses the fixture `state`
from tests.waiting import SECONDS


@pytest.fixture
def folder(project: Path, tmp_path: Path) -> Path:
    """An empty folder to export to, since `project` is shared between tests."""
    path = tmp_path / "exports"
    path.mkdir()
    return path


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_stdout_has_only_the_path_of_the_result(project: Path, folder: Path) -> None:
    code, out, err = cli("export", "--format", "merged", "-o", "merged", "-f", str(project), cwd=folder)
    assert (code, out, err) == (0, "merged\n", "")
    assert [path.name for path in folder.iterdir()] == ["merged"]


def test_empty_folder_may_be_the_destination(project: Path, folder: Path) -> None:
    (folder / "adapter").mkdir()
    order = ("--format", "peft", "--blend", "alpaca=0.5,pirate=1", "--output", "adapter")
    assert called("export", *order, "-f", str(project), cwd=folder)[0] == 0
    assert load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--format", "zip"), "known: peft, merged, gguf, gguf-merged"),
        (("--format", "peft", "--blend", "alpacca"), "did you mean 'alpaca'?"),
        (("--format", "peft", "--blend", '{"alpacca": 1}'), "did you mean 'alpaca'?"),
        (("--format", "peft", "--blend", "{"), "--blend is not valid JSON"),
        (("--format", "peft", "--blend", "plain"), "nothing to write"),
        (("--format", "peft", "--shard-size", "1GB"), "--format peft is not sharded"),
        (("--format", "merged", "--shard-size", "0"), "not a size"),
        (("--format", "merged", "--precision", "int8"), "float32, float16, bfloat16"),
        (("--format", "merged", "--component", "other"), "unknown model 'other'; known: default"),
        (("--format", "gguf"), "must end with .gguf"),
        (("--format", "gguf-merged", "-o", "x.gguf"), "convert_hf_to_gguf.py"),
        (("--format", "merged", "-o", "no/where"), "make it first"),
        (("--format", "merged", "-o", "."), "is not empty"),
    ],
)
def test_wrong_order_is_refused(
    project: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "here").touch()
    output = () if "-o" in arguments else ("-o", "out")
    with pytest.raises(InputError, match=re.escape(complaint)):
        app(["export", *arguments, *output, "-f", str(project)], standalone_mode=False)
    assert [path.name for path in folder.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ("captain", "captain"),
        ('{"a": 0.7}', {"a": 0.7}),
        ("a=0.7, b=-1", {"a": "0.7", "b": "-1"}),
        ("a=b=1", {"a=b": "1"}),
    ],
)
def test_spellings_of_a_blend(given: str | None, meant: Any) -> None:
    assert parse_blend(given) == meant


@pytest.mark.parametrize("given", ["a=0.7,b", "=1", "a="])
def test_a_weight_without_name_or_value_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="NAME=WEIGHT"):
        parse_blend(given)


def test_two_weights_of_one_adapter_are_refused() -> None:
    with pytest.raises(InputError, match=r"^--blend: 'a' has two weights; leave one out$"):
        parse_blend("a=1, a=2")
    with pytest.raises(InputError, match="--blend is not valid JSON: the key 'a' stands in one object twice"):
        parse_blend('{"a": 0.7, "a": 0.5}')


# The destination is complete or absent.


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A project whose export writes hundreds of files."""
    path = tmp_path / "slow"
    path.mkdir()
    yaml_file = tiny.save_project(path)
    tiny.save_base(path / "base", tiny.llama_config(num_hidden_layers=60))
    return yaml_file


def writing(slow: Path, folder: Path, **how: Any) -> "subprocess.Popen[str]":
    """Start an export, and stop it (SIGSTOP) while it writes its files."""
    process = start(
        "export", "--format", "merged", "--shard-size", "1KB", "-o", "out", "-f", str(slow), cwd=folder, **how
    )
    deadline = time.monotonic() + SECONDS
    while not list(folder.glob(".out.partial-*/out/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    assert not (folder / "out").exists()
    return process


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupt_leaves_nothing(slow: Path, folder: Path) -> None:
    with writing(slow, folder) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, err
    assert err.endswith("interrupted\n")
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_kill_leaves_a_hidden_folder_that_the_next_export_removes(slow: Path, project: Path, folder: Path) -> None:
    with writing(slow, folder) as process:
        process.kill()
    assert not (folder / "out").exists()
    assert len(hidden(folder)) == 1
    assert called("export", "--format", "peft", "-o", "out", "-f", str(project), cwd=folder)[0] == 0
    assert [path.name for path in folder.iterdir()] == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="limits")
def test_full_disk_is_one_line_and_leaves_nothing(project: Path, folder: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    order = ("--format", "merged", "-o", "out", "-f", str(project))
    code, out, err = cli("export", *order, cwd=folder, preexec_fn=limit)
    assert (code, out) == (1, "")
    assert "cannot be written (File too large)" in err
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot write")
def test_folder_that_cannot_be_written(project: Path, folder: Path) -> None:
    code, _, err = called("export", "--format", "peft", "-o", "/proc/out", "-f", str(project), cwd=folder)
    assert code == 1
    assert "--output: /proc/out cannot be written" in err


def test_two_exports_to_one_place_do_not_touch_each_others_files(tmp_path: Path) -> None:
    """The one that ends last may take the place only if it is an empty folder by then."""
    with atomic(tmp_path / "out") as first:
        first.mkdir()
        (first / "of the first").touch()
        with atomic(tmp_path / "out") as second:
            second.mkdir()
            (second / "of the second").touch()
        assert first.is_dir()
        assert (tmp_path / "out" / "of the second").is_file()
        (first / "of the first").unlink()
        (tmp_path / "out" / "of the second").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_destination_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def write() -> None:
        with atomic(tmp_path / "out") as path:
            path.write_text("ours")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(InputError, match="exists"):
        write()
    assert (tmp_path / "out").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_larger_than_the_free_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="on another disk"):
        check_free(tmp_path / "out", 10**18)


# Memory.

MEASURED = """
import sys
from pathlib import Path
from benchmarks.load_memory import peak_memory
from model_compose.export import Order, export
from model_compose.loading import load
small, there, large, here = map(Path, sys.argv[1:])
export(load([small]), Order("merged", there))
before = peak_memory()
export(load([large]), Order("merged", here))
print(peak_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_does_not_grow_with_the_model(project: Path, tmp_path: Path) -> None:
    """The large base's MLP is 700 times as wide: 500 MB in 120 tensors of 4 MB. A small export goes first, so that the
    memory of imports does not count."""
    wide, layers = 32_768, 40
    base = tmp_path / "base"
    config = tiny.llama_config(num_hidden_layers=layers, intermediate_size=wide)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: torch.full(tensor.shape, 0.01) for name, tensor in model.state_dict().items()}
    base.mkdir()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    size = (base / "model.safetensors").stat().st_size
    config.save_pretrained(base)
    factors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        path = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        factors |= {f"{path}.lora_A.weight": torch.ones(2, wide), f"{path}.lora_B.weight": torch.ones(32, 2)}
    (tmp_path / "alpaca").mkdir()
    save_file(factors, tmp_path / "alpaca" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (tmp_path / "alpaca" / "adapter_config.json").write_text(json.dumps(adapter))
    del tensors, factors
    yaml_file = tmp_path / "model-compose.yml"
    yaml_file.write_text(tiny.YAML.replace("./pirate", "./alpaca"), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        MEASURED,
        str(project),
        str(tmp_path / "small"),
        str(yaml_file),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=SOURCE.parent, capture_output=True, text=True, check=True)
    assert size > 500e6
    assert (tmp_path / "out" / "model.safetensors").stat().st_size >= size - 10_000
    assert int(done.stdout) < size / 4
