"""Namespaces in an arena: every operation against a plain model, and what peers may rely on meanwhile."""

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memkv.store import layout
from memkv.store.native._store import ffi, lib

from .spaces import (
    EALREADY,
    EBUSY,
    ENOENT,
    ENOMEM,
    GRACE_TICKS,
    HOUR,
    Found,
    Space,
    find_in,
    key_of,
    payload_of,
)

pytestmark = pytest.mark.asan

MakeSpace = Callable[..., Space]
PENDING, STORED, EXISTS, MISS, DONE = (
    lib.MKV_PENDING,
    lib.MKV_STORED,
    lib.MKV_EXISTS,
    lib.MKV_MISS,
    lib.MKV_DONE,
)
FULL, REFUSED = lib.MKV_ERROR_FULL, lib.MKV_ERROR_REFUSED


@pytest.fixture
def make_space() -> Iterator[MakeSpace]:
    made: list[Space] = []

    def make(**kwargs: Any) -> Space:
        made.append(Space(**kwargs))
        return made[-1]

    yield make
    for space in made:
        space.check()
        space.close()


@pytest.fixture
def space(make_space: MakeSpace) -> Space:
    """Four slabs of six extents for 2048 bytes each, one of them ready."""
    space = make_space()
    space.serve()
    return space


def fill_up(space: Space, n: int, length: int = 2048) -> list[bytes]:
    keys = [key_of(i) for i in range(n)]
    for key in keys:
        assert space.put_patiently(key, payload_of(key, length)) == STORED
    return keys


# --- everything against a model ---


@dataclass(slots=True)
class Limbo:
    """An extent that was unpublished: its bytes may not change while `ticks` are left."""

    slab: int
    offset: int
    image: bytes  # live line without its generation, and payload
    ticks: int


