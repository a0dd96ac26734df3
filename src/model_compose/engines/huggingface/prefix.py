"""The prefix cache: keys and values of texts that have ended, for prompts that start with the same tokens and blend.

Keys and values depend on every weight, so an entry is only used for the blend (by its identity) that computed it.
Entries take part of the KV cache's budget. They are dropped, least recently used first, when a running sequence needs
the room.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from model_compose.engines.huggingface.cache import KVCache, Row
from model_compose.engines.prompts import common

CHUNK = 16
"""Prefixes are found by chunks of this many tokens. A text that is shorter than one chunk is not kept."""

Chain = tuple[int, int]
"""The number of a chunk, and a hash of the blend's identity and all tokens up to the chunk's end."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Tokens with their keys and values by layer, (heads, tokens, dim) each. size: in bytes."""

    identity: str
    tokens: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    size: int


class PrefixCache:
    """queries, hits: how many prompt tokens were looked up and how many were found, here or in running sequences."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._entries: OrderedDict[Entry, None] = OrderedDict()
        self._chunks: dict[Chain, list[Entry]] = {}
        self.queries = self.hits = 0
        self.size = 0
        """In bytes; the KV cache counts them as spent."""

    def find(self, identity: str, tokens: Collection[int]) -> tuple[Entry | None, int]:
        """The entry that shares the longest beginning with these tokens, and the length of that in tokens."""
        for chain in reversed(list(_chains(identity, tokens))):
            alike = [entry for entry in self._chunks.get(chain, ()) if entry.identity == identity]
            entry = max(alike, key=lambda entry: common(entry.tokens, tokens), default=None)
            if entry is not None and (length := common(entry.tokens, tokens)) >= CHUNK:
                self._entries.move_to_end(entry)
                return entry, length
        return None, 0

    def keep(self, identity: str, tokens: Collection[int], row: Row) -> None:
        """Keeps a copy of the row's keys and values of these tokens, if there is room or older entries can be dropped."""
        found, length = self.find(identity, tokens)
        size = len(tokens) * self._cache.token_bytes
        if len(tokens) < CHUNK or length == len(tokens):
            return
        if found is not None and length == len(found.tokens):  # the new entry contains it
            self._drop(found)
        if not self.make_room(size):
            return
        layers = tuple(
            (keys.clone(), values.clone())
            for keys, values in (row.views(layer, len(tokens)) for layer in range(len(row.block.keys)))
        )
        entry = Entry(identity, tuple(tokens), layers, size)
        self._cache.spent += size
        self.size += size
        self._entries[entry] = None
        for chain in _chains(identity, tokens):
            self._chunks.setdefault(chain, []).append(entry)

    def make_room(self, size: int) -> bool:
        """Drops entries until the cache has `size` bytes left. Returns False, and drops none, if that is impossible."""
        if self._cache.spent - self.size + size > self._cache.budget:
            return False
        while self._cache.spent + size > self._cache.budget:
            self._drop(next(iter(self._entries)))
        return True

    def drop_one(self) -> bool:
        """Drops the least recently used entry. Returns False if there is none."""
        if not self._entries:
            return False
        self._drop(next(iter(self._entries)))
        return True

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry]
        self._cache.spent -= entry.size
        self.size -= entry.size
        for chain in _chains(entry.identity, entry.tokens):
            self._chunks[chain].remove(entry)
            if not self._chunks[chain]:
                del self._chunks[chain]


def paste(entry: Entry, row: Row, tokens: int) -> None:
    """Copies the first `tokens` keys and values of an entry into a row."""
    for layer, kept in enumerate(entry.layers):
        for target, source in zip(row.views(layer, tokens), kept, strict=True):
            target.copy_(source[:, :tokens])


def _chains(identity: str, tokens: Iterable[int]) -> Iterator[Chain]:
    tokens = tuple(tokens)
    value = hash(identity)
    for start in range(0, len(tokens) - CHUNK + 1, CHUNK):
        value = hash((value, tokens[start : start + CHUNK]))
        yield start // CHUNK, value
