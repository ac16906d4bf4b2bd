"""The put job on a channel of the test's own: READs complete, fail or hang as the test says."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memkv.rdma import jobs
from memkv.rdma.fabric import RegionDesc, RemoteTable, _Table
from memkv.rdma.memory import HostMemory
from memkv.rdma.native._rdma import ffi as rdma_ffi
from memkv.store.native._store import ffi, lib

from .flashes import LENGTH, Disks, FlashSpace, fill, record_of
from .raw import keys_of

pytestmark = pytest.mark.asan
ECANCELED = 125
SLAB = 1 << 20
BLOCK = 64 << 10
PAYLOAD = bytes(range(256)) * 256


class FakeChannel:
    """A channel whose READs bring PAYLOAD while ``flowing``. ``drains``: an abort flushes what is left."""

    def __init__(self, memory: HostMemory | SimpleNamespace, drains: bool = True) -> None:
        self.memory = memory
        self.flowing = True
        self.drains = drains
        self.under_way: list[tuple[int, int, int]] = []
        self.remote = RemoteTable(16)
        self.remote.add(RegionDesc(1, 1 << 20))
        self.local = _Table(16)
        f = rdma_ffi
        self._keep = [
            f.callback("int(struct mkv_channel *, const struct mkv_read *)", self._post),
            f.callback("void(struct mkv_channel *)", lambda ch: None),
            f.callback("int(struct mkv_channel *, struct mkv_done *, int)", self._poll),
            f.callback("int(struct mkv_channel *)", lambda ch: 0),
            f.callback("void(struct mkv_channel *)", self._abort),
        ]
        self.ops = f.new(
            "struct mkv_channel_ops *",
            dict(zip(("post", "flush", "poll", "arm", "abort"), self._keep, strict=True)),
        )
        self.ch = f.new("struct mkv_channel *")
        self.ch.ops, self.ch.local, self.ch.remote = self.ops, self.local.ptr, self.remote.ptr
        self.ch.depth, self.ch.fd = 8, -1
        self.most = 0

    def _post(self, ch: Any, read: Any) -> int:
        address = self.memory.address + self.places[read.seg[0].region] + read.seg[0].offset
        self.under_way.append((read.cookie, address, read.seg[0].length))
        ch.busy += 1
        self.most = max(self.most, ch.busy)
        return 0

    def _poll(self, ch: Any, out: Any, most: int) -> int:
        n = 0
        while self.under_way and n < most and (self.flowing or (ch.broken and self.drains)):
            cookie, address, length = self.under_way.pop(0)
            out[n].cookie, out[n].status = cookie, -ECANCELED if ch.broken else 0
            if not ch.broken:
                ctypes.memmove(address, PAYLOAD, length)
            ch.busy -= 1
            n += 1
        return n

    def _abort(self, ch: Any) -> None:
        ch.broken = -ECANCELED

    places: dict[int, int]


class Room:
    """A namespace over memory of the test's own, its slabs ready, and a put job."""

    def __init__(self, slabs: int, grace_ms: int = 20) -> None:
        self.memory = HostMemory(slabs * SLAB)
        self.arena = lib.mkv_arena_new(ffi.cast("void *", self.memory.address), slabs * SLAB, SLAB, 77)
        self.ns = lib.mkv_ns_new(self.arena, 1, BLOCK, 4096, grace_ms * 1_000_000, 5)
        self.places: dict[int, int] = {}
        self.job = lib.mkv_putjob_new(8)

    def take_slab(self) -> int:
        span = ffi.new("struct mkv_span *")
        assert lib.mkv_ns_slab_take(self.ns, span) == 0
        self.places[span.id] = span.address - self.memory.address
        lib.mkv_ns_slab_ready(self.ns, span.id)
        return int(span.id)

    def start(
        self, channel: FakeChannel, n: int, seconds: float, credit: int = 1 << 20, durable: int = 0
    ) -> Any:
        """Readies the job for n blocks; returns the statuses as they will be."""
        self.channel = channel  # or its callbacks could be collected under the job
        channel.places = self.places
        status = np.zeros(n, np.uint8)
        self.columns = [
            np.ascontiguousarray(keys_of(*range(n))),
            np.full(n, BLOCK, np.uint32),
            np.full(n, 1, np.uint32),
            np.zeros(n, np.uint64),
        ]
        kinds = ("uint8_t[]", "uint32_t[]", "uint32_t[]", "uint64_t[]")
        pointers = [ffi.from_buffer(k, c) for k, c in zip(kinds, self.columns, strict=True)]
        self.pointers = [*pointers, ffi.NULL, ffi.from_buffer("uint8_t[]", status)]
        until = jobs.now_ns() + int(seconds * 1e9)
        lib.mkv_putjob_init(
            self.job, self.ns, ffi.cast("void *", channel.ch), *self.pointers, n, credit, until, durable
        )
        return status

    def stats(self) -> Any:
        out = ffi.new("struct mkv_ns_stats *")
        lib.mkv_ns_stats(self.ns, out)
        assert lib.mkv_ns_check(self.ns) == 0
        return out

    def outcome(self) -> Any:
        out = ffi.new("struct mkv_put_outcome *")
        lib.mkv_putjob_outcome(self.job, out)
        return out

    def close(self) -> None:
        lib.mkv_putjob_free(self.job)
        lib.mkv_ns_free(self.ns)
        lib.mkv_arena_free(self.arena)
        self.memory.close()


@pytest.fixture
def room() -> Iterator[Room]:
    made = Room(2)
    yield made
    made.close()


