"""A block on its way through DRAM and flash, and who reads it meanwhile."""

from __future__ import annotations

import threading

import pytest

from memkv.store.native._store import ffi, lib

from ..flashes import (
    DEVICE,
    DONE,
    EXISTS,
    FLASH,
    FULL,
    HIT,
    LENGTH,
    LIVE,
    STORED,
    WRITE,
    Disks,
    FlashSpace,
    cool,
    fill,
    record_of,
)
from ..spaces import EALREADY, GRACE_TICKS, Space, key_of, payload_of
from .conftest import Room

pytestmark = pytest.mark.asan


# --- the life of a block ---


def test_a_block_is_dirty_then_clean_then_cold_then_staged_then_live(space: FlashSpace) -> None:
    key = key_of(1)
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    assert space.put_patiently(key, payload_of(key, LENGTH)) == STORED
    space.serve_segments()
    assert (space.flash_stats().dirty, space.flash_stats().blocks) == (1, 0)
    assert space.get(key) == payload_of(key, LENGTH)
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert (space.flash_stats().dirty, space.flash_stats().blocks) == (0, 1)
    assert space.state(key) == LIVE
    cool(space, key)
    assert space.holds(key)
    assert space.match(key) == 1
    assert space.get(key) is None
    ((status, found),) = space.stage(key)
    assert status == HIT
    assert space.state(key) == FLASH  # nobody else is told
    assert space.fetch(found, key) == payload_of(key, LENGTH)
    assert space.stage(key) == [(HIT, found)]
    assert space.state(key) == LIVE
    assert space.get(key) == payload_of(key, LENGTH)


def test_a_touch_is_a_second_use(space: FlashSpace) -> None:
    (key,) = fill(space, 1)
    cool(space, key)
    assert space.staged(key) == payload_of(key, LENGTH)
    assert space.state(key) == FLASH
    assert space.touch(key) == 1
    assert space.get(key) == payload_of(key, LENGTH)


def test_a_put_of_what_is_on_flash_finds_it_and_is_a_use_as_well(space: FlashSpace) -> None:
    (key,) = fill(space, 1)
    cool(space, key)
    assert space.put(key, payload_of(key, LENGTH)) == EXISTS
    assert space.state(key) == FLASH
    assert space.staged(key)
    assert space.put(key, payload_of(key, LENGTH)) == EXISTS
    assert space.state(key) == LIVE


def test_what_is_prefetched_is_there_for_everybody(space: FlashSpace) -> None:
    keys = fill(space, 3)
    cool(space, *keys)
    assert [status for status, _ in space.stage(*keys, prefetch=True)] == [HIT] * 3
    assert [space.get(key) for key in keys] == [payload_of(key, LENGTH) for key in keys]


def test_a_dirty_block_is_not_evicted_and_too_much_of_it_keeps_puts_waiting(room: Room, disks: Disks) -> None:
    space = room.start(disks, slabs=2, dirty_max=3 * LENGTH)
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    keys = [key_of(n) for n in range(3)]
    for key in keys:
        assert space.put(key, payload_of(key, LENGTH)) == STORED
    space.serve_segments()
    assert space.put(key_of(4), payload_of(key_of(4), LENGTH)) == FULL
    space.tick(20)
    assert [space.get(key) for key in keys] == [payload_of(key, LENGTH) for key in keys]
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert space.put(key_of(4), payload_of(key_of(4), LENGTH)) == STORED


def test_a_namespace_without_flash_says_so() -> None:
    space = Space()
    space.serve()
    key = key_of(1)
    assert space.put(key, payload_of(key, LENGTH)) == STORED
    assert lib.mkv_ns_durable(space.ns, key) == DEVICE
    assert lib.mkv_stage_new(space.ns, key, 1, 0, 0) == ffi.NULL
    assert lib.mkv_ns_scanning(space.ns) == 0
    assert lib.mkv_ns_segment_wanted(space.ns) == 0
    space.close()


def test_flash_is_attached_once_and_before_the_first_slab(space: FlashSpace, disks: Disks) -> None:
    assert lib.mkv_ns_flash_attach(space.ns, space.flash, 5) == EALREADY


def test_consecutive_blocks_go_to_the_devices_in_turn(room: Room) -> None:
    disks = room.disks(devices=3, segments=2)
    space = room.start(disks, slabs=8)
    for payload in [LENGTH] * 3:
        segment = disks.take(payload)
        assert segment
        assert space.add(segment) >= 0
    keys = [key_of(n) for n in range(12)]
    for key in keys:
        assert space.put_patiently(key, payload_of(key, LENGTH)) == STORED
        space.wait(lambda: not space.flash_stats().dirty)
    devices = [record_of(space, key).device for key in keys]
    assert devices == [0, 1, 2] * 4


@pytest.mark.parametrize("align", [512, 4096])
@pytest.mark.parametrize("length", [1, 511, 512, 4096, 4097, 10000])
def test_blocks_of_all_lengths_come_back(room: Room, align: int, length: int) -> None:
    disks = room.disks(segment_bytes=1 << 16)
    space = room.start(disks, block_bytes=10000, align=align, slab_bytes=1 << 16)
    (key,) = fill(space, 1, length=length)
    space.stop()
    space = room.start(disks, block_bytes=10000, align=align, slab_bytes=1 << 16)
    space.settle()
    assert space.staged(key) == payload_of(key, length)


# --- nothing is freed while a device has it ---


def test_an_extent_whose_block_is_deleted_under_a_write_is_not_freed_before_the_write_is_over(
    room: Room, disks: Disks
) -> None:
    space = room.start(disks, slabs=1)
    fill(space, 1)
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    key = key_of(50)
    assert space.put(key, payload_of(key, LENGTH)) == STORED
    found = space.find(key)
    assert found
    free = space.stats().extents_free
    assert space.delete(key) == [DONE]
    space.tick(GRACE_TICKS + 2)
    assert (space.stats().extents_free, space.stats().extents_quarantine) == (free, 0)
    assert bytes(space.extent(found)[1]) == payload_of(key, LENGTH)
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert space.stats().extents_free == free + 1


def test_a_slab_is_not_given_back_before_what_is_dirty_in_it_is_on_flash(space: FlashSpace) -> None:
    fill(space, 1)
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    key = key_of(50)
    assert space.put(key, payload_of(key, LENGTH)) == STORED
    found = space.find(key)
    assert found
    assert lib.mkv_ns_slab_retire(space.ns, found.slab) == 0
    space.tick(10)
    assert space.get(key) == payload_of(key, LENGTH)
    assert space.serve_retired() == []
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert space.state(key) == FLASH
    assert space.serve_retired() == []  # its readers have a grace period, as always
    space.tick(GRACE_TICKS)
    assert space.serve_retired() == [found.slab]
    space.serve_slabs()
    assert space.staged(key) == payload_of(key, LENGTH)


def test_a_namespace_waits_for_its_devices_before_it_is_freed(room: Room, disks: Disks) -> None:
    space = room.start(disks)
    fill(space, 1)
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    space.put(key_of(2), payload_of(key_of(2), LENGTH))
    closer = threading.Thread(target=lib.mkv_ns_free, args=[space.ns])
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    lib.mkv_flashio_fault_clear(space.io)
    closer.join(5)
    assert not closer.is_alive()
    lib.mkv_flash_free(space.flash)
    lib.mkv_flashio_free(space.io)
    lib.mkv_arena_free(space.arena)
    space.ns = ffi.NULL
