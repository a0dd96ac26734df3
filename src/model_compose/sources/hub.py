"""Fetches repositories of the Hugging Face Hub, through huggingface_hub and its cache.

huggingface_hub's own settings work as usual: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and `hf auth login`. The library
gives a file its final name in the cache only after the last byte has arrived, so a file in the cache is always
complete. If the connection drops, the download continues where it stopped. If the process ends, finished files stay and
unfinished ones start again from the beginning.
"""

import glob
import json
import re
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError

from model_compose.errors import SourceError
from model_compose.progress import Progress, Report, silent
from model_compose.schema import LocalPath, Options, Secret
from model_compose.sources import local
from model_compose.sources.choice import choose, has_weights
from model_compose.sources.fetched import Fetched
from model_compose.sources.hub_errors import Failure, hub_errors

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?!.*(--|\.\.))(?:{_PART}/)?{_PART}(?<!\.git)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repository(text: str) -> bool:
    """Whether `text` could be a repository's name: org/name, or an old name without an organisation, such as gpt2."""
    return len(text) <= 96 and _REPOSITORY.fullmatch(text) is not None


class HuggingfaceSource(Options):
    """A repository of the Hub. `filename` asks for one of its files (a GGUF base) together with configs and
    tokenizer."""

    provider: Literal["huggingface"] = Field(default="huggingface", description="The Hugging Face Hub")
    repository: str = Field(description="org/name")
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit; the main branch if unset"
    )
    filename: str | None = Field(
        default=None, min_length=1, description="One weights file of the repository, such as a GGUF"
    )
    cache_dir: LocalPath | None = Field(
        default=None, min_length=1, description="The cache to use instead of the Hub's own (HF_HOME)"
    )
    allow_patterns: tuple[str, ...] | None = Field(
        default=None, description="Globs of the files to fetch; what a model needs if unset"
    )
    local_files_only: bool = Field(
        default=False, description="Whether to use only what is in the cache already, and never ask the network"
    )
    token: Annotated[SecretStr | None, Secret(unset_is_none=True)] = Field(
        default=None, description="The Hub's token; the login of `hf auth login` if unset"
    )

    @field_validator("repository")
    @classmethod
    def _names_a_repository(cls, repository: str) -> str:
        if not is_repository(repository):
            message = f"'{repository}' cannot be a Hub repository (org/name); for a local folder use 'path'"
            raise PydanticCustomError("repository", "{message}", {"message": message})
        return repository

    @field_validator("allow_patterns", mode="before")
    @classmethod
    def _one_pattern_is_a_list(cls, patterns: Any) -> Any:
        return (patterns,) if isinstance(patterns, str) else patterns

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f":{self.filename}" if self.filename else "")


@dataclass(frozen=True)
class _Query:
    """The source to fetch, with its settings resolved. With `token` None, huggingface_hub uses the login, if any."""

    source: HuggingfaceSource
    base_dir: Path
    cache: Path | None
    token: str | None
    only: Collection[str] | None

    def choose(self, names: set[str]) -> list[str]:
        source = self.source
        return choose(
            names,
            repository=source.repository,
            filename=source.filename,
            allow=source.allow_patterns,
            only=self.only,
        )

    def fetched(self, folder: Path, names: Collection[str]) -> Fetched:
        """The result. `folder` is a snapshot folder of the cache; its name is the commit's hash."""
        file = self.source.filename if self.source.filename in names else None
        identity = f"huggingface:{self.source.repository}@{folder.name}" + (f":{file}" if file else "")
        return Fetched(folder, file, identity, str(self.source))


