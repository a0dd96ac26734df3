"""What other packages add by entry points: the tutorial works, and a broken package stays alone."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.errors import PluginError
from model_compose.registry import Registry
from tests import tiny

TUTORIAL = Path(__file__).parents[1] / "docs/how-to/extend.md"
PART = re.compile(r"^## (An? .*?)$(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PARTS: dict[str, str] = dict(PART.findall(TUTORIAL.read_text(encoding="utf-8")))
SERVED = re.compile(r"The `text` of the answer is `(.*?)`")


# The tutorial.


class Reader:
    """Does what the page says, in a folder of its own: writes its files, runs its commands, compares what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.printed: list[str] = []
        self.served: list[str] = []

    def read(self, part: str) -> None:
        for language, text in BLOCK.findall(part):
            if language == "bash":
                for command in text.replace("\\\n", " ").splitlines():
                    self._run(shlex.split(command))
            elif language == "text":
                assert self.printed[-1] == text
            else:
                name = text.splitlines()[0].removeprefix("# ")
                if language == "yaml":  # on a port that is free here
                    text = f"controller: {{port: 0}}\n{text}"
                (self.folder / name).write_text(text, encoding="utf-8")

    def _run(self, command: list[str]) -> None:
        if command[:2] == ["pip", "install"]:
            self._install()
        elif command[0] == "curl":
            _, url, _, header, _, body = command
            name, _, value = header.partition(": ")
            url = url.replace("http://localhost:8080", self.url)
            answer = httpx.post(url, headers={name: value}, content=body, timeout=60)
            self.served.append(answer.raise_for_status().json()["choices"][0]["text"])
        else:
            assert command[0] == "model-compose"
            self.compose(*command[1:])

    def compose(self, *arguments: str) -> None:
        """`model-compose` with these arguments, which must end well."""
        self._install()  # the page says once how, for all its packages
        code = "from model_compose.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=self.folder, env=self._environment(), text=True,
            capture_output=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if arguments[0] == "run":
            self.printed.append(done.stdout)
        if arguments[0] == "up":
            self.url = re.findall(r"http://[\d.]+:\d+", done.stdout + done.stderr)[0]

    def _install(self) -> None:
        """What `pip install --editable .` leaves of the folder: the names of its entry points."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        install(self.folder, project["name"], project["version"], project["entry-points"])

    def _environment(self) -> dict[str, str]:
        """The state of services lies in the folder, and the Hub stays unasked."""
        path = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PYTHONPATH": path, "XDG_STATE_HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}


def install(folder: Path, name: str, version: str, groups: dict[str, dict[str, str]]) -> None:
    """Puts a distribution with entry points into a folder of sys.path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = [f"[{group}]\n{key} = {value}\n" for group, entries in groups.items() for key, value in entries.items()]
    (info / "entry_points.txt").write_text("".join(lines), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("title", PARTS)
def test_the_tutorial_does_what_it_says(title: str, tmp_path: Path) -> None:
    if title == "A combination method":
        tiny.save_project(tmp_path)
    reader = Reader(tmp_path)
    try:
        reader.read(PARTS[title])
    finally:
        if reader.url:
            reader.compose("down")
    assert reader.printed
    assert reader.served == SERVED.findall(PARTS[title])
    if title == "A combination method":
        first, second = reader.printed
        assert first == second


def test_the_tutorial_has_all_its_parts() -> None:
    assert list(PARTS) == ["An engine", "A component", "A combination method"]
    assert len(SERVED.findall(PARTS["An engine"])) == 1


# Names, and packages that are broken.


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path, into which packages are installed."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def engines() -> Registry[Any]:
    return Registry("driver", "model_compose.engines", {"own": "json:dumps", "taken": "json:loads"})


def test_other_packages_add_names(site: Path) -> None:
    install(
        site, "others", "1.0", {"model_compose.engines": {"dump": "pickle:dumps"}, "elsewhere": {"no": "pickle:load"}}
    )
    registry = engines()
    assert list(registry) == ["own", "taken", "dump"]
    assert registry["own"] is json.dumps
    assert registry["dump"].__module__ == "_pickle"
    assert "no" not in registry


def test_a_name_belongs_to_one_package(site: Path) -> None:
    install(site, "first", "1.0", {"model_compose.engines": {"mine": "json:dumps", "taken": "json:dumps"}})
    install(site, "second", "2.1", {"model_compose.engines": {"mine": "json:loads"}})
    registry = engines()
    with pytest.raises(
        PluginError, match=r"'mine' is registered twice: by the package \w+ [\d.]+ .* and by the package"
    ) as two:
        registry["mine"]
    assert "first 1.0 (json:dumps)" in str(two.value)
    assert "second 2.1 (json:loads)" in str(two.value)
    with pytest.raises(
        PluginError, match=r"'taken' is registered twice: by model-compose itself and by the package first"
    ):
        registry["taken"]
    assert registry["own"] is json.dumps


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("", "AttributeError: module 'broken_plugin' has no attribute 'Engine'"),
    ],
)
def test_a_broken_package_names_itself_and_stays_alone(
    source: str, reason: str, site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sys.modules.pop("broken_plugin", None)
    (site / "broken_plugin.py").write_text(source, encoding="utf-8")
    install(site, "broken", "0.3", {"model_compose.engines": {"odd": "broken_plugin:Engine"}})
    registry = engines()
    with pytest.raises(PluginError) as raised:
        registry["odd"]
    assert str(raised.value) == (
        f"the driver 'odd' comes from the package broken 0.3 (broken_plugin:Engine), which cannot be imported: {reason}; "
        "mend or uninstall that package"
    )
    assert list(registry.usable) == ["own", "taken"]
    assert "the package broken 0.3" in caplog.text


FILE = """\
component:
  type: model
  task: text-generation
  model: a/b
  driver: huggingface
  peft_adapters: [{type: lora, name: alpaca, model: ./a}]
  blends:
    both: {method: ties, density: 0.5, weights: {alpaca: 1}}
  action: {text: "${input.text}"}
"""
BROKEN = [
    ("engines", "driver: huggingface", "driver: odd", 5),
    ("components", "type: model", "type: odd", 2),
    ("methods", "method: ties, density: 0.5", "method: odd", 8),
]


@pytest.mark.parametrize(("group", "old", "new", "line"), BROKEN, ids=[group for group, *_ in BROKEN])
def test_a_file_is_refused_at_the_line_of_a_broken_package_only(
    group: str, old: str, new: str, line: int, site: Path
) -> None:
    install(site, "broken", "0.3", {f"model_compose.{group}": {"odd": "broken_plugin:X"}})
    (site / "broken_plugin.py").write_text("raise RuntimeError('of its own')", encoding="utf-8")
    script = (
        "import sys\nfrom pathlib import Path\nfrom model_compose.errors import ConfigError\n"
        "from model_compose.loading import load\n"
        "for text in sys.argv[1:]:\n"
        "    Path('model-compose.yml').write_text(text)\n"
        "    try:\n        print(load([Path('model-compose.yml')], {}).config.all_components[0].driver)\n"
        "    except ConfigError as error:\n        print(error)\n"
    )
    path = os.pathsep.join([str(site), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, FILE, FILE.replace(old, new)], cwd=site, env={**os.environ, "PYTHONPATH": path},
        text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    fine, refused = done.stdout.splitlines()
    assert fine == "huggingface"
    assert refused.startswith(f"model-compose.yml:{line}: component")
    assert "'odd' comes from the package broken 0.3 (broken_plugin:X)" in refused
    assert "RuntimeError: of its own" in refused
