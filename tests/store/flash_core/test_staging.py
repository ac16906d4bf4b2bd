"""From flash to DRAM: who waits, who joins, who is told what."""

from __future__ import annotations

import ctypes
import os
import random
import select
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from memkv.store.native._store import ffi, lib

from ..flashes import (
    CORRUPT,
    DEVICE,
    DONE,
    EIO,
    FLASH,
    FOREVER,
    FULL,
    HIT,
    LENGTH,
    LIVE,
    MISS,
    PENDING,
    READ,
    TIMEOUT,
    Disks,
    FlashSpace,
    cool,
    fill,
    reads,
)
from ..spaces import Found, key_of, payload_of
from .conftest import Room

pytestmark = pytest.mark.asan


def test_who_asks_for_a_block_that_is_on_its_way_joins(space: FlashSpace) -> None:
    (key,) = fill(space, 1)
    cool(space, key)
    space.fault(lib.MKV_FAULT_HELD, READ)
    before = reads(space)
    stages = [space.stage_begin(key, key) for _ in range(5)]
    assert not any(map(lib.mkv_stage_done, stages))
    lib.mkv_stage_free(stages.pop())  # whoever goes takes nothing from the others
    lib.mkv_flashio_fault_clear(space.io)
    for stage in stages:
        while not lib.mkv_stage_done(stage):
            time.sleep(0.001)
        answers = space.stage_collect(stage, 2)
        assert [(status, space.fetch(found, key)) for _, status, found in answers] == [
            (HIT, payload_of(key, LENGTH))
        ] * 2
        lib.mkv_stage_free(stage)
    assert reads(space) == before + 1
    assert space.tier().stage_joined == 9
    assert space.state(key) == LIVE  # it was used more than once


def test_what_finds_no_extent_waits_for_one_and_no_longer_than_it_said(room: Room, disks: Disks) -> None:
    space = room.start(disks, slabs=1)
    keys = fill(space, 12)
    cold = [key for key in keys if space.state(key) == FLASH]
    fills: list[Any] = []
    while len(fills) < 6:
        status, begun = space.begin(key_of(99), LENGTH)
        if status == PENDING:
            fills.append(begun)
        else:
            space.tick()
    assert space.stats().extents_filling == 6
    late = space.stage_begin(cold[0], deadline_ns=1)
    patient = space.stage_begin(cold[1], key_of(12345))
    assert space.stage_collect(patient, 2)[0][:2] == (1, MISS)
    assert [a[:2] for a in space.stage_collect(late, 1)] == [(0, TIMEOUT)]
    assert lib.mkv_stage_done(late)
    assert not lib.mkv_stage_done(patient)
    space.abandon(fills.pop())
    space.settle()
    ((_, status, found),) = space.stage_collect(patient, 2)
    assert (status, space.fetch(found, cold[1])) == (HIT, payload_of(cold[1], LENGTH))
    for stage in (late, patient):
        lib.mkv_stage_free(stage)


def test_a_tick_ends_the_wait_of_those_who_ask_no_more(room: Room, disks: Disks) -> None:
    space = room.start(disks)
    (key,) = fill(space, 1)
    cool(space, key)
    space.fault(lib.MKV_FAULT_HELD, READ)
    stage = space.stage_begin(key, deadline_ns=1)
    event = lib.mkv_flash_eventfd(space.flash)
    while select.select([event], [], [], 0)[0]:
        os.read(event, 8)
    space.tick()
    assert select.select([event], [], [], 0)[0]
    assert lib.mkv_stage_done(stage)
    lib.mkv_stage_free(stage)
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert space.flash_stats().staged == 1  # the read went on


def test_a_block_deleted_while_it_is_staged_is_a_miss_and_its_extent_free_when_the_device_is_done(
    space: FlashSpace,
) -> None:
    (key,) = fill(space, 1)
    cool(space, key)
    space.fault(lib.MKV_FAULT_HELD, READ)
    stage = space.stage_begin(key)
    assert space.delete(key) == [DONE]
    assert not space.holds(key)
    space.tick(10)
    filling = space.stats().extents_filling
    assert filling == 1
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert [a[:2] for a in space.stage_collect(stage, 1)] == [(0, MISS)]
    assert space.stats().extents_filling == 0
    lib.mkv_stage_free(stage)


def test_what_cannot_be_read_or_does_not_agree_is_dropped_and_said_to_be(space: FlashSpace) -> None:
    keys = fill(space, 2)
    cool(space, *keys)
    blocks = space.flash_stats().blocks
    space.fault(lib.MKV_FAULT_ERROR, READ, error=EIO, times=1, span=(512, 1 << 60))
    assert space.stage(keys[0])[0][0] == DEVICE
    lib.mkv_flashio_fault_clear(space.io)
    space.fault(lib.MKV_FAULT_FLIP, READ, times=1, span=(512, 1 << 60))
    assert space.stage(keys[1])[0][0] == CORRUPT
    assert [status for status, _ in space.stage(*keys)] == [MISS, MISS]
    assert space.flash_stats().blocks == blocks - 2
    devices = [space.device(d) for d in range(2)]
    assert sum(d.read_errors for d in devices) == sum(d.corrupt for d in devices) == 1
    assert space.tier().dropped_corrupt == 1