class NamespaceMachine(RuleBasedStateMachine):
    LENGTHS = st.sampled_from([1, 500, 512, 513, 700, 1024, 1500, 2047, 2048])
    KEYS = st.integers(0, 40).map(key_of)

    @initialize(slabs=st.integers(1, 4), align=st.sampled_from([512, 4096]))
    def make(self, slabs: int, align: int) -> None:
        self.space = Space(slabs=slabs, align=align, slab_bytes=32768 if align == 4096 else 8192)
        self.space.serve()
        self.model: dict[bytes, bytes] = {}
        self.pins: dict[bytes, int] = {}
        self.places: dict[bytes, tuple[Found, bytes]] = {}
        self.fills: list[tuple[bytes, Any]] = []
        self.limbo: list[Limbo] = []
        self.seen: set[tuple[int, int]] = set()

    def teardown(self) -> None:
        if hasattr(self, "space"):
            self.space.close()

    # What goes may go by eviction or with its slab, in any operation that needs room.

    def forget(self, key: bytes) -> None:
        found, image = self.places.pop(key)
        self.limbo.append(Limbo(found.slab, found.offset, image, GRACE_TICKS))
        del self.model[key]
        self.pins.pop(key, None)

    def notice_evictions(self, before: int, retired_before: int) -> None:
        after = self.space.stats()
        gone = [key for key in self.model if not self.space.holds(key)]
        retired = after.slabs_retired - retired_before
        if not retired:
            assert len(gone) == after.evictions - before
            assert not any(key in self.pins for key in gone)  # nothing pinned is evicted
        for key in gone:
            self.forget(key)

    @rule(key=KEYS, length=LENGTHS)
    def begin(self, key: bytes, length: int) -> None:
        before = self.space.stats()
        status, fill = self.space.begin(key, length)
        assert (status == EXISTS) == (key in self.model)
        self.notice_evictions(before.evictions, before.slabs_retired)
        if status != PENDING:
            assert status in (EXISTS, FULL)
            return
        assert fill.address - self.space.base == self.space.slab_at[fill.slab] + fill.offset
        assert fill.offset % self.space.align == 0
        assert fill.offset + length <= self.space.slab_bytes
        start, end = fill.address - self.space.align, fill.address + length
        for _, other in self.fills:
            assert end <= other.address - self.space.align or start >= other.address + other.length
        for found, _ in self.places.values():
            at = self.space.base + self.space.slab_at[found.slab] + found.offset
            assert end <= at - self.space.align or start >= at + found.length
        for limbo in self.limbo:
            assert (limbo.slab, limbo.offset) != (fill.slab, fill.offset)
        ffi.memmove(ffi.cast("void *", fill.address), payload_of(key, length), length)
        self.fills.append((key, fill))

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        key, fill = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        status = self.space.publish(fill, key)
        if key in self.model:
            assert status == EXISTS
        elif status == REFUSED:
            assert self.space.stats().slabs_retired > 0
            self.space.abandon(fill)
        else:
            assert status == STORED
            self.model[key] = payload_of(key, fill.length)
            found = self.space.find(key)
            assert found is not None
            assert (found.slab, found.offset) == (fill.slab, fill.offset)
            assert (found.slab, found.generation) not in self.seen  # a generation is never used twice
            self.seen.add((found.slab, found.generation))
            self.places[key] = found, self.image(found)

    @precondition(lambda self: self.fills)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        _, fill = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        self.space.abandon(fill)

    @rule(keys=st.lists(KEYS, max_size=4))
    def touch(self, keys: list[bytes]) -> None:
        assert self.space.touch(*keys) == sum(key in self.model for key in keys)

    @rule(keys=st.lists(KEYS, max_size=4, unique=True))
    def delete(self, keys: list[bytes]) -> None:
        assert self.space.delete(*keys) == [DONE if key in self.model else MISS for key in keys]
        for key in keys:
            if key in self.model:
                self.forget(key)

    @rule(key=KEYS)
    def pin(self, key: bytes) -> None:
        stats = self.space.stats()
        (status,) = self.space.pin(key)
        if key not in self.model:
            assert status == MISS
        elif status == DONE:
            self.pins[key] = self.pins.get(key, 0) + 1
        else:
            assert status == FULL
            assert key not in self.pins
            assert stats.pinned_bytes > 0

    @rule(key=KEYS)
    def unpin(self, key: bytes) -> None:
        assert self.space.unpin(key) == [DONE if key in self.pins else MISS]
        if self.pins.get(key, 0) > 1:
            self.pins[key] -= 1
        else:
            self.pins.pop(key, None)

    @rule(n=st.integers(1, 3))
    def tick(self, n: int) -> None:
        for _ in range(n):
            for limbo in self.limbo:
                limbo.ticks -= 1
            self.limbo = [limbo for limbo in self.limbo if limbo.ticks > 0]
            before = self.space.stats()
            lib.mkv_ns_tick_now(self.space.ns)
            self.notice_evictions(before.evictions, before.slabs_retired)

    @rule()
    def slabs(self) -> None:
        before = self.space.stats()
        self.space.serve_slabs()
        self.notice_evictions(before.evictions, before.slabs_retired)

    @rule()
    def retire(self) -> None:
        before = self.space.stats()
        rc = lib.mkv_ns_slab_retire(self.space.ns, 0)
        assert rc == (0 if before.extents else ENOENT)
        self.notice_evictions(before.evictions, before.slabs_retired)

    @rule()
    def release(self) -> None:
        for slab in self.space.serve_retired():
            assert not any(fill.slab == slab for _, fill in self.fills)
            assert not any(limbo.slab == slab for limbo in self.limbo)

    @rule()
    def grow(self) -> None:
        if self.space.table().buckets < 1024:
            self.space.grow_table()
        if len(self.space.old_tables) > 5:
            self.space.drop_tables()

    @invariant()
    def the_core_agrees_with_itself(self) -> None:
        if hasattr(self, "space"):
            self.space.check()
            stats = self.space.stats()
            assert stats.blocks == len(self.model)
            assert stats.bytes == sum(map(len, self.model.values()))
            assert stats.extents_pinned == len(self.pins)

    @invariant()
    def a_peer_finds_what_was_put_and_nothing_else(self) -> None:
        if hasattr(self, "space"):
            for key in map(key_of, range(41)):
                assert self.space.get(key) == self.model.get(key)

    @invariant()
    def nothing_changes_in_quarantine(self) -> None:
        if hasattr(self, "space"):
            for limbo in self.limbo:
                found = Found(limbo.slab, limbo.offset, 0, len(limbo.image) - 56)
                assert self.image(found) == limbo.image
                assert self.space.extent(found)[0]["generation"] == 0

    def image(self, found: Found) -> bytes:
        line, payload = self.space.extent(found)
        return bytes(line.tobytes()[:56] + payload.tobytes())


TestNamespaceMachine = NamespaceMachine.TestCase
TestNamespaceMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


# --- coming in ---


def test_a_new_namespace_wants_a_slab_before_its_first_put(make_space: MakeSpace) -> None:
    space = make_space()
    assert lib.mkv_ns_chores(space.ns) == lib.MKV_CHORE_SLAB
    assert select.select([lib.mkv_arena_eventfd(space.arena)], [], [], 0)[0]
    long = payload_of(key_of(1), 2048)
    assert space.put(key_of(1), long) == FULL
    assert space.serve_slabs() == 1
    assert space.put(key_of(1), long) == STORED


