"""Namespaces with flash, driven as a node drives them: files for devices, segments, starts and crashes."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memkv.store import layout
from memkv.store.native._store import ffi, lib

from .spaces import Found, Space, key_of, payload_of, read_bucket

PENDING, HIT, MISS, STORED = lib.MKV_PENDING, lib.MKV_HIT, lib.MKV_MISS, lib.MKV_STORED
EXISTS, DONE = lib.MKV_EXISTS, lib.MKV_DONE
TIMEOUT, CORRUPT, FULL, DEVICE = lib.MKV_TIMEOUT, lib.MKV_CORRUPT, lib.MKV_ERROR_FULL, lib.MKV_ERROR_DEVICE
EMPTY, LIVE, FLASH = layout.SLOT_EMPTY, layout.SLOT_LIVE, layout.SLOT_FLASH
READ, WRITE, FLUSH = lib.MKV_IO_READ, lib.MKV_IO_WRITE, lib.MKV_IO_FLUSH
EIO = -errno.EIO
LENGTH = 2048  # of most blocks of these tests: the longest of their namespace
STRIDE = 512 + LENGTH  # of the cells of its class
SECRET = 0x5EC2E7
FOREVER = 0xFFFF_FFFF_FFFF_FFFF
EVERY = 0xFFFF_FFFF_FFFF_FFFF  # device
SEGMENT = 32768


@dataclass(slots=True)
class Segment:
    device: int
    number: int
    payload: int
    epoch: int


class Disks:
    """What outlives a node: the devices' files, and what Python writes down beside the blocks."""

    def __init__(self, devices: int = 2, segments: int = 8, segment_bytes: int = SEGMENT) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.segment_bytes = segment_bytes
        self.paths = [Path(self.folder.name, f"disk{i}") for i in range(devices)]
        self.free = [(number, device) for number in range(segments) for device in range(devices)]
        for path in self.paths:
            path.write_bytes(bytes(segments * segment_bytes))
        self.assigned: list[Segment] = []
        self.boots = 0
        self.epochs = 0

    def close(self) -> None:
        self.folder.cleanup()

    def take(self, payload: int, dead: frozenset[int] = frozenset()) -> Segment | None:
        for place in self.free:
            if place[1] not in dead:
                self.free.remove(place)
                self.epochs += 1
                segment = Segment(place[1], place[0], payload, self.epochs)
                self.assigned.append(segment)
                return segment
        return None

    def image(self, device: int, offset: int, length: int) -> bytes:
        with self.paths[device].open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def patch(self, device: int, offset: int, data: bytes) -> None:
        with self.paths[device].open("r+b") as file:
            file.seek(offset)
            file.write(data)


def identity(device: int) -> int:
    return 0xD15C_0000 + device