def test_what_is_set_aside_stays_within_the_credit(room: Room) -> None:
    room.take_slab()
    channel = FakeChannel(room.memory)
    status = room.start(channel, 15, 5, credit=2 * BLOCK)
    jobs.run([room.job])
    assert set(status) == {lib.MKV_STORED}
    assert channel.most == 2
    assert room.outcome().stored_bytes == 15 * BLOCK
    assert room.stats().blocks == 15


def test_one_block_always_may_go_over_the_credit(room: Room) -> None:
    room.take_slab()
    status = room.start(FakeChannel(room.memory), 3, 5, credit=1)
    jobs.run([room.job])
    assert set(status) == {lib.MKV_STORED}


def test_a_late_job_gives_its_extents_back_when_the_channel_has_drained(room: Room) -> None:
    room.take_slab()
    channel = FakeChannel(room.memory)
    channel.flowing = False
    status = room.start(channel, 12, 0.1)
    jobs.run([room.job])
    out = room.outcome()
    assert set(status) == {lib.MKV_TIMEOUT}
    assert (out.undrained, out.held) == (0, 0)
    assert out.broken
    assert room.stats().extents_filling == 0


def test_extents_of_a_channel_that_does_not_drain_are_kept_until_it_is_destroyed(room: Room) -> None:
    room.take_slab()
    channel = FakeChannel(room.memory, drains=False)
    channel.flowing = False
    status = room.start(channel, 12, 0.1)
    jobs.run([room.job])
    out = room.outcome()
    assert set(status) == {lib.MKV_TIMEOUT}
    assert (out.undrained, out.held) == (1, 8)
    time.sleep(0.2)  # many grace periods
    assert room.stats().extents_filling == 8
    assert lib.mkv_putjob_abandon(room.job) == 8  # the queue pair is gone now
    assert room.stats().extents_filling == 0
    assert lib.mkv_putjob_abandon(room.job) == 0


def test_a_cancelled_job_ends_soon(room: Room) -> None:
    room.take_slab()
    channel = FakeChannel(room.memory)
    channel.flowing = False
    room.start(channel, 4, 60)
    threading.Timer(0.1, lib.mkv_putjob_cancel, [room.job]).start()
    begun = time.monotonic()
    jobs.run([room.job])
    assert time.monotonic() - begun < 1
    assert room.stats().extents_filling == 0


def test_a_put_waits_for_a_slab_and_then_goes_on(room: Room) -> None:
    status = room.start(FakeChannel(room.memory), 15, 5)
    threading.Timer(0.1, room.take_slab).start()
    jobs.run([room.job])
    assert set(status) == {lib.MKV_STORED}


def test_a_payload_whose_slab_is_retired_under_it_moves_on(room: Room) -> None:
    first = room.take_slab()
    channel = FakeChannel(room.memory)
    channel.flowing = False
    status = room.start(channel, 4, 5)

    def retire() -> None:
        assert lib.mkv_ns_slab_retire(room.ns, first) == 0
        lib.mkv_fill_begin(room.ns, bytes(15) + b"x", BLOCK, ffi.new("struct mkv_fill *"))  # asks for a slab
        room.take_slab()
        channel.flowing = True

    threading.Timer(0.1, retire).start()
    jobs.run([room.job])
    assert set(status) == {lib.MKV_STORED}
    assert room.stats().blocks == 4
    second = room.memory.array[room.places[max(room.places)] :][:SLAB]
    assert bytes(second).count(PAYLOAD) == 4
    retired = ffi.new("uint64_t *")
    until = time.monotonic() + 5
    while lib.mkv_ns_slab_retired(room.ns, retired):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert retired[0] == first


@pytest.mark.parametrize("durable", [0, 1])
def test_a_put_brings_anew_what_a_crash_has_torn(durable: int) -> None:
    """EXISTS is said of what is more than the header that the scan found."""
    disks = Disks(1)
    space = FlashSpace(disks)
    space.serve()
    keys = fill(space, 4)
    record = record_of(space, keys[1])
    disks.patch(0, record.offset + 512 + 1024, bytes(512))
    space.close()
    space = FlashSpace(disks)
    space.serve()
    space.wait(lambda: not lib.mkv_ns_scanning(space.ns))
    channel = FakeChannel(SimpleNamespace(address=space.base))
    channel.places = space.slab_at
    n = len(keys)
    status = np.zeros(n, np.uint8)
    columns = [
        np.frombuffer(b"".join(keys), np.uint8),
        np.full(n, LENGTH, np.uint32),
        np.full(n, 1, np.uint32),
        np.zeros(n, np.uint64),
    ]
    kinds = ("uint8_t[]", "uint32_t[]", "uint32_t[]", "uint64_t[]")
    pointers = [ffi.from_buffer(k, c) for k, c in zip(kinds, columns, strict=True)]
    pointers += [ffi.NULL, ffi.from_buffer("uint8_t[]", status)]
    job = lib.mkv_putjob_new(8)
    until = jobs.now_ns() + 10**10
    lib.mkv_putjob_init(job, space.ns, ffi.cast("void *", channel.ch), *pointers, n, 1 << 20, until, durable)
    jobs.run([job])
    assert list(status) == [lib.MKV_EXISTS, lib.MKV_STORED, lib.MKV_EXISTS, lib.MKV_EXISTS]
    assert [space.make_durable(key) for key in keys] == [lib.MKV_DONE] * n
    assert space.get(keys[1]) == PAYLOAD[:LENGTH]
    space.check()
    lib.mkv_putjob_free(job)
    space.close()
    disks.close()