def test_a_block_stays_invisible_until_it_is_published(space: Space) -> None:
    key = key_of(1)
    status, fill = space.begin(key, 2000)
    assert status == PENDING
    assert not space.holds(key)
    assert space.find(key) is None
    ffi.memmove(ffi.cast("void *", fill.address), payload_of(key, 2000), 2000)
    assert space.publish(fill, key) == STORED
    assert space.get(key) == payload_of(key, 2000)


def test_the_faster_of_two_puts_wins_and_the_other_extent_is_free_at_once(space: Space) -> None:
    key = key_of(1)
    (_, first), (_, second) = space.begin(key, 2048), space.begin(key, 2048)
    free = space.stats().extents_free
    assert space.publish(second, key) == STORED
    assert space.publish(first, key) == EXISTS
    assert space.stats().extents_free == free + 1
    assert space.begin(key, 2048)[0] == EXISTS
    assert space.stats().duplicates == 2


def test_an_abandoned_extent_is_free_at_once_and_only_once(space: Space) -> None:
    _, fill = space.begin(key_of(1), 2048)
    free = space.stats().extents_free
    space.abandon(fill)
    space.abandon(fill)
    assert space.stats().extents_free == free + 1
    assert space.publish(fill, key_of(1)) == lib.MKV_ERROR_INTERNAL


def test_lengths_that_no_block_can_have_are_refused(space: Space) -> None:
    assert space.begin(key_of(1), 0)[0] == lib.MKV_ERROR_LENGTH
    assert space.begin(key_of(1), 2049)[0] == lib.MKV_ERROR_TOO_LARGE


@pytest.mark.parametrize("align", [512, 4096])
@pytest.mark.parametrize("length", [1, 512, 1000, 4096, 10000, 20000])
def test_payloads_are_aligned_and_lie_behind_their_header_page(
    make_space: MakeSpace, align: int, length: int
) -> None:
    space = make_space(slab_bytes=1 << 16, block_bytes=20000, align=align)
    space.serve()
    assert space.put_patiently(key_of(1), payload_of(key_of(1), length)) == STORED
    found = space.find(key_of(1))
    assert found is not None
    assert found.offset % align == 0
    assert found.offset >= align


@pytest.mark.parametrize(
    ("length", "payload"),
    [
        (8192, 8192),
        (6145, 8192),
        (6144, 6144),
        (4097, 6144),
        (4096, 4096),
        (3072, 3072),
        (600, 768),
        (1, 512),
    ],
)
def test_a_payload_goes_to_the_smallest_class_that_holds_it(
    make_space: MakeSpace, length: int, payload: int
) -> None:
    """Two blocks of a class tell how far its extents are apart: payload rounded up, and a header page."""
    space = make_space(slabs=2, slab_bytes=1 << 16, block_bytes=8192)
    offsets = []
    for n in range(2):
        assert space.put_patiently(key_of(n), payload_of(key_of(n), length)) == STORED
        found = space.find(key_of(n))
        assert found is not None
        offsets.append(found.offset)
    assert abs(offsets[1] - offsets[0]) == 512 + (payload + 511) // 512 * 512


def test_the_cold_record_says_what_survives(space: Space) -> None:
    keys = fill_up(space, 3, 700)
    sequences = []
    for key in keys:
        found = space.find(key)
        assert found is not None
        at = space.slab_at[found.slab] + found.offset - space.align
        raw = space.bytes[at : at + layout.COLD.itemsize]
        cold = raw.view(layout.COLD)[0]
        assert (cold["magic"], cold["version"]) == (layout.COLD_MAGIC, layout.LAYOUT_VERSION)
        assert cold["key"].tobytes() == key
        assert (cold["length"], cold["namespace_id"], cold["slab_epoch"]) == (700, 3, found.slab)
        assert cold["checksum"] == space.extent(found)[0]["checksum"]
        assert cold["check"] == xxhash.xxh3_64_intdigest(raw[:112].tobytes(), seed=77)
        sequences.append(int(cold["sequence"]))
    assert sequences == [1, 2, 3]


@pytest.mark.parametrize(
    "wrong", [{"block_bytes": 0}, {"block_bytes": 16384}, {"align": 1024}, {"grace_ns": 0}]
)
def test_a_namespace_that_cannot_be_is_not_made(space: Space, wrong: dict[str, int]) -> None:
    given = {"block_bytes": 2048, "align": 512, "grace_ns": HOUR} | wrong
    assert lib.mkv_ns_new(space.arena, 9, *given.values(), 1) == ffi.NULL
    assert ffi.errno != 0
    assert lib.mkv_ns_new(space.arena, 3, 2048, 512, HOUR, 1) == ffi.NULL  # there is one of that id