class FlashSpace(Space):
    """A namespace of a node that has just started over `disks`."""

    def __init__(
        self,
        disks: Disks,
        *,
        records: Any = None,
        dirty_max: int = 1 << 30,
        seed: int | None = None,
        threads: int = 0,
        secret: int = SECRET,
        incarnation: int = 5,
        recover: bool = True,
        **space: Any,
    ) -> None:
        self.disks = disks
        disks.boots += 1
        super().__init__(**space)
        self.io = lib.mkv_flashio_new(32, threads)
        assert self.io != ffi.NULL
        if seed is not None:
            assert lib.mkv_flashio_volatile(self.io, seed) == 0
        for device, path in enumerate(disks.paths):
            assert lib.mkv_flashio_device(self.io, os.open(path, os.O_RDWR)) == device
        lib.mkv_flashio_memory(self.io, self.base, len(self.memory))
        self.flash = lib.mkv_flash_new(self.io, secret, disks.boots, dirty_max)
        assert self.flash != ffi.NULL
        for device in range(len(disks.paths)):
            assert lib.mkv_flash_device(self.flash, device, identity(device)) == 0
        assert lib.mkv_ns_flash_attach(self.ns, self.flash, incarnation) == 0
        self.dead: set[int] = set()
        self.deny = False
        if recover:
            self.recover(records)

    def recover(self, records: Any = None) -> None:
        for segment in self.disks.assigned:
            assert self.add(segment, 1 if records is None else 2) >= 0
        if records is not None:
            data = ffi.from_buffer("struct mkv_flash_record[]", records)
            taken = int(lib.mkv_ns_flash_import(self.ns, data, len(data)))
            while taken < len(data):  # the index is full
                self.grow_table()
                self.drop_tables()
                taken += lib.mkv_ns_flash_import(self.ns, data + taken, len(data) - taken)
            lib.mkv_ns_flash_imported(self.ns)

    def add(self, segment: Segment, scan: int = 0) -> int:
        span = ffi.new("struct mkv_segment *")
        span.offset = segment.number * self.disks.segment_bytes
        span.bytes = self.disks.segment_bytes
        span.epoch, span.payload = segment.epoch, segment.payload
        span.device, span.number = segment.device, segment.number
        return int(lib.mkv_ns_segment_add(self.ns, span, scan))

    def close(self) -> None:
        if self.ns != ffi.NULL:
            lib.mkv_flashio_fault_clear(self.io)  # nothing is freed while a request is held up
            lib.mkv_ns_free(self.ns)
            lib.mkv_flash_free(self.flash)
            lib.mkv_flashio_free(self.io)
            lib.mkv_arena_free(self.arena)
            self.ns = ffi.NULL

    # --- what a node does ---

    def serve(self) -> None:
        super().serve()
        self.serve_segments()

    def serve_segments(self) -> bool:
        """Gives out what is wanted, takes back what is given up. False: it is often part of a condition."""
        given = ffi.new("struct mkv_segment *")
        if lib.mkv_ns_segment_given_up(self.ns, given) == 0:
            place = given.number, given.device
            self.disks.assigned = [s for s in self.disks.assigned if (s.number, s.device) != place]
            self.disks.free.append((int(given.number), int(given.device)))
        while payload := lib.mkv_ns_segment_wanted(self.ns):
            segment = None if self.deny else self.disks.take(payload, frozenset(self.dead))
            if segment is None or self.add(segment) < 0:
                lib.mkv_ns_segment_denied(self.ns, payload)
        return False

    def export(self) -> Any:
        n = lib.mkv_ns_flash_export(self.ns, ffi.NULL, 0)
        records = np.zeros(n * ffi.sizeof("struct mkv_flash_record"), np.uint8)
        out = ffi.from_buffer("struct mkv_flash_record[]", records)
        assert lib.mkv_ns_flash_export(self.ns, out, n) == n
        return records

    def flash_stats(self) -> Any:
        out = ffi.new("struct mkv_ns_flash_stats *")
        lib.mkv_ns_flash_stats(self.ns, out)
        return out

    def tier(self) -> Any:
        out = ffi.new("struct mkv_flash_stats *")
        lib.mkv_flash_stats(self.flash, out)
        return out

    def device(self, device: int) -> Any:
        out = ffi.new("struct mkv_flash_device_stats *")
        assert lib.mkv_flash_device_stats(self.flash, device, out) == 0
        return out

    def fault(
        self,
        kind: int,
        op: int,
        *,
        device: int = 0xFFFFFFFF,
        error: int = 0,
        times: int = 0,
        span: Any = (0, 0),
        chance: int = 0,
    ) -> None:
        fault = ffi.new("struct mkv_fault *")
        fault.kind, fault.op, fault.device, fault.error, fault.times = kind, op, device, error, times
        fault.to, fault.per_million = span[1], chance
        setattr(fault, "from", span[0])
        assert lib.mkv_flashio_fault(self.io, fault) == 0

    def settle(self) -> None:
        """Until no request is under way, and chores of the flash tier are done."""
        quiet = 0
        before = None
        until = time.monotonic() + 20
        page = ffi.cast("uint64_t", ffi.cast("uintptr_t", _PAGE))
        while quiet < 2:
            assert time.monotonic() < until, "the devices do not come to rest"
            self.serve_segments()
            io = ffi.new("struct mkv_io *", {"op": lib.MKV_IO_READ, "address": int(page), "length": 512})
            lib.mkv_flashio_run(self.io, io)
            s = ffi.new("struct mkv_flashio_stats *")
            lib.mkv_flashio_stats(self.io, s)
            now = s.writes, s.flushes, s.discards, s.errors
            quiet = quiet + 1 if now == before and not s.under_way and not s.waiting else 0
            before = now

    def wait(self, condition: Callable[[], Any], seconds: float = 10) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.0005)

    def clean(self) -> None:
        """Until everything is written."""
        self.serve_segments()
        self.wait(lambda: self.serve_segments() or not self.flash_stats().dirty)

    # --- durability ---

    def durable(self, key: bytes) -> int:
        return int(lib.mkv_ns_durable(self.ns, key))

    def make_durable(self, key: bytes) -> int:
        status = lib.MKV_PENDING
        until = time.monotonic() + 10
        turn = 0
        while status == lib.MKV_PENDING and time.monotonic() < until:
            self.serve_segments()
            status = self.durable(key)
            turn += 1
            if turn % 100 == 0 and not self.serve_slabs():  # one that was found is read, into an extent
                lib.mkv_ns_tick_now(self.ns)
        return int(status)

    def barrier(self, *, sync: bool = False) -> int:
        return int(lib.mkv_flash_sync(self.flash) if sync else lib.mkv_flash_barrier(self.flash))

    def is_over(self, barrier: int) -> bool:
        return bool(lib.mkv_flash_barriers(self.flash) >= barrier)

    def wait_barrier(self, *, sync: bool = False) -> None:
        number = self.barrier(sync=sync)
        self.wait(lambda: self.serve_segments() or self.is_over(number))

    # --- staging ---

    def stage_begin(self, *keys: bytes, deadline_ns: int = FOREVER, prefetch: bool = False) -> Any:
        stage = lib.mkv_stage_new(self.ns, b"".join(keys), len(keys), deadline_ns, prefetch)
        assert stage != ffi.NULL
        return stage

    def stage_collect(self, stage: Any, n: int) -> list[tuple[int, int, Found]]:
        index, status = ffi.new("uint32_t[]", n), ffi.new("uint8_t[]", n)
        slots = ffi.new("struct mkv_slot[]", n)
        k = lib.mkv_stage_collect(stage, index, status, slots, n)
        return [
            (
                index[i],
                status[i],
                Found(
                    int(lib.mkv_location_slab(slots[i].location)),
                    int(lib.mkv_location_offset(slots[i].location)),
                    int(slots[i].generation),
                    int(slots[i].length),
                ),
            )
            for i in range(k)
        ]

    def stage(self, *keys: bytes, prefetch: bool = False, patience: int = 60) -> list[tuple[int, Found]]:
        """Statuses and places, in the order of the keys; ticks while something waits."""
        stage = self.stage_begin(*keys, prefetch=prefetch)
        self.serve_slabs()
        answers: dict[int, tuple[int, Found]] = {}
        for turn in range(patience):
            self.settle()
            for index, status, found in self.stage_collect(stage, len(keys)):
                assert index not in answers
                answers[index] = status, found
            if lib.mkv_stage_done(stage):
                break
            if not self.serve_slabs() and turn > 2:
                lib.mkv_ns_tick_now(self.ns)
        lib.mkv_stage_free(stage)
        nowhere = lib.MKV_TIMEOUT, Found(0, 0, 0, 0)
        return [answers.get(i, nowhere) for i in range(len(keys))]

    def unstage(self, *places: tuple[bytes, Found]) -> int:
        """Lets go of places that were told for keys; how many nobody else knows of."""
        keys = b"".join(key for key, _ in places)
        generations = ffi.new("uint32_t[]", [found.generation for _, found in places])
        return int(lib.mkv_ns_unstage(self.ns, keys, generations, len(places)))

    def fetch(self, found: Found, key: bytes) -> bytes | None:
        """As a peer READs by a location that it was told."""
        if found.slab not in self.slab_at:
            return None
        line, payload = self.extent(found)
        if line["key"].tobytes() != key or line["length"] != found.length:
            return None
        if line["generation"] & 0xFFFFFFFF != found.generation or not found.generation:
            return None
        return bytes(payload.tobytes())

    def staged(self, key: bytes) -> bytes | None:
        ((status, found),) = self.stage(key)
        return self.fetch(found, key) if status == lib.MKV_HIT else None

    def state(self, key: bytes) -> int:
        """Of its slot: SLOT_EMPTY, SLOT_LIVE, SLOT_FLASH."""
        slot = self.slot(key)
        return layout.SLOT_EMPTY if slot is None else int(layout.location_state(slot["location"]))

    def slot(self, key: bytes) -> Any:
        table = self.table()
        both = layout.candidates(np.frombuffer(key, np.uint8).reshape(1, 16), self.salt, table.buckets)[0]

        for bucket in both:
            for slot in read_bucket(table.address, int(bucket)):
                at = int(slot["location"])
                if at and not at & layout.LOCATION_MOVED and slot["key"].tobytes() == key:
                    return slot
        return None

    # --- how it ends ---

    def stop(self) -> Any:
        """A clean stop: the records of its snapshot."""
        self.wait_barrier(sync=True)
        self.settle()
        records = self.export()
        self.close()
        return records

    def crash(self, seed: int = 1) -> None:
        """The power goes."""
        assert lib.mkv_flashio_power_cut(self.io, seed) == 0
        self.close()


