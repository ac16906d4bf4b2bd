"""Puts that are acknowledged when they are on flash: the put job over a device that may refuse or hang."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv.rdma import jobs
from memkv.store.native._store import ffi, lib

from ..raw import keys_of
from ..test_putjob import BLOCK, FakeChannel, Room

pytestmark = pytest.mark.asan


class FlashRoom(Room):
    """A room over one device of 4 MiB."""

    def __init__(self, file: Path, places: int = 61) -> None:
        super().__init__(2)
        file.write_bytes(bytes(4 << 20))
        self.io: Any = lib.mkv_flashio_new(16, 0)
        assert lib.mkv_flashio_device(self.io, os.open(file, os.O_RDWR)) == 0
        self.flash: Any = lib.mkv_flash_new(self.io, 7, 1, 1 << 30)
        assert lib.mkv_flash_device(self.flash, 0, 99) == 0
        assert lib.mkv_ns_flash_attach(self.ns, self.flash, 1) == 0
        segment = ffi.new("struct mkv_segment *", {"epoch": 1, "payload": BLOCK})
        segment.bytes = places * (4096 + BLOCK)
        assert lib.mkv_ns_segment_add(self.ns, segment, 0) >= 0
        self.take_slab()

    def close(self) -> None:
        lib.mkv_flashio_fault_clear(self.io)
        lib.mkv_putjob_free(self.job)
        lib.mkv_ns_free(self.ns)
        lib.mkv_flash_free(self.flash)
        lib.mkv_flashio_free(self.io)
        lib.mkv_arena_free(self.arena)
        self.memory.close()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[FlashRoom]:
    made = FlashRoom(tmp_path / "disk")
    yield made
    made.close()


def hold(room: FlashRoom, op: int) -> None:
    fault = ffi.new("struct mkv_fault *", {"kind": lib.MKV_FAULT_HELD, "op": op, "device": 0})
    assert lib.mkv_flashio_fault(room.io, fault) == 0


def durable(room: FlashRoom, n: int) -> set[int]:
    return {lib.mkv_ns_durable(room.ns, key.tobytes()) for key in keys_of(*range(n))}


def test_a_durable_put_is_acknowledged_when_it_is_on_stable_media(room: FlashRoom) -> None:
    status = room.start(FakeChannel(room.memory), 12, 5, durable=1)
    jobs.run([room.job])
    assert set(status) == {lib.MKV_STORED}
    assert durable(room, 12) == {lib.MKV_DONE}
    again = room.start(FakeChannel(room.memory), 12, 5, durable=1)
    jobs.run([room.job])
    assert set(again) == {lib.MKV_EXISTS}


@pytest.mark.parametrize("op", [lib.MKV_IO_WRITE, lib.MKV_IO_FLUSH])
def test_a_durable_put_waits_for_write_and_flush_and_its_block_is_there_meanwhile(
    room: FlashRoom, op: int
) -> None:
    hold(room, op)
    status = room.start(FakeChannel(room.memory), 3, 5, durable=1)
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((int(room.stats().blocks), int(status.any())))
        lib.mkv_flashio_fault_clear(room.io)

    threading.Timer(0.1, look).start()
    jobs.run([room.job])
    assert seen == [(3, 0)]
    assert set(status) == {lib.MKV_STORED}


def test_a_durable_put_that_is_not_durable_in_time_says_so_and_leaves_its_block(room: FlashRoom) -> None:
    hold(room, lib.MKV_IO_WRITE)
    status = room.start(FakeChannel(room.memory), 12, 0.1, durable=1)
    jobs.run([room.job])
    assert set(status) == {lib.MKV_TIMEOUT}
    assert room.stats().blocks == 8  # as many as there are places


def test_a_durable_put_that_cannot_be_written_is_an_error_of_the_device(room: FlashRoom) -> None:
    lib.mkv_flash_device_fail(room.flash, 0)
    status = room.start(FakeChannel(room.memory), 3, 5, durable=1)
    jobs.run([room.job])
    assert set(status) == {lib.MKV_ERROR_DEVICE}
    assert room.stats().blocks == 3


def test_a_durable_put_of_more_than_flash_holds_is_durable_block_by_block(tmp_path: Path) -> None:
    """None of them makes room for the next before it has been on stable media itself."""
    room = FlashRoom(tmp_path / "disk", places=3)
    lib.mkv_ns_segment_denied(room.ns, BLOCK)
    status = room.start(FakeChannel(room.memory), 40, 20, durable=1)
    jobs.run([room.job])
    assert set(status) == {lib.MKV_STORED}
    room.close()


def test_a_block_deleted_before_it_was_durable_is_not_acknowledged(room: FlashRoom) -> None:
    hold(room, lib.MKV_IO_WRITE)
    status = room.start(FakeChannel(room.memory), 1, 5, durable=1)
    gone = ffi.new("uint8_t *")
    threading.Timer(0.1, lib.mkv_ns_delete, [room.ns, keys_of(0).tobytes(), 1, gone]).start()
    jobs.run([room.job])
    assert set(status) == {lib.MKV_MISS}
