"""The result of fetching a model source, the same for every provider."""

from dataclasses import dataclass
from pathlib import Path

from model_compose.sources.choice import gguf_part


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

    def sizes(self) -> dict[str, int]:
        """Bytes by name: of the single file (of all its parts, if it is a split GGUF), or of all files in the folder."""
        if self.file is None:
            files = list(self.folder.iterdir())
        else:
            part = gguf_part(self.file)
            files = [self.folder / name for name in (part.names if part else [self.file])]
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files if path.is_file()}

    def __str__(self) -> str:
        return self.name or str(self.folder / (self.file or ""))
