"""Repositories of the Hugging Face Hub, through huggingface_hub and its cache.

HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and `hf auth login` are that library's and hold. Its cache is whole by
construction: a file appears under its name only when all its bytes are there. A dropped connection is taken up where it
broke; a download that was ended keeps its finished files, and the unfinished ones start anew.
"""

import glob
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
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
    """Whether `text` could name a repository: org/name, or one of the old names without an org, such as gpt2."""
    return len(text) <= 96 and _REPOSITORY.fullmatch(text) is not None


class HuggingfaceSource(Options):
    """A repository of the Hub; `filename` asks for one file of it (a GGUF base) and the small ones that go with it."""

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
            message = f"'{repository}' is not a repository of the Hub (org/name); for a local folder use 'path'"
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
class _Call:
    """One fetch: the source with what follows from it. `token` None leaves the choice to huggingface_hub (a login)."""

    source: HuggingfaceSource
    base_dir: Path
    cache: Path | None
    token: str | None
    only: Sequence[str] | None

    def choose(self, names: set[str]) -> list[str]:
        source = self.source
        return choose(
            names,
            repository=source.repository,
            filename=source.filename,
            allow=source.allow_patterns,
            only=self.only,
        )

    def fetched(self, folder: Path, names: Sequence[str]) -> Fetched:
        """`folder` is a snapshot, whose name is the commit."""
        file = self.source.filename if self.source.filename in names else None
        identity = f"huggingface:{self.source.repository}@{folder.name}" + (f":{file}" if file else "")
        return Fetched(folder, file, identity, str(self.source))


def fetch(source: HuggingfaceSource, *, base_dir: Path, only: Sequence[str] | None, report: Report) -> Fetched:
    """A snapshot in the Hub's cache that has all files wanted. Raises SourceError.

    Asks the Hub which commit a branch stands at; without network the cached commit serves, if it is whole. A revision
    that is a commit needs no asking.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    call = _call(source, base_dir, only)
    if (cached := _settled(call)) is not None:
        return cached
    try:
        return _download(call, report)
    except hub_errors() as error:
        if not isinstance(error, RevisionNotFoundError) and (cached := _cached(call)):
            return cached
        raise SourceError(_failure(call).explain(error)) from error


def at_hand(source: HuggingfaceSource, *, base_dir: Path) -> Fetched | None:
    """What a fetch would give without asking the Hub: a commit, or with `local_files_only` anything, that is in the cache.

    None where it would ask. Raises SourceError where it must not and there is nothing.
    """
    if not (source.local_files_only or _is_pinned(source)):
        return None
    return _settled(_call(source, base_dir, None))


def _call(source: HuggingfaceSource, base_dir: Path, only: Sequence[str] | None) -> _Call:
    cache = local.absolute(source.cache_dir, base_dir) if source.cache_dir else None
    return _Call(source, base_dir, cache, _token(source), only)


def _is_pinned(source: HuggingfaceSource) -> bool:
    return source.revision is not None and _COMMIT.fullmatch(source.revision) is not None


def _settled(call: _Call) -> Fetched | None:
    """The snapshot in the cache, where the Hub need not or must not be asked. Raises SourceError."""
    source = call.source
    if (source.local_files_only or _is_pinned(source)) and (cached := _cached(call)):
        return cached
    if source.local_files_only:
        raise SourceError(
            f"{source} is not, or not wholly, in the cache {_cache_folder(call)}, and `local_files_only` forbids to "
            "fetch it: leave that option out once, or point to a local folder."
        )
    return None


def sizes(source: HuggingfaceSource, *, base_dir: Path) -> tuple[dict[str, int], int]:
    """The bytes of each file that a fetch would bring, and the bytes that are not in the cache yet. Raises SourceError.

    Fetches nothing. Without network the listing in the cache serves.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    call = _call(source, base_dir, None)
    if source.local_files_only:
        fetched = fetch(source, base_dir=base_dir, only=None, report=silent)  # from the cache, or SourceError
        return _sizes_on_disk(fetched.folder), 0
    try:
        listing = _listing(call)
    except hub_errors() as error:
        if isinstance(error, RevisionNotFoundError) or (known := _listing_in_cache(call)) is None:
            raise SourceError(_failure(call).explain(error)) from error
        listing = known
    missing = sum(size for name, size in listing.sizes.items() if name not in listing.there)
    return dict(listing.sizes), missing


