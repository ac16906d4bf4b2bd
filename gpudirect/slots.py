"""Places that batches take and give back, in the order in which they asked: staging slots, permits."""

from __future__ import annotations

import asyncio
from collections import deque


class Slots:
    """``count`` places in a row. Used from one event loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = bytearray(b"\1" * count)
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._free.count(1)

    async def take(self, n: int, seconds: float) -> int:
        """Takes ``n`` adjacent places, as soon as there are some and whoever asked before has been served.

        :returns: the first one; -1 if there were none in time, or never can be.
        """
        if n > self.count:
            return -1
        if not self._waiting and (first := self._find(n)) >= 0:
            return first
        if seconds <= 0:
            return -1
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((n, future))
        try:
            await asyncio.wait([future], timeout=seconds)
        except asyncio.CancelledError:
            self._forgo(n, future)
            raise
        if future.done():
            return future.result()
        self._forgo(n, future)
        return -1

    def give(self, first: int, n: int) -> None:
        """Gives places back."""
        self._free[first : first + n] = b"\1" * n
        self._serve()

    def _find(self, n: int) -> int:
        first = self._free.find(b"\1" * n)
        if first >= 0:
            self._free[first : first + n] = bytes(n)
        return first

    def _forgo(self, n: int, future: asyncio.Future[int]) -> None:
        if future.done():
            self.give(future.result(), n)
        else:
            future.cancel()
            self._waiting = deque(w for w in self._waiting if w[1] is not future)
            self._serve()

    def _serve(self) -> None:
        while self._waiting:
            n, future = self._waiting[0]
            if (first := self._find(n)) < 0:
                return
            self._waiting.popleft()
            future.set_result(first)
