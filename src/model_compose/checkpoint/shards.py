"""Writes safetensors files one tensor at a time, so that only one is in memory. All sizes are known beforehand, so the
header comes first.

safetensors itself has no such writer: its save_file and serialize_file take all tensors of a file at once. The format is
eight bytes with the length of a JSON header, that header, and the tensors' bytes (github.com/huggingface/safetensors,
"Format"). As in save_pretrained, huggingface_hub decides which tensors share a file.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import TensorSpec
from torch import Tensor

INDEX = "model.safetensors.index.json"
ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """The dtype and shape of a tensor that has not been read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(
    folder: Path,
    entries: Mapping[str, Entry],
    make: Callable[[str], Tensor],
    shard_size: int,
    written: Callable[[int], None],
) -> None:
    """Write model.safetensors, or shards of at most `shard_size` bytes and their index. A tensor is never split.

    make(name): returns the tensor, with the dtype and shape of its entry; called once for each, file by file.
    written(bytes): called after each tensor. Only one tensor is in memory at a time.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(entries), get_storage_size=lambda entry: entry.nbytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )  # fmt: skip
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, {name: entries[name] for name in names}, make, written)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(
    path: Path, entries: Mapping[str, Entry], make: Callable[[str], Tensor], written: Callable[[int], None]
) -> None:
    # The widest dtypes come first, as in safetensors' own writer: a tensor must start at a multiple of its item size.
    names = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + entries[name].nbytes
        header[name] = {
            "dtype": _code(entries[name]), "shape": list(entries[name].shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = make(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (entries[name].dtype, entries[name].shape), name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written(tensor.nbytes)


def _code(entry: Entry) -> str:
    """The dtype's name in safetensors."""
    name = str(entry.dtype).removeprefix("torch.")
    return str(TensorSpec(dtype=name, shape=entry.shape, data_ptr=0, data_len=entry.nbytes).dtype)
