"""A node's flash as a whole: its devices opened, started, handed out in segments, and stopped in order.

Every start counts (`boot`): what is written now wins over what was written before. A start marks each device as not
clean before anything is written to it; a clean stop writes the snapshot of each device, then marks it clean. A device that
was clean gives its blocks back from the snapshot, any other by a scan of its segments.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...rdma.errors import DeviceError, LocalError
from ..native._store import ffi, lib
from . import format as f
from .device import Device, FlashPath

log = logging.getLogger("memkv.flash")

Progress = Callable[[str, int, int], None]
Records = npt.NDArray[np.void]
DEPTH = 128  # requests at the devices at once


@dataclass(eq=False)
class OpenDevice:
    """A device in use. ``records`` are what its snapshot held, until the namespaces have taken them."""

    device: Device
    super: f.Superblock
    io: int  # index in the I/O engine
    segments: dict[int, f.Segment]
    records: Records | None
    failed: str = ""
    turn: int = field(default=0)

    @property
    def free(self) -> int:
        """Segments that nobody has."""
        return 0 if self.failed else self.usable - sum(1 for n in self.segments if n < self.usable)

    @property
    def usable(self) -> int:
        """Segments that lie within the device as it is now (it may have been truncated)."""
        whole = (self.device.nbytes - self.super.data_at) // self.super.segment_bytes
        return max(0, min(self.super.segments, whole))

    def span(self, segment: f.Segment) -> Any:
        """The segment as C knows it."""
        out = ffi.new("struct mkv_segment *")
        out.offset = self.super.segment_offset(segment.number)
        out.bytes, out.epoch, out.payload = self.super.segment_bytes, segment.epoch, segment.payload
        out.device, out.number = self.io, segment.number
        return out


def format_devices(
    paths: Sequence[FlashPath],
    *,
    force: bool = False,
    segment_bytes: int = 0,
    progress: Progress | None = None,
) -> bytes:
    """Makes a new store of these devices; returns its identity. What lay on them is lost.

    :raises LocalError: one of them holds something, and ``force`` is not set. Then none has been touched.
    """
    store, secret = secrets.token_bytes(16), secrets.randbits(64)
    devices: list[Device] = []
    try:
        for path in paths:
            device = Device(path.path, create=path.size)
            devices.append(device)
            device.lock()
            if not force and not device.blank():
                known = device.superblock() is not None
                what = "a memkv store" if known else "something that memkv does not know"
                raise LocalError(f"{path.path} holds {what}", "memkv-node format --force overwrites it")
        for index, (device, path) in enumerate(zip(devices, paths, strict=True)):
            _format(device, path, store, secret, index, len(paths), segment_bytes, progress)
    finally:
        for device in devices:
            device.close()
    return store


def _format(
    device: Device,
    path: FlashPath,
    store: bytes,
    secret: int,
    index: int,
    count: int,
    segment_bytes: int,
    progress: Progress | None,
) -> f.Superblock:
    nbytes = (
        min(path.size, device.nbytes) if path.size and device.block_device else path.size or device.nbytes
    )
    block = f.plan(
        nbytes,
        store=store,
        identity=secrets.randbits(64) | 1,
        index=index,
        count=count,
        secret=secret,
        segment_bytes=segment_bytes,
    )
    name = str(path.path)
    if not device.block_device:
        device.write_through(nbytes, (lambda done, of: progress(name, done, of)) if progress else None)
        device._look()
    else:
        device.write(0, bytes(block.data_at))
    table = f.pack_segment(None, secret) * block.segments
    device.write(block.segments_at, table.ljust(-(-len(table) // f.PAGE) * f.PAGE, b"\0"))
    for place in (0, 1):
        device.write(block.names_at + place * f.NAMES_BYTES, f.pack_names([], place, secret))
    device.write(f.PAGE - block.place(), bytes(f.PAGE))
    device.write(block.place(), block.pack())
    return block


class FlashStore:
    """The devices of one store, and the C core's view of them.

    :param memory: (address, bytes) of the arena, which becomes the I/O engine's fixed buffers.
    :param dirty_max: bytes that may wait to be written. :param threads: demands the fallback engine.
    :raises LocalError: a path that holds something else; devices of two stores.
    :raises DeviceError: none of the devices can be used.
    """

    def __init__(
        self,
        paths: Sequence[FlashPath],
        memory: tuple[int, int],
        *,
        dirty_max: int,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.unusable: dict[str, str] = {}
        self.devices: list[OpenDevice] = []
        self.names: dict[int, f.Name] = {}
        self._names_generation = 0
        self.io: Any = lib.mkv_flashio_new(DEPTH, threads)
        if self.io == ffi.NULL:
            raise DeviceError("the flash I/O engine cannot be started", ffi.errno)
        self.flash: Any = ffi.NULL
        try:
            found = self._open(paths, progress)
            self._begin(found)
            rc = lib.mkv_flashio_memory(self.io, *memory)
            if rc:
                log.warning("the arena cannot be registered with the I/O engine (%s)", os.strerror(-rc))
            first = self.devices[0].super
            self.flash = lib.mkv_flash_new(self.io, first.secret, first.boot, dirty_max)
            if self.flash == ffi.NULL:
                raise MemoryError("no memory for the flash tier")
            for d in self.devices:
                lib.mkv_flash_device(self.flash, d.io, d.super.identity)
            self.eventfd: int = lib.mkv_flash_eventfd(self.flash)
        except BaseException:
            self.close()
            raise

    # --- starting ---

    def _open(
        self, paths: Sequence[FlashPath], progress: Progress | None
    ) -> list[tuple[Device, f.Superblock]]:
        """Opens all paths; makes new files, and lets blank ones join the store or become one."""
        known: list[tuple[Device, f.Superblock]] = []
        blank: list[tuple[Device, FlashPath]] = []
        for path in paths:
            try:
                device = Device(path.path, create=path.size)
                device.lock()
                block = device.superblock()
            except DeviceError as exc:
                self.unusable[str(path.path)] = str(exc)
                log.error("flash %s: %s", path.path, exc)
                continue
            if block is not None:
                known.append((device, block))
            elif device.blank():
                blank.append((device, path))
            else:
                device.close()
                why = "no whole superblock: it holds something else, or was damaged"
                self.unusable[str(path.path)] = why
                log.error("flash %s: %s", path.path, why)
        stores = {block.store for _, block in known}
        if len(stores) > 1:
            raise LocalError(
                "the flash devices belong to different stores", "--flash: only those of one node"
            )
        store = next(iter(stores), secrets.token_bytes(16))
        secret = known[0][1].secret if known else secrets.randbits(64)
        taken = {block.index for _, block in known}
        for device, path in blank:
            index = next(i for i in range(64) if i not in taken)
            taken.add(index)
            known.append((device, _format(device, path, store, secret, index, len(paths), 0, progress)))
        if not known:
            reasons = "; ".join(f"{path}: {why}" for path, why in self.unusable.items())
            raise DeviceError(
                f"no flash device can be used: {reasons}", 0, "memkv-node format, or --flash PATH:SIZE"
            )
        missing = max(block.count for _, block in known) - len(known)
        if missing > 0:
            log.error("flash: %d of the store's devices are missing; their blocks are misses", missing)
        return known

    def _begin(self, found: list[tuple[Device, f.Superblock]]) -> None:
        """Reads what each device says, then marks it as in use."""
        boot = max(block.boot for _, block in found) + 1
        for device, block in found:
            names = self._read_names(device, block)
            if names and names[0] >= self._names_generation:
                self._names_generation, self.names = names[0], {n.id: n for n in names[1]}
            table = device.read(block.segments_at, block.snapshot_at - block.segments_at)
            count = block.segments * f.SEGMENT.itemsize
            segments = {s.number: s for s in f.parse_segments(table[:count], block.secret)}
            records = self._read_snapshot(device, block) if block.clean else None
            block = block.next(boot=boot, clean=False, count=max(block.count, len(found)))
            device.write(block.place(), block.pack())
            io = lib.mkv_flashio_device(self.io, os.dup(device.fd))
            if io < 0:
                raise DeviceError(f"{device.path}: the I/O engine refuses it", -io)
            self.devices.append(OpenDevice(device, block, io, segments, records))

    @staticmethod
    def _read_names(device: Device, block: f.Superblock) -> tuple[int, list[f.Name]] | None:
        both = [device.read(block.names_at + i * f.NAMES_BYTES, f.NAMES_BYTES) for i in (0, 1)]
        whole = [t for t in (f.parse_names(raw, block.secret) for raw in both) if t is not None]
        return max(whole, key=lambda t: t[0], default=None)

    @staticmethod
    def _read_snapshot(device: Device, block: f.Superblock) -> Records | None:
        try:
            page = device.read(block.snapshot_at, f.PAGE)
            count = f.snapshot_count(page, block.snapshot, block.secret)
            if count is None:
                return np.zeros(0, f.RECORD) if block.boot == 0 else None
            length = -(-count * f.RECORD.itemsize // f.PAGE) * f.PAGE
            body = device.read(block.snapshot_at + f.PAGE, length) if length else b""
            return f.parse_snapshot(page, body, block.secret)
        except DeviceError as exc:
            log.error("flash %s: no snapshot: %s", device.path, exc)
            return None

    # --- namespaces and segments; blocking, so called in a pool ---

    def remember(self, name: f.Name) -> None:
        """Writes down a namespace before its first segment is taken. :raises FormatError: too many."""
        names = self.names | {name.id: name}
        self._names_generation += 1
        for d in self._good():
            raw = f.pack_names(list(names.values()), self._names_generation, d.super.secret)
            self._write(d, d.super.names_at + self._names_generation % 2 * f.NAMES_BYTES, raw)
        self.names = names

    def take_segment(self, namespace: int, payload: int) -> tuple[OpenDevice, f.Segment] | None:
        """Assigns a free segment, on the device that has most of them free; None: all are taken. It is on stable media
        when this returns, so that what is written there later will be found."""
        while True:
            with_room = [d for d in self._good() if d.free]
            if not with_room:
                return None
            d = max(with_room, key=lambda d: d.free)
            number = next(n for n in range(d.usable) if n not in d.segments)
            epoch = d.super.boot << 32 | d.turn + 1
            d.turn += 1
            segment = f.Segment(number, namespace, payload, epoch)
            if self._write_segment(d, number, segment):
                d.segments[number] = segment
                return d, segment

    def _write_segment(self, d: OpenDevice, number: int, segment: f.Segment | None) -> bool:
        per_page = f.PAGE // f.SEGMENT.itemsize
        first = number // per_page * per_page
        records = [d.segments.get(n) for n in range(first, min(first + per_page, d.super.segments))]
        records[number - first] = segment
        page = b"".join(f.pack_segment(s, d.super.secret) for s in records).ljust(f.PAGE, b"\0")
        return self._write(d, d.super.segments_at + first * f.SEGMENT.itemsize, page)

    def segments_of(self, namespace: int) -> list[tuple[OpenDevice, f.Segment]]:
        """What is assigned to a namespace, as far as it lies within the devices."""
        return [
            (d, s)
            for d in self.devices
            for s in d.segments.values()
            if s.namespace == namespace and s.number < d.usable
        ]

    def records_of(self, namespace: int) -> Records:
        """The namespace's blocks in the snapshots, ``device`` being the engine's index."""
        parts = []
        for d in self.devices:
            if d.records is not None:
                mine = d.records[d.records["namespace"] == namespace].copy()
                mine["device"] = d.io
                parts.append(mine)
        return np.concatenate(parts) if parts else np.zeros(0, f.RECORD)

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
        """Takes a device out: nothing more is written there, its blocks are misses."""
        if not d.failed:
            d.failed = why
            log.error("flash %s is taken out: %s", d.device.path, why)
            if self.flash != ffi.NULL:
                lib.mkv_flash_device_fail(self.flash, d.io)

    # --- stopping ---

    def save(self, export: Callable[[], Records]) -> None:
        """After everything dirty has been written: the snapshot of each device, then its mark as clean.

        :param export: all blocks on flash, dtype RECORD, ``device`` being the engine's index.
        """
        records = export()
        for d in self._good():
            mine = records[records["device"] == d.io].copy()
            mine["device"] = d.super.index
            block = d.super.next(clean=True, snapshot=d.super.generation + 1)
            raw = f.pack_snapshot(mine, block.snapshot, block.secret)
            if len(raw) > block.snapshot_bytes:
                log.warning("flash %s: %d blocks do not fit the snapshot", d.device.path, len(mine))
                continue
            if self._write(d, block.snapshot_at, raw) and self._write(d, block.place(), block.pack()):
                d.super = block

    def close(self) -> None:
        """After all namespaces. Whether it is clean has been decided by :meth:`save`."""
        if self.flash != ffi.NULL:
            lib.mkv_flash_free(self.flash)
            self.flash = ffi.NULL
        if self.io != ffi.NULL:
            lib.mkv_flashio_free(self.io)
            self.io = ffi.NULL
        for d in self.devices:
            d.device.close()

    def describe(self) -> list[dict[str, int | str | bool]]:
        """One entry per device, for status and metrics."""
        out: list[dict[str, int | str | bool]] = []
        stats = ffi.new("struct mkv_flash_device_stats *")
        for d in self.devices:
            lib.mkv_flash_device_stats(self.flash, d.io, stats)
            entry: dict[str, int | str | bool] = {
                "path": str(d.device.path),
                "bytes": d.super.bytes,
                "direct": d.device.direct,
                "segments": d.super.segments,
                "segments_free": d.free,
                "segment_bytes": d.super.segment_bytes,
            }
            for name, _ in ffi.typeof("struct mkv_flash_device_stats").fields:
                if name not in ("spare", "segments", "failed"):
                    entry[name] = int(getattr(stats, name))
            if stats.failed and not d.failed:
                d.failed = "repeated I/O errors"
            entry["failed"] = d.failed
            out.append(entry)
        out += [{"path": path, "failed": why} for path, why in self.unusable.items()]
        return out
