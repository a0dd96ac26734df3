"""The result of fetching a model source, the same for every provider."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fetched:
    """Weights that lie complete on this machine.

    `folder` holds the files. `file` is the path, relative to `folder`, of the single file that the source names (a GGUF
    base, say); None if the source is the whole folder. `identity` stands for the content: sources with equal identities
    have equal bytes. `name` is the source's name in messages.
    """

    folder: Path
    file: str | None
    identity: str
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.folder / (self.file or ""))