# --- queries ---


def test_match_counts_the_prefix_that_is_held(space: Space) -> None:
    keys = fill_up(space, 5, 100)
    absent = key_of(99)
    assert space.match(*keys) == 5
    assert space.match(*keys[:3], absent, *keys[3:]) == 3
    assert space.match(absent, *keys) == 0
    assert space.match() == 0


def test_batches_longer_than_the_lock_is_held_for(make_space: MakeSpace) -> None:
    space = make_space(slabs=2, slab_bytes=1 << 20, block_bytes=512)
    space.serve()
    keys = fill_up(space, 900, 16)
    mixed = [
        key for n, key in enumerate(keys) for key in ((key, key_of(10_000 + n)) if n % 3 == 0 else (key,))
    ]
    held = set(keys)
    assert space.lookup(*mixed) == [lib.MKV_HIT if key in held else MISS for key in mixed]
    assert space.match(*keys) == 900
    assert space.match(*keys[:700], key_of(77_777), *keys[700:]) == 700
    assert space.touch(*mixed) == 900
    assert space.delete(*mixed) == [DONE if key in held else MISS for key in mixed]


# --- going: quarantine, eviction, pins ---


def test_a_deleted_block_is_gone_at_once_and_its_extent_free_with_the_fifth_tick(space: Space) -> None:
    (key,) = fill_up(space, 1)
    found = space.find(key)
    assert found is not None
    line, payload = space.extent(found)
    before = line.tobytes()[:56], payload.tobytes()
    assert space.delete(key) == [DONE]
    assert space.find(key) is None
    for left in range(GRACE_TICKS, 0, -1):
        assert space.stats().extents_quarantine == 1, left
        assert line["generation"] == 0
        assert (line.tobytes()[:56], payload.tobytes()) == before
        space.tick()
    assert space.stats().extents_quarantine == 0


def test_the_epoch_advances_before_anything_is_freed_and_in_every_table(space: Space) -> None:
    first = space.table()
    space.grow_table()
    epochs = [ffi.cast("struct mkv_epoch *", span.address) for span in (first, space.table())]
    space.tick(3)
    assert [e.epoch for e in epochs] == [space.stats().epoch] * 2
    assert [e.table for e in epochs] == [2, 2]
    assert [e.buckets for e in epochs] == [first.buckets, 2 * first.buckets]


def test_nothing_is_evicted_while_the_arena_has_slabs(make_space: MakeSpace) -> None:
    space = make_space(slabs=4)
    fill_up(space, 4 * 6 - 1)
    assert space.stats().evictions == 0
    assert space.stats().slabs == 4


def test_eviction_takes_the_oldest_that_were_not_touched(make_space: MakeSpace) -> None:
    space = make_space(slabs=1, slab_bytes=1 << 17)  # 51 extents
    space.serve()
    keys = fill_up(space, 50)
    space.touch(*keys[:30:3])
    for n in range(100, 110):
        assert space.put_patiently(key_of(n), payload_of(key_of(n), 2048)) == STORED
    untouched = [key for n, key in enumerate(keys) if n >= 30 or n % 3]
    gone = [key for key in keys if not space.holds(key)]
    assert len(gone) == space.stats().evictions >= 10
    assert gone == untouched[: len(gone)]


def test_a_touched_block_is_spared_once(make_space: MakeSpace) -> None:
    space = make_space(slabs=1)
    space.serve()
    keys = fill_up(space, 5)
    space.touch(*keys)
    for n in range(100, 130):
        assert space.put_patiently(key_of(n), payload_of(key_of(n), 2048)) == STORED
    assert not any(space.holds(key) for key in keys)


@pytest.mark.parametrize("per_tick", [1, 3, 10])
def test_a_steady_stream_of_puts_does_not_wait_for_quarantines(make_space: MakeSpace, per_tick: int) -> None:
    space = make_space(slabs=2, slab_bytes=1 << 18)  # 204 extents
    numbers = iter(range(100_000))
    for _ in range(80):
        for _ in range(per_tick * 3):
            space.put(n := key_of(next(numbers)), payload_of(n, 2048))
        space.serve()
        space.tick()
    space.tick(60)  # the rate is forgotten, then learned again
    refused = []
    for tick in range(40):
        for _ in range(per_tick):
            n = key_of(next(numbers))
            if space.put(n, payload_of(n, 2048)) == FULL:
                refused.append(tick)
        space.tick()
    assert not [tick for tick in refused if tick > 2 * GRACE_TICKS]
    stats = space.stats()
    assert stats.extents_free + stats.extents_quarantine <= stats.extents // 2 + 1
    assert stats.extents_free + stats.extents_quarantine >= per_tick


