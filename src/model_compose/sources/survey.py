"""How many bytes a model source has, and how many of them are not on this machine yet, without fetching the weights."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model_compose.progress import Report
from model_compose.sources import Fetched, HuggingfaceSource, LocalSource, ModelSource, PypiSource, fetch, hub, pypi

_SIMPLE = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True)
class Survey:
    """The sizes of a source's files.

    files: bytes by name. missing: bytes that are still to be fetched; None if the package index does not tell. fetched:
    the source's files as far as they are here, with the configs at least; None if the configs can only be had by
    fetching the weights (a wheel, a GGUF file).
    """

    files: Mapping[str, int]
    missing: int | None
    fetched: Fetched | None

    @property
    def total(self) -> int | None:
        return None if self.missing is None else sum(self.files.values())


def survey(source: ModelSource, *, base_dir: Path, only: tuple[str, ...], report: Report) -> Survey:
    """The sizes of a source's files. Fetches the files that match `only` (the configs) and no others.

    Raises SourceError.
    """
    match source:
        case LocalSource():
            there = fetch(source, base_dir=base_dir)
            return Survey(there.sizes(), 0, there)
        case PypiSource():
            unpacked = pypi.cached(source)
            if unpacked is not None:
                return Survey(unpacked.sizes(), 0, unpacked)
            size = _wheel_size(source)
            return Survey({} if size is None else {"wheel": size}, size, None)
        case HuggingfaceSource():
            files, missing = hub.sizes(source, base_dir=base_dir)
            if source.filename is not None:  # a single GGUF file, which contains its config
                return Survey(files, missing, None if missing else fetch(source, base_dir=base_dir, report=report))
            configs = fetch(source, base_dir=base_dir, only=only, report=report)
            missing = sum(size for name, size in files.items() if not (configs.folder / name).is_file())
            return Survey(files, missing, configs)


def _wheel_size(source: PypiSource) -> int | None:
    """The size of the wheel in bytes, from the index's JSON (PEP 691, PEP 700); None if the index does not tell."""
    import httpx

    if os.environ.get("PIP_NO_INDEX"):
        return None
    name = re.sub(r"[-_.]+", "-", source.package).lower()
    wheel = re.compile(rf"{re.escape(name.replace('-', '_'))}-{re.escape(source.version)}-.*\.whl")
    try:
        answer = httpx.get(f"{_index()}/{name}/", headers={"Accept": _SIMPLE}, timeout=20, follow_redirects=True)
        files = answer.raise_for_status().json()["files"]
        sizes = [
            int(file["size"]) for file in files if wheel.fullmatch(re.sub(r"^[^-]+", _underscored, file["filename"]))
        ]
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, KeyError, TypeError):
        return None
    return max(sizes, default=None)


def _underscored(name: re.Match[str]) -> str:
    return re.sub(r"[-_.]+", "_", name[0]).lower()


def _index() -> str:
    """The address of the package index that pip uses."""
    url = os.environ.get("PIP_INDEX_URL")
    if not url:
        command = [sys.executable, "-P", "-m", "pip", "config", "get", "global.index-url"]
        url = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return (url or "https://pypi.org/simple").rstrip("/")
