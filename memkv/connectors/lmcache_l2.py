"""LMCache's multi-process L2 adapter: chunks go straight between its L1 arena and memkv nodes.

    --l2-adapter '{"type": "plugin", "module_path": "memkv.connectors.lmcache_l2",
                   "class_name": "MemKVL2Adapter", "adapter_params": {"nodes": "node-1:7420"}}'

The adapter has no thread of its own for batches: each is submitted to a peer, whose control thread notes what
became of it and writes the event fd; bitmaps and notifications are made by the controller that asks.
docs/engines/lmcache.md.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface, L2TaskId
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase
from lmcache.v1.memory_management import MemoryObj

from ..batches import Keys
from ..peer import Peer, Statuses
from ..rdma.errors import LocalError
from ..status import Status
from ..tickets import Ticket
from .lmcache_keys import Layout, identity_of, layout_of, layout_of_object, object_digest
from .lmcache_sites import LOCK_TTL, Holds, Site, Sites, read_lock_ttl, statuses_of
from .settings import Settings

log = logging.getLogger("memkv.lmcache")

STORE, LOOKUP, LOAD = range(3)
Index = npt.NDArray[np.intp]


class MemKVL2AdapterConfig(L2AdapterConfigBase):
    """``adapter_params``: the fields of :class:`~memkv.connectors.settings.Settings`, and ``lock_ttl``."""

    def __init__(self, settings: Settings, lock_ttl: float = LOCK_TTL) -> None:
        self.settings = settings
        self.lock_ttl = lock_ttl

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> MemKVL2AdapterConfig:
        """:raises ValueError: an unknown name, or a value that cannot be meant; it names the knob."""
        return cls(Settings.read(d, ignore=("type", "lock_ttl")), read_lock_ttl(d.get("lock_ttl")))

    @classmethod
    def help(cls) -> str:
        return (
            "memkv L2 adapter, adapter_params:\n"
            '- nodes (str): "host:7420,host:7420" (required, or MEMKV_NODES)\n'
            "- secret_file, fabric, devices, gid_index, namespace, salt, durability, checksum, get_timeout, "
            "put_timeout, connect_timeout, max_channels: docs/engines/lmcache.md of memkv\n"
            f"- lock_ttl (float): seconds that a lookup holds its blocks at most (default {LOCK_TTL:g})"
        )


@dataclass(slots=True, eq=False)
class Task:
    """A batch of LMCache's, until it is asked for. ``left``: parts, one per kind of object, under way."""

    id: L2TaskId
    kind: int
    keys: list[ObjectKey]
    status: Statuses
    sizes: list[int]
    left: int


