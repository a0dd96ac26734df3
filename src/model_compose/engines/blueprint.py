"""A base by its config alone: the model on the meta device, without weights. plan, inspection, export, preflight and the
drivers share it.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model_compose.engines.options import ModelOptions
from model_compose.errors import ComposeError, LoadError, reason
from model_compose.lora.adapter import LoraAdapter, ModuleShape
from model_compose.lora.layers import module_shapes
from model_compose.sources import Fetched, HuggingfaceSource, describe
from model_compose.sources.hub import is_repository


@dataclass(frozen=True)
class Blueprint:
    """A base without its weights. name: what messages call it. config: transformers'. model: on the meta device."""

    name: str
    config: Any
    model: nn.Module

    @cached_property
    def shapes(self) -> dict[str, ModuleShape]:
        """The modules that an adapter may act on, by their path."""
        return module_shapes(self.model)


def read_blueprint(options: ModelOptions, base: Fetched) -> Blueprint:
    """The base as its files describe it. Runs the repository's own code where options.trust_remote_code says so.

    base: a fetched folder or GGUF file; the weights may be missing. Raises LoadError.
    """
    name = describe(options.model)
    with load_errors(name, torch.device("meta")):
        config = base_config(base, options.trust_remote_code)
        return Blueprint(name, config, on_meta(config, options.trust_remote_code))


def base_config(base: Fetched, trust_remote_code: bool) -> Any:
    """The base's transformers config, from its folder or from inside a GGUF file."""
    from transformers import AutoConfig

    gguf = {"gguf_file": base.file} if base.file else {}
    return AutoConfig.from_pretrained(base.folder, trust_remote_code=trust_remote_code, local_files_only=True, **gguf)


def on_meta(config: Any, trust_remote_code: bool) -> nn.Module:
    """The model of a config without any weights: shapes alone. Leaves the config as it is."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return model


def other_base(adapter: LoraAdapter, options: ModelOptions, base: Fetched) -> str | None:
    """The base's name on the Hub where the adapter was trained on one of another name, and both names are known.

    The same shapes under another name may be meant (a re-upload), so this is no error. What a folder or a file is called
    is no evidence.
    """
    path = base.folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    source = options.model
    names: list[str | None] = [config.get("_name_or_path")]
    if isinstance(source, HuggingfaceSource):
        names.insert(0, source.repository)
    known = {_last(name): name for name in names if name and _on_hub(name)}
    if not adapter.base or not _on_hub(adapter.base) or not known:
        return None
    trained_on = _last(adapter.base)
    # A GGUF file is called like its model, with the quantisation behind a dot.
    same = trained_on in known or (base.file or "").lower().startswith(f"{trained_on}.")
    return None if same else next(iter(known.values()))


def _on_hub(name: str) -> bool:
    """Whether it names a repository of an organisation, rather than somebody's folder."""
    return "/" in name and is_repository(name)


def _last(reference: str) -> str:
    """The last part of a Hub name, in lower case. Repositories of GGUF files are called like the model, and -GGUF."""
    return Path(reference).name.lower().removesuffix("-gguf")


@contextmanager
def load_errors(name: str, device: torch.device) -> Iterator[None]:
    """Turns what torch and transformers raise while loading into one sentence with a remedy."""
    try:
        yield
    except ComposeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(name, device) from error
    except Exception as error:  # a config, a stranger's files or a model's own code may fail in any way
        text = str(error)
        if "allocate memory" in text or "Cannot allocate" in text or "bad alloc" in text:
            raise _out_of_memory(name, device) from error
        told = reason(error)
        if isinstance(error, AttributeError | TypeError | LookupError | AssertionError):  # their text alone says little
            told = f"{type(error).__name__}: {told}"
        raise LoadError(f"{name} cannot be loaded as a causal language model: {told}") from error


def _out_of_memory(name: str, device: torch.device) -> LoadError:
    return LoadError(
        f"out of memory on {device} while loading {name}; use a smaller precision (bfloat16 halves float32), a smaller "
        "model, or another device"
    )
