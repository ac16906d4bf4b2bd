"""What is on stable media, and what is gone from there."""

from __future__ import annotations

import time

import pytest

from memkv.store.native._store import lib

from ..flashes import (
    DONE,
    EIO,
    EXISTS,
    FLUSH,
    LENGTH,
    MISS,
    PENDING,
    STORED,
    WRITE,
    Disks,
    FlashSpace,
    fill,
    record_of,
)
from ..spaces import key_of, payload_of
from .conftest import Room

pytestmark = pytest.mark.asan


def test_a_block_is_durable_with_the_flush_that_follows_its_write(space: FlashSpace) -> None:
    fill(space, 1)
    assert space.durable(key_of(99)) == MISS
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    key = key_of(2)
    space.put(key, payload_of(key, LENGTH))
    assert space.durable(key) == PENDING
    lib.mkv_flashio_fault_clear(space.io)
    space.fault(lib.MKV_FAULT_HELD, FLUSH)
    space.wait(lambda: not space.flash_stats().dirty)
    assert space.durable(key) == PENDING
    time.sleep(0.01)
    assert space.durable(key) == PENDING
    lib.mkv_flashio_fault_clear(space.io)
    assert space.make_durable(key) == DONE


def test_many_blocks_share_one_flush(room: Room) -> None:
    space = room.start(room.disks(devices=1), slabs=8)
    keys = fill(space, 20)
    before = space.tier().flushes
    assert {space.durable(key) for key in keys} == {PENDING}
    space.settle()
    assert {space.durable(key) for key in keys} == {DONE}
    assert space.tier().flushes - before <= 2


def test_what_is_found_at_a_start_is_durable_only_after_a_flush(room: Room, disks: Disks) -> None:
    """The device may still have it in its cache: the process was killed, the power stayed."""
    space = room.start(disks)
    (key,) = fill(space, 1)
    space.close()
    space = room.start(disks)
    space.settle()
    space.fault(lib.MKV_FAULT_HELD, FLUSH)
    assert space.put(key, payload_of(key, LENGTH)) == EXISTS
    assert space.durable(key) == PENDING
    lib.mkv_flashio_fault_clear(space.io)
    assert space.make_durable(key) == DONE


def test_a_barrier_waits_for_blocks_that_were_demanded_durable(space: FlashSpace) -> None:
    fill(space, 1)
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    key = key_of(2)
    space.put(key, payload_of(key, LENGTH))
    space.durable(key)
    barrier = space.barrier()
    time.sleep(0.01)
    assert not space.is_over(barrier)
    lib.mkv_flashio_fault_clear(space.io)
    space.wait(lambda: space.is_over(barrier))
    assert space.durable(key) == DONE


def test_a_barrier_with_nothing_to_do_is_over_at_once_and_barriers_are_shared(space: FlashSpace) -> None:
    first = space.barrier()
    space.wait(lambda: space.is_over(first))
    fill(space, 1)
    space.fault(lib.MKV_FAULT_HELD, FLUSH)
    flushes = space.tier().flushes
    barriers = [space.barrier() for _ in range(50)]
    assert barriers == sorted(set(barriers))
    lib.mkv_flashio_fault_clear(space.io)
    space.wait(lambda: space.is_over(barriers[-1]))
    assert space.tier().flushes - flushes <= 4


@pytest.mark.parametrize("held", [WRITE, FLUSH])
def test_a_deletion_is_over_when_the_header_is_zeroed_and_flushed(space: FlashSpace, held: int) -> None:
    (key,) = fill(space, 1)
    space.wait_barrier()
    record = record_of(space, key)
    space.fault(lib.MKV_FAULT_HELD, held)
    space.delete(key)
    barrier = space.barrier()
    time.sleep(0.01)
    assert not space.is_over(barrier)
    lib.mkv_flashio_fault_clear(space.io)
    space.wait(lambda: space.is_over(barrier))
    assert space.disks.image(record.device, record.offset, 512) == bytes(512)


def test_a_deletion_reaches_a_write_that_is_still_under_way(room: Room, disks: Disks) -> None:
    space = room.start(disks)
    fill(space, 1)
    space.fault(lib.MKV_FAULT_HELD, WRITE)
    key = key_of(2)
    space.put(key, payload_of(key, LENGTH))
    space.delete(key)
    barrier = space.barrier()
    time.sleep(0.01)
    assert not space.is_over(barrier)
    lib.mkv_flashio_fault_clear(space.io)
    space.wait(lambda: space.is_over(barrier))
    space.close()
    space = room.start(disks)
    space.settle()
    assert not space.holds(key)


def test_a_deletion_reaches_older_images_in_cells_that_were_given_up(room: Room) -> None:
    """Evicted from flash, put again, deleted: the first image must not come back either."""
    disks = room.disks(devices=1, segments=1)
    space = room.start(disks, slabs=4)
    (key,) = fill(space, 1)
    old = record_of(space, key)
    cells = space.flash_stats().extents
    fill(space, cells, first=100)
    assert not space.holds(key)
    extra = key_of(200)  # leaves the cell of the first image alone, if that is still there
    fill(space, 1, first=1)
    space.delete(*(key_of(100 + n) for n in range(3)))
    assert extra
    assert space.put_patiently(key, payload_of(key, LENGTH)) in (STORED, EXISTS)
    space.settle()
    disks.patch(0, int(old.offset), disks.image(0, int(record_of(space, key).offset), 512)[:0])
    space.delete(key)
    space.wait_barrier()
    space.close()
    space = room.start(disks)
    space.settle()
    assert not space.holds(key)


def test_a_header_that_cannot_be_zeroed_is_tried_again_and_the_barrier_waits(space: FlashSpace) -> None:
    (key,) = fill(space, 1)
    space.fault(lib.MKV_FAULT_ERROR, WRITE, error=EIO, times=2)
    space.delete(key)
    barrier = space.barrier()
    space.settle()
    assert not space.is_over(barrier)
    for _ in range(3):
        space.tick()
        space.settle()
    assert space.is_over(barrier)
    assert space.tier().headers_zeroed == 1


def test_a_sync_leaves_nothing_dirty(room: Room, disks: Disks) -> None:
    space = room.start(disks, slabs=8)
    for n in range(20):
        assert space.put_patiently(key_of(n), payload_of(key_of(n), LENGTH)) == STORED
    space.wait_barrier(sync=True)
    assert space.flash_stats().dirty == 0
    assert {space.durable(key_of(n)) for n in range(20)} == {DONE}
