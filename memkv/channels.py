"""Channels that a peer READs over: each with its scratch memory and its job, checked out by one batch at a
time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from .native._peer import ffi, lib
from .rdma.errors import DeadlineError, MemKVError
from .rdma.fabric import Domain, Endpoint
from .rdma.memory import HostMemory

FLIGHTS = 127  # keys under way at once
DEPTH = 2 * FLIGHTS + 1  # READs: two buckets each, and the epoch line


class ReadChannel:
    """A connected reading endpoint, and the C job that runs over it, all made once.

    :param gone: told when the endpoint has been closed.
    """

    def __init__(
        self, endpoint: Endpoint, domain: Domain, view: Any, gone: Callable[[Endpoint], None]
    ) -> None:
        self.endpoint = endpoint
        self._gone = gone
        self.view = view
        self._channel = ffi.cast("struct mkv_channel *", endpoint.channel)
        nbytes = FLIGHTS * lib.MKV_FLIGHT_SCRATCH + 64
        self.memory = HostMemory(nbytes, huge=False)
        self.region = domain.register(self.memory.address, self.memory.nbytes, owner=self.memory)
        self.flights = ffi.new("struct mkv_flight[]", FLIGHTS)
        self.job = ffi.new("struct mkv_getjob *")
        self.job.view = view
        self.job.flights = self.flights
        self.job.scratch = ffi.cast("uint8_t *", self.memory.address)
        self.job.scratch_region = self.region.id
        self.job.nflights = FLIGHTS
        self.uses = 0
        self.keep: Any = None  # what the job points to while it runs

    @property
    def usable(self) -> bool:
        """False once its queue pair or socket has failed."""
        return not self._channel.broken

    def start(self, timeout: float) -> None:
        """Readies the job whose inputs have been set. With no time left it ends at its first step."""
        self.uses += 1
        lib.mkv_getjob_init(self.job, self._channel, max(0, int(timeout * 1e9)))

    def close(self) -> None:
        self.endpoint.close()
        self.region.close()
        self._gone(self.endpoint)


class ChannelPool:
    """The channels to one node. Idle ones are kept; up to ``limit`` are opened on demand.

    :param open_channel: coroutine function that makes one (runs on the control thread).
    :param loop: the control thread's event loop.
    """

    def __init__(
        self, open_channel: Callable[[], Awaitable[ReadChannel]], loop: asyncio.AbstractEventLoop, limit: int
    ) -> None:
        self._open = open_channel
        self._loop = loop
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: deque[ReadChannel] = deque()
        self._busy: set[ReadChannel] = set()
        self._opening = 0
        self._waiting: deque[concurrent.futures.Future[ReadChannel]] = deque()
        self._quiet: list[tuple[set[ReadChannel], asyncio.Future[None]]] = []
        self._closed: MemKVError | None = None

    def try_take(self) -> ReadChannel | None:
        """An idle channel, at once, or None."""
        with self._lock:
            if not self._idle:
                return None
            channel = self._idle.pop()
            self._busy.add(channel)
            return channel

    def request(self) -> concurrent.futures.Future[ReadChannel]:
        """A channel for the caller alone, as soon as one is free or opened; or the reason why there is none.

        Who does not wait for it any longer says :meth:`forgo`.
        """
        future: concurrent.futures.Future[ReadChannel] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                future.set_exception(self._closed)
                return future
            if self._idle:
                channel = self._idle.pop()
                self._busy.add(channel)
                future.set_result(channel)
                return future
            self._waiting.append(future)
            more = self._opening + len(self._busy) < self._limit
            self._opening += more
        if more:
            asyncio.run_coroutine_threadsafe(self._add(), self._loop)
        return future

    def forgo(self, future: concurrent.futures.Future[ReadChannel]) -> None:
        """Takes a request back; if it was granted meanwhile, the channel goes to somebody else."""
        if not future.cancel() and not future.exception():
            self.give_back(future.result())

    async def take(self, timeout: float) -> ReadChannel:
        """The same on the control thread.

        :raises DeadlineError: none within ``timeout`` seconds. :raises MemKVError: the link is down.
        """
        future = self.request()
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), timeout)
        except DeadlineError:  # of whoever tried to open it: a TimeoutError too
            raise
        except TimeoutError:
            self.forgo(future)
            raise DeadlineError("no channel was free in time", "max_channels, or a longer timeout") from None

    async def warm(self) -> None:
        """Opens a first channel, so that the first batch need not.

        :raises MemKVError: it cannot be opened.
        """
        channel = await self._open()
        with self._lock:
            self._busy.add(channel)
        self.give_back(channel)

    async def _add(self) -> None:
        try:
            channel = await self._open()
        except Exception as exc:
            error = exc if isinstance(exc, MemKVError) else MemKVError(f"no channel could be opened: {exc!r}")
            with self._lock:
                self._opening -= 1
                failed = None if self._busy or self._opening else list(self._waiting)
                if failed is not None:
                    self._waiting.clear()
            for future in failed or []:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            return
        with self._lock:
            self._opening -= 1
            self._busy.add(channel)
        self.give_back(channel)

    def give_back(self, channel: ReadChannel) -> None:
        """Ends a checkout. A broken channel is destroyed; somebody who waits gets a good one.

        A broken one stays busy until it is destroyed: whoever waits in :meth:`quiesce` wants to hear that no
        device can write any more.
        """
        receiver: concurrent.futures.Future[ReadChannel] | None = None
        with self._lock:
            usable = channel.usable and self._closed is None
            if usable:
                channel.keep = None
                self._release(channel)
                while self._waiting:
                    candidate = self._waiting.popleft()
                    if candidate.set_running_or_notify_cancel():
                        receiver = candidate
                        self._busy.add(channel)
                        break
                if receiver is None:
                    self._idle.append(channel)
        if receiver is not None:
            receiver.set_result(channel)
        if usable:
            return
        channel.close()
        channel.keep = None
        with self._lock:
            self._release(channel)
            reopen = bool(self._waiting) and self._closed is None
            self._opening += reopen
        if reopen:
            asyncio.run_coroutine_threadsafe(self._add(), self._loop)

    def _release(self, channel: ReadChannel) -> None:
        """The channel is of no batch any more; the lock is held."""
        self._busy.discard(channel)
        for waiting_for, future in self._quiet[:]:
            waiting_for.discard(channel)
            if not waiting_for:
                self._quiet.remove((waiting_for, future))
                self._loop.call_soon_threadsafe(_finish, future)

    async def quiesce(self) -> None:
        """Waits until every batch that is under way now has ended."""
        with self._lock:
            if not self._busy:
                return
            future: asyncio.Future[None] = self._loop.create_future()
            self._quiet.append((set(self._busy), future))
        await future

    def close(self, error: MemKVError) -> None:
        """Destroys idle channels now and busy ones when they are given back; who waits gets ``error``."""
        with self._lock:
            self._closed = error
            idle, self._idle = list(self._idle), deque()
            waiting, self._waiting = list(self._waiting), deque()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for channel in idle:
            channel.close()

    @property
    def counts(self) -> tuple[int, int]:
        """(busy, idle)."""
        with self._lock:
            return len(self._busy), len(self._idle)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
