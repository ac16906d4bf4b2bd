"""From flash to DRAM: who waits, who joins, who is told what."""

from __future__ import annotations

import ctypes
import os
import random
import select
import threading
import time
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
    """Readers remember places in a DRAM of six extents, through which four dozen blocks pass. They take line
    and payload at different times, slowly, and accept by the rule of quarantine.c."""
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
    hits = 0
    while time.monotonic() < until:
        key = rng.choice(keys)
        stage = space.stage_begin(key, deadline_ns=FOREVER)
        while not lib.mkv_stage_done(stage) and time.monotonic() < until:
            time.sleep(0.0005)
        for _, status, found in space.stage_collect(stage, 1):
            hits += status == HIT
            if status == HIT:
                known[key] = found
        lib.mkv_stage_free(stage)
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert hits > 50
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
