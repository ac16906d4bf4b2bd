"""The channels over which a node pulls a peer's puts.

The first is made by the first put. Another is made beside the puts as soon as more of them are under way than
there are channels, up to a limit: the node drives one put over a channel at a time, and what it does between
two puts would otherwise leave the wire idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from .rdma.errors import DeadlineError, MemKVError
from .rdma.fabric import Endpoint

log = logging.getLogger("memkv.peer")

LIMIT = 2
RETRY_SECONDS = 5.0  # after a second one could not be had


class Pulls:
    """See the module. For the control thread alone.

    :param open_one: coroutine function that makes a connected endpoint.
    """

    def __init__(self, open_one: Callable[[], Awaitable[Endpoint]], limit: int = LIMIT) -> None:
        self.endpoints: list[Endpoint] = []
        self._open_one = open_one
        self._limit = limit
        self._puts = 0
        self._not_before = 0.0  # by the loop's clock: the next attempt at one more
        self._opening: asyncio.Task[None] | None = None
        self._closed = False

    @contextlib.contextmanager
    def put(self) -> Iterator[None]:
        """Around each put."""
        self._puts += 1
        try:
            yield
        finally:
            self._puts -= 1

    async def ready(self, timeout: float) -> None:
        """Returns once there is a channel.

        :raises DeadlineError: not within ``timeout`` seconds; it goes on being made.
        :raises MemKVError: why it cannot be made.
        """
        if self.endpoints:
            wanted = self._opening is None and len(self.endpoints) < min(self._limit, self._puts)
            if wanted and asyncio.get_running_loop().time() >= self._not_before:
                self._open()
            return
        opening = self._opening or self._open()
        try:
            await asyncio.wait_for(asyncio.shield(opening), timeout)
        except TimeoutError:
            if opening.done():  # just now, or with a DeadlineError of its own
                opening.result()
                return
            raise DeadlineError("no channel for puts could be opened in time", "a longer timeout") from None

    def _open(self) -> asyncio.Task[None]:
        async def opened() -> None:
            try:
                endpoint = await self._open_one()
            except MemKVError as exc:
                if not self.endpoints:
                    raise
                self._not_before = asyncio.get_running_loop().time() + RETRY_SECONDS
                log.debug("one more channel for puts: %s", exc)
                return
            if self._closed:
                endpoint.close()
            else:
                self.endpoints.append(endpoint)

        task = asyncio.get_running_loop().create_task(opened())
        self._opening = task
        task.add_done_callback(self._is_open)
        return task

    def _is_open(self, task: asyncio.Task[Any]) -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # retrieved: nobody has to wait for it

    def drop(self, gone: Sequence[Endpoint]) -> None:
        """The node says that its ends of these are gone."""
        self.endpoints = [e for e in self.endpoints if e not in gone]
        for endpoint in gone:
            endpoint.close()

    def close(self) -> None:
        """Destroys all of them: from here the node cannot READ any more."""
        self._closed = True
        self.drop(self.endpoints)
