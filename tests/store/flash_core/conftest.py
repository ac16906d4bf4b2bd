"""Disks and nodes that are closed in the end, after a look at whether all is in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from memkv.store.native._store import ffi, lib

from ..flashes import Disks, FlashSpace


class Room:
    """Makes disks and spaces, and closes them."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def disks(self, devices: int = 2, segments: int = 8, segment_bytes: int = 32768) -> Disks:
        disks = Disks(devices, segments, segment_bytes)
        self.made.append(disks)
        return disks

    def start(self, disks: Disks, **kwargs: Any) -> FlashSpace:
        space = FlashSpace(disks, **kwargs)
        self.made.append(space)
        space.serve()
        return space


@pytest.fixture
def room() -> Iterator[Room]:
    room = Room()
    yield room
    for made in reversed(room.made):
        if isinstance(made, FlashSpace) and made.ns != ffi.NULL:
            lib.mkv_flashio_fault_clear(made.io)
            made.settle()
            made.check()
        made.close()


@pytest.fixture
def disks(room: Room) -> Disks:
    return room.disks()


@pytest.fixture
def space(room: Room, disks: Disks) -> FlashSpace:
    return room.start(disks)