def fetch(source: HuggingfaceSource, *, base_dir: Path, only: Collection[str] | None, report: Report) -> Fetched:
    """Make sure that the Hub's cache holds all wanted files, and return their snapshot folder. Raises SourceError.

    For a branch or tag, this asks the Hub for the current commit. If the Hub cannot be reached, the commit in the cache
    is used, provided all its wanted files are there. A revision that is a full commit hash is looked up without the
    network.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    query = _query(source, base_dir, only)
    if (cached := _settled(query)) is not None:
        return cached
    try:
        return _download(query, report)
    except hub_errors() as error:
        if not isinstance(error, RevisionNotFoundError) and (cached := _cached(query)):
            return cached
        raise SourceError(_failure(query).explain(error)) from error


def fetch_offline(source: HuggingfaceSource, *, base_dir: Path) -> Fetched | None:
    """What `fetch` would return, if it would not ask the Hub: a full commit hash, or any revision with
    `local_files_only`.

    None if it would ask the Hub. Raises SourceError if `local_files_only` forbids asking and the cache lacks the files.
    """
    if not (source.local_files_only or _is_pinned(source)):
        return None
    return _settled(_query(source, base_dir, None))


def _query(source: HuggingfaceSource, base_dir: Path, only: Collection[str] | None) -> _Query:
    cache = local.absolute(source.cache_dir, base_dir) if source.cache_dir else None
    return _Query(source, base_dir, cache, _token(source), only)


def _is_pinned(source: HuggingfaceSource) -> bool:
    return source.revision is not None and _COMMIT.fullmatch(source.revision) is not None


def _settled(query: _Query) -> Fetched | None:
    """The cached snapshot, if the Hub need not be asked (a full commit hash) or must not be (`local_files_only`).

    None if the Hub has to be asked. Raises SourceError if it must not be asked and the cache lacks the files.
    """
    source = query.source
    if (source.local_files_only or _is_pinned(source)) and (cached := _cached(query)):
        return cached
    if source.local_files_only:
        raise SourceError(
            f"{source} is missing or incomplete in the cache {_cache_folder(query)}, and `local_files_only` forbids "
            "fetching it: remove that option for one run, or point to a local folder."
        )
    return None


def sizes(source: HuggingfaceSource, *, base_dir: Path) -> tuple[dict[str, int], int]:
    """The size in bytes of each file that `fetch` wants, and the bytes of those that are not in the cache yet.

    Fetches no files. If the Hub cannot be reached, the file listing in the cache is used. Raises SourceError.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    query = _query(source, base_dir, None)
    if source.local_files_only:
        fetched = fetch(source, base_dir=base_dir, only=None, report=silent)  # from the cache, or SourceError
        return fetched.sizes(), 0
    try:
        listing = _listing(query)
    except hub_errors() as error:
        if isinstance(error, RevisionNotFoundError) or (known := _listing_in_cache(query)) is None:
            raise SourceError(_failure(query).explain(error)) from error
        listing = known
    missing = sum(size for name, size in listing.sizes.items() if name not in listing.cached)
    return dict(listing.sizes), missing


def _token(source: HuggingfaceSource) -> str | None:
    token = source.token.get_secret_value() if source.token else ""
    if not re.fullmatch(r"[!-~]*", token):  # httpx would quote the token in its error
        raise SourceError(
            f"The `token` for {source} has spaces, line breaks or other characters that a token never has: copy it again."
        )
    return token or None


# Asking the Hub.


@dataclass(frozen=True)
class _Listing:
    """The files to fetch. `sizes`: bytes by name. `cached`: the names that are in the cache already."""

    sizes: Mapping[str, int]
    cached: frozenset[str]


def _listing(query: _Query) -> _Listing:
    from huggingface_hub import HfApi

    source = query.source
    info = HfApi(token=query.token).model_info(
        source.repository, revision=source.revision, timeout=20, files_metadata=True
    )
    return _chosen(query, {file.rfilename: file.size or 0 for file in info.siblings or []}, info.sha)


