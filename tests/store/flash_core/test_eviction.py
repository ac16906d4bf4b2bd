"""Which blocks flash keeps, and where they find room."""

from __future__ import annotations

import errno
import time

import pytest

from memkv.store import layout
from memkv.store.native._store import lib

from ..flashes import (
    LENGTH,
    FlashSpace,
    fill,
    record_of,
)
from ..spaces import key_of, payload_of
from .conftest import Room

pytestmark = pytest.mark.asan

PENDING, HIT, MISS, STORED = lib.MKV_PENDING, lib.MKV_HIT, lib.MKV_MISS, lib.MKV_STORED
EXISTS, DONE = lib.MKV_EXISTS, lib.MKV_DONE
TIMEOUT, CORRUPT, FULL, DEVICE = lib.MKV_TIMEOUT, lib.MKV_CORRUPT, lib.MKV_ERROR_FULL, lib.MKV_ERROR_DEVICE
EMPTY, LIVE, FLASH = layout.SLOT_EMPTY, layout.SLOT_LIVE, layout.SLOT_FLASH
READ, WRITE, FLUSH = lib.MKV_IO_READ, lib.MKV_IO_WRITE, lib.MKV_IO_FLUSH
EIO = -errno.EIO


def full_flash(room: Room) -> tuple[FlashSpace, list[bytes]]:
    """All cells held, and the blocks, the oldest first."""
    space = room.start(room.disks(devices=1, segments=1), slabs=2)
    first = fill(space, 1)
    return space, first + fill(space, space.flash_stats().extents - 1, first=1)


def test_flash_evicts_the_oldest_that_were_not_touched_and_dram_goes_too(room: Room) -> None:
    space, keys = full_flash(room)
    space.touch(keys[0], keys[2])
    fill(space, 3, first=100)
    assert [space.holds(key) for key in keys[:6]] == [True, False, True, False, False, True]
    assert space.flash_stats().evictions == 3
    assert space.flash_stats().blocks == len(keys)


def test_pinned_blocks_stay_on_flash_and_in_dram(room: Room) -> None:
    space, keys = full_flash(room)
    warm = keys[:2]
    space.stage(*warm, prefetch=True)
    cold = [key for key in keys if space.state(key) == FLASH][:3]
    assert [space.state(key) for key in warm] == [LIVE] * 2
    assert space.pin(*cold, *warm) == [DONE] * 5
    fill(space, 40, first=100)
    assert [space.state(key) for key in cold] == [FLASH] * 3
    assert [space.state(key) for key in warm] == [LIVE] * 2
    assert space.unpin(*cold, *warm) == [DONE] * 5
    assert space.unpin(*cold, *warm) == [MISS] * 5
    fill(space, 40, first=200)
    assert not any(space.holds(key) for key in cold)


def test_at_most_half_of_flash_can_be_pinned(room: Room) -> None:
    space, keys = full_flash(room)
    cold = [key for key in keys if space.state(key) == FLASH]
    statuses = space.pin(*cold)
    assert statuses.count(DONE) == min(len(cold), len(keys) // 2)
    assert set(statuses) <= {DONE, FULL}
    assert space.flash_stats().pinned == statuses.count(DONE)


def test_a_pin_on_flash_ends_with_its_time_to_live(room: Room) -> None:
    space, keys = full_flash(room)
    (cold, *_) = (key for key in keys if space.state(key) == FLASH)
    assert space.pin(cold, ttl_ns=1_000_000) == [DONE]
    time.sleep(0.002)
    space.tick()
    assert space.flash_stats().pinned == 0


def test_what_is_pinned_keeps_its_pins_when_its_slab_goes(room: Room) -> None:
    space, keys = full_flash(room)
    warm = keys[0]
    space.stage(warm, prefetch=True)
    assert space.pin(warm, warm) == [DONE, DONE]
    found = space.find(warm)
    assert found
    lib.mkv_ns_slab_retire(space.ns, found.slab)
    assert space.state(warm) == FLASH
    fill(space, 40, first=100)
    assert space.holds(warm)
    assert space.unpin(warm, warm, warm) == [DONE, DONE, MISS]


def test_headers_of_evicted_blocks_are_zeroed_in_time(room: Room) -> None:
    space, _keys = full_flash(room)
    fill(space, 5, first=100)
    space.delete(*(key_of(100 + n) for n in range(5)))
    space.settle()
    assert space.tier().headers_zeroed == 5
    fill(space, 2, first=200)
    assert space.flash_stats().extents_free == 3


def test_a_class_without_a_segment_uses_cells_of_a_larger_one(room: Room) -> None:
    space = room.start(room.disks(devices=1, segments=1), slabs=4)
    fill(space, 1)
    (small,) = fill(space, 1, first=1, length=100)
    assert record_of(space, small).length == 100
    assert space.flash_stats().segments == 1


def test_a_block_for_which_there_is_no_place_at_all_stays_in_dram_and_is_not_durable(room: Room) -> None:
    space = room.start(room.disks(devices=1, segments=1), slabs=2)
    fill(space, 1, length=100)  # takes the only segment
    (large,) = fill(space, 1, first=1)
    assert space.durable(large) == DEVICE
    assert space.get(large) == payload_of(large, LENGTH)
    assert space.tier().lost_memory_acks == 1
    for n in range(100, 120):
        assert space.put_patiently(key_of(n), payload_of(key_of(n), LENGTH)) == STORED
    assert not space.holds(large)