class MemKVL2Adapter(L2AdapterInterface):
    """:param config: what :class:`MemKVL2AdapterConfig` read. :param l1_memory_desc: LMCache's L1 arena."""

    def __init__(self, config: MemKVL2AdapterConfig, l1_memory_desc: L1MemoryDesc | None = None) -> None:
        super().__init__()  # no capacity: nodes evict by themselves, and LMCache need not
        arenas = [(l1_memory_desc.ptr, l1_memory_desc.size)] if l1_memory_desc else []
        self._settings = config.settings
        self._ttl = config.lock_ttl
        self._sites = Sites(config.settings, arenas)
        self._holds = Holds(config.lock_ttl)
        self._lock = threading.Lock()
        self._fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in (STORE, LOOKUP, LOAD)]
        self._closed = False
        self._last_id = 0
        self._done: list[dict[L2TaskId, Task]] = [{}, {}, {}]
        self._met: dict[tuple[str, int, int], dict[str, Site]] = defaultdict(dict)  # kinds of object, by key
        self._sought: dict[tuple[str, int], str] = {}  # the layout of the last lookup
        self._warned: set[str] = set()

    def get_store_event_fd(self) -> int:
        return self._fds[STORE]

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._fds[LOOKUP]

    def get_load_event_fd(self) -> int:
        return self._fds[LOAD]

    # --- tasks ---

    def _site(self, key: ObjectKey, layout: Layout) -> Site:
        met = self._met[key.model_name, key.kv_rank, key.object_group_id]
        site = met.get(layout.text)
        if site is None:
            name = key.model_name, layout.text
            identity = partial(identity_of, "mp", key.model_name, layout, self._settings.salt, {})
            site = met[layout.text] = self._sites.get(name, identity, layout.nbytes)
        return site

    def _begin(
        self, kind: int, keys: Sequence[ObjectKey], sites: Sequence[Site | None]
    ) -> tuple[Task, list[tuple[Site, Index]]]:
        """A task, and its parts: which keys each site has. Keys without one fail."""
        parts: dict[Site, list[int]] = defaultdict(list)
        for i, site in enumerate(sites):
            if site is not None:
                parts[site].append(i)
        with self._lock:
            self._last_id += 1
            task = Task(
                self._last_id, kind, list(keys), np.zeros(len(keys), np.uint8), [0] * len(keys), len(parts)
            )
            if not parts:
                self._finish(task)
        return task, [(site, np.array(i, np.intp)) for site, i in parts.items()]

    def _finish(self, task: Task) -> None:
        """With the lock held."""
        if not self._closed:
            self._done[task.kind][task.id] = task
            os.eventfd_write(self._fds[task.kind], 1)

    def _decided(self, task: Task, index: Index, status: Statuses) -> None:
        """A part is over. On whatever thread."""
        with self._lock:
            task.status[index] = status
            task.left -= 1
            if not task.left:
                self._finish(task)

    def _transfer(self, kind: int, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        layouts = [layout_of_object(o) for o in objects]
        sizes = [o.get_size() for o in objects]
        sites: list[Site | None] = []
        for key, layout, size in zip(keys, layouts, sizes, strict=True):
            fits = size == layout.nbytes
            if kind == STORE and (not fits or self._sought.get(_group(key), layout.text) != layout.text):
                self._warn_of_serde(layout, size)
            sites.append(self._site(key, layout) if fits else None)
        task, parts = self._begin(kind, keys, sites)
        task.sizes = sizes
        for site, index in parts:
            names = site.keys(object_digest(keys[i]) for i in index)
            then = partial(self._decided, task, index)
            site.transfer(kind == STORE, names, [objects[i] for i in index], then)
        return task.id

    def _warn_of_serde(self, layout: Layout, size: int) -> None:
        if layout.text not in self._warned:
            self._warned.add(layout.text)
            log.warning(
                "objects of %d bytes are stored as %s and looked up as something else: they will not be "
                'found. memkv does not support "serde" in an --l2-adapter.',
                size,
                layout.text,
            )

    # --- store ---

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        return self._transfer(STORE, keys, objects)

    def pop_completed_store_tasks(self) -> dict[L2TaskId, L2StoreResult]:
        with self._lock:
            done, self._done[STORE] = self._done[STORE], {}
        return {id: self._stored(task) for id, task in done.items()}

    def _stored(self, task: Task) -> L2StoreResult:
        new = np.flatnonzero(task.status == Status.STORED).tolist()
        sizes = [task.sizes[i] for i in new]
        if new:
            self._notify_keys_stored([task.keys[i] for i in new], sizes)
        kept = len(new) + int((task.status == Status.EXISTS).sum())
        return L2StoreResult(kept == len(task.keys), sum(sizes))

    # --- lookup and lock ---

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> L2TaskId:
        layouts = {group: layout_of(d.shapes, d.dtypes) for group, d in group_layout_descs.items()}
        sites: list[Site | None] = []
        for key in keys:
            layout = layouts.get(key.object_group_id)
            if layout:
                sites.append(self._site(key, layout))
                self._sought[_group(key)] = layout.text
            else:  # LMCache calls it a hint: what was last met under such keys, if anything was
                met = list(self._met.get((key.model_name, key.kv_rank, key.object_group_id), {}).values())
                sites.append(met[-1] if met else None)
        task, parts = self._begin(LOOKUP, keys, sites)
        for site, index in parts:
            self._pin(task, site, index)
        return task.id

    def _pin(self, task: Task, site: Site, index: Index) -> None:
        names = [task.keys[i] for i in index]
        keys = site.keys(map(object_digest, names))

        def run(peer: Peer) -> None:
            asked_at = time.monotonic()
            then = partial(self._pinned, task, site, index, keys, asked_at)
            peer.submit_pin(keys, self._ttl, timeout=self._settings.get_timeout, then=then)

        def fail() -> None:
            self._decided(task, index, np.full(len(index), Status.ERROR_UNREACHABLE, np.uint8))

        site.use(run, fail)

    def _pinned(
        self, task: Task, site: Site, index: Index, keys: Keys, asked_at: float, ticket: Ticket
    ) -> None:
        status = statuses_of(ticket, len(index))
        held = np.flatnonzero(status == Status.DONE)
        self._holds.add(site, [task.keys[index[i]] for i in held], keys[held], asked_at)
        self._decided(task, index, status)

    def query_lookup_and_lock_result(self, task_id: L2TaskId) -> Bitmap | None:
        with self._lock:
            task = self._done[LOOKUP].pop(task_id, None)
        # FULL: it is there, and the node has as many pins as it allows. A load is worth trying.
        return (
            None
            if task is None
            else _bitmap((task.status == Status.DONE) | (task.status == Status.ERROR_FULL))
        )

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        self._holds.release(keys)

    # --- load ---

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        return self._transfer(LOAD, keys, objects)

    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None:
        with self._lock:
            task = self._done[LOAD].pop(task_id, None)
        if task is None:
            return None
        hit = task.status == Status.HIT
        if hit.any():
            self._notify_keys_accessed([task.keys[i] for i in np.flatnonzero(hit)])
        return _bitmap(hit)

    # --- the rest ---

    def delete(self, keys: list[ObjectKey]) -> None:
        """Deletes what this process has stored or looked up: a key does not say what its object is like."""
        parts: dict[Site, list[ObjectKey]] = defaultdict(list)
        for key in keys:
            for site in list(self._met.get((key.model_name, key.kv_rank, key.object_group_id), {}).values()):
                parts[site].append(key)
        for site, names in parts.items():
            then = partial(self._deleted, site, names)
            content = site.keys(map(object_digest, names))
            site.use(partial(_delete, content, then), lambda: None)

    def _deleted(self, site: Site, names: list[ObjectKey], ticket: Ticket) -> None:
        gone = np.flatnonzero(statuses_of(ticket, len(names)) == Status.DONE).tolist()
        if gone:
            self._notify_keys_deleted([names[i] for i in gone], [site.block_bytes] * len(gone))

    def list_l2_keys(
        self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None
    ) -> KeyListPage:
        """:raises NotImplementedError: nodes hold digests of keys, not the keys."""
        raise NotImplementedError("memkv nodes hold digests of LMCache's keys, from which no key can be had")

    def report_status(self) -> dict[str, Any]:
        kinds = []
        for site in self._sites:
            peer = site.peer
            kind: dict[str, Any] = {"model": site.identity.model, "layout": site.identity.layout}
            kinds.append(kind | ({"error": site.error} if peer is None else peer.stats()))
        up = [any(n["up"] for n in k["nodes"].values()) for k in kinds if "nodes" in k]
        return {
            "is_healthy": not self._closed and (any(up) or not kinds),
            "type": type(self).__name__,
            "nodes": list(self._settings.nodes),
            "locks": len(self._holds),
            "kinds": kinds,
        }

    def close(self) -> None:
        """When this returns nobody reads or writes LMCache's memory any more. Waits for what is under way,
        until its deadline at most; what has not begun fails.
        """
        if self._closed:
            return
        self._holds.release_all()
        self._sites.close()
        with self._lock:
            self._closed = True
            for fd in self._fds:
                os.close(fd)


def _group(key: ObjectKey) -> tuple[str, int]:
    return key.model_name, key.object_group_id


def _delete(keys: Keys, then: Any, peer: Peer) -> None:
    peer.submit_delete(keys, then=then)


def _bitmap(found: npt.NDArray[np.bool_]) -> Bitmap:
    n = len(found)
    if found.all():
        return Bitmap(n, n)
    bitmap = Bitmap(n)
    for i in np.flatnonzero(found).tolist():
        bitmap.set(i)
    return bitmap


assert issubclass(LocalError, ValueError)  # what LMCache expects of from_dict
