"""Scrubbing a store whose node is stopped: every header is looked at, every payload verified.

It starts the store as a node does, but without peers and without memory for blocks: all segments are scanned
(snapshots are not believed), then each block is read and compared with its checksum. Bad ones are dropped.
What is left gets a new snapshot, so that the node's next start is quick.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...rdma.errors import DeviceError
from ...rdma.memory import HostMemory
from ..config import FlashPath
from ..layout import SLAB_MAX_BYTES
from ..native._store import ffi, lib
from . import format as f
from .opened import Records
from .store import FlashStore
from .tenant import Tenant

log = logging.getLogger("memkv.flash")

REGISTERED = 2 << 20  # bytes; a scrub brings its own memory
AT_ONCE = 32  # blocks between two reports of progress

Progress = Callable[[str, int, int], None]  # what is done, how far, of how much


@dataclass(slots=True)
class Scrubbed:
    """What was found in one namespace."""

    blocks: int  # good ones
    bytes: int
    checked: int
    bad: int


@dataclass(slots=True)
class Report:
    """What a scrub found."""

    namespaces: dict[str, Scrubbed] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)  # by the scan, by reason
    devices: dict[str, dict[str, int | str | bool]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def bad(self) -> int:
        """Blocks whose content was wrong or could not be read."""
        return sum(n.bad for n in self.namespaces.values())


def scrub(paths: Sequence[FlashPath], progress: Progress | None = None) -> Report:
    """Verifies and repairs a store.

    :raises DeviceError: a device cannot be opened, or a node is running with it.
    :raises LocalError: these are not all devices of one store: to go on without one would empty it.
    """
    began = time.monotonic()
    tell = progress or (lambda what, done, of: None)
    report = Report()
    with ExitStack() as stack:
        memory = HostMemory(SLAB_MAX_BYTES, False)  # never written, so it takes none
        stack.callback(memory.close)
        arena = lib.mkv_arena_new(
            ffi.cast("void *", memory.address), memory.nbytes, memory.nbytes, secrets.randbits(63) + 1
        )
        if arena == ffi.NULL:
            raise DeviceError("the arena cannot be set up", ffi.errno)
        stack.callback(lib.mkv_arena_free, arena)
        store = FlashStore(paths, (memory.address, REGISTERED), dirty_max=1, whole=True)
        stack.callback(store.close)
        spaces = [_space(stack, store, arena, name) for name in store.names.values()]
        _scan(store, spaces, tell)
        for ns, tenant in spaces:
            report.namespaces[tenant.name.name] = _verify(ns, tenant, tell)
        tell("flushing", 0, 1)
        number = lib.mkv_flash_sync(store.flash)
        while lib.mkv_flash_barriers(store.flash) < number:
            time.sleep(0.01)
        store.look(10**18)

        def export() -> Records:
            return np.concatenate([np.zeros(0, f.RECORD), *(tenant.export() for _, tenant in spaces)])

        store.save(export)
        stats = store.stats()
        report.dropped = {k[8:]: v for k, v in stats.items() if k.startswith("dropped_")}
        report.devices = store.describe()
    report.seconds = time.monotonic() - began
    return report


def _space(stack: ExitStack, store: FlashStore, arena: Any, name: f.Name) -> tuple[Any, Tenant]:
    """A namespace without a slab, its segments being scanned."""
    ns = lib.mkv_ns_new(arena, name.id, name.block_bytes, name.align, name.grace_ns, name.salt)
    if ns == ffi.NULL:
        raise MemoryError(f"no memory for namespace {name.name}")
    stack.callback(lib.mkv_ns_free, ns)
    tenant = Tenant(store, ns, name)
    tenant.make_room_for(tenant.expected)
    tenant.restore(scan=True)
    return ns, tenant


def _scan(store: FlashStore, spaces: list[tuple[Any, Tenant]], tell: Progress) -> None:
    total = store.stats()["scan_total"]
    while left := sum(tenant.scanning() for _, tenant in spaces):
        tell("reading headers", total - left, total)
        for ns, tenant in spaces:
            if lib.mkv_ns_chores(ns) & lib.MKV_CHORE_TABLE:
                tenant.double_index()
        time.sleep(0.02)
    tell("reading headers", total, total)


def _verify(ns: Any, tenant: Tenant, tell: Progress) -> Scrubbed:
    what = f"verifying {tenant.name.name}"
    total = tenant.stats()["flash_blocks"]
    checked, bad, cursor = 0, 0, 0
    some, wrong = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    while True:
        cursor = int(lib.mkv_ns_scrub(ns, cursor, AT_ONCE, some, wrong))
        checked, bad = checked + int(some[0]), bad + int(wrong[0])
        tell(what, min(checked, total), total)
        if not cursor:
            break
    stats = tenant.stats()
    if bad:
        log.error("namespace %s: %d of %d blocks were bad", tenant.name.name, bad, checked)
    return Scrubbed(stats["flash_blocks"], stats["flash_bytes"], checked, bad)
