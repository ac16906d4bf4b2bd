"""Driving a batch of lookups or gets to its end: channels, slabs met for the first time, blocks in flash
only.

The same steps twice: on the caller's own thread (:meth:`Gets.run`), and on the control thread for those who
do not wait (:meth:`Gets.run_async`). Keys that the nodes hold in flash only come back COLD; they are asked
for in one message a node, and READ as the answers come in.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .batches import Batch, Index, Keys, Parts
from .channels import ReadChannel
from .control import Control
from .link import Link
from .rdma.errors import DeadlineError, LocalError, MemKVError
from .rdma.jobs import run
from .session import Session
from .staging import MESSAGE_KEYS, Answer, learn, let_go, request_stage
from .status import Status
from .touches import Touches

ATTEMPTS = 3  # rounds of a batch that keeps meeting slabs for the first time
STAGINGS = 4  # requests for a key that is evicted again before it is READ
SLACK = 2.0  # seconds that a node may take to say that it is too late

Route = Callable[[Keys], list[tuple[Link, Index]]]
Wanted = Sequence[tuple[Session | None, Index]]


class Gets:
    """See the module.

    :param route: which link has which keys.
    """

    def __init__(self, control: Control, route: Route, touches: Touches | None) -> None:
        self._control = control
        self._route = route
        self._touches = touches

    def _parts(self, batch: Batch) -> Wanted:
        return [(link.session, index) for link, index in self._route(batch.keys)] if len(batch.keys) else []

    # --- on the caller's thread ---

    def run(self, batch: Batch, seconds: float) -> Batch:
        """Drives a batch to its end. :raises LocalError: the peer is closed."""
        if self._control.closed:
            raise LocalError("the peer is closed")
        until = time.monotonic() + seconds
        cold = self._read(batch, self._parts(batch), until)
        for _ in range(STAGINGS):
            if cold:
                cold = self._stage(batch, cold, until)
        batch.replace(Status.COLD, Status.STALE)
        self._note_hits(batch)
        return batch

    def _read(self, batch: Batch, parts: Wanted, until: float) -> Parts:
        """Rounds until no key is left that met an unknown slab; returns those in flash only."""
        cold: Parts = []
        for attempt in range(ATTEMPTS):
            unknown = self._round(batch, parts, until, cold)
            if not unknown:
                break
            if attempt == ATTEMPTS - 1:
                _give_up(batch, unknown)
                break
            for session, _ in unknown:
                with contextlib.suppress(MemKVError, TimeoutError):
                    self._control.call(session.refresh(), _left(until))
            parts = _still_up(unknown)
        return cold

    def _round(self, batch: Batch, parts: Wanted, until: float, cold: Parts) -> Parts:
        """Each part over a channel to its node, all at once; one that has to wait for a channel holds up no
        other.

        :returns: the keys that met slabs which are not known yet; ``cold`` receives those in flash only.
        """
        jobs: list[Any] = []
        unknown: Parts = []
        waiting: dict[concurrent.futures.Future[ReadChannel], tuple[Session, Index]] = {}
        try:
            for session, index in parts:
                if session is None:
                    batch.set(index, Status.ERROR_UNREACHABLE)
                elif (channel := session.pool.try_take()) is not None:
                    jobs.append(batch.load(session, channel, index, until - time.monotonic()))
                else:
                    waiting[session.pool.request()] = (session, index)
            while jobs or waiting:
                if jobs:
                    run(jobs)
                    batch.unload(unknown, cold)
                jobs = []
                if not waiting:
                    break
                granted, _ = concurrent.futures.wait(
                    waiting, _left(until), concurrent.futures.FIRST_COMPLETED
                )
                if not granted:
                    break
                for future in granted:
                    session, index = waiting.pop(future)
                    if (error := future.exception()) is None:
                        jobs.append(batch.load(session, future.result(), index, until - time.monotonic()))
                    else:
                        batch.set(index, _no_channel(error))
        finally:
            batch.unload(unknown, cold)  # there is something left only if this was interrupted
            for future, (session, index) in waiting.items():
                batch.set(index, Status.TIMEOUT)
                session.pool.forgo(future)
        return unknown

    def _stage(self, batch: Batch, cold: Parts, until: float) -> Parts:
        """Has the nodes bring keys into memory, and READs them as the answers come in.

        :returns: those that were evicted again before they were READ.
        """
        again: Parts = []
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        open_requests = _request(batch, cold, until, answers.put)
        while open_requests:
            try:
                taken = [answers.get(timeout=_left(until) + SLACK)]
            except queue.Empty:
                break
            with contextlib.suppress(queue.Empty):
                while True:
                    taken.append(answers.get_nowait())
            open_requests -= sum(answer.last for answer in taken)
            ready = [part for answer in taken if (part := learn(batch, answer)) is not None]
            if ready:
                again += self._read(batch, ready, until)
                for session, index in ready:
                    let_go(batch, session, index)
        if open_requests:
            batch.replace(Status.COLD, Status.TIMEOUT)
        return [] if open_requests else again

    # --- on the control thread ---

    async def run_async(self, batch: Batch, seconds: float) -> Batch:
        """The same as :meth:`run`, driven by the progress thread."""
        until = time.monotonic() + seconds
        cold = await self._read_async(batch, self._parts(batch), until)
        for _ in range(STAGINGS):
            if cold:
                cold = await self._stage_async(batch, cold, until)
        batch.replace(Status.COLD, Status.STALE)
        self._note_hits(batch)
        return batch

    async def read_async(self, batch: Batch, seconds: float) -> None:
        """The one-sided part of :meth:`run_async`: keys in flash only are left COLD."""
        await self._read_async(batch, self._parts(batch), time.monotonic() + seconds)
        self._note_hits(batch)

    async def bring_async(self, batch: Batch, seconds: float) -> Parts:
        """Has the nodes bring a batch's keys into memory, where they stay for a moment, without READing them:
        PENDING where they are there (``batch.places`` says where), else the status says why not.

        :returns: what is there, to be let go once it has been READ.
        """
        ready: Parts = []
        until = time.monotonic() + seconds
        cold: Parts = []
        for session, index in self._parts(batch):
            batch.set(index, Status.COLD if session else Status.ERROR_UNREACHABLE)
            if session is not None:
                cold.append(
                    (session, np.arange(len(batch.keys), dtype=np.uint32) if index is None else index)
                )
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        open_requests = _request(batch, cold, until, answers.put_nowait)
        while open_requests:
            try:
                answer = await asyncio.wait_for(answers.get(), _left(until) + SLACK)
            except TimeoutError:
                break
            open_requests -= answer.last
            if (part := learn(batch, answer)) is not None:
                ready.append(part)
        batch.replace(Status.COLD, Status.TIMEOUT)
        return ready

    async def _read_async(self, batch: Batch, parts: Wanted, until: float) -> Parts:
        cold: Parts = []
        for attempt in range(ATTEMPTS):
            unknown: Parts = []
            driven = [self._drive(batch, session, index, until) for session, index in parts]
            faults = [e for e in await asyncio.gather(*driven, return_exceptions=True) if e is not None]
            batch.unload(unknown, cold)
            if faults:
                raise faults[0]
            if not unknown:
                break
            if attempt == ATTEMPTS - 1:
                _give_up(batch, unknown)
                break
            for session, _ in unknown:
                with contextlib.suppress(MemKVError, TimeoutError):
                    await asyncio.wait_for(session.refresh(), _left(until))
            parts = _still_up(unknown)
        return cold

    async def _drive(self, batch: Batch, session: Session | None, index: Index, until: float) -> None:
        if session is None:
            batch.set(index, Status.ERROR_UNREACHABLE)
            return
        try:
            channel = session.pool.try_take() or await session.pool.take(_left(until))
        except MemKVError as exc:
            batch.set(index, _no_channel(exc))
            return
        await self._control.drive(batch.load(session, channel, index, until - time.monotonic()))

    async def _stage_async(self, batch: Batch, cold: Parts, until: float) -> Parts:
        again: Parts = []
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        open_requests = _request(batch, cold, until, answers.put_nowait)
        while open_requests:
            try:
                taken = [await asyncio.wait_for(answers.get(), _left(until) + SLACK)]
            except TimeoutError:
                break
            while not answers.empty():
                taken.append(answers.get_nowait())
            open_requests -= sum(answer.last for answer in taken)
            ready = [part for answer in taken if (part := learn(batch, answer)) is not None]
            if ready:
                again += await self._read_async(batch, ready, until)
                for session, index in ready:
                    let_go(batch, session, index)
        if open_requests:
            batch.replace(Status.COLD, Status.TIMEOUT)
        return [] if open_requests else again

    # --- afterwards ---

    def _note_hits(self, batch: Batch) -> None:
        if self._touches is None or batch.slices is None:
            return
        status = batch.status
        if batch.places is not None:  # the node knows of those: it was asked for them
            status = np.where(batch.places.any(axis=1), np.uint8(Status.PENDING), status)
        self._touches.add(batch.keys, status)


def _request(batch: Batch, cold: Parts, until: float, take: Callable[[Answer], Any]) -> int:
    """Asks for all of it; the number of messages that this takes."""
    count = 0
    for session, index in cold:
        for i in range(0, len(index), MESSAGE_KEYS):
            part = index[i : i + MESSAGE_KEYS]
            request_stage(session, part, batch.keys[part].tobytes(), _left(until), False, take)
            count += 1
    return count


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())


def _give_up(batch: Batch, unknown: Parts) -> None:
    for _, index in unknown:
        batch.status[index] = Status.STALE


def _still_up(unknown: Parts) -> Wanted:
    return [(session if session.closed is None else None, index) for session, index in unknown]


def _no_channel(error: BaseException) -> Status:
    """The status of keys for which no channel could be had."""
    return Status.TIMEOUT if isinstance(error, DeadlineError) else Status.ERROR_UNREACHABLE


def prefix(status: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """Keys from the start that are HITs."""
    bad = np.flatnonzero(status != Status.HIT)
    return int(bad[0]) if len(bad) else len(status)
