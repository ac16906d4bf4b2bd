"""Notices: what the node takes away from peers stays until every session has acknowledged it, or is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from . import messages as m


class Listener(Protocol):
    """What a namespace needs of a session."""

    def notify(self, message: m.Message) -> None: ...

    def lost(self, reason: str) -> None: ...


class Notices:
    """Numbers notices, and knows who has not acknowledged which."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._next = 1
        self._open: dict[int, set[Listener]] = {}
        self._empty: dict[int, asyncio.Event] = {}

    async def send(self, sessions: Iterable[Listener], make: Callable[[int], m.Message]) -> None:
        """Sends ``make(notice id)`` to the sessions and waits until all have acknowledged or are gone.

        A session that does not within the timeout is ended.
        """
        number, self._next = self._next, self._next + 1
        waiting = self._open[number] = set(sessions)
        empty = self._empty[number] = asyncio.Event()
        message = make(number)
        try:
            for session in list(waiting):
                session.notify(message)
            if waiting:
                try:
                    await asyncio.wait_for(empty.wait(), self.timeout)
                except TimeoutError:
                    for session in list(waiting):
                        session.lost(f"{type(message).__name__} was not acknowledged in {self.timeout:g} s")
                    await empty.wait()  # until their queue pairs are gone
        finally:
            del self._open[number], self._empty[number]

    def acknowledge(self, session: Listener, number: int) -> None:
        """From the session; unknown numbers are ignored (it may have been counted as gone)."""
        waiting = self._open.get(number)
        if waiting is not None and session in waiting:
            waiting.discard(session)
            if not waiting:
                self._empty[number].set()

    def gone(self, session: Listener) -> None:
        """The session cannot READ any more: all that it owed counts as given."""
        for number in list(self._open):
            self.acknowledge(session, number)
