"""The flash tier on the event loop: who waits for barriers, scans and staged blocks, and what is watched.

One eventfd of the C core says that something is there to be collected, a failed device among it; a tick
every second looks for devices that do not answer, and for segments that are waited for, and tells how far a
scan is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ..native._store import lib
from ..staging import Staging
from . import format as f
from .opened import Records
from .store import FlashStore
from .tenant import Tenant

log = logging.getLogger("memkv.flash")

TICK_SECONDS = 1.0
STUCK_SECONDS = 30  # a device that leaves a request unanswered for so long is taken out
TELL_SECONDS = 10.0  # between lines in the log about a scan
TELL_FLUSH_SECONDS = 2.0  # and about what a stop still has to write


class Space(Protocol):
    """What the tier needs of a namespace."""

    flash: Tenant | None

    def wake(self) -> None:
        """There may be chores."""


class FlashTier:
    """A node's flash. Made in the pool (opening takes time); the rest belongs to the event loop."""

    def __init__(self, store: FlashStore, pool: ThreadPoolExecutor) -> None:
        self.store = store
        self.staging = Staging(pool)
        self._pool = pool
        self._spaces: Callable[[], Iterable[Space]] = tuple
        self._barriers: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._scans: list[tuple[Tenant, asyncio.Future[None]]] = []
        self._events: asyncio.AbstractEventLoop
        self._ticker: asyncio.Task[None] | None = None
        self._told = 0.0
        self._was_scanning = False
        self._lost = 0  # devices, as far as has been looked at
        self.complete = True  # all that was dirty has been written by the stop, or may still be
        self._settling: asyncio.Future[bool] | None = None
        self._ending = asyncio.Event()

    def attach(self, events: asyncio.AbstractEventLoop, spaces: Callable[[], Iterable[Space]]) -> None:
        """Begins to watch.

        :param spaces: the namespaces that there are at the moment.
        """
        self._events = events
        self._spaces = spaces
        self._was_scanning = self.scanning > 0
        events.add_reader(self.store.eventfd, self._event)
        self._ticker = events.create_task(self._tick(), name="flash")

    async def detach(self) -> None:
        """Ends watching; nobody waits any more."""
        self._events.remove_reader(self.store.eventfd)
        self._ending.set()
        if self._ticker:
            await self._ticker  # not cancelled: what it has in the pool needs the namespaces
        if self._settling:
            await self._settling

    def _event(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.store.eventfd)
        self.staging.collect()
        over = lib.mkv_flash_barriers(self.store.flash)
        while self._barriers and self._barriers[0][0] <= over:
            _finish(self._barriers.popleft()[1])
        self._look_at_scans()
        self._look_at_devices()
        for space in self._spaces():
            space.wake()

    def _look_at_scans(self) -> None:
        for tenant, future in [pair for pair in self._scans if not pair[0].scanning()]:
            self._scans.remove((tenant, future))
            _finish(future)

    def _look_at_devices(self, always: bool = False) -> None:
        """Takes note of devices that the core has given up, and has the others remember it."""
        lost = int(lib.mkv_flash_devices_failed(self.store.flash))
        if lost == self._lost and not always:
            return
        self._lost = lost
        idle = self._settling is None or self._settling.done()
        if self.store.look(STUCK_SECONDS * 1_000_000_000) and idle:
            self._settling = self._events.run_in_executor(self._pool, self.store.settle)

    async def _tick(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), TICK_SECONDS)
            if self._ending.is_set():
                return
            self._look_at_devices(always=True)
            if self.store.sharing.waiting:
                await self._events.run_in_executor(self._pool, self.store.sharing.look)
            self._look_at_scans()
            if self._was_scanning:
                self._tell_of_scan()

    def _tell_of_scan(self) -> None:
        left = self.scanning
        if left and self._events.time() - self._told < TELL_SECONDS:
            return
        self._told = self._events.time()
        self._was_scanning = left > 0
        n = self.store.stats()
        dropped = {k[8:]: v for k, v in n.items() if k.startswith("dropped_") and v}
        log.info(
            "flash scan %s: %d of %d headers, %d blocks recovered, dropped %s",
            "goes on" if left else "is over",
            n["scanned"],
            n["scan_total"],
            n["recovered"],
            dropped or "none",
        )

    # --- waiting ---

    @property
    def scanning(self) -> int:
        """Header pages still to be looked at, of all namespaces."""
        return sum(space.flash.scanning() for space in self._spaces() if space.flash)

    async def scanned(self, tenant: Tenant, until: float) -> bool:
        """Waits until a namespace's scan is over; False if that takes longer than ``until`` (loop time)."""
        if not tenant.scanning():
            return True
        future: asyncio.Future[None] = self._events.create_future()
        self._scans.append((tenant, future))
        if await self._wait(future, until):
            return True
        with contextlib.suppress(ValueError):
            self._scans.remove((tenant, future))
        return False

    async def barrier(self, until: float) -> bool:
        """Waits until all that has been deleted so far can never return. False: too late, or a device was
        lost and there is none to remember that.
        """
        number = int(await self._events.run_in_executor(self._pool, lib.mkv_flash_barrier, self.store.flash))
        if not await self._over(number, until):
            return False
        if self.store.look(STUCK_SECONDS * 1_000_000_000):
            return bool(await self._events.run_in_executor(self._pool, self.store.settle))
        return True

    async def _over(self, number: int, until: float) -> bool:
        if lib.mkv_flash_barriers(self.store.flash) >= number:
            return True
        future: asyncio.Future[None] = self._events.create_future()
        self._barriers.append((number, future))
        return await self._wait(future, until)

    async def _wait(self, future: asyncio.Future[None], until: float) -> bool:
        late = False

        def expire() -> None:  # a clock read again may say that it is not time yet
            nonlocal late
            late = not future.done()
            future.cancel()

        timer = self._events.call_at(until, expire)
        try:
            await future
        except asyncio.CancelledError:
            if not late:
                raise
        finally:
            timer.cancel()
        return not late

    # --- stopping ---

    async def finish(self, seconds: float) -> None:
        """A clean stop, after all sessions: writes what is dirty, then the snapshots that make the next start
        quick. What does not get done in time costs the next start a scan, never a block that was promised.
        """
        tenants = [space.flash for space in self._spaces() if space.flash]
        lost = self.store.stats()["lost_memory_acks"]
        number = int(await self._events.run_in_executor(self._pool, lib.mkv_flash_sync, self.store.flash))
        self.complete = await self._flushed(number, seconds)
        if not self.complete:
            self._tell_unwritten(seconds, tenants)
            return
        if lost := self.store.stats()["lost_memory_acks"] - lost:
            self.complete = False
            log.error("flash: %d blocks could not be written, and are lost: no device had a place", lost)
        if any(tenant.scanning() for tenant in tenants):
            log.warning("flash: stopped before the scan was over; it begins anew at the next start")
            return

        def export() -> Records:
            return np.concatenate([np.zeros(0, f.RECORD), *(tenant.export() for tenant in tenants)])

        self.store.look(STUCK_SECONDS * 1_000_000_000)
        await self._events.run_in_executor(self._pool, self.store.save, export)

    async def _flushed(self, number: int, seconds: float) -> bool:
        """Waits for a sync, and tells how it goes; False if it takes longer."""
        began, all_of_it = self._events.time(), self.store.stats()["dirty_bytes"]
        if all_of_it:
            log.info("flash: %s are to be written, for at most %.0f s", _mib(all_of_it), seconds)
        until = began + seconds
        while True:
            pause = min(until, self._events.time() + TELL_FLUSH_SECONDS)
            if await self._over(number, pause):
                return True
            if pause == until:
                return False
            took, left = self._events.time() - began, self.store.stats()["dirty_bytes"]
            rate = (all_of_it - left) / took
            log.info(
                "flash: %s of %s written, %s/s%s",
                _mib(all_of_it - left),
                _mib(all_of_it),
                _mib(rate),
                f", {left / rate:.0f} s to go" if rate and left else "; headers and caches follow",
            )

    def _tell_unwritten(self, seconds: float, tenants: list[Tenant]) -> None:
        n = self.store.stats()
        blocks = [f"{t.name.name}: {dirty}" for t in tenants if (dirty := t.stats()["flash_dirty"])]
        if blocks:
            log.error(
                "flash: %d blocks (%s) could not be written within %.0f s and are lost, of namespaces %s; "
                "they were acknowledged as memory only (stop_timeout, dirty_bytes)",
                n["dirty_blocks"],
                _mib(n["dirty_bytes"]),
                seconds,
                ", ".join(blocks),
            )
        else:
            log.error("flash: all blocks are written, but headers and caches were not within %.0f s", seconds)
        log.warning("flash: no snapshot is left: the next start scans")

    # --- what it tells ---

    def degraded(self) -> str:
        """Which devices are out, or smaller than they were, at this moment; empty if all is well."""
        self._look_at_devices()
        return self.store.degraded()

    def status(self) -> dict[str, int | str | bool]:
        """Flat: the engine, the core's figures, and how far a scan is."""
        engine, reason = self.store.engine()
        devices = self.store.describe()
        good = [d for d in devices.values() if not d["failed"]]
        tenants = [space.flash.stats() for space in self._spaces() if space.flash]
        return {
            "engine": engine,
            "reason": reason,
            "devices": len(devices),
            "devices_out": len(devices) - len(good),
            "bytes": sum(int(d["segments"]) * int(d["segment_bytes"]) for d in good),
            "bytes_free": sum(int(d["segments_free"]) * int(d["segment_bytes"]) for d in good),
            "live_blocks": sum(n["flash_blocks"] for n in tenants),
            "live_bytes": sum(n["flash_bytes"] for n in tenants),
            "evicted_blocks": sum(n["flash_evictions"] for n in tenants),
            "evicted_bytes": sum(n["flash_evicted_bytes"] for n in tenants),
            "dirty_max": self.store.dirty_max,
            "degraded": self.degraded(),
            "scan_left": self.scanning,
            "stages": self.staging.under_way,
            "segments_lost": self.store.segments_lost,
            "segments_exchanged": self.store.sharing.exchanged,
            **self.store.stats(),
        }


def _mib(n: float) -> str:
    return f"{n / (1 << 20):.0f} MiB"


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
