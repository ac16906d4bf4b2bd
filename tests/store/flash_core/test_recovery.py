"""What a start finds, and what it does not believe."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import xxhash

from memkv.store import layout
from memkv.store.native._store import ffi, lib

from ..flashes import (
    CORRUPT,
    DONE,
    EIO,
    HIT,
    LENGTH,
    MISS,
    READ,
    SECRET,
    STORED,
    STRIDE,
    FlashSpace,
    fill,
    identity,
    reads,
    record_of,
)
from ..spaces import key_of, payload_of
from .conftest import Room

pytestmark = pytest.mark.asan


def restart(room: Room, space: FlashSpace, **kwargs: Any) -> FlashSpace:
    space.close()
    space = room.start(space.disks, **kwargs)
    space.settle()
    assert lib.mkv_ns_scanning(space.ns) == 0
    space.check()
    return space


def cold_of(space: FlashSpace, record: Any) -> Any:
    raw = bytearray(space.disks.image(int(record.device), int(record.offset), 128))
    return raw, ffi.cast("struct mkv_cold *", ffi.from_buffer(raw))


def seal(raw: bytearray, secret: int = SECRET) -> bytes:
    raw[112:120] = xxhash.xxh3_64_intdigest(bytes(raw[:112]), seed=secret).to_bytes(8, "little")
    return bytes(raw)


def test_the_cold_record_on_flash_says_where_and_what_it_is(space: FlashSpace) -> None:
    (key,) = fill(space, 1, length=700)
    record = record_of(space, key)
    raw, cold = cold_of(space, record)
    (segment,) = (s for s in space.disks.assigned if s.device == record.device)
    assert (cold.magic, cold.version, cold.length, cold.namespace_id) == (layout.COLD_MAGIC, 1, 700, 3)
    assert bytes(ffi.buffer(cold.key)) == key
    assert (cold.incarnation, cold.slab_epoch) == (5, segment.epoch)
    assert (cold.device, cold.offset) == (identity(record.device), record.offset)
    assert cold.checksum == record.checksum == lib.mkv_checksum(payload_of(key, 700), 700)
    assert cold.sequence == record.sequence
    assert cold.sequence >> 40 == space.disks.boots
    assert seal(raw) == bytes(raw)


def test_a_scan_finds_what_was_written_and_only_that(room: Room, space: FlashSpace) -> None:
    keys = fill(space, 20)
    space.delete(*keys[::4])
    space.wait_barrier()
    space = restart(room, space)
    assert [space.holds(key) for key in keys] == [n % 4 != 0 for n in range(20)]
    assert space.tier().recovered == 15
    assert all(space.staged(key) == payload_of(key, LENGTH) for n, key in enumerate(keys) if n % 4)


def test_the_index_grows_while_a_scan_fills_it(room: Room) -> None:
    disks = room.disks(devices=2, segments=8, segment_bytes=1 << 17)
    space = room.start(disks, slabs=4, slab_bytes=1 << 17, block_bytes=512)
    keys = fill(space, 600, length=512)
    held = [key for key in keys if space.holds(key)]
    assert len(held) == 600
    space.close()
    space = room.start(disks, slabs=4, slab_bytes=1 << 15, block_bytes=512)
    for _ in range(50):
        space.settle()
        space.serve()
        space.tick()
    assert lib.mkv_ns_scanning(space.ns) == 0
    assert all(space.holds(key) for key in keys)


Spoil = Callable[[FlashSpace, Any, bytearray], bytes]


def _flip(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    raw[40] ^= 4
    return bytes(raw)


def _flip_magic(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    raw[0] ^= 1
    return bytes(raw)


def _other_secret(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    return seal(raw, SECRET + 1)


def _other_store(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    ffi.cast("struct mkv_cold *", ffi.from_buffer(raw)).device += 1
    return seal(raw, SECRET + 1)


def _other_incarnation(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    ffi.cast("struct mkv_cold *", ffi.from_buffer(raw)).incarnation = 4
    return seal(raw)


def _other_namespace(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    ffi.cast("struct mkv_cold *", ffi.from_buffer(raw)).namespace_id = 4
    return seal(raw)


def _other_epoch(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    ffi.cast("struct mkv_cold *", ffi.from_buffer(raw)).slab_epoch += 1
    return seal(raw)


def _other_offset(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    ffi.cast("struct mkv_cold *", ffi.from_buffer(raw)).offset += STRIDE
    return seal(raw)


def _other_device(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    ffi.cast("struct mkv_cold *", ffi.from_buffer(raw)).device += 1
    return seal(raw)


def _no_length(space: FlashSpace, record: Any, raw: bytearray) -> bytes:
    ffi.cast("struct mkv_cold *", ffi.from_buffer(raw)).length = LENGTH + 1
    return seal(raw)


@pytest.mark.parametrize(
    ("spoil", "count"),
    [
        (_flip, "dropped_torn"),
        (_flip_magic, "dropped_torn"),
        (_other_secret, "dropped_torn"),
        (_no_length, "dropped_torn"),
        (_other_store, "dropped_foreign"),
        (_other_incarnation, "dropped_foreign"),
        (_other_namespace, "dropped_foreign"),
        (_other_epoch, "dropped_foreign"),
        (_other_offset, "dropped_misplaced"),
        (_other_device, "dropped_misplaced"),
    ],
)
def test_a_header_that_is_not_what_it_must_be_is_dropped(
    room: Room, space: FlashSpace, spoil: Spoil, count: str
) -> None:
    keys = fill(space, 5)
    record = record_of(space, keys[2])
    space.settle()
    raw, _ = cold_of(space, record)
    space.disks.patch(record.device, record.offset, spoil(space, record, raw))
    space = restart(room, space)
    assert [space.holds(key) for key in keys] == [True, True, False, True, True]
    tier = space.tier()
    counts = {name: getattr(tier, name) for name in dir(tier) if name.startswith("dropped_")}
    assert counts == {name: int(name == count) for name in counts}


def test_a_whole_image_at_another_place_is_not_believed(room: Room, space: FlashSpace) -> None:
    """A misdirected write, or somebody's payload that is the copy of a header page."""
    fill(space, 4)
    key = key_of(1)
    record = record_of(space, key)
    image = space.disks.image(record.device, record.offset, STRIDE)
    space.delete(key)
    space.wait_barrier()
    space.disks.patch(record.device, 9 * STRIDE, image)
    space = restart(room, space)
    assert not space.holds(key)
    assert space.tier().dropped_misplaced == 1