def test_an_idle_namespace_keeps_its_blocks(make_space: MakeSpace) -> None:
    space = make_space(slabs=2)
    fill_up(space, 40)
    space.tick(100)
    blocks = space.stats().blocks
    space.tick(100)
    assert space.stats().blocks == blocks >= 6  # of 12: half may have been given up for the stream that ended


def test_pinned_blocks_outlive_any_number_of_puts(make_space: MakeSpace) -> None:
    space = make_space(slabs=2)
    keys = fill_up(space, 5)
    assert space.pin(*keys[:3]) == [DONE] * 3
    for n in range(100, 150):
        assert space.put_patiently(key_of(n), payload_of(key_of(n), 2048)) == STORED
    assert [space.holds(key) for key in keys] == [True] * 3 + [False] * 2
    assert all(space.get(key) == payload_of(key, 2048) for key in keys[:3])


def test_at_most_half_of_the_extents_can_be_pinned(make_space: MakeSpace) -> None:
    space = make_space(slabs=1)  # six extents
    space.serve()
    keys = fill_up(space, 4)
    assert all(map(space.holds, keys))
    assert space.pin(*keys) == [DONE] * 3 + [FULL]
    assert space.pin(keys[0]) == [DONE]  # a second pin takes nothing more
    assert space.stats().pinned_bytes == 3 * (512 + 2048)
    assert space.unpin(keys[1]) == [DONE]
    assert space.pin(keys[3]) == [DONE]


def test_a_pin_ends_with_its_time_to_live(make_space: MakeSpace) -> None:
    space = make_space(slabs=1)
    space.serve()
    keys = fill_up(space, 4)
    assert space.pin(*keys, ttl_ns=0) == [REFUSED] * 4
    assert space.pin(*keys[:3], ttl_ns=1_000_000) == [DONE] * 3
    time.sleep(0.002)
    assert space.pin(keys[3]) == [DONE]  # room is found without waiting for a tick
    assert space.stats().extents_pinned == 1
    assert space.unpin(keys[0]) == [MISS]
    space.unpin(keys[3])
    assert space.pin(keys[0], ttl_ns=1_000_000) == [DONE]
    time.sleep(0.002)
    space.tick()
    assert space.stats().extents_pinned == 0


def test_pins_are_counted_and_the_longest_counts(space: Space) -> None:
    keys = fill_up(space, 2)
    assert space.pin(keys[0], keys[0]) == [DONE, DONE]
    assert space.pin(keys[0], ttl_ns=1) == [DONE]
    space.tick()
    for expected in (DONE, DONE, DONE, MISS):
        assert space.unpin(keys[0]) == [expected]
    assert space.unpin(keys[1], key_of(9)) == [MISS, MISS]
    assert space.pin(key_of(9)) == [MISS]


def test_a_pinned_block_can_be_deleted(space: Space) -> None:
    (key,) = fill_up(space, 1)
    space.pin(key)
    assert space.delete(key) == [DONE]
    assert space.stats().extents_pinned == 0
    assert space.stats().pinned_bytes == 0


# --- slabs ---


def test_a_retired_slab_comes_back_zeroed_under_another_id(make_space: MakeSpace) -> None:
    space = make_space(slabs=1)
    space.serve()
    keys = fill_up(space, 4)
    space.pin(keys[0])
    (slab,) = space.slab_at
    assert lib.mkv_ns_slab_retire(space.ns, slab) == 0
    assert lib.mkv_ns_slab_retire(space.ns, slab) == EALREADY
    assert space.stats().blocks == 0
    assert not any(space.holds(key) for key in keys)
    for _ in range(GRACE_TICKS):
        assert space.serve_retired() == []
        assert space.bytes.any()
        assert not lib.mkv_ns_chores(space.ns) & lib.MKV_CHORE_RETIRE
        space.tick()
    assert lib.mkv_ns_chores(space.ns) & lib.MKV_CHORE_RETIRE
    assert lib.mkv_ns_slab_released(space.ns, slab) == EBUSY  # nobody has been told that it may go
    assert space.serve_retired() == [slab]
    assert not space.bytes.any()
    assert lib.mkv_arena_free_slabs(space.arena) == 1
    assert space.put_patiently(keys[0], b"again") == STORED
    assert slab not in space.slab_at


