"""All namespaces of a node: opening and making them, and sharing the arena among them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..rdma.errors import LocalError
from ..rdma.fabric import Fabric
from . import messages as m
from .flash import format as f
from .flash.store import FlashStore
from .namespace import Identity, Namespace, Settings
from .native._store import lib
from .notices import Notices
from .populate import Ahead
from .refusals import Refuse

log = logging.getLogger("memkv.node")


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
        ahead: Ahead,
        store: FlashStore | None = None,
    ) -> None:
        self.by_name: dict[str, Namespace] = {}
        self.by_id: dict[int, Namespace] = {}
        self.notices = Notices(ack_timeout)
        self._make = (fabric, arena, incarnation, store, self)
        self._store = store
        self._starving: set[Namespace] = set()  # without any slab
        self._arena = arena
        self._ahead = ahead
        self._default = default
        self._limit = limit
        self._pool = pool
        self._next = 1 + (store.highest_id if store else 0)
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
        who = Identity(self._next, request.name, secrets.randbits(63) + 1, secrets.randbits(64))
        self._next += 1
        try:
            ns = await self._add(who, settings)
        except f.FormatError as exc:
            raise Refuse(m.Code.LIMIT, str(exc)) from None
        log.info(
            "namespace %s: blocks of up to %d bytes, grace period %g s",
            ns.name,
            settings.block_bytes,
            settings.grace_ns / 1e9,
        )
        return ns

    async def restore(self) -> None:
        """Takes up the namespaces that flash knows. :raises LocalError: the settings do not let one be."""
        if self._store is None:
            return
        for name in sorted(self._store.names.values(), key=lambda name: name.id):
            who = Identity(name.id, name.name, name.incarnation, name.salt)
            try:
                await self._add(who, Settings(name.block_bytes, name.align, name.grace_ns))
            except Refuse as exc:
                raise LocalError(f"namespace {name.name} is on flash, and {exc.message}", exc.hint) from None
        self._store.forget_records()

    async def _add(self, who: Identity, settings: Settings) -> Namespace:
        ns = await asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: Namespace(who, settings, *self._make)
        )
        self.by_name[ns.name] = self.by_id[ns.id] = ns
        if not ns.slabs:
            self._make_room(ns)
        ns.start(self._pool, self.notices)
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

    def took(self) -> None:
        """A namespace has taken slabs."""
        self._ahead.wake()

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
