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
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from ..rdma.errors import DeviceError, MemKVError
from ..rdma.fabric import Fabric, Region, RegionDesc
from . import messages as m
from .native._store import ffi, lib

log = logging.getLogger("memkv.node")

TABLE_IDS = 1 << 20  # region ids of index tables begin here
RETRY_SECONDS = 2.0  # after a chore that could not be done

SLAB, RETIRE, TABLE = 1, 2, 4  # MKV_CHORE_*


class Listener(Protocol):
    """What a namespace needs of a session."""

    def notify(self, message: m.Message) -> None: ...

    def lost(self, reason: str) -> None: ...


class Refuse(MemKVError):
    """A request that is answered with a Refusal."""

    def __init__(self, code: m.Code, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes a namespace what it is; part of the handshake."""

    block_bytes: int
    align: int
    grace_ns: int


@dataclass(slots=True)
class Slab:
    """A slab in both domains."""

    serve: Region
    pull: Region


class Notices:
    """Numbers notices, and knows who has not acknowledged which."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._next = 1
        self._open: dict[int, set[Listener]] = {}
        self._empty: dict[int, asyncio.Event] = {}

    async def send(self, sessions: Iterable[Listener], make: Callable[[int], m.Message]) -> None:
        """Sends ``make(notice id)`` to the sessions and waits until all have acknowledged or are gone.

        A session that does not within the timeout is ended.
        """
        number, self._next = self._next, self._next + 1
        waiting = self._open[number] = set(sessions)
        empty = self._empty[number] = asyncio.Event()
        message = make(number)
        try:
            for session in list(waiting):
                session.notify(message)
            if waiting:
                try:
                    await asyncio.wait_for(empty.wait(), self.timeout)
                except TimeoutError:
                    for session in list(waiting):
                        session.lost(f"{type(message).__name__} was not acknowledged in {self.timeout:g} s")
                    await empty.wait()  # until their queue pairs are gone
        finally:
            del self._open[number], self._empty[number]

    def acknowledge(self, session: Listener, number: int) -> None:
        """From the session; unknown numbers are ignored (it may have been counted as gone)."""
        waiting = self._open.get(number)
        if waiting is not None and session in waiting:
            waiting.discard(session)
            if not waiting:
                self._empty[number].set()

    def gone(self, session: Listener) -> None:
        """The session cannot READ any more: all that it owed counts as given."""
        for number in list(self._open):
            self.acknowledge(session, number)


def region_info(desc: RegionDesc) -> m.RegionInfo:
    """A region as messages carry it."""
    rails = [m.RailKey(iova, rkey) for iova, rkey in desc.rails]
    return m.RegionInfo(desc.id, desc.length, desc.access, desc.secret, rails)


class Namespace:
    """One namespace. It is made and closed in a thread of the pool; the rest happens on the event loop."""

    def __init__(
        self,
        id: int,
        name: str,
        settings: Settings,
        fabric: Fabric,
        arena: Any,
        incarnation: int,
        family: Namespaces,
    ) -> None:
        self._family = family
        self.id = id
        self.name = name
        self.settings = settings
        self.incarnation = incarnation
        self.salt = secrets.randbits(64)
        self.sessions: set[Listener] = set()
        self.slabs: dict[int, Slab] = {}
        self.tables: dict[int, Region] = {}
        self.table: m.TableInfo
        self._quiet_until = 0.0  # no slab is taken before, because one could not be registered
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._farewells: set[asyncio.Task[None]] = set()
        self.ns: Any = lib.mkv_ns_new(
            arena, id, settings.block_bytes, settings.align, settings.grace_ns, self.salt
        )
        if self.ns == ffi.NULL:
            raise _why_not(settings, ffi.errno)
        self.serve = fabric.domain()
        self.pull = fabric.domain()
        try:
            span = ffi.new("struct mkv_span *")
            lib.mkv_ns_table(self.ns, span)
            self.table = self._register_table(span)
            for slab in self._take_slabs():
                lib.mkv_ns_slab_ready(self.ns, slab.serve.id)
        except BaseException:
            self.close()
            raise

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
        return taken

    def _register_slab(self, id: int, address: int, length: int) -> Slab:
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
        if chores & SLAB and events.time() >= self._quiet_until:
            for slab in await events.run_in_executor(pool, self._take_slabs):
                self._tell(m.SlabAdded(self.id, region_info(slab.serve.desc)))
                lib.mkv_ns_slab_ready(self.ns, slab.serve.id)
        if chores & TABLE:
            old = await events.run_in_executor(pool, self._grow_table)
            again |= old is None
            if old is not None:
                log.info("namespace %s: index of %d buckets", self.name, self.table.buckets)
                self._spawn(self._drop_table(old, pool, notices))
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
        """Ends the housekeeping; when all sessions are gone."""
        if self._worker:
            self._worker.cancel()
        await asyncio.gather(*filter(None, [self._worker]), *self._farewells, return_exceptions=True)

    def close(self) -> None:
        """Closes both domains and frees the core. No session, no job and no chore any more; blocks."""
        self.serve.close()
        self.pull.close()
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


class Namespaces:
    """All namespaces of a node, by name and by id."""

    def __init__(
        self,
        fabric: Fabric,
        arena: Any,
        incarnation: int,
        default: Settings,
        limit: int,
        pool: ThreadPoolExecutor,
        ack_timeout: float,
    ) -> None:
        self.by_name: dict[str, Namespace] = {}
        self.by_id: dict[int, Namespace] = {}
        self.notices = Notices(ack_timeout)
        self._make = (fabric, arena, incarnation, self)
        self._starving: set[Namespace] = set()  # without any slab
        self._arena = arena
        self._default = default
        self._limit = limit
        self._pool = pool
        self._next = 1
        self._lock = asyncio.Lock()

    async def open(self, request: m.OpenNamespace) -> Namespace:
        """The namespace asked for, made if need be. :raises Refuse: it is not there, or not like that."""
        async with self._lock:
            found = self.by_name.get(request.name)
            if found is None:
                if request.mode == "open":
                    raise Refuse(
                        m.Code.NOT_FOUND, f"there is no namespace {request.name}", "mode create makes it"
                    )
                return await self._create(request)
        _check(found, request)
        return found

    async def _create(self, request: m.OpenNamespace) -> Namespace:
        if len(self.by_name) >= self._limit:
            raise Refuse(m.Code.LIMIT, f"this node has {self._limit} namespaces already", "max_namespaces")
        settings = Settings(
            request.block_bytes or self._default.block_bytes,
            request.align or self._default.align,
            request.grace_ms * 1_000_000 or self._default.grace_ns,
        )
        if not 10_000_000 <= settings.grace_ns <= 60_000_000_000:
            raise Refuse(m.Code.LIMIT, f"a grace period of {request.grace_ms} ms", "10 to 60000 ms")
        id, self._next = self._next, self._next + 1
        ns = await asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: Namespace(id, request.name, settings, *self._make)
        )
        self.by_name[ns.name] = self.by_id[ns.id] = ns
        if not ns.slabs:
            self._make_room(ns)
        ns.start(self._pool, self.notices)
        log.info(
            "namespace %s: blocks of up to %d bytes, grace period %g s",
            ns.name,
            settings.block_bytes,
            settings.grace_ns / 1e9,
        )
        return ns

    def _make_room(self, ns: Namespace) -> None:
        """The arena has nothing for a new namespace: the one with most slabs gives up its emptiest."""
        self._starving.add(ns)
        donor = max(self.by_name.values(), key=lambda other: len(other.slabs))
        if len(donor.slabs) > 1:
            lib.mkv_ns_slab_retire(donor.ns, 0)
            log.info("namespace %s gives a slab to namespace %s", donor.name, ns.name)
        else:
            log.warning("namespace %s has no memory: no other has any to spare (memory, slab_bytes)", ns.name)

    def may_take(self, ns: Namespace) -> bool:
        """Whether a free slab is for this namespace: those without any come first."""
        self._starving = {other for other in self._starving if not other.slabs}
        return int(lib.mkv_arena_free_slabs(self._arena)) > len(self._starving - {ns})

    def wake(self) -> None:
        """Lets every namespace look for chores."""
        for ns in self.by_name.values():
            ns.wake()

    async def close(self) -> None:
        """Ends all of them; sessions are gone."""
        for ns in self.by_name.values():
            await ns.stop()
        for ns in self.by_name.values():
            await asyncio.get_running_loop().run_in_executor(self._pool, ns.close)
        self.by_name.clear()
        self.by_id.clear()


def _check(ns: Namespace, request: m.OpenNamespace) -> None:
    have = ns.settings
    wanted = {
        "block_bytes": (request.block_bytes, have.block_bytes),
        "align": (request.align, have.align),
        "grace_ms": (request.grace_ms, have.grace_ns // 1_000_000),
    }
    for field, (asked, has) in wanted.items():
        if asked and asked != has:
            raise Refuse(
                m.Code.MISMATCH,
                f"namespace {ns.name} has {field} {has}, not {asked}",
                f"{field} 0 takes what it has",
            )
