"""The weights of a GGUF file as transformers' parameters: dequantised one by one, in transformers' layout and names.

transformers' own loader does the same for all tensors at once; its parts for a single tensor are used here.
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
"""What is not one of these is quantised, and float32 once unpacked: that loses nothing."""


class GgufCheckpoint:
    """Its stored names are the parameters' own."""

    def __init__(self, file: Path, model: "PreTrainedModel") -> None:
        """Raises LoadError where parameters are not one tensor of the file each."""
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
                f"{file.name} ({architecture}) has no tensor of its own for {sorted(missing)[0]}, so it cannot be "
                "written as safetensors; export --format gguf-merged, or use the model's safetensors as the base"
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
    """The bytes of a reader's tensor as an array of its own. The reader's array is a mapping of the whole file, whose pages
    would stay."""
    data = tensor.data
    return np.fromfile(file, data.dtype, data.size, offset=tensor.data_offset).reshape(data.shape)