def test_a_retired_slab_waits_for_whoever_is_filling_it(space: Space) -> None:
    _, fill = space.begin(key_of(1), 2048)
    _, other = space.begin(key_of(2), 2048)
    assert lib.mkv_ns_slab_retire(space.ns, 0) == 0
    space.tick(3 * GRACE_TICKS)
    assert space.serve_retired() == []
    assert space.publish(fill, key_of(1)) == REFUSED
    space.abandon(fill)
    space.abandon(other)
    space.tick()
    assert len(space.serve_retired()) == 1


def test_a_slab_that_could_not_be_registered_goes_back(make_space: MakeSpace) -> None:
    space = make_space(slabs=1)
    slab = space.take_slab()
    assert lib.mkv_ns_slab_retire(space.ns, slab) == 0
    assert space.serve_retired() == [slab]
    assert lib.mkv_arena_free_slabs(space.arena) == 1
    assert space.put_patiently(key_of(1), b"x") == STORED


def test_slabs_that_are_not_there(space: Space) -> None:
    for call in (lib.mkv_ns_slab_ready, lib.mkv_ns_slab_retire, lib.mkv_ns_slab_released):
        assert call(space.ns, 999) == ENOENT
        assert call(space.ns, 1 << 40) == ENOENT
    assert space.take_slab() == ENOENT  # none is wanted


def test_retirement_prefers_the_slab_with_fewest_blocks_and_no_pinned_ones(make_space: MakeSpace) -> None:
    space = make_space(slabs=2)
    keys = fill_up(space, 11)
    of_slab: dict[int, list[bytes]] = {}
    for key in keys:
        found = space.find(key)
        assert found is not None
        of_slab.setdefault(found.slab, []).append(key)
    few, many = sorted(of_slab.values(), key=len)
    space.pin(few[0])
    assert lib.mkv_ns_slab_retire(space.ns, 0) == 0
    assert all(space.holds(key) for key in few)
    assert not any(space.holds(key) for key in many)


