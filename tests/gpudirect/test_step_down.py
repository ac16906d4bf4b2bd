"""The same calls of a peer, whatever the rung: everything of memkv is real here, from libcuda's functions
down to the NIC, except libcuda itself (see standin.c) and what it stands for.

Over soft-RoCE the kernel refuses to register a real dma-buf of that memory, and everything steps down to
staging. Since the memory is this host's after all, it can be registered by its address, as nvidia-peermem
makes a GPU's fit for: that is the direct path over real verbs.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect import driver, ladder, probe
from memkv.gpudirect.slabs import Slabs
from memkv.peer import Peer
from memkv.rdma import devices
from memkv.status import Status
from memkv.store.node import NodeThread

from .. import udmabuf
from ..nodes import BLOCK, Connect, blocks_of, count, keys_of
from .standin import Standin
from .test_arrays import CudaArray

pytest_plugins = ["tests.nodes"]

N = 24
SLOTS = {"staging_slot_bytes": 256 << 10, "staging_slots": 4}


@pytest.fixture(autouse=True)
def capable(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    for which in (driver.DMA_BUF_SUPPORTED, driver.GPU_DIRECT_RDMA_SUPPORTED):
        standin.attribute(which, 1)
    monkeypatch.setattr(ladder, "WORTH", 0.0)  # timings of a busy machine decide nothing here


class Blocks:
    """N blocks in the middle of an allocation on the stand-in's second device."""

    def __init__(self, standin: Standin, peer: Peer) -> None:
        self.pointer = standin.alloc((N + 2) * BLOCK, device=1)
        self.buffer = peer.register(CudaArray(self.pointer + BLOCK + 512, (N * BLOCK,), "|u1"))
        self.slices = self.buffer.split(BLOCK)
        self.peer = peer

    @property
    def all(self) -> npt.NDArray[np.uint8]:
        view = (ctypes.c_uint8 * ((N + 2) * BLOCK)).from_address(self.pointer)
        return np.frombuffer(view, np.uint8)

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        return self.all[BLOCK + 512 : BLOCK + 512 + N * BLOCK].reshape(N, BLOCK)

    def round_trip(self) -> None:
        """Puts, wipes, gets; nothing around the blocks may change."""
        keys = keys_of(N)
        self.all[:] = 0xEE
        self.bytes[:] = blocks_of(keys)
        assert count(self.peer.put_from(keys, self.slices, stream=0x77)) == {Status.STORED: N}
        self.bytes[:] = 0
        assert count(self.peer.get_into(keys, self.slices, stream=0x77)) == {Status.HIT: N}
        assert np.array_equal(self.bytes, blocks_of(keys))
        assert (self.all[: BLOCK + 512] == 0xEE).all()
        assert (self.all[BLOCK + 512 + N * BLOCK :] == 0xEE).all()


def rungs(blocks: Blocks) -> tuple[str, str]:
    return blocks.buffer.get_rung.name, blocks.buffer.put_rung.name


def test_without_anything_better_blocks_are_staged(
    node: NodeThread, connect: Connect, standin: Standin
) -> None:
    blocks = Blocks(standin, connect(node, **SLOTS))

    assert blocks.buffer.device == "cuda:1"
    assert rungs(blocks) == ("staged", "staged")
    assert blocks.buffer.get_rung.reason
    blocks.round_trip()
    said = standin.log()
    assert any(s.startswith("htod") for s in said)
    assert any(s.startswith("dtoh") for s in said)
    assert said.count("record on 0x77") >= 2, "the stream is waited for each way"


def test_memory_that_no_nic_can_be_given_is_staged_with_the_reason(
    node: NodeThread, connect: Connect, standin: Standin
) -> None:
    peer = connect(node, **SLOTS)
    pointer = standin.alloc(4 * BLOCK)
    standin.set(pointer, "pool", 99)
    standin.set(pointer, "rdma", 0)
    buffer = peer.register(CudaArray(pointer, (4 * BLOCK,), "|u1"))
    assert buffer.put_rung.name == "staged"
    if peer.stats()["fabric"]["fabric"] == "verbs":
        assert "cudaMallocAsync" in buffer.put_rung.reason


