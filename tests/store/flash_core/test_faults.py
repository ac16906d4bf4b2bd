"""Devices that refuse, hang and lie; and scrubbing, which finds out."""

from __future__ import annotations

import pytest

from memkv.store.native._store import ffi, lib

from ..flashes import (
    DEVICE,
    DONE,
    EIO,
    FLASH,
    FLUSH,
    LENGTH,
    LIVE,
    READ,
    STORED,
    WRITE,
    Disks,
    FlashSpace,
    cool,
    fill,
    record_of,
)
from ..spaces import key_of, payload_of
from .conftest import Room

pytestmark = pytest.mark.asan


# --- faults of devices ---


def test_a_write_that_fails_goes_to_another_device_and_its_cell_is_used_no_more(space: FlashSpace) -> None:
    fill(space, 4)
    space.fault(lib.MKV_FAULT_ERROR, WRITE, device=0, error=EIO, times=1)
    keys = fill(space, 2, first=10)
    assert [record_of(space, key).length for key in keys] == [LENGTH] * 2
    assert space.device(0).write_errors == 1
    space.tick()
    space.settle()
    assert space.flash_stats().extents == space.device(0).extents + space.device(1).extents - 1
    assert space.flash_stats().dirty == 0


def test_a_device_that_fails_too_often_is_taken_out_and_the_rest_goes_on(room: Room, disks: Disks) -> None:
    space = room.start(disks, slabs=8)
    keys = fill(space, 20)
    on_first = [key for key in keys if record_of(space, key).device == 0]
    assert 0 < len(on_first) < 20
    space.fault(lib.MKV_FAULT_ERROR, WRITE, device=0, error=EIO)
    fill(space, 20, first=100)
    for _ in range(20):
        space.tick()
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert space.device(0).failed
    assert not space.device(1).failed
    assert all(record_of(space, key).device == 1 for key in on_first if space.holds(key))
    assert space.device(0).bytes_live == 0
    (key,) = fill(space, 1, first=500)
    assert space.make_durable(key) == DONE


def test_taking_a_device_out_rewrites_what_dram_has_and_drops_the_rest(room: Room, disks: Disks) -> None:
    space = room.start(disks, slabs=2)
    keys = fill(space, 24)
    where = {key: record_of(space, key).device for key in keys}
    cold = [key for key in keys if space.state(key) == FLASH and where[key] == 0]
    staged = cold.pop()
    assert space.staged(staged)
    lives = [key for key in keys if space.state(key) == LIVE and where[key] == 0]
    assert cold
    assert lives
    space.dead.add(0)
    assert lib.mkv_flash_device_fail(space.flash, 0) == 0
    space.settle()
    assert not any(space.holds(key) for key in cold)
    assert all(space.get(key) == payload_of(key, LENGTH) for key in lives)
    assert space.get(staged) == payload_of(staged, LENGTH)
    assert all(record_of(space, key).device == 1 for key in [*lives, staged])
    assert {space.make_durable(key) for key in lives} == {DONE}


def test_a_flush_that_fails_takes_the_device_out(room: Room) -> None:
    space = room.start(room.disks(devices=1))
    (key,) = fill(space, 1)
    space.fault(lib.MKV_FAULT_ERROR, FLUSH, error=EIO)
    assert space.make_durable(key) == DEVICE
    assert space.device(0).failed
    assert space.get(key) == payload_of(key, LENGTH)  # DRAM has it
    assert space.put_patiently(key_of(2), payload_of(key_of(2), LENGTH)) == STORED
    assert space.make_durable(key_of(2)) == DEVICE
    barrier = space.barrier()
    space.wait(lambda: space.is_over(barrier))


def test_blocks_being_read_from_a_device_that_is_taken_out_are_answered(space: FlashSpace) -> None:
    keys = fill(space, 2)
    cool(space, *keys)
    space.fault(lib.MKV_FAULT_HELD, READ)
    stage = space.stage_begin(*keys)
    for device in range(2):
        lib.mkv_flash_device_fail(space.flash, device)
    assert not any(space.holds(key) for key in keys)
    lib.mkv_flashio_fault_clear(space.io)
    space.wait(lambda: lib.mkv_stage_done(stage))
    assert [status for _, status, _ in space.stage_collect(stage, 2)] == [DEVICE] * 2
    lib.mkv_stage_free(stage)


def test_a_device_that_hangs_stalls_nothing_on_the_other(room: Room, disks: Disks) -> None:
    space = room.start(disks, slabs=8)
    fill(space, 4)
    space.fault(lib.MKV_FAULT_HELD, WRITE, device=0)
    keys = [key_of(100 + n) for n in range(12)]
    for key in keys:
        assert space.put_patiently(key, payload_of(key, LENGTH)) == STORED
        space.serve_segments()
    space.wait(lambda: space.flash_stats().blocks >= 4 + 4)
    lib.mkv_flashio_fault_clear(space.io)


# --- scrubbing ---


def scrub(space: FlashSpace) -> tuple[int, int]:
    checked, bad = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    cursor, sums = 0, [0, 0]
    while True:
        cursor = lib.mkv_ns_scrub(space.ns, cursor, 4, checked, bad)
        sums[0] += checked[0]
        sums[1] += bad[0]
        if not cursor:
            return sums[0], sums[1]


def test_scrubbing_reads_every_block_and_drops_what_is_bad(space: FlashSpace) -> None:
    keys = fill(space, 10)
    cool(space, *keys)
    blocks = space.flash_stats().blocks
    assert scrub(space) == (blocks, 0)
    payload, header = record_of(space, keys[1]), record_of(space, keys[2])
    space.disks.patch(payload.device, payload.offset + 600, b"\x55")
    space.disks.patch(header.device, header.offset + 50, b"\x55")
    assert scrub(space) == (blocks, 2)
    space.settle()
    assert [space.holds(key) for key in keys[:4]] == [True, False, False, True]
    assert scrub(space) == (blocks - 2, 0)


def test_scrubbing_rewrites_what_dram_still_has(space: FlashSpace) -> None:
    (key,) = fill(space, 1)
    before = record_of(space, key)
    space.disks.patch(before.device, before.offset + 600, b"\x55")
    assert scrub(space)[1] == 1
    space.settle()
    after = record_of(space, key)
    assert after.sequence > before.sequence
    assert scrub(space) == (1, 0)
    assert space.get(key) == payload_of(key, LENGTH)