def test_no_mixture_is_ever_accepted_of_an_extent_that_is_staged_into_again_and_again(room: Room) -> None:
    """Readers remember places in a DRAM of six extents, through which four dozen blocks pass; half of them
    are let go as soon as they are there. The readers take line and payload at different times, slowly, and
    accept by the rule of quarantine.c."""
    grace = 0.05
    disks = room.disks(segments=8)
    space = room.start(disks, slabs=1, grace_ns=int(grace * 1e9))
    keys = []
    for n in range(48):
        key = key_of(n)
        while space.put(key, payload_of(key, LENGTH)) == FULL:
            space.serve()
            time.sleep(grace / 8)
        keys.append(key)
    space.clean()
    known: dict[bytes, Found] = {}
    ended = threading.Event()
    accepted, refused, wrong = [0], [0], []

    def read() -> None:
        rng = random.Random(threading.get_ident())
        copy = ctypes.create_string_buffer(LENGTH)
        line = ctypes.create_string_buffer(64)
        while not ended.is_set():
            if not known:
                continue
            key, found = rng.choice(list(known.items()))
            at = space.base + space.slab_at[found.slab] + found.offset
            posted = time.monotonic()
            parts = ["line", *range(0, LENGTH, 512)]
            rng.shuffle(parts)
            pause = rng.choice([0, 0, grace / 20])
            for part in parts:
                if part == "line":
                    ctypes.memmove(line, at - 64, 64)
                else:
                    ctypes.memmove(ctypes.addressof(copy) + part, at + part, 512)
                if pause:
                    time.sleep(pause)
            own = ffi.cast("struct mkv_line *", ffi.from_buffer(line))
            agrees = bytes(ffi.buffer(own.key)) == key and own.generation & 0xFFFFFFFF == found.generation
            if agrees and time.monotonic() - posted < grace / 2:
                accepted[0] += 1
                if copy.raw != payload_of(key, LENGTH):
                    wrong.append(key)
            else:
                refused[0] += 1

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    until = time.monotonic() + 3
    rng = random.Random(1)
    hits = let_go = 0
    while time.monotonic() < until:
        key = rng.choice(keys)
        stage = space.stage_begin(key, deadline_ns=FOREVER)
        while not lib.mkv_stage_done(stage) and time.monotonic() < until:
            time.sleep(0.0005)
        for _, status, found in space.stage_collect(stage, 1):
            hits += status == HIT
            if status == HIT and rng.random() < 0.5:
                known[key] = found
            elif status == HIT:  # nobody else was told: other blocks may come here at once
                let_go += space.unstage((key, found))
        lib.mkv_stage_free(stage)
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert hits > 50
    assert let_go > 20
    assert accepted[0] > 50
    assert refused[0] > 50


def test_a_staged_block_stays_until_whoever_asked_has_had_time_to_read_it(room: Room, disks: Disks) -> None:
    """Twelve blocks are asked for, six find room at a time, and every one of them can be read."""
    space = room.start(disks, slabs=1)
    keys = fill(space, 20)
    space.tick(40)  # the reserve of the puts is forgotten
    cold = [key for key in keys if space.state(key) == FLASH][:12]
    stage = space.stage_begin(*cold)
    answered = []
    for _ in range(60):
        space.settle()
        for index, status, found in space.stage_collect(stage, len(cold)):
            assert (status, space.fetch(found, cold[index])) == (HIT, payload_of(cold[index], LENGTH))
            answered.append(index)
        space.tick()
    assert sorted(answered) == list(range(12))
    lib.mkv_stage_free(stage)


# --- letting go ---


@pytest.fixture
def scan(room: Room, disks: Disks) -> tuple[FlashSpace, list[bytes]]:
    """A DRAM of six extents, and keys of blocks that are in flash only. From now on nothing ticks, so nothing
    leaves quarantine."""
    keys = fill(space := room.start(disks), 24)
    space = room.start(disks, slabs=1, records=space.stop())
    space.serve_slabs()
    assert space.stats().extents_free in (0, 6)  # there is a slab, or will be
    return space, keys


def stage_now(space: FlashSpace, key: bytes) -> tuple[int, Found]:
    """Without a tick."""
    stage = space.stage_begin(key)
    space.serve_slabs()
    space.settle()
    answers = space.stage_collect(stage, 1)
    lib.mkv_stage_free(stage)
    return answers[0][1:] if answers else (PENDING, Found(0, 0, 0, 0))