def test_memory_that_was_freed_is_refused_at_the_next_batch(
    node: NodeThread, connect: Connect, standin: Standin
) -> None:
    blocks = Blocks(standin, connect(node, **SLOTS))
    blocks.round_trip()
    standin.free(blocks.pointer)
    for call in (blocks.peer.get_into, blocks.peer.put_from):
        assert count(call(keys_of(N), blocks.slices)) == {Status.ERROR_BOUNDS: N}


def test_slabs_are_registered_with_a_peer_once(node: NodeThread, connect: Connect, standin: Standin) -> None:
    peer = connect(node, **SLOTS)
    slabs = Slabs(0, slab_bytes=8 << 20, register=peer.register)
    first, second = slabs.take(4 * BLOCK), slabs.take(4 * BLOCK)
    assert first.buffer is second.buffer
    keys = keys_of(4)
    at = np.arange(4) * BLOCK
    view = np.frombuffer((ctypes.c_uint8 * (4 * BLOCK)).from_address(first.address), np.uint8)
    view.reshape(4, BLOCK)[:] = blocks_of(keys)
    assert count(peer.put_from(keys, first.slices(at, BLOCK))) == {Status.STORED: 4}
    assert count(peer.get_into(keys, second.slices(at, BLOCK))) == {Status.HIT: 4}
    got = ctypes.string_at(second.address, 4 * BLOCK)
    assert got == view.tobytes()
    first.close()
    second.close()
    slabs.close()


# --- real verbs ---


@pytest.fixture
def verbs() -> str:
    if not devices.names():
        pytest.skip("no RDMA device here: run the tests under script/softroce")
    return "verbs"


@pytest.mark.verbs
@pytest.mark.parametrize("fabric_name", ["verbs"])
def test_a_real_dma_buf_is_refused_by_the_kernel_and_the_same_calls_are_staged(
    verbs: str, fabric_name: str, node: NodeThread, connect: Connect, standin: Standin, monkeypatch: Any
) -> None:
    if why := udmabuf.missing():
        pytest.skip(why)
    if devices.probe(devices.names()[0]).dma_buf:
        pytest.skip("this device may take dma-bufs")
    asked: list[ladder.Answers] = []

    def believing(fabric: Any, device: int, *more: Any) -> ladder.Answers:
        """Asks as if the NIC had said that it takes dma-bufs, so that one is really tried."""
        monkeypatch.setattr(probe, "_nics", lambda f: (ladder.Nic("rxe0", "rxe", True),))
        asked.append(probe.ask(fabric, device, *more))
        return asked[-1]

    monkeypatch.setattr("memkv.gpudirect.copier_cuda.ask", believing)
    blocks = Blocks(standin, connect(node, **SLOTS))

    (answers,) = asked
    assert answers.dma_buf.export.ok, "a real dma-buf was made"
    assert answers.dma_buf.register.errno == errno.EOPNOTSUPP
    assert rungs(blocks) == ("staged", "staged")
    for rung in (blocks.buffer.get_rung, blocks.buffer.put_rung):
        assert "takes no dma-buf" in rung.reason
        assert "(EOPNOTSUPP)" in rung.reason
    blocks.round_trip()


@pytest.mark.verbs
@pytest.mark.parametrize("fabric_name", ["verbs"])
def test_by_address_blocks_go_straight_into_and_out_of_that_memory(
    verbs: str, fabric_name: str, node: NodeThread, connect: Connect, standin: Standin, monkeypatch: Any
) -> None:
    monkeypatch.setattr(probe, "peermem", lambda: "loaded")
    standin.attribute(driver.GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS, driver.FLUSH_HOST)
    blocks = Blocks(standin, connect(node, checksum=False, **SLOTS))

    assert rungs(blocks) == ("peermem", "peermem")
    standin.log()
    blocks.round_trip()
    said = standin.log()
    assert not any(s.startswith(("htod", "dtoh")) for s in said), "no copy"
    assert said.count("flush 0 100 in 0xc1") == 1, "once a batch, in its own context"
    assert said.count("record on 0x77") == 2

    standin.free(blocks.pointer)
    assert count(blocks.peer.get_into(keys_of(N), blocks.slices)) == {Status.ERROR_BOUNDS: N}
