"""The prefix cache: keys and values of texts that have ended, for prompts that start alike under the same blend.

An entry belongs to one blend's identity and is never used for another: keys and values depend on every weight. Entries
live in the KV cache's budget and give way, least recently used first, as soon as a running sequence needs the room.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from model_compose.engines.huggingface.cache import KVCache, Row
from model_compose.engines.prompts import common

CHUNK = 16
"""Prefixes are found by chunks of so many tokens, and are worth keeping from one chunk on."""

Chain = tuple[int, int]
"""A chunk's number and the hash of all tokens up to its end, with the blend's identity."""


@dataclass(frozen=True, eq=False)
class Entry:
    """tokens, with their keys and values by layer: (heads, tokens, dim)."""

    identity: str
    tokens: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    size: int


class PrefixCache:
    """queries and hits count prompt tokens that were looked for and found, also in running sequences."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._entries: OrderedDict[Entry, None] = OrderedDict()
        self._chunks: dict[Chain, list[Entry]] = {}
        self.queries = self.hits = 0
        self.size = 0
        """Bytes, part of what the KV cache has spent."""

    def find(self, identity: str, tokens: Collection[int]) -> tuple[Entry | None, int]:
        """The entry with the longest common beginning, and its length."""
        for chain in reversed(list(_chains(identity, tokens))):
            alike = [entry for entry in self._chunks.get(chain, ()) if entry.identity == identity]
            entry = max(alike, key=lambda entry: common(entry.tokens, tokens), default=None)
            if entry is not None and (length := common(entry.tokens, tokens)) >= CHUNK:
                self._entries.move_to_end(entry)
                return entry, length
        return None, 0

    def keep(self, identity: str, tokens: Collection[int], row: Row) -> None:
        """Copies the row's keys and values of these tokens, where the budget has room or others can give way."""
        found, length = self.find(identity, tokens)
        size = len(tokens) * self._cache.token_bytes
        if len(tokens) < CHUNK or length == len(tokens):
            return
        if found is not None and length == len(found.tokens):  # the new one goes on where that ends
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
        """Lets entries go until the cache has `size` bytes left. False where that cannot be, and nothing is lost then."""
        if self._cache.spent - self.size + size > self._cache.budget:
            return False
        while self._cache.spent + size > self._cache.budget:
            self._drop(next(iter(self._entries)))
        return True

    def drop_one(self) -> bool:
        """Lets the least recently used entry go; False where there is none."""
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
    """Puts the first `tokens` keys and values of an entry into a row."""
    for layer, kept in enumerate(entry.layers):
        for target, source in zip(row.views(layer, tokens), kept, strict=True):
            target.copy_(source[:, :tokens])


def _chains(identity: str, tokens: Iterable[int]) -> Iterator[Chain]:
    tokens = tuple(tokens)
    value = hash(identity)
    for start in range(0, len(tokens) - CHUNK + 1, CHUNK):
        value = hash((value, tokens[start : start + CHUNK]))
        yield start // CHUNK, value
