"""Writes GGUF files for llama.cpp: the blend as one adapter, or a GGUF base with the blend added to its weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_compose import __version__
from model_compose.engines.options import ModelOptions
from model_compose.errors import AdapterError, InputError
from model_compose.export import Export, Format, overflow
from model_compose.export.card import facts
from model_compose.export.destination import check_free
from model_compose.lora.blend import delta, stack
from model_compose.progress import Progress, Report

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import torch

WRITTEN = {"auto": "float16", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}
"""--precision -> the dtype in which a quantised tensor is stored after the blend was added to it."""


def write_adapter(export: Export, path: Path, report: Report) -> None:
    """Write the blend as one adapter, exactly. Raises InputError for a precision other than float32, and AdapterError for
    an architecture whose row order in GGUF we do not know."""
    from model_compose.lora.gguf import Architecture, write_gguf

    if export.order.precision not in ("auto", "float32"):
        raise InputError("--precision: --format gguf writes adapters in float32; leave it out")
    stacked = replace(stack(export.blend, export.adapters), name=export.blend.name or path.stem)
    write_gguf(stacked, Architecture.of_config(export.model.config), path)


def refuse_merged(options: ModelOptions) -> None:
    """Raise InputError for a base that is not a GGUF file."""
    name = str(options.model)
    if not name.endswith(".gguf"):
        raise InputError(
            f"--format gguf-merged: {name} is not a GGUF file; use --format merged, and convert the result with "
            "llama.cpp's convert_hf_to_gguf.py"
        )


def write_merged(export: Export, path: Path, report: Report) -> None:
    """Copy the base's file tensor by tensor, and add the blend.

    All metadata, and all tensors that the blend does not change, are copied byte for byte. A tensor that the blend changes
    becomes W + Δ, dequantised and stored in 16 or 32 bits, since quantising it again would round the blend away.

    Raises AdapterError or InputError.
    """
    import gguf

    assert export.base.file is not None
    source = export.base.folder / export.base.file
    reader = gguf.GGUFReader(source)
    if gguf.Keys.Split.LLM_KV_SPLIT_COUNT in reader.fields:
        raise InputError(
            f"--format gguf-merged: {export.base.file} is one part of a split file; join the parts with llama.cpp's "
            "`llama-gguf-split --merge` and use the result as the base"
        )
    changes = _changes(export, reader)
    kinds = {tensor.name: _kind(export, tensor, tensor.name in changes) for tensor in reader.tensors}
    sizes = {tensor.name: _size(tensor, kinds[tensor.name]) for tensor in reader.tensors}
    total, written = sum(sizes.values()), 0
    check_free(path.parent, total)
    writer = gguf.GGUFWriter(path, str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents()))
    _copy_metadata(export, reader, writer)
    for tensor in reader.tensors:
        _announce(writer, tensor, kinds[tensor.name], sizes[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(_data(export, source, tensor, changes.get(tensor.name), kinds[tensor.name]))
        written += sizes[tensor.name]
        report(Progress("writing", written, total))
    writer.close()


def _changes(export: Export, reader: "gguf.GGUFReader") -> dict[str, tuple[str, str]]:
    """The kind (`lora.gguf.ADAPTED`) and module path of each tensor that the blend changes, by GGUF name.

    Raises AdapterError for a module that has no tensor of its own in the file.
    """
    from model_compose.lora.gguf import Architecture

    architecture = Architecture.of_config(export.model.config)
    there = {tensor.name for tensor in reader.tensors}
    changes = {}
    for path in {path for adapter in export.adapters.values() for path in adapter.modules}:
        found = architecture.tensor(path)
        if found is not None and architecture.tied and found[0] in ("OUTPUT", "TOKEN_EMBD"):
            raise AdapterError(
                f"the adapters change {path}, but {export.base} has one tensor for its embedding and its output head; use "
                "--format merged, which separates the two"
            )
        if found is None or found[1] not in there:
            raise AdapterError(f"the adapters change {path}, for which {export.base} has no tensor")
        changes[found[1]] = (found[0], path)
    return changes


def _kind(export: Export, tensor: Any, touched: bool) -> "gguf.GGMLQuantizationType":
    """The type in which to store a tensor. An untouched tensor keeps its type; a touched one gets the order's precision.

    With precision auto, a touched tensor keeps its type too, but a quantised one becomes F16.
    """
    import gguf

    from model_compose.checkpoint.gguf import PLAIN

    if not touched or (export.dtype is None and tensor.tensor_type in PLAIN):
        found: gguf.GGMLQuantizationType = tensor.tensor_type
        return found
    return next(kind for kind, dtype in PLAIN.items() if str(dtype).endswith(WRITTEN[export.order.precision]))


def _size(tensor: Any, kind: "gguf.GGMLQuantizationType") -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(tensor.n_elements) // block * size


def _announce(writer: "gguf.GGUFWriter", tensor: Any, kind: "gguf.GGMLQuantizationType", size: int) -> None:
    """Add the tensor to the header. The reader gives shapes from the innermost dimension, as GGUF does; the writer expects
    numpy's order."""
    import numpy as np

    if kind == tensor.tensor_type:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, size, kind)
    else:
        writer.add_tensor_info(tensor.name, [int(n) for n in reversed(tensor.shape)], np.dtype(np.float32), size, kind)


def _copy_metadata(export: Export, reader: "gguf.GGUFReader", writer: "gguf.GGUFWriter") -> None:
    import gguf

    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue  # the writer adds these itself
        if field.name == gguf.Keys.General.ALIGNMENT:
            writer.add_custom_alignment(int(field.contents()))
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_string("model_compose.version", __version__)
    writer.add_string("model_compose.identity", export.identity)
    writer.add_string("model_compose.blend", json.dumps(facts(export), ensure_ascii=False))


def _data(
    export: Export, source: Path, tensor: Any, change: tuple[str, str] | None, kind: "gguf.GGMLQuantizationType"
) -> "np.ndarray[Any, Any]":
    """The data to write for a tensor. change: kind and module path, from `_changes`. Raises InputError on overflow."""
    import gguf
    import numpy as np
    import torch

    from model_compose.checkpoint.gguf import read_tensor

    stored: np.ndarray[Any, Any] = read_tensor(source, tensor)
    if change is None:
        return stored
    part, path = change
    weight = torch.from_numpy(gguf.dequantize(stored, tensor.tensor_type))
    added = delta(export.blend, export.adapters, path)
    total = weight if added is None else _in_gguf_order(added, part, export).add_(weight)
    packed: np.ndarray[Any, Any] = gguf.quantize(total.contiguous().numpy(), kind)
    if packed.dtype == np.float16 and not np.isfinite(packed).all():
        raise overflow(tensor.name)
    return packed


def _in_gguf_order(change: "torch.Tensor", part: str, export: Export) -> "torch.Tensor":
    """A delta (out, in) in the layout of GGUF's tensor: rows reordered where GGUF does that, an embedding's transposed to
    (vocabulary, size)."""
    from model_compose.lora.gguf import PERMUTED, Architecture, permute

    architecture = Architecture.of_config(export.model.config)
    if part == "TOKEN_EMBD":
        return change.T
    if architecture.name in PERMUTED and part in ("ATTN_Q", "ATTN_K"):
        return permute(change, architecture.heads if part == "ATTN_Q" else architecture.kv_heads)
    return change


ADAPTER = Format(write_adapter, file=".gguf")
MERGED = Format(write_merged, weights=True, file=".gguf", refuse=refuse_merged)
