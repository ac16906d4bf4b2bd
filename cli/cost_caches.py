"""Caches of blocks as the cost model needs them: which ids are held, and which one goes. No bytes.

Two policies: LRU, which engines have for their own prefix caches, and SIEVE, which a node of memkv has
(Zhang et al., NSDI 2024; memkv's is in C, beside the slabs).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

UNLIMITED = 1 << 62


class Cache(Protocol):
    """Holds at most ``capacity`` ids."""

    capacity: int

    def __contains__(self, id: int, /) -> bool: ...

    def __len__(self) -> int: ...

    def touch(self, id: int, /) -> None:
        """An id that is held was used."""

    def add(self, id: int, /) -> None:
        """Holds an id from now on, or touches it; others go where there is no room."""


class Lru:
    """The id that was not used for longest goes. A larger one holds whatever a smaller one holds."""

    def __init__(self, capacity: int = UNLIMITED) -> None:
        self.capacity = capacity
        self._ids: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    def __contains__(self, id: int) -> bool:
        return id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def touch(self, id: int) -> None:
        self._ids.move_to_end(id)

    def add(self, id: int) -> None:
        self._ids[id] = None
        self._ids.move_to_end(id)
        if len(self._ids) > self.capacity:
            self._ids.popitem(last=False)

    def use(self, prompt: Iterable[int]) -> None:
        """Adds a prompt's blocks in this order."""
        ids, capacity = self._ids, self.capacity
        for id in prompt:
            ids[id] = None
            ids.move_to_end(id)
        while len(ids) > capacity:
            ids.popitem(last=False)

    def leading(self, prompt: tuple[int, ...]) -> int:
        """How many leading blocks of a prompt are held."""
        ids, n = self._ids, 0
        for id in prompt:
            if id not in ids:
                return n
            n += 1
        return n


class Sieve:
    """A queue that new ids enter at its head. A hand walks from the tail towards the head, clears the mark of
    those that were used, and takes the first that was not; it stays where it is for the next time."""

    def __init__(self, capacity: int = UNLIMITED) -> None:
        self.capacity = capacity
        self._used: dict[int, bool] = {}
        self._newer: dict[int, int] = {}  # towards the head; -1: none
        self._older: dict[int, int] = {}
        self._head = self._tail = self._hand = -1

    def __contains__(self, id: int) -> bool:
        return id in self._used

    def __len__(self) -> int:
        return len(self._used)

    def touch(self, id: int) -> None:
        self._used[id] = True

    def add(self, id: int) -> None:
        if id in self._used:
            self._used[id] = True
            return
        if self.capacity < 1:
            return
        if len(self._used) >= self.capacity:
            self._evict()
        self._used[id] = False
        self._older[id], self._newer[id] = self._head, -1
        if self._head >= 0:
            self._newer[self._head] = id
        else:
            self._tail = id
        self._head = id

    def drop(self, id: int) -> None:
        """Forgets an id that is held."""
        del self._used[id]
        older, newer = self._older.pop(id), self._newer.pop(id)
        if older >= 0:
            self._newer[older] = newer
        else:
            self._tail = newer
        if newer >= 0:
            self._older[newer] = older
        else:
            self._head = older
        if self._hand == id:
            self._hand = newer

    def _evict(self) -> None:
        used, newer, hand = self._used, self._newer, self._hand
        if hand < 0:
            hand = self._tail
        while used[hand]:
            used[hand] = False
            hand = newer[hand]
            if hand < 0:
                hand = self._tail
        self._hand = hand
        self.drop(hand)


def cache(policy: str, capacity: int) -> Cache:
    """``lru`` or ``sieve``."""
    return Lru(capacity) if policy == "lru" else Sieve(capacity)
