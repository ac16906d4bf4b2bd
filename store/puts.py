"""Pulls: the put jobs that the node has under way, one per pull channel, all driven by one C thread.

:class:`PullChannel` is a channel and the job struct that uses it again and again; :class:`PutEngine` submits
jobs and hears of their ends on the event loop; :class:`PutQueue` gives the puts of one session and namespace
to its channels in the order of their arrival. Blocks are columns all the way down: nothing here is done per
block.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..rdma.fabric import Endpoint
from ..rdma.jobs import Loop, now_ns
from . import messages as m
from .native._store import ffi, lib

NOWHERE = 0xFFFFFFFF  # a region id that nobody can offer


@dataclass(slots=True)
class PutOutcome:
    """What became of a batch."""

    statuses: bytes  # one MKV_* per block
    stored_bytes: int = 0
    read_bytes: int = 0
    seconds: float = 0.0  # from submission to end
    broken: bool = False  # the channel is of no more use
    undrained: bool = False  # … and its queue pair still owns extents: destroy it, then PullChannel.abandon


@dataclass(slots=True, eq=False)
class PendingPut:
    """A put that waits for a channel, or has one."""

    columns: m.Put
    regions: bytes  # the column, without regions that were being withdrawn
    used: frozenset[int]  # region ids
    deadline_ns: int
    future: asyncio.Future[PutOutcome]
    timer: asyncio.TimerHandle | None = None


class PullChannel:
    """A reading endpoint and its job. One put at a time."""

    def __init__(self, id: int, endpoint: Endpoint, depth: int) -> None:
        self.id = id
        self.endpoint = endpoint
        self.job: Any = ffi.gc(lib.mkv_putjob_new(depth), lib.mkv_putjob_free)
        if self.job == ffi.NULL:
            raise MemoryError("no memory for a put job")
        self.busy = False
        self.closing = False
        self.undrained = False
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def usable(self) -> bool:
        """Connected, not broken, nothing under way."""
        return not self.busy and not self.closing and bool(self.endpoint.channel)

    def cancel(self) -> None:
        """Ends what is under way soon; ``idle`` says when it has."""
        self.closing = True
        if self.busy:
            lib.mkv_putjob_cancel(self.job)

    def destroy(self) -> int:
        """Destroys our end and gives back what an undrained job still held. Blocks; not while busy.

        :returns: the number of extents given back.
        """
        self.endpoint.close()
        if not self.undrained:
            return 0
        self.undrained = False
        return int(lib.mkv_putjob_abandon(self.job))


@dataclass(slots=True)
class _Running:
    """What a job points to, kept until it is reaped, and who wants to know of its end."""

    pull: PullChannel
    status: npt.NDArray[np.uint8]
    keep: list[Any]
    ended: Callable[[PutOutcome], None]


class PutEngine:
    """The progress thread, and the asyncio side of it."""

    def __init__(self, observe: Callable[[PutOutcome], None] | None = None) -> None:
        self._loop = Loop()
        self._events: asyncio.AbstractEventLoop | None = None
        self._observe = observe
        self.under_way = 0

    def attach(self, events: asyncio.AbstractEventLoop) -> None:
        """Watches for finished jobs; call once, on that loop."""
        self._events = events
        events.add_reader(self._loop.fd, self._reap)

    def submit(
        self, pull: PullChannel, ns: Any, put: PendingPut, credit: int, ended: Callable[[PutOutcome], None]
    ) -> None:
        """Starts a put on an idle channel; ``ended`` is called on the event loop."""
        columns = put.columns
        n = columns.blocks
        status = np.zeros(n, np.uint8)
        parts = [
            ffi.from_buffer("uint8_t[]", columns.keys),
            ffi.from_buffer("uint32_t[]", columns.lengths),
            ffi.from_buffer("uint32_t[]", put.regions),
            ffi.from_buffer("uint64_t[]", columns.offsets),
            ffi.from_buffer("uint64_t[]", columns.checksums) if columns.checksums else ffi.NULL,
            ffi.from_buffer("uint8_t[]", status, require_writable=True),
        ]
        channel, durable = ffi.cast("void *", pull.endpoint.channel), columns.durability == "flash"
        lib.mkv_putjob_init(pull.job, ns, channel, *parts, n, credit, put.deadline_ns, durable)
        pull.busy = True
        pull.idle.clear()
        self.under_way += 1
        self._loop.submit(pull.job, _Running(pull, status, parts, ended))

    def _reap(self) -> None:
        for running in self._loop.reap():
            self._finish(running)

    def _finish(self, running: _Running) -> None:
        out = ffi.new("struct mkv_put_outcome *")
        lib.mkv_putjob_outcome(running.pull.job, out)
        outcome = PutOutcome(
            running.status.tobytes(),
            int(out.stored_bytes),
            int(out.read_bytes),
            (out.ended_ns - out.started_ns) / 1e9,
            bool(out.broken),
            bool(out.undrained),
        )
        self.under_way -= 1
        running.pull.busy = False
        running.pull.undrained = outcome.undrained
        running.pull.closing |= outcome.broken
        running.pull.idle.set()
        if self._observe:
            self._observe(outcome)
        running.ended(outcome)

    def close(self) -> None:
        """Waits for what is under way and ends the thread."""
        if self._events is not None:
            self._events.remove_reader(self._loop.fd)
            self._events = None
        self._loop.close()


class PutQueue:
    """The puts of one session into one namespace, first come first served over its pull channels."""

    def __init__(
        self, engine: PutEngine, ns: Any, credit: int, destroy: Callable[[PullChannel], Awaitable[None]]
    ) -> None:
        self.engine = engine
        self.ns = ns
        self.credit = credit
        self.destroy = destroy  # of a channel that is of no more use
        self.pulls: dict[int, PullChannel] = {}
        self.waiting: deque[PendingPut] = deque()
        self.running: set[PendingPut] = set()
        self.farewells: set[asyncio.Future[None]] = set()

    @property
    def blocks_waiting(self) -> int:
        return sum(p.columns.blocks for p in self.waiting)

    @property
    def connected(self) -> bool:
        """Whether there is a channel that a put could go over, now or after what is under way there."""
        return any(not p.closing and p.endpoint.channel for p in self.pulls.values())

    def put(self, columns: m.Put, withdrawing: set[int], timeout_ns: int) -> asyncio.Future[PutOutcome]:
        """Queues a put. Regions of ``withdrawing`` count as not offered."""
        regions = np.frombuffer(columns.regions, "<u4")
        packed = columns.regions
        if withdrawing:
            gone = np.isin(regions, np.fromiter(withdrawing, np.uint32))
            packed = np.where(gone, np.uint32(NOWHERE), regions).astype("<u4").tobytes()
        events = asyncio.get_running_loop()
        put = PendingPut(
            columns,
            packed,
            frozenset(np.unique(np.frombuffer(packed, "<u4")).tolist()),
            now_ns() + timeout_ns,
            events.create_future(),
        )
        self.waiting.append(put)
        put.timer = events.call_later(timeout_ns / 1e9, self._expire, put)
        self.pump()
        return put.future

    def users(self, ids: set[int]) -> list[asyncio.Future[PutOutcome]]:
        """The puts, waiting or under way, that name one of these regions."""
        return [p.future for p in (*self.waiting, *self.running) if p.used & ids]

    def pump(self) -> None:
        """Gives waiting puts to idle channels."""
        for pull in list(self.pulls.values()):
            if not self.waiting:
                return
            if pull.usable:
                self._start(pull, self.waiting.popleft())
        if not self.connected:
            self.fail(lib.MKV_ERROR_LINK)

    def fail(self, status: int) -> None:
        """Ends what waits, with one status for every block."""
        while self.waiting:
            self._end(self.waiting.popleft(), status)

    def _start(self, pull: PullChannel, put: PendingPut) -> None:
        if put.timer:
            put.timer.cancel()
        self.running.add(put)
        self.engine.submit(pull, self.ns, put, self.credit, lambda outcome: self._ended(pull, put, outcome))

    def _ended(self, pull: PullChannel, put: PendingPut, outcome: PutOutcome) -> None:
        if not pull.closing:
            self._report(put, outcome)
            self.pump()
            return
        self.pulls.pop(pull.id, None)
        task = asyncio.ensure_future(self.destroy(pull))
        self.farewells.add(task)
        task.add_done_callback(self.farewells.discard)
        if outcome.undrained:  # a READ may be under way until the queue pair is gone
            task.add_done_callback(lambda _: self._report(put, outcome))
        else:
            self._report(put, outcome)
        self.pump()

    def _report(self, put: PendingPut, outcome: PutOutcome) -> None:
        self.running.discard(put)
        if not put.future.done():
            put.future.set_result(outcome)

    def _expire(self, put: PendingPut) -> None:
        with contextlib.suppress(ValueError):
            self.waiting.remove(put)
            self._end(put, lib.MKV_TIMEOUT)

    def _end(self, put: PendingPut, status: int) -> None:
        if put.timer:
            put.timer.cancel()
        if not put.future.done():
            put.future.set_result(PutOutcome(bytes([status]) * put.columns.blocks))
