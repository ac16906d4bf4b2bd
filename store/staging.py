"""Staging for peers: batches of keys brought from flash into memory, answered in parts as blocks arrive.

A Stage request is one stage of the C core. The core's eventfd wakes :meth:`Staging.collect`, which takes what
each stage has answered since, many blocks at once, and sends it as Staged messages; the last of them says so.
A stage ends when all its keys are answered, when its session ends, or a moment after its deadline: then what
the core still owes is answered TIMEOUT here, so that no device can keep a request open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from ..rdma.jobs import now_ns
from . import messages as m
from .native._store import ffi, lib

AT_ONCE = 4096  # answers in one message
GRACE_SECONDS = 0.05  # for the core to say TIMEOUT itself


class Owner(Protocol):
    """What a stage needs of its session."""

    closing: bool

    def notify(self, message: m.Message) -> None: ...


class Stage:
    """One request under way."""

    def __init__(self, handle: Any, request: m.Stage, send: Callable[[m.Message], None]) -> None:
        self.request = request
        self.left = request.blocks
        self.over = asyncio.get_running_loop().create_future()
        self._handle = handle
        self._send = send
        self._answered = np.zeros(request.blocks, np.bool_)

    def collect(self, indices: Any, statuses: Any, slots: Any) -> None:
        """Sends what has been answered. The arrays hold AT_ONCE items, and are used again and again."""
        while self.left and not self.over.done():
            n = int(
                lib.mkv_stage_collect(
                    self._handle,
                    ffi.from_buffer("uint32_t[]", indices, require_writable=True),
                    ffi.from_buffer("uint8_t[]", statuses, require_writable=True),
                    ffi.from_buffer("struct mkv_slot[]", slots, require_writable=True),
                    AT_ONCE,
                )
            )
            if not n:
                return
            good = statuses[:n] == lib.MKV_HIT
            slots[:n][~good] = 0
            if self.request.prefetch:
                slots[:n] = 0
            self._answered[indices[:n]] = True
            self._report(indices[:n], statuses[:n], slots[:n].tobytes())

    def _report(self, indices: Any, statuses: Any, slots: bytes) -> None:
        self.left -= len(indices)
        self._send(
            m.Staged(
                self.request.request,
                indices.astype("<u4").tobytes(),
                statuses.tobytes(),
                slots,
                self.left == 0,
            )
        )
        if not self.left:
            self.end()

    def give_up(self) -> None:
        """Answers what is left with TIMEOUT."""
        while self.left and not self.over.done():
            rest = np.flatnonzero(~self._answered)[:AT_ONCE]
            self._answered[rest] = True
            self._report(rest, np.full(len(rest), lib.MKV_TIMEOUT, np.uint8), bytes(32 * len(rest)))

    def end(self) -> None:
        """Forgets it; what is being read goes on for others who want it."""
        if not self.over.done():
            self.over.set_result(None)
            lib.mkv_stage_free(self._handle)


class Staging:
    """All stages of a node. Belongs to the event loop."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._stages: dict[Stage, Owner] = {}
        self._indices = np.zeros(AT_ONCE, np.uint32)
        self._statuses = np.zeros(AT_ONCE, np.uint8)
        self._slots = np.zeros((AT_ONCE, m.SLOT_BYTES), np.uint8)

    @property
    def under_way(self) -> int:
        return len(self._stages)

    def blocks_of(self, owner: Owner) -> int:
        """Keys that a session still waits for."""
        return sum(stage.left for stage, whose in self._stages.items() if whose is owner)

    async def serve(self, ns: Any, request: m.Stage, timeout: float, owner: Owner) -> None:
        """Answers a request; returns when it is over.

        :param ns: the namespace's core. :param timeout: seconds until what is left has TIMEOUT.
        """
        events = asyncio.get_running_loop()
        deadline = now_ns() + int(timeout * 1e9)

        def begin() -> Any:
            keys = ffi.from_buffer("uint8_t[]", request.keys)
            return lib.mkv_stage_new(ns, keys, request.blocks, deadline, request.prefetch)

        handle = await events.run_in_executor(self._pool, begin)
        if handle == ffi.NULL:
            raise MemoryError("no memory for a stage")
        stage = Stage(handle, request, owner.notify)
        self._stages[stage] = owner
        timer = events.call_later(timeout + GRACE_SECONDS, self._expire, stage)
        try:
            if owner.closing:  # since it was begun
                stage.end()
            self._collect(stage)
            await stage.over
        finally:
            timer.cancel()
            del self._stages[stage]
            stage.end()

    def collect(self) -> None:
        """The core has something."""
        for stage in list(self._stages):
            self._collect(stage)

    def _collect(self, stage: Stage) -> None:
        stage.collect(self._indices, self._statuses, self._slots)

    def _expire(self, stage: Stage) -> None:
        self._collect(stage)
        stage.give_up()

    def drop(self, owner: Owner) -> None:
        """The session ends: so do its stages."""
        for stage, whose in list(self._stages.items()):
            if whose is owner:
                stage.end()