def _chosen(query: _Query, sizes: Mapping[str, int], revision: str | None) -> _Listing:
    from huggingface_hub import try_to_load_from_cache

    source = query.source
    names = query.choose(set(sizes))
    if not names:
        wanted = f"file that matches {' or '.join(query.only)}" if query.only else "model files"
        raise SourceError(f"{source} has no {wanted}.")
    cached = [
        name
        for name in names
        if isinstance(try_to_load_from_cache(source.repository, name, query.cache, revision), str)
    ]
    return _Listing({name: sizes[name] for name in names}, frozenset(cached))


def _download(query: _Query, report: Report) -> Fetched:
    from huggingface_hub import snapshot_download

    source = query.source
    listing = _listing(query)
    names = list(listing.sizes)
    total = sum(listing.sizes.values())
    start = sum(size for name, size in listing.sizes.items() if name in listing.cached)

    def tell(done: int) -> None:
        report(Progress(f"Downloading {source}", min(done, total), total))

    tell(start)
    folder = snapshot_download(
        source.repository,
        revision=source.revision,
        cache_dir=query.cache,
        token=query.token,
        allow_patterns=[glob.escape(name) for name in names],
        tqdm_class=_byte_bar(lambda fetched: tell(start + fetched)),
    )
    tell(total)
    return query.fetched(Path(folder), names)


def _byte_bar(tell: Callable[[int], None]) -> Any:
    """A progress bar class that draws nothing and calls `tell` with the bytes fetched so far.

    huggingface_hub updates two bars of bytes, one for received and one for written. Compression and buffers let either
    of them run ahead, so the larger count is the one reported.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # documented, though not exported

    lock, furthest = threading.Lock(), 0

    class ByteBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            with lock:
                self.n += n or 0
                if self.counts_bytes and self.n > furthest:
                    furthest = int(self.n)
                    tell(furthest)
            return None

    return ByteBar


# Reading only the cache.


def _cached(query: _Query) -> Fetched | None:
    """The snapshot in the cache, if it has every wanted file; else None."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError, LocalEntryNotFoundError

    repository, revision = query.source.repository, query.source.revision
    try:
        folder = Path(snapshot_download(repository, revision=revision, cache_dir=query.cache, local_files_only=True))
    except IncompleteSnapshotError as error:  # not the whole repository, but maybe all wanted files
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None
    try:
        names = {file.path for file in get_cached_repo_tree(repository, revision=revision, cache_dir=query.cache)}
        listed = True
    except CachedRepoTreeNotFoundError:
        names, listed = _names_on_disk(folder), False
    try:
        chosen = query.choose(names)
    except SourceError:
        if listed:
            raise
        return None
    whole = all((folder / name).is_file() for name in chosen)
    weights = listed or query.only is not None or has_weights(chosen)
    return query.fetched(folder, chosen) if chosen and whole and weights else None


def _listing_in_cache(query: _Query) -> _Listing | None:
    """The listing that an earlier fetch stored in the cache (a fetch of the configs alone stores the full one)."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    repository, revision = query.source.repository, query.source.revision
    try:
        tree = get_cached_repo_tree(repository, revision=revision, cache_dir=query.cache)
    except CachedRepoTreeNotFoundError:
        return None
    return _chosen(query, {file.path: file.size for file in tree}, revision)


def _names_on_disk(folder: Path) -> set[str]:
    """The files that a complete snapshot should have, as far as we can tell: those on the disk, and the shards that an
    index file lists. For snapshots of tools that store no listing in the cache."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for index in folder.glob("*.index.json"):
        names.update(json.loads(index.read_text("utf-8-sig")).get("weight_map", {}).values())
    return names


def _cache_folder(query: _Query) -> Path:
    from huggingface_hub import constants

    return query.cache or Path(constants.HF_HUB_CACHE)


def _failure(query: _Query) -> Failure:
    source = query.source
    return Failure(
        name=str(source),
        repository=source.repository,
        revision=source.revision or "main",
        cache=_cache_folder(query),
        with_token=query.token is not None,
        local_namesake=(query.base_dir / source.repository).exists(),
    )
