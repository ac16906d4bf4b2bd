"""A namespace on the node: its C core, its registered memory, and the housekeeping that needs Python.

Each namespace has two domains, so two sets of protection domains:

* ``serve``: slabs (region id = slab id) and index tables (region id = 2²⁰ + version), open to peers' READs;
* ``pull``: the same slabs under the same ids, open to the node's own READs of put sources.

Nothing that a peer's queue pair can reach is writable through the domain that it is in.

The core asks for housekeeping (*chores*) through an eventfd: a slab is wanted, a slab is empty and may go,
the index must grow. Whatever takes something away from peers is a *notice*: the old region stays registered
until every session of the namespace has acknowledged it or is gone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from ..rdma.errors import DeviceError, MemKVError
from ..rdma.fabric import Fabric, Region, RegionDesc
from . import messages as m
from .flash import format as f
from .flash.store import FlashStore
from .flash.tenant import Tenant
from .native._store import ffi, lib
from .notices import Listener, Notices
from .populate import populate
from .refusals import Refuse

log = logging.getLogger("memkv.node")

TABLE_IDS = 1 << 20  # region ids of index tables begin here
RETRY_SECONDS = 2.0  # after a chore that could not be done


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes a namespace what it is; part of the handshake."""

    block_bytes: int
    align: int
    grace_ns: int


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a namespace is. With flash it outlives the node, as ``f.Name`` on the devices."""

    id: int
    name: str
    incarnation: int  # random: blocks of another one are not this namespace's
    salt: int  # of the index hash

    def record(self, settings: Settings) -> f.Name:
        """As flash remembers it."""
        s = settings
        return f.Name(self.id, self.name, s.block_bytes, s.align, s.grace_ns, self.incarnation, self.salt)


@dataclass(slots=True)
class Slab:
    """A slab in both domains."""

    serve: Region
    pull: Region


class Family(Protocol):
    """What a namespace needs of the others."""

    def may_take(self, ns: Namespace) -> bool:
        """Whether a free slab of the arena is for this namespace."""

    def took(self) -> None:
        """A namespace has taken slabs."""

    def wake(self) -> None:
        """A slab has come free."""


def region_info(desc: RegionDesc) -> m.RegionInfo:
    """A region as messages carry it."""
    rails = [m.RailKey(iova, rkey) for iova, rkey in desc.rails]
    return m.RegionInfo(desc.id, desc.length, desc.access, desc.secret, rails)


class Namespace:
    """One namespace. It is made and closed in a thread of the pool; the rest happens on the event loop.

    :param incarnation: the node's. :param store: flash, if the node has any; if that knows the namespace
        already, its blocks are taken up.
    """

    def __init__(
        self,
        who: Identity,
        settings: Settings,
        fabric: Fabric,
        arena: Any,
        incarnation: int,
        store: FlashStore | None,
        family: Family,
    ) -> None:
        self._family = family
        self.id = who.id
        self.name = who.name
        self.settings = settings
        self.incarnation = incarnation
        self.salt = who.salt
        self.flash: Tenant | None = None
        self.sessions: set[Listener] = set()
        self.slabs: dict[int, Slab] = {}
        self.tables: dict[int, Region] = {}
        self.table: m.TableInfo
        self._quiet_until = 0.0  # no slab is taken before, because one could not be registered
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._ending = False
        self._farewells: set[asyncio.Task[None]] = set()
        self.serve = fabric.domain()
        self.pull = fabric.domain()
        self.ns: Any = lib.mkv_ns_new(
            arena, self.id, settings.block_bytes, settings.align, settings.grace_ns, self.salt
        )
        try:
            if self.ns == ffi.NULL:
                raise _why_not(settings, ffi.errno)
            if store is not None:
                self._settle_on(store, who.record(settings))
            span = ffi.new("struct mkv_span *")
            lib.mkv_ns_table(self.ns, span)
            self.table = self._register_table(span)
            for slab in self._take_slabs():
                lib.mkv_ns_slab_ready(self.ns, slab.serve.id)
        except BaseException:
            self.close()
            raise

    # --- flash ---

    def _settle_on(self, store: FlashStore, record: f.Name) -> None:
        """Takes up what flash has of the namespace, or has it remember the namespace."""
        self.flash = flash = Tenant(store, self.ns, record)
        if record.id not in store.names:
            store.remember(record)  # before its first segment
        else:
            flash.make_room_for(flash.expected)
            flash.restore()

    # --- registered memory; may be called in the pool ---

    def _register_table(self, span: Any) -> m.TableInfo:
        version, buckets = int(span.id), int(span.buckets)
        region = self.serve.register(
            int(span.address), int(span.bytes), remote_read=True, region_id=TABLE_IDS + version
        )
        self.tables[version] = region
        return m.TableInfo(version, buckets, region_info(region.desc))

    def _take_slabs(self) -> list[Slab]:
        """Takes and registers the slabs that are wanted, as far as the arena has any."""
        taken: list[Slab] = []
        span = ffi.new("struct mkv_span *")
        while self._family.may_take(self) and lib.mkv_ns_slab_take(self.ns, span) == 0:
            try:
                slab = self._register_slab(int(span.id), int(span.address), int(span.bytes))
            except BaseException:
                lib.mkv_ns_slab_retire(self.ns, span.id)  # never used: it goes back at once
                raise
            self.slabs[slab.serve.id] = slab
            taken.append(slab)
        self._family.took()
        return taken

    def _register_slab(self, id: int, address: int, length: int) -> Slab:
        populate(address, length)  # done already, mostly
        serve = self.serve.register(address, length, remote_read=True, region_id=id)
        try:
            return Slab(serve, self.pull.register(address, length, region_id=id))
        except BaseException:
            serve.close()
            raise

    def _grow_table(self) -> int | None:
        """Prepares, registers and switches to a larger table. Returns the old one's version."""
        span = ffi.new("struct mkv_span *")
        if lib.mkv_ns_table_prepare(self.ns, span):
            return None
        old = self.table.version
        table = self._register_table(span)
        rc = lib.mkv_ns_table_switch(self.ns, table.version)
        if rc:
            self.tables.pop(table.version).close()
            lib.mkv_ns_table_drop(self.ns, table.version)
            raise DeviceError(f"namespace {self.name}: the index cannot be switched", -rc)
        self.table = table
        return old

    # --- sessions ---

    def info(self, request: int, clock: str) -> m.NamespaceInfo:
        """All that a peer needs to READ from this namespace."""
        return m.NamespaceInfo(
            request,
            self.id,
            self.name,
            self.settings.block_bytes,
            self.settings.align,
            self.settings.grace_ns,
            self.salt,
            self.incarnation,
            self.table,
            [region_info(s.serve.desc) for s in list(self.slabs.values())],
            clock="strict" if clock == "strict" else "plain",
        )

    def stats(self) -> dict[str, int]:
        """Gauges and counters of the core, and what is registered."""
        out = ffi.new("struct mkv_ns_stats *")
        lib.mkv_ns_stats(self.ns, out)
        stats = {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct mkv_ns_stats").fields}
        stats["sessions"] = len(self.sessions)
        stats["tables"] = len(self.tables)
        if self.flash:
            stats |= self.flash.stats()
        return stats

    # --- housekeeping ---

    def start(self, pool: ThreadPoolExecutor, notices: Notices) -> None:
        """Begins to carry out chores."""
        self._worker = asyncio.create_task(self._work(pool, notices), name=f"chores of {self.name}")
        self._wake.set()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    async def _work(self, pool: ThreadPoolExecutor, notices: Notices) -> None:
        events = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._ending:
                return
            try:
                again = await self._chores(events, pool, notices)
            except (MemKVError, MemoryError) as exc:
                log.error("namespace %s: %s", self.name, exc)
                self._quiet_until = events.time() + RETRY_SECONDS
                again = True
            if again:
                events.call_later(RETRY_SECONDS, self._wake.set)

    async def _chores(
        self, events: asyncio.AbstractEventLoop, pool: ThreadPoolExecutor, notices: Notices
    ) -> bool:
        """One round; whether to look again in a while."""
        chores = lib.mkv_ns_chores(self.ns)
        again = False
        if chores & lib.MKV_CHORE_SLAB and events.time() >= self._quiet_until:
            for slab in await events.run_in_executor(pool, self._take_slabs):
                self._tell(m.SlabAdded(self.id, region_info(slab.serve.desc)))
                lib.mkv_ns_slab_ready(self.ns, slab.serve.id)
        if chores & lib.MKV_CHORE_TABLE:
            old = await events.run_in_executor(pool, self._grow_table)
            again |= old is None
            if old is not None:
                log.info("namespace %s: index of %d buckets", self.name, self.table.buckets)
                self._spawn(self._drop_table(old, pool, notices))
        if self.flash and chores & lib.MKV_CHORE_SEGMENT:
            await events.run_in_executor(pool, self.flash.grow)
        id_out = ffi.new("uint64_t *")
        while lib.mkv_ns_slab_retired(self.ns, id_out) == 0:
            id = int(id_out[0])
            gone = self.slabs.pop(id, None)  # not in any NamespaceInfo from now on
            if gone is not None:
                self._spawn(self._release_slab(gone, pool, notices))
            else:
                lib.mkv_ns_slab_released(self.ns, id)
        return again

    async def _drop_table(self, version: int, pool: ThreadPoolExecutor, notices: Notices) -> None:
        table = self.table
        await notices.send(self.sessions, lambda n: m.TableChanged(n, self.id, table))
        region = self.tables.pop(version)
        await asyncio.get_running_loop().run_in_executor(pool, region.close)
        lib.mkv_ns_table_drop(self.ns, version)

    async def _release_slab(self, slab: Slab, pool: ThreadPoolExecutor, notices: Notices) -> None:
        ids = slab.serve.id.to_bytes(4, "little")
        await notices.send(self.sessions, lambda n: m.SlabRetired(n, self.id, ids))

        def close() -> None:
            slab.serve.close()
            slab.pull.close()
            lib.mkv_ns_slab_released(self.ns, slab.serve.id)  # zeroes it

        await asyncio.get_running_loop().run_in_executor(pool, close)
        self._family.wake()

    def _tell(self, message: m.Message) -> None:
        for session in list(self.sessions):
            session.notify(message)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._farewells.add(task)
        task.add_done_callback(self._farewell_done)

    def _farewell_done(self, task: asyncio.Task[None]) -> None:
        self._farewells.discard(task)
        if not task.cancelled() and (exc := task.exception()):
            log.error("namespace %s: %s", self.name, exc)

    async def stop(self) -> None:
        """Ends the housekeeping; when all sessions are gone. A chore under way is waited for: it may be in
        the pool, with this namespace or, where segments change hands, with another.
        """
        self._ending = True
        self._wake.set()
        await asyncio.gather(*filter(None, [self._worker]), *self._farewells, return_exceptions=True)

    def close(self) -> None:
        """Closes both domains and frees the core. No session, no job and no chore any more; blocks."""
        self.serve.close()
        self.pull.close()
        if self.flash:
            self.flash.close()
        if self.ns != ffi.NULL:
            lib.mkv_ns_free(self.ns)
            self.ns = ffi.NULL


def _why_not(settings: Settings, code: int) -> Refuse:
    if code == errno.ENOMEM:
        return Refuse(m.Code.FULL, "no memory for another namespace")
    return Refuse(
        m.Code.LIMIT,
        f"this node cannot hold blocks of {settings.block_bytes} bytes aligned to {settings.align}",
        "block_bytes plus align has to fit a slab (slab_bytes of the node), align is 512 or 4096",
    )