def test_a_header_planted_in_a_payload_does_not_survive_a_change_of_the_size_class(room: Room) -> None:
    """Its place is a header's again later, everything in it agrees, but the segment's epoch has moved on."""
    disks = room.disks(devices=1, segments=1)
    space = room.start(disks)
    (key,) = fill(space, 1)
    assert key
    space.close()
    disks.assigned[0].epoch += 2  # assigned to somebody else, and back again
    space = room.start(disks)
    space.settle()
    assert not space.holds(key)
    assert space.tier().dropped_foreign == 1


def test_the_highest_sequence_wins(room: Room, space: FlashSpace) -> None:
    keys = fill(space, 6)
    old, new = record_of(space, keys[0]), record_of(space, keys[4])
    for record, sequence in ((old, 10), (new, 11)):
        raw, cold = cold_of(space, record)
        ffi.memmove(cold.key, key_of(77), 16)
        cold.sequence = sequence
        space.disks.patch(record.device, record.offset, seal(raw))
    space = restart(room, space)
    assert space.tier().dropped_superseded == 1
    assert space.staged(key_of(77)) is not None
    ((_, found),) = space.stage(key_of(77))
    assert bytes(space.extent(found)[1]) == payload_of(keys[4], LENGTH)


def two_images(space: FlashSpace, torn: bool) -> tuple[bytes, bytes]:
    """Makes two blocks images of one; the newer is perhaps torn. Returns the key, and the older payload."""
    keys = fill(space, 6)
    old, new = record_of(space, keys[0]), record_of(space, keys[4])
    for record, sequence in ((old, 10), (new, 11)):
        raw, cold = cold_of(space, record)
        ffi.memmove(cold.key, key_of(77), 16)
        cold.sequence = sequence
        space.disks.patch(record.device, record.offset, seal(raw))
    if torn:
        space.disks.patch(new.device, new.offset + 512 + 1024, bytes(512))
    return key_of(77), payload_of(keys[0], LENGTH)


def test_where_the_newest_image_is_torn_an_older_one_takes_its_place(room: Room, space: FlashSpace) -> None:
    key, payload = two_images(space, True)
    space = restart(room, space)
    ((status, found),) = space.stage(key)
    assert status == HIT
    assert bytes(space.extent(found)[1]) == payload
    space.check()
    assert space.make_durable(key) == DONE


def test_an_older_image_is_kept_over_a_clean_stop(room: Room, space: FlashSpace) -> None:
    key, payload = two_images(space, True)
    space = restart(room, space)
    stopped = space.stop()
    assert len(stopped) == 6 * ffi.sizeof("struct mkv_flash_record")
    space = room.start(space.disks, records=stopped)
    space.check()
    ((status, found),) = space.stage(key)
    assert status == HIT
    assert bytes(space.extent(found)[1]) == payload


def test_older_images_make_room_when_the_newest_is_known_to_be_good(room: Room, space: FlashSpace) -> None:
    key, _ = two_images(space, False)
    space = restart(room, space)
    free = space.flash_stats().extents_free
    for _ in range(4):
        space.serve()
        space.tick()
        space.settle()
        space.durable(key)
        space.settle()
    assert space.flash_stats().extents_free == free + 1


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_an_older_image_goes_with_its_block(room: Room, space: FlashSpace, torn: bool, again: bool) -> None:
    key, _ = two_images(space, torn)
    space = restart(room, space)
    assert space.delete(key) == [DONE]
    new = payload_of(b"another payload.", LENGTH)
    if again:
        assert space.put_patiently(key, new) == STORED
    space.wait_barrier()
    space.check()
    space = restart(room, space)
    assert space.holds(key) in (again, False)
    assert space.staged(key) in ((new, None) if again else (None,))


