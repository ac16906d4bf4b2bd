"""GPU memory where there is no GPU: host memory, copied by the stand-in of gpudirect/copier_host.py.

A test module says ``pytest_plugins = ["tests.nodes", "tests.gpus"]`` and then has the fixture ``gpu``.

PYTEST_DONT_REWRITE: tests import this module before pytest takes it as a plugin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import memkv.gpu
from memkv.gpudirect import driver
from memkv.gpudirect.copier_host import HostDevice
from memkv.gpudirect.native._copier import ffi, lib
from memkv.peer import Peer
from memkv.status import Status

from .nodes import BLOCK, KIB, blocks_of

SLOT = 256 * KIB
SLOTS: dict[str, Any] = {"staging_slot_bytes": SLOT, "staging_slots": 4}  # of a peer: small, to be filled
UNTOUCHED = 0xA5


class Gpus(dict[str, HostDevice]):
    """The devices of this machine, by name; a peer opens one when it registers memory there."""

    def open(self, name: str) -> HostDevice:
        return self.setdefault(name, HostDevice(name))

    @property
    def first(self) -> HostDevice:
        return self.open("cuda:0")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    found = Gpus()
    monkeypatch.setattr(driver, "in_use", lambda: False)  # a real GPU's driver knows host memory as such
    monkeypatch.setattr(memkv.gpu, "open_device", found.open)
    return found


@pytest.fixture
def gpu(gpus: Gpus) -> HostDevice:
    return gpus.first


class GpuBlocks:
    """Memory of a "GPU" for n blocks that is registered with a peer, to put from and to get into."""

    def __init__(self, peer: Peer, n: int, length: int = BLOCK, device: str = "cuda:0") -> None:
        self.peer = peer
        self.length = length
        self.memory = np.full((n, length), UNTOUCHED, np.uint8)
        self.buffer = peer.register((self.memory.ctypes.data, self.memory.nbytes, device))
        self.slices = self.buffer.split(length)

    def put(self, keys: npt.NDArray[np.uint8], **options: Any) -> npt.NDArray[np.uint8]:
        """Puts the blocks of these keys: statuses."""
        self.memory[: len(keys)] = blocks_of(keys, self.length)
        return self.peer.put_from(keys, self.slices[: len(keys)], **options)

    def get(self, keys: npt.NDArray[np.uint8], **options: Any) -> npt.NDArray[np.uint8]:
        """Gets these keys: statuses. A HIT that is not the key's block, and a slice that was touched although
        its key is none, fail the test.
        """
        self.memory[:] = UNTOUCHED
        status = self.peer.get_into(keys, self.slices[: len(keys)], **options)
        self.check(keys, status)
        return status

    def check(self, keys: npt.NDArray[np.uint8], status: npt.NDArray[np.uint8]) -> None:
        hits = status == Status.HIT
        assert np.array_equal(self.memory[: len(keys)][hits], blocks_of(keys[hits], self.length))
        assert (self.memory[: len(keys)][~hits] == UNTOUCHED).all()
        assert (self.memory[len(keys) :] == UNTOUCHED).all()


def produce(stream: Any, into: npt.NDArray[np.uint8], data: npt.NDArray[np.uint8]) -> None:
    """An application's work on its stream: writes ``data`` into "GPU" memory."""
    stream.kept = [*getattr(stream, "kept", ()), into, data]  # the stream may get there late
    driver = ffi.new("struct mkv_copy_driver *")
    lib.mkv_copy_host(driver)
    assert driver.copy(into.ctypes.data, data.ctypes.data, data.nbytes, ffi.cast("void *", stream.ptr)) == 0
