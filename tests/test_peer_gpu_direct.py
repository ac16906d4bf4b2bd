"""Peers whose GPU memory the fabric reaches, wholly or one way only, on both fabrics.

The "GPU" is the stand-in of tests/gpus.py, whose memory is registered as what it is: a NIC that writes into
a GPU's memory is not to be had here, all around it is.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memkv.gpudirect.copier_host import STAGED, HostDevice, HostStream
from memkv.gpudirect.ladder import Decision, Rung
from memkv.peer import Peer
from memkv.rdma.errors import LocalError, NotRegistered
from memkv.status import Status
from memkv.store.native._store import ffi, lib
from memkv.store.node import NodeThread

from .gpus import SLOTS, UNTOUCHED, GpuBlocks, Gpus, produce
from .nodes import BLOCK, Blocks, Connect, blocks_of, count, keys_of

pytest_plugins = ["tests.nodes", "tests.gpus"]

HIT, MISS, STORED, EXISTS, TIMEOUT = Status.HIT, Status.MISS, Status.STORED, Status.EXISTS, Status.TIMEOUT
DMA_BUF = Rung("dma-buf", "READs arrive whole")
DIRECT = Decision(DMA_BUF, DMA_BUF)


class Verifying(HostDevice):
    """A stand-in that computes checksums; ``spoil`` says how many it finds wrong."""

    spoil = 0

    def unverifiable(self) -> str:
        return ""

    def verify(self, address: Any, length: Any, expected: Any) -> npt.NDArray[np.bool_]:
        found = [
            lib.mkv_checksum(ffi.cast("void *", a), n)
            for a, n in zip(address.tolist(), length.tolist(), strict=True)
        ]
        agreed = np.array(found, np.uint64) == expected
        assert agreed.all()
        agreed[: self.spoil] = False
        return agreed


@pytest.fixture
def peer(node: NodeThread, connect: Connect, gpu: HostDevice) -> Peer:
    gpu.decision = DIRECT
    return connect(node, **SLOTS)


def staged_bytes(peer: Peer) -> tuple[int, int]:
    """Bytes staged on the way in and out."""
    ways = peer.stats()["gpu"]["devices"].get("cuda:0", {})
    return tuple(ways[way]["bytes"] if way in ways else 0 for way in ("get", "put"))  # type: ignore[return-value]


@pytest.mark.parametrize("get_rung", [DMA_BUF, STAGED])
@pytest.mark.parametrize("put_rung", [DMA_BUF, STAGED])
def test_each_direction_has_a_rung_of_its_own(
    node: NodeThread, connect: Connect, gpu: HostDevice, get_rung: Rung, put_rung: Rung
) -> None:
    gpu.decision = Decision(get_rung, put_rung)
    peer = connect(node, **SLOTS)
    blocks, keys = GpuBlocks(peer, 16), keys_of(16)
    assert (blocks.buffer.get_rung, blocks.buffer.put_rung) == (get_rung, put_rung)
    assert count(blocks.put(keys)) == {STORED: 16}
    assert count(blocks.get(keys)) == {HIT: 16}
    assert gpu.flushes == (get_rung is DMA_BUF)  # once a batch
    nbytes = 16 * BLOCK
    assert staged_bytes(peer) == (nbytes * (get_rung is STAGED), nbytes * (put_rung is STAGED))
    (shown,) = peer.stats()["gpu"]["buffers"]
    assert shown["get"] == {"rung": get_rung.name, "reason": get_rung.reason}
    assert shown["put"] == {"rung": put_rung.name, "reason": put_rung.reason}


def test_host_direct_and_staged_slices_in_one_batch(peer: Peer, gpus: Gpus) -> None:
    keys = keys_of(48)
    data = blocks_of(keys)
    parts = [Blocks(peer, 16), GpuBlocks(peer, 16), GpuBlocks(peer, 16, device="cuda:1")]
    assert [p.buffer.get_rung.name for p in parts] == ["host", "dma-buf", "staged"]
    for i, part in enumerate(parts):
        part.memory[:] = data[16 * i : 16 * (i + 1)]
    order = np.random.default_rng(1).permutation(48)
    slices = np.concatenate([p.slices for p in parts])[order]
    assert count(peer.put_from(keys[order], slices)) == {STORED: 48}
    for part in parts:
        part.memory[:] = UNTOUCHED
    found = np.zeros(48, np.uint32)
    assert count(peer.get_into(keys[order], slices, lengths=found)) == {HIT: 48}
    assert set(found.tolist()) == {BLOCK}
    assert np.array_equal(np.concatenate([p.memory for p in parts]), data)
    assert gpus.first.flushes == 1
    assert gpus.open("cuda:1").flushes == 0


def test_nothing_is_flushed_where_nothing_arrived(peer: Peer, gpu: HostDevice) -> None:
    assert count(GpuBlocks(peer, 4).get(keys_of(4))) == {MISS: 4}
    assert gpu.flushes == 0


def test_registering_that_fails_goes_one_rung_down(
    node: NodeThread, connect: Connect, gpu: HostDevice, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.decision = DIRECT

    def refuse(*_: Any) -> Any:
        raise NotRegistered("rxe0 did not register 4096 bytes of GPU memory", 95)

    gpu.acquire = refuse  # type: ignore[method-assign]
    peer = connect(node, **SLOTS)
    with caplog.at_level(logging.WARNING, "memkv.peer"):
        blocks, keys = GpuBlocks(peer, 4), keys_of(4)
    assert "dma-buf of cuda:0: rxe0 did not register" in caplog.text
    for rung in (blocks.buffer.get_rung, blocks.buffer.put_rung):
        assert rung.name == "staged"
        assert "rxe0 did not register" in rung.reason
    assert count(blocks.put(keys)) == {STORED: 4}
    assert count(blocks.get(keys)) == {HIT: 4}


def test_a_registration_that_fails_half_way_leaves_nothing(
    node: NodeThread, connect: Connect, gpu: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.decision = replace(DIRECT, put=STAGED)
    peer = connect(node, **SLOTS)
    regions = len(peer._get_domain.regions)

    def fail(*_: Any) -> Any:
        raise LocalError("no pinned memory")

    monkeypatch.setattr(gpu, "pin", fail)
    with pytest.raises(LocalError, match="no pinned memory"):
        GpuBlocks(peer, 4)
    assert len(peer._get_domain.regions) == regions
    assert not peer._buffers


def test_checksums_are_verified_on_the_device(
    node: NodeThread, connect: Connect, gpus: Gpus, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = gpus["cuda:0"] = Verifying("cuda:0")
    gpu.decision = DIRECT
    peer = connect(node, checksum=True, **SLOTS)
    blocks, keys = GpuBlocks(peer, 8), keys_of(8)
    others = keys_of(8, seed=1)
    assert count(blocks.put(keys)) == {STORED: 8}
    assert count(blocks.get(keys)) == {HIT: 8}
    assert count(blocks.get(np.where(np.arange(8)[:, None] % 2, keys, others))) == {HIT: 4, MISS: 4}
    gpu.spoil = 3
    wanted = np.where(np.arange(8)[:, None] % 2, keys, others)
    status = peer.get_into(wanted, blocks.slices)
    assert status.tolist() == [MISS, Status.CORRUPT] * 3 + [MISS, HIT]
    assert count(peer.get_into(keys, blocks.slices, checksum=False)) == {HIT: 8}
    gpu.spoil = 0

    def fail(*_: Any) -> Any:
        raise RuntimeError("NVRTC is not there")

    gpu.verify = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR, "memkv.peer"):
        assert count(peer.get_into(keys, blocks.slices)) == {Status.ERROR_COPY: 8}
    assert "NVRTC is not there" in caplog.text


def test_where_the_device_cannot_verify(node: NodeThread, connect: Connect, gpu: HostDevice) -> None:
    gpu.decision = DIRECT
    peer = connect(node, **SLOTS)
    blocks, keys = GpuBlocks(peer, 2), keys_of(2)
    assert count(blocks.put(keys)) == {STORED: 2}
    with pytest.raises(LocalError, match="no kernels"):
        blocks.get(keys, checksum=True)
    always = connect(node, checksum=True, **SLOTS)
    blocks = GpuBlocks(always, 2)
    assert blocks.buffer.get_rung.name == "staged"
    assert "checksums are to be verified" in blocks.buffer.get_rung.reason
    assert blocks.buffer.put_rung.name == "dma-buf"
    assert count(blocks.get(keys)) == {HIT: 2}


def test_streams_are_waited_for(peer: Peer) -> None:
    theirs, blocks, keys = HostStream(), GpuBlocks(peer, 8), keys_of(8)
    data = blocks_of(keys)
    theirs.hold()
    produce(theirs, blocks.memory, data)
    results: list[Any] = []
    call = threading.Thread(
        target=lambda: results.append(peer.put_from(keys, blocks.slices, stream=theirs)), daemon=True
    )
    call.start()
    time.sleep(0.2)
    assert not results
    assert count(peer.exists(keys)) == {MISS: 8}
    assert count(peer.get_into(keys, blocks.slices, stream=theirs, timeout=0.1)) == {TIMEOUT: 8}
    theirs.hold(False)
    call.join(20)
    assert count(results[0]) == {STORED: 8}
    assert count(blocks.get(keys, stream=theirs)) == {HIT: 8}


def test_memory_that_was_freed_while_it_was_registered(peer: Peer, gpu: HostDevice) -> None:
    blocks, keys = GpuBlocks(peer, 4), keys_of(4)
    assert count(blocks.put(keys)) == {STORED: 4}
    gpu.freed.add(blocks.buffer.address)
    assert count(peer.get_into(keys, blocks.slices)) == {Status.ERROR_BOUNDS: 4}
    assert count(peer.put_from(keys, blocks.slices)) == {Status.ERROR_BOUNDS: 4}
    assert (blocks.memory == blocks_of(keys)).all()


def test_closing_withdraws_it(peer: Peer) -> None:
    blocks, keys = GpuBlocks(peer, 4), keys_of(4)
    assert count(blocks.put(keys)) == {STORED: 4}
    blocks.buffer.close()
    assert count(peer.get_into(keys, blocks.slices)) == {Status.ERROR_BOUNDS: 4}
    assert count(peer.put_from(keys, blocks.slices)) == {Status.ERROR_BOUNDS: 4}
    assert not peer._put_domain.regions
    assert count(Blocks(peer, 4).get(keys)) == {HIT: 4}


def test_no_slots_are_made_where_none_are_needed(peer: Peer, gpu: HostDevice) -> None:
    GpuBlocks(peer, 4)
    assert not gpu.pinned
    assert peer.stats()["gpu"]["devices"] == {}
