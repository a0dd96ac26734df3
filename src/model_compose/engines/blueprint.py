"""Builds a base model from its config alone: on the meta device, with shapes but without weights. plan, inspection,
export, preflight and the drivers use it.
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
    """A base without its weights. name: its name in messages. config: transformers' config. model: on the meta device."""

    name: str
    config: Any
    model: nn.Module

    @cached_property
    def shapes(self) -> dict[str, ModuleShape]:
        """The modules that an adapter may change, by path."""
        return module_shapes(self.model)


def read_blueprint(options: ModelOptions, base: Fetched) -> Blueprint:
    """Build the base from its files. Runs the repository's own code if options.trust_remote_code is set.

    base: a fetched folder or GGUF file; a folder's weights may be missing. Raises LoadError.
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
    """The config's model with shapes but without weights. Does not change the config."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return model


def other_base(adapter: LoraAdapter, options: ModelOptions, base: Fetched) -> str | None:
    """A warning about an adapter that was trained on a base with another name on the Hub, as a sentence without its subject
    (the adapter). None if the names agree, or if one of them is unknown.

    This is no error, since the other name may be a re-upload of the same base. The adapter's shapes have been checked
    before. Names of local folders and files prove nothing and are ignored.
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
    # A GGUF file has its model's name, followed by a dot and the quantisation.
    same = trained_on in known or (base.file or "").lower().startswith(f"{trained_on}.")
    if same:
        return None
    other = next(iter(known.values()))
    return f"was trained on {adapter.base}, but the base model is {other}; the shapes fit, but the text may be worse"


def _on_hub(name: str) -> bool:
    """Whether the name is that of a Hub repository, rather than of a local folder."""
    return "/" in name and is_repository(name)


def _last(reference: str) -> str:
    """The last part of a Hub name, in lower case and without the -GGUF that repositories of GGUF files end with."""
    return Path(reference).name.lower().removesuffix("-gguf")


@contextmanager
def load_errors(name: str, device: torch.device) -> Iterator[None]:
    """A context in which every error of torch and transformers while loading becomes a LoadError of one sentence."""
    try:
        yield
    except ComposeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(name, device) from error
    except Exception as error:  # a config, damaged files or a model's own code may raise anything
        text = str(error)
        if "allocate memory" in text or "Cannot allocate" in text or "bad alloc" in text:
            raise _out_of_memory(name, device) from error
        why = reason(error)
        if "trust_remote_code=True" in text:  # transformers' advice is an argument in Python
            why = (
                "it needs custom code from its own repository; read that code, then set options.trust_remote_code: true"
            )
        if isinstance(error, AttributeError | TypeError | LookupError | AssertionError):  # their text alone says little
            why = f"{type(error).__name__}: {why}"
        raise LoadError(f"{name} cannot be loaded as a causal language model: {why}") from error


def _out_of_memory(name: str, device: torch.device) -> LoadError:
    return LoadError(
        f"out of memory on {device} while loading {name}; use a smaller precision (bfloat16 halves float32), a smaller "
        "model, or another device"
    )
