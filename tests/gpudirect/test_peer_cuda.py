"""Peers over memkv's own CUDA device and libcuda's stand-in, on both fabrics: the ladder is asked, steps down
from a real dma-buf where there is one, and the same calls go through slots instead.

The stand-in's memory is this host's, its copies are done when the call returns (standin.c).
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect import probe
from memkv.gpudirect.ladder import Answers, Nic, Read, Step, Tried
from memkv.gpudirect.slabs import Slabs
from memkv.peer import Peer
from memkv.rdma import devices
from memkv.rdma.errors import DeviceError, LocalError
from memkv.status import Status
from memkv.store.node import NodeThread

from .. import udmabuf
from ..gpus import SLOTS
from ..nodes import BLOCK, MIB, Blocks, Connect, blocks_of, count, keys_of, until
from .standin import Standin

pytest_plugins = ["tests.nodes"]

HIT, MISS, STORED, EXISTS, TIMEOUT = Status.HIT, Status.MISS, Status.STORED, Status.EXISTS, Status.TIMEOUT


class Array:
    """An array on the "GPU", as CuPy, torch and Numba show theirs."""

    def __init__(self, standin: Standin, n: int, length: int = BLOCK, offset: int = 0) -> None:
        self.nbytes = n * length
        self.pointer = standin.alloc(self.nbytes + offset) + offset
        raw = (ctypes.c_uint8 * self.nbytes).from_address(self.pointer)
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(raw, np.uint8).reshape(n, length)
        self.__cuda_array_interface__ = {
            "shape": (n, length),
            "typestr": "|u1",
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }


@pytest.fixture
def peer(node: NodeThread, connect: Connect, standin: Standin) -> Peer:
    standin.attribute(124, 1)  # dma-bufs can be exported
    standin.attribute(116, 1)  # GPUDirect RDMA
    return connect(node, **SLOTS)


def round_trip(peer: Peer, array: Array, **options: Any) -> None:
    """Puts from an array and gets into it."""
    buffer = peer.register(array)
    keys = keys_of(len(array.memory), seed=array.pointer % 1000)
    slices = buffer.split(BLOCK)
    array.memory[:] = blocks_of(keys)
    assert count(peer.put_from(keys, slices, **options)) == {STORED: len(keys)}
    array.memory[:] = 0
    assert count(peer.get_into(keys, slices, **options)) == {HIT: len(keys)}
    assert np.array_equal(array.memory, blocks_of(keys))
    array.memory[:] = 0
    assert count(peer.get_into(keys, slices, checksum=buffer.get_rung.name == "staged")) == {HIT: len(keys)}
    assert np.array_equal(array.memory, blocks_of(keys))


def test_arrays_are_staged_where_the_fabric_does_not_reach_them(
    peer: Peer, standin: Standin, fabric_name: str
) -> None:
    array = Array(standin, 16, offset=512)
    round_trip(peer, array)
    (shown,) = peer.stats()["gpu"]["buffers"]
    assert shown["device"] == "cuda:0"
    for way in ("get", "put"):
        assert shown[way]["rung"] == "staged"
        expected = "the tcp fabric reaches host memory only" if fabric_name == "tcp" else "rxe0"
        assert expected in shown[way]["reason"]
    peer.close()
    log = "\n".join(standin.log())
    assert log.count("host_register") == log.count("host_unregister") == 2
    assert "stream 1" in log  # not blocking with respect to the legacy default stream
    assert "synchronize" not in log
    assert standin.depth == 0


@pytest.mark.verbs
@pytest.mark.parametrize("fabric_name", ["verbs"], indirect=True)
def test_a_real_dma_buf_that_the_nic_does_not_take_is_staged(
    node: NodeThread, connect: Connect, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe is made to promise what the kernel then refuses: the step down happens when registering."""
    if why := udmabuf.missing():
        pytest.skip(why)
    read = Read(True, 10.0, "")
    tried = Tried(Step(True), Step(True), read, read)
    promised = Answers(
        fabric="verbs",
        cuda="12.4",
        gpu="Stand-in 0 (cuda:0)",
        gpu_dma_buf=True,
        gpu_direct=True,
        ordering=100,
        nics=(Nic("rxe0", "rxe", True),),
        dma_buf=tried,
        host=read,
    )
    monkeypatch.setattr("memkv.gpudirect.copier_cuda.ask", lambda fabric, device: promised)
    peer = connect(node, **SLOTS)
    array = Array(standin, 16)
    round_trip(peer, array)
    assert any(line.startswith("export") for line in standin.log())  # the dma-buf was there
    (shown,) = peer.stats()["gpu"]["buffers"]
    for way in ("get", "put"):
        assert shown[way]["rung"] == "staged"
        assert "failed in use" in shown[way]["reason"]
        assert "takes no dma-buf" in shown[way]["reason"]


