"""Which blocks the nodes hold, for a scheduler that must never wait.

A key that nobody asked for yet is *pending*, and the caller asks again at its next step. All keys of a step
go to the nodes in one call, at the step's end; the answer is there at a later step. An answer is kept while a
request that asked for it lives, since a request needs the same answer each time that it asks (a key that is a
hit in one step and unknown in the next would be looked up for ever); a request that comes later trusts it for
:data:`FRESH` seconds. A block that could not be loaded counts as missing from then on, whatever the index
says, or it would be found and fail again and again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..keys import Keys
from ..peer import Peer
from ..rdma.errors import MemKVError
from ..tickets import Ticket
from .vllm_outcomes import Outcomes

FRESH = 2.0  # seconds
Asked = list[tuple[bytes, "Entry"]]


@dataclass(slots=True, eq=False)
class Entry:
    held: bool | None = None  # None: not known yet
    since: float = 0.0  # when that was known, on time.monotonic
    requests: set[str] = field(default_factory=set)  # that have asked


class Lookups:
    """Called by one thread at a time; answers arrive on the peer's control thread.

    :param keys_of: the memkv keys of n of the engine's keys, (c · n, 16): a block is held if all c of its
        keys are, of which the i-th is row i · n + (its place).
    :param timeout: seconds for an answer; what is late is a miss.
    """

    def __init__(self, peer: Peer, keys_of: Callable[[Sequence[bytes]], Keys], timeout: float) -> None:
        self._peer = peer
        self._keys_of = keys_of
        self._timeout = timeout
        self._outcomes = Outcomes("lookup")
        self._entries: dict[bytes, Entry] = {}
        self._by_request: dict[str, set[bytes]] = {}
        self._to_ask: Asked = []
        self._answers: deque[tuple[Asked, Ticket]] = deque()

    def lookup(self, key: bytes, request: str) -> bool | None:
        """True or False, or None: ask again at a later step."""
        if self._answers:
            self._take_answers()
        entry = self._entries.get(key)
        if entry is not None and entry.held is not None and request not in entry.requests:
            if time.monotonic() - entry.since > FRESH:
                entry = self._ask(key, entry.requests)
        elif entry is None:
            entry = self._ask(key, set())
        assert entry is not None
        entry.requests.add(request)
        self._by_request.setdefault(request, set()).add(key)
        return entry.held

    def _ask(self, key: bytes, requests: set[str]) -> Entry:
        entry = self._entries[key] = Entry(requests=requests)
        self._to_ask.append((key, entry))
        return entry

    def flush(self) -> None:
        """Asks the nodes for all that is pending, in one call. To be called at each step's end."""
        self._take_answers()
        asked = [(key, entry) for key, entry in self._to_ask if self._entries.get(key) is entry]
        self._to_ask = []
        if not asked:
            return
        keys = self._keys_of([key for key, _ in asked])
        try:
            self._peer.submit_exists(keys, timeout=self._timeout, then=partial(self._answered, asked))
        except MemKVError as error:
            self._answered(asked, Ticket(done=True, error=error))

    def _answered(self, asked: Asked, ticket: Ticket) -> None:
        self._answers.append((asked, ticket))

    def _take_answers(self) -> None:
        now = time.monotonic()
        while self._answers:
            asked, ticket = self._answers.popleft()
            count = len(asked) if ticket.status is None else len(ticket.status)
            good = self._outcomes.good(ticket, count).reshape(-1, len(asked))
            held: list[bool] = np.all(good, axis=0).tolist()
            for i, (_, entry) in enumerate(asked):
                if entry.held is None:  # not marked meanwhile
                    entry.held, entry.since = held[i], now

    def mark(self, keys: Iterable[bytes], held: bool) -> None:
        """What is known of these blocks from elsewhere: they were stored just now, or could not be loaded."""
        now = time.monotonic()
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                entry.held, entry.since = held, now

    def release(self, request: str) -> None:
        """The request is over."""
        for key in self._by_request.pop(request, ()):
            entry = self._entries.get(key)
            if entry is not None:
                entry.requests.discard(request)
                if not entry.requests:
                    del self._entries[key]

    def clear(self) -> None:
        """Forgets every answer; requests that live ask anew."""
        self._entries.clear()
        self._by_request.clear()
        self._to_ask = []
