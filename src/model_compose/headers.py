"""Reads the headers of weight files, safetensors and GGUF: the names and shapes of the tensors. Reads no weights.

Needs no torch. transformers and the gguf package can read these headers too, but take seconds, since they make a Python
object of every token.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FLOATS = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))


class HeaderError(ValueError):
    """A file is incomplete, or not of the format that its name says. The message continues a sentence that names it."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. plain: whether the file has its numbers as floats, and not packed or quantised."""

    shape: tuple[int, ...]
    plain: bool = True


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file, by name. Raises HeaderError if it is damaged, cut off or no safetensors file; OSError.

    The first eight bytes give the length of the JSON that follows. The JSON's offsets count from its end
    (https://huggingface.co/docs/safetensors). The library safetensors would import numpy or torch for this.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise HeaderError("is cut off, or is not a safetensors file; download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {
            name: Stored(tuple(map(int, tensor["shape"])), tensor["dtype"] in _FLOATS)
            for name, tensor in header.items()
        }
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        raise HeaderError("is damaged, or is not a safetensors file; download it again") from None
    if 8 + length + end > size:
        raise HeaderError(f"is cut off: {size:,} of {8 + length + end:,} bytes are here; download it again")
    return tensors


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file.

    fields: the scalars and the lists of numbers in the metadata. tensors: by their GGUF names; a shape starts with the
    innermost dimension. texts: the lists of texts, such as the vocabulary, as (count, position in bytes), for `strings`.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    texts: Mapping[str, tuple[int, int]] = field(repr=False)

    def strings(self, key: str) -> list[str]:
        """The list of texts under a key; empty if the file has none."""
        count, position = self.texts.get(key, (0, 0))
        with _mapped(self.path) as data:
            cursor = _Cursor(data, position)
            return [cursor.text() for _ in range(count)]

    @property
    def chat_template(self) -> str | None:
        template = self.fields.get("tokenizer.chat_template")
        return template if isinstance(template, str) and template else None


def read_gguf(path: Path) -> Gguf:
    """Raises HeaderError if the file is damaged, cut off or no GGUF file; OSError."""
    try:
        with _mapped(path) as data:
            return _read_gguf(path, _Cursor(data))
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError):
        raise HeaderError("is cut off or damaged; download it again") from None


# The struct format of each scalar type (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_PLAIN_TYPES = frozenset((0, 1, 30))  # float32, float16, bfloat16


class _Cursor:
    """Reads values one after another, starting at a position in bytes."""

    def __init__(self, data: mmap.mmap, at: int = 0) -> None:
        self.data, self.at = data, at

    def number(self, code: str, count: int = 1) -> Any:
        found = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return found[0] if count == 1 else found

    def text(self) -> str:
        start = self.at + 8
        self.skip_text()
        return self.data[start : self.at].decode()

    def skip_text(self) -> None:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        self.at += 8 + length
        if self.at > len(self.data):
            raise IndexError


def _read_gguf(path: Path, cursor: _Cursor) -> Gguf:
    magic, version = cursor.number("I"), cursor.number("I")
    if magic != int.from_bytes(b"GGUF", "little"):
        raise HeaderError("is not a GGUF file; download it again")
    if version not in (2, 3):
        raise HeaderError(
            f"is a GGUF file of version {version}, and model-compose reads versions 2 and 3; convert it again"
        )
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    texts: dict[str, tuple[int, int]] = {}
    for _ in range(field_count):
        key, kind = cursor.text(), cursor.number("I")
        if kind == _LIST:
            inner, count = cursor.number("I"), cursor.number("Q")
            if inner == _TEXT:
                texts[key] = count, cursor.at
                for _ in range(count):
                    cursor.skip_text()
            else:
                fields[key] = list(_numbers(cursor, inner, count))
        else:
            fields[key] = cursor.text() if kind == _TEXT else cursor.number(_scalar(kind))
    tensors, furthest = {}, 0
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        kind, offset = cursor.number("I"), cursor.number("Q")
        tensors[name], furthest = Stored(shape, kind in _PLAIN_TYPES), max(furthest, offset)
    if cursor.at + furthest > len(cursor.data):
        raise HeaderError("is cut off; download it again")
    return Gguf(path, fields, tensors, texts)


def _numbers(cursor: _Cursor, kind: int, count: int) -> Iterator[Any]:
    if count * struct.calcsize(_scalar(kind)) > len(cursor.data):
        raise IndexError
    found = cursor.number(_scalar(kind), count)
    yield from (found,) if count == 1 else found


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise IndexError
    return _SCALARS[kind]


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise HeaderError("is empty; download it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
