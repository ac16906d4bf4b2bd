"""Peers with slices in GPU memory, staged through host slots, on both fabrics.

The GPU is a thread that copies (tests/gpus.py); nodes, fabrics, gets and puts are real.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import memkv.registering
from memkv.buffers import SLICE
from memkv.gpudirect.buffers import Memory
from memkv.gpudirect.copier_host import HostDevice, HostStream
from memkv.peer import Peer
from memkv.rdma.errors import DeviceError, LocalError
from memkv.status import Status
from memkv.store.native._store import ffi, lib
from memkv.store.node import NodeThread

from .gpus import SLOT, SLOTS, UNTOUCHED, GpuBlocks, Gpus, produce
from .nodes import (
    BLOCK,
    KIB,
    MIB,
    Blocks,
    Connect,
    NodeProcess,
    StartNode,
    blocks_of,
    count,
    keys_of,
    stats_of,
    until,
    within,
)

pytest_plugins = ["tests.nodes", "tests.gpus"]

HIT, MISS, STORED, EXISTS, TIMEOUT = Status.HIT, Status.MISS, Status.STORED, Status.EXISTS, Status.TIMEOUT
RING = SLOT * SLOTS["staging_slots"]


@pytest.fixture
def peer(node: NodeThread, connect: Connect, gpu: HostDevice) -> Peer:
    return connect(node, **SLOTS)


def stats(peer: Peer, way: str = "get", device: str = "cuda:0") -> dict[str, Any]:
    found: dict[str, Any] = peer.stats()["gpu"]["devices"][device][way]
    return found


def at_rest(peer: Peer) -> bool:
    """Whether all slots are free again."""
    devices = peer.stats()["gpu"]["devices"].values()
    return all(d[way]["slots_free"] == SLOTS["staging_slots"] for d in devices for way in ("get", "put"))


class Call(threading.Thread):
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.result: Any = None
        self.start()

    def run(self) -> None:
        self.result = self.call()

    def ended(self, seconds: float = 20.0) -> Any:
        self.join(seconds)
        assert not self.is_alive()
        return self.result


# --- what goes through ---


def test_what_was_put_from_a_gpu_is_got_into_one(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 32), keys_of(32)
    assert count(blocks.put(keys)) == {STORED: 32}
    assert count(blocks.put(keys)) == {EXISTS: 32}
    assert count(blocks.get(keys)) == {HIT: 32}
    assert count(blocks.get(keys, checksum=True)) == {HIT: 32}
    assert at_rest(peer)
    assert stats(peer)["bytes"] == 2 * 32 * BLOCK
    assert stats(peer, "put")["bytes"] == 2 * 32 * BLOCK
    assert stats(peer)["calls"] < 32  # neighbours are copied together


@pytest.mark.parametrize(
    "length",
    [1, 63, 64, 65, 511, 4096, SLOT // 2, SLOT - 1, SLOT, SLOT + 1, 2 * SLOT, 2 * SLOT + 64, RING - 1, RING],
)
def test_blocks_of_every_size_around_a_slot(
    start_node: StartNode, connect: Connect, gpu: HostDevice, length: int
) -> None:
    node = start_node(memory=16 * MIB, slab_bytes=4 * MIB)
    peer = connect(node, block_bytes=RING, **SLOTS)
    n = min(9, max(3, 4 * MIB // length))
    blocks, keys = GpuBlocks(peer, n, length), keys_of(n)
    assert count(blocks.put(keys)) == {STORED: n}
    assert count(blocks.get(keys, checksum=True)) == {HIT: n}
    assert at_rest(peer)


def test_slices_in_any_order_and_of_any_place(peer: Peer) -> None:
    rng = np.random.default_rng(5)
    keys = keys_of(40)
    lengths = rng.integers(1, BLOCK, 40)
    assert count(Blocks(peer, 40).put(keys)) == {STORED: 40}
    memory = np.full(40 * 2 * BLOCK, UNTOUCHED, np.uint8)
    buffer = peer.register((memory.ctypes.data, memory.nbytes, "cuda:0"))
    offsets = rng.permutation(40) * 2 * BLOCK + rng.integers(0, BLOCK, 40)
    found = np.zeros(40, np.uint32)
    status = peer.get_into(keys, buffer.slices(offsets, BLOCK), lengths=found)
    assert count(status) == {HIT: 40}
    assert set(found.tolist()) == {BLOCK}
    expected = np.full_like(memory, UNTOUCHED)
    for offset, block in zip(offsets, blocks_of(keys), strict=True):
        expected[offset : offset + BLOCK] = block
    assert np.array_equal(memory, expected)

    other = keys_of(40, seed=1)  # puts of parts of it, each of its own length
    assert count(peer.put_from(other, buffer.slices(offsets, lengths))) == {STORED: 40}
    host = Blocks(peer, 40)
    assert count(peer.get_into(other, host.slices, lengths=found)) == {HIT: 40}
    assert found.tolist() == lengths.tolist()
    for block, row, length in zip(blocks_of(keys), host.memory, lengths, strict=True):
        assert np.array_equal(row[:length], block[:length])


def test_misses_leave_their_slices_untouched(peer: Peer) -> None:
    blocks, keys, others = GpuBlocks(peer, 48), keys_of(48), keys_of(48, seed=1)
    held = np.zeros(48, np.bool_)
    held[np.random.default_rng(2).permutation(48)[:20]] = True
    assert count(Blocks(peer, 20).put(keys[held])) == {STORED: 20}
    wanted = np.where(held[:, None], keys, others)
    assert count(blocks.get(wanted)) == {HIT: 20, MISS: 28}
    assert stats(peer)["blocks"] == 20


def test_a_block_longer_than_its_slice(peer: Peer) -> None:
    keys = keys_of(3)
    assert count(Blocks(peer, 3).put(keys)) == {STORED: 3}
    blocks = GpuBlocks(peer, 3)
    short = blocks.buffer.slices(np.arange(3) * BLOCK, [BLOCK, BLOCK - 1, BLOCK])
    assert peer.get_into(keys, short).tolist() == [HIT, Status.ERROR_LENGTH, HIT]
    assert (blocks.memory[1] == UNTOUCHED).all()


def test_host_and_gpu_slices_in_one_batch(peer: Peer, gpus: Gpus) -> None:
    keys = keys_of(48)
    parts = [Blocks(peer, 16), GpuBlocks(peer, 16), GpuBlocks(peer, 16, device="cuda:1")]
    data = blocks_of(keys)
    order = np.random.default_rng(3).permutation(48)
    slices = np.concatenate([p.slices for p in parts])

    def fill(rows: Any) -> None:
        for i, part in enumerate(parts):
            part.memory[:] = rows[16 * i : 16 * (i + 1)]

    fill(data)
    sums = np.array([lib.mkv_checksum(ffi.from_buffer(b), b.nbytes) for b in data], np.uint64)
    sums[order[0]] += np.uint64(1)
    status = peer.put_from(keys[order], slices[order], checksums=sums[order])
    assert status[0] == Status.CORRUPT
    assert count(status[1:]) == {STORED: 47}
    fill(np.full_like(data, UNTOUCHED))
    status = peer.get_into(keys[order], slices[order], checksum=True)
    assert status[0] == MISS
    assert count(status[1:]) == {HIT: 47}
    data[order[0]] = UNTOUCHED
    assert np.array_equal(np.concatenate([p.memory for p in parts]), data)
    assert set(peer.stats()["gpu"]["devices"]) == set(gpus) == {"cuda:0", "cuda:1"}


def test_empty_batches(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 1), keys_of(1)
    assert len(peer.get_into(keys[:0], blocks.slices[:0])) == 0
    assert len(peer.put_from(keys[:0], blocks.slices[:0])) == 0


def test_wrong_arguments(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 2), keys_of(2)
    for call in (
        lambda: peer.get_into(keys, blocks.slices[:1]),
        lambda: peer.put_from(keys, blocks.slices[:1]),
        lambda: peer.put_from(keys, blocks.slices, checksums=np.zeros(1, np.uint64)),
        lambda: peer.submit_put(keys, blocks.slices[:1]),
        lambda: peer.register((0, 10, "cuda:0")),
        lambda: peer.register((10, 10, 0)),
        lambda: peer.get_into(keys, blocks.slices, stream="fast"),
        lambda: peer.get_into(keys, Blocks(peer, 2).slices[::-1], stream=None),
    ):
        with pytest.raises(LocalError):
            call()


def test_slices_that_are_not_in_the_buffer(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 4), keys_of(4)
    assert count(blocks.put(keys)) == {STORED: 4}
    made_up = blocks.slices.copy()
    made_up["offset"][1] = blocks.memory.nbytes - BLOCK + 1
    made_up["offset"][2] = 2**63
    expected = [HIT, Status.ERROR_BOUNDS, Status.ERROR_BOUNDS, HIT]
    assert peer.get_into(keys, made_up).tolist() == expected
    assert [EXISTS if s == HIT else s for s in expected] == peer.put_from(keys, made_up).tolist()


def test_longer_than_the_namespace_allows(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 2, 2 * BLOCK), keys_of(2)
    assert count(blocks.put(keys)) == {Status.ERROR_TOO_LARGE: 2}
    assert stats(peer, "put")["bytes"] == 0
    assert count(Blocks(peer, 2).put(keys)) == {STORED: 2}
    assert count(peer.get_into(keys, blocks.slices)) == {HIT: 2}  # into more room than any block needs


def test_blocks_that_do_not_fit_into_all_slots_are_refused(
    start_node: StartNode, connect: Connect, gpu: HostDevice
) -> None:
    node = start_node(block_bytes=1 * MIB)
    peer = connect(node, staging_slot_bytes=64 * KIB, staging_slots=15)
    with pytest.raises(LocalError, match=r"1048576 bytes do not fit .*staging_slot_bytes"):
        GpuBlocks(peer, 1)
    for wrong in ({"staging_slots": 1}, {"staging_slot_bytes": 100}, {"staging_slot_bytes": 0}):
        with pytest.raises(LocalError, match="staging_slots"):
            connect(node, **wrong)


def test_read_only_memory_of_a_gpu_can_be_put_only(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(1)
    source = blocks_of(keys)

    def resolve(buffer: Any) -> Memory:
        return Memory(source.ctypes.data, source.nbytes, False, source, device=0)

    monkeypatch.setattr(memkv.registering, "resolve", resolve)
    buffer = peer.register(object())
    assert buffer.device == "cuda:0"
    assert buffer.get_rung.name == "none"
    assert count(peer.put_from(keys, buffer.split(BLOCK))) == {STORED: 1}
    assert count(peer.get_into(keys, buffer.split(BLOCK))) == {Status.ERROR_BOUNDS: 1}


# --- overlap and order ---


def test_reads_go_on_while_earlier_blocks_are_copied(peer: Peer, gpu: HostDevice) -> None:
    blocks, keys = GpuBlocks(peer, 64), keys_of(64)
    assert count(blocks.put(keys)) == {STORED: 64}
    (node,) = peer.stats()["nodes"].values()
    before = node["hits"]
    gpu.into.hold()
    call = Call(lambda: blocks.get(keys))
    # Nothing is copied, and all slots fill.
    until(lambda: stats(peer)["slots_free"] == 0)
    per_slot = SLOT // BLOCK
    until(lambda: next(iter(peer.stats()["nodes"].values()))["hits"] - before == RING // BLOCK)
    assert gpu.into.counts[1] == 0
    assert gpu.into.counts[0] <= RING // BLOCK
    gpu.into.hold(False)
    assert count(call.ended()) == {HIT: 64}
    assert stats(peer)["transfers"] >= 64 // per_slot


def test_blocks_are_copied_while_the_node_pulls_earlier_ones(
    start_process: Callable[..., NodeProcess], connect: Connect, gpu: HostDevice
) -> None:
    node = start_process()
    peer = connect(node, **SLOTS)
    blocks, keys = GpuBlocks(peer, 64), keys_of(64)
    assert count(blocks.put(keys[:1])) == {STORED: 1}
    with node.stopped():  # it pulls nothing, and half of the slots fill: a node gets no more
        call = Call(lambda: blocks.put(keys, timeout=20))
        until(lambda: stats(peer, "put")["bytes"] == BLOCK + RING // 2)
        time.sleep(0.1)
        assert stats(peer, "put")["bytes"] == BLOCK + RING // 2
        assert stats(peer, "put")["slots_free"] == SLOTS["staging_slots"] // 2
    assert count(call.ended(30)).keys() <= {STORED, EXISTS}
    assert count(blocks.get(keys)) == {HIT: 64}


def test_small_batches_are_cut_too(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 16), keys_of(16)
    assert count(blocks.put(keys)) == {STORED: 16}
    before = stats(peer)["transfers"]
    assert count(blocks.get(keys)) == {HIT: 16}
    assert stats(peer)["transfers"] - before == 4  # of four blocks, a slot each


def test_a_put_waits_for_the_producing_stream(peer: Peer) -> None:
    theirs, keys = HostStream(), keys_of(16)
    gpu, host = GpuBlocks(peer, 8), Blocks(peer, 8)
    data = blocks_of(keys)
    theirs.hold()
    produce(theirs, gpu.memory, data[:8])
    produce(theirs, host.memory, data[8:])
    slices = np.concatenate([gpu.slices, host.slices])
    call = Call(lambda: peer.put_from(keys, slices, stream=theirs))
    time.sleep(0.2)
    assert call.is_alive()
    assert stats(peer, "put")["bytes"] == 0
    theirs.hold(False)
    assert count(call.ended()) == {STORED: 16}
    assert count(Blocks(peer, 16).get(keys)) == {HIT: 16}


def test_a_put_waits_only_for_the_work_that_was_there_when_it_was_called(peer: Peer) -> None:
    theirs, keys, blocks = HostStream(), keys_of(4), GpuBlocks(peer, 4)
    data, later = blocks_of(keys), np.zeros(BLOCK, np.uint8)
    produce(theirs, blocks.memory, data)
    ticket = peer.submit_put(keys, blocks.slices, stream=theirs)
    until(lambda: theirs.counts[1] == 1)
    theirs.hold()
    produce(theirs, later, data[0])
    until(lambda: peer.reap() == [ticket])
    assert ticket.status is not None
    assert count(ticket.status) == {STORED: 4}
    theirs.hold(False)


def test_a_get_waits_for_what_still_uses_its_slices(peer: Peer) -> None:
    theirs, keys = HostStream(), keys_of(12)
    blocks, host = GpuBlocks(peer, 6), Blocks(peer, 6)
    assert count(Blocks(peer, 12).put(keys)) == {STORED: 12}
    kept = np.zeros_like(blocks.memory)
    theirs.hold()
    produce(theirs, kept, blocks.memory)  # a consumer that reads what is there now
    call = Call(lambda: peer.get_into(keys, np.concatenate([blocks.slices, host.slices]), stream=theirs))
    time.sleep(0.2)
    assert call.is_alive()
    assert (blocks.memory == UNTOUCHED).all()
    assert not host.memory.any()
    theirs.hold(False)
    assert count(call.ended()) == {HIT: 12}
    assert (kept == UNTOUCHED).all()
    assert np.array_equal(np.concatenate([blocks.memory, host.memory]), blocks_of(keys))


def test_a_stream_that_hangs_costs_only_those_who_wait_for_it(peer: Peer) -> None:
    theirs, keys = HostStream(), keys_of(16)
    waiting, others = GpuBlocks(peer, 16), GpuBlocks(peer, 16)
    theirs.hold()
    produce(theirs, waiting.memory[:1], waiting.memory[1:2])
    call = Call(lambda: peer.put_from(keys[:8], waiting.slices[:8], stream=theirs, timeout=3.0))
    assert count(others.put(keys[8:])) == {STORED: 8}
    assert count(others.get(keys[8:])) == {HIT: 8}
    assert call.is_alive()
    assert count(call.ended(6)) == {TIMEOUT: 8}
    got = peer.get_into(keys[8:], waiting.slices[8:], stream=theirs, timeout=0.2)
    assert count(got) == {TIMEOUT: 8}
    assert count(peer.get_into(keys[8:], Blocks(peer, 8).slices, stream=theirs, timeout=0.2)) == {TIMEOUT: 8}
    assert (waiting.memory == UNTOUCHED).all()
    assert count(others.get(keys[:8])) == {MISS: 8}
    assert at_rest(peer)
    theirs.hold(False)


def test_a_stream_that_is_lost(peer: Peer) -> None:
    theirs, keys = HostStream(), keys_of(4)
    blocks, host = GpuBlocks(peer, 2), Blocks(peer, 2)
    theirs.lose(0, 700)
    produce(theirs, blocks.memory[:1], blocks.memory[1:])
    slices = np.concatenate([blocks.slices, host.slices])
    assert count(peer.put_from(keys, slices, stream=theirs)) == {Status.ERROR_COPY: 4}


def test_streams_need_a_device(node: NodeThread, connect: Connect, gpus: Gpus) -> None:
    peer = connect(node, **SLOTS)
    theirs, keys = HostStream(), keys_of(2)
    host = Blocks(peer, 2)
    with pytest.raises(LocalError, match="without a slice in GPU memory"):
        peer.put_from(keys, host.slices, stream=theirs)
    first = GpuBlocks(peer, 1)
    assert count(peer.put_from(keys, host.slices, stream=theirs)) == {STORED: 2}  # whose stream is clear
    second = GpuBlocks(peer, 1, device="cuda:1")
    both = np.concatenate([first.slices, second.slices])
    with pytest.raises(LocalError, match="a batch for each device"):
        peer.get_into(keys, both, stream=theirs)
    assert count(peer.get_into(keys, both)) == {HIT: 2}


# --- deadlines and errors ---


def test_a_copy_under_way_is_waited_for_beyond_the_deadline(peer: Peer, gpu: HostDevice) -> None:
    blocks, keys = GpuBlocks(peer, 32), keys_of(32)
    assert count(blocks.put(keys)) == {STORED: 32}
    gpu.into.hold()
    call = Call(lambda: blocks.get(keys, timeout=0.5))
    time.sleep(1.5)
    assert call.is_alive()  # its slices are still being written
    gpu.into.hold(False)
    status = call.ended()
    assert count(status) == {HIT: 16, TIMEOUT: 16}  # what found a slot, and what did not
    assert at_rest(peer)
    assert count(blocks.get(keys)) == {HIT: 32}


def test_a_put_whose_copies_are_late(peer: Peer, gpu: HostDevice) -> None:
    blocks, keys = GpuBlocks(peer, 32), keys_of(32)
    gpu.out.hold()
    call = Call(lambda: blocks.put(keys, timeout=0.5))
    time.sleep(1.0)
    assert call.is_alive()  # the device still reads the slices
    gpu.out.hold(False)
    assert count(call.ended()) == {TIMEOUT: 32}
    assert count(peer.exists(keys)) == {MISS: 32}
    assert count(blocks.put(keys)) == {STORED: 32}


def test_no_time_at_all(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 32), keys_of(32)
    assert count(blocks.put(keys, timeout=0)) == {TIMEOUT: 32}
    assert count(blocks.put(keys)) == {STORED: 32}
    assert count(blocks.get(keys, timeout=0)) == {TIMEOUT: 32}
    assert at_rest(peer)


@pytest.mark.parametrize("way", ["get", "put"])
def test_a_copy_that_is_refused_costs_its_own_key(
    peer: Peer, gpu: HostDevice, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    blocks, keys = GpuBlocks(peer, 24), keys_of(24)
    if way == "get":
        assert count(blocks.put(keys)) == {STORED: 24}
    stream = gpu.into if way == "get" else gpu.out
    slices = blocks.slices[::-1].copy()  # no two are neighbours on both sides
    blocks.memory[:] = blocks_of(keys)[::-1] if way == "put" else UNTOUCHED
    stream.refuse(5, 1)
    with caplog.at_level(logging.ERROR, "memkv.peer"):
        status = (peer.get_into if way == "get" else peer.put_from)(keys, slices)
    assert count(status) == {(HIT if way == "get" else STORED): 23, Status.ERROR_COPY: 1}
    assert "1 blocks could not be copied" in caplog.text
    assert "error 1 of the stand-in" in stats(peer, way)["last_error"]
    assert stats(peer, way)["errors"] == 1
    if way == "get":
        good = (status == HIT)[::-1]
        assert np.array_equal(blocks.memory[good], blocks_of(keys)[::-1][good])
        assert (blocks.memory[~good] == UNTOUCHED).all()
    else:
        assert count(Blocks(peer, 24).get(keys)) == {HIT: 23, MISS: 1}
    assert at_rest(peer)


@pytest.mark.parametrize("way", ["get", "put"])
def test_a_device_that_is_lost(peer: Peer, gpu: HostDevice, way: str) -> None:
    blocks, keys = GpuBlocks(peer, 24), keys_of(24)
    assert count(blocks.put(keys[:12])) == {STORED: 12}
    stream = gpu.into if way == "get" else gpu.out
    stream.lose(0, 700)
    status = blocks.get(keys[:12]) if way == "get" else blocks.put(keys[12:])
    assert count(status) == {Status.ERROR_COPY: 12}
    assert at_rest(peer)
    host = Blocks(peer, 24)
    assert count(host.get(keys)) == {HIT: 12, MISS: 12}  # nothing wrong was kept, and the rest goes on
    stream.lose(0, 0)
    assert count(blocks.put(keys)).keys() == {STORED, EXISTS}
    assert count(blocks.get(keys)) == {HIT: 24}


def test_what_the_driver_refuses_when_registering(
    node: NodeThread, connect: Connect, gpu: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = connect(node, **SLOTS)

    def refuse(*_: Any) -> None:
        raise DeviceError("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (2)", 12)

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "pin", refuse)
        with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
            GpuBlocks(peer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "lane", refuse)
        with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
            GpuBlocks(peer, 1)
    assert not gpu.pinned
    assert count(GpuBlocks(peer, 1).put(keys_of(1))) == {STORED: 1}


def test_memory_that_was_freed_while_it_was_registered(peer: Peer, gpu: HostDevice) -> None:
    blocks, keys = GpuBlocks(peer, 4), keys_of(4)
    blocks.buffer.allocation_id = gpu.allocations[blocks.buffer.address] = 17
    assert count(blocks.put(keys)) == {STORED: 4}
    gpu.allocations[blocks.buffer.address] = 18
    assert count(blocks.get(keys)) == {Status.ERROR_BOUNDS: 4}
    assert count(peer.put_from(keys, blocks.slices)) == {Status.ERROR_BOUNDS: 4}


def test_a_machine_without_cuda_says_so(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU here")
    with pytest.raises(DeviceError, match="cuda:0 cannot be used"):
        peer.register((1 << 20, 1 << 20, "cuda:0"))
    assert "gpu" not in peer.stats()


# --- nodes that fail ---


def test_a_node_that_hangs_costs_its_own_keys_only(
    start_process: Callable[..., NodeProcess], connect: Connect, gpu: HostDevice
) -> None:
    nodes = [start_process(), start_process()]
    peer = connect(*nodes, **SLOTS)
    keys = keys_of(64)
    (_, here), (_, there) = peer._parts(keys)
    assert here is not None
    assert there is not None
    good, hung = GpuBlocks(peer, len(here)), GpuBlocks(peer, len(there))
    assert count(good.put(keys[here][:1])) == {STORED: 1}
    with nodes[1].stopped():
        slow = Call(lambda: hung.put(keys[there], timeout=1.5))
        time.sleep(0.1)
        with within(1.3):
            assert count(good.put(keys[here])) == {STORED: len(here) - 1, EXISTS: 1}
        status = slow.ended()
    assert not set(count(status)) & {STORED, EXISTS}
    assert count(good.get(keys[here])) == {HIT: len(here)}


def test_a_node_that_is_down(
    start_process: Callable[..., NodeProcess], connect: Connect, gpu: HostDevice
) -> None:
    nodes = [start_process(), start_process()]
    peer = connect(*nodes, **SLOTS)
    blocks, keys = GpuBlocks(peer, 32), keys_of(32)
    assert count(blocks.put(keys)) == {STORED: 32}
    (_, here), (_, there) = peer._parts(keys)
    nodes[1].kill()
    until(lambda: sum(n["up"] for n in peer.stats()["nodes"].values()) == 1)
    status = blocks.get(keys)
    assert here is not None
    assert there is not None
    assert count(status[here]) == {HIT: len(here)}
    assert not set(count(status[there])) & {HIT, MISS}
    nodes[1].start()
    until(lambda: all(n["up"] for n in peer.stats()["nodes"].values()))
    assert count(blocks.put(keys)) == {STORED: len(there), EXISTS: len(here)}  # slots are offered anew


# --- buffers and peers that go ---


def test_closing_a_buffer_waits_for_copies(peer: Peer, gpu: HostDevice) -> None:
    blocks, keys = GpuBlocks(peer, 8), keys_of(8)
    assert count(blocks.put(keys)) == {STORED: 8}
    gpu.into.hold()
    call = Call(lambda: blocks.get(keys))
    until(lambda: gpu.into.counts[0])
    closing = Call(blocks.buffer.close)
    time.sleep(0.2)
    assert closing.is_alive()
    gpu.into.hold(False)
    closing.ended()
    assert count(call.ended()) == {HIT: 8}
    assert count(peer.get_into(keys, blocks.slices)) == {Status.ERROR_BOUNDS: 8}
    assert count(peer.put_from(keys, blocks.slices)) == {Status.ERROR_BOUNDS: 8}
    assert peer.stats()["gpu"]["buffers"] == []
    assert count(GpuBlocks(peer, 8).get(keys)) == {HIT: 8}


@pytest.mark.parametrize("way", ["get", "put"])
def test_closing_the_peer_waits_for_copies(
    node: NodeThread, connect: Connect, gpu: HostDevice, way: str
) -> None:
    peer = connect(node, **SLOTS)
    blocks, keys = GpuBlocks(peer, 32), keys_of(32)
    if way == "get":
        assert count(blocks.put(keys)) == {STORED: 32}
    stream = gpu.into if way == "get" else gpu.out
    before = stream.counts[0]
    stream.hold()
    call = Call(lambda: blocks.get(keys) if way == "get" else blocks.put(keys))
    until(lambda: stream.counts[0] > before)
    closing = Call(peer.close)
    time.sleep(0.3)
    assert closing.is_alive()
    assert gpu.pinned
    stream.hold(False)
    closing.ended()
    assert len(call.ended()) == 32
    assert not gpu.pinned
    blocks.buffer.close()
    with pytest.raises(LocalError, match="closed"):
        blocks.get(keys)
    with pytest.raises(LocalError, match="closed"):
        blocks.put(keys)
    with pytest.raises(LocalError, match="closed"):
        peer.register((4096, 4096, "cuda:0"))


def test_closing_gives_everything_back(
    start_process: Callable[..., NodeProcess], connect: Connect, gpu: HostDevice
) -> None:
    node = start_process()

    def once() -> None:
        peer = connect(node, **SLOTS)
        blocks, keys = GpuBlocks(peer, 8), keys_of(8)
        assert count(blocks.put(keys)).keys() <= {STORED, EXISTS}
        assert count(blocks.get(keys, stream=HostStream())) == {HIT: 8}
        domains = [peer._get_domain, peer._put_domain]
        peer.close()
        assert not any(d.regions or d.endpoints for d in domains)  # type: ignore[attr-defined]

    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    once()
    before = until(state)
    for _ in range(3):
        once()
    until(lambda: all(a <= b for a, b in zip(state(), before, strict=True)), what="files and threads")
    assert not gpu.pinned


# --- threads and loops ---


def test_threads_at_once(peer: Peer) -> None:
    keys = keys_of(64)
    failures: list[BaseException] = []

    def worker(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            blocks = GpuBlocks(peer, 16) if seed % 4 else Blocks(peer, 16)
            for _ in range(8):
                some = keys[rng.permutation(64)[: rng.integers(1, 17)]]
                assert count(blocks.put(some)).keys() <= {STORED, EXISTS}
                assert count(blocks.get(some, checksum=bool(rng.integers(2)))) == {HIT: len(some)}
            blocks.buffer.close()
        except BaseException as exc:
            failures.append(exc)

    workers = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert not failures
    assert at_rest(peer)


def test_asyncio(node: NodeThread, connect: Connect, gpu: HostDevice) -> None:
    peer = connect(node, **SLOTS)
    keys = keys_of(32)

    async def worker(seed: int) -> None:
        rng = np.random.default_rng(seed)
        blocks = GpuBlocks(peer, 8)
        for _ in range(4):
            some = keys[rng.permutation(32)[:8]]
            blocks.memory[:] = blocks_of(some)
            put = await peer.aio.put_from(some, blocks.slices, stream=HostStream())
            assert count(put).keys() <= {STORED, EXISTS}
            blocks.memory[:] = UNTOUCHED
            status = await peer.aio.get_into(some, blocks.slices, checksum=True)
            assert count(status) == {HIT: 8}
            blocks.check(some, status)

    async def main() -> None:
        await asyncio.gather(*(worker(i) for i in range(8)))

    asyncio.run(main())


def test_cancelling_leaves_the_batch_to_itself(peer: Peer, gpu: HostDevice) -> None:
    blocks, keys = GpuBlocks(peer, 8), keys_of(8)
    assert count(blocks.put(keys)) == {STORED: 8}
    blocks.memory[:] = UNTOUCHED

    async def main() -> None:
        gpu.into.hold()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.aio.get_into(keys, blocks.slices), 0.2)
        gpu.into.hold(False)

    asyncio.run(main())
    until(lambda: np.array_equal(blocks.memory, blocks_of(keys)))
    assert until(lambda: at_rest(peer))


def test_tickets(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 32), keys_of(32)
    blocks.memory[:] = blocks_of(keys)
    put = peer.submit_put(keys, blocks.slices, tag="put", stream=HostStream())
    assert select.select([peer.fileno()], [], [], 10)[0]
    assert peer.reap() == [put]
    assert put.status is not None
    assert count(put.status) == {STORED: 32}
    blocks.memory[:] = UNTOUCHED
    gets = [peer.submit_get(keys[i::4], blocks.slices[i::4].copy(), tag=i) for i in range(4)]
    done: list[Any] = []
    until(lambda: done.extend(peer.reap()) or len(done) == 4)
    assert all(count(t.status) == {HIT: 8} for t in gets)
    assert np.array_equal(blocks.memory, blocks_of(keys))


# --- what is shown ---


def test_rungs_and_bytes_are_shown(peer: Peer, node: NodeThread) -> None:
    assert "gpu" not in peer.stats()
    host = Blocks(peer, 1)
    assert (host.buffer.device, host.buffer.get_rung.name) == ("cpu", "host")
    blocks, keys = GpuBlocks(peer, 4), keys_of(4)
    assert count(blocks.put(keys)) == {STORED: 4}
    assert count(blocks.get(keys)) == {HIT: 4}
    found = peer.stats()["gpu"]
    (shown,) = found["buffers"]
    assert shown["device"] == "cuda:0"
    assert shown["nbytes"] == 4 * BLOCK
    for way in ("get", "put"):
        assert shown[way]["rung"] == "staged"
        assert shown[way]["reason"]
        assert found["devices"]["cuda:0"][way]["bytes"] == 4 * BLOCK
    assert found["devices"]["cuda:0"]["staging_bytes"] == RING
    until(lambda: stats_of(node)["touches"] >= 4)  # gets into a GPU keep blocks alive like any other


def test_slices_have_the_same_type_everywhere(peer: Peer) -> None:
    blocks = GpuBlocks(peer, 2)
    assert blocks.slices.dtype == SLICE
    with pytest.raises(LocalError, match="beyond the buffer"):
        blocks.buffer.slices([BLOCK + 1], BLOCK)
