"""What each method of a peer promises, on both fabrics."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import memkv
from memkv import touches
from memkv.buffers import SLICE
from memkv.peer import Peer
from memkv.rdma.errors import DeadlineError, DeviceError, LocalError, MemKVError
from memkv.status import Status
from memkv.store import messages as m
from memkv.store.native._store import ffi, lib
from memkv.store.node import NodeThread

from .nodes import (
    BLOCK,
    GRACE,
    KIB,
    MIB,
    Blocks,
    Connect,
    NodeProcess,
    StartNode,
    address_of,
    blocks_of,
    count,
    file_descriptors,
    keys_of,
    stats_of,
    until,
    within,
)

pytest_plugins = "tests.nodes"

HIT, MISS, STORED, EXISTS, DONE = Status.HIT, Status.MISS, Status.STORED, Status.EXISTS, Status.DONE


def only(peer: Peer) -> dict[str, Any]:
    """The counters of a peer of one node."""
    (entry,) = peer.stats()["nodes"].values()
    counters: dict[str, Any] = entry
    return counters


def checksums_of(blocks: Any) -> Any:
    return np.array([lib.mkv_checksum(ffi.from_buffer(b), b.nbytes) for b in blocks], np.uint64)


# --- connecting ---


def test_closing_gives_everything_back(start_process: Callable[..., NodeProcess], connect: Connect) -> None:
    node = start_process()

    def once() -> None:
        with memkv.connect(address_of(node), "test", fabric=node.settings["fabric"], secret=b"") as peer:
            blocks = Blocks(peer, 8)
            assert count(blocks.put(keys_of(8))).keys() <= {STORED, EXISTS}
            assert count(blocks.get(keys_of(8))) == {HIT: 8}
            domains = [peer._get_domain, peer._put_domain]
        assert not any(d.regions or d.endpoints for d in domains)  # type: ignore[attr-defined]

    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    once()  # what is loaded once and stays
    gc.collect()  # what earlier tests have left to it
    files, names = file_descriptors(), {t.name for t in threading.enumerate()}
    before = until(tasks)
    for _ in range(3):
        once()
    assert {t.name for t in threading.enumerate()} == names
    until(lambda: file_descriptors() <= files, what="the files are closed")
    until(lambda: tasks() <= before, what="threads of the C core have ended")
    until(lambda: node.status()["sessions"] == 0, what="the node has no session left")
    assert node.stats()["sessions"] == 0


def test_closing_twice_is_closing_once(peer: Peer) -> None:
    peer.close()
    peer.close()


def test_a_closed_peer_says_so(peer: Peer) -> None:
    blocks = Blocks(peer, 1)
    peer.close()
    keys = keys_of(1)
    for call in (
        lambda: blocks.get(keys),
        lambda: blocks.put(keys),
        lambda: peer.match(keys),
        lambda: peer.exists(keys),
        lambda: peer.pin(keys, 1),
        lambda: peer.delete(keys),
        lambda: peer.touch(keys),
        lambda: peer.register(bytearray(10)),
        lambda: peer.submit_get(keys, blocks.slices),
        lambda: peer.submit_put(keys, blocks.slices),
        lambda: peer.node_stats(),
    ):
        with pytest.raises(LocalError, match="closed"):
            call()
    blocks.buffer.close()


def test_a_namespace_is_made_only_if_that_is_wanted(node: NodeThread, connect: Connect) -> None:
    with pytest.raises(MemKVError, match="no namespace other"):
        connect(node, namespace="other", create=False)
    connect(node, namespace="other", block_bytes=4096)
    connect(node, namespace="other", create=False)
    with pytest.raises(MemKVError, match="block_bytes 4096, not 8192"):
        connect(node, namespace="other", block_bytes=8192)


def test_what_connecting_refuses(node: NodeThread, connect: Connect) -> None:
    for nodes in ([], ["a:1", "a:1"]):
        with pytest.raises(LocalError, match="nodes"):
            memkv.connect(nodes, "test")
    with pytest.raises(LocalError, match="there is no fabric"):
        connect(node, fabric="carrier pigeon")


@pytest.mark.parametrize("fabric_name", ["tcp"], indirect=True)
def test_a_fabric_that_the_node_does_not_offer(node: NodeThread, connect: Connect) -> None:
    with pytest.raises(MemKVError, match=r"not verbs \(memkv-node serve --fabric\)"):
        connect(node, fabric="verbs")


def test_the_fabric_and_its_reason_are_shown(node: NodeThread, connect: Connect, fabric_name: str) -> None:
    fabric = connect(node, fabric="auto").stats()["fabric"]
    assert fabric["fabric"] == fabric_name
    assert fabric["reason"]


# --- registering ---


def test_a_registered_bytearray_cannot_be_resized_under_us(peer: Peer) -> None:
    data = bytearray(4096)
    buffer = peer.register(data)
    with pytest.raises(BufferError):
        data.extend(b"x")
    buffer.close()
    data.extend(b"x")


def test_every_kind_of_memory_can_be_put_and_got(peer: Peer) -> None:
    size = 8 * KIB
    mapped = mmap.mmap(-1, size)
    raw = (ctypes.c_char * size)()
    kinds: dict[str, Any] = {
        "numpy": np.zeros(size // 4, np.float32),
        "matrix": np.zeros((2, size // 2), np.uint8),
        "bytearray": bytearray(size),
        "mmap": mapped,
        "memoryview": memoryview(bytearray(size)),
        "pointer": (ctypes.addressof(raw), size),
    }
    for i, memory in enumerate(kinds.values()):
        keys = keys_of(2, seed=i)
        buffer = peer.register(memory)
        assert buffer.nbytes == size
        ctypes.memmove(buffer.address, blocks_of(keys, size // 2).tobytes(), size)
        assert count(peer.put_from(keys, buffer.split(size // 2))) == {STORED: 2}
        ctypes.memset(buffer.address, 0, size)
        assert count(peer.get_into(keys, buffer.split(size // 2))) == {HIT: 2}
        assert ctypes.string_at(buffer.address, size) == blocks_of(keys, size // 2).tobytes()
        buffer.close()


def test_read_only_memory_can_be_put_only(peer: Peer) -> None:
    keys = keys_of(1)
    source = peer.register(blocks_of(keys).tobytes())
    assert count(peer.put_from(keys, source.split(BLOCK))) == {STORED: 1}
    assert count(peer.get_into(keys, source.split(BLOCK))) == {Status.ERROR_BOUNDS: 1}
    assert count(Blocks(peer, 1).get(keys)) == {HIT: 1}


def test_memory_that_is_refused(peer: Peer) -> None:
    class Device:
        __cuda_array_interface__ = {"shape": (1,)}  # noqa: RUF012

    for memory, why in (
        (Device(), "GPU"),
        ([1, 2, 3], "a list has no memory"),
        ("text", "a str has no memory"),
        (np.zeros((4, 4), np.uint8)[:, 1], "contiguous"),
        (bytearray(), "empty"),
        ((0, 10), "positive"),
        ((10, -1), "positive"),
        ((1, 2, 3), "pointer, size"),
    ):
        with pytest.raises(LocalError, match=why):
            peer.register(memory)


@pytest.mark.parametrize("fabric_name", [pytest.param("verbs", marks=pytest.mark.verbs)], indirect=True)
def test_memory_that_is_not_mapped_is_refused_by_the_device(peer: Peer) -> None:
    with pytest.raises(DeviceError, match="mapped and readable"):
        peer.register((4096, 4096))
    assert not peer._buffers


def test_slices_lie_inside_the_buffer(peer: Peer) -> None:
    buffer = peer.register(bytearray(1000))
    slices = buffer.slices([0, 900], [10, 100])
    assert slices.dtype == SLICE
    assert slices["offset"].tolist() == [0, 900]
    assert slices["length"].tolist() == [10, 100]
    assert set(slices["region"].tolist()) == {buffer.id}
    assert len(buffer.slices([], 10)) == 0
    assert buffer.slices(5, 10)["offset"].tolist() == [5]
    assert buffer.split(300)["offset"].tolist() == [0, 300, 600]
    assert len(buffer.split(1001)) == 0
    for offsets, lengths in (([0, 901], 100), ([1001], 0), ([2**63], 2**63), ([-1], 1), ([0], 2**40)):
        with pytest.raises(LocalError):
            buffer.slices(offsets, lengths)
    for block_bytes in (0, -1):
        with pytest.raises(LocalError):
            buffer.split(block_bytes)


def test_a_buffer_that_was_closed_is_out_of_bounds(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 4), keys_of(4)
    assert count(blocks.put(keys[:2])) == {STORED: 2}
    blocks.buffer.close()
    blocks.buffer.close()
    assert count(peer.put_from(keys[2:], blocks.slices[:2])) == {Status.ERROR_BOUNDS: 2}
    assert count(peer.get_into(keys[:2], blocks.slices[:2])) == {Status.ERROR_BOUNDS: 2}
    assert count(Blocks(peer, 4).get(keys)) == {HIT: 2, MISS: 2}


# --- arguments ---


def test_keys_of_other_shapes_are_refused(peer: Peer) -> None:
    blocks = Blocks(peer, 2)
    keys: Any
    for keys in (
        np.zeros((2, 15), np.uint8),
        np.zeros((2, 16), np.int8),
        np.zeros(32, np.uint8),
        [b"x" * 15, b"y"],
    ):
        with pytest.raises(LocalError):
            peer.get_into(keys, blocks.slices)
        with pytest.raises(LocalError):
            peer.put_from(keys, blocks.slices)
        with pytest.raises(LocalError):
            peer.match(keys)
    for keys in (["a" * 16], [1, 2]):
        with pytest.raises(LocalError):
            peer.match(keys)


def test_slices_of_other_shapes_are_refused(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 4), keys_of(2)
    slices: Any
    for slices in (blocks.slices[:1], blocks.slices[::2][:2], np.zeros((2, 16), np.uint8), [1, 2], None):
        with pytest.raises(LocalError):
            peer.put_from(keys, slices)
        if slices is not None:
            with pytest.raises(LocalError):
                peer.get_into(keys, slices)


def test_keys_as_a_list_of_bytes(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 3), keys_of(3)
    blocks.memory[:] = blocks_of(keys)
    assert count(peer.put_from([bytes(k) for k in keys], blocks.slices)) == {STORED: 3}
    assert peer.match([bytes(k) for k in keys]) == 3
    assert peer.match(tuple(bytearray(k) for k in keys)) == 3
    assert count(blocks.get(keys)) == {HIT: 3}
    assert count(blocks.get(np.asfortranarray(keys))) == {HIT: 3}


def test_empty_batches(peer: Peer) -> None:
    blocks, none = Blocks(peer, 1), keys_of(0)
    slices = blocks.slices[:0]
    keys: Any
    for keys in (none, []):
        assert len(peer.put_from(keys, slices)) == 0
        assert len(peer.get_into(keys, slices)) == 0
        assert len(peer.exists(keys)) == 0
        assert peer.match(keys) == 0
        assert len(peer.pin(keys, 1)) == len(peer.unpin(keys)) == len(peer.delete(keys)) == 0
        peer.touch(keys)


# --- putting and getting ---


def test_a_block_is_stored_once(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 8), keys_of(8)
    assert count(blocks.get(keys)) == {MISS: 8}
    assert count(blocks.put(keys)) == {STORED: 8}
    assert count(blocks.put(keys)) == {EXISTS: 8}
    assert count(blocks.get(keys)) == {HIT: 8}


def test_hits_and_misses_in_one_batch(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 20), keys_of(20)
    blocks.put(keys[::3].copy())
    assert (blocks.get(keys) == np.where(np.arange(20) % 3 == 0, HIT, MISS)).all()


def test_a_key_twice_in_one_batch(peer: Peer) -> None:
    blocks = Blocks(peer, 4)
    keys = keys_of(2)[[0, 1, 0, 1]]
    assert count(blocks.put(keys)) == {STORED: 2, EXISTS: 2}
    assert count(blocks.get(keys)) == {HIT: 4}


def test_lengths_vary_and_are_told(peer: Peer) -> None:
    lengths = np.array([1, 63, 511, 512, 513, 4097, BLOCK - 1, BLOCK], np.uint32)
    keys = keys_of(len(lengths))
    blocks = Blocks(peer, len(lengths))
    blocks.memory[:] = blocks_of(keys)
    source = blocks.slices.copy()
    source["length"] = lengths
    assert count(peer.put_from(keys, source)) == {STORED: len(keys)}
    blocks.memory[:] = 0
    told = np.zeros(len(keys), np.uint32)
    assert count(peer.get_into(keys, blocks.slices, lengths=told, checksum=True)) == {HIT: len(keys)}
    assert told.tolist() == lengths.tolist()
    for row, key, length in zip(blocks.memory, keys, lengths, strict=True):
        assert np.array_equal(row[:length], blocks_of(key.reshape(1, 16))[0, :length])
        assert not row[length:].any()
    exact = peer.get_into(keys, blocks.slices, exact=True)
    assert exact.tolist() == [Status.ERROR_LENGTH] * (len(keys) - 1) + [HIT]


def test_given_checksums_are_held_against_what_arrives(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 3), keys_of(3)
    sums = checksums_of(blocks_of(keys))
    sums[1] ^= np.uint64(1)
    assert blocks.put(keys, checksums=sums).tolist() == [STORED, Status.CORRUPT, STORED]
    assert blocks.get(keys, checksum=True).tolist() == [HIT, MISS, HIT]
    for wrong in (sums[:2], sums.astype(np.int64), sums.reshape(1, 3)):
        with pytest.raises(LocalError, match="checksums"):
            blocks.put(keys, checksums=wrong)


def test_a_payload_that_was_altered_in_memory(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, keys = Blocks(peer, 1), keys_of(1)
    blocks.put(keys)
    arena = node.node.memory.array
    at = arena.tobytes().index(blocks_of(keys)[0, :64].tobytes())
    arena[at + BLOCK - 1] ^= 1
    del arena  # or it cannot be unmapped
    slices = blocks.slices
    assert peer.get_into(keys, slices).tolist() == [HIT]  # key, length, generation and time are right
    assert peer.get_into(keys, slices, checksum=True).tolist() == [Status.CORRUPT]
    assert connect(node, checksum=True).checksum
    assert only(peer)["corrupt"] == 1


def test_slices_that_are_too_short_or_outside(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 4), keys_of(4)
    blocks.put(keys)
    slices = blocks.slices.copy()
    slices["length"][0] -= 1
    slices["offset"][1] = blocks.memory.nbytes - BLOCK + 1
    slices["region"][2] = 12345
    expected = [Status.ERROR_LENGTH, Status.ERROR_BOUNDS, Status.ERROR_BOUNDS, HIT]
    assert peer.get_into(keys, slices).tolist() == expected
    assert peer.get_into(keys, slices).tolist() == expected  # over the same channel: it has not suffered
    fresh = keys_of(4, seed=1)
    put = peer.put_from(fresh, slices)
    assert put.tolist() == [STORED, Status.ERROR_BOUNDS, Status.ERROR_BOUNDS, STORED]


def test_blocks_longer_than_the_namespaces(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 2, BLOCK + 1), keys_of(2)
    assert count(blocks.put(keys)) == {Status.ERROR_TOO_LARGE: 2}
    slices = blocks.slices.copy()
    slices["length"] = 0
    assert count(peer.put_from(keys, slices)) == {Status.ERROR_LENGTH: 2}


def test_five_thousand_keys(node: NodeThread, connect: Connect) -> None:
    n, length = 5000, 1024
    peer = connect(node, namespace="many", block_bytes=length, align=512)
    blocks, keys = Blocks(peer, n, length), keys_of(n)
    assert count(blocks.put(keys)) == {STORED: n}
    assert count(blocks.get(keys)) == {HIT: n}
    assert count(blocks.get(keys, checksum=True)) == {HIT: n}
    assert count(peer.exists(keys)) == {HIT: n}
    assert peer.match(keys) == n


def test_locations_are_cached(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 10), keys_of(10)
    blocks.put(keys)
    blocks.get(keys)
    cold = only(peer)
    assert (cold["hits"], cold["lookups"], cold["cached"]) == (10, 10, 0)
    blocks.get(keys)
    warm = only(peer)
    assert (warm["hits"], warm["lookups"], warm["cached"]) == (20, 10, 10)
    assert warm["bytes"] == 20 * BLOCK
    assert warm["channels_busy"] == 0


def test_strict_readers(node: NodeThread, connect: Connect) -> None:
    peer = connect(node, strict=True)
    assert only(peer)["strict"]
    blocks, keys = Blocks(peer, 64), keys_of(64)
    blocks.put(keys[:48])
    for _ in range(3):
        assert (blocks.get(keys) == np.where(np.arange(64) < 48, HIT, MISS)).all()
    assert peer.match(keys) == 48


def test_the_node_advises_strictness(start_node: StartNode, connect: Connect) -> None:
    node = start_node(clock="strict")
    assert only(connect(node))["strict"]
    assert not only(connect(node, strict=False))["strict"]


def test_no_time_at_all(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 8), keys_of(8)
    blocks.put(keys)
    for timeout in (0, -1):
        with within(1):
            assert count(blocks.get(keys, timeout=timeout)) == {Status.TIMEOUT: 8}
    with within(1):
        assert count(peer.exists(keys, timeout=0)) == {Status.TIMEOUT: 8}
        assert count(peer.pin(keys, 1, timeout=0)) == {Status.TIMEOUT: 8}
        assert peer.match(keys, timeout=0) == 0
        assert Status.ERROR_LINK not in count(blocks.put(keys_of(8, seed=1), timeout=0))
    assert count(blocks.get(keys)) == {HIT: 8}
    assert count(blocks.get(keys, timeout=float("inf"))) == {HIT: 8}
    assert count(blocks.put(keys, timeout=float("inf"))) == {EXISTS: 8}


# --- finding ---


@pytest.mark.parametrize("gap", [0, 5, 15, 16, 79, 80, 100, 335, 336, 337, 399, 400])
def test_match_counts_up_to_the_first_gap(prefix: tuple[Peer, Any], gap: int) -> None:
    peer, keys = prefix
    asked = keys.copy()
    if gap < len(keys):
        asked[gap] = keys_of(1, seed=9)
    assert peer.match(asked) == gap
    assert peer.match(asked[:300]) == min(gap, 300)
    assert (peer.exists(asked) == np.where(np.arange(len(asked)) == gap, MISS, HIT)).all()


@pytest.fixture
def prefix(node: NodeThread, connect: Connect) -> tuple[Peer, Any]:
    peer = connect(node, namespace="prefix", block_bytes=1024, align=512)
    blocks, keys = Blocks(peer, 400, 1024), keys_of(400)
    assert count(blocks.put(keys)) == {STORED: 400}
    return peer, keys


def test_exists_fetches_nothing(peer: Peer) -> None:
    blocks, keys = Blocks(peer, 6), keys_of(6)
    blocks.put(keys[:4])
    assert peer.exists(keys).tolist() == [HIT] * 4 + [MISS] * 2
    assert only(peer)["bytes"] <= 4 * BLOCK
    assert peer.match(keys) == 4


# --- keeping ---


def flood(blocks: Blocks, seed: int, n: int = 300) -> None:
    """Stores so much that everything which may go has to go."""
    for i in range(n // len(blocks.slices)):
        blocks.put(keys_of(len(blocks.slices), seed=1000 * seed + i))


def test_touched_blocks_outlive_others(node: NodeThread, connect: Connect) -> None:
    peer = connect(node, auto_touch=False)
    blocks, old, idle = Blocks(peer, 50), keys_of(50, seed=1), keys_of(50, seed=2)
    assert count(blocks.put(old)) == count(blocks.put(idle)) == {STORED: 50}
    peer.touch(old)
    until(lambda: stats_of(node)["touches"] >= 50)
    for seed in range(10, 16):
        assert count(blocks.put(keys_of(25, seed=seed))) == {STORED: 25}
    until(lambda: stats_of(node)["evictions"] >= 50)
    assert count(blocks.get(old)) == {HIT: 50}
    assert count(blocks.get(idle))[MISS] >= 25


@pytest.mark.parametrize("automatic", [True, False])
def test_gets_touch_by_themselves_if_wanted(
    node: NodeThread, connect: Connect, automatic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(touches, "INTERVAL", 0.01)
    silent, noted = connect(node, auto_touch=False), connect(node, auto_touch=True)
    keys = keys_of(10)
    Blocks(silent, 10).put(keys)
    assert count(Blocks(silent, 10).get(keys)) == {HIT: 10}
    assert count(Blocks(silent if not automatic else noted, 10).get(keys)) == {HIT: 10}
    if automatic:
        until(lambda: stats_of(node)["touches"] == 10)
    else:
        silent.node_stats()  # an answer to what was sent later than any touch
        assert stats_of(node)["touches"] == 0


def test_a_pin_holds_until_its_time_is_over(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, pinned, brief = Blocks(peer, 50), keys_of(20, seed=1), keys_of(20, seed=2)
    blocks.put(pinned)
    blocks.put(brief)
    assert count(peer.pin(pinned, 600)) == {DONE: 20}
    assert count(peer.pin(brief, 0.05)) == {DONE: 20}
    assert peer.pin(keys_of(1, seed=3), 1).tolist() == [MISS]
    until(lambda: stats_of(node)["extents_pinned"] == 20, what="the brief pins have expired")
    flood(blocks, 1)
    assert count(blocks.get(pinned)) == {HIT: 20}
    assert count(blocks.get(brief)) == {MISS: 20}
    assert count(peer.unpin(pinned)) == {DONE: 20}
    assert count(peer.unpin(pinned)) == {MISS: 20}
    flood(blocks, 2)
    assert count(blocks.get(pinned)) == {MISS: 20}


def test_pins_that_cannot_be(peer: Peer) -> None:
    for ttl in (0, -1, 0.0001, 1e9):
        with pytest.raises(LocalError, match="ttl"):
            peer.pin(keys_of(1), ttl)


def test_no_room_is_an_error_within_the_deadline(node: NodeThread, connect: Connect) -> None:
    peer = connect(node, namespace="slow", grace=30)  # nothing that goes makes room before the test is over
    blocks, n = Blocks(peer, 50), 0
    while count(blocks.put(keys_of(50, seed=n), timeout=0.5)) == {STORED: 50}:
        n += 1
        assert n < 20
    assert count(blocks.get(keys_of(50, seed=n - 1))) == {HIT: 50}
    pinned = sum(count(peer.pin(keys_of(50, seed=i), 60)).get(DONE, 0) for i in range(n))
    assert Status.ERROR_FULL in count(np.concatenate([peer.pin(keys_of(50, seed=i), 60) for i in range(n)]))
    assert pinned
    with within(4):
        assert count(blocks.put(keys_of(50, seed=99), timeout=1)) == {Status.ERROR_FULL: 50}
    assert stats_of(node, "slow")["extents_filling"] == 0
    assert count(blocks.get(keys_of(50, seed=99))) == {MISS: 50}


def test_what_was_deleted_is_never_served(node: NodeThread, connect: Connect) -> None:
    peer, other = connect(node), connect(node)
    blocks, warm, keys = Blocks(peer, 10), Blocks(other, 10), keys_of(10)
    blocks.put(keys)
    for reader in (blocks, warm):
        assert count(reader.get(keys)) == {HIT: 10}
    assert count(peer.delete(keys[:5])) == {DONE: 5}
    assert count(peer.delete(keys[:5])) == {MISS: 5}
    for reader in (blocks, warm):  # whose caches still have the locations
        assert reader.get(keys).tolist() == [MISS] * 5 + [HIT] * 5
    assert blocks.put(keys).tolist() == [STORED] * 5 + [EXISTS] * 5
    for reader in (blocks, warm):
        assert count(reader.get(keys)) == {HIT: 10}


def test_stats_of_the_nodes(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    Blocks(peer, 5).put(keys_of(5))
    sections = peer.node_stats()[address_of(node)]
    assert sections["namespace:test"]["blocks"] == 5
    assert sections["node"]["sessions"] == 1
    assert sections["fabric"]["fabric"] == peer.stats()["fabric"]["fabric"]


# --- while things change ---


def test_slabs_that_come_after_connecting(node: NodeThread, connect: Connect) -> None:
    early, writer = connect(node), connect(node)
    slabs = stats_of(node)["slabs"]
    keys = keys_of(100)
    assert count(Blocks(writer, 100).put(keys)) == {STORED: 100}
    assert stats_of(node)["slabs"] > slabs
    assert count(Blocks(early, 100).get(keys)) == {HIT: 100}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_slabs_whose_notice_was_lost_are_asked_for(
    node: NodeThread, connect: Connect, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, writer = connect(node), connect(node)
    session = early._links[0].session
    assert session is not None
    take = session._take
    monkeypatch.setattr(session, "_take", lambda x: None if isinstance(x, m.SlabAdded) else take(x))
    keys = keys_of(100)
    assert count(Blocks(writer, 100).put(keys)) == {STORED: 100}
    blocks = Blocks(early, 100)
    if asynchronous:
        early.submit_get(keys, blocks.slices)
        (ticket,) = until(early.reap)
        assert count(ticket.status) == {HIT: 100}
        assert np.array_equal(blocks.memory, blocks_of(keys))
    else:
        assert count(blocks.get(keys)) == {HIT: 100}


def test_the_index_grows_while_others_read(node: NodeThread, connect: Connect) -> None:
    length, n = 512, 200
    reader, writer = (connect(node, namespace="small", block_bytes=length, align=512) for _ in range(2))
    source, keys = Blocks(writer, n, length), [keys_of(n, seed=i) for i in range(40)]
    source.put(keys[0])
    ended, failure = threading.Event(), []

    def read() -> None:
        blocks = Blocks(reader, n, length)
        while not ended.is_set():
            status = blocks.get(keys[0])
            if count(status) != {HIT: n}:
                failure.append(count(status))
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for part in keys[1:]:
            assert count(source.put(part)) == {STORED: n}
    finally:
        ended.set()
        thread.join()
    assert not failure
    assert stats_of(node, "small")["grows"] >= 1
    late = connect(node, namespace="small")
    for who in (reader, late):
        assert all(count(Blocks(who, n, length).get(part)) == {HIT: n} for part in keys)
    until(lambda: stats_of(node, "small")["tables"] == 1, what="every peer has let go of the old tables")


def test_eight_threads_at_once(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    keys = keys_of(64)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            blocks = Blocks(peer, 16)
            for _ in range(15):
                some = keys[rng.permutation(64)[: rng.integers(1, 16)]]
                assert count(blocks.put(some)).keys() <= {STORED, EXISTS}
                assert count(blocks.get(some, checksum=True)) == {HIT: len(some)}
                assert peer.match(some) == len(some)
                assert count(peer.exists(some)) == {HIT: len(some)}
            blocks.buffer.close()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = stats_of(node)
    assert stats["blocks"] == stats["puts"] == 64
    assert stats["extents_filling"] == 0
    assert only(peer)["channels_idle"] <= 4


def test_more_batches_than_channels(node: NodeThread, connect: Connect) -> None:
    peer = connect(node, max_channels=1)
    keys = keys_of(32)
    Blocks(peer, 32).put(keys)
    outcomes: list[Any] = []

    def work() -> None:
        blocks = Blocks(peer, 32)
        outcomes.extend(count(blocks.get(keys)) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [{HIT: 32}] * 20


def test_closing_a_buffer_waits_for_the_batch_that_uses_it(node: NodeThread, connect: Connect) -> None:
    peer = connect(node)
    blocks, keys = Blocks(peer, 1), keys_of(1)
    blocks.put(keys)
    session = peer._links[0].session
    assert session is not None
    channel = session.pool.try_take()  # as a batch does
    assert channel is not None
    closing = threading.Thread(target=blocks.buffer.close)
    closing.start()
    until(lambda: blocks.buffer.id not in peer._buffers)
    closing.join(0.1)
    assert closing.is_alive()
    session.pool.give_back(channel)
    closing.join(5)
    assert not closing.is_alive()


def test_evicted_blocks_are_misses_and_others_take_their_place(node: NodeThread, connect: Connect) -> None:
    """Many times more than fits, written and read at once: every HIT is the right block."""
    writer, reader = connect(node), connect(node)
    recent: list[int] = []
    ended, failures = threading.Event(), []

    def read() -> None:
        blocks, rng = Blocks(reader, 25), np.random.default_rng(3)
        try:
            while not ended.is_set():
                if recent:
                    seed = recent[int(rng.integers(len(recent)))]
                    assert count(blocks.get(keys_of(25, seed=seed))).keys() <= {HIT, MISS, Status.STALE}
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=read)
    thread.start()
    blocks = Blocks(writer, 25)
    end = time.monotonic() + 5 * GRACE
    seed = 0
    while time.monotonic() < end:
        assert count(blocks.put(keys_of(25, seed=seed), timeout=10)) == {STORED: 25}
        recent.append(seed)
        seed += 1
    ended.set()
    thread.join()
    assert not failures
    assert stats_of(node)["evictions"] > 100


def test_a_namespace_without_memory_is_full(start_node: StartNode, connect: Connect) -> None:
    node = start_node(memory=2 * MIB)
    assert count(Blocks(connect(node), 1).put(keys_of(1))) == {STORED: 1}
    peer = connect(node, namespace="second")
    with within(4):
        assert count(Blocks(peer, 4).put(keys_of(4), timeout=0.5)) == {Status.ERROR_FULL: 4}


def test_a_call_from_the_control_thread_is_refused(peer: Peer) -> None:
    caught: list[BaseException] = []

    def call() -> None:
        try:
            peer.pin(keys_of(1), 1)
        except BaseException as exc:
            caught.append(exc)

    peer._control.loop.call_soon_threadsafe(call)
    until(lambda: caught)
    assert isinstance(caught[0], LocalError)
    assert not isinstance(caught[0], DeadlineError)
