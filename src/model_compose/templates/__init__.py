"""The files that `model-compose init` starts from: each NAME.yml here is a template, and needs no other code.

A template opens with a comment: its first line is the summary that `init --list` shows, and its lines that are indented by
three spaces are the next steps. The folders in adapters/ that a template names as ./adapters/NAME are copied with it.
"""

import difflib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from model_compose.errors import NotFound
from model_compose.nodes import FILE_NAMES

DEFAULT = "blend"
FOLDER = Path(__file__).parent
STEP = re.compile(r"^#   (\S.*?)(?=  +#|$)", re.MULTILINE)
"""A next step in the opening comment. What may follow, after two spaces and #, says what the step does."""


@dataclass(frozen=True)
class Template:
    """One template. text: the YAML."""

    name: str
    text: str

    @property
    def summary(self) -> str:
        """Its first line, without the #."""
        return self.text.partition("\n")[0].removeprefix("# ")

    @property
    def adapters(self) -> tuple[Path, ...]:
        """The folders here that it names."""
        folders = sorted((FOLDER / "adapters").iterdir())
        return tuple(folder for folder in folders if re.search(rf"\./adapters/{re.escape(folder.name)}\b", self.text))

    def text_for(self, path: Path) -> str:
        """The YAML as it stands in a file of this name: the commands in its comment name that file."""
        return STEP.sub(lambda step: f"#   {_naming(path.name, step[1])}", self.text)

    def next_steps(self, path: Path) -> list[str]:
        """The commands to run next, for a file at this path."""
        return [_naming(str(path), step[1]) for step in STEP.finditer(self.text)]


def _naming(path: str, command: str) -> str:
    """The command, with the option that names the file where that is not the default one."""
    option = "" if path in FILE_NAMES else f"-f {shlex.quote(path)} "
    return command.replace("model-compose ", f"model-compose {option}", 1)


def names() -> list[str]:
    """The default first."""
    found = sorted(path.stem for path in FOLDER.glob("*.yml"))
    return sorted(found, key=lambda name: name != DEFAULT)


def read(name: str) -> Template:
    """Raises NotFound, which names the templates."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise NotFound(f"there is no template '{name}'; {hint}known: {', '.join(names())}")
    return Template(name, (FOLDER / f"{name}.yml").read_text(encoding="utf-8"))
