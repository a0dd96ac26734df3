"""Decides which files of a Hub repository or a local folder make up the model. Reads file names only, never the
files."""

import fnmatch
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from model_compose.errors import SourceError

# What transformers and PEFT read besides the weights. `.py` files are fetched too; the loader decides whether they run.
_SMALL = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py", ".bpe", ".vocab", ".spm")
_PICKLED = (".bin", ".pt", ".pth")
_OF_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*\.(bin|pt|pth)$")
# Subfolders that belong to the model. All others hold other formats (onnx, original) or training checkpoints.
_MODEL_FOLDERS = re.compile(r"(additional_chat_templates|\d+_[A-Za-z]+)/")
_GGUF_PART = re.compile(r"(.+-)(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufPart:
    """The name of one file of a split GGUF, as llama-gguf-split writes it: `start`00002-of-00005.gguf."""

    start: str
    number: int
    count: int

    def name(self, number: int) -> str:
        """The name of the part with this number. Numbers start at 1."""
        return f"{self.start}{number:05}-of-{self.count:05}.gguf"

    @property
    def names(self) -> list[str]:
        """The names of all parts, in order."""
        return [self.name(number) for number in range(1, self.count + 1)]


def gguf_part(name: str) -> GgufPart | None:
    """What a file's name says about a split GGUF; None if it is not the name of a part. `name` may begin with folders."""
    match = _GGUF_PART.fullmatch(name)
    return GgufPart(match[1], int(match[2]), int(match[3])) if match else None


def choose(
    names: Iterable[str],
    *,
    repository: str,
    filename: str | None,
    allow: Collection[str] | None,
    only: Collection[str] | None,
) -> list[str]:
    """The files to fetch out of all `names`.

    The first of these that is given decides: `only` (the caller's patterns, within `allow`), `filename` (that file, its
    shards and the small files), `allow` (the user's patterns). If none is given: all that transformers needs, with
    safetensors preferred over pickles. Raises SourceError if no file fits.
    """
    names = sorted(names)
    if filename is not None and filename not in names:
        raise no_such_file(names, repository, filename)
    if only is not None:
        return [name for name in names if _any(name, only) and (allow is None or _any(name, allow) or name == filename)]
    if filename is not None:
        part = gguf_part(filename)
        wanted = {filename, *(part.names if part else ())}
        return [name for name in names if name in wanted or (_belongs_to_model(name) and _is_small(name))]
    if allow is not None:
        chosen = [name for name in names if _any(name, allow)]
        if not chosen:
            raise SourceError(f"No file of {repository} matches `allow_patterns`. Its files: {_some(names)}.")
        return chosen
    chosen = preferred(names)
    if not has_weights(chosen) and (ggufs := [name for name in names if name.endswith(".gguf")]):
        raise SourceError(f"{repository} holds GGUF files: set `filename` to one of {_some(ggufs)}.")
    return chosen


def has_weights(names: Iterable[str]) -> bool:
    """Whether any of the names is that of a file of weights (safetensors, GGUF or a pickle)."""
    return any(name.endswith((".safetensors", ".gguf", *_PICKLED)) for name in names)


def only_gguf(names: Iterable[str], *, folder: str) -> str | None:
    """The GGUF file, if it is the only weight file among `names`; of a split GGUF, its first part.

    None if there are weights in another format, or no weights. Raises SourceError if there are several GGUF files.
    """
    names = sorted(names)
    if _weights(names):
        return None
    parts = {name: gguf_part(name) for name in names if name.endswith(".gguf")}
    ggufs = [name for name, part in parts.items() if part is None or part.number == 1]
    if len(ggufs) > 1:
        raise SourceError(
            f"{folder} holds several GGUF files: choose one with `filename`, as in "
            f"{{path: …, filename: {ggufs[0]}}}. The files: {_some(ggufs)}."
        )
    return ggufs[0] if ggufs else None


def no_such_file(names: list[str], holder: str, filename: str) -> SourceError:
    """The error for a `filename` that is not among `names`. It lists the files with the same ending."""
    alike = [name for name in names if name.endswith("." + filename.rpartition(".")[2])]
    return SourceError(f"{holder} has no file '{filename}': set `filename` to one of {_some(alike or names)}.")


def _weights(names: Collection[str]) -> list[str]:
    """The safetensors files; if there are none, the pickles that are not training state (optimizer, scheduler, …)."""
    safetensors = [name for name in names if name.endswith(".safetensors")]
    return safetensors or [name for name in names if name.endswith(_PICKLED) and not _OF_TRAINING.search(name)]


def preferred(names: Iterable[str]) -> list[str]:
    """The files of a repository that transformers and PEFT need, with safetensors preferred over pickles."""
    inside = [name for name in names if _belongs_to_model(name)]
    weights = _weights(inside)
    if any(name.startswith("model") for name in weights):  # Mistral's repositories hold the weights twice
        weights = [name for name in weights if not name.startswith("consolidated")]
    return sorted([name for name in inside if _is_small(name)] + weights)


def _belongs_to_model(name: str) -> bool:
    return "/" not in name or bool(_MODEL_FOLDERS.match(name))


def _is_small(name: str) -> bool:
    return name.endswith(_SMALL)


def _any(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: list[str], most: int = 8) -> str:
    more = f", … ({len(names) - most} more)" if len(names) > most else ""
    return (", ".join(names[:most]) or "no files at all") + more
