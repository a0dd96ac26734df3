"""Reads the headers of a GGUF base: its architecture, its modules' shapes and its context. Reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_compose.engines.on_disk import gguf_parts
from model_compose.errors import LoadError
from model_compose.lora.adapter import LoraAdapter, check, check_copies
from model_compose.lora.gguf import Architecture, checked_name, is_stored

if TYPE_CHECKING:
    import gguf
    import torch


@dataclass(frozen=True)
class Base:
    """A GGUF base.

    file: the file; of a split base, the first part. identity: stands for the content, as in `Fetched`. name: GGUF's
    general.architecture. head: the numbers in one head's key and value of a token, together. context: the model's own, in
    tokens. matrices: the two-dimensional tensors, mapped, by GGUF name.
    """

    file: Path
    identity: str
    name: str
    layers: int
    heads: int
    kv_heads: int
    head: int
    context: int
    matrices: "Mapping[str, gguf.ReaderTensor]"

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture, for converting adapters. Raises AdapterError if adapters cannot be converted for it."""
        tied = "output.weight" not in self.matrices
        return Architecture(checked_name(self.name), self.layers, self.heads, self.kv_heads, tied)

    @property
    def vocabulary(self) -> int:
        """The number of tokens, which is the width of the logits."""
        return int(self.matrices["token_embd.weight"].shape[1])

    def kv_bytes_per_token(self, item_bytes: int) -> int:
        """The bytes of one token's keys and values over all layers."""
        return self.layers * self.kv_heads * self.head * item_bytes

    def check(self, adapter: LoraAdapter) -> LoraAdapter:
        """Check that the base has every module of the adapter, with fitting sizes. Raises AdapterError.

        Returns the adapter with canonical module paths, so that adapters with different spellings can be summed.
        """
        sizes = {name: tuple(map(int, matrix.shape)) for name, matrix in self.matrices.items()}
        adapter = check(adapter, self.architecture.shapes(adapter.modules, sizes))
        check_copies(adapter, self._holds)
        return adapter

    def _holds(self, parameter: str, copy: "torch.Tensor") -> bool | None:
        """Whether the base's matrix equals `copy`; None if the two cannot be compared."""
        found = self.architecture.tensor(parameter.removesuffix(".weight"))
        matrix = self.matrices.get(found[1]) if found else None
        return False if matrix is None else is_stored(copy, matrix)


def read_base(file: Path, identity: str) -> Base:
    """Read the header of a GGUF base; of a split base, all headers. This takes seconds, since they hold the vocabulary.

    Raises LoadError for a file that is not GGUF, or not a language model.
    """
    import gguf

    try:
        readers = [gguf.GGUFReader(path) for path in gguf_parts(file)]
    except (ValueError, OSError, IndexError) as error:
        raise LoadError(f"{file} cannot be read as a GGUF file ({error}); download it again") from error
    fields = readers[0].fields
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    matrices = {tensor.name: tensor for tensor in tensors if len(tensor.shape) == 2}
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise LoadError(
            f"the parts of {file} hold a tensor twice, so they do not belong to one base; download them again"
        )
    name = _value(fields, "general.architecture", file)
    heads = _number(fields, f"{name}.attention.head_count", file)
    kv_heads = _number(fields, f"{name}.attention.head_count_kv", file, heads)
    size = _number(fields, f"{name}.embedding_length", file) // heads
    keys = _number(fields, f"{name}.attention.key_length", file, size)
    values = _number(fields, f"{name}.attention.value_length", file, size)
    return Base(
        file, identity, name, _number(fields, f"{name}.block_count", file), heads, kv_heads, keys + values,
        _number(fields, f"{name}.context_length", file, 2048), matrices,
    )  # fmt: skip


def _value(fields: Mapping[str, Any], key: str, file: Path) -> Any:
    if key not in fields:
        raise LoadError(f"{file} has no '{key}', so it cannot be served as a language model; use another GGUF file")
    return fields[key].contents()


def _number(fields: Mapping[str, Any], key: str, file: Path, default: int | None = None) -> int:
    """A number of the header. If it is a list (one for each layer), the largest."""
    if default is not None and key not in fields:
        return default
    value = _value(fields, key, file)
    return max(int(each) for each in value) if isinstance(value, list) else int(value)