def test_a_class_with_nothing_gets_a_slab_of_the_class_that_has_all(make_space: MakeSpace) -> None:
    """Short blocks hold the whole arena; a long one comes, and there is no larger class to help out."""
    space = make_space(slabs=2)
    first = space.take_slab()  # the one for long blocks that a namespace begins with: not made ready
    lib.mkv_ns_slab_retire(space.ns, first)
    space.serve_retired()
    for n in range(30):
        space.put(key_of(n), b"short")
        space.serve_slabs()
    assert space.stats().extents == 2 * (16384 // 1024)
    key = key_of(1000)
    assert space.put_patiently(key, payload_of(key, 2048)) == STORED
    assert space.stats().slabs_retired == 2
    assert space.put_patiently(key_of(1001), b"short") == STORED


def test_a_few_short_blocks_do_not_cost_the_long_ones_a_slab(make_space: MakeSpace) -> None:
    space = make_space(slabs=3)
    fill_up(space, 60)
    for n in range(3):
        assert space.put_patiently(key_of(500 + n), b"short") == STORED
    assert space.stats().slabs_retired == 0


def test_a_class_that_is_mostly_asked_for_gets_most_slabs(make_space: MakeSpace) -> None:
    space = make_space(slabs=4)
    fill_up(space, 60)
    for n in range(2000):
        space.put_patiently(key_of(10_000 + n), b"short")
        if n % 5 == 0:
            space.serve()
            space.tick()
    stats = space.stats()
    assert stats.slabs_retired == 3
    assert stats.extents == 3 * 16 + 6


def test_namespaces_share_the_arena_and_leave_it_clean(make_space: MakeSpace) -> None:
    space = make_space(slabs=3)
    space.serve()
    (key,) = fill_up(space, 1)
    other = lib.mkv_ns_new(space.arena, 4, 1024, 512, HOUR, 5)
    span, fill = ffi.new("struct mkv_span *"), ffi.new("struct mkv_fill *")
    assert lib.mkv_ns_slab_take(other, span) == 0
    assert lib.mkv_ns_slab_ready(other, span.id) == 0
    assert lib.mkv_ns_slab_retire(space.ns, span.id) == ENOENT  # not this one's
    assert lib.mkv_fill_begin(other, key, 1024, fill) == PENDING  # its own keys
    ffi.memmove(ffi.cast("void *", fill.address), b"\xff" * 1024, 1024)
    assert lib.mkv_fill_publish(other, fill, key, 1) == STORED
    assert lib.mkv_ns_check(other) == 0
    free = lib.mkv_arena_free_slabs(space.arena)
    lib.mkv_ns_free(other)
    assert lib.mkv_arena_free_slabs(space.arena) == free + 1
    assert not space.bytes[span.address - space.base :][: span.bytes].any()
    assert space.get(key) == payload_of(key, 2048)


def test_a_slab_is_wanted_from_an_arena_that_has_none(make_space: MakeSpace) -> None:
    space = make_space(slabs=1)
    space.serve()
    for n in range(8):
        space.put(key_of(n), payload_of(key_of(n), 2048))
    assert space.take_slab() == ENOMEM
    assert not lib.mkv_ns_chores(space.ns) & lib.MKV_CHORE_SLAB  # no use trying before one comes free


# --- the table ---


def test_the_table_is_to_grow_when_it_is_five_eighths_full(make_space: MakeSpace) -> None:
    space = make_space(slabs=4, slab_bytes=1 << 20, block_bytes=512)
    space.serve()
    slots = space.table().buckets * layout.BUCKET_SLOTS
    n = 0
    while not lib.mkv_ns_chores(space.ns) & lib.MKV_CHORE_TABLE:
        assert space.put_patiently(key_of(n), b"x") == STORED
        n += 1
        if lib.mkv_ns_chores(space.ns) & lib.MKV_CHORE_SLAB:
            space.serve_slabs()
    assert slots * 5 // 8 <= n <= slots * 5 // 8 + 10
    space.grow_table()
    assert not lib.mkv_ns_chores(space.ns) & lib.MKV_CHORE_TABLE
    assert space.stats().grows == 1
    assert space.match(*map(key_of, range(n))) == n


def test_an_old_table_is_frozen_whole_until_it_is_dropped(space: Space) -> None:
    keys = fill_up(space, 6, 100)
    old = space.table()
    there = {key: space.find(key) for key in keys}
    space.grow_table()
    space.delete(keys[0])
    late = key_of(50)
    assert space.put_patiently(late, b"late") == STORED
    for key, found in there.items():
        assert find_in(old.address, old.buckets, key, space.salt) == found
    assert find_in(old.address, old.buckets, late, space.salt) is None
    deleted = there[keys[0]]
    assert deleted is not None
    assert space.extent(deleted)[0]["generation"] == 0
    assert lib.mkv_ns_table_drop(space.ns, space.table().id) == EBUSY
    assert lib.mkv_ns_table_drop(space.ns, old.id) == 0
    assert lib.mkv_ns_table_drop(space.ns, old.id) == ENOENT
    assert space.get(late) == b"late"


def test_a_prepared_table_is_the_same_when_asked_again_and_can_be_given_up(space: Space) -> None:
    first, second = ffi.new("struct mkv_span *"), ffi.new("struct mkv_span *")
    assert lib.mkv_ns_table_prepare(space.ns, first) == 0
    assert lib.mkv_ns_table_prepare(space.ns, second) == 0
    assert (first.id, first.address) == (second.id, second.address)
    assert lib.mkv_ns_table_switch(space.ns, first.id + 1) == ENOENT
    assert lib.mkv_ns_table_drop(space.ns, first.id) == 0
    assert lib.mkv_ns_table_switch(space.ns, first.id) == ENOENT
    assert lib.mkv_ns_table_prepare(space.ns, second) == 0
    assert second.id == first.id + 1  # versions do not recur


# --- time ---


def test_ticks_keep_their_distance(make_space: MakeSpace) -> None:
    """In any span of time there are no more ticks than whole quarters of the grace period, and one."""
    space = make_space(grace_ns=8_000_000)
    line = ffi.cast("struct mkv_epoch *", space.table().address)
    samples = []
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        samples.append((before, line.epoch, time.clock_gettime_ns(time.CLOCK_BOOTTIME)))
        time.sleep(0.0002)
    assert samples[-1][1] - samples[0][1] > 50
    times = np.array([(t0, t1) for t0, _, t1 in samples])
    epochs = np.array([e for _, e, _ in samples], dtype=np.int64)
    for i in range(len(samples)):
        assert (epochs[i:] - epochs[i] <= (times[i:, 1] - times[i, 0]) // 2_000_000 + 1).all()


STOPPED = """
import sys, time
sys.path[:0] = {path!r}
from tests.store.spaces import Space, ffi
space = Space(grace_ns=80_000_000)
line = ffi.cast("struct mkv_epoch *", space.table().address)
print("ready", flush=True)
before, epoch = time.monotonic(), line.epoch
while True:
    now, ticked = time.monotonic(), line.epoch
    if now - before > 0.25:  # we were stopped
        time.sleep(0.01)
        print(line.epoch - epoch, time.monotonic() - now)
        break
    before, epoch = now, ticked
    time.sleep(0.001)
space.close()
"""


def test_a_process_that_was_stopped_does_not_make_up_for_ticks() -> None:
    script = STOPPED.format(path=sys.path)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.4)
        os.kill(process.pid, signal.SIGCONT)
        ticks, since = process.stdout.readline().split()
        assert int(ticks) <= 4 + float(since) / 0.02  # a burst would be twenty


def test_readers_that_keep_the_rule_never_take_one_block_for_another(make_space: MakeSpace) -> None:
    """Threads put, touch, pin, delete, retire and grow; readers copy extents and accept them by the clock."""
    grace = 20_000_000
    space = make_space(slabs=3, grace_ns=grace)
    space.serve()
    stop = time.monotonic() + 2.0
    keys = [key_of(n) for n in range(60)]
    accepted, wrong, errors = [0], [0], []

    def clock() -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def guarded(work: Callable[[random.Random], None]) -> Callable[[int], None]:
        def run(seed: int) -> None:
            rng = random.Random(seed)
            try:
                while time.monotonic() < stop:
                    work(rng)
            except Exception as error:
                errors.append(error)

        return run

    def write(rng: random.Random) -> None:
        time.sleep(0.0005)
        key = rng.choice(keys)
        what = rng.random()
        if what < 0.8:
            space.put(key, payload_of(key, rng.choice([2048, 2000, 1400])))
        elif what < 0.85:
            space.delete(key)
        elif what < 0.95:
            space.touch(*rng.choices(keys, k=5))
        else:
            space.pin(key, ttl_ns=5_000_000)

    def keep_house(rng: random.Random) -> None:
        time.sleep(0.005)
        chores = lib.mkv_ns_chores(space.ns)
        if chores & lib.MKV_CHORE_SLAB:
            space.serve_slabs()
        if rng.random() < 0.02:
            lib.mkv_ns_slab_retire(space.ns, 0)
        retired = ffi.new("uint64_t *")
        while lib.mkv_ns_slab_retired(space.ns, retired) == 0:
            lib.mkv_ns_slab_released(space.ns, retired[0])  # slab_at keeps it: readers may still ask
        if space.table().buckets < 512 and rng.random() < 0.1:
            space.grow_table()
        space.check()

    def read(rng: random.Random) -> None:
        key = rng.choice(keys)
        found = space.find(key)
        if found is None or found.slab not in space.slab_at:
            return
        at = space.slab_at[found.slab] + found.offset
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.02)  # a location that has been in a cache for a while
        posted = clock()
        head = space.bytes[at - 64 : at].copy()
        if rng.random() < 0.3:
            time.sleep(0.004)
        payload = space.bytes[at : at + found.length].copy()
        line = head.view(layout.LINE)[0]
        fresh = line["generation"] & 0xFFFFFFFF == found.generation and line["key"].tobytes() == key
        if fresh and line["length"] == found.length and clock() - posted < grace // 2:
            accepted[0] += 1
            wrong[0] += payload.tobytes() != payload_of(key, found.length)

    work = [write, write, read, read, keep_house]
    threads = [threading.Thread(target=guarded(job), args=(seed,)) for seed, job in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert wrong == [0]
    assert accepted[0] > 100
    assert space.stats().evictions > 10


def test_the_table_grows_under_concurrent_puts_and_deletes(make_space: MakeSpace) -> None:
    """Large enough for the lock to be free several times in each growth."""
    space = make_space(slabs=1, slab_bytes=1 << 24, block_bytes=512)
    space.serve()
    lost: list[bytes] = []
    stop = threading.Event()

    def churn(part: int) -> None:
        rng = random.Random(part)
        held: dict[bytes, None] = {}
        while not stop.is_set():
            key = part.to_bytes(4, "little") + rng.randbytes(12)
            if space.put(key, b"x") == STORED:
                held[key] = None
            if len(held) > 250:
                gone = rng.choice(list(held))
                del held[gone]
                if space.delete(gone) != [DONE] or space.holds(gone):
                    lost.append(gone)
        lost.extend(key for key in held if not space.holds(key))

    threads = [threading.Thread(target=churn, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + 30
        while not space.stats().deletes and time.monotonic() < until:
            time.sleep(0.001)  # until all of it goes on: a loaded machine could grow four times before
        for _ in range(4):
            space.grow_table()
            space.check()
            space.tick()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not lost
    assert space.stats().grows == 4
    assert space.stats().deletes > 0


def test_the_same_block_put_again_has_another_generation(space: Space) -> None:
    seen = set()
    for _ in range(20):
        assert space.put_patiently(key_of(1), payload_of(key_of(1), 2048)) == STORED
        found = space.find(key_of(1))
        assert found is not None
        seen.add(int(space.extent(found)[0]["generation"]))
        space.delete(key_of(1))
        space.tick(GRACE_TICKS)
    assert len(seen) == 20
