"""Slabs: space that is cut up and joined again, memory that is registered once, blocks that streams still
use."""

from __future__ import annotations

import random
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from memkv.gpudirect import driver
from memkv.gpudirect.buffers import resolve
from memkv.gpudirect.slabs import GRAIN, UNIT, Slab, Slabs, Space
from memkv.rdma.errors import DeviceError, LocalError

from .standin import Standin

MIB = 1 << 20

# --- space ---


@pytest.mark.parametrize("seed", range(20))
def test_space_against_a_model(seed: int) -> None:
    """A map of grains, each free or some block's: nothing overlaps, and all is one stretch again at the
    end."""
    rng = random.Random(seed)
    total = 8 * MIB
    space, owner, blocks = Space(total), np.zeros(total // GRAIN, np.int64), dict[int, tuple[int, int]]()
    for step in range(1, 400):
        if blocks and rng.random() < 0.45:
            start, (first, n) = rng.choice(list(blocks.items()))
            assert (owner[first : first + n] == owner[first]).all()
            owner[first : first + n] = 0
            space.give(start)
            del blocks[start]
            continue
        nbytes = rng.choice([1, 511, 512, 4096, 70_000, MIB, rng.randrange(1, 3 * MIB)])
        at = space.take(nbytes)
        if at is None:
            continue
        n = -(-nbytes // GRAIN)
        assert at % min(UNIT, 1 << (n * GRAIN - 1).bit_length()) == 0
        assert at + n * GRAIN <= total
        assert not owner[at // GRAIN : at // GRAIN + n].any(), "handed out twice"
        owner[at // GRAIN : at // GRAIN + n] = step
        blocks[at] = at // GRAIN, n
        assert space.free_bytes == int((owner == 0).sum()) * GRAIN
    for start in list(blocks):
        space.give(start)
    assert space.empty
    assert space.take(total) == 0, "not joined"


def test_space_that_is_cut_up_fits_what_fits() -> None:
    space = Space(4 * GRAIN)
    a, b, c, d = (space.take(GRAIN) for _ in range(4))
    assert (a, b, c, d) == (0, 512, 1024, 1536)
    assert space.take(1) is None
    for each in (a, c):
        assert each is not None
        space.give(each)
    assert space.take(2 * GRAIN) is None
    space.give(512)
    assert space.take(2 * GRAIN) == 0


def test_misuse_of_space() -> None:
    space = Space(MIB)
    space.take(100)
    for wrong in (512, 1):
        with pytest.raises(LocalError, match="no block begins"):
            space.give(wrong)
    space.give(0)
    with pytest.raises(LocalError):
        space.give(0)
    with pytest.raises(LocalError, match="0 bytes"):
        space.take(0)
    assert space.take(MIB + 1) is None


# --- slabs ---


class Registered:
    def __init__(self, slab: Slab) -> None:
        self.memory = resolve(slab)
        self.asked: Any = None
        self.closed = False

    def slices(self, offsets: Any, lengths: Any) -> Any:
        self.asked = offsets.tolist(), lengths
        return self.asked

    def close(self) -> None:
        self.closed = True


def test_a_slab_is_registered_once_and_blocks_are_parts_of_it(standin: Standin) -> None:
    made: list[Registered] = []
    slabs = Slabs(1, slab_bytes=3 * MIB, register=lambda s: made.append(Registered(s)) or made[-1])
    a, b = slabs.take(MIB), slabs.take(1000)

    (only,) = made
    assert only.memory.device == 1
    assert only.memory.nbytes == 4 * MIB, "whole units of 2 MiB"
    assert only.memory.reason == ""
    assert a.buffer is b.buffer is only
    assert (b.address, b.offset) == (only.memory.address + MIB, MIB)
    assert resolve(b).allocation == (only.memory.address, 4 * MIB)
    assert b.slices([0, 500], 500) == ([MIB, MIB + 500], 500)
    with pytest.raises(LocalError, match="beyond the block's 1000 bytes"):
        b.slices([501], 500)
    with pytest.raises(LocalError, match="beyond"):
        b.slices([2**64 - 1], 1)
    a.close()
    b.close()
    slabs.close()
    assert only.closed


def test_large_blocks_get_a_slab_of_their_own_and_the_limit_holds(standin: Standin) -> None:
    slabs = Slabs(slab_bytes=2 * MIB, limit=8 * MIB)
    big = slabs.take(5 * MIB)
    assert slabs.nbytes == 6 * MIB
    small = slabs.take(MIB)  # in the rest of the big one
    assert slabs.nbytes == 6 * MIB
    with pytest.raises(DeviceError, match="over the limit"):
        slabs.take(3 * MIB)
    small.close()
    big.close()
    assert slabs.take(6 * MIB).offset == 0


def test_a_block_is_reused_when_its_stream_has_come_so_far(standin: Standin) -> None:
    slabs = Slabs(slab_bytes=2 * MIB, limit=2 * MIB)
    block = slabs.take(2 * MIB)
    standin.hold(True)
    block.close(stream=7)
    assert "record on 0x7" in standin.log()
    with pytest.raises(DeviceError):
        slabs.take(MIB)
    with pytest.raises(LocalError, match="streams that use them"):
        slabs.close()
    standin.hold(False)
    slabs.take(MIB).close()
    slabs.close()
    assert standin.log().count("free") == 1


def test_a_closed_block_has_no_address(standin: Standin) -> None:
    slabs = Slabs(slab_bytes=2 * MIB)
    block = slabs.take(512)
    block.close()
    block.close()
    with pytest.raises(LocalError, match="closed"):
        block.address  # noqa: B018
    with pytest.raises(LocalError, match="closed"):
        block.slices([0], 1)


def test_a_slab_that_cannot_be_registered_is_given_back(standin: Standin) -> None:
    def refuse(slab: Slab) -> None:
        raise DeviceError("no", 12)

    slabs = Slabs(slab_bytes=2 * MIB, register=refuse)
    with pytest.raises(DeviceError):
        slabs.take(512)
    assert slabs.nbytes == 0
    assert "free" in standin.log()
    standin.fail("cuMemAlloc", 2)
    with pytest.raises(driver.DriverError, match="cuMemAlloc"):
        slabs.take(512)


def test_only_plain_device_memory_is_asked_for(standin: Standin) -> None:
    Slabs(slab_bytes=2 * MIB).take(512)
    assert f"alloc {2 * MIB}" in standin.log()


# --- CuPy ---


def test_a_block_becomes_a_cupy_array_that_does_not_own_it(
    standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the few names of CuPy that are used; the real one is tried on a GPU machine."""
    seen: dict[str, Any] = {}

    def unowned(pointer: int, size: int, owner: object, device_id: int = -1) -> Any:
        seen.update(pointer=pointer, size=size, owner=owner, device=device_id)
        return "memory"

    def array(shape: Any, dtype: Any, memptr: Any) -> Any:
        return SimpleNamespace(shape=shape, dtype=dtype, nbytes=int(np.prod(shape)) * dtype.itemsize)

    cupy: Any = ModuleType("cupy")
    cupy.ndarray = array
    cupy.cuda = SimpleNamespace(UnownedMemory=unowned, MemoryPointer=lambda m, o: (m, o))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    block = Slabs(1, slab_bytes=2 * MIB).take(4096)

    made = block.array((32, 64), "float16")

    assert made.nbytes == 4096
    assert seen == {"pointer": block.address, "size": 4096, "owner": block, "device": 1}
    assert block.array().shape == (4096,)
    with pytest.raises(LocalError, match="do not fit"):
        block.array((32, 64), "float32")


def test_without_cupy_the_way_out_is_named(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(LocalError, match=r"torch\.as_tensor"):
        Slabs(slab_bytes=2 * MIB).take(512).array()


def test_without_cuda_there_are_no_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so.1")
    with pytest.raises(driver.DriverMissing):
        Slabs()