def test_what_is_let_go_makes_room_at_once(scan: tuple[FlashSpace, list[bytes]]) -> None:
    space, keys = scan
    for key in keys:
        status, found = stage_now(space, key)
        assert (status, space.fetch(found, key)) == (HIT, payload_of(key, LENGTH))
        assert space.unstage((key, found)) == 1
        assert space.state(key) == FLASH
    assert space.stats().extents_quarantine == 0
    assert space.stats().extents_idle == 6


def test_what_is_not_let_go_does_not(scan: tuple[FlashSpace, list[bytes]]) -> None:
    space, keys = scan
    assert [stage_now(space, key)[0] for key in keys[:7]] == [HIT] * 6 + [PENDING]


def test_who_waits_for_an_extent_gets_one_that_is_let_go(scan: tuple[FlashSpace, list[bytes]]) -> None:
    space, keys = scan
    places = [(key, stage_now(space, key)[1]) for key in keys[:6]]
    waiting = space.stage_begin(keys[6], keys[7])
    space.settle()
    assert space.stage_collect(waiting, 2) == []
    assert space.unstage(*places[:2]) == 2
    space.settle()
    assert [status for _, status, _ in space.stage_collect(waiting, 2)] == [HIT, HIT]
    lib.mkv_stage_free(waiting)


def test_a_place_that_two_were_told_is_not_given_back(scan: tuple[FlashSpace, list[bytes]]) -> None:
    """Neither if the second asked after the first, nor if both waited, nor after the first has let go."""
    space, keys = scan
    first = stage_now(space, keys[0])[1]
    assert stage_now(space, keys[0])[1] == first
    assert space.unstage((keys[0], first), (keys[0], first)) == 0
    both = space.stage(keys[1], keys[1])
    assert space.unstage((keys[1], both[0][1])) == 0
    idle = stage_now(space, keys[2])[1]
    assert space.unstage((keys[2], idle)) == 1
    assert stage_now(space, keys[2])[1] == idle  # the device is not asked again
    assert space.unstage((keys[2], idle)) == 0
    remembered = [(keys[0], first), (keys[1], both[1][1]), (keys[2], idle)]
    for key in keys[3:]:  # the others would be taken before these
        status, found = stage_now(space, key)
        assert (status, space.unstage((key, found))) == (HIT, 1)
    for key, found in remembered:
        assert space.state(key) == LIVE
        assert space.fetch(found, key) == payload_of(key, LENGTH)
        assert space.extent(found)[1].tobytes() == payload_of(key, LENGTH)  # whatever the line says


def test_letting_go_of_what_one_does_not_have_does_nothing(scan: tuple[FlashSpace, list[bytes]]) -> None:
    space, keys = scan
    found = stage_now(space, keys[0])[1]
    other = stage_now(space, keys[1])[1]
    assert space.unstage((keys[0], other), (key_of(999), found), (keys[5], found)) == 0
    assert space.unstage((keys[0], replace(found, generation=found.generation + 1))) == 0
    assert space.unstage((keys[0], found), (keys[0], found)) == 1  # once
    assert space.fetch(other, keys[1]) == payload_of(keys[1], LENGTH)


def test_a_block_that_is_let_go_can_be_deleted_or_lose_its_slab(scan: tuple[FlashSpace, list[bytes]]) -> None:
    space, keys = scan
    places = [(key, stage_now(space, key)[1]) for key in keys[:3]]
    assert space.unstage(*places) == 3
    assert space.delete(keys[0]) == [DONE]
    assert space.stats().extents_free == 4
    assert space.fetch(places[0][1], keys[0]) is None
    assert lib.mkv_ns_slab_retire(space.ns, 0) == 0
    space.check()
    assert [space.fetch(found, key) for key, found in places] == [None] * 3
    space.serve()
    space.tick(10)
    space.serve()
    assert space.staged(keys[1]) == payload_of(keys[1], LENGTH)


def test_a_read_that_nobody_waits_for_any_more_leaves_an_extent_for_others(
    scan: tuple[FlashSpace, list[bytes]],
) -> None:
    space, keys = scan
    space.fault(lib.MKV_FAULT_HELD, READ)
    for key in keys[:6]:
        lib.mkv_stage_free(space.stage_begin(key))
    lib.mkv_flashio_fault_clear(space.io)
    space.settle()
    assert [stage_now(space, key)[0] for key in keys[6:12]] == [HIT] * 6


def test_a_scan_drives_out_nothing_that_is_in_use(room: Room, disks: Disks) -> None:
    space = room.start(disks, slabs=4)
    keys = fill(space, 100)
    space.tick(40)
    live = [key for key in keys if space.state(key) == LIVE]
    cold = [key for key in keys if space.state(key) == FLASH]
    space.touch(*live)
    for turn in range(300):
        key = cold[turn % len(cold)]
        status, found = space.stage(key)[0]
        assert status == HIT
        space.unstage((key, found))
        if turn % 20 == 0:
            space.tick()
    still = [key for key in live if space.state(key) == LIVE]
    assert len(still) >= len(live) - 1