def test_a_torn_payload_is_found_out_before_anybody_sees_it(room: Room, space: FlashSpace) -> None:
    (key,) = fill(space, 1)
    record = record_of(space, key)
    space.settle()
    space.disks.patch(record.device, record.offset + 512 + 1024, bytes(512))
    space = restart(room, space)
    assert space.holds(key)
    assert space.stage(key)[0][0] == CORRUPT
    assert not space.holds(key)
    assert space.device(record.device).corrupt == 1


def test_a_header_that_cannot_be_read_costs_its_block_only(room: Room, space: FlashSpace) -> None:
    keys = fill(space, 4)
    record = record_of(space, keys[1])
    space.close()
    space = room.start(space.disks, recover=False)
    space.fault(
        lib.MKV_FAULT_ERROR,
        READ,
        device=record.device,
        error=EIO,
        span=(int(record.offset), int(record.offset) + 1),
    )
    space.recover()
    space.settle()
    assert [space.holds(key) for key in keys] == [True, False, True, True]


def test_what_is_put_while_a_scan_goes_on_wins_and_what_is_deleted_stays_away(
    room: Room, space: FlashSpace
) -> None:
    keys = fill(space, 8)
    space.close()
    space = room.start(space.disks, recover=False)
    space.fault(lib.MKV_FAULT_HELD, READ)
    space.recover()
    assert lib.mkv_ns_scanning(space.ns) > 0
    new = payload_of(b"another payload.", LENGTH)
    assert space.put_patiently(keys[0], new) == STORED
    assert space.delete(*keys[1:4]) == [MISS] * 3
    barrier = space.barrier()
    time.sleep(0.01)
    assert not space.is_over(barrier)
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    space.wait(lambda: space.is_over(barrier))
    assert lib.mkv_ns_scanning(space.ns) == 0
    assert space.get(keys[0]) == new
    assert [space.holds(key) for key in keys[1:]] == [False] * 3 + [True] * 4
    space = restart(room, space)
    assert [space.holds(key) for key in keys[1:]] == [False] * 3 + [True] * 4
    assert space.staged(keys[0]) == new


def test_a_snapshot_brings_back_what_was_there_without_a_read(room: Room, space: FlashSpace) -> None:
    keys = fill(space, 20)
    space.delete(keys[3])
    space.touch(keys[5])
    saved = space.stop()
    space = room.start(space.disks, records=saved)
    assert reads(space) == 0
    space.check()
    assert [space.holds(key) for key in keys] == [n != 3 for n in range(20)]
    assert record_of(space, keys[5]).flags == 1
    assert all(space.staged(key) == payload_of(key, LENGTH) for key in keys if key != keys[3])
    fill(space, 10, first=100)


def test_records_that_fit_no_segment_are_skipped(room: Room, space: FlashSpace) -> None:
    keys = fill(space, 6)
    saved = space.stop()
    spoiled = ffi.from_buffer("struct mkv_flash_record[]", saved)
    by_key = {bytes(r.key): r for r in spoiled}
    by_key[keys[0]].offset += 512
    by_key[keys[1]].device = 9
    by_key[keys[2]].length = LENGTH + 1
    by_key[keys[3]].offset = 1 << 40
    by_key[keys[4]].offset = by_key[keys[5]].offset
    by_key[keys[4]].device = by_key[keys[5]].device
    space = room.start(space.disks, records=saved)
    space.check()
    assert [space.holds(key) for key in keys[:4]] == [False] * 4
    assert sum(space.holds(key) for key in keys[4:]) == 1


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_takes_nothing_that_was_acknowledged(room: Room, seed: int) -> None:
    rng = random.Random(seed)
    disks = room.disks(devices=rng.choice([1, 2]), segments=3)
    space = room.start(disks, seed=seed)
    durable, deleted = set(), set()
    for n in range(60):
        key = key_of(rng.randrange(50))
        if rng.random() < 0.7:
            if space.put_patiently(key, payload_of(key, LENGTH)) == STORED:
                deleted.discard(key)
                durable.discard(key)
            if rng.random() < 0.4 and space.make_durable(key) == DONE:
                durable.add(key)
        else:
            space.delete(key)
            durable.discard(key)
            if rng.random() < 0.5:
                space.wait_barrier()
                deleted.add(key)
        space.serve()
        if n % 3 == 0:
            space.tick()
    expected = {key for key in durable if space.holds(key)}
    space.crash(seed)
    space = room.start(disks)
    space.settle()
    assert all(space.holds(key) for key in expected)
    assert not any(space.holds(key) for key in deleted)
    for n in range(50):
        ((status, found),) = space.stage(key_of(n))
        assert status in ((HIT,) if key_of(n) in expected else (HIT, MISS, CORRUPT))
        if status == HIT:
            assert space.fetch(found, key_of(n)) == payload_of(key_of(n), LENGTH)
