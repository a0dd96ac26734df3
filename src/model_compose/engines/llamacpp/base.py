"""What a GGUF base says of itself: its architecture, its modules' shapes, its context. Reads headers, no weights."""

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
    """A GGUF base. file: the first one where it is split. identity: of its content. matrices: by GGUF name, mapped.

    head: keys' and values' sizes together, in one layer and token.
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
        """Raises AdapterError where adapters cannot be converted for it."""
        tied = "output.weight" not in self.matrices
        return Architecture(checked_name(self.name), self.layers, self.heads, self.kv_heads, tied)

    @property
    def vocabulary(self) -> int:
        """Tokens, which is the logits' width."""
        return int(self.matrices["token_embd.weight"].shape[1])

    def kv_bytes_per_token(self, item_bytes: int) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * self.kv_heads * self.head * item_bytes

    def check(self, adapter: LoraAdapter) -> LoraAdapter:
        """The preflight: every module of the adapter exists here and fits. Returns it with one name for each module,
        which others call alike, so that they can be summed. Raises AdapterError."""
        sizes = {name: tuple(map(int, matrix.shape)) for name, matrix in self.matrices.items()}
        adapter = check(adapter, self.architecture.shapes(adapter.modules, sizes))
        check_copies(adapter, self._holds)
        return adapter

    def _holds(self, parameter: str, copy: "torch.Tensor") -> bool | None:
        """Whether the base's matrix is that tensor; None where that cannot be said."""
        found = self.architecture.tensor(parameter.removesuffix(".weight"))
        matrix = self.matrices.get(found[1]) if found else None
        return False if matrix is None else is_stored(copy, matrix)


def read_base(file: Path, identity: str) -> Base:
    """Reads the header, of a split base all of them. Takes seconds: GGUF holds the vocabulary there.

    Raises LoadError for what is no GGUF file, or no language model.
    """
    import gguf

    try:
        readers = [gguf.GGUFReader(path) for path in gguf_parts(file)]
    except (ValueError, OSError, IndexError) as error:
        raise LoadError(f"{file} is no GGUF file that can be read ({error}); download it again") from error
    fields = readers[0].fields
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    matrices = {tensor.name: tensor for tensor in tensors if len(tensor.shape) == 2}
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise LoadError(f"the parts of {file} hold a tensor twice, so they are not of one base; download them again")
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
        raise LoadError(f"{file} has no '{key}', so it is no language model that can be served; use another GGUF file")
    return fields[key].contents()


def _number(fields: Mapping[str, Any], key: str, file: Path, default: int | None = None) -> int:
    """Where layers differ, the largest."""
    if default is not None and key not in fields:
        return default
    value = _value(fields, key, file)
    return max(int(each) for each in value) if isinstance(value, list) else int(value)
