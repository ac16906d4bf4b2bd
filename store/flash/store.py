"""A node's flash as a whole: its devices opened, started, handed out in segments, and stopped in order.

Every start counts (`boot`): what is written now wins over what was written before. A start marks each device
as not clean before anything is written to it; a clean stop writes the snapshot of each device, then marks it
clean. A device that was clean gives its blocks back from the snapshot, any other by a scan of its segments.

What was deleted must not return, so a device that was away while others went on begins empty: marks.py tells
how that is known.

Methods that write block; they are called in a pool, from several threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...rdma.errors import DeviceError, LocalError
from ..config import FlashPath
from ..native._store import ffi, lib
from . import format as f
from .device import Device
from .marks import Mark, begun, gone_on, mark_of, standing
from .opened import OpenDevice, Records, pack_table, read_names, read_snapshot
from .prepare import Progress, prepare
from .sharing import Class, Place, Sharing

log = logging.getLogger("memkv.flash")

DEPTH = 128  # requests at each device at once
RESERVE = 64  # one of so many segments is kept for size classes that have none


class FlashStore:
    """The devices of one store, and the C core's view of them.

    ``unusable``: why a path is not in use.

    :param memory: (address, bytes) of the arena, which becomes the I/O engine's fixed buffers.
    :param dirty_max: bytes that may wait to be written. :param threads: demands the fallback engine.
    :param whole: all devices of the store have to be there, and none is made.
    :raises LocalError: devices of two stores, or not a whole one.
    :raises DeviceError: none can be used, or another node has one.
    """

    def __init__(
        self,
        paths: Sequence[FlashPath],
        memory: tuple[int, int],
        *,
        dirty_max: int,
        threads: int = 0,
        progress: Progress | None = None,
        whole: bool = False,
    ) -> None:
        self.unusable: dict[str, str] = {}
        self.dirty_max = dirty_max
        self.devices: list[OpenDevice] = []
        self.sharing = Sharing(self)
        self.names: dict[int, f.Name] = {}
        self._names_generation = 0
        self._boot = 0
        self._unrecorded = False  # a loss that the other devices do not know of
        self.segments_lost = 0  # of assignments that could not be taken up
        self._lock = threading.RLock()
        self._opened: list[Device] = []
        self.flash: Any = ffi.NULL
        self.io: Any = lib.mkv_flashio_new(DEPTH, threads)
        if self.io == ffi.NULL:
            raise DeviceError(
                "the flash I/O engine cannot be started", ffi.errno, "--flash-threads, memkv-node doctor"
            )
        try:
            rc = lib.mkv_flashio_memory(self.io, *memory)
            if rc:
                log.warning("the arena cannot be registered with the I/O engine: %s", os.strerror(-rc))
            self._begin(self._open_whole(paths) if whole else self._open(paths, progress))
            self.flash = lib.mkv_flash_new(self.io, self.devices[0].super.secret, self._boot, dirty_max)
            if self.flash == ffi.NULL:
                raise MemoryError("no memory for the flash tier")
            for d in self.devices:
                lib.mkv_flash_device(self.flash, d.io, d.super.identity)
                if d.failed:
                    lib.mkv_flash_device_fail(self.flash, d.io)
            self.eventfd: int = lib.mkv_flash_eventfd(self.flash)
        except BaseException:
            self.close()
            raise
        for d in self.devices:
            how = "scan" if d.records is None and d.segments else "snapshot"
            log.info(
                "flash %s: %d of %d segments of %d KiB in use; by %s; %s; %s",
                d.device.path,
                len(d.segments),
                d.super.segments,
                d.super.segment_bytes >> 10,
                how,
                d.device.reason,
                ffi.string(lib.mkv_flashio_rung(self.io)).decode(),
            )

    # --- starting ---

    def _open(
        self, paths: Sequence[FlashPath], progress: Progress | None
    ) -> list[tuple[Device, f.Superblock]]:
        """Opens all paths; makes new files, and lets blank ones join the store or become one."""
        known: list[tuple[Device, f.Superblock]] = []
        blank: list[tuple[Device, FlashPath]] = []
        for path in paths:
            device = None
            try:
                device = Device(path.path, create=path.size)
                self._opened.append(device)
                device.lock()
                block = device.superblock()
                if block is not None:
                    known.append((device, block))
                elif device.blank():
                    blank.append((device, path))
                else:
                    raise f.FormatError("no whole superblock: it holds something else, or was damaged")
            except (DeviceError, f.FormatError) as exc:
                if isinstance(exc, DeviceError) and exc.errno == errno.EBUSY:
                    raise  # to start without what another node is using would take its blocks away
                self._reject(path.path, str(exc), device)
        stores = {block.store for _, block in known}
        if len(stores) > 1:
            raise LocalError(
                "the flash devices belong to different stores", "--flash: only those of one node"
            )
        store = next(iter(stores), secrets.token_bytes(16))
        secret = known[0][1].secret if known else secrets.randbits(64)
        for device, path in blank:
            index = max((block.index + 1 for _, block in known), default=0)
            try:
                block = prepare(
                    device,
                    path,
                    store=store,
                    secret=secret,
                    index=index,
                    count=len(paths),
                    progress=progress,
                )
            except (DeviceError, f.FormatError) as exc:
                self._reject(path.path, str(exc), device)
                continue
            known.append((device, block))
        if not known:
            raise self._nothing()
        return known

    def _open_whole(self, paths: Sequence[FlashPath]) -> list[tuple[Device, f.Superblock]]:
        """Opens all devices of one store, and has changed nothing if that cannot be done."""
        found: list[tuple[Device, f.Superblock]] = []
        for path in paths:
            device = Device(path.path)
            self._opened.append(device)
            device.lock()
            block = device.superblock()
            if block is None:
                raise LocalError(
                    f"{path.path} is not a device of a memkv store", "memkv-node format makes it one"
                )
            found.append((device, block))
        count = max(block.count for _, block in found)
        _, there = standing([block for _, block in found])
        if len({block.store for _, block in found}) != 1 or count != len(found) or not all(there):
            raise LocalError(
                f"{len(found)} devices, which are not all {count} that their node had last",
                "name all of them; to go on without one, start the node without it",
            )
        return found

    def _reject(self, path: os.PathLike[str], why: str, device: Device | None) -> None:
        if device:
            device.discard()
        self.unusable[str(path)] = why.removeprefix(f"{path}: ")  # it is said beside its path
        log.error("flash %s: %s", path, why)

    def _nothing(self) -> DeviceError:
        reasons = "; ".join(f"{path}: {why}" for path, why in self.unusable.items())
        return DeviceError(
            f"no flash device can be used: {reasons}", 0, "memkv-node format, or --flash PATH:SIZE"
        )

    def _begin(self, found: list[tuple[Device, f.Superblock]]) -> None:
        """Reads what each device says, then marks it as in use."""
        blocks = [block for _, block in found]
        mark, there = standing(blocks)
        missing = max(block.count for block in blocks) - len(found)
        if missing > 0:
            log.error("flash: %d of the store's devices are missing; their blocks are lost to it", missing)
        for (device, block), was_there in zip(found, there, strict=True):
            try:
                self._begin_one(device, block, was_there)
            except (DeviceError, f.FormatError) as exc:
                self._reject(device.path, str(exc), device)
        if not self.devices:
            raise self._nothing()
        for d in self.devices:
            self._prune(d)
        if self.names:
            self._write_names(self.names)  # on those too that have an older table, or none
        self._boot = self._new_mark(mark)
        if not self._good():
            self.unusable |= {str(d.device.path): d.failed for d in self.devices}
            raise self._nothing()

    def _new_mark(self, prior: Mark) -> int:
        """Puts a new mark on all devices that are in use, in two steps; then the store may go on.

        :returns: its number.
        """
        mark = max(d.super.boot for d in self.devices) + 1, secrets.randbits(64)
        count = len(self._good())
        for d in self._good():
            self._write_super(d, begun(d.super, mark, prior, count))
        for d in self._good():
            self._write_super(d, gone_on(d.super))
        return mark[0]

    def _write_super(self, d: OpenDevice, block: f.Superblock) -> bool:
        if not self._write(d, block.place(), block.pack()):
            return False
        d.super = block
        return True

    def _prune(self, d: OpenDevice) -> None:
        """Frees segments that will not be looked at now, so that they are not looked at later either, when
        blocks in them may have been deleted: beyond the end of the device, or of nobody that is known.
        """
        gone = [n for n, s in d.segments.items() if n >= d.usable or s.namespace not in self.names]
        if gone:
            why = d.shortened or "their namespace is not known"
            log.error("flash %s: %d segments are lost: %s", d.device.path, len(gone), why)
            for number in gone:
                del d.segments[number]
            self.segments_lost += len(gone)
            self._write(d, d.super.segments_at, pack_table(d.super, d.segments))

    def forget(self, d: OpenDevice, segment: f.Segment, why: str) -> None:
        """Frees a segment that its namespace cannot take up, for the same reason: what is deleted from now on
        could be found in it later. A device on which that cannot be written down is out.
        """
        log.error("flash %s: segment %d is lost: %s", d.device.path, segment.number, why)
        with self._lock:
            self.segments_lost += 1
            if self._write_segment(d, segment.number, None):
                del d.segments[segment.number]

    def _begin_one(self, device: Device, block: f.Superblock, was_there: bool) -> None:
        segments: dict[int, f.Segment] = {}
        records: Records | None = None
        if was_there:
            table = device.read(block.segments_at, block.snapshot_at - block.segments_at)
            table = table[: block.segments * f.SEGMENT.itemsize]
            segments = {s.number: s for s in f.parse_segments(table, block.secret)}
            names = read_names(device, block)
            if names and names[0] >= self._names_generation:
                self._names_generation, self.names = names[0], {n.id: n for n in names[1]}
            records = read_snapshot(device, block) if block.clean else None
        else:
            log.error("flash %s was away while the store went on: it begins empty", device.path)
            device.write(block.segments_at, pack_table(block, segments))
        io = lib.mkv_flashio_device(self.io, os.dup(device.fd))
        if io < 0:
            raise DeviceError(f"{device.path}: the I/O engine refuses it", -io)
        self.devices.append(OpenDevice(device, block, io, segments, records))

    # --- namespaces and segments ---

    @property
    def highest_id(self) -> int:
        """No namespace that was ever given a segment has a higher id."""
        used = [s.namespace for d in self.devices for s in d.segments.values()]
        return max([0, *self.names, *used])

    def remember(self, name: f.Name) -> None:
        """Writes down a namespace, before its first segment is taken. :raises FormatError: does not fit."""
        with self._lock:
            names = self.names | {name.id: name}
            self._write_names(names)
            self.names = names

    def _write_names(self, names: dict[int, f.Name]) -> None:
        raw = [
            (d, f.pack_names(list(names.values()), self._names_generation + 1, d.super.secret))
            for d in self._good()
        ]
        self._names_generation += 1
        for d, table in raw:
            self._write(d, d.super.names_at + self._names_generation % 2 * f.NAMES_BYTES, table)

    def take_segment(
        self, namespace: int, payload: int, align: int = f.PAGE
    ) -> tuple[OpenDevice, f.Segment] | None:
        """Assigns a free segment, on the device that has most of them free; None: there is none for it.

        It is on stable media when this returns, so that what is written there later will be found.
        """
        with self._lock:
            while True:
                good = self._good()
                with_room = [d for d in good if d.free and d.takes(payload, align)]
                has_some = any(
                    s.namespace == namespace and s.payload == payload
                    for d in good
                    for s in d.segments.values()
                )
                kept = sum(d.usable for d in good) // RESERVE if has_some else 0
                if not with_room or sum(d.free for d in good) <= kept:
                    return None
                d = max(with_room, key=lambda d: d.free)
                number = next(n for n in range(d.usable) if n not in d.segments)
                if segment := self._assign(d, number, namespace, payload):
                    return d, segment

    def hand_over(self, place: Place, namespace: int, payload: int) -> tuple[OpenDevice, f.Segment] | None:
        """Assigns a segment that somebody has given up to somebody else, or to nobody (payload 0). None also
        if its device has failed.
        """
        with self._lock:
            d = next((d for d in self._good() if d.io == place[0]), None)
            if d is None:
                return None
            if payload:
                segment = self._assign(d, place[1], namespace, payload)
                return (d, segment) if segment else None
            if self._write_segment(d, place[1], None):
                del d.segments[place[1]]
            return None

    def _assign(self, d: OpenDevice, number: int, namespace: int, payload: int) -> f.Segment | None:
        """Under an epoch that it never had before."""
        d.turn += 1
        segment = f.Segment(number, namespace, payload, d.super.boot << 32 | d.turn)
        if not self._write_segment(d, number, segment):
            return None
        d.segments[number] = segment
        return segment

    def held(self) -> Counter[Class]:
        """How many segments each size class has, on devices that are in use."""
        with self._lock:
            return Counter((s.namespace, s.payload) for d in self._good() for s in d.segments.values())

    def devices_for(self, payload: int, align: int) -> int:
        """On which devices blocks of a size class can lie, as bits."""
        return sum(1 << d.io for d in self._good() if d.takes(payload, align))

    def _write_segment(self, d: OpenDevice, number: int, segment: f.Segment | None) -> bool:
        """Writes the page of the table that the record is in. Records do not cross sectors, so a torn write
        leaves each of them old or new.
        """
        per_page = f.PAGE // f.SEGMENT.itemsize
        first = number // per_page * per_page
        records = [d.segments.get(n) for n in range(first, min(first + per_page, d.super.segments))]
        records[number - first] = segment
        page = b"".join(f.pack_segment(s, d.super.secret) for s in records).ljust(f.PAGE, b"\0")
        return self._write(d, d.super.segments_at + first * f.SEGMENT.itemsize, page)

    def segments_of(self, namespace: int) -> list[tuple[OpenDevice, f.Segment]]:
        """What is assigned to a namespace."""
        with self._lock:
            return [(d, s) for d in self.devices for s in d.segments.values() if s.namespace == namespace]

    def records_of(self, namespace: int) -> Records:
        """The namespace's blocks in the snapshots, ``device`` being the engine's index."""
        parts = []
        for d in self.devices:
            if d.records is not None:
                mine = d.records[d.records["namespace"] == namespace].copy()
                mine["device"] = d.io
                parts.append(mine)
        return np.concatenate(parts) if parts else np.zeros(0, f.RECORD)

    def forget_records(self) -> None:
        """All namespaces have taken theirs: frees the memory."""
        for d in self.devices:
            if d.records is not None:
                d.records = np.zeros(0, f.RECORD)

    # --- losses ---

    def _good(self) -> list[OpenDevice]:
        return [d for d in self.devices if not d.failed]

    def _write(self, d: OpenDevice, offset: int, data: bytes) -> bool:
        try:
            d.device.write(offset, data)
        except DeviceError as exc:
            self.fail(d, str(exc))
            return False
        return True

    def fail(self, d: OpenDevice, why: str) -> None:
        """Takes a device out: nothing more is written there, its blocks are misses. Does not block."""
        if not d.failed:
            d.failed = why
            self._unrecorded = True
            log.error("flash %s is taken out: %s", d.device.path, why)
            if self.flash != ffi.NULL:
                lib.mkv_flash_device_fail(self.flash, d.io)

    def look(self, patience_ns: int) -> bool:
        """Takes out devices that the C core has given up, or that have not answered for so long. Does not
        block. Whether there are losses that :meth:`settle` has to record.
        """
        stats = ffi.new("struct mkv_flash_device_stats *")
        for d in self._good():
            if lib.mkv_flash_device_stats(self.flash, d.io, stats) == 0 and stats.failed:
                self.fail(d, "I/O errors")
            elif lib.mkv_flashio_stuck(self.io, d.io) > patience_ns:
                self.fail(d, f"no answer for {patience_ns // 1_000_000_000} s")
        return self._unrecorded

    def settle(self) -> bool:
        """Leaves a new mark on the devices that remain, so that a lost one that comes back is known to have
        missed what was deleted meanwhile. False: there is none to leave it on.
        """
        with self._lock:
            while self._unrecorded:
                good = self._good()
                if not good:
                    return False
                self._unrecorded = False
                self._new_mark(mark_of(good[0].super))
            return True

    # --- stopping ---

    def save(self, export: Callable[[], Records]) -> None:
        """After everything dirty has been written: the snapshot of each device, then its mark as clean.

        :param export: all blocks on flash, dtype RECORD, ``device`` being the engine's index.
        """
        with self._lock:
            self.settle()
            records = export()
            for d in self._good():
                mine = records[records["device"] == d.io].copy()
                mine["device"] = d.super.index
                block = d.super.next(clean=True, snapshot=d.super.generation + 1)
                raw = f.pack_snapshot(mine, block.snapshot, block.secret)
                if len(raw) > block.snapshot_bytes:
                    log.warning("flash %s: %d blocks do not fit the snapshot", d.device.path, len(mine))
                    continue
                if self._write(d, block.snapshot_at, raw):
                    self._write_super(d, block)

    def close(self) -> None:
        """After all namespaces. Whether it is clean has been decided by :meth:`save`."""
        if self.flash != ffi.NULL:
            lib.mkv_flash_free(self.flash)
            self.flash = ffi.NULL
        if self.io != ffi.NULL:
            lib.mkv_flashio_free(self.io)
            self.io = ffi.NULL
        for device in self._opened:
            with contextlib.suppress(OSError):
                device.close()
        self._opened.clear()

    # --- what it tells ---

    def engine(self) -> tuple[str, str]:
        """The rung of the I/O engine, and why."""
        return (
            ffi.string(lib.mkv_flashio_rung(self.io)).decode(),
            ffi.string(lib.mkv_flashio_reason(self.io)).decode(),
        )

    def stats(self) -> dict[str, int]:
        """Gauges and counters of the C core."""
        out = ffi.new("struct mkv_flash_stats *")
        lib.mkv_flash_stats(self.flash, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct mkv_flash_stats").fields}

    def describe(self) -> dict[str, dict[str, int | str | bool]]:
        """By path: each device, and each path that cannot be used."""
        out: dict[str, dict[str, int | str | bool]] = {}
        stats = ffi.new("struct mkv_flash_device_stats *")
        for d in self.devices:
            lib.mkv_flash_device_stats(self.flash, d.io, stats)
            out[str(d.device.path)] = {
                "failed": d.failed or ("I/O errors" if stats.failed else ""),
                "shortened": d.shortened,
                "start": "scan" if d.records is None else "snapshot",
                "direct": d.device.direct,
                "reason": d.device.reason,
                "bytes": d.super.size,
                "segment_bytes": d.super.segment_bytes,
                "segments": d.super.segments,
                "segments_free": d.free,
                "extents": int(stats.extents),
                "extents_free": int(stats.free),
                "live_bytes": int(stats.bytes_live),
                "read_errors": int(stats.read_errors),
                "write_errors": int(stats.write_errors),
                "corrupt": int(stats.corrupt),
                "oldest_request_ms": int(lib.mkv_flashio_stuck(self.io, d.io)) // 1_000_000,
            }
        return out | {path: {"failed": why} for path, why in self.unusable.items()}

    def degraded(self) -> str:
        """Which devices are out, or have become smaller, and why; empty if none is."""
        out = [f"{d.device.path}: {d.trouble}" for d in self.devices if d.trouble]
        return "; ".join(out + [f"{path}: {why}" for path, why in self.unusable.items()])