_room = ffi.new("char[]", 8192)
_PAGE = ffi.cast("char *", (int(ffi.cast("uintptr_t", _room)) + 4095) // 4096 * 4096)


def fill(space: FlashSpace, n: int, first: int = 0, length: int = LENGTH) -> list[bytes]:
    """Puts n blocks, and sees to it that they are on flash."""
    keys = [key_of(first + i) for i in range(n)]
    for key in keys:
        assert space.put_patiently(key, payload_of(key, length)) == lib.MKV_STORED
        space.settle()
    return keys


def cool(space: FlashSpace, *keys: bytes) -> None:
    """Drives blocks out of DRAM."""
    for n in range(1000, 1100):
        if all(space.state(key) == layout.SLOT_FLASH for key in keys):
            return
        space.put_patiently(key_of(n), payload_of(key_of(n), LENGTH))
        space.settle()
        space.tick()
    raise AssertionError("they do not go")


def records(space: FlashSpace) -> Any:
    return ffi.from_buffer("struct mkv_flash_record[]", space.export())


def record_of(space: FlashSpace, key: bytes) -> Any:
    found = [ffi.new("struct mkv_flash_record *", r) for r in records(space) if bytes(r.key) == key]
    assert len(found) == 1
    return found[0]


def reads(space: FlashSpace) -> int:
    stats = ffi.new("struct mkv_flashio_stats *")
    lib.mkv_flashio_stats(space.io, stats)
    return int(stats.reads)
