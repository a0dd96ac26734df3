"""Reads the weights of a GGUF file one by one, dequantised, with transformers' parameter names and layout.

transformers' own loader does this for all tensors at once. We use its functions for a single tensor.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import Tensor

from model_compose.checkpoint.shards import Entry
from model_compose.errors import LoadError
from model_compose.lora.gguf import is_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""The types that are not quantised. All others are dequantised to float32, which loses nothing."""


class GgufCheckpoint:
    """A `Checkpoint` of a GGUF file. Its stored names are the model's parameter names."""

    def __init__(self, file: Path, model: "PreTrainedModel") -> None:
        """Raises LoadError if a parameter is not a single tensor of the file."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self._file = file
        reader = GGUFReader(file)
        field = reader.get_field("general.architecture")
        architecture = str(field.contents()) if field else ""
        processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = processor(config=model.config.to_dict())
        mapping: Any = get_gguf_hf_weights_map
        names: dict[str, str] = mapping(model, self._processor)
        self._tensors = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
        shapes = model.state_dict()
        missing = set(shapes) - set(self._tensors) - set(model.all_tied_weights_keys)
        if missing:
            raise LoadError(
                f"{file.name} ({architecture}) has no separate tensor for {sorted(missing)[0]}, so it cannot be "
                "written as safetensors; use --format gguf-merged, or use the model's safetensors as the base"
            )
        self.entries: dict[str, Entry] = {
            key: Entry(PLAIN.get(tensor.tensor_type, torch.float32), tuple(shapes[key].shape))
            for key, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        weights = dequantize(read_tensor(self._file, tensor), tensor.tensor_type)
        weights = self._processor.process(weights=weights, name=tensor.name).weights
        entry = self.entries[name]
        return torch.from_numpy(np.ascontiguousarray(weights)).reshape(entry.shape).to(entry.dtype)

    def stored(self, key: str) -> str | None:
        return key if key in self.entries else None

    def is_copy(self, copy: Tensor, name: str) -> bool | None:
        return is_stored(copy, self._tensors[name])


def read_tensor(file: Path, tensor: Any) -> Any:
    """A copy of a GGUFReader tensor's data, read from the file. The reader's own array maps the whole file, and the pages
    that were read would stay in memory."""
    data = tensor.data
    return np.fromfile(file, data.dtype, data.size, offset=tensor.data_offset).reshape(data.shape)
