"""Batches that nodes carry out: each node gets its keys in one message (or a few), all nodes at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import numpy.typing as npt

from .batches import Index, Keys, check_slices
from .buffers import Slices
from .link import Link
from .puts import put_part
from .rdma.errors import DeadlineError, LocalError, MemKVError
from .session import Session
from .staging import MESSAGE_KEYS, Answer, request_stage
from .status import Status
from .store import messages as m

log = logging.getLogger("memkv.peer")

Statuses = npt.NDArray[np.uint8]
Route = Callable[[Keys], list[tuple[Link, Index]]]
Make = Callable[[Session, bytes, int], Callable[[int], m.Message]]


class Requests:
    """Coroutines for the control thread. :param route: which link has which keys."""

    def __init__(self, route: Route) -> None:
        self._route = route

    def _parts(self, keys: Keys) -> list[tuple[Session, npt.NDArray[np.uint32]]]:
        """Sessions that are up and the keys that are theirs, at most MESSAGE_KEYS at a time."""
        parts = []
        for link, index in self._route(keys) if len(keys) else []:
            if link.session is not None:
                whole = np.arange(len(keys), dtype=np.uint32) if index is None else index
                parts += [
                    (link.session, whole[i : i + MESSAGE_KEYS]) for i in range(0, len(whole), MESSAGE_KEYS)
                ]
        return parts

    async def ask(self, keys: Keys, seconds: float, make: Make) -> Statuses:
        """One status per key. :param make: (session, keys, deadline in ms) → (request id → message)."""
        status = np.full(len(keys), Status.ERROR_UNREACHABLE, np.uint8)

        async def one(session: Session, part: npt.NDArray[np.uint32]) -> None:
            try:
                made = make(session, keys[part].tobytes(), int(seconds * 1000))
                reply: m.Statuses = await session.ask(made, seconds)
                status[part] = np.frombuffer(reply.statuses, np.uint8)
            except MemKVError as exc:
                status[part] = _status_of(exc, session)

        await _all([one(*part) for part in self._parts(keys)])
        return status

    async def touch(self, keys: Keys) -> None:
        """Not answered."""
        for session, part in self._parts(keys):
            session.say(m.Touch(session.info.namespace, keys[part].tobytes()))

    async def put(
        self,
        keys: Keys,
        slices: Slices,
        seconds: float,
        durability: str,
        checksums: npt.NDArray[np.uint64] | None,
    ) -> Statuses:
        """See :meth:`memkv.Peer.put_from`."""
        check_put(keys, slices, checksums)
        status = np.full(len(keys), Status.ERROR_UNREACHABLE, np.uint8)
        until = time.monotonic() + seconds
        tasks = []
        for session, part in self._parts(keys):
            sums = None if checksums is None else checksums[part]
            tasks.append(put_part(session, keys, slices, part, status, until, durability, sums))
        await _all(tasks)
        return status

    async def stage(self, keys: Keys, seconds: float) -> Statuses:
        """Has the nodes bring keys into memory, without READing them."""
        status = np.full(len(keys), Status.ERROR_UNREACHABLE, np.uint8)
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        parts = self._parts(keys)
        for session, part in parts:
            status[part] = Status.TIMEOUT
            request_stage(session, part, keys[part].tobytes(), seconds, True, answers.put_nowait)
        left, until = len(parts), time.monotonic() + seconds
        while left:
            try:
                answer = await asyncio.wait_for(answers.get(), max(0.0, until - time.monotonic()) + 1.0)
            except TimeoutError:
                break
            left -= answer.last
            if isinstance(answer.part, m.Staged):
                where = answer.index[np.frombuffer(answer.part.indices, "<u4")]
                status[where] = np.frombuffer(answer.part.statuses, np.uint8)
            else:
                here = answer.index[status[answer.index] == Status.TIMEOUT]
                status[here] = _status_of(answer.part, answer.session)
        return status


async def _all(work: list[Coroutine[Any, Any, None]]) -> None:
    """All at once; a single one, the usual case, without a task of its own."""
    if len(work) == 1:
        await work[0]
    else:
        await asyncio.gather(*work)


def check_put(keys: Keys, slices: Slices, checksums: npt.NDArray[np.uint64] | None) -> None:
    """:raises LocalError: slices or checksums are not what they have to be."""
    check_slices(slices, len(keys))
    if checksums is not None and (np.shape(checksums) != (len(keys),) or checksums.dtype != np.uint64):
        raise LocalError("checksums are an array of dtype uint64, one per key", "docs/layout.md, Checksum")


def _status_of(error: MemKVError, session: Session) -> Status:
    if isinstance(error, DeadlineError):
        return Status.TIMEOUT
    log.debug("%s: %s", session.host, error)
    return Status.ERROR_LINK if session.closed else Status.ERROR_REFUSED
