"""Which files of a Hub repository are worth fetching. Works on names alone; knows no network and no cache."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from model_compose.errors import SourceError

# What transformers and peft read beside the weights. `.py` is carried along; whether it runs is the loader's decision.
_SMALL = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py", ".bpe", ".vocab", ".spm")
_PICKLED = (".bin", ".pt", ".pth")
_OF_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*\.(bin|pt|pth)$")
# Subfolders that belong to the model; others are other formats (onnx, original) or training checkpoints.
_INNER = re.compile(r"(additional_chat_templates|\d+_[A-Za-z]+)/")
_SHARD = re.compile(r"(.+-)\d{5}(-of-\d{5}\.gguf)$")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def choose(
    names: Iterable[str],
    *,
    repository: str,
    filename: str | None,
    allow: Sequence[str] | None,
    only: Sequence[str] | None,
) -> list[str]:
    """The files to fetch out of all `names`.

    `only` (the caller's wish) goes before `filename`, that before `allow` (the user's patterns), that before the
    default: all that transformers needs, with safetensors preferred over pickles. Raises SourceError if nothing fits.
    """
    names = sorted(names)
    if filename is not None and filename not in names:
        raise no_such_file(names, repository, filename)
    if only is not None:
        return [name for name in names if _any(name, only) and (allow is None or _any(name, allow) or name == filename)]
    if filename is not None:
        return [name for name in names if name in _with_shards(filename, names) or (_inside(name) and _is_small(name))]
    if allow is not None:
        chosen = [name for name in names if _any(name, allow)]
        if not chosen:
            raise SourceError(f"No file of {repository} matches `allow_patterns`; it has {_some(names)}.")
        return chosen
    chosen = preferred(names)
    if not has_weights(chosen) and (ggufs := [name for name in names if name.endswith(".gguf")]):
        raise SourceError(f"{repository} has its weights as GGUF: say which file by `filename`, of {_some(ggufs)}.")
    return chosen


def has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith((".safetensors", ".gguf", *_PICKLED)) for name in names)


def only_gguf(names: Iterable[str], *, folder: str) -> str | None:
    """The GGUF file that holds all weights among `names`, the first of its parts where it is split. None where there are
    other weights, or none. Raises SourceError that names the files where there are several."""
    names = sorted(names)
    if _weights(names):
        return None
    ggufs = [name for name in names if name.endswith(".gguf") and not _LATER_PART.search(name)]
    if len(ggufs) > 1:
        raise SourceError(
            f"{folder} holds several GGUF files: say which by `filename` ({{path: …, filename: {ggufs[0]}}}), of "
            f"{_some(ggufs)}."
        )
    return ggufs[0] if ggufs else None


def no_such_file(names: Sequence[str], holder: str, filename: str) -> SourceError:
    """The error for a file that is not among `names`, with those that could be meant."""
    alike = [name for name in names if name.endswith("." + filename.rpartition(".")[2])]
    return SourceError(f"{holder} has no file '{filename}': set `filename` to one of {_some(alike or names)}.")


def _weights(names: Sequence[str]) -> list[str]:
    """safetensors, else pickles that are not the state of a training."""
    safetensors = [name for name in names if name.endswith(".safetensors")]
    return safetensors or [name for name in names if name.endswith(_PICKLED) and not _OF_TRAINING.search(name)]


def preferred(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that transformers and PEFT need, with safetensors preferred over pickles."""
    inside = [name for name in names if _inside(name)]
    weights = _weights(inside)
    if any(name.startswith("model") for name in weights):  # Mistral's repositories hold all weights twice
        weights = [name for name in weights if not name.startswith("consolidated")]
    return sorted([name for name in inside if _is_small(name)] + weights)


def _inside(name: str) -> bool:
    return "/" not in name or bool(_INNER.match(name))


def _is_small(name: str) -> bool:
    return name.endswith(_SMALL)


def _with_shards(filename: str, names: Sequence[str]) -> set[str]:
    """The file, and its siblings where it is one of a split GGUF."""
    shard = _SHARD.match(filename)
    siblings = {name for name in names if shard and (other := _SHARD.match(name)) and other.groups() == shard.groups()}
    return siblings | {filename}


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f", … ({len(names) - most} more)" if len(names) > most else ""
    return (", ".join(names[:most]) or "no files at all") + more