def _token(source: HuggingfaceSource) -> str | None:
    token = source.token.get_secret_value() if source.token else ""
    if not re.fullmatch(r"[!-~]*", token):  # the HTTP library would quote it in its complaint
        raise SourceError(
            f"The `token` for {source} has spaces, line breaks or letters that no token has: copy it again."
        )
    return token or None


# Online.


@dataclass(frozen=True)
class _Listing:
    """The files that a call wants: their bytes, and which of them are in the cache."""

    sizes: Mapping[str, int]
    there: frozenset[str]


def _listing(call: _Call) -> _Listing:
    from huggingface_hub import HfApi

    source = call.source
    info = HfApi(token=call.token).model_info(
        source.repository, revision=source.revision, timeout=20, files_metadata=True
    )
    return _chosen(call, {file.rfilename: file.size or 0 for file in info.siblings or []}, info.sha)


def _chosen(call: _Call, sizes: Mapping[str, int], revision: str | None) -> _Listing:
    from huggingface_hub import try_to_load_from_cache

    source = call.source
    names = call.choose(set(sizes))
    if not names:
        raise SourceError(f"{source} has none of the files {', '.join(call.only or ['that a model is made of'])}.")
    there = [
        name for name in names if isinstance(try_to_load_from_cache(source.repository, name, call.cache, revision), str)
    ]
    return _Listing({name: sizes[name] for name in names}, frozenset(there))


def _download(call: _Call, report: Report) -> Fetched:
    from huggingface_hub import snapshot_download

    source = call.source
    listing = _listing(call)
    names = list(listing.sizes)
    total = sum(listing.sizes.values())
    start = sum(size for name, size in listing.sizes.items() if name in listing.there)

    def tell(done: int) -> None:
        report(Progress(f"Downloading {source}", min(done, total), total))

    tell(start)
    folder = snapshot_download(
        source.repository,
        revision=source.revision,
        cache_dir=call.cache,
        token=call.token,
        allow_patterns=[glob.escape(name) for name in names],
        tqdm_class=_byte_bar(lambda fetched: tell(start + fetched)),
    )
    tell(total)
    return call.fetched(Path(folder), names)


def _byte_bar(tell: Callable[[int], None]) -> Any:
    """A bar that draws nothing and tells how many bytes have come.

    huggingface_hub keeps two bars of bytes, received and written; each may run ahead (compression, buffers), so the
    further one counts.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # not said to be public, but documented

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


# From the cache alone.


def _cached(call: _Call) -> Fetched | None:
    """The snapshot in the cache, if it has every file that an online fetch would want."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError, LocalEntryNotFoundError

    repository, revision = call.source.repository, call.source.revision
    try:
        folder = Path(snapshot_download(repository, revision=revision, cache_dir=call.cache, local_files_only=True))
    except IncompleteSnapshotError as error:  # not all of the repository: perhaps all that we want
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None
    try:
        names = {file.path for file in get_cached_repo_tree(repository, revision=revision, cache_dir=call.cache)}
        listed = True
    except CachedRepoTreeNotFoundError:
        names, listed = _names_on_disk(folder), False
    try:
        chosen = call.choose(names)
    except SourceError:
        if listed:
            raise
        return None
    whole = all((folder / name).is_file() for name in chosen)
    weights = listed or call.only is not None or has_weights(chosen)
    return call.fetched(folder, chosen) if chosen and whole and weights else None


def _listing_in_cache(call: _Call) -> _Listing | None:
    """The listing that an earlier fetch, of configs perhaps, left behind."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    repository, revision = call.source.repository, call.source.revision
    try:
        tree = get_cached_repo_tree(repository, revision=revision, cache_dir=call.cache)
    except CachedRepoTreeNotFoundError:
        return None
    return _chosen(call, {file.path: file.size for file in tree}, revision)


def _sizes_on_disk(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _names_on_disk(folder: Path) -> set[str]:
    """The files of a snapshot that another tool fetched without a listing, and the shards that an index promises."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for index in folder.glob("*.index.json"):
        names.update(json.loads(index.read_text("utf-8-sig")).get("weight_map", {}).values())
    return names


def _cache_folder(call: _Call) -> Path:
    from huggingface_hub import constants

    return call.cache or Path(constants.HF_HUB_CACHE)


def _failure(call: _Call) -> Failure:
    source = call.source
    return Failure(
        name=str(source),
        repository=source.repository,
        revision=source.revision or "main",
        cache=_cache_folder(call),
        with_token=call.token is not None,
        local_namesake=(call.base_dir / source.repository).exists(),
    )
