"""Which blocks flash keeps, and where they find room."""

from __future__ import annotations

import time

import pytest

from memkv.store.native._store import ffi, lib

from ..flashes import (
    DEVICE,
    DONE,
    EVERY,
    FLASH,
    FULL,
    LENGTH,
    LIVE,
    MISS,
    PENDING,
    STORED,
    FlashSpace,
    fill,
    record_of,
)
from ..spaces import EAGAIN, EBUSY, ENOENT, key_of, payload_of
from .conftest import Room

pytestmark = pytest.mark.asan


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


def test_a_segment_is_given_back_for_a_class_that_has_none(room: Room) -> None:
    """Its blocks are evicted and leave nothing behind; what had no place on flash is written then."""
    disks = room.disks(devices=1, segments=2)
    space = room.start(disks, slabs=2)
    small = fill(space, 100, length=100)  # takes both segments
    (large,) = fill(space, 1, first=1000)
    assert space.durable(large) == DEVICE
    before = space.flash_stats()
    assert before.segments == 2
    assert lib.mkv_ns_segment_give_up(space.ns, EVERY) == 0
    assert lib.mkv_ns_segment_give_up(space.ns, EVERY) == EBUSY
    space.wait(lambda: lib.mkv_ns_chores(space.ns) & lib.MKV_CHORE_SEGMENT)
    given = ffi.new("struct mkv_segment *")
    assert lib.mkv_ns_segment_given_up(space.ns, given) == 0
    assert lib.mkv_ns_segment_given_up(space.ns, given) == ENOENT
    assert given.payload == 512
    image = disks.image(given.device, given.offset, given.bytes)
    assert not any(image[at : at + 512].strip(b"\0") for at in range(0, given.bytes, 1024))
    (segment,) = (s for s in disks.assigned if s.number == given.number)
    segment.payload, segment.epoch = LENGTH, 99
    assert space.add(segment) >= 0
    assert space.make_durable(large) == DONE
    held = [key for key in small if space.holds(key)]
    assert 0 < len(held) <= before.extents // 2
    assert all(space.staged(key) == payload_of(key, 100) for key in held)
    assert lib.mkv_ns_segment_give_up(space.ns, EVERY) == ENOENT  # each class has one now


def test_a_class_that_was_promised_a_segment_waits_for_it(room: Room) -> None:
    """And has no segment: what has some lives on that meanwhile."""
    disks = room.disks(devices=1, segments=2)
    space = room.start(disks, slabs=3)
    fill(space, 60, length=100)  # takes the segment that there is for them
    disks.free.clear()
    large = key_of(1000)
    assert space.put_patiently(large, payload_of(large, LENGTH)) == STORED
    assert lib.mkv_ns_segment_wanted(space.ns) == LENGTH
    lib.mkv_ns_segment_promised(space.ns, LENGTH)
    space.tick()
    assert lib.mkv_ns_segment_wanted(space.ns) == 0
    assert space.durable(large) == PENDING
    assert space.flash_stats().dirty == 1
    lib.mkv_ns_segment_denied(space.ns, LENGTH)
    assert space.durable(large) == DEVICE
    assert space.tier().lost_memory_acks == 1


def test_between_a_sync_and_its_snapshot_no_segment_is_emptied(room: Room) -> None:
    space = room.start(room.disks(devices=1, segments=2), slabs=2)
    keys = fill(space, 20)
    space.wait_barrier(sync=True)
    before = space.flash_stats().blocks
    assert lib.mkv_ns_segment_give_up(space.ns, EVERY) == 0
    space.tick()
    assert space.flash_stats().blocks == before == len(keys)
    fill(space, 1, first=100)  # life goes on
    space.tick()
    assert space.flash_stats().blocks < before


def test_a_segment_is_given_back_only_when_nothing_in_it_is_pinned_or_on_its_way(room: Room) -> None:
    space = room.start(room.disks(devices=1, segments=2), slabs=2)
    keys = fill(space, 24)
    pinned = [key for key in keys if space.state(key) == FLASH]
    assert DONE in space.pin(*pinned)
    assert lib.mkv_ns_segment_give_up(space.ns, EVERY) == 0
    given = ffi.new("struct mkv_segment *")
    held = [key for key in pinned if space.holds(key)]
    until = time.monotonic() + 5
    while (rc := lib.mkv_ns_segment_given_up(space.ns, given)) == EAGAIN and time.monotonic() < until:
        if held:
            space.unpin(held.pop())
        space.tick()
        time.sleep(0.001)
    assert rc == 0
    assert given.payload == LENGTH
    assert len([key for key in keys if space.holds(key)]) <= 12