@pytest.mark.verbs
@pytest.mark.parametrize("fabric_name", ["verbs"], indirect=True)
def test_memory_that_the_nic_does_reach(
    node: NodeThread, connect: Connect, standin: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peermem rung: the stand-in's memory can be registered by its address without any module."""
    if not devices.names():
        pytest.skip("no RDMA device here")
    standin.attribute(116, 1)
    standin.attribute(117, 1)  # a flush by the host is possible …
    standin.attribute(118, 0)  # … and needed
    monkeypatch.setattr(probe, "peermem", lambda: "loaded")
    peer = connect(node, **SLOTS)
    array = Array(standin, 16, offset=4096 + 512)
    standin.log()
    round_trip(peer, array)
    log = standin.log()
    (shown,) = peer.stats()["gpu"]["buffers"]
    taken = {way: shown[way]["rung"] for way in ("get", "put")}
    assert set(taken.values()) <= {"peermem", "staged"}  # by what was measured
    if taken["get"] == "peermem":
        assert sum(line.startswith("flush") for line in log) >= 2
        with pytest.raises(LocalError, match="no CuPy"):
            peer.get_into(keys_of(16), peer._buffers[shown["id"]].split(BLOCK), checksum=True)


def test_memory_that_no_nic_may_be_given_is_staged_with_the_reason(peer: Peer, standin: Standin) -> None:
    array = Array(standin, 4)
    standin.set(array.pointer, "managed", 1)
    round_trip(peer, array)
    (shown,) = peer.stats()["gpu"]["buffers"]
    assert shown["get"]["rung"] == "staged"


def test_pointers_with_and_without_their_device(peer: Peer, standin: Standin) -> None:
    array = Array(standin, 4)
    for given in ((array.pointer, array.nbytes), (array.pointer, array.nbytes, "cuda:0")):
        assert peer.register(given).device == "cuda:0"
    with pytest.raises(LocalError, match="memory of cuda:0, not cuda:1"):
        peer.register((array.pointer, array.nbytes, "cuda:1"))
    host = np.zeros(BLOCK, np.uint8)
    assert peer.register((host.ctypes.data, host.nbytes)).device == "cpu"
    with pytest.raises(LocalError, match="memory of cpu, not cuda:0"):
        peer.register((host.ctypes.data, host.nbytes, "cuda:0"))


def test_slabs_of_memkv_s_own(peer: Peer, standin: Standin) -> None:
    slabs = Slabs(0, register=peer.register)
    block = slabs.take(4 * BLOCK)
    keys = keys_of(4)
    assert count(Blocks(peer, 4).put(keys)) == {STORED: 4}
    slices = block.slices(np.arange(4) * BLOCK, BLOCK)
    assert count(peer.get_into(keys, slices)) == {HIT: 4}
    assert ctypes.string_at(block.address, 4 * BLOCK) == blocks_of(keys).tobytes()
    block.close()


def test_streams_are_asked_and_never_synchronised(peer: Peer, standin: Standin) -> None:
    array, keys = Array(standin, 8), keys_of(8)
    array.memory[:] = blocks_of(keys)
    buffer = peer.register(array)
    assert count(peer.put_from(keys[:4], buffer.split(BLOCK)[:4])) == {STORED: 4}
    standin.log()
    standin.hold(True)
    results: list[Any] = []
    call = threading.Thread(
        target=lambda: results.append(peer.put_from(keys, buffer.split(BLOCK), stream=0x1234)), daemon=True
    )
    call.start()
    call.join(0.2)
    assert call.is_alive()
    log = standin.log()
    assert "record on 0x1234" in log
    assert not any(line.startswith("dtoh") for line in log)
    standin.hold(False)
    call.join(20)
    assert count(results[0]) == {STORED: 4, EXISTS: 4}
    assert not any("synchronize" in line for line in standin.log())


def test_what_the_driver_refuses(peer: Peer, standin: Standin) -> None:
    array, keys = Array(standin, 8), keys_of(8)
    array.memory[:] = blocks_of(keys)
    buffer = peer.register(array)
    slices = buffer.split(BLOCK)
    assert count(peer.put_from(keys, slices)) == {STORED: 8}
    standin.fail("htod", 801)
    assert count(peer.get_into(keys, slices)) == {Status.ERROR_COPY: 8}
    assert "CUDA_ERROR_NOT_SUPPORTED" in peer.stats()["gpu"]["devices"]["cuda:0"]["get"]["last_error"]
    standin.fail("htod", 0)
    standin.fail("cuEventRecord", 801)  # then the copies are waited for at once
    assert count(peer.get_into(keys, slices)) == {Status.ERROR_COPY: 8}
    assert any(line.startswith("synchronize") for line in standin.log())
    standin.fail("cuEventRecord", 0)
    assert count(peer.get_into(keys, slices)) == {HIT: 8}


def test_an_array_that_was_freed_under_its_registration(peer: Peer, standin: Standin) -> None:
    array, keys = Array(standin, 4), keys_of(4)
    assert count(Blocks(peer, 4).put(keys)) == {STORED: 4}
    buffer = peer.register(array)
    assert count(peer.get_into(keys, buffer.split(BLOCK))) == {HIT: 4}
    standin.set(array.pointer, "id", 4711)
    assert count(peer.get_into(keys, buffer.split(BLOCK))) == {Status.ERROR_BOUNDS: 4}
    assert count(peer.put_from(keys, buffer.split(BLOCK))) == {Status.ERROR_BOUNDS: 4}


def test_two_devices(peer: Peer, standin: Standin) -> None:
    first, second = Array(standin, 4), Array(standin, 4)
    standin.set(second.pointer, "device", 1)
    buffers = [peer.register(a) for a in (first, second)]
    assert [b.device for b in buffers] == ["cuda:0", "cuda:1"]
    keys = keys_of(8)
    data = blocks_of(keys)
    first.memory[:], second.memory[:] = data[:4], data[4:]
    slices = np.concatenate([b.split(BLOCK) for b in buffers])
    assert count(peer.put_from(keys, slices)) == {STORED: 8}
    first.memory[:] = second.memory[:] = 0
    assert count(peer.get_into(keys, slices)) == {HIT: 8}
    assert np.array_equal(np.concatenate([first.memory, second.memory]), data)
    until(lambda: set(peer.stats()["gpu"]["devices"]) == {"cuda:0", "cuda:1"})


def test_a_device_that_there_is_not(peer: Peer) -> None:
    with pytest.raises((LocalError, DeviceError), match="cuda:7"):
        peer.register((MIB, MIB, "cuda:7"))
