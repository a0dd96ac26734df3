"""Writes a merged model as a transformers folder, tensor by tensor. Every changed weight is W + Δ, summed in float32 and
rounded once.

The result has the checkpoint's tensor names and dtypes. Tensors that the blend does not change are copied.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_compose.checkpoint.reading import Checkpoint, open_checkpoint
from model_compose.checkpoint.shards import Entry, write_shards
from model_compose.errors import AdapterError
from model_compose.export import SHARD_SIZE, Export, Format, overflow
from model_compose.export.card import write_card
from model_compose.export.destination import check_free
from model_compose.lora.adapter import ModuleShape
from model_compose.lora.blend import delta
from model_compose.lora.layers import module_shapes
from model_compose.progress import Progress, Report
from model_compose.sources.choice import choose, has_weights

TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files with terms of use, which licences require to be passed on."""


@dataclass(frozen=True)
class Part:
    """One tensor of the result: the checkpoint's tensor `stored` plus the delta of the module `path`, if `path` is given.

    transposed: the weight is (in, out), the transpose of a delta (Conv1D, Embedding).
    """

    stored: str
    path: str | None = None
    transposed: bool = False


def write(export: Export, folder: Path, report: Report) -> None:
    """Write the folder. Raises InputError, AdapterError or LoadError."""
    checkpoint = open_checkpoint(export.base, export.model)
    parts, untied = plan(export, checkpoint)
    entries = {name: _entry(checkpoint.entries[part.stored], export.dtype) for name, part in parts.items()}
    total = sum(entry.nbytes for entry in entries.values())
    check_free(folder.parent, total)
    folder.mkdir()
    written = 0

    def tell(size: int) -> None:
        nonlocal written
        written += size
        report(Progress("writing", written, total))

    def make(name: str) -> Tensor:
        return _make(export, checkpoint, name, parts[name], entries[name].dtype)

    report(Progress("writing", 0, total))
    write_shards(folder, entries, make, export.order.shard_size or SHARD_SIZE, tell)
    _copy_files(export, folder)
    _write_config(folder / "config.json", _config_dtype(export, entries), untied=untied)
    write_card(export, folder)


def plan(export: Export, checkpoint: Checkpoint) -> tuple[dict[str, Part], bool]:
    """The tensors to write, by name, and whether tied weights become separate ones because the blend changes one of them.

    Raises AdapterError for a module whose weight is not a single tensor of the checkpoint.
    """
    parts = {name: Part(name) for name in checkpoint.entries}
    names = {key: checkpoint.stored(key) for key in export.model.state_dict()}
    touched = {path for adapter in export.adapters.values() for path in adapter.modules}
    untied = False
    for target, source in export.model.all_tied_weights_keys.items():
        one, other = names[target], names[source]
        if one is not None and other is not None:
            if not torch.equal(checkpoint.read(one), checkpoint.read(other)):
                continue  # transformers does not tie weights that differ in the checkpoint
            del parts[one]
        stored = other or one
        if stored is not None and touched & {_module(target), _module(source)}:
            untied = True
            names[target], names[source] = one or target, other or source
            parts |= {one or target: Part(stored), other or source: Part(stored)}
    shapes = module_shapes(export.model)
    for path in touched:
        name = names[f"{path}.weight"]
        if name is None:
            raise AdapterError(
                f"the adapters change {path}, but {export.base} does not store its weight as a single tensor, so nothing "
                "can be added to it"
            )
        parts[name] = _touched(path, shapes[path], parts[name].stored, checkpoint)
    return parts, untied


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _touched(path: str, shape: ModuleShape, stored: str, checkpoint: Checkpoint) -> Part:
    """The part with the module's delta. Raises AdapterError if the stored tensor's shape is not that of the weight."""
    transposed = shape.kind != "linear"
    expected = (shape.inputs, shape.outputs) if transposed else (shape.outputs, shape.inputs)
    found = checkpoint.entries[stored].shape
    if found != expected:
        raise AdapterError(
            f"the base stores {stored} with the shape {found}, but by its config the weight of {path} has {expected}"
        )
    return Part(stored, path, transposed)


def _make(export: Export, checkpoint: Checkpoint, name: str, part: Part, dtype: torch.dtype) -> Tensor:
    weight = checkpoint.read(part.stored)
    change = None if part.path is None else delta(export.blend, export.adapters, part.path)
    made = weight.to(dtype) if change is None else add(weight, change.T if part.transposed else change, dtype)
    if made.dtype == torch.float16 and (change is not None or weight.dtype != dtype) and not made.isfinite().all():
        raise overflow(name)
    return made


def add(weight: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """W + Δ, summed in float32 (float64 if W is) and rounded once to `dtype`. May overwrite `change` to save memory."""
    total = change.to(torch.promote_types(weight.dtype, torch.float32))
    return total.add_(weight).to(dtype)


def _entry(stored: Entry, dtype: torch.dtype | None) -> Entry:
    return Entry(dtype, stored.shape) if dtype is not None and stored.dtype.is_floating_point else stored


def _copy_files(export: Export, folder: Path) -> None:
    """Copy the files that transformers reads besides the weights, and the terms of use. For a GGUF base, write the config
    and the tokenizer that the GGUF file contains."""
    base = export.base
    if base.file is not None:
        from model_compose.engines.tokenizer import load_tokenizer

        model = export.model
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        load_tokenizer(base, export.options.trust_remote_code).save_pretrained(folder)
        return
    there = [path.relative_to(base.folder).as_posix() for path in base.folder.rglob("*") if path.is_file()]
    small = choose(there, repository=str(base), filename=None, allow=None, only=None)
    terms = [path.name for pattern in TERMS for path in base.folder.glob(pattern) if path.is_file()]
    for name in {*small, *terms}:
        if not has_weights([name]) and not name.endswith(".index.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.folder / name, folder / name)


def _config_dtype(export: Export, entries: Mapping[str, Entry]) -> torch.dtype | None:
    """The dtype to write into the config; None keeps the config's own.

    The config of a GGUF base has none, so it gets the dtype with the most bytes.
    """
    if export.dtype is not None or export.base.file is None:
        return export.dtype
    sizes: dict[torch.dtype, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _write_config(path: Path, dtype: torch.dtype | None, *, untied: bool) -> None:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    inner = config.get("text_config")
    for level in (config, inner) if isinstance(inner, dict) else (config,):
        if dtype is not None:
            key = "torch_dtype" if "torch_dtype" in level else "dtype"  # keep the older key, for older readers
            level[key] = str(dtype).removeprefix("torch.")
        if untied:
            level["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


FORMAT = Format(write, weights=True, sharded=True)
