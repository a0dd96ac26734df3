"""Finds the files that hold the weights of a checkpoint's folder, and reads JSON files. Needs no torch."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model_compose.errors import LoadError
from model_compose.headers import HeaderError

NAMES = ("model.safetensors", "pytorch_model.bin")
"""The files of weights that transformers looks for, in this order. If there is no such file, it looks for an index of
shards, which has the same name followed by .index.json, before it goes on to the next name."""


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights, or an index of shards."""
    return any((folder / f"{name}{ending}").is_file() for name in NAMES for ending in ("", ".index.json"))


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights that transformers would load from the folder: one file, or the shards that an index lists.

    Empty if the folder has no weights. Raises LoadError for an index that is not valid, or that lists a missing file.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict):
        raise LoadError(f"{index} lists no files (weight_map); download it again")
    shards = sorted({index.parent / str(shard) for shard in listed.values()})
    with file_errors(index):  # a listed name may be too long for any file
        missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoadError(f"{index.parent} has no {missing[0]}{more}, which {index.name} lists; download it too")
    return shards


def read_json(path: Path) -> Mapping[str, Any]:
    """A file's JSON object. Raises LoadError if it holds anything else."""
    with file_errors(path):
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise HeaderError(f"is not valid JSON ({error}); download it again") from None
        if not isinstance(found, dict):
            raise HeaderError("does not hold a JSON object; download it again")
        return found


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """A context in which HeaderError and OSError become a LoadError that names the file."""
    try:
        yield
    except HeaderError as error:
        raise LoadError(f"{path} {error}") from None
    except OSError as error:
        raise LoadError(f"{path} cannot be read ({error.strerror})") from None
