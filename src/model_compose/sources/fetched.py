"""What fetching a model source yields. Knows nothing of where the files came from."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fetched:
    """Weights on this machine, whole.

    `folder` holds the files; `file` is the one in it that was asked for (a GGUF base), relative to `folder`, else None.
    `identity` pins the content: equal identities mean equal bytes. `name` is what messages call it.
    """

    folder: Path
    file: str | None
    identity: str
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.folder / (self.file or ""))
