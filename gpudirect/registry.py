"""Registrations of GPU memory, shared and counted: many buffers may lie in one allocation, and registering it
costs milliseconds and BAR1 space.

::

    buffer ──► window, a region of its own ──► registration, counted ──► allocation of CUDA's
                                               key: domain, right, way, start, size, CUDA's buffer id

What READs of ours land in is registered by whole allocations, where they are not too large for that: it gives
nobody a right. What others may READ is registered no further than the whole pages of the buffer itself, since
an allocation may hold strangers' arrays (CuPy's and torch's pools cut theirs up).

CUDA's buffer id is unique for as long as the process lives. An allocation that was freed under its
registration, even if another has its address by now, is found by comparing ids (:meth:`Registry.stale`): once
per batch, one call of the driver per registration. From then on nobody gets that registration any more; those
who have it must close their windows.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..rdma import dmabuf
from ..rdma.errors import LocalError, NotRegistered
from ..rdma.fabric import Domain, Region
from .buffers import Memory
from .driver import Driver, DriverError

Way = Literal["dma-buf", "peermem"]
_Key = tuple[int, bool, Way, int, int, int]


@dataclass(slots=True)
class Registration:
    """One memory region over GPU memory, and who uses it."""

    key: _Key
    device: int
    buffer_id: int
    address: int  # inside the memory that was asked for: what CUDA is asked about
    region: Region
    uses: int = 0
    freed: bool = False  # CUDA has given the memory to somebody else, or to nobody


@dataclass(slots=True)
class Window:
    """A buffer's own region. ``close`` it when no batch uses it any more."""

    region: Region
    registration: Registration
    _registry: Registry = field(repr=False)

    def close(self) -> None:
        if not self.region.closed:
            self.region.close()
            self._registry._release(self.registration)


class Registry:
    """Of one process; from any thread. Host memory needs none of it: there the export keeps it in place."""

    def __init__(self, cuda: Driver) -> None:
        self._cuda = cuda
        self._known: dict[_Key, Registration] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def acquire(
        self,
        domain: Domain,
        memory: Memory,
        *,
        remote_read: bool,
        way: Way,
        region_id: int | None = None,
    ) -> Window:
        """A region over ``memory``, new or shared.

        :param way: "dma-buf", or "peermem": by address.
        :raises NotRegistered: this way does not work, with errno; :class:`~memkv.rdma.errors.LocalError`: it
            is no GPU memory, or was freed.
        """
        if memory.device is None or memory.allocation is None:
            raise LocalError("this is host memory, or its allocation is not known")
        if memory.reason:
            raise NotRegistered(memory.reason, 95)
        if self._cuda.buffer_id(memory.address) != memory.buffer_id:
            raise LocalError("this GPU memory was freed", "register it anew after allocating it")
        own = (memory.address, memory.nbytes)
        if way == "dma-buf":
            own = dmabuf.span(*own)
        spans = [own] if remote_read else [memory.allocation, own]
        with self._lock:
            held = self._hold(domain, memory, spans, remote_read, way)
            held.uses += 1
        try:
            window = domain.window(
                held.region, memory.address, memory.nbytes, owner=memory.owner, region_id=region_id
            )
        except BaseException:
            self._release(held)
            raise
        return Window(window, held, self)

    def _hold(
        self, domain: Domain, memory: Memory, spans: list[tuple[int, int]], remote_read: bool, way: Way
    ) -> Registration:
        """The registration over the first of ``spans`` that there is, or that can be made: a whole allocation
        may be too large for BAR1, or for one memory region.
        """
        keys: list[_Key] = [(id(domain), remote_read, way, *span, memory.buffer_id) for span in spans]
        for key in keys:
            if key in self._known:
                return self._known[key]
        assert memory.device is not None
        for key, span in zip(keys, spans, strict=True):
            try:
                region = self._register(domain, memory, *span, remote_read, way)
            except NotRegistered:
                if spans[-1] in (span, dmabuf.span(*span)):
                    raise
                continue
            held = Registration(key, memory.device, memory.buffer_id, memory.address, region)
            self._known[key] = held
            return held
        raise AssertionError("the last span was registered, or raised")

    def _register(
        self, domain: Domain, memory: Memory, start: int, size: int, remote_read: bool, way: Way
    ) -> Region:
        """A dma-buf is of whole pages; what nobody asked for is not in any window."""
        assert memory.device is not None
        with self._cuda.on(memory.device):
            self._keep_order(memory.address)
            if way == "peermem":
                return domain.register_device(start, size, dma_buf=None, remote_read=remote_read)
            first, length = dmabuf.span(start, size)
            try:
                fd = self._cuda.export_dma_buf(first, length)
            except DriverError as exc:
                raise NotRegistered(
                    f"the GPU's driver exports no dma-buf of it: {exc}", exc.errno or 0, exc.hint
                ) from None
            try:
                return domain.register_device(first, length, dma_buf=(fd, 0), remote_read=remote_read)
            finally:
                os.close(fd)  # the memory region has a reference of its own

    def _keep_order(self, address: int) -> None:
        """CUDA's synchronous copies must really be over when they return, or a NIC may see older bytes."""
        try:
            self._cuda.set_sync_memops(address)
        except DriverError:  # memory of cuMemMap: only a whole context can be told
            try:
                self._cuda.ctx_set_sync_memops()
            except DriverError as exc:
                raise NotRegistered(
                    f"CUDA does not order its copies against GPUDirect here: {exc}", exc.errno or 0
                ) from None

    def stale(self, windows: Iterable[Window]) -> list[Window]:
        """Those whose memory CUDA has freed meanwhile. For every batch: one call per registration."""
        by: dict[int, list[Window]] = {}
        for window in windows:
            by.setdefault(id(window.registration), []).append(window)
        out: list[Window] = []
        for group in by.values():
            held = group[0].registration
            if held.freed or self._cuda.buffer_id(held.address) != held.buffer_id:
                self._forget(held)
                out += group
        return out

    def _forget(self, held: Registration) -> None:
        with self._lock:
            held.freed = True
            if self._known.get(held.key) is held:
                del self._known[held.key]

    def _release(self, held: Registration) -> None:
        with self._lock:
            held.uses -= 1
            if held.uses:
                return
            if self._known.get(held.key) is held:
                del self._known[held.key]
        held.region.close()
