"""What a release holds: the name to install, the files of the wheel and the sdist, and a wheel that works elsewhere."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = ("*.md", "Makefile", ".ci/*", ".github/**/*", "docs/**/*", "examples/**/*", "benchmarks/**/*", "src/**/*")
BUILT = {"__pycache__", "_build"}
KINDS = {".md", ".rst", ".txt", ".py", ".toml", ".yml", ".yaml", ".html", ".js", ".sh", ""}

# The name.

REQUIREMENT = r"(?<![\w/.-])model[-_]compose(?![\w-])"
"""The name of the other project on the index, as a word of its own: no path, no longer name."""
_REST = r"[^\n|;&`#]*?"
"""Further words of one command."""
INSTALLS = [
    re.compile(rf"\b(?:pipx?|uv|poetry|pdm)\b{_REST}\b(?:install|add|download|wheel|tool run)\b{_REST}{REQUIREMENT}"),
    re.compile(rf"\buvx\s{_REST}{REQUIREMENT}"),
    re.compile(rf"\b(?:version|distribution|metadata|requires)\(\s*['\"]{REQUIREMENT}"),
    re.compile(rf"\b(?:dependencies|requires)\s*=\s*\[[^\]]*?['\"]{REQUIREMENT}"),
]


def texts() -> Iterator[Path]:
    for pattern in TEXTS:
        yield from (p for p in ROOT.glob(pattern) if p.is_file() and p.suffix in KINDS and not BUILT & set(p.parts))


def wrong_installs(text: str) -> list[str]:
    """Where a text installs the other project, or asks for its version."""
    return [found[0] for pattern in INSTALLS for found in pattern.finditer(text)]


def test_no_text_installs_the_other_project_of_this_name() -> None:
    paths = list(texts())
    assert {ROOT / "README.md", ROOT / "src/model_compose/__init__.py", ROOT / "docs/how-to/extend.md"} <= set(paths)
    found = {str(path.relative_to(ROOT)): wrong_installs(path.read_text(encoding="utf-8")) for path in paths}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    "text",
    [
        "pip install 'model-compose[llamacpp]'", "uv pip install -U model-compose", "pipx install model_compose",
        "uvx model-compose up", "uv tool install model-compose==1", 'version("model-compose")',
        'dependencies = ["numpy", "model-compose>=1"]',
    ],
)  # fmt: skip
def test_such_an_install_is_found(text: str) -> None:
    assert len(wrong_installs(text)) == 1
    right = re.sub(REQUIREMENT, "model-compose-lora", text)
    assert wrong_installs(right) == []


@pytest.mark.parametrize(
    "text",
    [
        "`pip install .`, then `model-compose up`",
        "pip install . && model-compose up",
        "pip install ./model-compose/x",
    ],
)
def test_commands_are_no_installs(text: str) -> None:
    assert wrong_installs(text) == []


# The release.


@dataclass(frozen=True)
class Release:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The wheel, made from the sdist, as `make package` does it; by the installed hatchling, so without a network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return Release(next(folder.glob("*.whl")), next(folder.glob("*.tar.gz")))


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints, without anything of this checkout in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_wheel_holds_the_whole_package_and_nothing_else(release: Release) -> None:
    package = ROOT / "src/model_compose"
    folders = os.walk(package, followlinks=True)  # templates/adapters is a link to those of the quickstart
    every = (Path(folder) / name for folder, _, names in folders for name in names)
    files = {path for path in every if "__pycache__" not in path.parts and path.suffix != ".so"}
    with zipfile.ZipFile(release.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(path.relative_to(ROOT / "src")) for path in files}
    assert {Path(name).suffix for name in names} >= {".py", ".typed", ".c", ".h", ".css", ".js", ".html"}


def test_the_sdist_holds_the_sources_and_no_downloads(release: Release) -> None:
    with tarfile.open(release.sdist) as archive:
        members = {name.partition("/")[2]: archive.getmember(name).size for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "Makefile", "constraints.txt", "src/model_compose/py.typed"} <= set(members)
    assert "examples/quickstart/adapters/alpaca/adapter_model.safetensors" in members
    assert {name.partition("/")[0] for name in members} - {
        *("src", "tests", "examples", "benchmarks", "docs", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"),
        *(path.name for path in ROOT.glob("*.md")), "PKG-INFO", ".gitignore",
    } == set()  # fmt: skip
    assert not [name for name in members if name.endswith((".gguf", ".whl", ".pyc", ".so"))]
    assert sum(members.values()) < 20 << 20


def test_the_metadata(release: Release) -> None:
    with zipfile.ZipFile(release.wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(archive.read(name).decode())
    assert (told["Name"], told["Version"]) == ("model-compose-lora", PROJECT["version"])
    assert told["Author"] == "model-compose contributors"
    assert told["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert {"llamacpp", "plot"} <= set(told.get_all("Provides-Extra", []))


@pytest.fixture(scope="module")
def installed(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, which borrows all dependencies from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    run(
        sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps", "--no-index",
        "--disable-pip-version-check", release.wheel,
    )  # fmt: skip
    return folder / "bin"


def test_the_installed_wheel_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import model_compose; print(model_compose.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    command = installed / "model-compose"
    assert run(command, "--version", cwd=tmp_path) == f"model-compose {PROJECT['version']}\n"
    assert "validate" in run(command, "--help", cwd=tmp_path)
    run(command, "init", cwd=tmp_path)
    adapters = {path.parent.name for path in tmp_path.glob("adapters/*/adapter_model.safetensors")}
    assert adapters == {"alpaca", "pirate"}
    assert "Configuration is valid" in run(command, "validate", cwd=tmp_path)


@pytest.mark.slow
def test_type_checkers_see_its_types(installed: Path, tmp_path: Path) -> None:
    """Only those of this package are read: its dependencies take mypy most of a minute."""
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = skip\n[mypy-model_compose.*]\nfollow_imports = silent\n"
    )
    file = tmp_path / "user.py"
    code = ["from model_compose.generation import Sampling", "Sampling(top_k='many')", "reveal_type(Sampling().seed)"]
    file.write_text("\n".join(code))
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", installed / "python", "--cache-dir", tmp_path, file],
        cwd=tmp_path, text=True, capture_output=True, check=False,
    ).stdout  # fmt: skip
    assert 'Argument "top_k" to "Sampling" has incompatible type "str"; expected "int"' in told
    assert 'Revealed type is "int | None"' in told.replace("builtins.", "")
